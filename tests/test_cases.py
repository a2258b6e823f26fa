"""The small inputs of ../shared/data/cases that once came out wrong, each with what is right."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

from desra_core.errors import UsageError
from desra_core.images.codec import decode, encode_png
from desra_core.workspace import Workspace
from desra_core.workspace.manifest import image_refs, scan
from desra_core.workspace.matching import Sources

Check = Callable[[Path, Path], None]


def names_in_nfd(case: Path, folder: Path) -> None:
    """A name that a Mac has spelled is a twin of the same name as others spell it."""
    (picture,) = (case / "labelme-nfd").glob("*.png")
    assert not unicodedata.is_normalized("NFC", picture.name)
    twin = folder / "mse_sr" / unicodedata.normalize("NFC", picture.name)
    twin.parent.mkdir()
    twin.write_bytes(encode_png(decode(picture.read_bytes(), picture).pixels[::-1]))
    workspace = Workspace(folder / "ws")
    for sources in (Sources(twin.parent, picture.parent), Sources(picture.parent, twin.parent)):
        corpus = scan(sources, workspace, shard_size=10)
        assert corpus.failures.num_rows == 0
        (image,) = image_refs(corpus.manifest.filter(corpus.manifest["present"]))
        assert {image.mse_sr.path, image.gan_sr.path} == {twin, picture}


def suffixes_of_jpeg(case: Path, folder: Path) -> None:
    """``.jfif`` and ``.jpe`` are JPEG; what is passed over is counted."""
    corpus = scan(Sources(lr=case), Workspace(folder / "ws"), shard_size=10)
    images = image_refs(corpus.manifest)
    assert [image.lr.path.name for image in images] == ["photo.jfif", "photo2.jpe"]
    assert all(decode(image.lr.path.read_bytes(), image.lr.path).pixels.size for image in images)
    assert corpus.passed_over == {"without a suffix": 1}


def thumbnails(case: Path, folder: Path) -> None:
    """Thumbnails of a Synology are no photos."""
    with pytest.raises(UsageError, match="holds no images, but 1 @eaDir/, 1 without a suffix"):
        scan(Sources(lr=case), Workspace(folder / "ws"), shard_size=10)


CASES: dict[str, Check] = {"15-nfd": names_in_nfd, "16-jfif": suffixes_of_jpeg, "17-eadir": thumbnails}


@pytest.mark.parametrize("name", CASES)
def test_a_case(shared_data: Path, tmp_path: Path, name: str) -> None:
    if not (shared_data / "cases" / name).is_dir():
        pytest.skip(f"no {name} among the shared cases")
    CASES[name](shared_data / "cases" / name, tmp_path)
