"""What the headers of photos tell, against Pillow, tifffile and the samples that the files were made of."""

from __future__ import annotations

import io
import os
from pathlib import Path

import imagecodecs
import numpy as np
import pillow_heif
import pillow_jxl  # noqa: F401 registers itself with Pillow
import pytest
from PIL import Image, ImageCms

from desra_core.errors import ImageError, TransientError, UsageError
from desra_core.images import codec, further_decoders
from desra_core.images.census import NOT_TOLD, LeftOut, take_census
from desra_core.images.codec import decode, read_header
from desra_core.images.decoders import Samples
from tests.desra_core.images.test_further_decoders import dng, heic
from tests.picture_files import Page, png_file, tiff_file
from tests.profiles import ADOBE, P3

NOISE = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
DEEP = NOISE.astype(np.uint16) * 257


def saved(kind: str, mode: str = "RGB", **options: object) -> bytes:
    sink = io.BytesIO()
    image = Image.fromarray(NOISE).convert(mode)
    if mode == "RGBA":
        image.putalpha(Image.fromarray(NOISE[:, :, 0]))
    image.save(sink, kind, **options)
    return sink.getvalue()


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[274] = 6
    return exif


# What each file is known to hold: bits, colours, alpha.
FILES: dict[str, tuple[bytes, Samples | None]] = {
    "rgb.png": (saved("PNG", icc_profile=P3), Samples(8, "RGB", False)),
    "gray.png": (saved("PNG", "L"), Samples(8, "gray", False)),
    "bit.png": (saved("PNG", "1"), Samples(1, "gray", False)),
    "both.png": (saved("PNG", "LA"), Samples(8, "gray", True)),
    "palette.png": (saved("PNG", "P", transparency=3), Samples(8, "palette", True)),
    "deep.png": (png_file(DEEP, 2, 16), Samples(16, "RGB", False)),
    "photo.jpg": (saved("JPEG", icc_profile=ADOBE), Samples(8, "RGB", False)),
    "turned.jpg": (saved("JPEG", exif=turned()), Samples(8, "RGB", False)),
    "gray.jpeg": (saved("JPEG", "L"), Samples(8, "gray", False)),
    "pair.jpg": (saved("MPO", save_all=True, append_images=[Image.fromarray(NOISE)]), Samples(8, "RGB", False)),
    "alpha.webp": (saved("WEBP", "RGBA", lossless=True), Samples(8, "RGB", True)),
    "plain.bmp": (saved("BMP"), Samples(8, "RGB", False)),
    "deep.tif": (tiff_file(Page(DEEP, 2, 16)), Samples(16, "RGB", False)),
    "gray.tiff": (saved("TIFF", "L", icc_profile=P3), Samples(8, "gray", False)),
    "eight.avif": (saved("AVIF", "RGBA", icc_profile=P3), Samples(8, "RGB", True)),
    "twelve.avif": (imagecodecs.avif_encode(DEEP >> 4, level=90, bitspersample=12), Samples(12, "RGB", False)),
    "phone.heic": (heic(NOISE, icc_profile=P3), Samples(8, "RGB", False)),
    "ten.heic": (heic(np.dstack([DEEP, DEEP[:, :, 0]])), Samples(10, "RGB", True)),
    "gray.heic": (heic(NOISE[:, :, :1]), Samples(8, "gray", False)),
    "new.jxl": (saved("JXL", lossless=True, icc_profile=P3), None),
}  # fmt: skip


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    for name, (content, _) in FILES.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


@pytest.mark.parametrize("name", FILES)
def test_a_header_tells_what_pillow_reads(corpus: Path, name: str) -> None:
    pillow_heif.register_heif_opener()
    header = read_header(corpus / name)
    photo = decode((corpus / name).read_bytes(), corpus / name)
    assert header.size == photo.pixels.shape[:2]
    assert (header.samples, header.length) == (FILES[name][1], len(FILES[name][0]))
    if header.samples is not None:  # of JPEG XL, only decoding would tell
        assert header.treatment == photo.profile
        assert header.samples.alpha == (photo.alpha is not None)
        with Image.open(corpus / name) as image:
            assert header.profile == image.info.get("icc_profile")
            kinds = {"MPO": "JPEG", "WEBP": "WebP", "HEIF": "HEIC"}
            assert header.format == kinds.get(str(image.format), image.format)


