import io
import itertools
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyexiv2
import pytest
import pyvips
import tifffile
from PIL import Image

from desra_core.errors import ArgumentError, ImageError
from desra_core.images import colour
from desra_core.images.codec import decode, encode_png
from desra_core.images.encoding import FORMATS, Origin, encode_picture, read_origin, suffix_of
from tests.desra_core.images.test_colour import DEEP, INKS, PATH, RGB, deep_tiff, saved
from tests.profiles import ADOBE, CMYK, GRAY, P3, VIPS_SRGB, delta_e

ALPHA = np.ascontiguousarray(np.broadcast_to(np.linspace(0, 255, 60).astype(np.uint8), (44, 60)))
NOTHING = Origin(None, None, None, None)
XMP = (
    b'<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
    b'<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
    b'xmlns:tiff="http://ns.adobe.com/tiff/1.0/" xmlns:exif="http://ns.adobe.com/exif/1.0/" '
    b'xmlns:xmp="http://ns.adobe.com/xap/1.0/" tiff:Orientation="6" exif:PixelXDimension="60" tiff:ImageWidth=\'60\' '
    b'xmp:Rating="4"><exif:PixelYDimension>44</exif:PixelYDimension><tiff:ImageLength>44</tiff:ImageLength>'
    b'</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
)
TOLD = {
    "Exif.Image.Make": "Maker", "Exif.Image.Model": "Model 1", "Exif.Image.Copyright": "(c) someone",
    "Exif.Image.DateTime": "2020:02:03 04:05:06", "Exif.Photo.DateTimeOriginal": "2020:02:03 04:05:06",
    "Exif.Photo.ExposureTime": "1/125", "Exif.Photo.UserComment": "charset=Ascii hello",
    "Exif.Photo.ExifVersion": "48 50 51 50", "Exif.Photo.ExposureBiasValue": "-1/3",
    "Exif.GPSInfo.GPSLatitudeRef": "N", "Exif.GPSInfo.GPSLatitude": "48/1 8/1 29/2",
    "Exif.Iop.InteroperabilityIndex": "R03",
}  # fmt: skip
STRUCTURE = {
    "Exif.Image.Orientation": "6", "Exif.Photo.PixelXDimension": "60", "Exif.Photo.PixelYDimension": "44",
    "Exif.Photo.ColorSpace": "65535",
}  # fmt: skip


def told(data: bytes) -> tuple[dict[str, str], dict[str, str], bytes]:
    """Read EXIF, XMP and profile with Exiv2."""
    with pyexiv2.ImageData(data) as image:
        return image.read_exif(), image.read_xmp(), image.read_icc()


def described(kind: str = "JPEG", *, profile: bytes | None = None) -> bytes:
    """Make a photo that lies on its side, with metadata that Exiv2 writes."""
    options = {"icc_profile": profile} if profile else {}
    data = saved(Image.fromarray(RGB), kind, dpi=(300, 200), **options)
    with pyexiv2.ImageData(data) as image:
        image.modify_exif(TOLD | STRUCTURE)
        if kind != "TIFF":
            image.modify_raw_xmp(XMP.decode())
        image.modify_thumbnail(saved(Image.fromarray(RGB[:8, :8]), "JPEG"))
        return image.get_bytes()


