"""Pictures of a stored image, 8-bit RGB: crops of every kind at one scale, heat maps, masks and class labels drawn."""

from __future__ import annotations

from itertools import chain, repeat
from typing import Any, NamedTuple

import cv2
import matplotlib
import numpy as np
import numpy.typing as npt

from desra_core.detection.class_weights import class_names
from desra_core.images.codec import Labels, Mask
from desra_core.images.crops import LARGEST, RGB, fitted, rgb8, window_around
from desra_core.images.tiling import Rectangle
from desra_core.report.maps import StoredImage

# Kinds of picture of a region, with their captions.
KINDS = {
    "lr": "LR",
    "mse_sr": "MSE-SR",
    "gan_sr": "GAN-SR",
    "difference": "1 − D",
    "mask": "artifact mask",
    "pseudo_gt": "pseudo-GT",
}
HEAT = "inferno"
# Of the artifact mask and of a human mask, apart in brightness too.
OUTLINE, HUMAN_OUTLINE = (0, 214, 255), (255, 64, 200)
# A mask held against a ground truth: of Okabe and Ito, apart in brightness too.
RIGHT, FALSE, MISSED = (86, 180, 233), (213, 94, 0), (240, 228, 66)
# Longer side of such a picture, in pixels.
AGREEMENT_SIDE = 480

_TINT, _DIM = 0.25, 0.45
_UNDEFINED = (128, 128, 128)
_GROUND, _OPACITY = 70, 0.72
# Okabe and Ito's colours for the classes with most pixels, one gray for all others.
_CLASS_COLOURS = ((0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (213, 94, 0),
                  (240, 228, 66), (0, 0, 0))  # fmt: skip
_OTHER = (150, 150, 150)


class ClassShare(NamedTuple):
    """An entry of the legend: class name, its colour in the picture as ``#rrggbb``, and its share of the pixels."""

    name: str
    colour: str
    share: float


class Crops:
    """Pictures of one window of an image, all at one scale.

    Args:
        image: The stored image.
        box: Left, top, width and height of a region: the window is the region with its surroundings. Without a box the
            window is the whole image, and the mask is tinted as a whole.
        largest: Longer sides are scaled down to this, in pixels.
    """

    def __init__(
        self, image: StoredImage, box: tuple[int, int, int, int] | None = None, *, largest: int = LARGEST
    ) -> None:
        self._image = image
        self._box = box
        self._window = window_around(*box, image.shape) if box else Rectangle(0, 0, *image.shape)
        self._largest = largest
        self._cut: dict[str, RGB] = {}

    def make(self, kind: str) -> RGB:
        """Make the picture of a kind: lr, mse_sr, gan_sr, difference, mask, human or pseudo_gt.

        One that cannot be made raises an `ImageError` that says why.
        """
        if kind == "lr":
            return self._lr()
        if kind == "difference":
            return heat_map(self._fitted(self._image.measure.heat(self._image.scores(self._window))))
        if kind == "mask":
            return self._overlay(self._mask("mask"), self._region(), OUTLINE)
        if kind == "human":
            return self._overlay(self._mask("human"), self._mask("human"), HUMAN_OUTLINE)
        if kind == "pseudo_gt" and kind not in self._image.files:
            mask = self._mask("mask")[..., np.newaxis]
            return self._fitted(np.where(mask, self._result("mse_sr"), self._result("gan_sr")))
        return self._fitted(self._result(kind))

    def _fitted(self, crop: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return fitted(crop, self._largest)

    def _result(self, kind: str) -> RGB:
        """Cut the window out of a picture that has the size of the results."""
        if kind not in self._cut:
            pixels = rgb8(self._image.picture(kind))
            self._cut[kind] = pixels[self._window.slices].copy()
        return self._cut[kind]

    def _mask(self, kind: str) -> Mask:
        return np.asarray(self._result(kind)[:, :, 0] > 127)

    def _lr(self) -> RGB:
        """Show the LR pixels under the window, each one visible."""
        pixels = rgb8(self._image.picture("lr"))
        # The LR pixel under each row and column of the window.
        height, width = self._image.shape
        rows = np.arange(height)[self._window.slices[0]] * pixels.shape[0] // height
        columns = np.arange(width)[self._window.slices[1]] * pixels.shape[1] // width
        return self._fitted(pixels[rows[:, np.newaxis], columns])

    def _overlay(self, mask: Mask, region: Mask, colour: tuple[int, int, int]) -> RGB:
        """Outline a mask and tint a region on the scaled GAN result, so that lines keep their width."""
        image = self._fitted(self._result("gan_sr")).astype(np.float64)
        mask, region = (self._fitted(part.astype(np.uint8) * np.uint8(255)) > 127 for part in (mask, region))
        inner = cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8), borderValue=0) > 0
        opacity = np.where(mask & ~inner, np.where(region, 1.0, _DIM), _TINT * region)
        return np.rint(image + (colour - image) * opacity[..., np.newaxis]).astype(np.uint8)

    def _region(self) -> Mask:
        """Find the component of the mask that has the box; all of the mask where none has it."""
        mask = self._mask("mask")
        if self._box is None:
            return mask
        _, components, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
        left, top, width, height = self._box
        box = (left - self._window.x, top - self._window.y, width, height)
        found = np.flatnonzero((stats[:, : cv2.CC_STAT_AREA] == box).all(axis=1) & (np.arange(len(stats)) > 0))
        return np.asarray(np.isin(components, found)) if found.size else mask


