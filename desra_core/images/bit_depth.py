"""Convert samples of 16 bits to 8 bits or to values in 0..255, and compute their luminance.

`desra_core.images.codec` decodes a 16-bit photo to 16 bits, and an SR result has the depth of its photo.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from desra_core.images.codec import Pixels

# The shares of red, green and blue in luminance (BT.601).
LUMINANCE = (0.299, 0.587, 0.114)


def grey_levels(samples: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Convert samples of any depth to float64 in 0..255: uint16 is divided by 257."""
    return samples / 257.0 if samples.dtype == np.uint16 else samples.astype(np.float64)


def luminance(levels: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Compute the luminance ``(H, W)`` of gray or RGB levels ``(H, W, 1 or 3)``."""
    return levels[:, :, 0] if levels.shape[2] == 1 else levels @ np.array(LUMINANCE)


def bgr8(pixels: Pixels) -> npt.NDArray[np.uint8]:
    """Convert pixels to ``(H, W, 3)`` uint8 BGR, 16 bits rounded and gray replicated: the input of MMSegmentation."""
    if pixels.dtype == np.uint16:
        pixels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3))[:, :, ::-1])
