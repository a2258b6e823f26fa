"""Read TIFF files with tifffile: the first full picture of a file.

Only `desra_core.images.codec` uses this.
"""

from __future__ import annotations

import io
import logging
import math
import struct
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import Image
from tifffile import COMPRESSION, PHOTOMETRIC, TiffFile, TiffPage

from desra_core.errors import ImageError
from desra_core.images.decoders import END_OF_JPEG, Picture

if TYPE_CHECKING:
    from desra_core.images.codec import Pixels

SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

# Raised by tifffile and imagecodecs for damaged files.
_DAMAGE = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError, OSError, struct.error)
_REDUCED, _MASK = 1, 4
_MODELS = {
    PHOTOMETRIC.MINISWHITE: "gray", PHOTOMETRIC.MINISBLACK: "gray", PHOTOMETRIC.RGB: "RGB",
    PHOTOMETRIC.PALETTE: "palette", PHOTOMETRIC.MASK: "transparency mask", PHOTOMETRIC.SEPARATED: "CMYK",
    PHOTOMETRIC.YCBCR: "YCbCr", PHOTOMETRIC.CIELAB: "LAB", PHOTOMETRIC.ICCLAB: "LAB (ICC)",
    PHOTOMETRIC.ITULAB: "LAB (ITU)", PHOTOMETRIC.CFA: "CFA (the raw data of a camera)", PHOTOMETRIC.LOGL: "LogL",
    PHOTOMETRIC.LOGLUV: "LogLuv", PHOTOMETRIC.LINEAR_RAW: "linear raw (the raw data of a camera)",
}  # fmt: skip
_SAMPLES = {2: "signed integers", 3: "floating point", 5: "complex integers", 6: "complex numbers"}
_BITS = {"gray": (1, 2, 4, 8, 16), "palette": (1, 2, 4, 8), "RGB": (8, 16)}
_FAX = frozenset({COMPRESSION.CCITTRLE, COMPRESSION.CCITTFAX3, COMPRESSION.CCITTFAX4})
_COMPRESSIONS = _FAX | {
    COMPRESSION.NONE, COMPRESSION.LZW, COMPRESSION.JPEG, COMPRESSION.ADOBE_DEFLATE, COMPRESSION.DEFLATE,
    COMPRESSION.PACKBITS, COMPRESSION.LZMA, COMPRESSION.ZSTD,
}  # fmt: skip
_PREDICTED = frozenset({
    COMPRESSION.LZW, COMPRESSION.ADOBE_DEFLATE, COMPRESSION.DEFLATE, COMPRESSION.LZMA, COMPRESSION.ZSTD,
})  # fmt: skip
_MOST_SAMPLES = 16
_MOST_PAGES = 256
_LARGEST_TILE = 2**24  # a tile may have so many pixels, or 4 times those of its image
_BUFFER = 2**22  # bytes of the file that are read at a time
_OVERRUN = "a strip or tile reaches beyond the end of the file"
_ROWS = 64  # rows that are divided by alpha at a time

# tifffile logs the faults that it works around. Those that matter are errors here.
logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)


