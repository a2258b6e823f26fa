"""Decoding in every awkward format, and the errors that a stranger understands."""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from desra_core.errors import DesraError, ImageError, LockedError, TransientError, UsageError, printable
from desra_core.files import digest, read_bytes
from desra_core.images.codec import (
    SUFFIXES,
    Photo,
    bgr8,
    decode,
    decode_labels,
    encode_mask,
    encode_png,
    image_size,
    most_pixels,
)
from tests.picture_files import Page, bmp_file, chunk, png_file, tiff_file

SHARED = Path(__file__).resolve().parents[3].parent / "shared" / "data"
PATH = Path("folder/photo.png")
RNG = np.random.default_rng(7)
GRAY = RNG.integers(0, 256, (7, 12), dtype=np.uint8)
RGB = RNG.integers(0, 256, (7, 12, 3), dtype=np.uint8)
RGBA = RNG.integers(0, 256, (7, 12, 4), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (7, 12, 4), dtype=np.uint16)
PHOTO = cv2.GaussianBlur(RNG.integers(0, 256, (90, 120, 3)).astype(np.float32), (0, 0), 2).astype(np.uint8)
DEEP_PHOTO = PHOTO.astype(np.uint16) * 250 + RNG.integers(0, 250, PHOTO.shape, dtype=np.uint16)
LOW = np.array([[[0], [1], [5], [8]]], np.uint8)
COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}


def saved(image: Image.Image, kind: str, **options) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def deep_png(pixels: np.ndarray, *chunks: bytes) -> bytes:
    return png_file(pixels, COLOUR_TYPES[pixels.shape[2]], 16, *chunks)


def tiff(pixels: np.ndarray, **options) -> bytes:
    """A TIFF whose directory comes first, so that cutting its end removes pixels."""
    sink = io.BytesIO()
    photometric = "rgb" if pixels.ndim == 3 else "minisblack"
    tifffile.imwrite(sink, pixels, photometric=photometric, metadata=None, rowsperstrip=16, **options)
    return sink.getvalue()


def png_header(width: int, height: int, depth: int, colour_type: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)


def bitmap(masks: tuple[int, int, int]) -> bytes:
    """A 16-bit-per-pixel BMP of 4x4 pixels, as old tools write them: magenta in RGB565."""
    return bmp_file(b"\x1f\xf8" * 16, 4, 4, 16, compression=3, masks=masks)


def claiming(page: Page, side: int, tile: int = 0) -> Page:
    """A page of a few pixels that says it has more."""
    page.tags |= {256: (side,), 257: (side,)} | ({322: (tile,), 323: (tile,)} if tile else {})
    return page


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "WEBP", "JPEG"])
@pytest.mark.parametrize("pixels", [GRAY, RGB], ids=["gray", "rgb"])
def test_every_format(kind: str, pixels: np.ndarray) -> None:
    data = saved(Image.fromarray(pixels), kind, **({"lossless": True} if kind == "WEBP" else {}))
    photo = decode(data, PATH)
    expected = np.asarray(Image.open(io.BytesIO(data)))  # JPEG loses; WebP has no gray
    assert np.array_equal(photo.pixels, expected.reshape(*expected.shape[:2], -1))
    assert photo.pixels.dtype == np.uint8
    assert photo.pixels.flags.c_contiguous
    assert photo.alpha is None
    assert photo.profile is None


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_alpha_is_kept_apart(kind: str) -> None:
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    photo = decode(saved(Image.fromarray(RGBA), kind, **options), PATH)
    assert np.array_equal(photo.pixels, RGBA[:, :, :3])
    assert np.array_equal(photo.alpha, RGBA[:, :, 3])


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_gray_with_alpha(kind: str) -> None:
    photo = decode(saved(Image.fromarray(RGBA[:, :, :2], "LA"), kind), PATH)
    assert np.array_equal(photo.pixels[:, :, 0], RGBA[:, :, 0])
    assert photo.pixels.shape[2] == 1
    assert np.array_equal(photo.alpha, RGBA[:, :, 1])


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP"])
def test_palettes_and_single_bits_are_expanded(kind: str) -> None:
    palette = Image.fromarray(GRAY % 4).convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    colours = np.arange(10, 130, 10, dtype=np.uint8).reshape(4, 3)
    assert np.array_equal(decode(saved(palette, kind), PATH).pixels, colours[GRAY % 4])
    bits = GRAY > 99
    single = decode(saved(Image.fromarray(bits), kind), PATH).pixels
    assert np.array_equal(single[:, :, 0], np.where(bits, 255, 0))
    assert single.shape[2] == 1


