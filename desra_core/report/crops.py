"""One part of an image, or all of it, in every picture there is: the same window at one scale, 8-bit RGB."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
import numpy.typing as npt

from desra_core.errors import ImageError
from desra_core.files.hashing import read_bytes
from desra_core.images.codec import Mask, Pixels, decode
from desra_core.images.crops import LARGEST, RGB, fitted, rgb8, window_around
from desra_core.images.tiling import Rectangle
from desra_core.report.maps import MAX_PIXELS, another_size, read_map
from desra_core.report.measure import Measure

HEAT = "inferno"
# Of the artifact mask and of a person's, apart in brightness too.
OUTLINE, HUMAN_OUTLINE = (0, 214, 255), (255, 64, 200)

_TINT, _DIM = 0.25, 0.45
_UNDEFINED = (128, 128, 128)


class Crops:
    """Pictures of one window of an image. Those that cannot be made raise an `ImageError` that says why.

    Parameters
    ----------
    files
        The file of each kind of picture: mse_sr, gan_sr, mask, and as far as there are any lr, pseudo_gt and human.
    similarity
        Where the zarr array of D, or of minus a detector's score, is stored.
    shape
        ``(H, W)`` of the results.
    box
        Of a region: left, top, width and height. Without one, the mask is tinted as a whole.
    window
        What is shown; the surroundings of the region by default.
    measure
        What ``similarity`` holds.
    largest
        Longer sides are scaled down to this, in pixels.
    """

    def __init__(
        self,
        files: Mapping[str, Path],
        similarity: Path,
        shape: tuple[int, int],
        box: tuple[int, int, int, int] | None,
        *,
        window: Rectangle | None = None,
        measure: Measure = Measure(),  # noqa: B008 frozen
        largest: int = LARGEST,
    ) -> None:
        self._files = files
        self._similarity = similarity
        self._shape = shape
        self._box = box
        self._window = window or (window_around(*box, shape) if box else Rectangle(0, 0, *shape))
        self._measure = measure
        self._largest = largest
        self._cut: dict[str, RGB] = {}

    def make(self, kind: str) -> RGB:
        """The crop of one kind: lr, mse_sr, gan_sr, difference, mask, human or pseudo_gt (raises `ImageError`)."""
        if kind == "lr":
            return self._lr()
        if kind == "difference":
            values = read_map(self._similarity, self._shape, self._window, self._measure)
            return heat_map(self._fitted(self._measure.heat(values)))
        if kind == "mask":
            return self._overlay(self._mask("mask"), self._region(), OUTLINE)
        if kind == "human":
            return self._overlay(self._mask("human"), self._mask("human"), HUMAN_OUTLINE)
        if kind == "pseudo_gt" and kind not in self._files:
            mask = self._mask("mask")[..., np.newaxis]
            return self._fitted(np.where(mask, self._result("mse_sr"), self._result("gan_sr")))
        return self._fitted(self._result(kind))

    def _fitted(self, crop: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return fitted(crop, self._largest)

    def _result(self, kind: str) -> RGB:
        """The window of a picture that has the size of the results."""
        if kind not in self._cut:
            pixels = rgb8(read_picture(self._files, kind, self._shape))
            self._cut[kind] = pixels[self._window.slices].copy()
        return self._cut[kind]

    def _mask(self, kind: str) -> Mask:
        return np.asarray(self._result(kind)[:, :, 0] > 127)

    def _lr(self) -> RGB:
        """The LR pixels under the window, each one visible."""
        pixels = rgb8(read_picture(self._files, "lr"))
        rows = _sampled(self._window.y, self._window.height, self._shape[0], pixels.shape[0])
        columns = _sampled(self._window.x, self._window.width, self._shape[1], pixels.shape[1])
        return self._fitted(pixels[rows[:, np.newaxis], columns])

    def _overlay(self, mask: Mask, region: Mask, colour: tuple[int, int, int]) -> RGB:
        """The GAN result with a mask outlined and a region tinted, drawn last so that lines keep their width."""
        image = self._fitted(self._result("gan_sr")).astype(np.float64)
        mask, region = (self._fitted(part.astype(np.uint8) * np.uint8(255)) > 127 for part in (mask, region))
        inner = cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8), borderValue=0) > 0
        opacity = np.where(mask & ~inner, np.where(region, 1.0, _DIM), _TINT * region)
        return np.rint(image + (colour - image) * opacity[..., np.newaxis]).astype(np.uint8)

    def _region(self) -> Mask:
        """The component of the mask that is the region; all of the mask where it is not as the table says."""
        mask = self._mask("mask")
        if self._box is None:
            return mask
        _, components, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
        left, top, width, height = self._box
        box = (left - self._window.x, top - self._window.y, width, height)
        found = np.flatnonzero((stats[:, : cv2.CC_STAT_AREA] == box).all(axis=1) & (np.arange(len(stats)) > 0))
        return np.asarray(np.isin(components, found)) if found.size else mask


def read_picture(files: Mapping[str, Path], kind: str, shape: tuple[int, int] | None = None) -> Pixels:
    """A whole picture as its file holds it.

    Raises
    ------
    ImageError
        There is no file of this kind, it cannot be read, or is not of the given ``(H, W)``.
    """
    path = files.get(kind)
    if path is None:
        raise ImageError("LR photo" if kind == "lr" else kind, "none of this name", "add it to its folder")
    pixels = decode(read_bytes(path), path, max_pixels=MAX_PIXELS).pixels
    if shape is not None and pixels.shape[:2] != shape:
        raise ImageError(path, another_size(pixels.shape, shape), "run again")
    return pixels


def heat_map(values: npt.NDArray[np.floating[Any]]) -> RGB:
    """Values of 0..1 in colours, NaN in gray."""
    colours = matplotlib.colormaps[HEAT](np.nan_to_num(values), bytes=True)[:, :, :3]
    return np.where(np.isnan(values)[..., np.newaxis], np.array(_UNDEFINED, np.uint8), colours)


def _sampled(start: int, extent: int, side: int, low_side: int) -> npt.NDArray[np.intp]:
    """The LR pixel under each SR pixel of a stretch."""
    return np.asarray((np.arange(start, start + extent) * low_side) // side, np.intp)
