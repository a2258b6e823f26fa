"""Read HEIC, AVIF, JPEG XL and camera raw. All but AVIF need packages of the extra ``desra[formats]``.

`desra_core.images.codec` chooses among these and those of `desra_core.images.decoders`.
"""

from __future__ import annotations

import importlib
import io
import struct
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import imagecodecs
import numpy as np
import numpy.typing as npt
from PIL import AvifImagePlugin

from desra_core.errors import ImageError
from desra_core.images import colour
from desra_core.images.decoders import (
    DAMAGE,
    SAVE_AGAIN_AS_TIFF,
    Metadata,
    Picture,
    PillowPicture,
    Samples,
    block_of,
    metadata_by_pillow,
    metadata_of,
)
from desra_core.remote import Remote

if TYPE_CHECKING:
    from desra_core.images.codec import Pixels

HEIC, JPEG_XL, RAW = "HEIC", "JPEG XL", "camera raw"
_PACKAGES = {HEIC: "pillow_heif", JPEG_XL: "pillow_jxl", RAW: "rawpy"}
_SUFFIXES = {
    HEIC: (".heic", ".heif", ".hif"),
    JPEG_XL: (".jxl",),
    RAW: (
        ".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".iiq", ".kdc", ".mef", ".mos", ".mrw", ".nef",
        ".nrw", ".orf", ".pef", ".raf", ".rw2", ".rwl", ".sr2", ".srf", ".srw", ".x3f",
    ),
}  # fmt: skip
_KINDS = {suffix: kind for kind, suffixes in _SUFFIXES.items() for suffix in suffixes}
SUFFIXES = frozenset({".avif", *_KINDS})

