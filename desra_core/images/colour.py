"""Colour profiles: convert pixels from the ICC profile of a file to sRGB and back, with LittleCMS.

Relative colorimetric with black point compensation, in both directions: colours that both profiles have come back as
they were. The perceptual intent would compress all colours each time, and each vendor does it in another way.
"""

import struct
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import imagecodecs
import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from desra_core.images.codec import Pixels

# What becomes of the profile of a file: see `treatment`, and with `stored` nothing.
Treatment = Literal["srgb", "converted", "unusable", "stored"]

MOST_BYTES = 2**24  # of a profile
_HEADER = 128  # bytes
_MODELS = {b"GRAY": "gray", b"RGB ": "rgb", b"CMYK": "cmyk"}
_CHANNELS = {1: "gray", 3: "rgb", 4: "cmyk"}
_STRIP = 2**20  # pixels that are converted at a time
_RELATIVE = imagecodecs.CMS.INTENT.RELATIVE_COLORIMETRIC
_FLAGS = imagecodecs.CMS.FLAGS


def _undated(profile: bytes) -> bytes:
    """Set the date of a profile to the first of January 2000, so that the same files are made every day."""
    return profile[:24] + struct.pack(">6H", 2000, 1, 1, 0, 0, 0) + profile[36:]


_LEVELS = np.linspace(0, 1, 512)
_LIGHT = np.where(_LEVELS <= 0.04045, _LEVELS / 12.92, ((_LEVELS + 0.055) / 1.055) ** 2.4)  # the curve of sRGB
SRGB = _undated(imagecodecs.cms_profile("srgb"))
CURVE = np.rint(_LIGHT * 65535).astype(np.uint16)
GRAY = _undated(imagecodecs.cms_profile("gray", transferfunction=CURVE))


def model_of(profile: bytes) -> str | None:
    """Return the colour model of a profile: ``gray``, ``rgb``, ``cmyk`` or None."""
    return _MODELS.get(profile[16:20])


@lru_cache(maxsize=64)
def treatment(profile: bytes, channels: int) -> Treatment:
    """Find out what a profile means for the pixels of a file with 1 (gray), 3 (RGB) or 4 (CMYK) channels.

    Returns:
        ``srgb`` where the profile says the same as sRGB, to one level of 255; ``unusable`` where it is damaged or for
        another colour model, so that the pixels can only be taken for sRGB; otherwise ``converted``.
    """
    levels = np.arange(256) if channels == 1 else np.arange(0, 256, 15)
    count = 1 if channels == 1 else 3
    lattice = np.stack(np.meshgrid(*[levels.astype(np.uint8)] * count, indexing="ij"), axis=-1).reshape(-1, 1, count)
    if channels == 4:
        lattice = np.concatenate([lattice, lattice[::-1, :, :1]], axis=2)
    try:
        seen = to_srgb(lattice, profile)
    except ValueError:
        return "unusable"
    if channels == 4:
        return "converted"
    return "srgb" if np.abs(seen.astype(int) - lattice).max() <= 1 else "converted"


@lru_cache(maxsize=64)
def fits(profile: bytes, channels: int) -> bool:
    """Check whether sRGB can be converted to a profile with this number of channels; some serve input alone."""
    if model_of(profile) != _CHANNELS[channels]:
        return False
    try:
        from_srgb(np.zeros((1, 1, 1 if channels == 1 else 3), np.uint8), profile)
    except ValueError:
        return False
    return True


def to_srgb(pixels: "Pixels", profile: bytes) -> "Pixels":
    """Convert pixels of a profile to sRGB.

    Args:
        pixels: ``(H, W, 1, 3 or 4)``, uint8 or uint16: gray, RGB, or the ink of CMYK, where 0 is none.
        profile: Its colour model is that of the pixels; one of RGB may also describe gray.

    Returns:
        ``(H, W, 1 or 3)`` of the same dtype; gray stays gray.

    Raises:
        ValueError: The profile is damaged, or for another colour model.
    """
    model = model_of(profile)
    if model is None or (model != _CHANNELS[pixels.shape[2]] and (model, pixels.shape[2]) != ("rgb", 1)):
        raise ValueError(f"a profile for {model or 'another colour model'}")
    return _converted(pixels, profile, SRGB, model, "rgb", 1 if pixels.shape[2] == 1 else 3)


def from_srgb(pixels: "Pixels", profile: bytes) -> "Pixels":
    """Convert pixels of sRGB, ``(H, W, 1 or 3)``, to a profile that `fits` (raises `ValueError` where it does not)."""
    model = _MODELS[profile[16:20]]
    return _converted(pixels, SRGB, profile, "rgb", model, {"gray": 1, "rgb": 3, "cmyk": 4}[model])


def _converted(pixels: "Pixels", source: bytes, aim: bytes, model: str, aim_model: str, channels: int) -> "Pixels":
    """Convert strip by strip, so that little memory is needed beside the pixels and the result."""
    # LittleCMS is 13 times as fast if it may merge both profiles into one table. Then 8-bit values of profiles without
    # tables of their own differ by at most 1; other values by up to 20 levels of 255.
    exact = pixels.dtype != np.uint8 or any(b"A2B" in profile[_HEADER:4096] for profile in (source, aim))
    flags = _FLAGS.BLACKPOINTCOMPENSATION | (_FLAGS.NOOPTIMIZE if exact else 0)
    height, width = pixels.shape[:2]
    result = np.empty((height, width, channels), pixels.dtype)
    rows = max(1, _STRIP // width)
    for top in range(0, height, rows):
        strip: npt.NDArray[Any] = pixels[top : top + rows]
        if model == "rgb" and strip.shape[2] == 1:
            strip = np.repeat(strip, 3, axis=2)
        elif model == "gray":
            strip = strip[:, :, 0]
        try:
            seen = imagecodecs.cms_transform(
                np.ascontiguousarray(strip), source, aim, colorspace=model, outcolorspace=aim_model,
                intent=_RELATIVE, flags=flags,
            )  # fmt: skip
        except (RuntimeError, ValueError) as error:  # ValueError: of imagecodecs, about shapes
            raise ValueError(f"a damaged profile ({error})") from None
        seen = seen.reshape(*strip.shape[:2], -1)
        result[top : top + rows] = seen[:, :, 1:2] if channels == 1 and seen.shape[2] == 3 else seen
    return result
