import io
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import pyvips
import tifffile
from PIL import Image, ImageCms
from skimage.color import xyz2rgb

from desra_core.errors import ImageError
from desra_core.images import colour
from desra_core.images.codec import decode, decode_mask, read_image
from tests.picture_files import chunk, png_file
from tests.profiles import ADOBE, CMYK, GRAY, P3, VIPS_SRGB, delta_e

PATH = Path("folder/photo")
RNG = np.random.default_rng(5)
RGB = cv2.resize(RNG.integers(0, 256, (9, 11, 3), np.uint8), (60, 44), interpolation=cv2.INTER_CUBIC)
DEEP = cv2.resize(RNG.integers(0, 65536, (9, 11, 3)).astype(np.uint16), (60, 44), interpolation=cv2.INTER_CUBIC)
INKS = np.ascontiguousarray(np.dstack([RGB, RGB[::-1, :, :1] // 3]))
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
PROFILES = {"p3": P3, "adobe": ADOBE}


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def by_pillow(pixels: np.ndarray, profile: bytes) -> np.ndarray:
    """Convert 8-bit pixels to sRGB by Pillow's LittleCMS, without tables that it would interpolate."""
    mode = {1: "L", 3: "RGB", 4: "CMYK"}[pixels.shape[2]]
    transform = ImageCms.ImageCmsTransform(
        ImageCms.ImageCmsProfile(io.BytesIO(profile)), SRGB, mode, "RGB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC, flags=ImageCms.Flags.BLACKPOINTCOMPENSATION | ImageCms.Flags.NOOPTIMIZE,
    )  # fmt: skip
    image = Image.frombytes(mode, (pixels.shape[1], pixels.shape[0]), np.ascontiguousarray(pixels).tobytes())
    return np.asarray(transform.apply(image))


def deep_tiff(samples: np.ndarray, profile: bytes | None, photometric: str = "rgb", **options: object) -> bytes:
    sink = io.BytesIO()
    tifffile.imwrite(sink, samples, photometric=photometric, iccprofile=profile, metadata=None, **options)
    return sink.getvalue()


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
def test_photos_of_8_bits_become_srgb(kind: str, profile: bytes) -> None:
    data = saved(Image.fromarray(RGB), kind, icc_profile=profile, **({"lossless": True} if kind == "WEBP" else {}))
    stored = decode(data, PATH, as_stored=True)
    assert stored.profile == "stored"
    photo = decode(data, PATH)
    assert photo.profile == "converted"
    assert photo.pixels.dtype == np.uint8
    assert delta_e(photo.pixels, by_pillow(stored.pixels, profile)) < 1
    assert delta_e(photo.pixels, stored.pixels) > 5, "the profile matters"


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_photos_of_16_bits_become_srgb(profile: bytes) -> None:
    png = png_file(DEEP, 2, 16, chunk(b"iCCP", b"p\0\0" + zlib.compress(profile)))
    for data in (png, deep_tiff(DEEP, profile), deep_tiff(DEEP, profile, compression="zlib", byteorder=">")):
        photo = decode(data, PATH)
        assert photo.profile == "converted"
        assert photo.pixels.dtype == np.uint16
        assert np.array_equal(decode(data, PATH, as_stored=True).pixels, DEEP)
        # Pillow's has 8 bits, so the levels that it can see are compared.
        exact = DEEP // 257 * 257
        of_levels = colour.to_srgb(exact, profile)
        assert delta_e(of_levels, by_pillow((exact // 257).astype(np.uint8), profile)) < 1
        assert np.array_equal(photo.pixels, colour.to_srgb(DEEP, profile))
        assert np.abs(photo.pixels.astype(int) - of_levels).max() < 6000, "16 bits are near their 8"


def test_adobe_rgb_by_the_numbers_of_its_standard() -> None:
    """Of colours within sRGB: matrix and gamma of Adobe RGB (1998), and scikit-image's sRGB."""
    matrix = [[0.57667, 0.18556, 0.18823], [0.29734, 0.62736, 0.07529], [0.02703, 0.07069, 0.99134]]
    samples = (16000 + DEEP // 2).astype(np.uint16)
    linear = (samples / 65535) ** (563 / 256)
    truth = xyz2rgb(linear @ np.array(matrix).T)
    within = ((truth > 0.001) & (truth < 0.999)).all(axis=2)
    assert within.mean() > 0.5
    photo = colour.to_srgb(samples, ADOBE)
    assert np.abs(photo / 65535 - truth)[within].max() < 0.0015


def test_gray_photos() -> None:
    gray = RGB[:, :, :1]
    data = saved(Image.fromarray(gray[:, :, 0]), "TIFF", icc_profile=GRAY)
    photo = decode(data, PATH)
    assert photo.profile == "converted"
    assert photo.pixels.shape == gray.shape
    assert delta_e(photo.pixels, by_pillow(gray, GRAY)) < 1
    deep = DEEP[:, :, :1]
    shades = decode(deep_tiff(deep[:, :, 0], GRAY, "minisblack"), PATH).pixels
    truth = (deep / 65535) ** 1.8
    truth = np.where(truth <= 0.0031308, truth * 12.92, 1.055 * truth ** (1 / 2.4) - 0.055)
    assert np.abs(shades / 65535 - truth).max() < 0.002
    # A profile for colours may describe gray, too.
    for profile, became in ((ADOBE, "converted"), (P3, "srgb"), (VIPS_SRGB, "srgb")):
        photo = decode(saved(Image.fromarray(gray[:, :, 0]), "JPEG", icc_profile=profile, quality=100), PATH)
        assert photo.profile == became
        assert photo.pixels.shape == gray.shape


def test_cmyk_with_a_profile() -> None:
    image = Image.frombytes("CMYK", (60, 44), INKS.tobytes())
    jpeg = saved(image, "JPEG", icc_profile=CMYK, quality=95)
    tiff = saved(image, "TIFF", icc_profile=CMYK)
    for data in (tiff, deep_tiff(INKS, CMYK, "separated"), deep_tiff(INKS, CMYK, "separated", compression="zlib")):
        photo = decode(data, PATH)
        assert photo.profile == "converted"
        assert delta_e(photo.pixels, by_pillow(INKS, CMYK)) < 1
    inks = np.asarray(Image.open(io.BytesIO(jpeg)))
    photo = decode(jpeg, PATH)
    assert delta_e(photo.pixels, by_pillow(inks, CMYK)) < 1
    by_vips = pyvips.Image.new_from_buffer(jpeg, "").icc_transform(
        "srgb", intent="relative", black_point_compensation=True
    )
    assert np.percentile(np.abs(by_vips.numpy().astype(int) - photo.pixels), 99) <= 6, "not inverted"
    deep = decode(deep_tiff(INKS.astype(np.uint16) * 257, CMYK, "separated"), PATH)
    assert deep.pixels.dtype == np.uint16
    assert delta_e(deep.pixels, by_pillow(INKS, CMYK)) < 1
    alpha = np.dstack([INKS, RGB[:, :, 1]])
    with_alpha = decode(deep_tiff(alpha, CMYK, "separated", extrasamples=["unassalpha"], planarconfig="contig"), PATH)
    assert np.array_equal(with_alpha.alpha, RGB[:, :, 1])
    assert np.array_equal(with_alpha.pixels, decode(tiff, PATH).pixels)


def test_cmyk_jpegs_of_other_programs_are_not_inverted() -> None:
    jpeg = saved(Image.frombytes("CMYK", (60, 44), INKS.tobytes()), "JPEG", icc_profile=CMYK, quality=95)
    adobe = jpeg.index(b"\xff\xeeadobe".replace(b"adobe", struct.pack(">H", 14) + b"Adobe"))
    plain = jpeg[:adobe] + jpeg[adobe + 16 :]
    inverted = 255 - np.asarray(Image.open(io.BytesIO(plain)))
    assert np.array_equal(decode(plain, PATH).pixels, colour.to_srgb(inverted, CMYK))


@pytest.mark.parametrize("profile", [None, b"", b"nonsense" * 40, CMYK[:5000], P3, GRAY])
def test_cmyk_without_its_profile_is_refused(profile: bytes | None) -> None:
    options = {"icc_profile": profile} if profile else {}
    image = Image.frombytes("CMYK", (60, 44), INKS.tobytes())
    for data in (saved(image, "JPEG", **options), saved(image, "TIFF", **options)):
        with pytest.raises(ImageError, match="has the colour model CMYK and no profile of its inks") as caught:
            decode(data, PATH)
        assert str(caught.value).endswith("; convert it to RGB or gray")
    with pytest.raises(ImageError, match="has the colour model CMYK;"):
        decode(saved(image, "JPEG", icc_profile=CMYK), PATH, as_stored=True)


def test_srgb_by_effect_changes_no_bit() -> None:
    for profile in (VIPS_SRGB, colour.SRGB, SRGB.tobytes()):
        photo = decode(saved(Image.fromarray(RGB), "PNG", icc_profile=profile), PATH)
        assert photo.profile == "srgb"
        assert np.array_equal(photo.pixels, RGB)
        assert np.array_equal(decode(deep_tiff(DEEP, profile), PATH).pixels, DEEP)
    assert colour.treatment(colour.GRAY, 1) == "srgb"


@pytest.mark.parametrize("profile", [b"", b"x", b"profile" * 50, P3[:200], P3[:128] + b"\xff" * 400, CMYK, GRAY])
def test_profiles_that_cannot_be_used_are_counted_and_change_nothing(profile: bytes) -> None:
    data = png_file(RGB, 2, 8, chunk(b"iCCP", b"p\0\0" + zlib.compress(profile)))
    photo = decode(data, PATH)
    assert photo.profile == "unusable"
    assert np.array_equal(photo.pixels, RGB)


def test_a_deflated_bomb_is_no_profile() -> None:
    bomb = zlib.compress(P3 + bytes(2**25), 9)
    photo = decode(png_file(RGB, 2, 8, chunk(b"iCCP", b"p\0\0" + bomb)), PATH)
    assert photo.profile == "unusable"
    assert np.array_equal(photo.pixels, RGB)


def test_alpha_and_masks_have_no_colours(tmp_path: Path) -> None:
    rgba = np.dstack([RGB, RGB[::-1, :, 0]])
    photo = decode(saved(Image.fromarray(rgba), "PNG", icc_profile=ADOBE), PATH)
    assert np.array_equal(photo.alpha, rgba[:, :, 3])
    assert np.array_equal(photo.pixels, colour.to_srgb(RGB, ADOBE))
    file = tmp_path / "photo.png"
    file.write_bytes(saved(Image.fromarray(RGB), "PNG", icc_profile=ADOBE))
    assert np.array_equal(read_image(file), photo.pixels)
    mask = saved(Image.fromarray((RGB[:, :, 0] > 99).astype(np.uint8)), "PNG", icc_profile=GRAY)
    assert np.array_equal(decode_mask(mask, PATH), RGB[:, :, 0] > 99)


def test_strips_change_nothing() -> None:
    tall = np.tile(DEEP, (500, 1, 1))
    assert np.array_equal(colour.to_srgb(tall, P3), np.tile(colour.to_srgb(DEEP, P3), (500, 1, 1)))
    small = np.tile(RGB, (900, 1, 1))
    assert np.array_equal(colour.to_srgb(small, P3)[-44:], colour.to_srgb(RGB, P3))


def test_colours_come_back() -> None:
    for profile in (P3, ADOBE):
        assert np.abs(colour.to_srgb(colour.from_srgb(DEEP, profile), profile).astype(int) - DEEP).max() < 257
    gray = DEEP[:, :, :1]
    assert np.abs(colour.to_srgb(colour.from_srgb(gray, GRAY), GRAY).astype(int) - gray).max() < 257
    muted = (100 + RGB // 5).astype(np.uint8)
    assert delta_e(colour.to_srgb(colour.from_srgb(muted, CMYK), CMYK), muted) < 6
