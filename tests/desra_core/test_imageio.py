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
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from desra_core.errors import DesraError, ImageError, LockedError, TransientError, UsageError, printable
from desra_core.imageio import SUFFIXES, Photo, bgr8, decode, decode_labels, digest, encode_mask, encode_png, read_bytes

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
PATH = Path("folder/photo.png")
RNG = np.random.default_rng(7)
GRAY = RNG.integers(0, 256, (7, 12), dtype=np.uint8)
RGB = RNG.integers(0, 256, (7, 12, 3), dtype=np.uint8)
RGBA = RNG.integers(0, 256, (7, 12, 4), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (7, 12, 4), dtype=np.uint16)
PHOTO = cv2.GaussianBlur(RNG.integers(0, 256, (90, 120, 3)).astype(np.float32), (0, 0), 2).astype(np.uint8)
COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}


def saved(image: Image.Image, kind: str, **options) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int, depth: int, colour_type: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)


def deep_png(pixels: np.ndarray, *chunks: bytes) -> bytes:
    """A 16-bit PNG written without OpenCV, which decodes it."""
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    body = b"".join(chunks) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return png_header(width, height, 16, COLOUR_TYPES[channels]) + body


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def bitmap(masks: tuple[int, int, int]) -> bytes:
    """A 16-bit-per-pixel BMP of 4x4 pixels, as old tools write them: magenta in RGB565."""
    pixels = b"\x1f\xf8" * 16
    offset = 14 + 40 + 12
    header = b"BM" + struct.pack("<IHHI", offset + len(pixels), 0, 0, offset)
    info = struct.pack("<IiiHHIIiiII", 40, 4, 4, 1, 16, 3, len(pixels), 0, 0, 0, 0)
    return header + info + struct.pack("<III", *masks) + pixels


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
    assert not photo.has_icc_profile


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
    # OpenCV gives gray with alpha as three equal channels, which compares like one.
    assert (photo.pixels == DEEP[:, :, :colours]).all()
    if colours < channels:
        assert np.array_equal(photo.alpha, DEEP[:, :, colours])
    else:
        assert photo.alpha is None


def test_16_bit_png_with_a_transparent_colour() -> None:
    transparent = chunk(b"tRNS", struct.pack(">HHH", 1, 2, 3))
    assert np.array_equal(decode(deep_png(DEEP[:, :, :3], transparent), PATH).pixels, DEEP[:, :, :3])


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
    """Pillow turns 16-bit gray; colour it would cut to 8 bits, so its channels are held against turned gray ones."""
    turned = []
    for channel in range(3):
        gray = saved(Image.fromarray(DEEP[:, :, channel]), kind, exif=orientation(value))
        turned.append(np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(gray)))))
        assert np.array_equal(decode(gray, PATH).pixels[:, :, 0], turned[-1])
    if kind == "PNG":
        exif = orientation(value).tobytes().removeprefix(b"Exif\0\0")
        colour = decode(deep_png(DEEP[:, :, :3], chunk(b"eXIf", exif)), PATH).pixels
        assert np.array_equal(colour, np.dstack(turned))


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_meaningless_orientation_is_ignored(value: int) -> None:
    data = saved(Image.fromarray(RGB), "PNG", exif=orientation(value))
    assert np.array_equal(decode(data, PATH).pixels, RGB)


def test_damaged_exif_of_a_sound_image_is_ignored() -> None:
    for exif in (b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0garbage garbage"):
        data = saved(Image.fromarray(RGB), "PNG") if not exif else saved(Image.fromarray(RGB), "PNG", exif=exif)
        assert np.array_equal(decode(data, PATH).pixels, RGB)


def test_icc_profile_is_recorded() -> None:
    assert decode(saved(Image.fromarray(RGB), "PNG", icc_profile=b"profile"), PATH).has_icc_profile


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
    "tiff": saved(Image.fromarray(PHOTO), "TIFF"),
    "deflated tiff": saved(Image.fromarray(PHOTO), "TIFF", compression="tiff_adobe_deflate"),
    "bmp": saved(Image.fromarray(PHOTO), "BMP"),
    "webp": saved(Image.fromarray(PHOTO), "WEBP"),
}


@pytest.mark.parametrize("kind", WHOLE)
@settings(deadline=None, max_examples=100)
@given(st.data())
def test_a_truncated_file_never_gives_a_partial_image(kind: str, data: st.DataObject) -> None:
    """What is cut may be a trailer; then the image is the whole one."""
    whole = WHOLE[kind]
    length = data.draw(st.integers(0, len(whole) - 1) | st.integers(len(whole) - 40, len(whole) - 1))
    result = outcome_of(whole[:length])
    if isinstance(result, ImageError):
        assert str(result).startswith(f"{PATH}: ")
        assert "\n" not in str(result)
    else:
        assert np.array_equal(result.pixels, decode(whole, PATH).pixels)


@pytest.mark.parametrize("kind", WHOLE)
@settings(deadline=None, max_examples=100)
@given(st.data())
def test_damage_gives_an_image_or_an_image_error(kind: str, data: st.DataObject) -> None:
    damaged = bytearray(WHOLE[kind])
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, min(len(damaged) - 1, 400)))] = data.draw(st.integers(0, 255))
    result = outcome_of(bytes(damaged))
    assert isinstance(result, ImageError) or result.pixels.shape[2] in (1, 3)


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
    ],
)
def test_what_is_refused(data: bytes, reason: str) -> None:
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
        (deep_png(np.full((3, 3, 1), 256, np.uint16)), "holds the label 256"),
    ],
)
def test_labels_that_are_none(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        decode_labels(data, PATH)


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
@pytest.mark.parametrize("channels", [0, 1, 3, 4])
def test_encode_png_round_trip(channels: int, dtype: type) -> None:
    pixels = DEEP.astype(dtype)
    pixels = pixels[:, :, :channels] if channels else pixels[:, :, 0]
    photo = decode(encode_png(pixels), PATH)
    assert photo.pixels.dtype == dtype
    assert np.array_equal(photo.pixels, pixels.reshape(7, 12, -1)[:, :, :3])
    assert (photo.alpha is not None) == (channels == 4)
    if photo.alpha is not None:
        assert np.array_equal(photo.alpha, pixels[:, :, 3])


def test_bgr8() -> None:
    assert np.array_equal(bgr8(RGB), RGB[:, :, ::-1])
    assert np.array_equal(bgr8(GRAY[:, :, np.newaxis]), np.dstack([GRAY] * 3))
    deep = np.arange(65536, dtype=np.uint16).reshape(256, 256, 1)
    assert np.array_equal(bgr8(deep)[:, :, 1], np.rint(deep[:, :, 0] / 257))
    for pixels in (RGB, GRAY[:, :, np.newaxis], deep):
        assert bgr8(pixels).flags.c_contiguous
        assert bgr8(pixels).dtype == np.uint8


def test_read_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"content")
    assert read_bytes(path) == b"content"
    with pytest.raises(ImageError, match="has vanished"):
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
