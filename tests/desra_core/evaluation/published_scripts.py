"""The rules of the authors' three metric scripts, written again: slowly, component by component."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

EIGHT = np.ones((3, 3), bool)


def components(mask: np.ndarray) -> list[np.ndarray]:
    """List the 8-connected components of a mask, by their first pixel in reading order."""
    numbers, count = ndimage.label(mask, EIGHT)
    found = [numbers == number for number in range(1, count + 1)]
    return sorted(found, key=lambda component: tuple(np.argwhere(component)[0]))


def lies_inside(component: np.ndarray, other: np.ndarray) -> bool:
    return bool((component & other).sum() / component.sum() >= 0.5)


def iou(masks: list[np.ndarray], truths: list[np.ndarray]) -> float:
    """Compute the mean IoU: NaN where both masks of an image are empty, as in the authors' script."""
    total = 0.0
    for mask, truth in zip(masks, truths, strict=True):
        with np.errstate(invalid="ignore"):
            total += np.sum(mask & truth) / np.sum(mask | truth)
    return float(total / len(masks))


def precision(masks: list[np.ndarray], truths: list[np.ndarray]) -> float:
    verdicts = [
        lies_inside(component, truth)
        for mask, truth in zip(masks, truths, strict=True)
        for component in components(mask)
    ]
    return sum(verdicts) / len(verdicts)


def recall(masks: list[np.ndarray], truths: list[np.ndarray]) -> float:
    return precision(truths, masks)
