"""Decode and encode image files; BGR, alpha and EXIF are handled only here.

`desra_core.images.decoders` reads the files. Everywhere else an image is an array of shape ``(H, W, C)``, C = 1 (gray)
or 3 (RGB), dtype uint8 or uint16: 16 bits are kept. Photos are sRGB, whatever their colour profile.
"""

import io
import math
import struct
import warnings
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import imagecodecs
import numpy as np
import numpy.typing as npt
from PIL import Image

from desra_core.errors import ArgumentError, ImageError, TooLargeError
from desra_core.files import read_bytes, read_errors
from desra_core.images import decoders, further_decoders
from desra_core.images.colour import MOST_BYTES, Treatment, model_of, to_srgb, treatment
from desra_core.images.decoders import PNG_SIGNATURE, TIFF_SIGNATURES, Picture, Samples
from desra_core.remote import threads_for

SUFFIXES = further_decoders.SUFFIXES | {
    ".png", ".jpg", ".jpeg", ".jfif", ".jpe", ".jif", ".jfi", ".pjpeg", ".pjp", ".webp", ".tif", ".tiff", ".bmp",
}  # fmt: skip

Pixels = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
Mask = npt.NDArray[np.bool_]
Labels = npt.NDArray[np.uint8]
CLASS_COUNT = 150  # ADE20K's

# The shares of red, green and blue in luminance (BT.601).
LUMINANCE = (0.299, 0.587, 0.114)

# See `_most_plausible`. Deflate packs at most about 1000 bytes into a byte, that is 8000 pixels of one bit;
# twice as many and more are beyond doubt.
_BOMB_PIXELS = 2**26
_BOMB_PIXELS_PER_BYTE = 20_000
_PNG_HEADER = 24  # bytes from the beginning of a file to the end of its size
_BATCH = 128  # files whose headers are read at a time
_HEAD, _LONGER_HEAD = 2**16, 2**20  # bytes at the beginning of a file in which its header is looked for
TRANSPOSED = frozenset({5, 6, 7, 8})  # EXIF orientations that swap height and width


class Photo(NamedTuple):
    """A decoded image file."""

    pixels: Pixels  # ``(H, W, 1 or 3)`` RGB, uint8 or uint16
    alpha: Pixels | None  # ``(H, W)`` of the same dtype, or None
    profile: Treatment | None  # what became of the file's colour profile; None without one
    further_pages: int = 0  # the number of unread full pages among the first 256 pages of a TIFF file


class Header(NamedTuple):
    """What an image file tells without its pixels being decoded."""

    format: str  # such as JPEG
    size: tuple[int, int]  # ``(H, W)``, upright
    samples: Samples | None  # None where only decoding would tell
    profile: bytes | None  # the ICC profile; None without one, and where only decoding would tell
    treatment: Treatment | None  # what `decode` makes of the profile
    length: int  # bytes of the file
    start: bytes  # its first 64 KB, or all of it


def decode(data: bytes, path: Path, *, max_pixels: int = 2**40, as_stored: bool = False) -> Photo:
    """Decode an image file: EXIF orientation applied, alpha separate, 16 bits kept, palettes expanded.

    Colours are converted from the profile of the file to sRGB. They stay as they are, bit by bit, without a profile,
    with one of sRGB, and with one that is damaged or for another colour model.

    Args:
        data: The whole file.
        path: The path that errors name.
        max_pixels: Larger images are refused before anything of their size is allocated.
        as_stored: Leave the colours as they are whatever the profile, as masks and pairs of results want it.

    Raises:
        ImageError: The file is empty, no image, of an unsupported colour model, truncated or damaged.
        TooLargeError: The image has more than ``max_pixels``.
    """
    picture = opened(data, path)
    _check_size(picture.size, len(data), path, max_pixels)
    _check_inks(picture, path, as_stored=as_stored)
    pixels = picture.channels(indices=False)
    if picture.orientation in TRANSPOSED:
        pixels = pixels.swapaxes(0, 1)
    # Seen upright, the orientations 2, 3, 6, 7 are stored from right to left, and 3, 4, 7, 8 from bottom to top.
    if picture.orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if picture.orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    colours = 4 if picture.has_inks else 1 if pixels.shape[2] < 3 else 3
    alpha = pixels[:, :, colours] if pixels.shape[2] > colours else None
    colour: Pixels = np.ascontiguousarray(pixels[:, :, :colours])  # type: ignore[assignment]
    profile = "stored" if as_stored and picture.profile is not None else treatment_of(picture, colours)
    if profile == "converted":
        colour = to_srgb(colour, picture.profile or b"")
    return Photo(colour, alpha, profile, picture.further_pages)


