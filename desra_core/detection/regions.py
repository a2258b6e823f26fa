"""What is in a mask: its connected components, measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from desra_core.detection.mask import THRESHOLD, Similarity, adjusted_similarity
from desra_core.detection.semantics import CLASS_COUNT
from desra_core.imageio import Labels, Mask


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
    """
    count, components, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    frame = (mask.shape[0] - similarity.shape[0]) // 2
    rows, columns = np.nonzero(mask)
    component = components[rows, columns].astype(np.int64)
    # OpenCV's numbering may depend on its threads; the first pixel in reading order does not.
    first = np.full(count, component.size)
    np.minimum.at(first, component, np.arange(component.size))
    order = np.argsort(first[1:], kind="stable") + 1

    inside = similarity[rows - frame, columns - frame]
    classes = None if labels is None else labels[rows, columns]
    adjusted = adjusted_similarity(inside, classes, weights)
    area = np.bincount(component, minlength=count)
    area[0] = 1  # the background, which is no region, is not to divide by zero
    mean_similarity = np.bincount(component, weights=inside, minlength=count) / area
    mean_adjusted = np.bincount(component, weights=adjusted, minlength=count) / area
    severities = severity(area[1:], mean_adjusted[1:], threshold)
    dominant = _dominant_classes(component, classes, count)
    return [
        Region(
            x=int(stats[index, cv2.CC_STAT_LEFT]),
            y=int(stats[index, cv2.CC_STAT_TOP]),
            width=int(stats[index, cv2.CC_STAT_WIDTH]),
            height=int(stats[index, cv2.CC_STAT_HEIGHT]),
            area=int(area[index]),
            dominant_class=dominant[index],
            mean_similarity=float(mean_similarity[index]),
            severity=float(severities[index - 1]),
        )
        for index in order
    ]


def _dominant_classes(component: npt.NDArray[np.int64], classes: Labels | None, count: int) -> list[int | None]:
    """The most frequent class of each component; the lower index wins a tie."""
    if classes is None:
        return [None] * count
    pairs = component * CLASS_COUNT + classes
    found, pixels = np.unique(pairs, return_counts=True)
    dominant: list[int | None] = [None] * count
    best = [0] * count
    for pair, size in zip(found.tolist(), pixels.tolist(), strict=True):
        index, label = divmod(pair, CLASS_COUNT)
        if size > best[index]:
            best[index], dominant[index] = size, label
    return dominant