class TiffPicture(Picture):
    """The first full picture of a TIFF file."""

    def __init__(self, data: bytes, path: Path) -> None:
        super().__init__(data, path)
        try:
            with np.errstate(over="ignore"):  # of samples per pixel, in damaged files
                self._page, *further = _full_pages(TiffFile(io.BytesIO(data)))
            self.further_pages = len(further)
            self.size = int(self._page.imagelength), int(self._page.imagewidth)
            orientation = self._page.tags.valueof(274)
            self.orientation = orientation if isinstance(orientation, int) else 1
            self.has_icc_profile = 34675 in self._page.tags
            if self._page.compression not in _PREDICTED:
                self._page.predictor = 1  # the other compressions ignore the tag
            unread = self._unread()
        except _DAMAGE as error:
            reason = f"has a damaged header ({error or 'no end of it'})"
            raise ImageError(path, reason, "save it again as PNG, or remove it") from None
        if unread:
            raise ImageError(path, *unread)

    def channels(self, *, indices: bool) -> Pixels:
        """Decode the picture as `Picture` says."""
        page = self._page
        overruns = False
        try:
            overruns = self._check_segments()
            stored = page.asarray(squeeze=False, maxworkers=1, buffersize=_BUFFER)[:, 0]
            samples: Pixels = np.moveaxis(stored[..., 0], 0, 2) if page.planarconfig == 2 else stored[0]
            alpha = self._alpha()
            if alpha is None or indices:
                return self._colours(samples, indices=indices)
            index, associated = alpha
            whole = samples[:, :, :4]
            if self._model != "RGB" or index != 3:
                stored_alpha = _full_range(samples[:, :, index : index + 1], page.bitspersample)
                whole = np.concatenate([self._colours(samples, indices=False), stored_alpha], axis=2)
            if associated:
                _divide_by_alpha(whole)
            return whole
        except _DAMAGE as error:
            raise self._damaged(_OVERRUN if overruns else error) from None

    @property
    def _model(self) -> str:
        page, photometric = self._page, self._page.photometric
        if photometric == PHOTOMETRIC.YCBCR and page.compression == COMPRESSION.JPEG and page.planarconfig == 1:
            return "RGB"  # JPEG's decoder converts it
        return _MODELS.get(PHOTOMETRIC(photometric), "") if photometric in _MODELS else f"number {int(photometric)}"

    def _unread(self) -> tuple[str, str] | None:
        """Return why a picture of this kind is not read, and what to do; None where it is read."""
        page, model = self._page, self._model
        kind, bits = page.sampleformat, page.bitspersample
        colours = 3 if model == "RGB" else 1
        most = _MOST_SAMPLES if model == "RGB" else 2
        if page.compression == COMPRESSION.JPEG or page.compression in _FAX:
            most = colours
        if 0 in self.size:
            raise ValueError(f"a picture of {self.size[1]}x{self.size[0]} pixels")
        if page.imagedepth != 1:
            return f"is a volume of {page.imagedepth} slices", "save each slice as a file"
        if kind not in (1, 4):
            short = {("gray", 3): "F", ("gray", 2): "I"}.get((model, kind), model)
            samples = f"{bits}-bit {_SAMPLES.get(kind, f'samples of format {kind}')}"
            return f"has the colour model {short} ({samples})", "convert it to 8 or 16 bits without sign"
        if model not in _BITS:
            return f"has the colour model {model}", "convert it to RGB or gray"
        if bits not in _BITS[model]:
            short = "I" if bits == 32 and model == "gray" else model
            return f"has the colour model {short} of {bits} bits per sample", "convert it to 8 or 16 bits"
        if page.compression not in _COMPRESSIONS:
            name = getattr(page.compression, "name", str(page.compression))
            return f"is compressed by the method {name}", "save it again with LZW or deflate"
        remedy = "save it again as RGB or gray, with or without alpha"
        if not colours <= page.samplesperpixel <= most:
            return f"has {page.samplesperpixel} samples per pixel, which do not fit the colour model {model}", remedy
        if (self._alpha() or (0, False))[1] and page.photometric not in (PHOTOMETRIC.RGB, PHOTOMETRIC.MINISBLACK):
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
        pixels = self.size[0] * self.size[1]
        if page.is_tiled and page.tilewidth * page.tilelength > max(_LARGEST_TILE, 4 * pixels):
            raise ValueError(f"tiles of {page.tilewidth}x{page.tilelength} pixels")
        if page.compression == COMPRESSION.JPEG:
            self._check_jpegs(parts)
        return overruns

    def _check_jpegs(self, parts: Iterable[tuple[int, int]]) -> None:
        """Check, before decoding, that each strip or tile is whole and has no more pixels than the header says."""
        page = self._page
        width, height = (page.tilewidth, page.tilelength) if page.is_tiled else (page.imagewidth, page.rowsperstrip)
        for offset, count in parts:
            part = self._data[offset : offset + count]
            if not part.rstrip(b"\0").endswith(END_OF_JPEG):
                raise ValueError("a strip or tile stops without an end marker")
            with Image.open(io.BytesIO(part)) as image:
                if image.width > width or image.height > max(height, 8):
                    raise ValueError(f"a part of {width}x{height} pixels holds {image.width}x{image.height}")

    def _colours(self, samples: Pixels, *, indices: bool) -> Pixels:
        page = self._page
        if self._model == "RGB":
            return samples[:, :, :3]
        gray = samples[:, :, :1]
        if self._model == "palette":
            gray = gray.astype(np.uint8, copy=False)
            stored = np.asarray(page.colormap).T
            if stored.max() > 255:  # 16 bits; some programs write 8
                stored = stored >> 8
            return gray if indices else stored.astype(np.uint8)[gray[:, :, 0]]
        gray = _full_range(gray, page.bitspersample)
        return np.invert(gray) if page.photometric == PHOTOMETRIC.MINISWHITE else gray

    def _alpha(self) -> tuple[int, bool] | None:
        """Return the index of the alpha sample, and whether colours are multiplied by alpha; None without alpha.

        Older programs state no meaning of extra samples: in their files, a single extra sample is alpha.
        """
        page = self._page
        colours = 3 if self._model == "RGB" else 1
        kinds = [int(kind) for kind in np.atleast_1d(page.extrasamples)]
        if page.samplesperpixel == colours + 1 and not kinds:
            kinds = [2]
        for index, kind in enumerate(kinds[: page.samplesperpixel - colours], colours):
            if kind:
                return index, kind == 1
        return None


def stored_size(file: BinaryIO) -> tuple[int, int]:
    """Return ``(H, W)`` of the picture as stored (raises as tifffile does for damaged files)."""
    page = _full_pages(TiffFile(file))[0]
    return int(page.imagelength), int(page.imagewidth)


def _full_pages(file: TiffFile) -> list[TiffPage]:
    """Return the pages with full pictures, without masks; where there are none, the first picture of reduced size.

    Only the first 256 pages are looked at, because a damaged file can name pages without end.
    """
    found = list(islice(_pages(file), _MOST_PAGES))
    pages = [page for page in found if not (int(page.subfiletype) & _MASK or page.photometric == PHOTOMETRIC.MASK)]
    full = [page for page in pages if not int(page.subfiletype) & _REDUCED]
    if not pages:
        raise ValueError("no picture in it")
    if not full and len(found) == _MOST_PAGES:
        raise ValueError(f"no full picture among its first {_MOST_PAGES} pages")
    return full or pages[:1]


def _pages(file: TiffFile) -> Iterator[TiffPage]:
    """Yield all pages; some cameras store the full picture below the page of a small one."""
    for page in file.pages:
        assert isinstance(page, TiffPage)
        yield page
        if page.subifds and int(page.subfiletype) & _REDUCED and page.pages is not None:
            for below in page.pages:
                assert isinstance(below, TiffPage)
                yield below


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
