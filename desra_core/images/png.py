"""Read PNG files with libpng, once the checksums of their chunks have been checked.

Only `desra_core.images.codec` uses this.
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
from PIL import Image

from desra_core.errors import ImageError, printable

if TYPE_CHECKING:
    from desra_core.images.codec import Pixels

SIGNATURE = b"\x89PNG\r\n\x1a\n"

_INDICES = frozenset({b"IHDR", b"PLTE", b"IDAT", b"IEND"})
_PICTURE = _INDICES | {b"tRNS"}
# Programs write EXIF into texts of these names.
_EXIF_TEXTS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
_TEXTS = frozenset({b"tEXt", b"zTXt", b"iTXt"})
_DOT = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)  # the header of one gray pixel
_EMPTY = 12  # bytes of a chunk without content: length, kind, checksum


class PngPicture:
    """The picture of a PNG file, the first one of an animated file, not turned yet.

    Raises:
        ImageError: The header is damaged, or a checksum is broken.
    """

    def __init__(self, data: bytes, path: Path) -> None:
        self._data = data
        self._path = path
        self._chunks = list(_chunks(data, path))
        if not self._chunks or self._chunks[0][0] != b"IHDR" or len(self._chunks[0][1]) != _EMPTY + 13:
            raise ImageError(path, "has a damaged header", "copy it again, or remove it")
        width, height = struct.unpack_from(">II", self._chunks[0][1], 8)
        self.size = height, width
        self.has_icc_profile = any(kind == b"iCCP" for kind, _ in self._chunks)
        self.further_pages = 0
        self.orientation = _orientation(self._chunks)

    def channels(self, *, indices: bool) -> Pixels:
        """Decode to ``(H, W, C)``, uint8 or uint16, with transparency as alpha, or palettes as indices without it.

        Raises:
            ImageError: The file is truncated or damaged.
        """
        pixels: Pixels
        try:
            if indices:
                with Image.open(io.BytesIO(self._reduced(_INDICES))) as image:
                    pixels = np.asarray(image.convert("L") if image.mode == "1" else image)
            else:
                pixels = imagecodecs.png_decode(self._reduced(_PICTURE))
        except (ValueError, RuntimeError, OSError, SyntaxError) as error:
            cause = error if self._chunks[-1][0] == b"IEND" else "it ends before its last row"
            reason = f"is truncated or damaged ({cause})"
            raise ImageError(self._path, reason, "copy it again, or remove it") from None
        return pixels.reshape(*pixels.shape[:2], -1)

    def _reduced(self, kinds: frozenset[bytes]) -> bytes:
        """Return the file with chunks of these kinds only: decoders refuse some texts, profiles and times."""
        if all(kind in kinds for kind, _ in self._chunks):
            return self._data
        return b"".join([memoryview(SIGNATURE), *(whole for kind, whole in self._chunks if kind in kinds)])


def _chunks(data: bytes, path: Path) -> Iterator[tuple[bytes, memoryview]]:
    """Yield kind and bytes of the chunks that are complete; raise `ImageError` for a broken checksum."""
    view = memoryview(data)
    start = len(SIGNATURE)
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


def _orientation(chunks: list[tuple[bytes, memoryview]]) -> int:
    """Return the EXIF orientation as Pillow reads it, from a file of the chunks with EXIF and a single pixel."""
    found = [
        bytes(whole)
        for kind, whole in chunks
        if kind == b"eXIf" or (kind in _TEXTS and bytes(whole[8:40]).startswith(_EXIF_TEXTS))
    ]
    if not found:
        return 1
    dot = [_chunk(b"IHDR", _DOT), *found, _chunk(b"IDAT", zlib.compress(bytes(2))), _chunk(b"IEND", b"")]
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(SIGNATURE + b"".join(dot))) as image:
            return int(image.getexif().get(0x0112, 1))
    except (OSError, SyntaxError, ValueError, TypeError):
        return 1
