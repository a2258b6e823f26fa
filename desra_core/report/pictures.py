"""Draw a stored image as 8-bit RGB pictures: crops of every kind at one scale, heat maps, masks and class labels.

Nothing in the workspace is written: a damaged file or array is reported, not repaired or deleted.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import matplotlib
import numpy as np
import numpy.typing as npt

from desra_core.detection.class_weights import class_names
from desra_core.detection.detectors import AppliedDetector, applied
from desra_core.detection.mask import Components
from desra_core.errors import ImageError, LostError
from desra_core.files import read_bytes
from desra_core.images.codec import Labels, Mask, Pixels, check_labels, decode, decode_labels
from desra_core.images.parts import LARGEST, RGB, Rectangle, fitted, rgb8, window_around
from desra_core.workspace.arrays import StoredArray

# Larger pictures are not decoded for a crop: this many pixels are 800 MB of RGB.
MAX_PIXELS = 2**28
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
# Outlines of the artifact mask and of a human mask; their colours differ in brightness, too.
OUTLINE, HUMAN_OUTLINE = (0, 214, 255), (255, 64, 200)
# Colours of a mask over a ground truth, from Okabe and Ito; they differ in brightness, too.
RIGHT, FALSE, MISSED = (86, 180, 233), (213, 94, 0), (240, 228, 66)
# Longer side of a picture of a mask over its ground truth, in pixels.
AGREEMENT_SIDE = 480

_TINT, _DIM = 0.25, 0.45
_UNDEFINED = (128, 128, 128)
_GROUND, _OPACITY = 70, 0.72
# Okabe and Ito's colours for the classes with most pixels, one gray for all others.
_CLASS_COLOURS = ((0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (213, 94, 0),
                  (240, 228, 66), (0, 0, 0))  # fmt: skip
_OTHER = (150, 150, 150)


@dataclass(frozen=True)
class StoredImage:
    """The places where the pictures and maps of an image are stored.

    Its methods raise an `ImageError` for a file or array that is missing, damaged or of another size.
    """

    files: Mapping[str, Path]  # of mse_sr, gan_sr and mask, and perhaps of lr, pseudo_gt, human and labels
    group: Path  # the folder of the zarr arrays: similarity, which holds minus the scores, and perhaps labels
    shape: tuple[int, int]  # (H, W) of the results; 0 where it is unknown, because the image has failed since
    measure: AppliedDetector = applied()  # noqa: RUF009 frozen; the detector of the run

    def lacks(self, kind: str) -> ImageError | None:
        """Say why there is no picture of a kind, or no heat map (``heat``); None where it is there."""
        if kind == "heat":
            return self._lacks_array("similarity", self.measure.value_name)
        if kind in self.files:
            return None
        return ImageError("LR photo" if kind == "lr" else kind, "none of this name", "add it to its folder")

    def _lacks_array(self, array: str, name: str) -> ImageError | None:
        return None if (self.group / array).exists() else ImageError(name, "is not kept", "run again with --keep maps")

    def picture(self, kind: str) -> Pixels:
        """Read a whole picture, in sRGB; all but the LR photo must have the size of the results."""
        if lacking := self.lacks(kind):
            raise lacking
        path = self.files[kind]
        pixels = decode(read_bytes(path), path, max_pixels=MAX_PIXELS).pixels
        if kind != "lr":
            self._check_size(pixels, path)
        return pixels

    def scores(self, window: Rectangle) -> npt.NDArray[np.float32]:
        """Read a window of the scores, float32, NaN in the frame; read only the chunks under it."""
        stored = np.full((window.height, window.width), np.nan, np.float32)
        return -self._read("similarity", self.measure.value_name, window, stored, -self.measure.limit)

    def labels(self) -> Labels:
        """Read the classes of the whole image from the label file, or else from the stored array."""
        file = self.files.get("labels")
        if file is None:
            whole = Rectangle(0, 0, *self.shape)
            labels = self._read("labels", "label map", whole, np.zeros(self.shape, np.uint8), -1)
            check_labels(labels, "label map")
        else:
            labels = decode_labels(read_bytes(file), file, max_pixels=MAX_PIXELS)
            self._check_size(labels, file)
        return labels

    def _read(
        self, array: str, name: str, window: Rectangle, values: npt.NDArray[Any], lowest: float
    ) -> npt.NDArray[Any]:
        """Read a window into ``values``, except the frame; a value that is not above ``lowest`` is damage."""
        path, (height, width) = self.group / array, self.shape
        if lacking := self._lacks_array(array, name):
            raise lacking
        try:
            stored = StoredArray(path)
            frame = (height - stored.shape[0]) // 2
            if frame < 0 or (stored.shape[0] + 2 * frame, stored.shape[1] + 2 * frame) != self.shape:
                raise ImageError(name, "is of an image of another size", "run again")
            left, top = max(window.x, frame), max(window.y, frame)
            right, bottom = min(window.x + window.width, width - frame), min(window.y + window.height, height - frame)
            inside = (slice(top - window.y, bottom - window.y), slice(left - window.x, right - window.x))
            values[inside] = stored.window(slice(top - frame, bottom - frame), slice(left - frame, right - frame))
            damaged = not (values[inside] > lowest).all()
        except (LostError, ValueError, IndexError):
            damaged = True
        if damaged:
            raise ImageError(name, "is damaged", "run again")
        return values

    def _check_size(self, pixels: Pixels, path: Path) -> None:
        height, width = pixels.shape[:2]
        if (height, width) != self.shape:
            reason = f"is {width}x{height} now, and was {self.shape[1]}x{self.shape[0]}"
            raise ImageError(path, reason, "run again")


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

        Raises:
            ImageError: A file or array of it is missing or damaged.
        """
        if kind == "lr":  # the LR pixels under the window, each repeated for every result pixel that it covers
            pixels, (height, width) = rgb8(self._image.picture("lr")), self._image.shape
            rows = np.arange(height)[self._window.slices[0]] * pixels.shape[0] // height
            columns = np.arange(width)[self._window.slices[1]] * pixels.shape[1] // width
            return fitted(pixels[rows[:, np.newaxis], columns], self._largest)
        if kind == "difference":
            return heat_map(fitted(self._image.measure.heat(self._image.scores(self._window)), self._largest))
        if kind == "mask":
            mask = region = self._mask("mask")
            if self._box is not None:
                # Only the region has this box. If no component has it, the mask differs from the table: tint all of it.
                parts = Components(mask)
                wanted = (np.add(parts.boxes, (self._window.x, self._window.y, 0, 0)) == self._box).all(axis=1)
                region = parts.chosen(wanted) if wanted.any() else mask
            return self._overlay(mask, region, OUTLINE)
        if kind == "human":
            return self._overlay(self._mask("human"), self._mask("human"), HUMAN_OUTLINE)
        if kind == "pseudo_gt" and kind not in self._image.files:
            mask = self._mask("mask")[..., np.newaxis]
            return fitted(np.where(mask, self._result("mse_sr"), self._result("gan_sr")), self._largest)
        return fitted(self._result(kind), self._largest)

    def _result(self, kind: str) -> RGB:
        """Cut the window out of a picture of the size of the results."""
        if kind not in self._cut:
            self._cut[kind] = rgb8(self._image.picture(kind))[self._window.slices].copy()
        return self._cut[kind]

    def _mask(self, kind: str) -> Mask:
        return np.asarray(self._result(kind)[:, :, 0] > 127)

    def _overlay(self, mask: Mask, region: Mask, colour: tuple[int, int, int]) -> RGB:
        """Outline a mask and tint a region on the scaled GAN result, so that lines keep their width."""
        image = fitted(self._result("gan_sr"), self._largest).astype(np.float64)
        mask, region = (fitted(part.astype(np.uint8) * np.uint8(255), self._largest) > 127 for part in (mask, region))
        inner = cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8), borderValue=0) > 0
        opacity = np.where(mask & ~inner, np.where(region, 1.0, _DIM), _TINT * region)
        return np.rint(image + (colour - image) * opacity[..., np.newaxis]).astype(np.uint8)