def test_palette_with_transparency() -> None:
    palette = Image.fromarray(GRAY % 2).convert("P")
    palette.putpalette([1, 2, 3, 4, 5, 6])
    photo = decode(saved(palette, "PNG", transparency=0), PATH)
    assert np.array_equal(photo.pixels, np.array([[1, 2, 3], [4, 5, 6]], np.uint8)[GRAY % 2])
    assert np.array_equal(photo.alpha, np.where(GRAY % 2, 255, 0))


@pytest.mark.parametrize("masks", [(0xF800, 0x7E0, 0x1F), (0x7C00, 0x3E0, 0x1F)], ids=["565", "555"])
def test_bitmaps_with_16_bits_per_pixel_have_8_per_channel(masks: tuple[int, int, int]) -> None:
    photo = decode(bitmap(masks), PATH)
    assert photo.pixels.shape == (4, 4, 3)
    assert photo.pixels.dtype == np.uint8


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bit_png(channels: int) -> None:
    photo = decode(deep_png(DEEP[:, :, :channels]), PATH)
    colours = channels - (channels in (2, 4))
    assert photo.pixels.dtype == np.uint16
    assert np.array_equal(photo.pixels, DEEP[:, :, :colours])
    if colours < channels:
        assert np.array_equal(photo.alpha, DEEP[:, :, colours])
    else:
        assert photo.alpha is None


def test_16_bit_png_with_a_transparent_colour() -> None:
    """The colour is compared in 16 bits: other colours with the same upper 8 bits are opaque."""
    pixels = DEEP[:, :, :3].copy()
    pixels[2, 2:4] = [[0x1234, 0x5678, 0x9ABC], [0x1235, 0x5678, 0x9ABC]]
    photo = decode(deep_png(pixels, chunk(b"tRNS", struct.pack(">HHH", *pixels[2, 2].tolist()))), PATH)
    assert np.array_equal(photo.pixels, pixels)
    assert np.argwhere(photo.alpha != 65535).tolist() == [[2, 2]]
    assert photo.alpha[2, 2] == 0


@pytest.mark.parametrize("compression", [1, 5, 8], ids=["raw", "lzw", "deflate"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_16_bit_tiff(channels: int, compression: int) -> None:
    order = [2, 1, 0, 3][:channels] if channels >= 3 else [0]
    ok, data = cv2.imencode(".tiff", DEEP[:, :, order], [cv2.IMWRITE_TIFF_COMPRESSION, compression])
    assert ok
    photo = decode(data.tobytes(), PATH)
    assert photo.pixels.dtype == np.uint16
    assert np.array_equal(photo.pixels, DEEP[:, :, : min(channels, 3)])


@pytest.mark.parametrize("value", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_orientation_of_8_bits(kind: str, value: int) -> None:
    data = saved(Image.fromarray(RGB), kind, exif=orientation(value))
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert np.array_equal(decode(data, PATH).pixels, expected)


@pytest.mark.parametrize("value", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_orientation_of_16_bits(kind: str, value: int) -> None:
    """Pillow cuts 16-bit colour to 8 bits, so each channel is compared to a gray image that Pillow has turned."""
    turned = []
    for channel in range(3):
        gray = saved(Image.fromarray(DEEP[:, :, channel]), kind, exif=orientation(value))
        turned.append(np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(gray)))))
        assert np.array_equal(decode(gray, PATH).pixels[:, :, 0], turned[-1])
    if kind == "PNG":
        exif = orientation(value).tobytes().removeprefix(b"Exif\0\0")
        colour = decode(deep_png(DEEP[:, :, :3], chunk(b"eXIf", exif)), PATH).pixels
        assert np.array_equal(colour, np.dstack(turned))


@pytest.mark.parametrize("value", range(1, 9))
def test_the_size_by_header_is_that_of_the_decoded_image(value: int) -> None:
    exif = orientation(value)
    told = chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    xmp = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + f'<x tiff:Orientation="{value}"/>'.encode())
    stored = Image.fromarray(RGB)
    files = [saved(stored, kind, exif=exif) for kind in ("PNG", "TIFF", "JPEG", "WEBP")]
    files += [
        png_file(RGB, 2, 8, told),
        png_file(RGB, 2, 8, after=told),
        png_file(RGB, 2, 8, xmp),
        deep_png(DEEP, told),
    ]
    files += [tiff_file(Page(pixels, 2, bits, orientation=value)) for pixels, bits in ((RGB, 8), (DEEP[:, :, :3], 16))]
    for data in files:
        upright = (12, 7) if value > 4 else (7, 12)
        assert image_size(data, PATH) == decode(data, PATH).pixels.shape[:2] == upright


