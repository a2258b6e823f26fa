"""The regions of a mask, numbered as people read: by their first pixel, row by row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from desra_core.detection.class_weights import CLASS_COUNT
from desra_core.images.codec import Labels, Mask

Counts = npt.NDArray[np.int64]


class MaskRegion(NamedTuple):
    """One 8-connected component of a mask.

    Attributes
    ----------
    x, y, width, height
        Its box, in pixels of the image.
    area
        Pixels.
    inside
        How many of them lie in the other mask.
    dominant_class
        The most frequent ADE20K class; None without labels.
    """

    x: int
    y: int
    width: int
    height: int
    area: int
    inside: int
    dominant_class: int | None

    @property
    def covered(self) -> bool:
        """Whether at least half of it lies in the other mask."""
        return 2 * self.inside >= self.area


class Components:
    """The 8-connected components of an ``(H, W)`` bool mask, in reading order.

    Attributes
    ----------
    area
        ``(N,)``, the pixels of each.
    """

    def __init__(self, mask: Mask) -> None:
        count, components, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
        self._shape = mask.shape
        self._where = np.flatnonzero(mask)
        numbers = components.ravel()[self._where]
        # Of several assignments the last one counts: the first pixel's.
        first = np.zeros(count, np.int64)
        first[numbers[::-1]] = self._where[::-1]
        order = 1 + np.argsort(first[1:])
        rank = np.zeros(count, np.int64)
        rank[order] = np.arange(count - 1)
        self._numbers = rank[numbers]
        self._boxes = stats[order, : cv2.CC_STAT_AREA]
        self.area: Counts = stats[order, cv2.CC_STAT_AREA].astype(np.int64)

    def __len__(self) -> int:
        return len(self.area)

    def inside(self, other: Mask) -> Counts:
        """``(N,)``, how many pixels of each lie in another mask."""
        return np.bincount(self._numbers[other.ravel()[self._where]], minlength=len(self)).astype(np.int64)

    def chosen(self, flags: npt.NDArray[np.bool_]) -> Mask:
        """``(H, W)`` bool, those components whose flag of ``(N,)`` is set."""
        mask = np.zeros(self._shape, np.bool_)
        mask.ravel()[self._where] = flags[self._numbers]
        return mask

    def dominant_classes(self, labels: Labels) -> list[int]:
        """The most frequent class of each; the lower index wins a tie."""
        keys = self._numbers * CLASS_COUNT + labels.ravel()[self._where]
        pairs, pixels = np.unique(keys, return_counts=True)
        component, label = np.divmod(pairs, CLASS_COUNT)
        order = np.lexsort((label, -pixels, component))
        _, best = np.unique(component[order], return_index=True)
        return [int(index) for index in label[order][best]]

    def regions(self, other: Mask, labels: Labels | None, offset: int) -> Iterator[MaskRegion]:
        """Measure each against another mask.

        Parameters
        ----------
        other
            ``(H, W)`` bool.
        labels
            ``(H, W)`` uint8 in 0..149.
        offset
            Of the mask's left upper corner in the image.
        """
        classes: list[int] | list[None] = [None] * len(self) if labels is None else self.dominant_classes(labels)
        rows = zip(self._boxes.tolist(), self.area.tolist(), self.inside(other).tolist(), classes, strict=True)
        for (x, y, width, height), area, inside, dominant_class in rows:
            yield MaskRegion(x + offset, y + offset, width, height, area, inside, dominant_class)