def read_image(path: Path | str) -> Pixels:
    """Read an image file as ``(H, W, 1 or 3)`` sRGB, uint8 or uint16, without its alpha (raises `ImageError`)."""
    return decode(read_bytes(Path(path)), Path(path)).pixels


def image_size(data: bytes, path: Path) -> tuple[int, int]:
    """Return ``(H, W)`` of an image file, upright, without decoding it (raises `ImageError`)."""
    picture = opened(data, path)
    height, width = picture.size
    return (width, height) if picture.orientation in TRANSPOSED else (height, width)


def read_header(path: Path) -> Header:
    """Read the header of an image file, and no more of the file where the format allows it.

    Raises:
        ImageError: `decode` would refuse the file for its header.
        TransientError: The file cannot be read.
    """
    with read_errors(path), path.open("rb") as file:
        length = file.seek(0, io.SEEK_END)
        file.seek(0)
        start = data = file.read(_HEAD)
        if (raw := further_decoders.raw_size(path)) is not None:
            kind = further_decoders.RawPicture
            return Header(kind.format, raw, kind.samples, None, None, length, start)
        if start.startswith(TIFF_SIGNATURES):
            file.seek(0)
            picture: Picture = decoders.TiffPicture(start, path, file)
        else:
            for most in (_LONGER_HEAD, length, 0):
                is_whole = not most or len(data) >= length
                try:
                    picture = opened(data, path)
                    # Of a PNG that is cut, all chunks before the cut are read: its header is whole if the pixels begin.
                    if is_whole or not start.startswith(PNG_SIGNATURE) or b"IDAT" in data:
                        break
                except ImageError:
                    if is_whole:
                        raise
                data += file.read(most - len(data))
    _check_size(picture.size, length, path, 2**40)
    _check_inks(picture, path, as_stored=False)
    size = picture.size[::-1] if picture.orientation in TRANSPOSED else picture.size
    samples = picture.samples
    if samples is None:
        return Header(picture.format, size, None, None, None, length, start)
    treatment = treatment_of(picture, {"gray": 1, "CMYK": 4}.get(samples.colours, 3))
    return Header(picture.format, size, samples, picture.profile, treatment, length, start)


def profile_by_header(path: Path) -> Treatment | None:
    """Find out what `decode` makes of the profile of an image file by its header alone; None without a profile.

    Raises:
        ImageError: The file cannot be read.
    """
    picture = opened(read_bytes(path), path)
    return treatment_of(picture, 4 if picture.has_inks else {"gray": 1}.get(model_of(picture.profile or b"") or "", 3))


def most_pixels(files: Iterable[Path]) -> int:
    """Return the pixel count of the largest image that `decode` accepts by its header; 0 where there is none."""
    most, remaining = 0, iter(files)
    batch = list(islice(remaining, _BATCH))
    with threads_for(*batch[:1]) as pool:
        while batch:
            most = max(most, *pool.map(_pixel_count, batch))
            batch = list(islice(remaining, _BATCH))
    return most


