"""Read masks in all usual forms: 1-bit, gray, palette or colour, with or without the 5 px frame."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from desra_core.detection.mask import valid
from desra_core.errors import ImageError
from desra_core.files.hashing import read_bytes
from desra_core.images.codec import Mask, Pixels, decode

# Width of the border in which nothing is detected, in pixels.
FRAME = 5

# A lossy format makes only the surroundings of edges gray: at most this share of a mask.
_MOST_GRAY = 0.25
# The largest value that black can get by JPEG's coarsest quantisation.
_NOISE = 31
_SIZES = f"masks have the size of their image, or {2 * FRAME} px less each way"
_REMEDY = "save it as PNG with 0 where nothing is and 255 where something is"


def read_mask(path: Path) -> Mask:
    """Read a mask (raises as `decode_mask`, and `TransientError` where the file cannot be read)."""
    return decode_mask(read_bytes(path), path)


def decode_mask(data: bytes, path: Path) -> Mask:
    """Decode the mask in the whole content of a file to ``(H, W)`` bool; ``path`` is named in errors.

    Pixels of one colour or value other than black (255, 1, 65535) are marked; black and transparent pixels are not.
    Lossy files (`is_lossy`) are thresholded at half of the range. Raises `ImageError`: the file is no image, is
    damaged, or is not binary.
    """
    photo = decode(data, path)
    if is_lossy(data):
        marked = _thresholded(photo.pixels, path)
        return marked if photo.alpha is None else marked & (photo.alpha > 127)
    marked = _painted(photo.pixels, path)
    if photo.alpha is None:
        return marked
    opaque = _painted(photo.alpha[:, :, np.newaxis], path)
    # In a mask drawn on a transparent ground, transparent pixels are black, or all pixels have one colour.
    if not marked.all() and (marked & ~opaque).any():
        raise ImageError(path, "is one mask by its colours and another by its transparency", "save it without alpha")
    return marked & opaque


def is_lossy(data: bytes) -> bool:
    """Check whether the content of a file is JPEG or lossy WebP."""
    if data[:3] == b"\xff\xd8\xff":
        return True
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return False
    start = 12
    while start + 8 <= len(data):
        kind, size = data[start : start + 4], int.from_bytes(data[start + 4 : start + 8], "little")
        if kind in (b"VP8 ", b"VP8L"):
            return kind == b"VP8 "
        start += 8 + size + size % 2
    return False


def shape_of_image(mask: Mask, ground_truth: Mask, path: Path, ground_truth_path: Path) -> tuple[int, int] | None:
    """Find ``(H, W)`` of the image of two masks of which one lacks the frame; None where both are of one size.

    Raises `ImageError` where their sizes do not belong together.
    """
    if mask.shape == ground_truth.shape:
        return None
    larger = max(mask.shape, ground_truth.shape)
    if {mask.shape, ground_truth.shape} != {larger, _without_frame(larger)}:
        raise ImageError(path, f"is {_size(mask)} but {ground_truth_path} is {_size(ground_truth)}", _SIZES)
    return larger


def on_valid_region(mask: Mask, shape: tuple[int, int], path: Path) -> Mask:
    """Crop the mask of an image of ``(H, W)`` to ``(H - 10, W - 10)``, unless it has that size.

    Raises `ImageError` where the mask has another size, or nothing is left of the image.
    """
    if mask.shape not in (shape, _without_frame(shape)):
        raise ImageError(path, f"is {_size(mask)} but its image is {shape[1]}x{shape[0]}", _SIZES)
    if min(shape) <= 2 * FRAME:
        reason = f"is of an image of {shape[1]}x{shape[0]} px, which is all frame"
        raise ImageError(path, reason, f"images have more than {2 * FRAME} px a side")
    return valid(mask, FRAME) if mask.shape == shape else mask


def _without_frame(shape: tuple[int, int]) -> tuple[int, int]:
    return shape[0] - 2 * FRAME, shape[1] - 2 * FRAME


def _size(mask: Mask) -> str:
    return f"{mask.shape[1]}x{mask.shape[0]}"


def _painted(pixels: Pixels, path: Path) -> Mask:
    """Mark the ``(H, W, C)`` pixels that are not black, which must all be equal."""
    marked = np.asarray(_any_channel(pixels != 0))
    if not marked.any():
        return marked
    colour = pixels.reshape(-1, pixels.shape[2])[marked.argmax()]
    if (_any_channel(pixels != colour) & marked).any():
        if pixels.shape[2] > 1:
            raise ImageError(path, "is not binary: it has several colours beside black", _REMEDY)
        values = np.unique(pixels).tolist()
        shown = ", ".join(map(str, values[:4])) + (" and more" if len(values) > 4 else "")
        raise ImageError(path, f"is not binary: it has the values {shown}", _REMEDY)
    return marked


def _thresholded(pixels: Pixels, path: Path) -> Mask:
    """Mark the 8-bit pixels of a lossy format that are nearer to 255 than to 0."""
    marked = pixels > 127
    gray = np.count_nonzero((pixels > 63) & (pixels < 192)) / pixels.size
    mask = np.asarray(_any_channel(marked))
    if gray > _MOST_GRAY:
        raise ImageError(path, f"is not binary: {100 * gray:.0f} % of its pixels are gray", _REMEDY)
    if (marked != mask[:, :, np.newaxis]).any():
        raise ImageError(path, "is not binary: it is coloured", _REMEDY)
    if not mask.any() and pixels.max() > _NOISE:
        raise ImageError(path, f"is not binary: its largest value is {pixels.max()}", _REMEDY)
    return mask


def _any_channel(flags: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Compute ``flags.any(axis=2)``, several times faster."""
    found = flags[:, :, 0].copy()
    for channel in range(1, flags.shape[2]):
        found |= flags[:, :, channel]
    return found
