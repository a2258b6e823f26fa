"""Hundreds of files that try to crash, stall, fill or escape a reader: each is read, or refused in one line."""

from __future__ import annotations

import io
import os
import resource
import socket
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from desra_core.errors import printable
from desra_core.images.census import take_census
from desra_core.images.codec import decode, most_pixels
from desra_core.images.scanning import image_files
from tests.conftest import MODELS, Desra
from tests.fuzz.targets import healed, pictures, tried
from tests.picture_files import Page, bmp_file, chunk, png_file, tiff_file
from tests.profiles import CMYK, P3

Files = Iterator[tuple[str, bytes]]
SAMPLES = np.arange(3 * 9 * 13, dtype=np.uint8).reshape(9, 13, 3)
# Names that end a tag, a path, an argument, a line or an escape. All but the last two are text that can be printed.
NAMES = (
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "'\"><svg onload=alert(1)>", "-rf", "--workspace=x",
    "$(touch escaped)", "`touch escaped`", "a;touch escaped", "..", "...", "..\\..\\x", "%2e%2e%2fx", "~", "CON",
    "a" * 200, "{{7*7}}", "{path}", "%s%n", "a b", "&amp;", "\\u0000", "]]>", "javascript:alert(1)", "*", "[a]", "a,b",
    "\u202egnp", "a\nb", "a\x1b[2Jb", "a\x07", "a\rb", "a\tb", "\x9b31m", "\u2028",
)  # fmt: skip


