"""A few hundred picture files of every kind: each decodes to the samples it was written from, or is refused by name.

The files come from `tests.picture_files`, libvips and Pillow. What libvips, OpenCV or Pillow make of a file is held
against it too, where they read that kind.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import cycle, product
from pathlib import Path
from typing import NamedTuple

import cv2
import imagecodecs
import numpy as np
import pytest
import pyvips
from PIL import Image
from tifffile import TiffFile, TiffTag

from desra_core.errors import ImageError
from desra_core.images.codec import decode, image_size
from tests.picture_files import Page, bmp_file, bmp_rows, chunk, png_file, tiff_file

PATH = Path("folder/photo")
RNG = np.random.default_rng(11)
SHAPE = (21, 35)
SMOOTH = cv2.resize(RNG.integers(0, 256, (7, 9, 3), np.uint8), (57, 43), interpolation=cv2.INTER_CUBIC)


class Case(NamedTuple):
    """A file with its true pixels, ``(H, W, C)`` with alpha last, or a part of the message that refuses it."""

    name: str
    data: bytes
    truth: np.ndarray | None = None
    refused: str = ""
    reader: Callable[[bytes], np.ndarray] | None = None


def by_vips(data: bytes) -> np.ndarray:
    pixels = pyvips.Image.new_from_buffer(data, "", fail_on="error").numpy()
    return pixels.reshape(*pixels.shape[:2], -1)


def by_opencv(data: bytes) -> np.ndarray:
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION)
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    return pixels if pixels.shape[2] == 1 else pixels[:, :, [2, 1, 0, 3][: pixels.shape[2]]]


def by_pillow(data: bytes) -> np.ndarray:
    pixels = np.asarray(Image.open(io.BytesIO(data)))
    return pixels.reshape(*pixels.shape[:2], -1)


def random_samples(bits: int, depth: int) -> np.ndarray:
    return RNG.integers(0, 2**bits, (*SHAPE, depth)).astype(np.uint16 if bits == 16 else np.uint8)


def spread(samples: np.ndarray, bits: int) -> np.ndarray:
    return samples if bits >= 8 else (samples.astype(int) * 255 // (2**bits - 1)).astype(np.uint8)


# ------------------------------------------------------------------ TIFF

# photometric, extra samples (None: no such tag), the samples that are colours and alpha
KINDS = {
    "black-is-zero": (1, None, 1, False), "white-is-zero": (0, None, 1, False), "rgb": (2, None, 3, False),
    "gray-unspecified": (1, (0,), 1, False), "gray-alpha": (1, (2,), 1, True),
    "white-is-zero-alpha": (0, (2,), 1, True),
    "rgb-unspecified": (2, (0,), 3, False), "rgba": (2, (2,), 3, True), "rgba-untold": (2, None, 3, True),
    "rgba-extra": (2, (2, 0), 3, True), "rgb-2-extra": (2, (0, 0), 3, False), "rgb-extra-alpha": (2, (0, 2), 3, True),
}  # fmt: skip
PHOTO = {"rgb", "rgba", "black-is-zero"}  # which get every compression
STORAGE = ((1, 1), (5, 1), (8, 1), (32946, 2), (32773, 1), (34925, 2), (50000, 1), (5, 2), (8, 2), (50000, 2))


def tiffs() -> Iterator[Case]:
    turns = cycle(product((1, 2), "<>", (0, 16), (False, True)))
    for name, (photometric, extra, colours, alpha) in KINDS.items():
        depths = (1, 2, 4, 8, 16) if name in ("black-is-zero", "white-is-zero", "gray-alpha") else (8, 16)
        for bits, (compression, predictor) in product(depths, STORAGE):
            if bits < 8 and predictor == 2:
                continue
            for _ in range(2 if name in PHOTO else 1):
                planar, order, tile, big = next(turns)
                samples = random_samples(bits, colours + (len(extra) if extra else int(alpha)))
                told = {} if extra is None else {"extra": extra}
                page = Page(samples, photometric, bits, planar=planar, tile=tile, compression=compression,
                            predictor=predictor, **told)  # fmt: skip
                truth = spread(samples[:, :, :colours], bits)
                if photometric == 0:
                    truth = (255 if bits <= 8 else 65535) - truth
                if alpha:
                    place = colours + (extra.index(2) if extra else 0)
                    truth = np.dstack([truth, spread(samples[:, :, place], bits)])
                readable = compression not in (34925, 50000) and not (planar == 2 and (tile or samples.shape[2] < 3))
                reader = by_vips if readable and extra in (None, (2,)) and not (alpha and bits < 8) else None
                if planar == 1 and samples.shape[2] == 1 and bits <= 8:
                    reader = reader or by_pillow
                settings = f"{bits}-planar{planar}{order}tile{tile}-{'big' if big else 'small'}"
                yield Case(f"tiff-{name}-{settings}-{compression}.{predictor}", tiff_file(page, order=order, big=big),
                           truth, reader=reader)  # fmt: skip


def premultiplied() -> Iterator[Case]:
    for bits, colours, planar, order in product((8, 16), (1, 3), (1, 2), "<>"):
        most = 2**bits - 1
        samples = random_samples(bits, colours + 1)
        alpha = samples[:, :, -1:].astype(np.uint64)
        alpha[0], alpha[1] = 0, most
        stored = samples[:, :, :-1] * alpha // most
        truth = np.where(alpha > 0, stored * most // np.maximum(alpha, 1), stored)
        truth = np.dstack([truth, alpha]).astype(samples.dtype)
        page = Page(np.dstack([stored, alpha]).astype(samples.dtype), 2 if colours == 3 else 1, bits,
                    planar=planar, extra=1)  # fmt: skip
        by = by_pillow if bits == 8 and colours == 3 and planar == 1 else None
        yield Case(
            f"tiff-premultiplied-{bits}-{colours}-{planar}{order}", tiff_file(page, order=order), truth, reader=by
        )


def palettes() -> Iterator[Case]:
    for bits, alpha, order in product((1, 2, 4, 8), (False, True), "<>"):
        if alpha and bits < 8:
            continue
        samples = random_samples(bits, 2 if alpha else 1)
        for small in (False, True):
            colours = RNG.integers(0, 256 if small else 65536, (3, 2**bits))
            colours[0, 0] = 255 if small else 65535
            colours[0, 1] = 0
            truth = (colours if small else colours // 256).T[samples[:, :, 0]].astype(np.uint8)
            truth = np.dstack([truth, samples[:, :, 1]]) if alpha else truth
            page = Page(samples, 3, bits, colormap=tuple(colours.ravel().tolist()), **({"extra": 2} if alpha else {}))
            name = f"tiff-palette-{bits}{alpha}{order}{'8' if small else '16'}-bit-colours"
            yield Case(name, tiff_file(page, order=order), truth, reader=None if small else by_vips)


def tiffs_of_tools() -> Iterator[Case]:
    photo = Image.fromarray(SMOOTH)
    bits = photo.convert("1")
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "lzma", "zstd", "jpeg"):
        for mode in ("L", "RGB", "RGBA", "P"):
            if compression == "jpeg" and mode in ("RGBA", "P"):
                continue
            data = saved(photo.convert(mode), "TIFF", compression=compression)
            truth = np.asarray(photo.convert(mode).convert("RGB" if mode == "P" else mode)).reshape(43, 57, -1)
            reader = by_vips if compression not in ("lzma", "zstd") else None
            truth = None if compression == "jpeg" else truth
            yield Case(f"libtiff-{compression}-{mode}", data, truth, reader=reader)
    for compression in ("tiff_ccitt", "group3", "group4"):
        for tags in ({}, {266: 2}, {262: 1}, {262: 0}):
            data = saved(bits, "TIFF", compression=compression, tiffinfo=tags)
            yield Case(f"libtiff-{compression}-{tags}", data, reader=by_vips)
    vips = pyvips.Image.new_from_array(SMOOTH)
    gray = vips[1]
    tiles = {"tile": True, "tile_width": 32, "tile_height": 16}
    for name, image, options in (
        ("jpeg", vips, {"compression": "jpeg", "Q": 90}),
        ("jpeg-444-tiles", vips, {"compression": "jpeg", "Q": 95, **tiles}),
        ("jpeg-gray", gray, {"compression": "jpeg"}),
        ("lzw-tiles", vips, {"compression": "lzw", "predictor": "horizontal", "tile": True}),
        ("pyramid", vips, {"pyramid": True, **tiles, "compression": "deflate"}),
        ("subifd", vips, {"pyramid": True, "subifd": True, **tiles}),
        ("1-bit", gray, {"bitdepth": 1}), ("2-bit", gray, {"bitdepth": 2}), ("4-bit", gray, {"bitdepth": 4}),
        ("fax", gray, {"bitdepth": 1, "compression": "ccittfax4"}), ("miniswhite", gray, {"miniswhite": True}),
        ("bigtiff", vips, {"bigtiff": True}), ("premultiply", vips.bandjoin(vips[0]), {}),
        ("rgb16-deflate", (vips * 257).cast("ushort").copy(interpretation="rgb16"),
         {"compression": "deflate", "predictor": "horizontal"}),
    ):  # fmt: skip
        yield Case(f"libvips-{name}", image.tiffsave_buffer(**options), reader=by_vips)


def refused_tiffs() -> Iterator[Case]:
    def page(photometric: int, depth: int, dtype: str = "u1", **options: int | tuple[int, ...]) -> bytes:
        samples = RNG.integers(0, 100, (*SHAPE, depth)).astype(dtype)
        return tiff_file(Page(samples, photometric, samples.itemsize * 8, **options))

    def odd(depth: int, photometric: int, tags: dict[int, tuple[int, ...]]) -> bytes:
        return tiff_file(bent(Page(random_samples(8, depth), photometric, 8), tags))

    for name, data, reason in (
        ("float", page(2, 3, "f4"), "RGB (32-bit floating point)"), ("float-gray", page(1, 1, "f4"), "F (32-bit"),
        ("double", page(1, 1, "f8"), "F (64-bit floating"), ("half", page(1, 1, "f2"), "F (16-bit floating"),
        ("int8", page(1, 1, "i1"), "8-bit signed"), ("int16", page(2, 3, "i2"), "RGB (16-bit signed"),
        ("int32", page(1, 1, "i4"), "I (32-bit signed"), ("uint32", page(1, 1, "u4"), "I of 32 bits"),
        ("uint32-rgb", page(2, 3, "u4"), "RGB of 32 bits"), ("complex", page(1, 1, "u8", sampleformat=6), "complex"),
        ("cmyk", page(5, 4), "CMYK"), ("cmyk16", page(5, 4, "u2"), "CMYK"), ("ycbcr", page(6, 3), "YCbCr"),
        ("ycbcr-planes", odd(3, 6, {259: (7,), 284: (2,)}), "YCbCr"),
        ("lab", page(8, 3), "LAB"), ("icclab", page(9, 3), "LAB (ICC)"), ("cfa", page(32803, 1, "u2"), "raw data"),
        ("raw", page(34892, 3, "u2"), "raw data"), ("luv", page(32845, 3, "u2"), "LogLuv"),
        ("unknown", page(777, 1), "number 777"), ("gray-5", page(1, 5, "u2", extra=(0,) * 4), "5 samples per pixel"),
        ("gray-3", page(1, 3, extra=(0, 0)), "3 samples"), ("rgb-of-2", page(2, 2), "2 samples"),
        ("12-bit", tiff_file(Page(random_samples(8, 1), 1, 12)), "gray of 12 bits"),
        ("rgb-of-4-bits", tiff_file(Page(random_samples(4, 3), 2, 4)), "RGB of 4 bits"),
        ("565", odd(3, 2, {258: (5, 6, 5)}), "RGB of (5, 6, 5) bits"),
        ("thunderscan", odd(1, 1, {259: (32809,)}), "method THUNDERSCAN"),
        ("old-jpeg", odd(1, 1, {259: (6,)}), "method OJPEG"),
        ("unknown-method", odd(1, 1, {259: (4711,)}), "method 4711"),
        ("webp", odd(3, 2, {259: (50001,)}), "method WEBP"),
        ("white-premultiplied", tiff_file(Page(random_samples(8, 2), 0, 8, extra=1)), "MINISWHITE, multiplied"),
        ("volume", odd(1, 1, {32997: (3,)}), "volume of 3 slices"),
        ("no-pixels", odd(1, 1, {256: (0,)}), "damaged header (a picture of 0x21"),
        ("missing-strip", tiff_file(Absent(random_samples(8, 1), 1, 8)), "strips or tiles that are missing: 1 of 5"),
        ("missing-tile", tiff_file(Absent(random_samples(8, 1), 1, 8, tile=16)), "tiles that are missing: 1 of 6"),
        ("no-page", b"II*\0\0\0\0\0", "damaged header"), ("cut-header", b"MM\0*\0", "damaged header"),
    ):  # fmt: skip
        yield Case(f"tiff-refused-{name}", data, refused=reason)


def overruns() -> Iterator[Case]:
    """Files whose last strip or tile reaches beyond the end by its header, with and without missing bytes."""
    smooth = cv2.resize(SMOOTH, SHAPE[::-1])
    for (compression, predictor), tile in product(STORAGE, (0, 16)):
        data = tiff_file(Page(smooth, 2, 8, compression=compression, predictor=predictor, tile=tile))
        page = TiffFile(io.BytesIO(data)).pages[0]
        offset, count = page.dataoffsets[-1], page.databytecounts[-1]
        for missing in (0, count // 3):
            part = data[offset : offset + count - missing]
            moved = changed_last(data, page.tags[324 if tile else 273], len(data))
            moved = changed_last(moved, page.tags[325 if tile else 279], count + 1000)
            name = f"tiff-overrun-{compression}-{predictor}-{tile}-{missing}"
            reader = by_pillow if not missing and compression == 1 and not tile else None
            told = "reaches beyond the end of the file" if missing else ""
            yield Case(name, moved + part, None if missing else smooth, told, reader)


def changed_last(data: bytes, tag: TiffTag, value: int) -> bytes:
    place = tag.valueoffset + 4 * (tag.count - 1)
    return data[:place] + value.to_bytes(4, "little") + data[place + 4 :]


class Absent(Page):
    """A page without one of its strips or tiles."""

    def _encoded(self, part: np.ndarray, order: str) -> bytes:
        self.written = getattr(self, "written", 0) + 1
        return b"" if self.written == 3 else super()._encoded(part, order)


def bent(page: Page, tags: dict[int, tuple[int, ...]]) -> Page:
    """A page with wrong tags about its samples."""
    page.tags |= tags
    return page


def pages() -> Iterator[Case]:
    full = random_samples(16, 3)
    small = Page(full[::3, ::3], 2, 16, subfile=1)
    mask = Page(random_samples(1, 1), 4, 1, subfile=4)
    for name, stored in (
        ("reduced-first", [small, Page(full, 2, 16)]), ("reduced-last", [Page(full, 2, 16, subfile=0), small, small]),
        ("mask", [Page(full, 2, 16), mask]), ("only-reduced", [Page(full, 2, 16, subfile=1)]),
        ("one-of-many", [Page(full, 2, 16, subfile=2)]),
        ("further", [Page(full, 2, 16), Page(random_samples(8, 1), 1, 8), small]),
    ):  # fmt: skip
        for order, big in product("<>", (False, True)):
            yield Case(f"tiff-pages-{name}{order}{big}", tiff_file(*stored, order=order, big=big), full)
    for bits, fillorder, compression in product((1, 4, 8, 16), (2,), (1, 5, 8, 32773)):
        samples = random_samples(bits, 1)
        data = tiff_file(Page(samples, 1, bits, fillorder=fillorder, compression=compression))
        yield Case(f"tiff-fillorder-{bits}-{compression}", data, spread(samples, bits), reader=by_vips)
    for bits, compression, predictor in ((8, 1, 2), (16, 1, 2), (8, 32773, 2)):  # it means nothing there
        samples = random_samples(bits, 3)
        page = bent(Page(samples, 2, bits, compression=compression), {317: (predictor,)})
        yield Case(f"tiff-idle-predictor-{bits}-{compression}", tiff_file(page), samples, reader=by_vips)


# ------------------------------------------------------------------ PNG


def pngs() -> Iterator[Case]:
    for colour, depths in {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}.items():
        for bits, keyed in product(depths, (False, True)):
            if keyed and colour > 3:
                continue
            samples = random_samples(bits, {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour])
            before, truth = [], spread(samples, bits)
            if colour == 3:
                palette = RNG.integers(0, 256, (2**bits, 3), np.uint8)
                before.append(chunk(b"PLTE", palette.tobytes()))
                truth = palette[samples[:, :, 0]]
            if keyed and colour == 3:
                before.append(chunk(b"tRNS", b"\7"))
                alpha = np.where(samples == 0, 7, 255).astype(np.uint8)
                truth = np.dstack([truth, alpha])
            elif keyed:
                before.append(chunk(b"tRNS", samples[3, 4].astype(">u2").tobytes()))
                clear = (samples == samples[3, 4]).all(axis=2)
                truth = np.dstack([truth, np.where(clear, 0, np.iinfo(truth.dtype).max)]).astype(truth.dtype)
            name = f"png-{colour}-{bits}-{'key' if keyed else 'plain'}"
            data = png_file(samples, colour, bits, *before)
            yield Case(name, data, truth, reader=by_vips)
            significant = bytes([min(bits, 5)]) * (3 if colour == 3 else samples.shape[2])
            extra = [chunk(b"sBIT", significant), chunk(b"gAMA", b"\0\0\x80\0"), chunk(b"zTXt", b"k\0\0nonsense")]
            yield Case(f"{name}-chunks", png_file(samples, colour, bits, *extra, *before), truth)
    for depth, dtype in product((1, 2, 3, 4), (np.uint8, np.uint16)):
        samples = random_samples(16 if dtype == np.uint16 else 8, depth)
        kind = {1: "b-w", 2: "b-w", 3: "srgb", 4: "srgb"} if dtype == np.uint8 else {1: "grey16", 2: "grey16",
                                                                                    3: "rgb16", 4: "rgb16"}  # fmt: skip
        image = pyvips.Image.new_from_array(samples).copy(interpretation=kind[depth])
        data = image.pngsave_buffer(interlace=True, bitdepth=16 if dtype == np.uint16 else 8)
        yield Case(f"png-interlaced-{depth}-{dtype.__name__}", data, samples, reader=by_vips)
    frames = [Image.fromarray(random_samples(8, 3)) for _ in range(3)]
    data = saved(frames[0], "PNG", save_all=True, append_images=frames[1:])
    yield Case("png-animated", data, np.asarray(frames[0]), reader=by_vips)
    whole = png_file(random_samples(8, 3), 2, 8, chunk(b"tEXt", b"k\0text"), chunk(b"gAMA", b"\0\0\x80\0"))
    for kind in (b"IHDR", b"tEXt", b"gAMA", b"IDAT"):
        place = whole.index(kind) + 5
        spoilt = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
        yield Case(f"png-broken-{kind.decode()}", spoilt, refused=f"broken checksum in its chunk {kind.decode()}")
    yield Case("png-cut", whole[:-40], refused="truncated or damaged (it ends before its last row)")
    yield Case("png-no-header", whole[:20], refused="damaged header")


# ------------------------------------------------------------------ JPEG, WebP, BMP


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def jpegs() -> Iterator[Case]:
    photo = pyvips.Image.new_from_array(SMOOTH)
    for gray, coding in product((False, True), ({}, {"interlace": True}, {"restart_interval": 1}, {"Q": 99}, {"Q": 8})):
        image = photo[0] if gray else photo
        for sampling in ("on", "off"):
            data = image.jpegsave_buffer(subsample_mode=sampling, **coding)
            name = f"jpeg-{'gray' if gray else 'rgb'}-{coding}-{sampling}"
            yield Case(name, data, reader=by_vips)
            told = "without an end marker" if coding in ({"interlace": True}, {"restart_interval": 1}) else ""
            yield Case(f"{name}-no-end", data[:-2], truth=None if told else by_vips(data), refused=told)
            yield Case(f"{name}-cut", data[: len(data) - 9], refused="truncated or damaged")
    deep = (SMOOTH[:, :, 0].astype(np.uint16) << 4).copy()
    for name, data, reason in (
        ("cmyk", saved(Image.fromarray(SMOOTH).convert("CMYK"), "JPEG"), "colour model CMYK"),
        ("12-bit", imagecodecs.jpeg8_encode(deep, bitspersample=12), "JPEG file that cannot be read"),
        ("start", b"\xff\xd8\xff", "JPEG file that cannot be read"),
    ):
        yield Case(f"jpeg-{name}", data, refused=reason)

    lossless = imagecodecs.ljpeg_encode(SMOOTH[:, :, 0].copy())
    yield Case("jpeg-lossless", lossless, SMOOTH[:, :, :1])


def webps() -> Iterator[Case]:
    for depth, lossless, quality in product((3, 4), (False, True), (30, 90)):
        alpha = np.maximum(SMOOTH[:, :, 0], 1) if depth == 4 else np.full_like(SMOOTH[:, :, 0], 255)
        samples = np.dstack([SMOOTH, alpha])[:, :, :depth]
        data = saved(Image.fromarray(samples), "WEBP", lossless=lossless, quality=quality, exact=True)
        yield Case(f"webp-{depth}-{lossless}-{quality}", data, samples if lossless else None, reader=by_vips)
        if lossless:
            frames = [Image.fromarray(samples[::-1]), Image.fromarray(samples[:, ::-1])]
            data = saved(
                Image.fromarray(samples), "WEBP", lossless=True, exact=True, save_all=True, append_images=frames
            )
            yield Case(f"webp-animated-{depth}-{quality}", data, np.dstack([SMOOTH, alpha]))
        yield Case(f"webp-cut-{depth}-{lossless}-{quality}", data[:-30], refused="is truncated")


def bmps() -> Iterator[Case]:
    height, width = SHAPE
    for bits, top_down in product((1, 4, 8), (False, True)):
        samples = random_samples(bits, 1)
        palette = RNG.integers(0, 256, (2**bits, 3), np.uint8)
        rows = bmp_rows(samples if top_down else samples[::-1], bits)
        data = bmp_file(rows, width, -height if top_down else height, bits,
                        palette=b"".join(bytes([*colour[::-1], 0]) for colour in palette))  # fmt: skip
        yield Case(f"bmp-palette-{bits}-{top_down}", data, palette[samples[:, :, 0]], reader=by_opencv)
    for top_down in (False, True):
        samples = random_samples(8, 4)
        stored = samples[:, :, [2, 1, 0, 3]] if top_down else samples[::-1, :, [2, 1, 0, 3]]
        high = -height if top_down else height
        rgb = samples[:, :, :3]
        yield Case(
            f"bmp-24-{top_down}", bmp_file(bmp_rows(stored[:, :, :3], 8), width, high, 24), rgb, reader=by_opencv
        )
        yield Case(f"bmp-32-{top_down}", bmp_file(bmp_rows(stored, 8), width, high, 32), rgb)
        masks = (0xFF0000, 0xFF00, 0xFF)
        data = bmp_file(bmp_rows(stored, 8), width, high, 32, compression=3, masks=masks)
        yield Case(f"bmp-32-masks-{top_down}", data, rgb)
        data = bmp_file(bmp_rows(stored, 8), width, high, 32, compression=3, masks=(*masks, 0xFF000000))
        yield Case(f"bmp-32-alpha-{top_down}", data, samples, reader=by_opencv)
        for green in (5, 6):
            masks = (0xF800, 0x7E0, 0x1F) if green == 6 else (0x7C00, 0x3E0, 0x1F)
            values = RNG.integers(0, 2 ** (10 + green), (*SHAPE, 1)).astype("<u2")
            raw = bmp_rows((values if top_down else values[::-1]).byteswap(), 16)
            data = bmp_file(raw, width, high, 16, compression=3, masks=masks)
            parts = [values >> (5 + green) & 31, values >> 5 & (2**green - 1), values & 31]
            tops = (31, 2**green - 1, 31)
            truth = np.dstack([part.astype(int) * 255 // top for part, top in zip(parts, tops, strict=True)])
            yield Case(f"bmp-16-{green}-{top_down}", data, truth.astype(np.uint8))
    samples = random_samples(8, 3)
    yield Case("bmp-os2", bmp_file(bmp_rows(samples[::-1, :, ::-1], 8), width, height, 24, old=True), samples)
    indices = np.repeat(np.arange(width) // 5, 1)[np.newaxis] + np.zeros((height, 1), int)
    palette = RNG.integers(0, 256, (256, 3), np.uint8)
    runs = b"".join(bytes([5, value]) for value in range(width // 5)) + b"\0\0"
    raw = runs * height + b"\0\1"
    data = bmp_file(raw, width, height, 8, compression=1,
                    palette=b"".join(bytes([*colour[::-1], 0]) for colour in palette))  # fmt: skip
    yield Case("bmp-rle8", data, palette[indices], reader=by_opencv)
    yield Case("bmp-rle8-cut", data[:-width], refused="truncated or damaged")
    yield Case("bmp-cut", bmp_file(bmp_rows(samples, 8)[:-9], width, height, 24), refused="truncated or damaged")
    yield Case("bmp-masks-unknown", bmp_file(bytes(width * height * 4), width, height, 32, compression=3,
                                             masks=(0xFF, 0xF00, 0xF000)), refused="BMP")  # fmt: skip


def outcome(case: Case) -> str:
    """How the file came out: equal, or refused, or wrong and how."""
    try:
        photo = decode(case.data, PATH)
    except ImageError as error:
        told = str(error)
        assert "\n" not in told
        return "refused" if case.refused and case.refused in told else f"wrong: {told}"
    if case.refused:
        return f"wrong: read as {photo.pixels.shape}"
    assert image_size(case.data, PATH) == photo.pixels.shape[:2]
    pixels = photo.pixels if photo.alpha is None else np.dstack([photo.pixels, photo.alpha])
    expected = [case.truth] if case.truth is not None else []
    expected += [case.reader(case.data)] if case.reader is not None else []
    for other in expected:
        if other.shape != pixels.shape or other.dtype != pixels.dtype:
            return f"wrong: {pixels.shape} {pixels.dtype}, not {other.shape} {other.dtype}"
        if not np.array_equal(other, pixels):
            return f"wrong: {(other != pixels).any(axis=2).mean():.0%} of the pixels"
    return "equal"


@pytest.mark.parametrize(
    ("family", "equal", "refused", "read_by_others"),
    [
        (tiffs, 360, 0, 120), (premultiplied, 16, 0, 2), (palettes, 20, 0, 10), (pages, 43, 0, 19),
        (tiffs_of_tools, 48, 0, 40), (refused_tiffs, 0, 37, 0), (overruns, 20, 20, 1), (pngs, 61, 6, 35),
        (jpegs, 33, 31, 20), (webps, 12, 8, 8), (bmps, 20, 3, 11),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)  # fmt: skip
def test_a_picture_is_right_or_refused_by_name(
    family: Callable[[], Iterator[Case]], equal: int, refused: int, read_by_others: int
) -> None:
    cases = list(family())
    outcomes = {case.name: outcome(case) for case in cases}
    assert len(outcomes) == len(cases)
    assert {name: told for name, told in outcomes.items() if told.startswith("wrong")} == {}
    counts = Counter(outcomes.values())
    readers = sum(case.reader is not None for case in cases)
    assert (counts["equal"], counts["refused"], readers) == (equal, refused, read_by_others)