def test_a_camera_raw_file_is_read_by_its_header(tmp_path: Path) -> None:
    (tmp_path / "a.dng").write_bytes(dng(DEEP[:, :, 0], 6))
    header = read_header(tmp_path / "a.dng")
    assert header.size == decode((tmp_path / "a.dng").read_bytes(), tmp_path / "a.dng").pixels.shape[:2] == (400, 300)
    assert (header.format, header.samples) == ("camera raw", Samples(16, "RGB", False))
    (tmp_path / "b.dng").write_bytes(b"no camera")
    with pytest.raises(ImageError, match="is no camera raw file that is read"):
        read_header(tmp_path / "b.dng")


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_header_that_is_long_is_read_to_its_end(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A profile of more than 64 KB, behind which the size of a JPEG follows; then the pixels are left alone."""
    profile = P3 + np.random.default_rng(1).bytes(150_000)
    noise = np.random.default_rng(2).integers(0, 256, (1000, 1200, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a", kind, icc_profile=profile, quality=98)
    asked: list[int] = []
    opened = codec.opened
    monkeypatch.setattr(codec, "opened", lambda data, path: (asked.append(len(data)), opened(data, path))[1])
    header = read_header(tmp_path / "a")
    assert (header.size, header.profile) == ((1000, 1200), profile)
    assert asked == [2**16, 2**20]
    assert header.length > 2**20


def test_counts_of_a_corpus(corpus: Path) -> None:
    (corpus / "sub").mkdir()
    (corpus / "sub/again.jpg").write_bytes(FILES["photo.jpg"][0])
    alike = bytearray(FILES["plain.bmp"][0])
    alike[-1] ^= 1  # as long, and begins alike
    (corpus / "alike.bmp").write_bytes(alike)
    (corpus / "note.txt").write_text("x")
    (corpus / "clip.mov").write_text("x")
    (corpus / "@eaDir").mkdir()
    (corpus / "@eaDir/SYNOPHOTO_THUMB_M.jpg").write_text("x")
    (corpus / "SYNOPHOTO_THUMB_S.jpg").write_text("x")
    (corpus / "empty.png").write_bytes(b"")
    (corpus / "text.jpg").write_text("no picture")
    (corpus / "ink.jpg").write_bytes(saved("JPEG", "CMYK"))
    (corpus / "hidden").mkdir(mode=0o000)
    seen: list[tuple[int, int]] = []
    found = take_census(corpus, exclude=["gray*"], on_read=lambda done, total: seen.append((done, total)))
    others = ("gray", "empty", "text", "ink", "note", "clip", "SYNO")
    kept = {path: path.read_bytes() for path in corpus.rglob("*.*") if path.is_file()}
    kept = {path: data for path, data in kept.items() if not path.name.startswith(others)}
    assert found.photos.num_rows == len(kept) == 18
    assert seen == [(done, 21) for done in range(1, 22)]
    formats = {row["format"]: (row["photos"], row["bytes"]) for row in found.counts("format")}
    kinds = {".jpg": "JPEG", ".tif": "TIFF", ".webp": "WebP", ".jxl": "JPEG XL"}
    for name, counts in formats.items():
        of_kind = [data for path, data in kept.items() if kinds.get(path.suffix, path.suffix[1:].upper()) == name]
        assert counts == (len(of_kind), sum(map(len, of_kind))), name
    assert sum(photos for photos, _ in formats.values()) == 18
    depths = {row["depth"]: row["photos"] for row in found.counts("depth")}
    assert (depths["16-bit RGB"], depths["12-bit RGB"], depths["1-bit gray"], depths[NOT_TOLD]) == (2, 1, 1, 1)
    assert (depths["8-bit RGB with alpha"], depths["8-bit palette with alpha"]) == (2, 1)
    profiles = {(row["profile"], row["treatment"]): row["photos"] for row in found.counts("profile", "treatment")}
    named = [ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(each))).strip() for each in (P3, ADOBE)]
    assert profiles[named[1], "is converted to sRGB"] == 2
    assert profiles[named[0], "is converted to sRGB"] == 3
    assert profiles[NOT_TOLD, ""] == 1
    assert sum(row["photos"] for row in found.sizes()) == 18
    assert found.copies() == {"photos": 1, "bytes": len(FILES["photo.jpg"][0]), "example": "sub/again.jpg"}
    assert set(found.left_out) == {
        LeftOut(".txt", "no photo", 1, "note.txt"),
        LeftOut(".mov", "no photo", 1, "clip.mov"),
        LeftOut("@eaDir/", "a folder of thumbnails, previews or deleted files", 1, "@eaDir"),
        LeftOut("SYNOPHOTO_THUMB*", "a thumbnail of a NAS", 1, "SYNOPHOTO_THUMB_S.jpg"),
        LeftOut("excluded by --exclude gray*", "by a flag", 4, found.left_out[0].example),
    }
    unreadable = {one.reason: Path(one.example).name for one in found.unreadable}
    expected = {"is empty": "empty.png", "is not an image": "text.jpg",
                "has the colour model CMYK and no profile of its inks that can be used": "ink.jpg"}  # fmt: skip
    if os.getuid():
        expected["cannot be opened (Permission denied)"] = "hidden"
    assert unreadable == expected
    (corpus / "hidden").chmod(0o700)


def test_sizes_are_counted_by_class_and_the_extremes_are_named(tmp_path: Path) -> None:
    for name, size in {"a": (100, 100), "b": (500, 500), "c": (2000, 500), "d": (2000, 2001)}.items():
        Image.new("L", size).save(tmp_path / f"{name}.png")
    found = take_census(tmp_path)
    assert [(row["size"], row["photos"], row["megapixels"]) for row in found.sizes()] == [
        ("under 0.25 MP", 1, 0.01), ("0.25 to 1 MP", 1, 0.25), ("1 to 4 MP", 1, 1.0), ("4 to 16 MP", 1, 4.002),
    ]  # fmt: skip
    assert found.extremes() == (
        {"path": "a.png", "width": 100, "height": 100}, {"path": "d.png", "width": 2000, "height": 2001}
    )  # fmt: skip


def test_a_missing_package_is_named(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(further_decoders, "_has", lambda kind: kind != further_decoders.HEIC)
    assert LeftOut(".heic", "needs a package: pip install 'desra[formats]'", 3, "gray.heic") in [
        one if one.what != ".heic" else one._replace(example="gray.heic") for one in take_census(corpus).left_out
    ]


def test_a_place_without_photos_is_refused_and_a_lost_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("x")
    with pytest.raises(UsageError, match=r"holds no images, but 1 \.txt"):
        take_census(tmp_path)
    with pytest.raises(TransientError, match="there is no such file"):
        read_header(tmp_path / "gone.png")