@pytest.mark.parametrize("size", [2_000_000, 70_000_000])
def test_large_texts_and_profiles_say_nothing_about_the_picture(size: int) -> None:
    noise = RNG.integers(0, 256, size // 10, dtype=np.uint8).tobytes()
    text = chunk(b"zTXt", b"key\0\0" + zlib.compress(b"x" * size))
    plain = chunk(b"tEXt", b"key\0" + noise.replace(b"\0", b" "))
    international = chunk(b"iTXt", b"key\0\1\0\0\0" + zlib.compress(b"y" * size))
    profile = chunk(b"iCCP", b"profile\0\0" + zlib.compress(noise))
    for data in (
        png_file(RGB, 2, 8, text, international), png_file(RGB, 2, 8, after=text), png_file(RGB, 2, 8, profile, plain),
        deep_png(DEEP, profile, text),
    ):  # fmt: skip
        photo = decode(data, PATH)
        assert photo.pixels.shape == RGB.shape
        assert photo.profile == ("unusable" if profile in data else None)
        assert image_size(data, PATH) == RGB.shape[:2]


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_meaningless_orientation_is_ignored(value: int) -> None:
    data = saved(Image.fromarray(RGB), "PNG", exif=orientation(value))
    assert np.array_equal(decode(data, PATH).pixels, RGB)


def test_damaged_exif_of_a_sound_image_is_ignored() -> None:
    for exif in (b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0garbage garbage"):
        data = saved(Image.fromarray(RGB), "PNG") if not exif else saved(Image.fromarray(RGB), "PNG", exif=exif)
        assert np.array_equal(decode(data, PATH).pixels, RGB)


def test_icc_profile_is_recorded() -> None:
    assert decode(saved(Image.fromarray(RGB), "PNG", icc_profile=b"profile"), PATH).profile == "unusable"


def outcome_of(data: bytes) -> Photo | ImageError:
    try:
        return decode(data, PATH, max_pixels=10**6)
    except ImageError as error:
        return error


WHOLE = {
    "jpeg": saved(Image.fromarray(PHOTO), "JPEG"),
    "progressive": saved(Image.fromarray(PHOTO), "JPEG", progressive=True),
    "png": saved(Image.fromarray(PHOTO), "PNG"),
    "interlaced": encode_png(PHOTO),
    "deep png": deep_png(DEEP),
    "sequential gray": saved(Image.fromarray(PHOTO[:, :, 0]), "JPEG", quality=95),
    "tiff": saved(Image.fromarray(PHOTO), "TIFF"),
    "strips": tiff(PHOTO),
    "packed strips": tiff(PHOTO, compression="packbits"),
    "lzw strips": tiff(PHOTO, compression="lzw", predictor=2),
    "deep deflated planes": tiff(DEEP_PHOTO.transpose(2, 0, 1), compression="zlib", planarconfig="separate"),
    "zstd tiles": tiff(DEEP_PHOTO, compression="zstd", tile=(32, 32)),
    "lzma strips": tiff(PHOTO[:, :, 0], compression="lzma"),
    "jpeg strips": tiff(PHOTO, compression="jpeg"),
    "deflated tiff": saved(Image.fromarray(PHOTO), "TIFF", compression="tiff_adobe_deflate"),
    "bmp": saved(Image.fromarray(PHOTO), "BMP"),
    "webp": saved(Image.fromarray(PHOTO), "WEBP"),
}


@pytest.mark.parametrize("kind", WHOLE)
@settings(deadline=None, max_examples=30)
@given(st.data())
def test_a_truncated_file_never_gives_a_partial_image(kind: str, data: st.DataObject) -> None:
    """Where only a trailer is cut off, the image is whole."""
    whole = WHOLE[kind]
    length = data.draw(st.integers(0, len(whole) - 1) | st.integers(len(whole) - 40, len(whole) - 1))
    result = outcome_of(whole[:length])
    if isinstance(result, ImageError):
        assert str(result).startswith(f"{PATH}: ")
        assert "\n" not in str(result)
    else:
        assert np.array_equal(result.pixels, decode(whole, PATH).pixels)


@pytest.mark.parametrize("kind", WHOLE)
@settings(deadline=None, max_examples=30)
@given(st.data())
def test_damage_gives_an_image_or_an_image_error(kind: str, data: st.DataObject) -> None:
    damaged = bytearray(WHOLE[kind])
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, min(len(damaged) - 1, 400)))] = data.draw(st.integers(0, 255))
    result = outcome_of(bytes(damaged))
    assert isinstance(result, ImageError) or result.pixels.shape[2] in (1, 3)


