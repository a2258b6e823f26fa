"""Read image files: PNG with libpng after a check of its checksums, TIFF with tifffile, JPEG, WebP and BMP with Pillow.

`desra_core.images.further_decoders` reads the other kinds, and `desra_core.images.codec` chooses.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import struct
import warnings
import zlib
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import imagecodecs
import numpy as np
from PIL import Image, UnidentifiedImageError
from tifffile import COMPRESSION, PHOTOMETRIC, TiffFile, TiffPage

from desra_core.errors import ImageError, printable
from desra_core.images import colour

if TYPE_CHECKING:
    from desra_core.images.codec import Pixels

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_END_OF_JPEG = b"\xff\xd9"

_INDICES = frozenset({b"IHDR", b"PLTE", b"IDAT", b"IEND"})  # the chunks that palette indices need
_PICTURE = _INDICES | {b"tRNS"}  # the chunks that colours and alpha need
# Some programs write EXIF into PNG text chunks; XMP is always in one.
EXIF_PREFIX = b"Exif\0\0"
_EXIF_TEXTS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
_TEXTS = frozenset({b"tEXt", b"zTXt", b"iTXt"})
_DOT = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)  # the header of one gray pixel
_EMPTY = 12  # bytes of a chunk without content: length, kind, checksum

_ORIENTATION_TAG = 0x0112
_UNITS = {2: 1.0, 3: 2.54}  # by the number of a unit of resolution: how many of it are an inch
_FORMATS = {"MPO": "JPEG", "WEBP": "WebP"}  # kinds of Pillow with another name here
_NAMED = ("JPEG", "WEBP", "BMP")  # kinds that the error about a damaged file names
_SAVE_AGAIN = "save it again as PNG, or remove it"
SAVE_AGAIN_AS_TIFF = "save it again as PNG or TIFF, or remove it"
# Raised by Pillow for damaged files.
DAMAGE = (OSError, SyntaxError, ValueError, TypeError, OverflowError, RuntimeError)

# `desra_core.images.codec` checks the size of an image, instead of Pillow's fixed limit.
Image.MAX_IMAGE_PIXELS = None

# Raised by tifffile and imagecodecs for damaged files.
_TIFF_DAMAGE = (*DAMAGE, LookupError, ArithmeticError, AttributeError, struct.error)
_REDUCED, _MASK = 1, 4  # bits of a page's subfile type
_MODELS: dict[int, str] = {
    PHOTOMETRIC.MINISWHITE: "gray", PHOTOMETRIC.MINISBLACK: "gray", PHOTOMETRIC.RGB: "RGB",
    PHOTOMETRIC.PALETTE: "palette", PHOTOMETRIC.MASK: "transparency mask", PHOTOMETRIC.SEPARATED: "CMYK",
    PHOTOMETRIC.YCBCR: "YCbCr", PHOTOMETRIC.CIELAB: "LAB", PHOTOMETRIC.ICCLAB: "LAB (ICC)",
    PHOTOMETRIC.ITULAB: "LAB (ITU)", PHOTOMETRIC.CFA: "CFA (the raw data of a camera)", PHOTOMETRIC.LOGL: "LogL",
    PHOTOMETRIC.LOGLUV: "LogLuv", PHOTOMETRIC.LINEAR_RAW: "linear raw (the raw data of a camera)",
}  # fmt: skip
_SAMPLES = {2: "signed integers", 3: "floating point", 5: "complex integers", 6: "complex numbers"}
_BITS = {"gray": (1, 2, 4, 8, 16), "palette": (1, 2, 4, 8), "RGB": (8, 16), "CMYK": (8, 16)}
_FAX = frozenset({COMPRESSION.CCITTRLE, COMPRESSION.CCITTFAX3, COMPRESSION.CCITTFAX4})
_PREDICTED = frozenset({
    COMPRESSION.LZW, COMPRESSION.ADOBE_DEFLATE, COMPRESSION.DEFLATE, COMPRESSION.LZMA, COMPRESSION.ZSTD,
})  # fmt: skip
_COMPRESSIONS = _FAX | _PREDICTED | {COMPRESSION.NONE, COMPRESSION.JPEG, COMPRESSION.PACKBITS}
_MOST_SAMPLES = 16  # per pixel
_MOST_PAGES = 256
_LARGEST_TILE = 2**24  # a tile may have this many pixels, or 4 times as many as its image
_BUFFER = 2**22  # bytes of the file that are read at a time
_OVERRUN = "a strip or tile reaches beyond the end of the file"
_ROWS = 64  # rows that are divided by alpha at a time

# Both log the faults that they work around. The faults that matter are errors here.
for _library in ("tifffile", "imagecodecs"):
    logging.getLogger(_library).setLevel(logging.CRITICAL + 1)


class Metadata(NamedTuple):
    """What a file says about its picture."""

    exif: bytes | None  # a block like a TIFF file
    xmp: bytes | None
    resolution: tuple[float, float] | None  # pixels per inch, horizontal and vertical, as stored


class Samples(NamedTuple):
    """What a file stores of each pixel."""

    bits: int  # of a sample
    colours: str  # ``gray``, ``RGB``, ``palette`` or ``CMYK``
    alpha: bool


# By mode of Pillow, for the modes that are read.
_MODES = {
    "1": Samples(1, "gray", False), "L": Samples(8, "gray", False), "LA": Samples(8, "gray", True),
    "P": Samples(8, "palette", False), "PA": Samples(8, "palette", True), "RGB": Samples(8, "RGB", False),
    "RGBA": Samples(8, "RGB", True), "RGBX": Samples(8, "RGB", False), "I;16": Samples(16, "gray", False),
    "CMYK": Samples(8, "CMYK", False),
}  # fmt: skip


class Picture:
    """The picture of an image file as stored, not turned upright yet; of an animated file the first frame.

    Raises:
        ImageError: The header is damaged, or the picture is of a kind that is not read.
    """

    format: str  # such as JPEG
    size: tuple[int, int]  # ``(H, W)`` as stored
    samples: Samples | None = None  # None where the header does not tell
    orientation: int  # the EXIF orientation, 1..8; other values mean 1
    has_inks = False  # whether the colours are the four inks of CMYK, 0 where there is none
    further_pages = 0  # full pages beside the first
    spread_bits: int | None = None  # the bits of gray samples of less than a byte, which are spread over 0..255

    def __init__(self, data: bytes, path: Path) -> None:
        self._data = data
        self._path = path

    @cached_property
    def profile(self) -> bytes | None:
        """The ICC profile; empty where it cannot be read."""
        return None

    def metadata(self) -> Metadata:
        """Read what the file says about its picture; damaged parts count as absent."""
        return metadata_by_pillow(io.BytesIO(self._data))

    def channels(self, *, indices: bool) -> Pixels:
        """Decode to ``(H, W, C)``, uint8 or uint16, alpha last.

        Args:
            indices: Return the indices of a palette instead of its colours, without alpha.

        Raises:
            ImageError: The file is truncated or damaged.
        """
        raise NotImplementedError

    def _damaged(self, reason: object) -> ImageError:
        return ImageError(self._path, f"is truncated or damaged ({reason})", "copy it again, or remove it")


class PngPicture(Picture):
    """The picture of a PNG file."""

    format = "PNG"

    def __init__(self, data: bytes, path: Path) -> None:
        super().__init__(data, path)
        self._chunks = list(_chunks(data, path))
        if not self._chunks or self._chunks[0][0] != b"IHDR" or len(self._chunks[0][1]) != _EMPTY + 13:
            raise ImageError(path, "has a damaged header", "copy it again, or remove it")
        width, height, bits, colour_type = struct.unpack_from(">IIBB", self._chunks[0][1], 8)
        self.size = height, width
        self.spread_bits = bits if colour_type == 0 and bits < 8 else None
        alpha = colour_type & 4 > 0 or any(kind == b"tRNS" for kind, _ in self._chunks)
        colours = "palette" if colour_type & 1 else "RGB" if colour_type & 2 else "gray"
        self.samples = Samples(bits, colours, alpha)
        profiles = [_inflated_profile(bytes(whole[8:-4])) for kind, whole in self._chunks if kind == b"iCCP"]
        self.profile = profiles[0] if profiles else None
        told = [
            bytes(whole)
            for kind, whole in self._chunks
            if kind in (b"eXIf", b"pHYs") or (kind in _TEXTS and bytes(whole[8:40]).startswith(_EXIF_TEXTS))
        ]
        # Pillow reads the metadata from a PNG of one pixel with only these chunks.
        dot = [png_chunk(b"IHDR", _DOT), *told, png_chunk(b"IDAT", zlib.compress(bytes(2))), png_chunk(b"IEND", b"")]
        self._dot = PNG_SIGNATURE + b"".join(dot)
        self.orientation = _orientation(io.BytesIO(self._dot)) if told else 1

    def metadata(self) -> Metadata:
        """Read the metadata as `Picture` says."""
        return metadata_by_pillow(io.BytesIO(self._dot))

    def channels(self, *, indices: bool) -> Pixels:
        """Decode the picture as `Picture` says."""
        pixels: Pixels
        try:
            if indices:
                with Image.open(io.BytesIO(self._reduced(_INDICES))) as image:
                    pixels = np.asarray(image.convert("L") if image.mode == "1" else image)
            else:
                pixels = imagecodecs.png_decode(self._reduced(_PICTURE))
        except DAMAGE as error:
            raise self._damaged(error if self._chunks[-1][0] == b"IEND" else "it ends before its last row") from None
        return pixels.reshape(*pixels.shape[:2], -1)

    def _reduced(self, kinds: frozenset[bytes]) -> bytes:
        """Return the file with chunks of these kinds only: decoders refuse some text, profile and time chunks."""
        if all(kind in kinds for kind, _ in self._chunks):
            return self._data
        return b"".join([memoryview(PNG_SIGNATURE), *(whole for kind, whole in self._chunks if kind in kinds)])


def _chunks(data: bytes, path: Path) -> Iterator[tuple[bytes, memoryview]]:
    """Yield kind and bytes of the chunks that are complete; raise `ImageError` for a broken checksum."""
    view = memoryview(data)
    start = len(PNG_SIGNATURE)
    while start + _EMPTY <= len(data):
        length, kind = struct.unpack_from(">I4s", data, start)
        end = start + _EMPTY + length
        if end > len(data):
            return
        if zlib.crc32(view[start + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
            name = printable(kind.decode("latin-1"))
            raise ImageError(path, f"has a broken checksum in its chunk {name}", "copy it again, or remove it")
        yield kind, view[start:end]
        if kind == b"IEND":
            return
        start = end


def _inflated_profile(content: bytes) -> bytes:
    """Return the profile of an iCCP chunk: name, zero, method, deflated profile; empty where it is damaged."""
    inflating = zlib.decompressobj()
    try:
        profile = inflating.decompress(content[content.index(b"\0") + 2 :], colour.MOST_BYTES)
    except (ValueError, zlib.error):
        return b""
    return profile if inflating.eof else b""


def png_chunk(kind: bytes, content: bytes) -> bytes:
    """Return the bytes of a chunk of a PNG file."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _orientation(file: io.BytesIO) -> int:
    """Read the EXIF orientation of a file that Pillow opens; 1 where it has none, or damaged EXIF."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(file) as image:
            return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except DAMAGE:
        return 1


def metadata_by_pillow(file: io.BytesIO) -> Metadata:
    """Read the metadata of a file that Pillow opens."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(file) as image:
            xmp, resolution = image.info.get("xmp"), image.info.get("dpi")
            exif = image.info.get("exif")
            if text := image.info.get("Raw profile type exif"):  # of a PNG: name and length, then hexadecimal
                exif = exif or bytes.fromhex("".join(str(text).split("\n")[3:]))
    except DAMAGE:
        return Metadata(None, None, None)
    return Metadata(block_of(exif), xmp if isinstance(xmp, bytes) else None, plausible(resolution))


