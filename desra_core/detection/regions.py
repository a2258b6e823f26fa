"""The connected components of a mask, and the regions that records hold."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from desra_core.detection.class_weights import weighted_scores
from desra_core.detection.mask import THRESHOLD, Similarity, valid
from desra_core.images.codec import CLASS_COUNT, Labels, Mask
from desra_core.images.parts import row_strips

Counts = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
Severity = Callable[[Counts, npt.NDArray[np.float64], float], npt.NDArray[np.float64]]


class Region(NamedTuple):
    """One component of an artifact mask, as records hold it. Coordinates and areas are pixels of the image."""

    x: int
    y: int
    width: int
    height: int
    area: int
    dominant_class: int | None
    mean_similarity: float
    severity: float


class Components:
    """The 8-connected components of an ``(H, W)`` bool mask, in the order of their first pixels, row by row.

    Methods read one strip of rows at a time: they need little memory beside the numbers.

    Attributes:
        numbers: ``(H, W)`` int32: 1 to N, and 0 where nothing is marked.
        boxes: ``(N, 4)``: x, y, width and height, in pixels of the mask.
        areas: ``(N,)``, in pixels.
    """

    def __init__(self, mask: Mask) -> None:
        count, numbers, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
        self.numbers = np.asarray(numbers, np.int32)
        # OpenCV's own order depends on how it scans, and may depend on its threads. The pixels are assigned from the
        # last to the first: of several assignments to a component the last counts, which is that of its first pixel.
        first = np.zeros(count, np.int64)
        for rows in reversed(list(row_strips(mask.shape))):
            where = np.flatnonzero(mask[rows])[::-1]
            first[self.numbers[rows].ravel()[where]] = where + rows.start * mask.shape[1]
        order = 1 + np.argsort(first[1:])
        self.boxes: Counts = stats[order, : cv2.CC_STAT_AREA].astype(np.int64)
        self.areas: Counts = stats[order, cv2.CC_STAT_AREA].astype(np.int64)
        rank = np.zeros(count, np.int32)
        rank[order] = np.arange(1, count)
        for rows in row_strips(mask.shape):
            self.numbers[rows] = rank[self.numbers[rows]]

    def __len__(self) -> int:
        return len(self.areas)

    def strips(self) -> Iterator[tuple[slice, Mask, npt.NDArray[np.int32]]]:
        """Yield strips of the mask: their rows, the marked pixels, and the component of each marked pixel, from 0."""
        for rows in row_strips(self.numbers.shape):
            inside = self.numbers[rows] > 0
            yield rows, inside, self.numbers[rows][inside] - 1

    def overlap(self, other: Mask) -> Counts:
        """Count the pixels of each component that lie in another mask: ``(N,)``.

        Raises:
            ValueError: The masks differ in size.
        """
        if self.numbers.shape != other.shape:
            raise ValueError(f"masks of the shapes {self.numbers.shape} and {other.shape} cannot be compared")
        found = np.zeros(len(self) + 1, np.int64)
        for rows in row_strips(other.shape):
            found += np.bincount(self.numbers[rows][other[rows]], minlength=found.size)
        return found[1:]

    def covered(self, other: Mask) -> Flags:
        """Find the components with at least half of their pixels in another mask: ``(N,)``; raises as `overlap`."""
        return np.asarray(2 * self.overlap(other) >= self.areas)

    def chosen(self, flags: Flags) -> Mask:
        """Mark the components whose flag of ``(N,)`` is set: ``(H, W)`` bool."""
        return np.asarray(np.concatenate([[False], flags])[self.numbers])

    def crop(self, index: int) -> Mask:
        """Return a component in its box, without other components."""
        x, y, width, height = self.boxes[index]
        return np.asarray(self.numbers[y : y + height, x : x + width] == index + 1)

    def dominant_classes(self, labels: Labels | None) -> list[int | None]:
        """Find each component's most frequent class by the ``(H, W)`` labels; at equal counts, the lower index."""
        if labels is None:
            return [None] * len(self)
        pixels: dict[int, int] = {}
        for rows, inside, numbers in self.strips():
            keys, counts = np.unique(numbers.astype(np.int64) * CLASS_COUNT + labels[rows][inside], return_counts=True)
            for key, count in zip(keys.tolist(), counts.tolist(), strict=True):
                pixels[key] = pixels.get(key, 0) + count
        best = [(0, 0)] * len(self)
        for key, count in pixels.items():
            number, label = divmod(key, CLASS_COUNT)
            best[number] = max(best[number], (count, -label))
        return [-label for _, label in best]


def missing_similarity(
    area: Counts, mean_adjusted: npt.NDArray[np.float64], threshold: float
) -> npt.NDArray[np.float64]:
    """Compute the severity of regions: ``area * (threshold - mean adjusted similarity)``."""
    return area * (threshold - mean_adjusted)


def find_regions(
    mask: Mask,
    similarity: Similarity,
    *,
    threshold: float = THRESHOLD,
    labels: Labels | None = None,
    weights: npt.NDArray[np.float64] | None = None,
    severity: Severity = missing_similarity,
) -> list[Region]:
    """Measure the regions of a mask as records hold them, from top to bottom; means are of similarity, not scores.

    Args:
        mask: ``(H, W)`` bool.
        similarity: ``(H - 2 f, W - 2 f)`` float32, the paper's D, or minus the scores of another detector. The frame of
            width f is empty in the mask.
        threshold, labels, weights: As for `desra_core.detection.artifact_mask`. Without labels regions have no dominant
            class.
        severity: Computes the severities from areas (pixels), mean adjusted similarities (0..1) and threshold.

    Raises:
        ValueError: The mask or the labels are of an image of another size.
    """
    frame = (mask.shape[0] - similarity.shape[0]) // 2
    shape = similarity.shape[0] + 2 * frame, similarity.shape[1] + 2 * frame
    if frame < 0 or mask.shape != shape or (labels is not None and labels.shape != shape):
        sizes = f"mask {mask.shape}, labels {None if labels is None else labels.shape}"
        raise ValueError(f"{sizes} and similarity {similarity.shape} do not belong to one image")
    values, found = np.asarray(similarity), Components(valid(mask, frame))
    classes = None if labels is None else valid(labels, frame)
    raw, adjusted = np.zeros(len(found)), np.zeros(len(found))
    for rows, inside, numbers in found.strips():
        taken, of_class = values[rows][inside], None if classes is None else classes[rows][inside]
        raw += np.bincount(numbers, taken, len(found))
        adjusted += np.bincount(numbers, -weighted_scores(-taken, of_class, weights), len(found))
    columns: tuple[list[Any], ...] = (
        np.add(found.boxes, (frame, frame, 0, 0)).tolist(),
        found.areas.tolist(),
        found.dominant_classes(classes),
        (raw / found.areas).tolist(),
        severity(found.areas, adjusted / found.areas, threshold).tolist(),
    )
    return [Region(*box, *rest) for box, *rest in zip(*columns, strict=True)]