def test_a_header_that_divides_by_zero_is_refused_without_a_warning() -> None:
    """Hypothesis found it. Warnings are errors here."""
    damaged = bytearray(WHOLE["zstd tiles"])
    damaged[159] = 4
    with np.errstate(all="warn"):  # in whatever state other packages have left it
        assert isinstance(outcome_of(bytes(damaged)), ImageError)


@pytest.mark.parametrize(("tag", "kind"), [(0x0111, 12), (0x0111, 5)])
def test_tiffs_with_senseless_offsets(tag: int, kind: int) -> None:
    """A damaged directory may say that a strip begins at 3.7 bytes."""
    damaged = bytearray(WHOLE["tiff"])
    entry = damaged.index(struct.pack("<H", tag))
    damaged[entry + 2 : entry + 4] = struct.pack("<H", kind)
    assert isinstance(outcome_of(bytes(damaged)), ImageError)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty"),
        (b"just some text", "is not an image"),
        (saved(Image.new("CMYK", (20, 20)), "JPEG"), "has the colour model CMYK"),
        (saved(Image.new("F", (20, 20)), "TIFF"), "has the colour model F"),
        (saved(Image.new("I", (20, 20)), "TIFF"), "has the colour model I"),
        (saved(Image.new("LAB", (20, 20)), "TIFF"), "has the colour model LAB"),
        (png_header(50_000, 50_000, 8, 2) + chunk(b"IDAT", bytes(1000)), "claims 50000x50000 pixels"),
        (png_header(50_000, 50_000, 16, 0) + chunk(b"IDAT", bytes(1000)), "claims 50000x50000 pixels"),
        (png_header(30, 30, 8, 2) + chunk(b"IDAT", b""), "is truncated or damaged"),
        (tiff_file(claiming(Page(RGB, 2, 8), 50_000)), "claims 50000x50000 pixels"),
        (tiff_file(claiming(Page(RGB, 2, 8, tile=16), 5_000, tile=30_000)), "tiles of 30000x30000 pixels"),
    ],
)
def test_refused_files(data: bytes, reason: str) -> None:
    for function in (decode, decode_labels):
        with pytest.raises(ImageError, match=reason) as caught:
            function(data, PATH)
        assert not isinstance(caught.value, TransientError)
        assert str(caught.value).count(";") >= 1
        assert "\n" not in str(caught.value)