@pytest.mark.parametrize("source", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("kind", FORMATS)
def test_metadata_come_along(source: str, kind: str) -> None:
    data = described(source, profile=P3)
    origin = read_origin(data, PATH)
    photo = decode(data, PATH)
    assert photo.pixels.shape[:2] == (60, 44)
    made = encode_picture(photo.pixels, None, kind, quality=90, origin=origin, colour="source")
    exif, xmp, profile = told(made)
    before = told(data)[0]
    for tag in TOLD:
        assert exif[tag] == before[tag], tag
    assert exif.get("Exif.Image.Orientation", "1") == "1"
    assert not [tag for tag in exif if "Thumbnail" in tag or "PixelXDimension" in tag or "PixelYDimension" in tag]
    assert exif["Exif.Photo.ColorSpace"] == "65535"
    assert profile == P3
    if source != "TIFF":
        assert xmp == {"Xmp.tiff.Orientation": "1", "Xmp.xmp.Rating": "4"}
    assert decode(made, PATH).pixels.shape == photo.pixels.shape, "upright, and not turned again"
    if source != "WEBP":  # a WebP has its resolution in EXIF alone, which Pillow does not write for itself
        assert float(Fraction(exif["Exif.Image.XResolution"])) == pytest.approx(200, abs=0.01), "its sides are swapped"
        if kind in ("png", "jpeg", "tiff"):
            image = pyvips.Image.new_from_buffer(made, "")
            assert (round(image.xres * 25.4), round(image.yres * 25.4)) == (200, 300)
    in_srgb = told(encode_picture(photo.pixels, None, kind, quality=90, origin=origin, colour="srgb"))
    assert in_srgb[0]["Exif.Photo.ColorSpace"] == "1"
    assert "Exif.Iop.InteroperabilityIndex" not in in_srgb[0]
    assert in_srgb[2] == colour.SRGB


@pytest.mark.parametrize("kind", FORMATS)
def test_metadata_in_the_other_byte_order(kind: str) -> None:
    exif = Image.Exif()
    exif.endian = ">"
    exif[271], exif[18246] = "Maker", 258
    exif.get_ifd(34665).update({36867: "2020:02:03 04:05:06", 34855: 400})
    data = saved(Image.fromarray(RGB), "JPEG", exif=exif)
    assert b"Exif\0\0MM\0*" in data
    made = encode_picture(RGB, None, kind, quality=90, origin=read_origin(data, PATH), colour="source")
    seen = told(made)[0]
    assert (seen["Exif.Image.Make"], seen["Exif.Image.Rating"]) == ("Maker", "258")
    assert (seen["Exif.Photo.ISOSpeedRatings"], seen["Exif.Photo.DateTimeOriginal"]) == ("400", "2020:02:03 04:05:06")
    assert np.array_equal(decode(made, PATH).pixels, RGB) or kind in ("jpeg", "webp", "avif")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_is_applied_once(orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    data = saved(Image.fromarray(RGB), "PNG", exif=exif)
    photo, origin = decode(data, PATH), read_origin(data, PATH)
    for kind in ("png", "tiff", "webp"):
        made = encode_picture(photo.pixels, None, kind, quality=100, origin=origin, colour="source")
        upright = pyvips.Image.new_from_buffer(made, "").autorot().numpy()
        assert np.array_equal(upright, pyvips.Image.new_from_buffer(data, "").autorot().numpy())


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(("name", "profile"), [("p3", P3), ("adobe", ADOBE)])
def test_colours_of_the_source(kind: str, name: str, profile: bytes) -> None:
    """Another reader, libvips, shows the file in the colours that the network saw."""
    origin = NOTHING._replace(profile=profile)
    made = encode_picture(RGB, None, kind, quality=100, origin=origin, colour="source")
    image = pyvips.Image.new_from_buffer(made, "")
    assert image.get("icc-profile-data") == profile
    shown = image.icc_transform("srgb", intent="relative", black_point_compensation=True)
    assert delta_e(shown.numpy(), RGB) < (1.5 if kind in ("png", "tiff", "webp") else 8)
    assert delta_e(np.asarray(Image.open(io.BytesIO(made)).convert("RGB")), RGB) > 4
    in_srgb = encode_picture(RGB, None, kind, quality=100, origin=origin, colour="srgb")
    assert pyvips.Image.new_from_buffer(in_srgb, "").get("icc-profile-data") == colour.SRGB


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_16_bits_are_kept(kind: str) -> None:
    alpha = ALPHA.astype(np.uint16) * 257
    for origin, pixels, with_alpha in itertools.product(
        (None, NOTHING, NOTHING._replace(profile=P3)), (DEEP, DEEP[:, :, :1]), (None, alpha)
    ):
        made = encode_picture(pixels, with_alpha, kind, quality=1, origin=origin, colour="source")
        seen = pyvips.Image.new_from_buffer(made, "").numpy()
        assert seen.dtype == np.uint16
        seen = seen.reshape(44, 60, -1)
        converted = origin is not None and origin.profile is not None and pixels.shape[2] == 3
        truth = colour.from_srgb(pixels, P3) if converted else pixels
        assert np.array_equal(seen[:, :, : pixels.shape[2]], truth)
        assert seen.shape[2] == pixels.shape[2] + (with_alpha is not None)
        if with_alpha is not None:
            assert np.array_equal(seen[:, :, -1], alpha)


@pytest.mark.parametrize("kind", ["jpeg", "webp", "avif"])
def test_the_other_formats_round_to_8_bits(kind: str) -> None:
    made = encode_picture(DEEP, None, kind, quality=100, origin=None, colour="source")
    seen = pyvips.Image.new_from_buffer(made, "").numpy()
    assert seen.dtype == np.uint8
    error = np.abs(seen.astype(int) - ((DEEP.astype(int) + 128) // 257)).max()
    assert error == 0 if kind == "webp" else error <= 8


@pytest.mark.parametrize("kind", FORMATS)
def test_alpha(kind: str) -> None:
    for pixels in (RGB, RGB[:, :, :1]):
        made = encode_picture(pixels, ALPHA, kind, quality=100, origin=None, colour="source")
        photo = decode(made, PATH)
        if kind == "jpeg":
            assert photo.alpha is None
            assert (photo.pixels[:, 0].astype(int) >= 250).all(), "it shows white where it was transparent"
            assert np.abs(photo.pixels[:, -1].astype(int) - pixels[:, -1]).max() <= 8
        else:
            assert np.abs(photo.alpha.astype(int) - ALPHA).max() <= (2 if kind == "avif" else 0)
            if kind != "avif":
                assert np.array_equal(photo.pixels, np.broadcast_to(pixels, photo.pixels.shape))


def test_cmyk_goes_back_to_cmyk_where_the_format_has_it() -> None:
    for data in (
        saved(Image.frombytes("CMYK", (60, 44), INKS.tobytes()), "JPEG", icc_profile=CMYK),
        deep_tiff(INKS, CMYK, "separated"),
    ):
        origin = read_origin(data, PATH)
        assert origin.profile == CMYK
        photo = decode(data, PATH)
        for kind in FORMATS:
            made = encode_picture(photo.pixels, None, kind, quality=95, origin=origin, colour="source")
            image = pyvips.Image.new_from_buffer(made, "")
            has_inks = kind in ("jpeg", "tiff")
            assert (image.interpretation == "cmyk") == has_inks
            assert image.get("icc-profile-data") == (CMYK if has_inks else colour.SRGB)
            shown = image.icc_transform("srgb", intent="relative", black_point_compensation=True).numpy()
            assert np.percentile(np.abs(shown.astype(int) - photo.pixels), 90) <= 12
    deep = encode_picture(DEEP, ALPHA.astype(np.uint16), "tiff", quality=1, origin=origin, colour="source")
    with tifffile.TiffFile(io.BytesIO(deep)) as file:
        assert file.asarray().shape == (44, 60, 5)
        assert file.pages[0].photometric == tifffile.PHOTOMETRIC.SEPARATED


def test_gray() -> None:
    gray = RGB[:, :, :1]
    data = saved(Image.fromarray(gray[:, :, 0]), "PNG", icc_profile=GRAY)
    origin, photo = read_origin(data, PATH), decode(data, PATH)
    for kind in FORMATS:
        made = encode_picture(photo.pixels, None, kind, quality=100, origin=origin, colour="source")
        image = pyvips.Image.new_from_buffer(made, "")
        assert image.get("icc-profile-data") == (colour.SRGB if kind == "webp" else GRAY)
        assert np.abs(decode(made, PATH).pixels.astype(int) - photo.pixels).max() <= (
            8 if kind in ("jpeg", "avif") else 3
        )
    # A profile for colours would be no profile of a gray file.
    made = encode_picture(gray, None, "png", quality=1, origin=NOTHING._replace(profile=P3), colour="source")
    assert pyvips.Image.new_from_buffer(made, "").get("icc-profile-data") == colour.GRAY
    assert np.array_equal(decode(made, PATH).pixels, gray)


def test_a_photo_without_a_profile_and_one_that_cannot_be_used() -> None:
    for data in (saved(Image.fromarray(RGB), "PNG"), saved(Image.fromarray(RGB), "PNG", icc_profile=b"nonsense" * 99)):
        origin = read_origin(data, PATH)
        assert origin == NOTHING
        made = encode_picture(RGB, None, "png", quality=1, origin=origin, colour="source")
        assert made == encode_png(RGB) == encode_picture(RGB, None, "png", quality=1, origin=None, colour="source")
    made = encode_picture(RGB, None, "png", quality=1, origin=NOTHING._replace(profile=VIPS_SRGB), colour="source")
    assert np.array_equal(pyvips.Image.new_from_buffer(made, "").numpy(), RGB), "sRGB by effect changes no bit"
    # A profile of a camera or scanner leads only from its colours to others.
    input_only = CMYK[:128].replace(b"prtr", b"scnr") + CMYK[128:].replace(b"B2A", b"X2A")
    made = encode_picture(RGB, None, "jpeg", quality=90, origin=NOTHING._replace(profile=input_only), colour="source")
    assert pyvips.Image.new_from_buffer(made, "").get("icc-profile-data") == colour.SRGB


def test_damaged_metadata_count_as_absent() -> None:
    whole = described()
    start = whole.index(b"Exif\0\0") + 6
    for place, value in itertools.product(range(start, start + 200), (0x00, 0xFF)):
        data = whole[:place] + bytes([value]) + whole[place + 1 :]
        origin = read_origin(data, PATH)
        for kind in ("jpeg", "tiff"):
            made = encode_picture(RGB, None, kind, quality=80, origin=origin, colour="source")
            assert decode(made, PATH).pixels.shape == RGB.shape
    for exif in (
        b"",
        b"II*\0",
        b"II*\0\xff\xff\xff\xff",
        b"MM\0*\0\0\0\x08\xff\xff" + b"\x01\x0e\0\x02\xff\xff\xff\xff\0\0\0\0" * 9,
    ):
        data = saved(Image.fromarray(RGB), "JPEG", exif=b"Exif\0\0" + exif)
        assert (
            "Exif.Image.Make"
            not in told(encode_picture(RGB, None, "jpeg", quality=80, origin=read_origin(data, PATH), colour="source"))[
                0
            ]
        )
    with pytest.raises(ImageError, match="is not an image"):
        read_origin(b"nonsense", PATH)


def test_metadata_too_large_for_a_jpeg() -> None:
    data = saved(Image.fromarray(RGB), "PNG", exif=large_exif(notes=80_000, comment=10))
    origin = read_origin(data, PATH)._replace(xmp=b"x" * 70_000)
    exif, xmp, _ = told(encode_picture(RGB, None, "jpeg", quality=80, origin=origin, colour="source"))
    assert exif["Exif.Image.Make"] == "Maker"
    assert "Exif.Photo.MakerNote" not in exif
    assert not xmp
    assert (
        len(
            told(encode_picture(RGB, None, "webp", quality=80, origin=origin._replace(xmp=None), colour="source"))[0][
                "Exif.Photo.MakerNote"
            ]
        )
        > 80_000
    )
    origin = read_origin(saved(Image.fromarray(RGB), "PNG", exif=large_exif(notes=10, comment=80_000)), PATH)
    assert not told(encode_picture(RGB, None, "jpeg", quality=80, origin=origin, colour="source"))[0]


def large_exif(notes: int, comment: int) -> Image.Exif:
    exif = Image.Exif()
    exif[271] = "Maker"
    exif.get_ifd(34665).update({37500: b"n" * notes, 37510: b"ASCII\0\0\0" + b"c" * comment})
    return exif


@pytest.mark.parametrize(
    ("kind", "size"), [("jpeg", (1, 65_501)), ("webp", (16_384, 1)), ("avif", (1, 32_769)), ("avif", (32_000, 9_000))]
)
def test_pictures_beyond_what_a_format_holds(kind: str, size: tuple[int, int]) -> None:
    pixels = np.broadcast_to(np.zeros((1, 1, 1), np.uint8), (*size, 1))
    with pytest.raises(
        ArgumentError, match=f"picture: is {size[1]}x{size[0]}, but {kind} holds .*; choose png or tiff"
    ):
        encode_picture(pixels, None, kind, quality=80, origin=None, colour="source")


def test_the_largest_sides_can_be_read_again() -> None:
    for kind, side in (("jpeg", 65_500), ("webp", 16_383), ("avif", 32_768)):
        made = encode_picture(np.zeros((3, side, 3), np.uint8), None, kind, quality=50, origin=None, colour="srgb")
        assert decode(made, PATH).pixels.shape == (3, side, 3)


@pytest.mark.parametrize("kind", FORMATS)
def test_the_same_picture_is_the_same_bytes(kind: str) -> None:
    origin = read_origin(described(profile=P3), Path("photo"))
    one, other = (encode_picture(RGB, ALPHA, kind, quality=77, origin=origin, colour=c) for c in ("source", "srgb"))
    assert one == encode_picture(RGB, ALPHA, kind, quality=77, origin=origin, colour="source")
    assert other == encode_picture(RGB, ALPHA, kind, quality=77, origin=origin, colour="srgb")
    assert one != other


@pytest.mark.parametrize("kind", ["jpeg", "webp", "avif"])
def test_quality(kind: str) -> None:
    sizes = [len(encode_picture(RGB, None, kind, quality=q, origin=None, colour="source")) for q in (20, 60, 95)]
    assert sizes == sorted(set(sizes))
    assert suffix_of(kind) == {"jpeg": ".jpg"}.get(kind, f".{kind}")
