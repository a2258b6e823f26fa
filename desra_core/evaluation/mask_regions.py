"""The regions of one mask, held against another one."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from desra_core.detection.regions import Components
from desra_core.images.codec import Labels, Mask


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


def mask_regions(components: Components, other: Mask, labels: Labels | None, offset: int) -> list[MaskRegion]:
    """Measure the components of a mask against another mask, in reading order.

    Parameters
    ----------
    components
        Of an ``(H, W)`` mask.
    other
        ``(H, W)`` bool.
    labels
        ``(H, W)`` uint8 in 0..149.
    offset
        Of the mask's left upper corner in the image, in pixels, to the right and down.
    """
    boxes = np.add(components.boxes, (offset, offset, 0, 0)).tolist()
    measured = components.areas.tolist(), components.overlap(other).tolist(), components.dominant_classes(labels)
    rows = zip(boxes, *measured, strict=True)
    return [MaskRegion(*box, *rest) for box, *rest in rows]
