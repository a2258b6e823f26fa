"""Read image files: PNG with libpng after a check of its checksums, every other kind but TIFF with Pillow.

Only `desra_core.images.codec` and `desra_core.images.tiff` use this.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import imagecodecs
import numpy as np
from PIL import Image, UnidentifiedImageError

from desra_core.errors import ImageError, printable

if TYPE_CHECKING:
    from desra_core.images.codec import Pixels

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
END_OF_JPEG = b"\xff\xd9"

_INDICES = frozenset({b"IHDR", b"PLTE", b"IDAT", b"IEND"})
_PICTURE = _INDICES | {b"tRNS"}
# Some programs write EXIF into PNG text chunks of these names.
_EXIF_TEXTS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
_TEXTS = frozenset({b"tEXt", b"zTXt", b"iTXt"})
_DOT = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)  # the header of one gray pixel
_EMPTY = 12  # bytes of a chunk without content: length, kind, checksum

_ORIENTATION_TAG = 0x0112
_READ_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "I;16"})
_NAMED = ("JPEG", "WEBP", "BMP")
_SAVE_AGAIN = "save it again as PNG, or remove it"
# Raised by Pillow for damaged files.
_DAMAGE = (OSError, SyntaxError, ValueError, TypeError, OverflowError)

# `desra_core.images.codec` checks the size of an image, instead of Pillow's fixed limit.
Image.MAX_IMAGE_PIXELS = None


class Picture:
    """The picture of an image file as stored, not turned upright yet; of an animated file the first frame.

    Attributes:
        size: ``(H, W)`` as stored.
        orientation: The EXIF orientation, 1..8; other values mean 1.
        has_icc_profile: Whether the file has a colour profile.
        further_pages: The number of full pages beside the first.

    Raises:
        ImageError: The header is damaged, or the picture is of a kind that is not read.
    """

    size: tuple[int, int]
    orientation: int
    has_icc_profile: bool
    further_pages = 0

    def __init__(self, data: bytes, path: Path) -> None:
        self._data = data
        self._path = path

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

    def __init__(self, data: bytes, path: Path) -> None:
        super().__init__(data, path)
        self._chunks = list(_chunks(data, path))
        if not self._chunks or self._chunks[0][0] != b"IHDR" or len(self._chunks[0][1]) != _EMPTY + 13:
            raise ImageError(path, "has a damaged header", "copy it again, or remove it")
        width, height = struct.unpack_from(">II", self._chunks[0][1], 8)
        self.size = height, width
        self.has_icc_profile = any(kind == b"iCCP" for kind, _ in self._chunks)
        self.orientation = _png_orientation(self._chunks)

    def channels(self, *, indices: bool) -> Pixels:
        """Decode the picture as `Picture` says."""
        pixels: Pixels
        try:
            if indices:
                with Image.open(io.BytesIO(self._reduced(_INDICES))) as image:
                    pixels = np.asarray(image.convert("L") if image.mode == "1" else image)
            else:
                pixels = imagecodecs.png_decode(self._reduced(_PICTURE))
        except (RuntimeError, *_DAMAGE) as error:
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


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _png_orientation(chunks: list[tuple[bytes, memoryview]]) -> int:
    """Let Pillow read the EXIF orientation, from a PNG of one pixel that holds only the chunks with EXIF."""
    found = [
        bytes(whole)
        for kind, whole in chunks
        if kind == b"eXIf" or (kind in _TEXTS and bytes(whole[8:40]).startswith(_EXIF_TEXTS))
    ]
    if not found:
        return 1
    dot = [_chunk(b"IHDR", _DOT), *found, _chunk(b"IDAT", zlib.compress(bytes(2))), _chunk(b"IEND", b"")]
    return _orientation(io.BytesIO(PNG_SIGNATURE + b"".join(dot)))


def _orientation(file: io.BytesIO) -> int:
    """Read the EXIF orientation of a file that Pillow opens; 1 where it has none, or damaged EXIF."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(file) as image:
            return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except _DAMAGE:
        return 1


class PillowPicture(Picture):
    """The picture of a file that Pillow reads."""

    def __init__(self, data: bytes, path: Path) -> None:
        super().__init__(data, path)
        self._image = _identified(data, path)
        if self._image.mode not in _READ_MODES:
            raise ImageError(path, f"has the colour model {self._image.mode}", "convert it to RGB or gray")
        self.size = self._image.height, self._image.width
        self.has_icc_profile = "icc_profile" in self._image.info
        self.orientation = _orientation(io.BytesIO(data))

    def channels(self, *, indices: bool) -> Pixels:
        """Decode the picture as `Picture` says."""
        image = self._image
        try:
            with warnings.catch_warnings(action="ignore"):  # about damaged metadata: intact images have that too
                image.load()
        except _DAMAGE as error:
            reason, whole = str(error), None
            if image.format in ("JPEG", "MPO") and not self._data.endswith(END_OF_JPEG):
                reason, whole = "it stops without an end marker", _whole_without_end(image, self._data)
            if whole is None:
                raise self._damaged(reason) from None
            image = whole
        if image.mode == "1":
            image = image.convert("L")
        elif image.mode in ("P", "PA") and not indices:
            image = image.convert("RGBA" if "transparency" in image.info or image.mode == "PA" else "RGB")
        elif image.mode == "RGBX":
            image = image.convert("RGB")
        pixels: Pixels = np.asarray(image)
        return pixels.reshape(*pixels.shape[:2], -1)


def _identified(data: bytes, path: Path) -> Image.Image:
    try:
        with warnings.catch_warnings(action="ignore"):
            return Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        pass
    except _DAMAGE as error:
        raise ImageError(path, f"is truncated, damaged or of a kind that is not read ({error})", _SAVE_AGAIN) from None
    # The first bytes may be those of a usual kind: then the reader of that kind finds the fault.
    for kind in _NAMED:
        factory, accepts = Image.OPEN[kind]
        if accepts is not None and accepts(data[:16]):
            try:
                with warnings.catch_warnings(action="ignore"):
                    factory(io.BytesIO(data), "")
            except _DAMAGE as error:
                raise ImageError(path, f"is a {kind} file that cannot be read ({error})", _SAVE_AGAIN) from None
    raise ImageError(path, "is not an image", "remove it, or give it the suffix of its kind")


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
        with warnings.catch_warnings(action="ignore"):
            images.append(Image.open(io.BytesIO(data.rstrip(b"\xff") + instead + END_OF_JPEG), formats=["JPEG"]))
            images[-1].load()
    return images[0] if images[0] == images[1] == images[2] else None