def decode_labels(data: bytes, path: Path, *, max_pixels: int = 2**40) -> Labels:
    """Decode a class-index image, gray or palette, to ``(H, W)`` uint8; parameters as for `decode`.

    Raises:
        ImageError: As `decode`, or the file has colour channels, less than 8 bits of gray, or values above 149.
    """
    picture = opened(data, path)
    _check_size(picture.size, len(data), path, max_pixels)
    _check_inks(picture, path, as_stored=True)
    pixels = picture.channels(indices=True)
    if pixels.shape[2] != 1:
        raise ImageError(path, "has colour channels, but class labels are one index per pixel",
                         "save labels as 8-bit gray PNG")  # fmt: skip
    if picture.spread_bits and pixels.any():  # zeros mean the same either way
        reason = f"has {picture.spread_bits}-bit gray, which may be class indices or shades of 0 to 255"
        raise ImageError(path, reason, "save labels as 8-bit gray PNG")
    check_labels(pixels, path)
    return np.ascontiguousarray(pixels[:, :, 0].astype(np.uint8, copy=False))


def check_labels(labels: npt.NDArray[Any], source: object) -> None:
    """Check that all values are ADE20K's class indices (raises `ImageError`, which names the source of the labels)."""
    if labels.max(initial=0) >= CLASS_COUNT:
        raise ImageError(source, f"holds the label {labels.max()}", "labels are ADE20K indices 0..149")


def check_size(array: npt.NDArray[Any], source: object, remedy: str, *sizes: tuple[int, ...]) -> None:
    """Check that a mask or labels have one of ``sizes`` ``(H, W)``; the first is the image's (raises `ImageError`)."""
    if array.shape not in sizes:
        reason = f"is {array.shape[1]}x{array.shape[0]} but its image is {sizes[0][1]}x{sizes[0][0]}"
        raise ImageError(source, reason, remedy)


def check_picture(name: str, pixels: npt.NDArray[Any]) -> None:
    """Check that an array is a picture: ``(H, W)`` or ``(H, W, 1 or 3)``, uint8 or uint16 (raises `ArgumentError`)."""
    if not isinstance(pixels, np.ndarray) or pixels.dtype not in (np.uint8, np.uint16):
        described = getattr(pixels, "dtype", type(pixels).__name__)
        raise ArgumentError(name, f"is of {described}", "give an array of uint8 (0..255) or uint16 (0..65535)")
    if not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (1, 3))) or not pixels.size:
        raise ArgumentError(name, f"is of shape {pixels.shape}", "give (H, W), or (H, W, 1 or 3) without alpha")


def encode_mask(mask: Mask) -> bytes:
    """Encode a ``(H, W)`` bool mask as a 1-bit PNG, which decodes to 0 and 255."""
    return _encode(mask.astype(np.uint8) * np.uint8(255), [cv2.IMWRITE_PNG_BILEVEL, 1, cv2.IMWRITE_PNG_COMPRESSION, 9])


def decode_mask(data: bytes, path: Path) -> Mask:
    """Decode a file of `encode_mask` to ``(H, W)`` bool (raises `ImageError`, which names ``path``)."""
    return np.asarray(decode(data, path, as_stored=True).pixels[:, :, 0] > 0)


def encode_png(pixels: Pixels, alpha: Pixels | None = None) -> bytes:
    """Encode uint8 or uint16 pixels as PNG: ``(H, W)`` or ``(H, W, 1..4)`` with alpha last.

    Alpha may also be given apart from the pixels, as ``alpha``: ``(H, W)`` of the same dtype.
    """
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    channels = pixels.shape[2] + (alpha is not None)
    if channels == 1:
        return _encode(pixels, [])
    if channels == 2:  # OpenCV does not write gray with alpha
        return bytes(imagecodecs.png_encode(np.dstack([pixels] if alpha is None else [pixels, alpha])))
    ordered = np.empty((*pixels.shape[:2], channels), pixels.dtype)
    ordered[:, :, :3] = pixels[:, :, 2::-1]
    ordered[:, :, 3:] = pixels[:, :, 3:] if alpha is None else alpha[:, :, np.newaxis]
    return _encode(ordered, [])


