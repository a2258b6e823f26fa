"""Tiles of large pictures, as a page that zooms and pans asks for them: PNG, without loss.

At level L, a pixel of a tile is the mean of 2^L x 2^L pixels of the image.
"""

import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from desra_core.errors import UsageError
from desra_core.images.codec import Mask, encode_png
from desra_core.images.parts import RGB, Rectangle, rgb8
from desra_core.report.pictures import HUMAN_OUTLINE, OUTLINE, StoredImage, heat_map

SIDE = 512
# The highest level shows 512 x 2^12 pixels in a tile.
MAX_LEVEL = 12

_BYTES = 600_000_000  # of decoded pictures that are kept
_OTHER, _DIM = (120, 120, 120), 140


class Tile(NamedTuple):
    """A tile: its level, and how many tiles lie left of it and above it."""

    level: int
    column: int
    row: int

    def window(self, shape: tuple[int, int]) -> Rectangle:
        """Return the part of an image of ``(H, W)`` that it shows.

        Raises:
            UsageError: There is no such tile.
        """
        if 0 <= self.level <= MAX_LEVEL and self.column >= 0 and self.row >= 0:
            side = SIDE << self.level
            x, y = self.column * side, self.row * side
            if x < shape[1] and y < shape[0]:
                return Rectangle(y, x, min(side, shape[0] - y), min(side, shape[1] - x))
        raise UsageError("tile", f"{self.level}/{self.column}/{self.row} is not in the image", "load the page again")

    def scaled(self, pixels: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Scale the pixels of its window down to its level."""
        if self.level == 0:
            return pixels
        height, width = (max(1, -(-side // (1 << self.level))) for side in pixels.shape[:2])
        return np.asarray(cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA))


class TiledPictures:
    """Decoded pictures, of which a bounded number is kept: each is decoded once while a page shows its tiles."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Path, RGB] = OrderedDict()
        self._lock = threading.Lock()
        self._decoding: dict[Path, threading.Lock] = {}

    def tile(self, image: StoredImage, kind: str, tile: Tile) -> bytes:
        """Make a tile of a kind of picture: lr, mse_sr, gan_sr or heat.

        Raises:
            ImageError: A file or array of it is missing or damaged.
            UsageError: There is no such tile.
        """
        window = tile.window(image.shape)
        if kind == "heat":
            return encode_png(heat_map(tile.scaled(image.measure.heat(image.scores(window)))))
        pixels = self._picture(image, kind)
        if kind == "lr":  # the LR pixels under the window, each repeated for every result pixel that it covers
            (top, left, high, wide), (height, width) = window, image.shape
            rows = (np.arange(top, top + high) * pixels.shape[0]) // height
            columns = (np.arange(left, left + wide) * pixels.shape[1]) // width
            return encode_png(tile.scaled(pixels[rows[:, np.newaxis], columns]))
        return encode_png(tile.scaled(pixels[window.slices]))

    def _picture(self, image: StoredImage, kind: str) -> RGB:
        path = image.files.get(kind, Path(kind))
        with self._lock:
            decoding = self._decoding.setdefault(path, threading.Lock())
        with decoding:
            with self._lock:
                if path in self._kept:
                    self._kept.move_to_end(path)
                    return self._kept[path]
            pixels = np.ascontiguousarray(rgb8(image.picture(kind)))
            with self._lock:
                self._kept[path] = pixels
                while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > _BYTES:
                    # Where a thread waited for the lock of a picture that went meanwhile, it is gone already.
                    self._decoding.pop(self._kept.popitem(last=False)[0], None)
        return pixels


def mask_tile(tile: Tile, mask: Mask, region: Mask, detected: Mask) -> bytes:
    """Make a tile of a mask: the region in its colour, what a person has drawn in another, and all else gray.

    Args:
        tile: The tile.
        mask, region, detected: ``(h, w)`` bool of the tile's window: the mask, the region that is asked about, and the
            detector's mask.
    """
    picture = np.zeros((*mask.shape, 3), np.uint8)
    picture[mask] = _OTHER
    picture[mask & ~detected] = HUMAN_OUTLINE
    picture[mask & region] = OUTLINE
    return encode_png(tile.scaled(picture))


def outline_tile(tile: Tile, mask: Mask, region: Mask, detected: Mask) -> bytes:
    """Make a transparent tile with the outlines of a mask, one pixel of the tile wide; arguments as of `mask_tile`."""
    if tile.level:
        mask, region, detected = (
            tile.scaled(part.astype(np.uint8) * np.uint8(255)) > 127 for part in (mask, region, detected)
        )
    inner = cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8), borderValue=1) > 0
    edge = mask & ~inner
    picture = np.zeros((*mask.shape, 4), np.uint8)
    picture[edge] = (*OUTLINE, _DIM)
    picture[edge & ~detected] = (*HUMAN_OUTLINE, 255)
    picture[edge & region] = (*OUTLINE, 255)
    return encode_png(picture)