def metadata_of(exif: bytes | None, xmp: object) -> Metadata:
    """Return the metadata of a file whose resolution is in its EXIF."""
    told = Image.Exif()
    resolution = None
    with warnings.catch_warnings(action="ignore"), contextlib.suppress(SyntaxError, struct.error, *DAMAGE):
        told.load(exif or b"")
        unit = _UNITS.get(told.get(296, 2))
        resolution = unit and (float(told.get(282, 0)) * unit, float(told.get(283, 0)) * unit)
    return Metadata(exif or None, xmp if isinstance(xmp, bytes) else None, plausible(resolution))


def block_of(exif: object) -> bytes | None:
    """Return EXIF without its prefix; None without any."""
    return exif.removeprefix(EXIF_PREFIX) if isinstance(exif, bytes) else None


def plausible(resolution: object) -> tuple[float, float] | None:
    """Return a resolution as two floats; None for one that cannot be meant."""
    with contextlib.suppress(ArithmeticError, TypeError, ValueError):
        across, down = map(float, resolution)  # type: ignore[call-overload]
        if min(across, down) >= 1 and max(across, down) < 2**16:
            return across, down
    return None


class PillowPicture(Picture):
    """The picture of a file that Pillow reads."""

    def __init__(self, data: bytes, path: Path) -> None:
        super().__init__(data, path)
        try:
            with warnings.catch_warnings(action="ignore"):
                self._image = Image.open(io.BytesIO(data))
        except UnidentifiedImageError:
            # The first bytes may be those of a usual kind: then the reader of that kind finds the fault.
            for kind in _NAMED:
                factory, accepts = Image.OPEN[kind]
                if accepts is None or not accepts(data[:16]):
                    continue
                try:
                    with warnings.catch_warnings(action="ignore"):
                        factory(io.BytesIO(data), "")
                except DAMAGE as error:
                    raise ImageError(path, f"is a {kind} file that cannot be read ({error})", _SAVE_AGAIN) from None
            raise ImageError(path, "is not an image", "remove it, or give it the suffix of its kind") from None
        except DAMAGE as error:
            reason = f"is truncated, damaged or of a kind that is not read ({error})"
            raise ImageError(path, reason, _SAVE_AGAIN) from None
        if self._image.mode not in _MODES:
            raise ImageError(path, f"has the colour model {self._image.mode}", "convert it to RGB or gray")
        self.size = self._image.height, self._image.width
        self.format = _FORMATS.get(self._image.format or "", self._image.format or "")
        self.samples = _MODES[self._image.mode]
        if "transparency" in self._image.info:
            self.samples = self.samples._replace(alpha=True)
        self.profile = self._image.info.get("icc_profile")
        self.has_inks = self._image.mode == "CMYK"
        self.orientation = _orientation(io.BytesIO(data))

    def channels(self, *, indices: bool) -> Pixels:
        """Decode the picture as `Picture` says."""
        image: Image.Image = self._image
        try:
            with warnings.catch_warnings(action="ignore"):  # about damaged metadata: intact images have that too
                image.load()
        except DAMAGE as error:
            reason, whole = str(error), None
            if image.format in ("JPEG", "MPO") and not self._data.endswith(_END_OF_JPEG):
                reason, whole = "it stops without an end marker", _whole_without_end(image, self._data)
            if whole is None:
                raise self._damaged(reason) from None
            image = whole
        if image.mode == "1":
            self.spread_bits = 1
            image = image.convert("L")
        elif image.mode in ("P", "PA") and not indices:
            image = image.convert("RGBA" if "transparency" in image.info or image.mode == "PA" else "RGB")
        elif image.mode == "RGBX":
            image = image.convert("RGB")
        pixels: Pixels = np.asarray(image)
        if self.has_inks and image.format == "JPEG" and "adobe" not in image.info:
            pixels = np.invert(pixels)  # only Adobe's files hold the inks inverted, but Pillow inverts them all
        return pixels.reshape(*pixels.shape[:2], -1)


