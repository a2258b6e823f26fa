import contextlib
import io
import sys
from pathlib import Path

import imagecodecs
import numpy as np
import pillow_heif
import pillow_jxl  # noqa: F401 registers itself with Pillow
import pytest
import pyvips
import tifffile
from PIL import Image, ImageOps

from desra_core.errors import ImageError
from desra_core.images import further_decoders
from desra_core.images.codec import SUFFIXES, decode, image_size, most_pixels
from desra_core.images.encoding import read_origin
from desra_core.images.scanning import image_files, kinds_in_words
from tests.desra_core.images.test_colour import DEEP, PATH, RGB, saved
from tests.desra_core.images.test_encoding import XMP, told
from tests.profiles import P3, delta_e

RGBA = np.dstack([RGB, RGB[::-1, :, 0]])
LOSSLESS = {"quality": -1, "chroma": 444, "matrix_coefficients": 0}


def heic(samples: np.ndarray, **options: object) -> bytes:
    """Encode 8 bits, or the first 10 of 16."""
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[samples.shape[2]] + (";16" if samples.dtype == np.uint16 else "")
    sink = io.BytesIO()
    data = np.ascontiguousarray(samples).tobytes()
    pillow_heif.from_bytes(mode=mode, size=samples.shape[1::-1], data=data).save(sink, **(LOSSLESS | options))
    return sink.getvalue()


