"""What is in a mask: its connected components, measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from desra_core.detection.class_weights import CLASS_COUNT
from desra_core.detection.mask import THRESHOLD, Similarity, adjusted_similarity, valid
from desra_core.images.codec import Labels, Mask
from desra_core.images.tiling import row_strips


class Region(NamedTuple):
    """One 8-connected component of a mask. Coordinates and areas are pixels of the image."""

    x: int
    y: int
    width: int
    height: int
    area: int
    dominant_class: int | None
    mean_similarity: float
    severity: float


Severity = Callable[[npt.NDArray[np.int64], npt.NDArray[np.float64], float], npt.NDArray[np.float64]]


def missing_similarity(
    area: npt.NDArray[np.int64], mean_adjusted: npt.NDArray[np.float64], threshold: float
) -> npt.NDArray[np.float64]:
    """Severity of regions: ``area * mean(threshold - adjusted similarity)``. Any function of this form replaces it."""
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
    """Measure the regions of a mask, from top to bottom.

    Parameters
    ----------
    mask
        ``(H, W)`` bool.
    similarity
        ``(H - 2 f, W - 2 f)`` float32; the frame of width f is empty in the mask.
    threshold, labels, weights
        As for `desra_core.detection.artifact_mask`. Without labels regions have no dominant class.
    severity
        Ranks regions from area (pixels), mean adjusted similarity (0..1) and threshold.

    Raises
    ------
    ValueError
        The mask or the labels are of an image of another size.
    """
    frame = (mask.shape[0] - similarity.shape[0]) // 2
    shape = similarity.shape[0] + 2 * frame, similarity.shape[1] + 2 * frame
    if frame < 0 or mask.shape != shape or (labels is not None and labels.shape != shape):
        sizes = f"mask {mask.shape}, labels {None if labels is None else labels.shape}"
        raise ValueError(f"{sizes} and similarity {similarity.shape} do not belong to one image")
    similarity = np.asarray(similarity)
    marked = valid(mask, frame)
    count, components, stats, _ = cv2.connectedComponentsWithStats(marked.astype(np.uint8), connectivity=8)
    sums = _Sums(count)
    for rows in row_strips(marked.shape):
        inside = marked[rows]
        classes = None if labels is None else valid(labels, frame)[rows][inside]
        sums.add(components[rows][inside], similarity[rows][inside], classes, weights)
    area = stats[1:, cv2.CC_STAT_AREA].astype(np.int64)
    mean_similarity = sums.similarity[1:] / area
    severities = severity(area, sums.adjusted[1:] / area, threshold)
    dominant = sums.dominant_classes()
    return [
        Region(
            x=int(stats[index, cv2.CC_STAT_LEFT]) + frame,
            y=int(stats[index, cv2.CC_STAT_TOP]) + frame,
            width=int(stats[index, cv2.CC_STAT_WIDTH]),
            height=int(stats[index, cv2.CC_STAT_HEIGHT]),
            area=int(area[index - 1]),
            dominant_class=dominant.get(index),
            mean_similarity=float(mean_similarity[index - 1]),
            severity=float(severities[index - 1]),
        )
        for index in sums.order
    ]


class _Sums:
    """Sums over the pixels of each component, gathered strip by strip from top to bottom.

    ``order`` lists the components by their first pixel in reading order: OpenCV's own numbering may depend on its
    threads.
    """

    def __init__(self, count: int) -> None:
        self.similarity = np.zeros(count)
        self.adjusted = np.zeros(count)
        self.order: list[int] = []
        self._seen = np.zeros(count, np.bool_)
        self._pixels: dict[tuple[int, int], int] = {}

    def add(
        self,
        component: npt.NDArray[Any],
        similarity: Similarity,
        classes: Labels | None,
        weights: npt.NDArray[np.float64] | None,
    ) -> None:
        """Take in pixels: the component, similarity and class of each."""
        count = self._seen.size
        adjusted = adjusted_similarity(similarity, classes, weights)
        self.similarity += np.bincount(component, weights=similarity, minlength=count)
        self.adjusted += np.bincount(component, weights=adjusted, minlength=count)
        fresh = component[~self._seen[component]]
        found, first = np.unique(fresh, return_index=True)
        self.order += fresh[np.sort(first)].tolist()
        self._seen[found] = True
        if classes is None:
            return
        pairs, pixels = np.unique(component.astype(np.int64) * CLASS_COUNT + classes, return_counts=True)
        for pair, size in zip(pairs.tolist(), pixels.tolist(), strict=True):
            key = divmod(pair, CLASS_COUNT)
            self._pixels[key] = self._pixels.get(key, 0) + size

    def dominant_classes(self) -> dict[int, int]:
        """The most frequent class of each component; the lower index wins a tie."""
        best: dict[int, tuple[int, int]] = {}
        for (component, label), size in self._pixels.items():
            best[component] = max(best.get(component, (0, 0)), (size, -label))
        return {component: -label for component, (_, label) in best.items()}
