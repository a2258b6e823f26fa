"""From scores to the artifact mask of an image, and to the regions of the mask (Section 3.3 of the paper).

A mask takes four steps: threshold, morphology, filling of holes, and the area filter. They run on the pixels that have
a score, as if these were the whole image; at the end the mask is padded to the image's size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from desra_core.detection.class_weights import weighted_scores
from desra_core.errors import ArgumentError
from desra_core.images.codec import CLASS_COUNT, Labels, Mask, Pixels, grey_levels
from desra_core.images.parts import row_strips

# From the paper: threshold of the adjusted similarity, minimal area in pixels, side of the window of D in pixels.
THRESHOLD = 0.7
MIN_AREA = 4000
WINDOW = 11

_KERNEL = np.ones((5, 5), np.uint8)
_DILATIONS = 3
_FRAME = WINDOW // 2

Similarity = npt.NDArray[np.float32]
Counts = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


class SimilarityMap(np.ndarray[Any, np.dtype[np.float32]]):
    """A map of the similarity. Its ``frame`` is the width in pixels of the image's border, which has no similarity."""

    frame: int = _FRAME

    def __new__(cls, similarity: Similarity, frame: int) -> SimilarityMap:
        """View values as a map."""
        known = np.asarray(similarity).view(cls)
        known.frame = frame
        return known

    def __array_finalize__(self, source: object) -> None:
        self.frame = getattr(source, "frame", _FRAME)

    def __reduce__(self) -> tuple[Any, ...]:
        return SimilarityMap, (np.asarray(self), self.frame)


def artifact_mask(
    similarity: Similarity,
    *,
    threshold: float = THRESHOLD,
    min_area: int = MIN_AREA,
    labels: Labels | None = None,
    weights: npt.NDArray[np.float64] | None = None,
    frame: int | None = None,
) -> Mask:
    """Mark the artifacts of an image by the paper's D.

    Args:
        similarity: ``(H - 2 frame, W - 2 frame)`` float32, from `variance_similarity`.
        threshold: A pixel is suspect where its adjusted similarity ``clip(w_k D, 0, 1)`` is below this; 0 < threshold
            <= 1.
        min_area: Components of at most this many pixels are dropped.
        labels: ``(H, W)`` uint8 ADE20K class of each pixel. Without labels every weight is 1.
        weights: ``(150,)`` float64, ``w_k`` by class.
        frame: Width in pixels of the border in which the similarity is undefined. By default, a `SimilarityMap` has its
            own frame; another array has half the difference in height to the labels, or without labels 5 (window 11).

    Returns:
        ``(H, W)`` bool. The frame is never marked. Each step is monotone: the mask never grows when ``threshold`` falls
        or when ``min_area`` or a weight rises.

    Raises:
        ArgumentError: The labels are not of the image's size.
    """
    if frame is None:
        by_labels = _FRAME if labels is None else (labels.shape[0] - similarity.shape[0]) // 2
        frame = int(getattr(similarity, "frame", by_labels))
    shape = similarity.shape[0] + 2 * frame, similarity.shape[1] + 2 * frame
    # NumPy would round a Python float to the map's float32 before comparing; np.float64 keeps the threshold exact.
    limit = -np.float64(threshold)
    scores = -np.asarray(similarity)
    return score_mask(scores, shape, threshold=limit, min_area=min_area, labels=labels, weights=weights)


def score_mask(
    scores: npt.NDArray[np.floating[Any]],
    shape: tuple[int, int],
    *,
    threshold: float,
    min_area: int = MIN_AREA,
    labels: Labels | None = None,
    weights: npt.NDArray[np.float64] | None = None,
) -> Mask:
    """Mark the artifacts of an image by the scores of a `desra_core.detection.detectors.Detector`.

    Args:
        scores: ``(H - 2 f, W - 2 f)``, larger where a pixel looks more like an artifact.
        shape: ``(H, W)`` of the image.
        threshold: A pixel is suspect where its score is above this.
        min_area: Components of at most this many pixels are dropped.
        labels, weights: As for `artifact_mask`. Only scores that are minus a similarity can be weighted.

    Returns:
        ``(H, W)`` bool. The frame of width f is never marked.

    Raises:
        ArgumentError: The labels are not of the image's size.
    """
    if labels is not None and labels.shape != shape:
        reason = f"are of shape {labels.shape}, but the image of {shape}"
        raise ArgumentError("labels", reason, "give labels of its size")
    frame = (shape[0] - scores.shape[0]) // 2
    suspect: npt.NDArray[Any] = suspects(scores, frame, threshold=threshold, labels=labels, weights=weights)
    # OpenCV's default border ignores the outside when eroding and adds nothing when dilating.
    suspect = cv2.erode(suspect, _KERNEL)
    if not suspect.any():
        return np.zeros(shape, np.bool_)
    suspect = cv2.dilate(suspect, _KERNEL, iterations=_DILATIONS)
    _, components, stats, _ = cv2.connectedComponentsWithStats(_filled(suspect), connectivity=8)
    kept = stats[:, cv2.CC_STAT_AREA] > min_area
    kept[0] = False
    return np.pad(kept[components], frame)