def test_max_pixels() -> None:
    data = saved(Image.fromarray(RGB), "PNG")
    assert decode(data, PATH, max_pixels=7 * 12).pixels.shape == RGB.shape
    for function in (decode, decode_labels):
        with pytest.raises(ImageError, match=r"12x7 pixels, more than fit.*--memory"):
            function(data, PATH, max_pixels=7 * 12 - 1)


def test_labels_are_indices_in_gray_or_palette() -> None:
    labels = GRAY % 150
    assert np.array_equal(decode_labels(saved(Image.fromarray(labels), "PNG"), PATH), labels)
    palette = Image.fromarray(labels, "L").convert("P")
    palette.putpalette(RNG.integers(0, 256, 768, dtype=np.uint8).tobytes())
    coloured = saved(palette, "PNG", transparency=0)
    indices = np.asarray(Image.open(io.BytesIO(coloured)))
    assert np.array_equal(decode_labels(coloured, PATH), indices)
    deep = deep_png(labels.astype(np.uint16)[:, :, np.newaxis])
    assert np.array_equal(decode_labels(deep, PATH), labels)
    assert decode_labels(deep, PATH).dtype == np.uint8


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (saved(Image.fromarray(RGB), "PNG"), "has colour channels"),
        (saved(Image.fromarray(RGBA[:, :, :2], "LA"), "PNG"), "has colour channels"),
        (saved(Image.fromarray(np.full((3, 3), 150, np.uint8)), "PNG"), "holds the label 150"),
        (deep_png(np.full((3, 3, 1), 256, np.uint16)), "holds the label 256"),
        (png_file(LOW, 0, 4), "has 4-bit gray, which may be class indices or shades"),
        (png_file(LOW % 4, 0, 2), "has 2-bit gray"),
        (png_file(LOW % 2, 0, 1), "has 1-bit gray"),
        (tiff_file(Page(LOW, 1, 4)), "has 4-bit gray"),
        (saved(Image.fromarray(RGB).convert("1"), "BMP"), "has 1-bit gray"),
    ],
)
def test_files_that_are_no_labels(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        decode_labels(data, PATH)


def test_labels_of_class_0_alone_may_have_any_bits() -> None:
    zeros = np.zeros((3, 4, 1), np.uint8)
    for data in (png_file(zeros, 0, 4), png_file(zeros, 0, 1), tiff_file(Page(zeros, 1, 2))):
        assert np.array_equal(decode_labels(data, PATH), zeros[:, :, 0])


@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (64, 200)])
def test_masks_are_1_bit_and_deterministic(shape: tuple[int, int]) -> None:
    mask = np.random.default_rng(shape[0]).random(shape) > 0.5
    data = encode_mask(mask)
    assert data == encode_mask(mask.copy())
    image = Image.open(io.BytesIO(data))
    assert image.mode == "1"
    assert np.array_equal(np.asarray(image), mask)
    assert np.array_equal(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED), np.where(mask, 255, 0))
    assert np.array_equal(decode(data, PATH).pixels[:, :, 0], np.where(mask, 255, 0))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [0, 1, 2, 3, 4])
def test_encode_png_round_trip(channels: int, dtype: type) -> None:
    pixels = DEEP.astype(dtype)
    pixels = pixels[:, :, :channels] if channels else pixels[:, :, 0]
    photo = decode(encode_png(pixels), PATH)
    assert photo.pixels.dtype == dtype
    colours = 3 if channels > 2 else 1
    assert np.array_equal(photo.pixels, pixels.reshape(7, 12, -1)[:, :, :colours])
    assert (photo.alpha is not None) == (channels in (2, 4))
    if photo.alpha is not None:
        assert np.array_equal(photo.alpha, pixels[:, :, colours])
        assert encode_png(photo.pixels, photo.alpha) == encode_png(pixels)