def cut() -> Files:
    for index, data in enumerate(pictures()):
        for part in (1, 3, 5, 7):
            yield f"cut-{index}-{part}", data[: len(data) * part // 8]


def flipped() -> Files:
    """Bits flipped; the checksums of PNG are right nevertheless."""
    rng = np.random.default_rng(8)
    for index, data in enumerate(pictures()):
        for turn in range(6):
            spoilt = bytearray(data)
            for place in rng.integers(8, len(data), 1 + turn):
                spoilt[place] ^= 1 << int(rng.integers(8))
            yield f"flipped-{index}-{turn}", healed(bytes(spoilt))


def lying() -> Files:
    """Headers that claim other sizes than their pixels have."""
    png = png_file(SAMPLES, 2, 8)
    for width, height in ((2**31 - 1, 2**31 - 1), (2**31, 9), (0, 9), (40_000, 40_000), (13, 8000), (12, 9), (14, 9)):
        yield f"png-{width}x{height}", healed(png[:16] + struct.pack(">II", width, height) + png[24:])
        page = Page(SAMPLES, 2, 8)
        page.tags |= {256: (width,), 257: (height,)}
        yield f"tiff-{width}x{height}", tiff_file(page)
        yield f"bmp-{width}x{height}", bmp_file(bytes(400), min(width, 2**31 - 1), min(height, 2**31 - 1), 24)
    for kind, place in (("JPEG", b"\xff\xc0"), ("WEBP", b"VP8 "), ("GIF", b"GIF89a")):
        sink = io.BytesIO()
        Image.fromarray(SAMPLES).save(sink, kind)
        start = sink.getvalue().find(place)
        for offset in (4, 5, 6, 7, 8, 14, 16):
            data = bytearray(sink.getvalue())
            data[start + offset : start + offset + 2] = b"\xff\xff"
            yield f"{kind}-{offset}", bytes(data)
    for tag, values in {
        258: (16, 8, 1), 259: (7,), 262: (6,), 266: (2,), 274: (6, 7), 277: (65535,), 278: (0,), 279: (65535,),
        284: (2,), 317: (3,), 320: (1,) * 49, 322: (65535, 0), 330: (8,), 338: (9,) * 40, 339: (3,), 32997: (65535,),
    }.items():  # fmt: skip
        page = Page(SAMPLES, 2, 8)
        page.tags[tag] = values
        yield f"tag-{tag}", tiff_file(page)
    page = Page(SAMPLES[:, :, :1] & 15, 3, 4, colormap=tuple(range(48)))
    page.tags[320] = tuple(range(49))
    yield "palette-of-49", tiff_file(page)
    yield "png-key", png_file(SAMPLES, 2, 8, chunk(b"tRNS", bytes(3)))


def bombs() -> Files:
    """Small files that unpack to much: pixels, text, profiles, pages and frames."""
    zeros = zlib.compress(bytes(100_000_000), 9)
    for kind, head in (
        (b"zTXt", b"k\0\0"),
        (b"iCCP", b"k\0\0"),
        (b"iTXt", b"k\0\1\0\0\0"),
        (b"eXIf", b""),
        (b"tEXt", b"k\0"),
    ):
        yield f"png-{kind.decode()}", png_file(SAMPLES, 2, 8, chunk(kind, head + zeros))
    profile = b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n  99999999\n" + b"00" * 10_000_000, 9)
    yield "png-exif-as-text", png_file(SAMPLES, 2, 8, chunk(b"zTXt", profile))
    png = png_file(SAMPLES, 2, 8)
    header, end = healed(png[:16] + struct.pack(">II", 8000, 8000) + png[24:33]), png[-12:]
    yield "png-pixels", header + chunk(b"IDAT", zeros) + end
    yield "png-many-chunks", png[:33] + chunk(b"tEXt", b"k\0") * 50_000 + png[33:]
    yield "png-many-parts", png[:33] + chunk(b"IDAT", b"") * 50_000 + png[33:]
    page = Page(SAMPLES, 2, 8)
    yield "tiff-pages", tiff_file(*[page] * 3000)
    data = tiff_file(page)
    place = struct.unpack_from("<I", data, 4)[0]
    yield "tiff-loop", data[:-4] + struct.pack("<I", place)
    page.tags |= {254: (1,), 330: (8,) * 3000}
    yield "tiff-below", tiff_file(page)
    page.tags |= {254: (1,), 330: (place,)}
    yield "tiff-below-itself", tiff_file(page)
    yield "tiff-tags", b"II*\0\x08\0\0\0\xff\xff" + struct.pack("<HHII", 256, 3, 2**31, 8) * 65535
    for code in (5, 8, 32773, 34925, 50000):
        page = Page(np.zeros((1, 3000, 3), np.uint8), 2, 8, rows=1, compression=code)
        page.tags |= {256: (8000,), 257: (8000,), 278: (8000,)}
        yield f"tiff-strip-{code}", tiff_file(page)
    sink = io.BytesIO()
    frames = [Image.new("P", (64, 64), index % 2) for index in range(500)]
    frames[0].save(sink, "GIF", save_all=True, append_images=frames[1:])
    yield "gif-frames", sink.getvalue()


def odd() -> Files:
    """No pictures at all, behind the first bytes of one."""
    for index, start in enumerate(
        (b"\x89PNG\r\n\x1a\n", b"II*\0", b"MM\0+", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBP", b"BM", b"GIF89a")
    ):
        for name, rest in (
            ("nothing", b""),
            ("zeros", bytes(5000)),
            ("ones", b"\xff" * 5000),
            ("text", b"<html>" * 99),
        ):
            yield f"odd-{index}-{name}", start + rest
    yield "empty", b""
    yield "eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(escaped) (w) file closefile\n"
    yield "svg", b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>"


def profiles() -> Files:
    """Colour profiles that are cut, lie about sizes and places of their parts, or belong to other pictures."""
    for name, whole in (("p3", P3), ("cmyk", CMYK)):
        made = {f"cut-{length}": whole[:length] for length in (1, 127, 128, 131, 140, 200, len(whole) - 1)}
        entries = struct.unpack_from(">I", whole, 128)[0]
        small = name == "p3"  # an attempt with the other takes a tenth of a second
        for place in (0, 128, *range(132, 132 + 12 * entries, 4 if small else 20)):
            for lie in (0, 1, 2**31 - 1, 2**32 - 1) if small else (1, 2**32 - 1):
                made[f"{place}-{lie}"] = whole[:place] + struct.pack(">I", lie) + whole[place + 4 :]
        for lie, profile in made.items():
            yield f"profile-{name}-{lie}", png_file(SAMPLES, 2, 8, chunk(b"iCCP", b"k\0\0" + zlib.compress(profile, 1)))
    page = Page(np.dstack([SAMPLES, SAMPLES[:, :, :1]]), 5, 8)
    for length in (200, len(CMYK) // 2):
        page.tags[34675] = tuple(CMYK[:length])
        yield f"profile-tiff-{length}", tiff_file(page)


FAMILIES = (cut, flipped, lying, bombs, odd, profiles)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_a_file_is_read_or_refused_in_one_line(
    family: Callable[[], Files], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    files = dict(family())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, data in files.items():
        line = tried(lambda data, name=name: decode(data, Path(name), max_pixels=2**24), data) or f"{name}: "
        assert line.startswith(f"{name}: ")
        assert "\n" not in line
        assert len(line) < 400
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 800_000  # kB
    assert caplog.records == [], "the libraries log nothing"
    assert capfd.readouterr() == ("", "")


def test_their_headers_are_counted_or_refused_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    bad = [file for family in FAMILIES for file in family()]
    for number, (name, data) in enumerate(bad):
        (tmp_path / f"{number:03d} {name}.png").write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    census = take_census(tmp_path)
    refused = sum(one.files for one in census.unreadable)
    assert census.photos.num_rows + refused == len(bad)
    assert refused > 100
    names = [*census.photos["profile"].to_pylist(), *(one.reason for one in census.unreadable)]
    assert all(printable(name) == name and len(name) < 400 for name in names)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 800_000  # kB
    assert caplog.records == [], "the libraries log nothing"
    assert capfd.readouterr() == ("", "")


def test_there_are_hundreds_of_files() -> None:
    assert sum(len(dict(family())) for family in FAMILIES) >= 300


def test_entries_that_are_no_files_are_named_or_passed_over(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    (folder / "folder.png").mkdir(parents=True)
    (folder / "good.png").write_bytes(png_file(SAMPLES, 2, 8))
    os.mkfifo(folder / "pipe.png")
    (folder / "device.png").symlink_to("/dev/zero")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "above").symlink_to("..")
    (folder / "dangling.png").symlink_to("nowhere")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(folder / "socket.png"))
    found = image_files(folder)
    assert found.files["path"].to_pylist() == ["good.png"]
    told = sorted(f"{Path(error.subject).name} {error.reason}" for error in found.problems)
    assert told == [
        "dangling.png cannot be looked at (No such file or directory)", "device.png is no file",
        "loop.png cannot be looked at (Too many levels of symbolic links)", "pipe.png is no file",
        "socket.png is no file",
    ]  # fmt: skip
    assert most_pixels([folder / "good.png"]) == 9 * 13


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.lstat().st_mode, path.lstat().st_mtime_ns) for path in folder.rglob("*")}


@pytest.mark.slow
def test_a_run_over_all_of_them(desra: Desra, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    bad = [file for family in FAMILIES for file in family()]
    for number, (name, data) in enumerate(bad):
        (photos / f"{number:03d} {name}.png").write_bytes(data)
    for index, name in enumerate(NAMES):
        path = photos / f"{name}{index}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(png_file(SAMPLES + np.uint8(index), 2, 8))
    os.mkfifo(photos / "pipe.png")
    before = tree(photos)
    mine = ("mine", photos, "--gan-model", MODELS / "gan.pth", "--mse-model", MODELS / "mse.pth")
    run = desra(*mine, "--workspace", tmp_path / "ws", "--min-area", "9")
    assert run.returncode == 1, run.stderr
    output = run.stdout + run.stderr
    assert "Traceback" not in output
    assert all(printable(line) == line for line in output.splitlines()), "no name reaches the terminal as it is"
    assert "pipe.png: is no file" in output
    assert tree(photos) == before, "nothing is written beside the workspace"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "ws"]
    report = (tmp_path / "ws" / "report.html").read_text("utf-8")
    assert "alert(1)</script>" not in report
    assert "<img src=x" not in report