def heat_map(values: npt.NDArray[np.floating[Any]]) -> RGB:
    """Show ``(H, W)`` values of 0..1 in colours, NaN in gray."""
    colours = matplotlib.colormaps[HEAT](np.nan_to_num(values), bytes=True)[:, :, :3]
    return np.where(np.isnan(values)[..., np.newaxis], np.array(_UNDEFINED, np.uint8), colours)


def drawn_agreement(mask: Mask, ground_truth: Mask, gan_sr: RGB | None) -> RGB:
    """Draw what a mask and its ground truth have in common: right, false and missed pixels in three colours.

    Both are ``(H, W)`` bool. They lie over the ``(H, W, 3)`` uint8 GAN result in gray, or over plain gray. The longer
    side of the picture is `AGREEMENT_SIDE` at most.
    """
    ground = np.full((*mask.shape, 3), _GROUND, np.uint8) if gan_sr is None else gan_sr
    picture = fitted(ground, AGREEMENT_SIDE).astype(np.float64)
    if gan_sr is not None:
        picture[:] = np.rint(picture.mean(axis=2, keepdims=True) * 0.75)
    parts = ((mask & ground_truth, RIGHT), (mask & ~ground_truth, FALSE), (ground_truth & ~mask, MISSED))
    for part, colour in parts:
        share = fitted(part.astype(np.float32), AGREEMENT_SIDE).astype(np.float64)  # of each shown pixel
        opacity = _OPACITY if gan_sr is not None else 1.0
        picture += opacity * share[..., np.newaxis] * (np.array(colour) - picture)
    return np.rint(picture).astype(np.uint8)


def label_picture(labels: Labels, *, largest: int) -> RGB:
    """Colour ``(H, W)`` classes, each the same as in `class_shares`; longer sides are thinned out to ``largest``."""
    colours = np.full((256, 3), _OTHER, np.uint8)
    order = _by_pixels(labels)[: len(_CLASS_COLOURS)]
    colours[order] = _CLASS_COLOURS[: order.size]
    step = max(1.0, max(labels.shape) / largest)
    rows, columns = ((np.arange(max(1, round(side / step))) * step).astype(int) for side in labels.shape)
    return np.asarray(colours[labels[rows[:, np.newaxis], columns]])


def class_shares(labels: Labels) -> list[ClassShare]:
    """List the classes of an image, those with most pixels first."""
    names, pixels = class_names(), np.bincount(labels.ravel())
    return [
        ClassShare(names[index], "#" + bytes(colour).hex(), float(pixels[index] / labels.size))
        for index, colour in zip(_by_pixels(labels).tolist(), chain(_CLASS_COLOURS, repeat(_OTHER)), strict=False)
    ]


def _by_pixels(labels: Labels) -> npt.NDArray[np.int64]:
    """List the classes that occur, those with most pixels first."""
    pixels = np.bincount(labels.ravel())
    return np.argsort(-pixels, kind="stable")[: np.count_nonzero(pixels)]