def test_bgr8() -> None:
    assert np.array_equal(bgr8(RGB), RGB[:, :, ::-1])
    assert np.array_equal(bgr8(GRAY[:, :, np.newaxis]), np.dstack([GRAY] * 3))
    deep = np.arange(65536, dtype=np.uint16).reshape(256, 256, 1)
    assert np.array_equal(bgr8(deep)[:, :, 1], np.rint(deep[:, :, 0] / 257))
    for pixels in (RGB, GRAY[:, :, np.newaxis], deep):
        assert bgr8(pixels).flags.c_contiguous
        assert bgr8(pixels).dtype == np.uint8


def test_a_tiff_whose_pages_never_end() -> None:
    """The last page of three names an earlier one as the next."""
    pages = [Page(GRAY[:, :, np.newaxis], 1, 8, subfile=1) for _ in range(3)]
    data = bytearray(tiff_file(*pages))
    first = struct.unpack_from("<I", data, 4)[0]
    second = struct.unpack_from("<I", data, first + 2 + 12 * struct.unpack_from("<H", data, first)[0])[0]
    for next_page in (first, second):
        data[-4:] = struct.pack("<I", next_page)
        assert isinstance(outcome_of(bytes(data)), ImageError)


def test_of_hundreds_of_pages_the_first_is_read() -> None:
    pages = [Page(RGB, 2, 8)] + [Page(GRAY[:1, :1, np.newaxis], 1, 8) for _ in range(299)]
    photo = decode(tiff_file(*pages), PATH)
    assert np.array_equal(photo.pixels, RGB)
    assert photo.further_pages == 255