def heat_map(values: npt.NDArray[np.floating[Any]]) -> RGB:
    """Show ``(H, W)`` values of 0..1 in colours, NaN in gray."""
    colours = matplotlib.colormaps[HEAT](np.nan_to_num(values), bytes=True)[:, :, :3]
    return np.where(np.isnan(values)[..., np.newaxis], np.array(_UNDEFINED, np.uint8), colours)


def drawn_agreement(mask: Mask, ground_truth: Mask, gan_sr: RGB | None) -> RGB:
    """Draw a mask over its ground truth: right, false and missed pixels in three colours.

    Args:
        mask, ground_truth: ``(H, W)`` bool.
        gan_sr: The ``(H, W, 3)`` uint8 GAN result, drawn in gray below the colours; a plain gray where it is None.

    Returns:
        ``(h, w, 3)`` uint8, of at most `AGREEMENT_SIDE` on the longer side.
    """
    ground = np.full((*mask.shape, 3), _GROUND, np.uint8) if gan_sr is None else gan_sr
    picture = fitted(ground, AGREEMENT_SIDE).astype(np.float64)
    opacity = 1.0
    if gan_sr is not None:
        picture[:] = np.rint(picture.mean(axis=2, keepdims=True) * 0.75)
        opacity = _OPACITY
    parts = ((mask & ground_truth, RIGHT), (mask & ~ground_truth, FALSE), (ground_truth & ~mask, MISSED))
    for part, colour in parts:
        share = fitted(part.astype(np.float32), AGREEMENT_SIDE).astype(np.float64)  # per shown pixel
        picture += opacity * share[..., np.newaxis] * (np.array(colour) - picture)
    return np.rint(picture).astype(np.uint8)


def label_picture(labels: Labels, *, largest: int) -> RGB:
    """Colour ``(H, W)`` classes as `class_shares` does; drop rows and columns down to ``largest`` pixels a side."""
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