def suspects(
    scores: npt.NDArray[np.floating[Any]],
    frame: int,
    *,
    threshold: float,
    labels: Labels | None = None,
    weights: npt.NDArray[np.float64] | None = None,
) -> npt.NDArray[np.uint8]:
    """Mark the suspect pixels as 1: the first step to a mask. Parameters are as for `score_mask`; no frame is added."""
    suspect = np.empty(scores.shape, np.uint8)
    for rows in row_strips(scores.shape):
        classes = None if labels is None else valid(labels, frame)[rows]
        suspect[rows] = weighted_scores(scores[rows], classes, weights) > threshold
    return suspect


def valid(image: npt.NDArray[Any], frame: int) -> npt.NDArray[Any]:
    """Cut a frame of a given width off an ``(H, W)`` image; the pixels that have a score remain."""
    return image[frame : image.shape[0] - frame, frame : image.shape[1] - frame]


def assemble_pseudo_gt(mse_sr: Pixels, gan_sr: Pixels, mask: Mask) -> Pixels:
    """Compute the pseudo ground truth ``mask * mse_sr + (1 - mask) * gan_sr``.

    Args:
        mse_sr, gan_sr: ``(H, W)`` or ``(H, W, C)`` uint8 or uint16, C = 1 or 3. Gray is put into colour, and the MSE
            result into the depth of the GAN result.
        mask: ``(H, W)``, true where there is an artifact.

    Raises:
        ArgumentError: The arrays are not of one image.

    Examples:
        >>> mse_sr, gan_sr = np.full((1, 2, 1), 7, np.uint8), np.full((1, 2, 1), 9, np.uint8)
        >>> assemble_pseudo_gt(mse_sr, gan_sr, np.array([[True, False]])).ravel().tolist()
        [7, 9]
    """
    mse_sr, gan_sr = alike(mse_sr, gan_sr, mask)
    return np.where(mask if mse_sr.ndim == 2 else mask[:, :, np.newaxis], mse_sr, gan_sr)


def alike(mse_sr: Pixels, gan_sr: Pixels, mask: Mask) -> tuple[Pixels, Pixels]:
    """Bring two results to the same channels, and the MSE result to the depth of the GAN result.

    Raises:
        ArgumentError: The arrays are not of one image.
    """
    sizes_fit = mse_sr.shape[:2] == gan_sr.shape[:2] == mask.shape and mse_sr.ndim == gan_sr.ndim
    if not sizes_fit or len({1, *mse_sr.shape[2:], *gan_sr.shape[2:]}) > 2:
        reason = f"is of shape {mse_sr.shape}, but gan_sr of {gan_sr.shape} and the mask of {mask.shape}"
        raise ArgumentError("mse_sr", reason, "give two results of one photo, and their mask")
    if mse_sr.dtype != gan_sr.dtype:
        levels = grey_levels(mse_sr) * (257 if gan_sr.dtype == np.uint16 else 1)
        mse_sr = np.rint(levels).astype(gan_sr.dtype)  # type: ignore[assignment]
    shape = np.broadcast_shapes(mse_sr.shape, gan_sr.shape)
    return np.broadcast_to(mse_sr, shape), np.broadcast_to(gan_sr, shape)  # type: ignore[return-value]