def of_10_bits(samples: np.ndarray, bits: int = 10) -> np.ndarray:
    """What is left of 16 bits."""
    kept = samples.astype(int) >> (16 - bits)
    return ((kept * 65535 + (2**bits - 1) // 2) // (2**bits - 1)).astype(np.uint16)


def dng(cfa: np.ndarray, orientation: int = 1) -> bytes:
    """Make the raw file of a camera whose sensor sees sRGB's colours."""
    matrix = (32405, -15371, -4985, -9693, 18760, 416, 556, -2040, 10572)
    tags = [
        (50706, "B", 4, (1, 4, 0, 0), True), (50707, "B", 4, (1, 1, 0, 0), True), (50708, "s", 0, "Made Camera", True),
        (271, "s", 0, "Made", True), (272, "s", 0, "Camera", True), (274, "H", 1, orientation, True),
        (33421, "H", 2, (2, 2), True), (33422, "B", 4, (0, 1, 1, 2), True), (50778, "H", 1, 21, True),
        (50721, "2i", 9, sum(((value, 10000) for value in matrix), ()), True),
        (50728, "2I", 3, (1, 1, 1, 1, 1, 1), True), (50717, "I", 1, 65535, True),
    ]  # fmt: skip
    sink = io.BytesIO()
    tifffile.imwrite(sink, cfa, photometric=32803, metadata=None, software=False, extratags=tags)
    return sink.getvalue()


@pytest.mark.parametrize("samples", [RGB, RGBA, RGB[:, :, :1], DEEP, np.dstack([DEEP, DEEP[:, :, 0]])])
def test_heic_keeps_depth_and_alpha(samples: np.ndarray) -> None:
    data = heic(samples)
    photo = decode(data, PATH)
    whole = photo.pixels if photo.alpha is None else np.dstack([photo.pixels, photo.alpha])
    assert np.array_equal(whole, of_10_bits(samples) if samples.dtype == np.uint16 else samples)
    assert image_size(data, PATH) == samples.shape[:2]
    by_pillow = np.asarray(pillow_heif.open_heif(io.BytesIO(data)))
    eight = (whole.astype(int) >> 8 if samples.dtype == np.uint16 else whole).squeeze()
    assert np.abs(by_pillow.squeeze().astype(int) - eight).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_orientation_that_heic_tells_twice_is_applied_once(orientation: int) -> None:
    """In the file's own boxes and in EXIF, as phones write it; AVIF is alike."""
    exif = Image.Exif()
    exif[274], exif[271], exif[282], exif[283], exif[296] = orientation, "Maker", 300.0, 200.0, 2
    lying = Image.open(io.BytesIO(saved(Image.fromarray(RGB), "PNG", exif=exif)))
    upright = np.asarray(ImageOps.exif_transpose(lying))
    sink, xmp = io.BytesIO(), XMP.replace(b'Orientation="6"', b'Orientation="%d"' % orientation)
    pillow_heif.from_pillow(Image.fromarray(RGB)).save(sink, **LOSSLESS, exif=exif.tobytes(), xmp=xmp)
    data = sink.getvalue()
    assert np.array_equal(decode(data, PATH).pixels, upright)
    assert image_size(data, PATH) == upright.shape[:2]
    origin = read_origin(data, PATH)
    assert origin.resolution == (300, 200)
    assert b'tiff:Orientation="1"' in origin.xmp
    again = saved(Image.fromarray(RGB), "JPEG", exif=b"Exif\0\0" + origin.exif)
    assert told(again)[0]["Exif.Image.Make"] == "Maker"
    assert told(again)[0]["Exif.Image.Orientation"] == "1"
    avif = saved(Image.fromarray(RGB), "AVIF", quality=100, subsampling="4:4:4", exif=exif)
    assert np.abs(decode(avif, PATH).pixels.astype(int) - upright).max() <= 4
    assert image_size(avif, PATH) == upright.shape[:2]
    assert np.abs(pyvips.Image.new_from_buffer(avif, "").autorot().numpy().astype(int) - upright).max() <= 4


@pytest.mark.parametrize("bits", [8, 10, 12])
def test_avif_keeps_depth_and_alpha(bits: int) -> None:
    for samples in (DEEP, np.dstack([DEEP, DEEP[:, :, 0]]), DEEP[:, :, :1]):
        stored = (samples >> 8).astype(np.uint8) if bits == 8 else samples >> (16 - bits)
        data = imagecodecs.avif_encode(stored.squeeze(), level=100, bitspersample=bits)
        photo = decode(data, PATH)
        whole = photo.pixels if photo.alpha is None else np.dstack([photo.pixels, photo.alpha])
        assert np.array_equal(whole, stored if bits == 8 else of_10_bits(samples, bits))
        assert image_size(data, PATH) == samples.shape[:2]
        assert photo.profile is None


def test_colours_that_are_named_by_number() -> None:
    truth = decode(saved(Image.fromarray(RGB), "PNG", icc_profile=P3), PATH).pixels
    named = imagecodecs.avif_encode(RGB, level=100, primaries=12, transfer=13)
    for data in (named, heic(RGB, color_primaries=12, transfer_characteristics=13)):
        photo = decode(data, PATH)
        assert photo.profile == "converted"
        assert delta_e(photo.pixels, truth) < 1
    assert decode(heic(RGB, color_primaries=1, transfer_characteristics=13), PATH).profile is None
    for curve, name in ((16, "PQ"), (18, "HLG")):
        for data in (heic(DEEP, color_primaries=9, transfer_characteristics=curve),
                     imagecodecs.avif_encode(RGB, level=90, primaries=9, transfer=curve)):  # fmt: skip
            with pytest.raises(ImageError, match=rf"is HDR \({name}\), whose range does not fit into sRGB; export it"):
                decode(data, PATH)


def test_heic_with_a_profile() -> None:
    sink = io.BytesIO()
    file = pillow_heif.from_pillow(Image.fromarray(RGB))
    file[0].info["icc_profile"] = P3
    file.save(sink, **LOSSLESS)
    photo = decode(sink.getvalue(), PATH)
    assert photo.profile == "converted"
    assert np.array_equal(photo.pixels, decode(saved(Image.fromarray(RGB), "PNG", icc_profile=P3), PATH).pixels)
    assert read_origin(sink.getvalue(), PATH).profile == P3


def test_the_first_of_several_pictures() -> None:
    first, *others = (Image.fromarray(samples) for samples in (RGB, RGB[::-1], RGB[:, ::-1]))
    avif = saved(first, "AVIF", save_all=True, append_images=others, quality=95)
    file, sink = pillow_heif.from_pillow(first), io.BytesIO()
    for other in others:
        file.add_from_pillow(other)
    file.save(sink, quality=95, primary_index=0)
    for data in (avif, sink.getvalue()):
        photo = decode(data, PATH)
        assert photo.pixels.shape == RGB.shape
        assert np.abs(photo.pixels.astype(int) - RGB).mean() < 15


@pytest.mark.parametrize("samples", [RGB, RGBA, RGB[:, :, :1]])
def test_jpeg_xl(samples: np.ndarray) -> None:
    exif = Image.Exif()
    exif[271], exif[282], exif[283], exif[296] = "Maker", 300.0, 200.0, 2
    image = Image.fromarray(samples.squeeze())
    data = saved(image, "JXL", lossless=True, exif=exif.tobytes(), xmp=XMP)
    photo = decode(data, PATH)
    whole = photo.pixels if photo.alpha is None else np.dstack([photo.pixels, photo.alpha])
    assert np.array_equal(whole, samples)
    assert photo.profile == "srgb"
    origin = read_origin(data, PATH)
    assert origin.resolution == (300, 200)
    assert b'xmp:Rating="4"' in origin.xmp
    assert b"Maker" in origin.exif


def test_jpeg_xl_of_16_bits_and_of_a_jpeg_with_a_profile(tmp_path: Path) -> None:
    data = imagecodecs.jpegxl_encode(DEEP, lossless=True)  # which says that its values are linear
    photo = decode(data, PATH)
    assert photo.profile == "converted"
    linear = DEEP / 65535
    truth = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    assert np.abs(photo.pixels / 65535 - truth).max() < 0.004
    file = tmp_path / "photo.jpg"
    Image.fromarray(RGB).save(file, quality=95, icc_profile=P3)
    with Image.open(file) as image:
        packed = saved(image, "JXL", lossless_jpeg=True)
    photo = decode(packed, PATH)
    assert photo.profile == "converted"
    assert np.abs(photo.pixels.astype(int) - decode(file.read_bytes(), file).pixels).mean() < 3
    with pytest.raises(ImageError, match="has the colour model JPEG XL \\(float32\\)"):
        decode(imagecodecs.jpegxl_encode(DEEP.astype(np.float32) / 65535), PATH)


@pytest.mark.parametrize("size", [(64, 64), (40, 60), (1, 1), (2000, 3000), (1080, 1920), (17, 12345), (3, 90_000)])
def test_the_size_of_a_jpeg_xl_is_in_its_header(size: tuple[int, int], tmp_path: Path) -> None:
    data = imagecodecs.jpegxl_encode(np.zeros((*size, 1), np.uint8), effort=1)
    assert image_size(data, PATH) == size
    (tmp_path / "photo.jxl").write_bytes(data)
    assert most_pixels([tmp_path / "photo.jxl"]) == size[0] * size[1]
    with pytest.raises(ImageError, match=r"more than fit into a worker's memory|claims"):
        decode(data, PATH, max_pixels=size[0] * size[1] - 1)


def test_camera_raw(tmp_path: Path) -> None:
    path = tmp_path / "photo.DNG"
    shades = np.full((64, 96), 2000, np.uint16)
    shades[:32] = 9000
    data = dng(shades)
    photo = decode(data, path)
    assert photo.pixels.shape == (64, 96, 3)
    assert photo.pixels.dtype == np.uint16
    assert np.ptp(photo.pixels[[5, -5]], axis=2).max() < 1500, "gray"
    assert photo.pixels[5, 5, 0] > 1.5 * photo.pixels[-5, -5, 0]
    for orientation, turns in ((3, 2), (6, 3), (8, 1)):
        turned = dng(shades, orientation)
        assert np.array_equal(decode(turned, path).pixels, np.rot90(photo.pixels, turns))
        assert image_size(turned, path) == np.rot90(photo.pixels, turns).shape[:2]
    assert np.array_equal(decode(data, path).pixels, photo.pixels), "the same each time"
    path.write_bytes(data)
    assert most_pixels([path]) == 64 * 96
    assert b"Camera" in read_origin(data, path).exif
    for damaged in (b"nonsense", data[:200]):
        with pytest.raises(ImageError, match="is no camera raw file that is read"):
            decode(damaged, path)
    with pytest.raises(ImageError, match="is truncated or damaged"):
        decode(data[:-4000], path)
    with pytest.raises(ImageError, match="more than fit into a worker's memory"):
        decode(data, path, max_pixels=64 * 96 - 1)


def test_most_pixels_of_heic_and_avif(tmp_path: Path) -> None:
    (tmp_path / "photo.heic").write_bytes(heic(RGB))
    assert most_pixels([tmp_path / "photo.heic"]) >= RGB.shape[0] * RGB.shape[1]
    (tmp_path / "photo.avif").write_bytes(imagecodecs.avif_encode(RGB))
    assert most_pixels([tmp_path / "photo.avif"]) == RGB.shape[0] * RGB.shape[1]


@pytest.fixture
def without_packages(monkeypatch: pytest.MonkeyPatch):
    for package in ("pillow_heif", "pillow_jxl", "rawpy"):
        monkeypatch.setitem(sys.modules, package, None)
    further_decoders._has.cache_clear()
    yield
    monkeypatch.undo()
    further_decoders._has.cache_clear()


def test_without_its_package_a_file_is_counted_and_one_line_names_the_extra(
    tmp_path: Path, without_packages: None
) -> None:
    files = {"a.heic": heic(RGB), "b.HEIC": heic(RGB), "c.jxl": imagecodecs.jpegxl_encode(RGB), "d.nef": b"raw"}
    for name, data in (files | {"e.avif": imagecodecs.avif_encode(RGB)}).items():
        (tmp_path / name).write_bytes(data)
    found = image_files(tmp_path)
    assert found.files["name"].to_pylist() == ["e"]
    said = "(pip install 'desra[formats]' to read them)"
    assert kinds_in_words(found.passed_over) == f"2 .heic {said}, 1 .jxl {said}, 1 .nef {said}"
    for name, kind in (("a.heic", "HEIC"), ("c.jxl", "JPEG XL"), ("d.nef", "camera raw")):
        with pytest.raises(ImageError) as caught:
            decode(files[name], Path(name))
        assert str(caught.value) == f"{name}: is {kind}, which needs another package; pip install 'desra[formats]'"
    assert not further_decoders.readable_now()


def test_with_its_package_a_file_is_found(tmp_path: Path) -> None:
    for suffix in (".heic", ".jxl", ".avif", ".cr3"):
        assert suffix in SUFFIXES
        (tmp_path / f"photo{suffix}").write_bytes(b"any")
    assert image_files(tmp_path).files.num_rows == 4
    kinds = ("HEIC", "JPEG XL", "camera raw")
    assert further_decoders.readable_now() == [f"is {kind}, which needs another package" for kind in kinds]
    for suffix in (".heic", ".jxl", ".avif", ".cr3"):
        with pytest.raises(ImageError):
            decode(b"any", tmp_path / f"photo{suffix}")


@pytest.mark.parametrize(("name", "data"), [
    ("a.heic", heic(RGB)), ("a.avif", imagecodecs.avif_encode(RGB, level=90)),
    ("a.jxl", imagecodecs.jpegxl_encode(RGB)), ("a.dng", dng(DEEP[:, :, 0])),
])  # fmt: skip
def test_damaged_files_end_in_an_image_or_an_image_error(name: str, data: bytes) -> None:
    rng = np.random.default_rng(3)
    for _ in range(60):
        damaged = bytearray(data)
        for place in rng.integers(0, min(len(data), 700), 3):
            damaged[place] = rng.integers(256)
        for tried in (bytes(damaged), data[: rng.integers(len(data))]):
            with contextlib.suppress(ImageError):
                photo = decode(tried, Path(name), max_pixels=2**20)
                assert photo.pixels.dtype in (np.uint8, np.uint16)
                read_origin(tried, Path(name))
