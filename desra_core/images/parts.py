"""Parts of images: strips, tiles and windows to compute on, and the crops that reports and verdicts show."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from desra_core.images.codec import Pixels, bgr8

# Sides in pixels: of the smallest window around a region, which shows the surroundings too, and of the largest crop.
_SMALLEST, LARGEST = 192, 400
_CONTEXT = 1.4  # a window's side is this times the longer side of its region
_QUALITY = 88

RGB = npt.NDArray[np.uint8]


class Rectangle(NamedTuple):
    """A part of an image, in pixels: its upper left corner and its size."""

    y: int
    x: int
    height: int
    width: int

    @property
    def slices(self) -> tuple[slice, slice]:
        """Rows and columns, to index an array with."""
        return slice(self.y, self.y + self.height), slice(self.x, self.x + self.width)

    def source(self, halo: int) -> Rectangle:
        """Return the part of the input that a filter of radius ``halo`` reads for this part of its smaller output."""
        return Rectangle(self.y, self.x, self.height + 2 * halo, self.width + 2 * halo)


def row_strips(shape: tuple[int, ...], pixels: int = 2**20) -> Iterator[slice]:
    """Yield ranges of rows of about ``pixels`` pixels, from top to bottom, to bound the memory of copies."""
    step = max(1, pixels // shape[1])
    return (slice(row, row + step) for row in range(0, shape[0], step))


def strips_with_halo(shape: tuple[int, ...], halo: int, pixels: int) -> Iterator[tuple[slice, slice, slice]]:
    """Yield the ranges of `row_strips` with the rows that a filter of radius ``halo`` reads for them.

    Yields:
        The rows of a strip, the rows to read, and which of those are the strip.

        >>> list(strips_with_halo((4, 10), 1, 20))[1]
        (slice(2, 4, None), slice(1, 5, None), slice(1, 3, None))
    """
    for rows in row_strips(shape, pixels):
        first = max(0, rows.start - halo)
        yield rows, slice(first, rows.stop + halo), slice(rows.start - first, rows.stop - first)


def grid(height: int, width: int, size: int) -> Iterator[Rectangle]:
    """Yield tiles of ``size`` x ``size`` that cover an image exactly once, row by row; the last ones are smaller.

    >>> [tile.x for tile in grid(2, 5, 2)], [tile.width for tile in grid(2, 5, 2)]
    ([0, 2, 4], [2, 2, 1])
    """
    for y in range(0, height, size):
        for x in range(0, width, size):
            yield Rectangle(y, x, min(size, height - y), min(size, width - x))


class Window(NamedTuple):
    """A part of an image that a network gets, and the part of its results that is kept."""

    source: Rectangle
    kept: Rectangle


def windows(height: int, width: int, *, side: int, halo: int, multiple: int = 1) -> list[Window]:
    """Cut an image into as few windows of one size as possible, so that they can be run in batches.

    Args:
        height, width: The size of the image, multiples of ``multiple``.
        side: The largest side of a window, a multiple of ``multiple`` and greater than ``2 * halo``.
        halo: Least distance in pixels between a kept pixel and a border of its window, unless that border is one of
            the image, too; a multiple of ``multiple``.
        multiple: Starts and sizes of windows are multiples of this.

    Returns:
        The windows row by row. Their kept parts cover the image exactly once.

        >>> [(window.source.x, window.kept.x, window.kept.width) for window in windows(4, 10, side=6, halo=1)]
        [(0, 0, 5), (4, 5, 5)]
    """
    rows = _spans(height, side, halo, multiple)
    columns = _spans(width, side, halo, multiple)
    return [
        Window(Rectangle(y, x, high, wide), Rectangle(top, left, bottom - top, right - left))
        for y, high, top, bottom in rows
        for x, wide, left, right in columns
    ]


def _spans(length: int, side: int, halo: int, multiple: int) -> list[tuple[int, int, int, int]]:
    """Cut one dimension into `windows`: start and size of each, then start and end of the pixels that it keeps."""
    if length <= side:
        return [(0, length, 0, length)]
    count = -(-(length - 2 * halo) // (side - 2 * halo))
    # The smallest size with which the windows reach the image's end: count * size - (count - 1) * 2 * halo >= length
    size = -(-(length + 2 * halo * (count - 1)) // (count * multiple)) * multiple
    blocks = (length - size) // multiple
    starts = [index * blocks // (count - 1) * multiple for index in range(count)]
    # Cut half-way through each overlap, which leaves at least the halo on either side.
    cuts = [0, *((start + size + after) // 2 for start, after in itertools.pairwise(starts)), length]
    return [(start, size, *kept) for start, kept in zip(starts, itertools.pairwise(cuts), strict=True)]


def window_around(x: int, y: int, width: int, height: int, shape: tuple[int, int]) -> Rectangle:
    """Return a region's box with some context, square where the image of ``shape`` ``(H, W)`` has room.

    Examples:
        >>> window_around(0, 500, 100, 300, (1000, 1000))
        Rectangle(y=440, x=0, height=420, width=420)
    """
    side = max(_SMALLEST, round(_CONTEXT * max(width, height)))
    wide, high = min(side, shape[1]), min(side, shape[0])
    left = min(max(x + width // 2 - wide // 2, 0), shape[1] - wide)
    top = min(max(y + height // 2 - high // 2, 0), shape[0] - high)
    return Rectangle(top, left, high, wide)


def rgb8(pixels: Pixels) -> RGB:
    """Convert pixels of any depth, gray or RGB, to ``(H, W, 3)`` uint8 RGB."""
    return bgr8(pixels)[:, :, ::-1]


def encode_webp(pixels: RGB) -> bytes:
    """Encode a crop as lossy WebP."""
    sink = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(sink, "WEBP", quality=_QUALITY, method=4)
    return sink.getvalue()


def fitted(crop: npt.NDArray[Any], largest: int = LARGEST) -> npt.NDArray[Any]:
    """Scale a picture down to a longest side of ``largest`` pixels, where it is larger."""
    scale = largest / max(crop.shape[:2])
    if scale >= 1:
        return crop
    size = (max(1, round(crop.shape[1] * scale)), max(1, round(crop.shape[0] * scale)))
    return np.asarray(cv2.resize(crop, size, interpolation=cv2.INTER_AREA))