def _filled(binary: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Fill the zeros without an 8-connected path to the border (``binary_fill_holes`` with a 3x3 structure)."""
    _, components, stats, _ = cv2.connectedComponentsWithStats(1 - binary, connectivity=8)
    height, width = binary.shape
    left, top = stats[:, cv2.CC_STAT_LEFT], stats[:, cv2.CC_STAT_TOP]
    right, bottom = left + stats[:, cv2.CC_STAT_WIDTH], top + stats[:, cv2.CC_STAT_HEIGHT]
    filled = (left > 0) & (top > 0) & (right < width) & (bottom < height)
    filled[0] = True
    return np.asarray(filled.astype(np.uint8)[components])


class Region(NamedTuple):
    """One component of an artifact mask, as records hold it.

    Attributes:
        x, y, width, height: The box, in pixels of the image.
        area: Number of pixels.
        dominant_class: The most frequent ADE20K class, 0..149; None without labels.
        mean_similarity: The mean similarity, without class weights.
        severity: The area times (threshold - mean adjusted similarity), or the percentage of viewers who notice the
            region (`desra_core.detection.severity`).
    """

    x: int
    y: int
    width: int
    height: int
    area: int
    dominant_class: int | None
    mean_similarity: float
    severity: float


def severity_text(severity: float, *, by_viewers: bool, width: int = 0) -> str:
    """Write a severity: ``severity 12.3``, or ``noticed by 73 %`` where a severity model has set it.

    Shorter numbers are padded to ``width`` characters.
    """
    return f"noticed by {severity:{width}.0f} %" if by_viewers else f"severity {severity:{width}.1f}"


class Components:
    """The 8-connected components of an ``(H, W)`` bool mask, in the order of their first pixels, row by row.

    Methods read one strip of rows at a time, so that they need little memory besides ``numbers``.

    Attributes:
        numbers: ``(H, W)`` int32: 1 to N, and 0 where nothing is marked.
        boxes: ``(N, 4)``: x, y, width and height, in pixels of the mask.
        areas: ``(N,)``, in pixels.
    """

    def __init__(self, mask: Mask) -> None:
        count, numbers, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
        self.numbers = np.asarray(numbers, np.int32)
        # OpenCV's own order depends on how it scans, and may depend on its threads. So find each component's first
        # pixel: the loop goes from the last pixel to the first, and of its assignments to a component the last stays.
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
            ArgumentError: The masks differ in size.
        """
        if self.numbers.shape != other.shape:
            reason = f"are of the shapes {self.numbers.shape} and {other.shape}"
            raise ArgumentError("masks", reason, "give two masks of one image")
        found = np.zeros(len(self) + 1, np.int64)
        for rows in row_strips(other.shape):
            found += np.bincount(self.numbers[rows][other[rows]], minlength=found.size)
        return found[1:]

    def covered(self, other: Mask) -> Flags:
        """Flag components with at least half of their pixels in another mask: ``(N,)`` bool (raises as `overlap`)."""
        return np.asarray(2 * self.overlap(other) >= self.areas)

    def chosen(self, flags: Flags) -> Mask:
        """Mark the components whose flag of ``(N,)`` is set: ``(H, W)`` bool."""
        return np.asarray(np.concatenate([[False], flags])[self.numbers])

    def crop(self, index: int) -> Mask:
        """Cut out the box of a component, in which only this component is marked: ``(h, w)`` bool."""
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


def find_regions(
    mask: Mask,
    similarity: Similarity,
    *,
    threshold: float = THRESHOLD,
    labels: Labels | None = None,
    weights: npt.NDArray[np.float64] | None = None,
) -> list[Region]:
    """Measure the regions of a mask as records hold them, from top to bottom; means are of similarity, not scores.

    Args:
        mask: ``(H, W)`` bool.
        similarity: ``(H - 2 f, W - 2 f)`` float32, the paper's D, or minus the scores of another detector. The frame of
            width f is empty in the mask.
        threshold, labels, weights: As for `desra_core.detection.artifact_mask`. Without labels regions have no dominant
            class.

    Raises:
        ArgumentError: The mask or the labels are of an image of another size.
    """
    frame = (mask.shape[0] - similarity.shape[0]) // 2
    shape = similarity.shape[0] + 2 * frame, similarity.shape[1] + 2 * frame
    if frame < 0 or mask.shape != shape or (labels is not None and labels.shape != shape):
        sizes = f"mask {mask.shape}, labels {None if labels is None else labels.shape}"
        reason = f"of the shape {similarity.shape} does not belong to the image of {sizes}"
        raise ArgumentError("similarity", reason, "give mask, similarity and labels of one image")
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
        (found.areas * (threshold - adjusted / found.areas)).tolist(),
    )
    return [Region(*box, *rest) for box, *rest in zip(*columns, strict=True)]
