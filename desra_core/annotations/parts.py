"""The parts of a mask, cut out one by one."""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np

from desra_core.images.codec import Mask


class Part(NamedTuple):
    """One 8-connected component of a mask: left and top in pixels of the image, ``(h, w)`` bool, and its pixels."""

    x: int
    y: int
    crop: Mask
    area: int

    def on(self, shape: tuple[int, int]) -> Mask:
        """The part alone on an image of ``(H, W)``, column by column in memory, as run-length encodings go."""
        mask = np.zeros(shape, np.bool_, order="F")
        mask[self.y : self.y + self.crop.shape[0], self.x : self.x + self.crop.shape[1]] = self.crop
        return mask


def parts_of(mask: Mask) -> list[Part]:
    """Cut out the components of an ``(H, W)`` mask, by their first pixel in reading order, as regions are recorded."""
    count, components, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    parts = []
    for number in range(1, count):
        x, y, width, height, area = stats[number].tolist()
        parts.append(Part(x, y, components[y : y + height, x : x + width] == number, area))
    return sorted(parts, key=lambda part: (part.y, part.x + int(part.crop[0].argmax())))
