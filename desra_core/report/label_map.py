"""Class labels as a picture and its legend."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from desra_core.detection.class_weights import class_names
from desra_core.images.codec import Labels
from desra_core.images.crops import RGB

# Okabe and Ito's colours for the classes with most pixels, one gray for all others.
_COLOURS = ((0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (213, 94, 0), (240, 228, 66),
            (0, 0, 0))  # fmt: skip
_OTHER = (150, 150, 150)


class ClassShare(NamedTuple):
    """An entry of the legend: class name, its colour in the picture as ``#rrggbb``, and its share of the pixels."""

    name: str
    colour: str
    share: float


def label_picture(labels: Labels, *, largest: int) -> RGB:
    """Colour ``(H, W)`` classes, each the same as in `class_shares`; longer sides are thinned out to ``largest``."""
    colours = np.full((256, 3), _OTHER, np.uint8)
    order = _by_pixels(labels)[0][: len(_COLOURS)]
    colours[order] = _COLOURS[: order.size]
    step = max(1.0, max(labels.shape) / largest)
    rows, columns = ((np.arange(max(1, round(side / step))) * step).astype(int) for side in labels.shape)
    return np.asarray(colours[labels[rows[:, np.newaxis], columns]])


def class_shares(labels: Labels) -> list[ClassShare]:
    """The classes that are there, those with most pixels first."""
    names, (order, pixels) = class_names(), _by_pixels(labels)
    colours = [*_COLOURS, *[_OTHER] * order.size]
    return [
        ClassShare(names[index], "#" + bytes(colour).hex(), size / labels.size)
        for index, size, colour in zip(order.tolist(), pixels.tolist(), colours, strict=False)
    ]


def _by_pixels(labels: Labels) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Classes and their pixels, most pixels first."""
    pixels = np.bincount(labels.ravel())
    order = np.argsort(-pixels, kind="stable")[: np.count_nonzero(pixels)]
    return order, pixels[order]