def _whole_without_end(opened: Image.Image, data: bytes) -> Image.Image | None:
    """Return the picture of a JPEG that lacks only its end marker, and None if more is missing.

    Nothing else is missing if the pixels stay the same whatever bytes are appended. This test is right only for a
    single scan without restart markers.
    """
    start = data.rfind(b"\xff\xda")
    layers = len(opened.getbands())
    one_scan = not opened.info.get("progressive") and data[start + 4 : start + 5] == bytes([layers])
    if not one_scan or b"\xff\xdd\0\4" in data:
        return None
    images = []
    for instead in (b"", b"\x55" * 64, b"\xaa" * 64):
        try:
            with warnings.catch_warnings(action="ignore"):
                images.append(Image.open(io.BytesIO(data.rstrip(b"\xff") + instead + _END_OF_JPEG), formats=["JPEG"]))
                images[-1].load()
        except DAMAGE:
            return None
    return images[0] if images[0] == images[1] == images[2] else None


class TiffPicture(Picture):
    """The first full picture of a TIFF file; where its header alone is wanted, ``file`` is read instead of the data."""

    format = "TIFF"

    def __init__(self, data: bytes, path: Path, file: BinaryIO | None = None) -> None:
        super().__init__(data, path)
        try:
            with np.errstate(all="ignore"):  # damaged files may claim too many samples
                self._page, *further = _full_pages(TiffFile(file or io.BytesIO(data)))
            page = self._page
            self.further_pages = len(further)
            self.size = int(page.imagelength), int(page.imagewidth)
            orientation = page.tags.valueof(274)
            self.orientation = orientation if isinstance(orientation, int) else 1
            profile = page.tags.valueof(34675)
            self.profile = None if profile is None else profile if isinstance(profile, bytes) else b""
            if page.compression not in _PREDICTED:
                page.predictor = 1  # the other compressions ignore the tag
            jpeg_rgb = page.compression == COMPRESSION.JPEG and page.planarconfig == 1  # JPEG's decoder converts YCbCr
            self._model = _MODELS.get(page.photometric, f"number {int(page.photometric)}")
            if page.photometric == PHOTOMETRIC.YCBCR and jpeg_rgb:
                self._model = "RGB"
            self.has_inks = self._model == "CMYK"
            self._colour_count = {"RGB": 3, "CMYK": 4}.get(self._model, 1)
            self._alpha, self._multiplied = self._find_alpha()
            refusal = self._refusal()
        except _TIFF_DAMAGE as error:
            reason = f"has a damaged header ({error or 'no end of it'})"
            raise ImageError(path, reason, "save it again as PNG, or remove it") from None
        if refusal:
            raise ImageError(path, *refusal)
        self.samples = Samples(page.bitspersample, self._model, self._alpha is not None)

    def metadata(self) -> Metadata:
        """Read the metadata as `Picture` says: the tags of the first page are laid out as EXIF is."""
        tags = self._page.tags
        xmp, unit = tags.valueof(700), _UNITS.get(tags.valueof(296, 2))
        resolution = None
        with contextlib.suppress(ArithmeticError, LookupError, TypeError):
            resolution = [tags.valueof(tag)[0] / tags.valueof(tag)[1] * unit for tag in (282, 283)]
        return Metadata(self._data, xmp if isinstance(xmp, bytes) else None, plausible(resolution))

    def channels(self, *, indices: bool) -> Pixels:
        """Decode the picture as `Picture` says."""
        page = self._page
        overruns = False
        try:
            with np.errstate(all="ignore"):  # damaged files may claim tiles of no size
                overruns = self._check_segments()
                # tifffile's axes: planes, depth, rows, columns, samples.
                stored = page.asarray(squeeze=False, maxworkers=1, buffersize=_BUFFER)[:, 0]
            samples: Pixels = np.moveaxis(stored[..., 0], 0, 2) if page.planarconfig == 2 else stored[0]
            if self._alpha is None or indices:
                return self._colours(samples, indices=indices)
            if self._model in ("RGB", "CMYK") and self._alpha == self._colour_count:
                pixels = samples[:, :, : self._alpha + 1]
            else:
                alpha = _full_range(samples[:, :, self._alpha, np.newaxis], page.bitspersample)
                pixels = np.concatenate([self._colours(samples, indices=False), alpha], axis=2)
            if self._multiplied:
                _divide_by_alpha(pixels)
            return pixels
        except _TIFF_DAMAGE as error:
            raise self._damaged(_OVERRUN if overruns else error) from None

    def _find_alpha(self) -> tuple[int | None, bool]:
        """Return the index of the alpha sample, None without alpha, and whether colours are multiplied by alpha.

        The header gives the kind of each sample beyond the colours: 1 is alpha by which colours are multiplied, 2 is
        other alpha, 0 is anything else. Older programs give no kinds: in their files, a single such sample is alpha.
        """
        page = self._page
        kinds = [int(kind) for kind in np.atleast_1d(page.extrasamples)]
        further = page.samplesperpixel - self._colour_count
        if further == 1 and not kinds:
            return self._colour_count, False
        alphas = [(index, kind == 1) for index, kind in enumerate(kinds[:further], self._colour_count) if kind]
        return alphas[0] if alphas else (None, False)

    def _refusal(self) -> tuple[str, str] | None:
        """Return why a picture of this kind is not read, and what to do; None where it is read."""
        page, model = self._page, self._model
        kind, bits, compression = page.sampleformat, page.bitspersample, page.compression
        if 0 in self.size:
            raise ValueError(f"a picture of {self.size[1]}x{self.size[0]} pixels")
        if page.imagedepth != 1:
            return f"is a volume of {page.imagedepth} slices", "save each slice as a file"
        # Gray of other samples is called as Pillow calls it: F for floats, I for integers of 32 bits.
        if kind not in (1, 4):
            name = {("gray", 3): "F", ("gray", 2): "I"}.get((model, kind), model)
            samples = f"{bits}-bit {_SAMPLES.get(kind, f'samples of format {kind}')}"
            return f"has the colour model {name} ({samples})", "convert it to 8 or 16 bits without sign"
        if model not in _BITS:
            return f"has the colour model {model}", "convert it to RGB or gray"
        if bits not in _BITS[model]:
            name = "I" if bits == 32 and model == "gray" else model
            return f"has the colour model {name} of {bits} bits per sample", "convert it to 8 or 16 bits"
        if compression not in _COMPRESSIONS:
            name = getattr(compression, "name", str(compression))
            return f"is compressed by the method {name}", "save it again with LZW or deflate"
        remedy = "save it again as RGB or gray, with or without alpha"
        if model == "CMYK" and (compression == COMPRESSION.JPEG or page.tags.valueof(332, 1) != 1):
            return "has the colour model CMYK in JPEG, or of other inks", "convert it to RGB"
        most = _MOST_SAMPLES if model in ("RGB", "CMYK") else 2
        if compression == COMPRESSION.JPEG or compression in _FAX:
            most = self._colour_count
        if not self._colour_count <= page.samplesperpixel <= most:
            return f"has {page.samplesperpixel} samples per pixel, which do not fit the colour model {model}", remedy
        if self._multiplied and page.photometric not in (PHOTOMETRIC.RGB, PHOTOMETRIC.MINISBLACK):
            return f"has the colour model {PHOTOMETRIC(page.photometric).name}, multiplied by alpha", remedy
        return None

    def _check_segments(self) -> bool:
        """Check that every strip or tile begins in the file, because tifffile reads absent ones as black.

        Returns True where the header claims a strip or tile that reaches beyond the end of the file. Some programs
        write such headers into whole files; where data is missing, every decoder but that of fax fails by itself.
        """
        page = self._page
        wanted = math.prod(page.chunked)
        parts = list(zip(page.dataoffsets, page.databytecounts, strict=False))[:wanted]
        here = sum(0 < offset < len(self._data) and count > 0 for offset, count in parts)
        if here < wanted:
            raise ValueError(f"strips or tiles that are missing: {wanted - here} of {wanted}")
        overruns = any(offset + count > len(self._data) for offset, count in parts)
        if overruns and page.compression in _FAX:
            raise ValueError(_OVERRUN)
        width, height = (page.tilewidth, page.tilelength) if page.is_tiled else (page.imagewidth, page.rowsperstrip)
        if page.is_tiled and width * height > max(_LARGEST_TILE, 4 * self.size[0] * self.size[1]):
            raise ValueError(f"tiles of {width}x{height} pixels")
        # Each JPEG must be whole and have no more pixels than the header says; check this before decoding.
        for offset, count in parts if page.compression == COMPRESSION.JPEG else ():
            part = self._data[offset : offset + count]
            if not part.rstrip(b"\0").endswith(_END_OF_JPEG):
                raise ValueError("a strip or tile stops without an end marker")
            with Image.open(io.BytesIO(part)) as image:
                if image.width > width or image.height > max(height, 8):  # blocks of a JPEG are 8 pixels high
                    raise ValueError(f"a part of {width}x{height} pixels holds {image.width}x{image.height}")
        return overruns

    def _colours(self, samples: Pixels, *, indices: bool) -> Pixels:
        page = self._page
        if self._model in ("RGB", "CMYK"):
            return samples[:, :, : self._colour_count]
        gray = samples[:, :, :1]
        if self._model == "palette":
            gray = gray.astype(np.uint8, copy=False)
            stored = np.asarray(page.colormap).T
            if stored.shape != (2**page.bitspersample, 3):
                raise ValueError("a palette that lacks colours")
            if stored.max() > 255:  # TIFF's colours have 16 bits, but some programs write 8
                stored = stored >> 8
            return gray if indices else stored.astype(np.uint8)[gray[:, :, 0]]
        self.spread_bits = page.bitspersample if page.bitspersample < 8 else None
        gray = _full_range(gray, page.bitspersample)
        return np.invert(gray) if page.photometric == PHOTOMETRIC.MINISWHITE else gray


