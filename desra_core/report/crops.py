"""One region seen in every picture of its image: crops of the same window, at one scale, 8-bit RGB."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import matplotlib
import numpy as np
import numpy.typing as npt
import zarr
from PIL import Image

from desra_core.errors import ImageError
from desra_core.imageio import Mask, bgr8, decode, read_bytes

HEAT = "inferno"
OUTLINE = (0, 214, 255)

# Sides in pixels: of the smallest window, so that a small region keeps its surroundings, and of the largest crop shown.
_SMALLEST, _LARGEST = 192, 400
_CONTEXT = 1.4
_TINT, _DIM = 0.25, 0.45
_QUALITY = 88
_UNDEFINED = (128, 128, 128)
# A larger picture is not decoded for a crop of it; 800 MB as RGB.
_MAX_PIXELS = 2**28

RGB = npt.NDArray[np.uint8]


class Window(NamedTuple):
    """A rectangle in pixels of the SR results."""

    left: int
    top: int
    width: int
    height: int

    @property
    def rows(self) -> slice:
        """Its rows."""
        return slice(self.top, self.top + self.height)

    @property
    def columns(self) -> slice:
        """Its columns."""
        return slice(self.left, self.left + self.width)


def window_around(x: int, y: int, width: int, height: int, shape: tuple[int, int]) -> Window:
    """The window around a region's box with some context; square where the image of ``(H, W)`` has room.

    Examples
    --------
    >>> window_around(0, 500, 100, 300, (1000, 1000))
    Window(left=0, top=440, width=420, height=420)
    """
    side = max(_SMALLEST, round(_CONTEXT * max(width, height)))
    wide, high = min(side, shape[1]), min(side, shape[0])
    left = min(max(x + width // 2 - wide // 2, 0), shape[1] - wide)
    top = min(max(y + height // 2 - high // 2, 0), shape[0] - high)
    return Window(left, top, wide, high)


class Crops:
    """Crops around one region. Those that cannot be made raise an `ImageError` that says why.

    Parameters
    ----------
    files
        The file of each kind of picture: mse_sr, gan_sr, mask, and as far as there are any lr and pseudo_gt.
    similarity
        Where the zarr array of D is stored.
    shape
        ``(H, W)`` of the results.
    box
        Of the region: left, top, width and height.
    """

    def __init__(
        self, files: Mapping[str, Path], similarity: Path, shape: tuple[int, int], box: tuple[int, int, int, int]
    ) -> None:
        self._files = files
        self._similarity = similarity
        self._shape = shape
        self._box = box
        self._window = window_around(*box, shape)
        self._cut: dict[str, RGB] = {}

    def make(self, kind: str) -> RGB:
        """The crop of one kind: lr, mse_sr, gan_sr, difference, mask or pseudo_gt (raises `ImageError`)."""
        special = {"lr": self._lr, "difference": self._difference, "mask": self._overlay}
        if kind == "pseudo_gt" and kind not in self._files:
            return fitted(np.where(self._mask()[..., np.newaxis], self._result("mse_sr"), self._result("gan_sr")))
        return special[kind]() if kind in special else fitted(self._result(kind))

    def _result(self, kind: str) -> RGB:
        """The window of a picture that has the size of the results."""
        if kind not in self._cut:
            pixels = _read(self._files, kind)
            if pixels.shape[:2] != self._shape:
                sizes = f"is {pixels.shape[1]}x{pixels.shape[0]} now, and was {self._shape[1]}x{self._shape[0]}"
                raise ImageError(self._files[kind], sizes, "run again")
            self._cut[kind] = pixels[self._window.rows, self._window.columns].copy()
        return self._cut[kind]

    def _mask(self) -> Mask:
        return np.asarray(self._result("mask")[:, :, 0] > 127)

    def _lr(self) -> RGB:
        """The LR pixels under the window, each one visible."""
        pixels = _read(self._files, "lr")
        rows = _sampled(self._window.top, self._window.height, self._shape[0], pixels.shape[0])
        columns = _sampled(self._window.left, self._window.width, self._shape[1], pixels.shape[1])
        return fitted(pixels[rows[:, np.newaxis], columns])

    def _overlay(self) -> RGB:
        """The GAN result with the mask outlined and the region tinted, drawn last so that lines keep their width."""
        image = fitted(self._result("gan_sr")).astype(np.float64)
        mask, region = (fitted(part.astype(np.uint8) * np.uint8(255)) > 127 for part in (self._mask(), self._region()))
        inner = cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8), borderValue=0) > 0
        opacity = np.where(mask & ~inner, np.where(region, 1.0, _DIM), _TINT * region)
        return np.rint(image + (OUTLINE - image) * opacity[..., np.newaxis]).astype(np.uint8)

    def _region(self) -> Mask:
        """The component of the mask that is the region; all of the mask where it is not as the table says."""
        mask = self._mask()
        _, components, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
        left, top, width, height = self._box
        box = (left - self._window.left, top - self._window.top, width, height)
        found = np.flatnonzero((stats[:, : cv2.CC_STAT_AREA] == box).all(axis=1) & (np.arange(len(stats)) > 0))
        return np.asarray(np.isin(components, found)) if found.size else mask

    def _difference(self) -> RGB:
        """``1 - D`` as a heat map, gray in the frame where D is undefined."""
        values = fitted(_read_window(self._similarity, self._shape, self._window))
        colours = matplotlib.colormaps[HEAT](np.nan_to_num(1 - values), bytes=True)[:, :, :3]
        return np.where(np.isnan(values)[..., np.newaxis], np.array(_UNDEFINED, np.uint8), colours)


def encode_webp(pixels: RGB) -> bytes:
    """Encode a crop as small as looks like it."""
    sink = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(sink, "WEBP", quality=_QUALITY, method=4)
    return sink.getvalue()


def _read(files: Mapping[str, Path], kind: str) -> RGB:
    """A whole picture as 8-bit RGB (raises `ImageError`)."""
    path = files.get(kind)
    if path is None:
        raise ImageError("LR photo" if kind == "lr" else kind, "none of this name", "add it to its folder")
    pixels = decode(read_bytes(path), path, max_pixels=_MAX_PIXELS).pixels
    return bgr8(pixels)[:, :, ::-1]


def _read_window(path: Path, shape: tuple[int, int], window: Window) -> npt.NDArray[np.float32]:
    """D in a window, NaN in the frame; only the chunks under it are read, and nothing is ever mended."""
    if not path.exists():
        raise ImageError("D", "is not kept", "run again with --keep maps")
    values = np.full((window.height, window.width), np.nan, np.float32)
    try:
        stored: Any = zarr.open_array(path, mode="r")
        frame = (shape[0] - stored.shape[0]) // 2
        if frame < 0 or (stored.shape[0] + 2 * frame, stored.shape[1] + 2 * frame) != shape:
            raise ImageError("D", "is of an image of another size", "run again")
        left, top = max(window.left, frame), max(window.top, frame)
        right = min(window.left + window.width, shape[1] - frame)
        bottom = min(window.top + window.height, shape[0] - frame)
        inside = (slice(top - window.top, bottom - window.top), slice(left - window.left, right - window.left))
        values[inside] = stored[top - frame : bottom - frame, left - frame : right - frame]
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, IndexError):
        raise ImageError("D", "is damaged", "run again") from None
    # A chunk that is not there is read as zeros, and D is never 0.
    if not (values[inside] > 0).all():
        raise ImageError("D", "is damaged", "run again")
    return values


def _sampled(start: int, extent: int, side: int, low_side: int) -> npt.NDArray[np.intp]:
    """The LR pixel under each SR pixel of a stretch."""
    return np.asarray((np.arange(start, start + extent) * low_side) // side, np.intp)


def fitted(crop: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Scale a crop down to the size shown, where it is larger."""
    scale = _LARGEST / max(crop.shape[:2])
    if scale >= 1:
        return crop
    size = (max(1, round(crop.shape[1] * scale)), max(1, round(crop.shape[0] * scale)))
    return np.asarray(cv2.resize(crop, size, interpolation=cv2.INTER_AREA))
