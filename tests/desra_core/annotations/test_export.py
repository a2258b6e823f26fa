"""The files of an export, and the files that an export leaves alone."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from desra_core.annotations.corrections import publish_corrections, read_corrections
from desra_core.annotations.export import ExportFolder, export_workspace
from desra_core.errors import ImageError, TransientError, UsageError
from desra_core.images.codec import encode_mask, encode_png
from desra_core.workspace import Workspace
from tests.desra_core.annotations.drawn_masks import drawing

SMALL, LARGE = (np.kron(drawing(*rows), np.ones((8, 8), bool)) for rows in (("#...", "...."), ("###.", "###.")))
CLEAN = np.zeros((16, 32), bool)
MASKS = {"set0/small": SMALL, "set0/clean": CLEAN, "large": LARGE}


@pytest.fixture
def workspace(make_workspace) -> Workspace:
    return make_workspace(MASKS)


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def seen(path: Path) -> np.ndarray:
    return cv2.imread(str(path), cv2.IMREAD_UNCHANGED)


def correct(workspace: Workspace, folder: Path) -> None:
    with workspace.locked():
        corrections, errors = read_corrections(workspace, "labelme", folder)
        assert not errors
        publish_corrections(workspace, corrections)


def test_images_with_artifacts_by_default(workspace: Workspace, tmp_path: Path) -> None:
    exported = export_workspace(workspace, tmp_path / "out", "labelme")
    assert (exported.images, exported.regions, exported.by_people, exported.failures) == (2, 2, 0, [])
    names = {"set0/small", "large"}
    assert files(tmp_path / "out").keys() == {
        ".desra-export.json", *(f"{name}{suffix}" for name in names for suffix in (".png", ".json"))
    }  # fmt: skip


def test_all_and_the_worst(workspace: Workspace, tmp_path: Path) -> None:
    assert export_workspace(workspace, tmp_path / "all", "labelme", everything=True).images == 3
    severity = {row["image"]: row["severity"] for row in pq.read_table(workspace.regions).to_pylist()}
    export_workspace(workspace, tmp_path / "worst", "labelme", worst=1)
    assert [path.stem for path in (tmp_path / "worst").rglob("*.png")] == [Path(max(severity, key=severity.get)).stem]


def test_two_exports_are_the_same_bytes(workspace: Workspace, tmp_path: Path) -> None:
    for form in ("coco", "labelme", "folder"):
        for name in ("one", "two"):
            export_workspace(workspace, tmp_path / name / form, form, everything=True)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    before = {path: path.stat().st_mtime_ns for path in workspace.root.rglob("*")}
    export_workspace(workspace, tmp_path / "one/coco", "coco", everything=True)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert {path: path.stat().st_mtime_ns for path in workspace.root.rglob("*")} == before


def test_plain_folders(workspace: Workspace, tmp_path: Path) -> None:
    source = workspace.root.parent
    export_workspace(workspace, tmp_path / "out", "folder", everything=True)
    for name, mask in MASKS.items():
        parts = {kind: seen(tmp_path / f"out/{kind}/{name}.png") for kind in ("masks", "mse_sr", "gan_sr", "pseudo_gt")}
        assert np.array_equal(parts["masks"], 255 * mask)
        assert np.array_equal(parts["pseudo_gt"], np.where(mask[..., None], parts["mse_sr"], parts["gan_sr"]))
        for kind in ("mse_sr", "gan_sr"):
            assert (tmp_path / f"out/{kind}/{name}.png").read_bytes() == (source / f"{kind}/{name}.png").read_bytes()
    rows = list(csv.DictReader((tmp_path / "out/regions.csv").read_text().splitlines()))
    table = pq.read_table(workspace.regions).to_pylist()
    assert [row["image"] for row in rows] == [row["image"] for row in table]
    assert [float(row["severity"]) for row in rows] == [row["severity"] for row in table]
    assert [row["class_name"] for row in rows] == [row["class_name"] for row in table]
    assert not (tmp_path / "out/human").exists()


def test_a_human_mask_takes_the_place_of_the_detectors(workspace: Workspace, tmp_path: Path) -> None:
    export_workspace(workspace, tmp_path / "out", "labelme", everything=True)
    path = tmp_path / "out/set0/clean.json"
    document = json.loads(path.read_bytes())
    rectangle = {"label": "artifact", "shape_type": "rectangle", "points": [[2, 3], [5, 4]]}
    path.write_text(json.dumps(document | {"shapes": [rectangle]}))
    (tmp_path / "out/large.json").unlink()
    correct(workspace, tmp_path / "out")

    human = np.zeros_like(CLEAN)
    human[3:5, 2:6] = True
    exported = export_workspace(workspace, tmp_path / "plain", "folder")
    assert (exported.images, exported.regions, exported.by_people) == (3, 3, 2)
    assert np.array_equal(seen(tmp_path / "plain/human/set0/clean.png"), 255 * human)
    assert not seen(tmp_path / "plain/masks/set0/clean.png").any()
    mse_sr, gan_sr, pseudo_gt = (seen(tmp_path / f"plain/{kind}/set0/clean.png") for kind in
                                 ("mse_sr", "gan_sr", "pseudo_gt"))  # fmt: skip
    assert np.array_equal(pseudo_gt, np.where(human[..., None], mse_sr, gan_sr))

    export_workspace(workspace, tmp_path / "coco", "coco")
    document = json.loads((tmp_path / "coco/annotations.json").read_bytes())
    assert len(document["images"]) == len(document["annotations"]) == 3
    by_people = [row for row in document["annotations"] if row["attributes"] == {"mask_by": "person"}]
    assert [row["bbox"] for row in by_people] == [[2, 3, 4, 2], [0, 0, 8, 8]]
    assert all("score" not in row for row in by_people)


def test_pictures_are_8_bit_rgb(make_workspace, tmp_path: Path) -> None:
    workspace = make_workspace({"a": SMALL, "b": SMALL, "c": SMALL})
    source = workspace.root.parent / "gan_sr"
    rng = np.random.default_rng(1)
    deep = rng.integers(0, 2**16, (*SMALL.shape, 3), dtype=np.uint16)
    gray, clear = (rng.integers(0, 256, (*SMALL.shape, channels), dtype=np.uint8) for channels in (1, 4))
    for name, pixels in {"a": deep, "b": gray, "c": clear}.items():
        (source / f"{name}.png").write_bytes(encode_png(pixels))
    export_workspace(workspace, tmp_path / "out", "labelme")
    expected = {"a": (deep.astype(np.uint32) + 128) // 257, "b": gray.repeat(3, axis=2), "c": clear[:, :, :3]}
    for name, pixels in expected.items():
        found = seen(tmp_path / f"out/{name}.png")
        assert found.dtype == np.uint8
        assert np.array_equal(found[:, :, ::-1], pixels)


def test_copies_are_exported_once(make_workspace, tmp_path: Path) -> None:
    workspace = make_workspace({"b": SMALL}, copies={"a": "b", "c": "b"})
    assert pq.read_table(workspace.regions).num_rows == 3
    assert export_workspace(workspace, tmp_path / "out", "labelme", worst=9).images == 1
    assert [path.name for path in (tmp_path / "out").glob("*.png")] == ["a.png"]


def test_unreadable_images_are_left_out(workspace: Workspace, tmp_path: Path) -> None:
    (workspace.root.parent / "gan_sr/large.png").write_bytes(b"")
    exported = export_workspace(workspace, tmp_path / "out", "labelme")
    assert exported.images == 1
    assert [Path(error.subject).name for error in exported.failures] == ["large.png"]
    assert not list((tmp_path / "out").glob("large.*"))
    with pytest.raises(ImageError, match="is empty"):
        export_workspace(workspace, tmp_path / "none", "labelme", worst=1)
    assert not (tmp_path / "none").exists()


def test_a_mask_that_was_not_recorded(workspace: Workspace, tmp_path: Path) -> None:
    workspace.mask("set0/small").write_bytes(encode_mask(~SMALL))
    for form in ("labelme", "coco"):
        exported = export_workspace(workspace, tmp_path / form, form)
        assert [error.reason for error in exported.failures] == ["is not the mask that was recorded"]


def test_a_picture_that_has_another_size_since(workspace: Workspace, tmp_path: Path) -> None:
    (workspace.root.parent / "gan_sr/large.png").write_bytes(encode_png(np.zeros((9, 9), np.uint8)))
    for form in ("labelme", "folder"):
        exported = export_workspace(workspace, tmp_path / form, form)
        assert [error.reason for error in exported.failures] == ["is 9x9 and was 32x16"]


def test_nothing_to_export(make_workspace, tmp_path: Path) -> None:
    workspace = make_workspace({"a": CLEAN})
    with pytest.raises(UsageError, match="has no image to export that is done; give --all"):
        export_workspace(workspace, tmp_path / "out", "coco")
    assert export_workspace(workspace, tmp_path / "out", "coco", everything=True).images == 1
    with pytest.raises(UsageError, match="is no workspace with a run in it"):
        export_workspace(Workspace(tmp_path / "nowhere"), tmp_path / "other", "coco")


def test_an_export_is_brought_up_to_date(workspace: Workspace, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_workspace(workspace, out, "labelme", everything=True)
    (out / "notes.txt").write_text("mine")
    export_workspace(workspace, out, "labelme")
    assert sorted(files(out)) == [
        ".desra-export.json", "large.json", "large.png", "notes.txt", "set0/small.json", "set0/small.png"
    ]  # fmt: skip
    export_workspace(workspace, out, "coco")
    expected = tmp_path / "expected"
    export_workspace(workspace, expected, "coco")
    (out / "notes.txt").unlink()
    assert files(out) == files(expected)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("form", ["labelme", "coco", "folder"])
def test_edited_files_are_not_replaced(workspace: Workspace, tmp_path: Path, form: str) -> None:
    out = tmp_path / "out"
    export_workspace(workspace, out, form)
    edited = {"labelme": "large.json", "coco": "annotations.json", "folder": "masks/large.png"}[form]
    (out / edited).write_bytes(b"edited")
    before = files(out)
    with pytest.raises(UsageError, match=f"{edited}: was edited since it was exported; import it first"):
        export_workspace(workspace, out, form, everything=True)
    assert files(out) == before
    export_workspace(workspace, out, form, overwrite=True)
    assert files(out)[edited] != b"edited"
    export_workspace(workspace, out, form)


def test_a_file_of_a_persons_own_is_not_replaced(workspace: Workspace, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_workspace(workspace, out, "labelme")
    (out / "set0/clean.json").write_text("{}")
    with pytest.raises(UsageError, match=r"clean\.json: was edited"):
        export_workspace(workspace, out, "labelme", everything=True)


def test_an_update_that_was_killed_goes_on(workspace: Workspace, tmp_path: Path, monkeypatch) -> None:
    """Between the old files and the new ones, nothing counts as edited by a person."""
    out = tmp_path / "out"
    export_workspace(workspace, out, "labelme", everything=True)
    correct(workspace, out)
    replace, replaced = Path.replace, []

    def killed(self: Path, target: Path) -> Path:
        replaced.append(target)
        if str(target).endswith(".json") and len(replaced) == 4:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        export_workspace(workspace, out, "labelme")
    monkeypatch.undo()
    assert not list(tmp_path.glob(".*.unfinished"))
    export_workspace(workspace, out, "labelme")
    export_workspace(workspace, tmp_path / "fresh", "labelme")
    assert files(out) == files(tmp_path / "fresh")


def test_folders_that_may_not_be_written(workspace: Workspace, make_workspace, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/photo.png").touch()
    (tmp_path / "file").touch()
    export_workspace(make_workspace(MASKS, "other"), tmp_path / "others", "coco")
    for output, reason in {
        tmp_path / "full": "is a folder with other things in it",
        tmp_path / "file": "is a file",
        tmp_path / "others": "holds an export of",
        workspace.root / "out": "lies inside the workspace",
        workspace.masks: "lies inside the workspace",
    }.items():
        with pytest.raises(UsageError, match=reason):
            export_workspace(workspace, output, "coco")
    assert files(tmp_path / "full").keys() == {"photo.png"}


def test_a_full_disk_leaves_no_half_export(workspace: Workspace, tmp_path: Path, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise TransientError("out", "the disk is full", "free some space and run again")

    monkeypatch.setattr(ExportFolder, "write", full)
    with pytest.raises(TransientError):
        export_workspace(workspace, tmp_path / "out", "labelme")
    assert not list(tmp_path.glob("out*"))
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("form", ["coco", "labelme", "folder"])
def test_a_name_without_room_for_a_suffix_costs_one_line(make_workspace, tmp_path: Path, form: str) -> None:
    long = "x" * 251
    workspace = make_workspace({long: SMALL, "large": LARGE})
    exported = export_workspace(workspace, tmp_path / "out", form)
    left_out = [str(tmp_path / f"out/{long}.json")] if form == "labelme" else []
    assert [error.subject for error in exported.failures] == left_out
    assert exported.images == 2 - len(left_out)
    assert any(path.endswith("large.png") for path in files(tmp_path / "out"))
    assert not left_out or not any(long in path for path in files(tmp_path / "out"))
