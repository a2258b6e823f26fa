"""Writers of picture files that know nothing of the readers: every kind that the formats allow, from known samples."""

from __future__ import annotations

import lzma
import struct
import zlib
from collections.abc import Iterator
from itertools import groupby

import imagecodecs
import numpy as np

Samples = np.ndarray
PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}


def packed(samples: Samples, bits: int, order: str = ">") -> bytes:
    """Rows of ``(H, W, S)`` samples, each row filled up to whole bytes."""
    if bits >= 8:
        return samples.astype(f"{order}{samples.dtype.kind}{bits // 8}").tobytes()
    rows = samples.reshape(len(samples), -1).astype(np.uint8)
    spread = np.unpackbits(rows[:, :, np.newaxis], axis=2)[:, :, 8 - bits :]
    return np.packbits(spread.reshape(len(rows), -1), axis=1).tobytes()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_file(samples: Samples, colour: int, bits: int, *before: bytes, after: bytes = b"") -> bytes:
    """A PNG of ``(H, W, S)`` samples, unfiltered, with chunks before and after its data."""
    height, width, _ = samples.shape
    rows = b"".join(b"\0" + packed(row[np.newaxis], bits) for row in samples)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    body = header + b"".join(before) + chunk(b"IDAT", zlib.compress(rows)) + after
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def tiff_file(*pages: Page, order: str = "<", big: bool = False) -> bytes:
    """A TIFF of some pages."""
    magic = {"<": b"II", ">": b"MM"}[order]
    data = bytearray(magic + struct.pack(f"{order}HHHQ" if big else f"{order}HI", *([43, 8, 0] if big else [42]), 0))
    link = len(data) - (8 if big else 4)
    for page in pages:
        place, link_at = page.append_to(data, order, big)
        data[link : link + (8 if big else 4)] = struct.pack(f"{order}{'Q' if big else 'I'}", place)
        link = link_at
    return bytes(data)


class Page:
    """A page of a TIFF: ``(H, W, S)`` samples and how they are to be stored."""

    def __init__(
        self,
        samples: Samples,
        photometric: int,
        bits: int,
        *,
        planar: int = 1,
        tile: int = 0,
        rows: int = 5,
        compression: int = 1,
        predictor: int = 1,
        fillorder: int = 1,
        **tags: int | tuple[int, ...],
    ) -> None:
        self.samples = samples
        self.bits = bits
        self.planar, self.tile, self.rows = planar, tile, rows
        self.compression, self.predictor, self.fillorder = compression, predictor, fillorder
        height, width, depth = samples.shape
        self.tags: dict[int, tuple[int, ...]] = {
            256: (width,), 257: (height,), 258: (bits,) * depth, 259: (compression,), 262: (photometric,),
            266: (fillorder,), 277: (depth,), 284: (planar,), 317: (predictor,),
        }  # fmt: skip
        self.tags |= {322: (tile,), 323: (tile,)} if tile else {278: (rows,)}
        if samples.dtype.kind in "if":
            self.tags[339] = ({"i": 2, "f": 3}[samples.dtype.kind],) * depth
        names = {"extra": 338, "orientation": 274, "colormap": 320, "subfile": 254, "sampleformat": 339}
        for name, value in tags.items():
            self.tags[names[name]] = value if isinstance(value, tuple) else (value,)

    def append_to(self, data: bytearray, order: str, big: bool) -> tuple[int, int]:
        """Append to a file; where the directory begins, and where the next one is to be named."""
        parts = [self._encoded(part, order) for part in self._parts()]
        offsets = []
        for part in parts:
            offsets.append(len(data))
            data += part + bytes(len(part) % 2)
        names = (324, 325) if self.tile else (273, 279)
        tags = self.tags | {names[0]: tuple(offsets), names[1]: tuple(map(len, parts))}
        room, count = ("Q", "Q") if big else ("I", "H")
        size = struct.calcsize(f"={room}")
        entries = b""
        for tag, values in sorted(tags.items()):
            kind = 4 if tag in names or tag in (256, 257) else 3
            content = struct.pack(f"{order}{len(values)}{'I' if kind == 4 else 'H'}", *values)
            if len(content) > size:
                place = len(data)
                data += content + bytes(len(content) % 2)
                content = struct.pack(f"{order}{room}", place)
            entries += struct.pack(f"{order}HH{room}", tag, kind, len(values)) + content.ljust(size, b"\0")
        place = len(data)
        data += struct.pack(f"{order}{count}", len(tags)) + entries + bytes(size)
        return place, len(data) - size

    def _parts(self) -> Iterator[Samples]:
        height, width, depth = self.samples.shape
        planes = [self.samples] if self.planar == 1 else [self.samples[:, :, i : i + 1] for i in range(depth)]
        for plane in planes:
            if not self.tile:
                yield from (plane[top : top + self.rows] for top in range(0, height, self.rows))
                continue
            filled = np.pad(plane, ((0, -height % self.tile), (0, -width % self.tile), (0, 0)), mode="edge")
            for top in range(0, height, self.tile):
                for left in range(0, width, self.tile):
                    yield filled[top : top + self.tile, left : left + self.tile]

    def _encoded(self, part: Samples, order: str) -> bytes:
        if self.predictor == 2:
            part = np.concatenate([part[:, :1], np.diff(part, axis=1)], axis=1).astype(part.dtype)
        raw = packed(part, self.bits, order)
        row = len(raw) // len(part)
        encoded = {
            1: lambda: raw,
            5: lambda: imagecodecs.lzw_encode(raw),
            8: lambda: zlib.compress(raw),
            32946: lambda: zlib.compress(raw),
            32773: lambda: b"".join(packbits(raw[i : i + row]) for i in range(0, len(raw), row)),
            34925: lambda: lzma.compress(raw),
            50000: lambda: imagecodecs.zstd_encode(raw),
        }[self.compression]()
        if self.fillorder == 2:
            encoded = bytes(int(f"{byte:08b}"[::-1], 2) for byte in encoded)
        return encoded


def packbits(row: bytes) -> bytes:
    """Runs as runs, all else byte by byte."""
    coded = b""
    for value, run in groupby(row):
        length = len(list(run))
        while length:
            part = min(length, 128)
            coded += bytes([257 - part if part > 1 else 0, value])
            length -= part
    return coded


def bmp_file(
    raw: bytes, width: int, height: int, bits: int, *, compression: int = 0, masks: tuple[int, ...] = (),
    palette: bytes = b"", old: bool = False,
) -> bytes:  # fmt: skip
    """A BMP with rows as they are to be stored; a negative height is top-down, ``old`` is that of OS/2."""
    if old:
        info = struct.pack("<IHHHH", 12, width, height, 1, bits)
    else:
        size = 108 if len(masks) == 4 else 40
        info = struct.pack("<IiiHHIIiiII", size, width, height, 1, bits, compression, len(raw), 0, 0, 0, 0)
        info += struct.pack(f"<{len(masks)}I", *masks) + bytes(52 if size == 108 else 0)
    offset = 14 + len(info) + len(palette)
    return b"BM" + struct.pack("<IHHI", offset + len(raw), 0, 0, offset) + info + palette + raw


def bmp_rows(samples: Samples, bits: int) -> bytes:
    """Rows of ``(H, W, S)`` samples, the first one first, filled up to four bytes."""
    rows = [packed(row[np.newaxis], bits) for row in samples]
    return b"".join(row + bytes(-len(row) % 4) for row in rows)