def grey_levels(samples: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Convert samples of any depth to float64 in 0..255: uint16 is divided by 257."""
    return samples / 257.0 if samples.dtype == np.uint16 else samples.astype(np.float64)


def rgb_levels(samples: Pixels) -> npt.NDArray[np.float64]:
    """Convert pixels of any depth, gray or RGB, to ``(H, W, 3)`` float64 in 0..255."""
    return np.broadcast_to(grey_levels(samples), (*samples.shape[:2], 3))


def luminance(levels: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Compute the luminance ``(H, W)`` of gray or RGB levels ``(H, W, 1 or 3)``."""
    return levels[:, :, 0] if levels.shape[2] == 1 else levels @ np.array(LUMINANCE)


def bgr8(pixels: Pixels) -> npt.NDArray[np.uint8]:
    """Convert pixels to ``(H, W, 3)`` uint8 BGR, 16 bits rounded and gray replicated: the input of MMSegmentation."""
    pixels = eight_bits(pixels)
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3))[:, :, ::-1])


def eight_bits(samples: Pixels) -> npt.NDArray[np.uint8]:
    """Round samples of 16 bits to 8; those of 8 bits stay."""
    if samples.dtype == np.uint8:
        return samples  # type: ignore[return-value]
    return ((samples.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _pixel_count(path: Path) -> int:
    try:
        if (raw := further_decoders.raw_size(path)) is not None:
            return math.prod(raw)
        with path.open("rb") as file:
            start = file.read(_PNG_HEADER)
            length = file.seek(0, io.SEEK_END)
            file.seek(0)
            if start.startswith(PNG_SIGNATURE):
                size = struct.unpack_from(">II", start, _PNG_HEADER - 8)
            elif start.startswith(TIFF_SIGNATURES):
                size = decoders.stored_tiff_size(file)
            elif (stored := further_decoders.most_stored_pixels(file)) is not None:
                size = stored, 1
            else:
                with warnings.catch_warnings(action="ignore"), Image.open(file) as image:
                    size = image.size
        return math.prod(size) if math.prod(size) <= _most_plausible(length) else 0
    except Exception:  # noqa: BLE001 the stage that reads a damaged file reports it
        return 0


def _most_plausible(length: int) -> int:
    """Return the most pixels that a file of ``length`` bytes may claim; a file that claims more is cut, or a bomb."""
    return max(_BOMB_PIXELS, _BOMB_PIXELS_PER_BYTE * length)


def _encode(array: Pixels, options: list[int]) -> bytes:
    ok, encoded = cv2.imencode(".png", array, options)
    if not ok:
        raise ValueError(f"cannot encode an array of shape {array.shape} and dtype {array.dtype} as PNG")
    return encoded.tobytes()


def opened(data: bytes, path: Path) -> Picture:
    """Read the header of an image file (raises `ImageError`)."""
    if not data:
        raise ImageError(path, "is empty", "copy it again, or remove it")
    if data.startswith(PNG_SIGNATURE):
        return decoders.PngPicture(data, path)
    if further := further_decoders.further_picture(data, path):
        return further
    if data.startswith(TIFF_SIGNATURES):
        return decoders.TiffPicture(data, path)
    return decoders.PillowPicture(data, path)


def treatment_of(picture: Picture, channels: int) -> Treatment | None:
    """Find out what becomes of the profile of a picture with this number of colour channels; None without one."""
    if picture.profile is None:
        return None
    return treatment(picture.profile, channels) if len(picture.profile) <= MOST_BYTES else "unusable"


def _check_inks(picture: Picture, path: Path, *, as_stored: bool) -> None:
    """Refuse inks that no profile converts (raises `ImageError`)."""
    if picture.has_inks and (as_stored or treatment_of(picture, 4) != "converted"):
        reason = "has the colour model CMYK" + ("" if as_stored else " and no profile of its inks that can be used")
        raise ImageError(path, reason, "convert it to RGB or gray")


def _check_size(size: tuple[int, int], length: int, path: Path, max_pixels: int) -> None:
    """Check the size that the header of a file of ``length`` bytes claims (raises as `decode`)."""
    height, width = size
    if width * height > _most_plausible(length):
        raise ImageError(path, f"claims {width}x{height} pixels in {length} bytes", "copy it again, or remove it")
    if width * height > max_pixels:
        reason = f"has {width}x{height} pixels, more than fit into a worker's memory"
        raise TooLargeError(path, reason, "raise --memory or use fewer --workers")
