"""Colour profiles of tests: those that libvips and LittleCMS bring, and how far colours are from each other."""

import imagecodecs
import numpy as np
import pyvips
from skimage.color import rgb2lab


def _of_vips(name: str) -> bytes:
    return bytes(pyvips.Operation.call("profile_load", name))


P3, CMYK, VIPS_SRGB = _of_vips("p3"), _of_vips("cmyk"), _of_vips("srgb")
ADOBE = imagecodecs.cms_profile("adobergb")
GRAY = imagecodecs.cms_profile("gray", gamma=1.8)


def delta_e(one: np.ndarray, other: np.ndarray) -> float:
    """Return the largest CIE76 difference of two pictures of sRGB, ``(H, W, 1 or 3)``, of 8 or 16 bits."""
    labs = [
        rgb2lab(np.broadcast_to(pixels / np.iinfo(pixels.dtype).max, (*pixels.shape[:2], 3))) for pixels in (one, other)
    ]
    return float(np.linalg.norm(labs[0] - labs[1], axis=2).max())