def stored_tiff_size(file: BinaryIO) -> tuple[int, int]:
    """Return ``(H, W)`` of the picture as stored (raises as tifffile does for damaged files)."""
    with np.errstate(all="ignore"):
        page = _full_pages(TiffFile(file))[0]
    return int(page.imagelength), int(page.imagewidth)


def _full_pages(file: TiffFile) -> list[TiffPage]:
    """Return the pages with full pictures, without masks; where there are none, the first picture of reduced size.

    Some cameras store the full picture below the page of a small one. Only the first 256 pages are looked at, because
    a damaged file can name pages without end.
    """
    found: list[TiffPage] = []
    for page in islice(file.pages, _MOST_PAGES):
        assert isinstance(page, TiffPage)
        found.append(page)
        if page.subifds and int(page.subfiletype) & _REDUCED and page.pages is not None:
            found += (below for below in islice(page.pages, _MOST_PAGES) if isinstance(below, TiffPage))
        if len(found) >= _MOST_PAGES:
            break
    pages = [page for page in found if not (int(page.subfiletype) & _MASK or page.photometric == PHOTOMETRIC.MASK)]
    full = [page for page in pages if not int(page.subfiletype) & _REDUCED]
    if not pages:
        raise ValueError("no picture in it")
    if not full and len(found) >= _MOST_PAGES:
        raise ValueError(f"no full picture among its first {_MOST_PAGES} pages")
    return full or pages[:1]


def _full_range(samples: Pixels, bits: int) -> Pixels:
    """Spread samples of 1, 2 or 4 bits over the range of 8 bits."""
    return samples if bits >= 8 else samples.astype(np.uint8) * np.uint8(255 // (2**bits - 1))


def _divide_by_alpha(pixels: Pixels) -> None:
    """Divide the colours of pixels by their alpha, in place; round down as Pillow does."""
    most = np.iinfo(pixels.dtype).max
    for top in range(0, len(pixels), _ROWS):
        rows = pixels[top : top + _ROWS]
        alpha = rows[:, :, -1:].astype(np.uint32)
        colours = rows[:, :, :-1].astype(np.uint32)
        divided = np.minimum(colours * np.uint32(most) // np.maximum(alpha, 1), most)
        rows[:, :, :-1] = np.where(alpha > 0, divided, colours)
