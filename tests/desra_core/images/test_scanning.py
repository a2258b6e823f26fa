"""The image files below a folder: which are taken, which are left out, and how those are counted."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from desra_core.errors import UsageError
from desra_core.images.scanning import LEFT_OUT, ImageNames, image_files, kinds_in_words


def put(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"0")
    return root


def taken(place: Path, *exclude: str) -> list[str]:
    return sorted(image_files(place, exclude=exclude).files["path"].to_pylist())


def test_files_of_other_kinds_are_counted_by_suffix(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "b.PSD", "c/d.psd", "e.txt", "README", ".hidden.cr2", "c/.DS_Store")
    found = image_files(tmp_path)
    assert found.passed_over == {".psd": 2, ".txt": 1, "without a suffix": 1}
    assert kinds_in_words(found.passed_over) == "2 .psd, 1 .txt, 1 without a suffix"
    assert kinds_in_words({}) is None


def test_the_most_frequent_kinds_have_counts_of_their_own(tmp_path: Path) -> None:
    put(tmp_path, *(f"frame.{number:04d}" for number in range(40)), "a.raw", "b.raw", "c.png")
    counts = image_files(tmp_path).passed_over
    assert counts[".raw"] == 2
    assert len(counts) == 13
    assert counts.total() == 42


def test_every_suffix_of_a_jpeg_is_taken(tmp_path: Path) -> None:
    names = [f"a.{suffix}" for suffix in ("jpg", "JPEG", "jfif", "JFIF", "jpe", "jif", "jfi", "pjpeg", "pjp")]
    assert taken(put(tmp_path, *names)) == sorted(names)


@pytest.mark.parametrize(
    "folder", [*sorted(LEFT_OUT), "@eaDir", "__MACOSX", "$RECYCLE.BIN", "System Volume Information"]
)
def test_folders_that_machines_put_beside_photos_are_left_out(tmp_path: Path, folder: str) -> None:
    put(tmp_path, "a.png", f"{folder}/a.png/THUMB.jpg", f"trip/{folder}/b.png", f"trip/{folder}.png")
    found = image_files(tmp_path)
    assert sorted(found.files["path"].to_pylist()) == ["a.png", f"trip/{folder}.png"]
    assert found.passed_over == {f"{folder}/": 2}
    assert taken(tmp_path / folder) == ["a.png/THUMB.jpg"], "a folder that the user names is searched"


def test_previews_and_thumbnails_that_programs_put_beside_photos_are_left_out(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "a Previews.lrdata/1/x.jpg", "a.lrcat-data/y.jpg", "SYNOPHOTO_THUMB_XL.jpg")
    put(tmp_path, "b/SYNOPHOTO_THUMB_M.jpg", "b/SYNOPHOTO_FILM_M.jpg", "b/._a.jpg", "b/Thumbs.db")
    found = image_files(tmp_path)
    assert found.files["path"].to_pylist() == ["a.png"]
    assert found.passed_over == {
        "a Previews.lrdata/": 1, "a.lrcat-data/": 1, "SYNOPHOTO_THUMB*": 2, "SYNOPHOTO_FILM*": 1, ".db": 1,
    }  # fmt: skip


@pytest.mark.parametrize("folder", [".thumbnails", ".AppleDouble", ".Trash-1000", ".@__thumb", ".git"])
def test_hidden_folders_are_left_out(tmp_path: Path, folder: str) -> None:
    put(tmp_path, "a.png", f"{folder}/b.png", f"trip/{folder}/b.png", "trip/._c.jpg")
    assert taken(tmp_path) == ["a.png"]


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        (["old"], ["a.png", "b.jpg", "new/a.png"]),
        (["old/"], ["a.png", "b.jpg", "new/a.png"]),
        (["*.jpg"], ["a.png", "new/a.png", "old/deep/c.png"]),
        (["a.png", "b.*"], ["old/deep/c.png"]),
        (["old/*"], ["a.png", "b.jpg", "new/a.png"]),
        (["/a.png"], ["b.jpg", "new/a.png", "old/deep/c.png"]),
        (["new/a.png"], ["a.png", "b.jpg", "old/deep/c.png"]),
        (["**/deep"], ["a.png", "b.jpg", "new/a.png"]),
        (["nothing"], ["a.png", "b.jpg", "new/a.png", "old/deep/c.png"]),
    ],
)
def test_a_glob_leaves_files_and_folders_out(tmp_path: Path, exclude: list[str], left: list[str]) -> None:
    put(tmp_path, "a.png", "b.jpg", "new/a.png", "old/deep/c.png")
    assert taken(tmp_path, *exclude) == left
    passed_over = image_files(tmp_path, exclude=exclude).passed_over
    assert all((passed_over[f"excluded by --exclude {one}"] > 0) == (one != "nothing") for one in exclude)


@pytest.mark.parametrize(
    ("include", "taken_files"),
    [
        (["new"], ["new/a.png", "new/deep/c.jpg"]),
        (["*.jpg"], ["b.jpg", "new/deep/c.jpg"]),
        (["a.png", "deep/"], ["a.png", "new/a.png", "new/deep/c.jpg"]),
        (["/a.png"], ["a.png"]),
        (["new/*"], ["new/a.png", "new/deep/c.jpg"]),
        (["nothing"], []),
    ],
)
def test_a_glob_takes_files_and_folders(tmp_path: Path, include: list[str], taken_files: list[str]) -> None:
    put(tmp_path, "a.png", "b.jpg", "new/a.png", "new/deep/c.jpg")
    found = image_files(tmp_path, include=include)
    assert sorted(found.files["path"].to_pylist()) == taken_files
    left_out = {"not matched by --include": 4 - len(taken_files)}
    assert found.passed_over == left_out | {f"matched by --include {one}": 0 for one in include if one == "nothing"}


def test_only_what_is_included_is_taken_and_counted(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "b.jpg", "new/a.png", "new/deep/c.jpg", "x.txt")
    found = image_files(tmp_path, include=["new", "b.*", "*.tif"], exclude=["deep"])
    assert sorted(found.files["path"].to_pylist()) == ["b.jpg", "new/a.png"]
    words = "1 .txt, 1 excluded by --exclude deep, 1 not matched by --include, nothing matched by --include *.tif"
    assert kinds_in_words(found.passed_over) == words


def test_a_glob_leaves_out_decomposed_names_of_a_mac(tmp_path: Path) -> None:
    put(tmp_path, unicodedata.normalize("NFD", "Köln/a.png"), "b.png")
    assert taken(tmp_path, unicodedata.normalize("NFC", "Köln")) == ["b.png"]


def test_a_single_file(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "b.png", "c.psd")
    assert taken(tmp_path / "a.png") == ["a.png"]
    with pytest.raises(UsageError, match=r"c\.psd: is no image; name a PNG, JPEG, WebP, AVIF, TIFF or BMP file"):
        image_files(tmp_path / "c.psd")
    with pytest.raises(UsageError, match=r"d\.png: does not exist"):
        image_files(tmp_path / "d.png")


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*.png", ["a.png"]),
        ("**/*.png", ["a.png", "s1/b.png", "s2/deep/c.png"]),
        ("s?", ["s1/b.png", "s2/c.jpg", "s2/deep/c.png"]),
        ("s[12]/*.png", ["s1/b.png"]),
        ("**", ["a.png", "s1/b.png", "s2/c.jpg", "s2/deep/c.png"]),
        ("s2/d*/c.png", ["deep/c.png"]),
    ],
)
def test_a_glob_of_photos(tmp_path: Path, pattern: str, found: list[str]) -> None:
    """Names are relative to the folder before the first wildcard."""
    put(tmp_path, "a.png", "a.txt", "s1/b.png", "s2/c.jpg", "s2/deep/c.png", "@eaDir/s3/x.png", ".s4/x.png")
    assert taken(tmp_path / pattern) == found
    assert image_files(tmp_path / pattern).passed_over[".txt"] == (pattern == "**")


def test_a_glob_that_matches_nothing_and_one_that_is_a_name(tmp_path: Path) -> None:
    put(tmp_path, "photos [2024]/a.png", "photos/b.png")
    assert taken(tmp_path / "photos [2024]") == ["a.png"]
    with pytest.raises(UsageError, match=r"/x\*\.png: matches no file; see that its folder is there$"):
        image_files(tmp_path / "x*.png")
    with pytest.raises(UsageError, match=r"is there, and write \[\[\] for a \[ in a name$"):
        image_files(tmp_path / "photos [2024]/*.png")
    assert taken(tmp_path / "photos [[]2024]/*.png") == ["photos [2024]/a.png"]


@pytest.mark.parametrize("pattern", ["**/*.png", "**", "*", "s*/**/*.png"])
def test_a_glob_finds_the_same_files_as_its_folder(tmp_path: Path, pattern: str) -> None:
    """No files of any workspace, no file twice by a link, no excluded files."""
    put(tmp_path, "s0/a.png", "s1/b.png", "s1/old/x.png", "s1/@eaDir/x.png", "s1/mine/masks/x.png", "s1/mine/lr/x.png")
    put(tmp_path / "s1/other", "lock", "settings.json", "manifest.parquet", "masks/x.png", "dataset/lr/y.png")
    for name, target in (("s0/circle", "."), ("s1/up", "..")):
        (tmp_path / name).symlink_to(target)
    found = image_files(tmp_path / pattern, tmp_path / "s1/mine", ["old", "new"])
    assert sorted(found.files["path"].to_pylist()) == ["s0/a.png", "s1/b.png"]
    assert kinds_in_words(found.passed_over) == (
        "1 @eaDir/, 1 excluded by --exclude old, nothing excluded by --exclude new"
    )


NAMES = ["x", "s1/x", "s1/y", "s2/y", "a.v2", "same.jpg", "same.png", "h\\i", "images/g", "Köln/früh", "b", "b.v2"]


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("x.png", ["x"]),
        ("./x.png", ["x"]),
        ("s1/x.jpg", ["s1/x"]),
        ("images/s1/x.jpg", ["s1/x"]),
        ("data/images/images/x.png", ["x"]),
        ("../exp3/s1/x.png", ["s1/x"]),
        ("/home/me/exp3/s1/x.png", ["s1/x"]),
        ("C:\\exp3\\s1\\x.png", ["s1/x"]),
        ("..\\s1\\x.png", ["s1/x"]),
        ("y.png", ["s1/y", "s2/y"]),
        ("s2/y.png", ["s2/y"]),
        ("s3/y.png", []),
        ("früh.png", ["Köln/früh"]),
        (unicodedata.normalize("NFD", "Köln/früh.png"), ["Köln/früh"]),
        (unicodedata.normalize("NFD", "/home/Köln/früh.png"), ["Köln/früh"]),
        ("h\\i.png", ["h\\i"]),
        ("images/g.png", ["images/g"]),
        ("g.png", ["images/g"]),
        ("a.v2.png", ["a.v2"]),
        ("a.v2", ["a.v2"]),
        ("b.v2", ["b.v2"]),
        ("same.jpg", ["same.jpg"]),
        ("same.png.png", ["same.png"]),
        ("images/0123abcd-s2/y.png", []),
        ("../upload/1/0123abcd-x.png", ["x"]),
        ("images\\0123abcd-früh.png", []),
        ("0123abcd-früh.png", ["Köln/früh"]),
        ("z.png", []),
        ("", []),
        ("/", []),
    ],
)
def test_the_images_of_a_path(path: str, found: list[str]) -> None:
    assert ImageNames(NAMES).find(path) == found


def test_names_that_differ_in_composed_letters_alone() -> None:
    composed, decomposed = "ü/x", unicodedata.normalize("NFD", "ü/x")
    names = ImageNames([composed, decomposed])
    assert names.find(f"{decomposed}.png") == [decomposed]
    assert names.find(f"{composed}.png") == [composed]
    assert names.find("x.png") == sorted([composed, decomposed])