_JXL_SIGNATURES = (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")
_HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
_AVIF_BRANDS = (b"avif", b"avis")
_HEAD = 2**16  # bytes at the beginning of a file, where sizes and colours are told
_MORE_THAN_8_BITS, _TWELVE_BITS = 0x40, 0x20  # in the third byte of the box av1C
_ROWS = 256  # rows that are spread to 16 bits at a time
# Colours by number (ITU-T H.273): the primaries of Display P3 and BT.2020, whose curves count as that of sRGB.
_PRIMARIES = {
    12: [0.68, 0.32, 1, 0.265, 0.69, 1, 0.15, 0.06, 1],
    9: [0.708, 0.292, 1, 0.17, 0.797, 1, 0.131, 0.046, 1],
}
_HDR = {16: "PQ", 18: "HLG"}
# Width by height of the sizes that JPEG XL has numbers for.
_RATIOS = {1: (1, 1), 2: (12, 10), 3: (4, 3), 4: (3, 2), 5: (16, 9), 6: (5, 4), 7: (2, 1)}
_RAW_HEADERS = (b"IIRO", b"IIRS", b"IIU\0")  # of files that are laid out as TIFF otherwise


AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # a worker has its threads for many images


def missing_for(suffix: str) -> bool:
    """Check whether files of a suffix, in lower case, need a package that is not installed."""
    return (kind := _KINDS.get(suffix)) is not None and not _has(kind)


def readable_now() -> list[str]:
    """List the reasons for which files were refused without the packages that are installed here."""
    return [f"is {kind}, which needs another package" for kind in _PACKAGES if _has(kind)]


def further_picture(data: bytes, path: Path) -> Picture | None:
    """Read the header of a file of one of these kinds; None for a file of another kind.

    Raises:
        ImageError: The file is damaged or not read, or its package is missing.
    """
    if _KINDS.get(path.suffix.lower()) == RAW:  # a camera's file looks like TIFF, or like a kind of its own
        return RawPicture(data, path)
    if data.startswith(_JXL_SIGNATURES):
        return JxlPicture(data, path)
    brands = _brands(data)
    if any(brand in brands for brand in _AVIF_BRANDS):
        return AvifPicture(data, path)
    return HeicPicture(data, path) if any(brand in brands for brand in _HEIC_BRANDS) else None


def most_stored_pixels(file: BinaryIO) -> int | None:
    """Return at least the pixels of a HEIC, AVIF or JPEG XL by its first bytes; None for another kind."""
    head = file.read(32)
    if not head.startswith(_JXL_SIGNATURES) and head[4:8] != b"ftyp":
        file.seek(0)
        return None
    head += file.read(_HEAD)
    file.seek(0)
    if head.startswith(_JXL_SIGNATURES):
        height, width, _ = _jxl_size(head)
        return height * width
    if not any(brand in _brands(head) for brand in (*_HEIC_BRANDS, *_AVIF_BRANDS)):
        return None
    sizes = [struct.unpack(">II", part[4:12]) for part in head.split(b"ispe")[1:] if len(part) >= 12]
    return max((width * height for width, height in sizes), default=0)


def raw_size(path: Path) -> tuple[int, int] | None:
    """Return ``(H, W)`` of a camera raw file, upright, by its header; None for a file of another suffix.

    Raises:
        ImageError: The file is damaged, or the package is missing.
    """
    if _KINDS.get(path.suffix.lower()) != RAW:
        return None
    package = _package(RAW, path)
    with package.RawPy() as raw:
        try:
            if isinstance(path, Remote):
                raw.open_buffer(io.BytesIO(path.read_bytes()))
            else:
                raw.open_file(str(path))
        except (package.LibRawError, *DAMAGE) as error:
            raise _no_raw(path, error) from None
        return _upright(raw.sizes)


class AvifPicture(PillowPicture):
    """The first picture of an AVIF file: Pillow reads it, but pixels of more than 8 bits imagecodecs."""

    def __init__(self, data: bytes, path: Path) -> None:
        super().__init__(data, path)
        self.profile = self.profile or _told_profile(data, path)
        (flags,) = data[:_HEAD].partition(b"av1C")[2][2:3] or b"\0"
        self._bits = 8 if not flags & _MORE_THAN_8_BITS else 12 if flags & _TWELVE_BITS else 10
        self.samples = self.samples and self.samples._replace(bits=self._bits)

    def channels(self, *, indices: bool) -> Pixels:
        """Decode the picture as `Picture` says."""
        # imagecodecs 2026.3 ends the process when it reads the first picture of an animation.
        if self._bits == 8 or getattr(self._image, "n_frames", 1) > 1:
            return super().channels(indices=indices)
        try:
            samples = imagecodecs.avif_decode(self._data, numthreads=1)
        except DAMAGE as error:
            raise self._damaged(error) from None
        samples = samples.reshape(*samples.shape[:2], -1)
        if self._image.mode in ("L", "LA") and samples.shape[2] > 2:
            samples = samples[:, :, [0] if self._image.mode == "L" else [0, 3]]
        return _spread(samples, self._bits)


class HeicPicture(Picture):
    """The primary picture of a HEIC file, which libheif turns upright itself: EXIF says the same once more."""

    format = HEIC

    def __init__(self, data: bytes, path: Path) -> None:
        super().__init__(data, path)
        package = _package(HEIC, path)
        try:
            file = package.HeifFile(io.BytesIO(data), convert_hdr_to_8bit=False, hdr_to_16bit=False)
            self._image = file[file.primary_index]
            width, height = self._image.size
        except (LookupError, EOFError, *DAMAGE) as error:
            raise ImageError(path, f"is a HEIC file that cannot be read ({error})", SAVE_AGAIN_AS_TIFF) from None
        self.size, self.orientation = (height, width), 1
        self._info: dict[str, Any] = self._image.info
        self.profile = self._info.get("icc_profile") or _told_profile(data, path)
        mode = str(self._image.mode)
        self._bits = int(self._info.get("bit_depth") or 8)
        self.samples = Samples(self._bits, "gray" if mode.startswith("L") else "RGB", "A" in mode)

    def metadata(self) -> Metadata:
        """Read the metadata as `Picture` says."""
        return metadata_of(block_of(self._info.get("exif")), self._info.get("xmp"))

    def channels(self, *, indices: bool) -> Pixels:  # noqa: ARG002 no palettes
        """Decode the picture as `Picture` says."""
        try:
            samples = np.asarray(self._image)
        except (LookupError, EOFError, *DAMAGE) as error:
            raise self._damaged(error) from None
        return _spread(samples.reshape(*samples.shape[:2], -1), self._bits)


class JxlPicture(Picture):
    """The first picture of a JPEG XL file: libjxl turns it upright itself."""

    format = JPEG_XL

    def __init__(self, data: bytes, path: Path) -> None:
        super().__init__(data, path)
        self._package = _package(JPEG_XL, path)
        try:
            height, width, orientation = _jxl_size(data)
        except (IndexError, ValueError, struct.error):
            raise ImageError(path, "has a damaged header", "copy it again, or remove it") from None
        self.size = (width, height) if orientation > 4 else (height, width)
        self.orientation = 1

    @cached_property
    def profile(self) -> bytes | None:
        """The ICC profile of the pixels, for which the package decodes the file."""
        return self._told[0]

    @cached_property
    def _told(self) -> tuple[bytes | None, bytes | None, bytes | None]:
        """The profile, EXIF and XMP."""
        try:
            is_jpeg, _, decoded, profile, boxes = self._package.Decoder(num_threads=1)(self._data)
        except Exception as error:  # noqa: BLE001 the package raises what its Rust code panics with
            raise self._damaged(error) from None
        if is_jpeg:
            exif, xmp, _ = metadata_by_pillow(io.BytesIO(decoded))
            return profile, exif, xmp
        content = {bytes(box.box_type): bytes(box.data) for box in boxes if box.box_type in (b"Exif", b"xml ")}
        exif = content.get(b"Exif", b"")
        exif = exif[4:] if exif[4:6] in (b"II", b"MM") else exif  # as a rule, 4 bytes come before it
        return profile, block_of(exif), content.get(b"xml ")

    def metadata(self) -> Metadata:
        """Read the metadata as `Picture` says."""
        return metadata_of(*self._told[1:])

    def channels(self, *, indices: bool) -> Pixels:  # noqa: ARG002 no palettes
        """Decode the picture as `Picture` says."""
        try:
            samples = imagecodecs.jpegxl_decode(self._data, index=0, numthreads=1)
            samples = samples.reshape(*self.size, -1)
        except DAMAGE as error:
            raise self._damaged(error) from None
        if samples.dtype not in (np.uint8, np.uint16) or colour.model_of(self.profile or b"") == "cmyk":
            kind = "CMYK in JPEG XL" if samples.dtype in (np.uint8, np.uint16) else f"JPEG XL ({samples.dtype})"
            raise ImageError(self._path, f"has the colour model {kind}", "convert it to RGB or gray of 8 or 16 bits")
        pixels: Pixels = samples
        return pixels


class RawPicture(Picture):
    """The photo of a camera's raw file, developed to sRGB of 16 bits with the white balance of the camera."""

    format = RAW
    samples = Samples(16, "RGB", False)

    def __init__(self, data: bytes, path: Path) -> None:
        super().__init__(data, path)
        self._package = _package(RAW, path)
        self._raw = self._package.RawPy()
        try:
            self._raw.open_buffer(io.BytesIO(data))
        except (self._package.LibRawError, *DAMAGE) as error:
            raise _no_raw(path, error) from None
        self.size, self.orientation = _upright(self._raw.sizes), 1

    def metadata(self) -> Metadata:
        """Read the metadata as `Picture` says: most cameras lay out their files as TIFF."""
        data = self._data
        if data.startswith(_RAW_HEADERS):
            data = b"II*\0" + data[4:]
        if data.startswith(b"FUJIFILM") and len(data) > 92:  # the photo as JPEG is in it
            start, length = struct.unpack_from(">II", data, 84)
            return metadata_by_pillow(io.BytesIO(data[start : start + length]))
        return metadata_of(data, None)

    def channels(self, *, indices: bool) -> Pixels:  # noqa: ARG002 no palettes
        """Decode the picture as `Picture` says."""
        try:
            self._raw.unpack()
            pixels: Pixels = self._raw.postprocess(use_camera_wb=True, output_bps=16, gamma=(2.4, 12.92))
        except (self._package.LibRawError, *DAMAGE) as error:
            raise self._damaged(_said(error)) from None
        finally:
            self._raw.close()
        return pixels


@cache
def _has(kind: str) -> bool:
    try:
        importlib.import_module(_PACKAGES[kind])
    except ImportError:
        return False
    return True


def _package(kind: str, path: Path) -> Any:
    """Import the package that reads a kind of files (raises `ImageError` where it is missing)."""
    if not _has(kind):
        raise ImageError(path, f"is {kind}, which needs another package", "pip install 'desra[formats]'")
    return importlib.import_module(_PACKAGES[kind])


def _said(error: BaseException) -> str:
    return " ".join(str(part.decode(errors="replace") if isinstance(part, bytes) else part) for part in error.args)


def _no_raw(path: Path, error: BaseException) -> ImageError:
    return ImageError(path, f"is no camera raw file that is read ({_said(error)})", SAVE_AGAIN_AS_TIFF)


def _upright(sizes: Any) -> tuple[int, int]:
    height, width = int(sizes.iheight), int(sizes.iwidth)
    return (width, height) if sizes.flip & 4 else (height, width)


def _brands(data: bytes) -> list[bytes]:
    """List the brands of a file that is made of boxes; the first one is that of its main picture."""
    if data[4:8] != b"ftyp" or len(data) < 16:
        return []
    end = min(int.from_bytes(data[:4], "big"), 256)
    return [data[8:12], *(data[place : place + 4] for place in range(16, end, 4))]


def _told_profile(data: bytes, path: Path) -> bytes | None:
    """Return a profile of the colours that a HEIC or AVIF file names by number; None where these are sRGB's."""
    told = data[:_HEAD].partition(b"colrnclx")[2][:4]
    if len(told) < 4:
        return None
    primaries, curve = struct.unpack(">HH", told)
    if curve in _HDR:
        raise ImageError(path, f"is HDR ({_HDR[curve]}), whose range does not fit into sRGB", "export it as SDR")
    return _profile_of(primaries) if primaries in _PRIMARIES else None


@cache
def _profile_of(primaries: int) -> bytes:
    made: bytes = imagecodecs.cms_profile(
        "rgb", whitepoint=[0.3127, 0.329, 1], primaries=_PRIMARIES[primaries], transferfunction=colour.CURVE
    )
    return made


def _spread(samples: npt.NDArray[Any], bits: int) -> Pixels:
    """Spread samples of more than 8 bits over the range of 16 bits."""
    if samples.dtype == np.uint8 or bits <= 8:
        return samples.astype(np.uint8, copy=False)
    most = 2**bits - 1
    result = np.empty(samples.shape, np.uint16)
    for top in range(0, len(samples), _ROWS):
        result[top : top + _ROWS] = (samples[top : top + _ROWS].astype(np.uint32) * 65535 + most // 2) // most
    return result


def _jxl_size(data: bytes) -> tuple[int, int, int]:
    """Read height and width as stored, and the orientation, of a JPEG XL (raises for a damaged one)."""
    if not data.startswith(_JXL_SIGNATURES[0]):
        place = 0
        while True:  # the boxes before that of the picture
            length, kind = struct.unpack_from(">I4s", data, place)
            if kind in (b"jxlc", b"jxlp"):
                data = data[place + (8 if kind == b"jxlc" else 12) :][:64]
                break
            if length < 8:
                raise ValueError("no picture")
            place += length
    bits = int.from_bytes(data[2:34], "little")

    def take(count: int) -> int:
        nonlocal bits
        value: int = bits & (2**count - 1)
        bits >>= count
        return value

    def side(*, small: int) -> int:
        return 8 * (take(5) + 1) if small else take((9, 13, 18, 30)[take(2)]) + 1

    if len(data) < 8:
        raise ValueError("no header")
    small = take(1)
    height = side(small=small)
    ratio = take(3)
    across, down = _RATIOS.get(ratio, (0, 1))
    width = height * across // down if ratio else side(small=small)
    has_orientation = not take(1) and take(1)
    return height, width, take(3) + 1 if has_orientation else 1