def test_nothing_is_printed_about_odd_files(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The libraries warn about a damaged profile, and about a strip without a byte count."""
    png = png_file(RGB, 2, 8, chunk(b"iCCP", b"p\0\0nonsense"), chunk(b"gAMA", b"\0"))
    assert np.array_equal(decode(png, PATH).pixels, RGB)
    page = Page(RGB, 2, 8)
    page.tags[278] = (1,)
    assert isinstance(outcome_of(tiff_file(page)), ImageError)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


@pytest.mark.skipif(not (SHARED / "cases").is_dir(), reason="no ../shared/data beside the checkout")
@pytest.mark.parametrize(
    ("case", "told"),
    [
        ("01-tiff16-planar", {}),
        ("03-tiff16-premultiplied", {}),
        ("05-png-large-text", {}),
        ("07-tiff-thumbnail-first", {}),
        ("22-not-an-image", {
            "png_badcrc_text.png": "has a broken checksum in its chunk tEXt",
            "tiff_float32.tif": "has the colour model RGB (32-bit floating point)",
        }),
    ],
)  # fmt: skip
def test_cases_that_came_out_wrong(case: str, told: dict[str, str]) -> None:
    """All files show one photo in their upper 8 bits; gray is a mix of its colours, and alpha hides a part of it."""
    truth = decode((SHARED / "cases/01-tiff16-planar/truth-high-bytes.png").read_bytes(), PATH).pixels.astype(int)
    paths = [path for path in sorted((SHARED / "cases" / case).iterdir()) if path.suffix in SUFFIXES]
    assert paths
    for path in paths:
        result = outcome_of(path.read_bytes())
        if path.name in told:
            assert isinstance(result, ImageError)
            assert result.reason == told[path.name]
            continue
        assert isinstance(result, Photo), result
        assert result.further_pages == (path.name == "tiff_multipage.tif")
        pixels = result.pixels.astype(int) >> (8 if result.pixels.dtype == np.uint16 else 0)
        assert pixels.shape[:2] == truth.shape[:2]
        if "assoc" in path.name:
            share = result.alpha / np.iinfo(result.alpha.dtype).max
            assert np.abs((pixels - truth) * share[:, :, np.newaxis]).max() <= 1
        elif pixels.shape[2] == 3:
            assert np.array_equal(pixels, truth)
        assert (result.alpha is not None) == any(kind in path.name for kind in ("_assoc", "5samples", "grayalpha"))


def test_the_largest_image_is_found_by_headers_alone(tmp_path: Path) -> None:
    pixels = np.zeros((30, 50, 3), np.uint8)
    files = []
    for suffix in ("png", "jpg", "webp", "tiff", "bmp"):
        files.append(tmp_path / f"a.{suffix}")
        Image.fromarray(pixels).save(files[-1])
        pixels = np.pad(pixels, ((0, 10), (0, 0), (0, 0)))
        assert most_pixels(files) == files.index(files[-1]) * 500 + 1500
    half = tmp_path / "half.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 400, 3)).astype(np.uint8)).save(half)
    half.write_bytes(half.read_bytes()[:1000])
    assert most_pixels([*files, half]) == 120_000, "a header is all that is read"
    for length in range(8, 24):
        (tmp_path / "cut.png").write_bytes(half.read_bytes()[:length])
        assert most_pixels([tmp_path / "cut.png"]) == 0, "its size is cut off"
    (tmp_path / "bomb.png").write_bytes(half.read_bytes()[:16] + b"\0\1\0\0" * 2 + half.read_bytes()[24:])
    assert most_pixels([*files, tmp_path / "bomb.png"]) == 3500, "decode refuses 65536x65536 pixels in 1000 bytes"
    (tmp_path / "text.png").write_text("no image")
    assert most_pixels([tmp_path / "text.png", tmp_path / "none.png"]) == most_pixels([]) == 0


def test_the_size_is_found_where_pillow_does_not_open_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a PNG with much text, and of a TIFF with its full picture last and much that is not read."""
    (tmp_path / "text.png").write_bytes(png_file(RGB, 2, 8, chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**21)))))
    assert most_pixels([tmp_path / "text.png"]) == 7 * 12
    small, full = np.zeros((3, 4, 3), np.uint8), np.zeros((900, 800, 3), np.uint8)
    (tmp_path / "a.tif").write_bytes(tiff_file(Page(small, 2, 8, subfile=1), Page(full, 2, 8, rows=900)))
    read = 0

    class Counting(io.FileIO):
        def read(self, size: int = -1) -> bytes:
            nonlocal read
            data = super().read(size)
            read += len(data)
            return data

    monkeypatch.setattr(Path, "open", lambda path, _: Counting(path))
    assert most_pixels([tmp_path / "a.tif"]) == 900 * 800
    assert 0 < read < 10_000


def test_read_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"content")
    assert read_bytes(path) == b"content"
    with pytest.raises(ImageError, match="no such file"):
        read_bytes(tmp_path / "b.png")
    with pytest.raises(TransientError, match="cannot be read"):
        read_bytes(tmp_path)
    assert len(digest(b"content")) == 32
    assert digest(b"content") != digest(b"Content")


@pytest.mark.parametrize("kind", [DesraError, UsageError, LockedError, ImageError, TransientError])
def test_errors_survive_a_pickle(kind: type[DesraError]) -> None:
    error = kind(PATH, "is empty", "copy it again")
    twin = pickle.loads(pickle.dumps(error))
    assert type(twin) is kind
    assert (twin.subject, twin.reason, twin.remedy) == (str(PATH), "is empty", "copy it again")
    assert str(twin) == str(error) == "folder/photo.png: is empty; copy it again"


def test_printable_is_one_line() -> None:
    assert printable("a\nb\x1b[31m é") == "a\\nb\\x1b[31m é"
    assert printable("bad \udcff name") == "bad \\udcff name"


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data beside the checkout")
def test_all_shared_photos_decode() -> None:
    paths = [path for path in sorted((SHARED / "lr").rglob("*")) if path.suffix.lower() in SUFFIXES]
    assert len(paths) == 29
    for path in paths:
        photo = decode(read_bytes(path), path)
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
        assert photo.pixels.shape[1::-1] == upright.size
        assert photo.pixels.dtype in (np.uint8, np.uint16)
