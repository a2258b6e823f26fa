"""Choose, scale and encode (as WebP) the crops of images that reports and verdicts show."""

import io
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from desra_core.images.bit_depth import bgr8
from desra_core.images.codec import Pixels
from desra_core.images.tiling import Rectangle

# Sides in pixels: of the smallest window, so that a small region has surroundings, and of the largest crop.
_SMALLEST, LARGEST = 192, 400
_CONTEXT = 1.4
_QUALITY = 88

RGB = npt.NDArray[np.uint8]


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
