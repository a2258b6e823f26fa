"""Pairing masks: nested folders, missing twins, ambiguous names, and workspaces with human masks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from desra_core.errors import UsageError
from desra_core.evaluation.mask_files import pair_folders, pair_workspace
from desra_core.images.codec import encode_mask
from desra_core.workspace import Workspace
from desra_core.workspace.human_masks import HUMAN_MASKS
from desra_core.workspace.manifest import read_manifest, scan
from desra_core.workspace.matching import Sources


def put(folder: Path, *names: str) -> Path:
    """Write files of different content."""
    for index, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_mask(np.eye(12 + index, dtype=bool)) + folder.name.encode())
    return folder


def test_nested_folders_and_missing_twins(tmp_path: Path) -> None:
    masks = put(tmp_path / "masks", "a.png", "set 1/b.png", "set 1/deep/c.jpg", "only/mask.png")
    gt = put(tmp_path / "gt", "a.png", "set 1/b.tif", "set 1/deep/c.png", "z.png", ".hidden.png", "notes.txt")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    found = pair_folders(masks, gt)
    assert [(pair.name, pair.mask, pair.ground_truth) for pair in found.pairs] == [
        ("a", masks / "a.png", gt / "a.png"),
        ("set 1/b", masks / "set 1/b.png", gt / "set 1/b.tif"),
        ("set 1/deep/c", masks / "set 1/deep/c.jpg", gt / "set 1/deep/c.png"),
    ]
    assert found.without_ground_truth == {"only/mask": masks / "only/mask.png"}
    assert found.without_mask == {"z": gt / "z.png"}
    assert (found.failures, found.masks, found.ground_truth) == ([], masks, (gt,))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()} == before


def test_labels_and_gan_results(tmp_path: Path) -> None:
    folders = [put(tmp_path / name, "a.png", "b/c.png", "d.png") for name in ("masks", "gt")]
    labels = put(tmp_path / "labels", "a.png", "b/c.png", "b/c.tif")
    gan_sr = put(tmp_path / "gan", "b/c.webp", "d.jpg")
    pairs = pair_folders(*folders, labels=labels, gan_sr=gan_sr).pairs
    assert [pair.labels for pair in pairs] == [labels / "a.png", None, None]
    assert [pair.gan_sr for pair in pairs] == [None, gan_sr / "b/c.webp", gan_sr / "d.jpg"]
    assert not any(pair.whole for pair in pairs)


def test_a_name_with_two_candidates_is_left_out(tmp_path: Path) -> None:
    """The name is reported, and the rest judged. Where both sides have the same two files, they are two images."""
    masks = put(tmp_path / "masks", "a.jpg", "a.png", "b.png", "c.png", "c.jpg")
    gt = put(tmp_path / "gt", "a.png", "b.png", "c.png", "c.jpg")
    found = pair_folders(masks, gt)
    assert [pair.name for pair in found.pairs] == ["b", "c.jpg", "c.png"]
    assert [str(error) for error in found.failures] == [
        "a: has two candidates among the mask files: a.jpg and a.png; keep one of them"
    ]
    assert (found.without_ground_truth, found.without_mask) == ({}, {})


def test_folders_without_images(tmp_path: Path) -> None:
    full, empty = put(tmp_path / "full", "a.png"), tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UsageError, match="empty: holds no images; name a folder of mask files"):
        pair_folders(empty, full)
    with pytest.raises(UsageError, match="empty: holds no images; name a folder of ground-truth files"):
        pair_folders(full, empty)
    with pytest.raises(UsageError, match="nowhere: is no folder"):
        pair_folders(full, tmp_path / "nowhere")
    with pytest.raises(UsageError, match="nowhere: is no folder"):
        pair_folders(full, full, labels=tmp_path / "nowhere")


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """Make a workspace of pairs with labels, and a mask for each image but the last."""
    folders = {role: put(tmp_path / role, "a.png", "b/c.png", "d.png", "e.png") for role in ("mse_sr", "gan_sr")}
    folders["labels"] = put(tmp_path / "labels", "a.png", "b/c.png", "d.png", "e.png")
    place = Workspace(tmp_path / "ws")
    place.create()
    scan(Sources(**folders), place, shard_size=10)
    put(place.masks, "a.png", "b/c.png", "d.png")
    return place


def look_at(workspace: Workspace, gan_sr_key: str | None = None, **ids: str | None) -> None:
    """Give some images human masks; without an id they are of the present image."""
    manifest = read_manifest(workspace)
    assert manifest is not None
    known = dict(zip(manifest["name"].to_pylist(), manifest["id"].to_pylist(), strict=True))
    put(workspace.human, *(f"{name}.png" for name in ids))
    rows = [
        {"name": name, "id": image or known[name], "gan_sr_key": gan_sr_key, "pixels": 1, "regions": 1}
        for name, image in ids.items()
    ]
    workspace.publish_table(workspace.human_manifest, pa.Table.from_pylist(rows, HUMAN_MASKS))


def test_human_masks_win(tmp_path: Path, workspace: Workspace) -> None:
    look_at(workspace, a=None, e=None, d="of another photo")
    gt = put(tmp_path / "given", "a.png", "b/c.png", "elsewhere.png")
    found = pair_workspace(workspace, gt=gt)
    assert [(pair.name, pair.ground_truth) for pair in found.pairs] == [
        ("a", workspace.human / "a.png"),
        ("b/c", gt / "b/c.png"),
    ]
    assert all(pair.whole for pair in found.pairs)
    assert [pair.gan_sr for pair in found.pairs] == [tmp_path / "gan_sr/a.png", tmp_path / "gan_sr/b/c.png"]
    assert [pair.labels for pair in found.pairs] == [tmp_path / "labels/a.png", tmp_path / "labels/b/c.png"]
    assert found.without_mask == {"e": workspace.human / "e.png", "elsewhere": gt / "elsewhere.png"}
    assert found.without_ground_truth == {}
    assert (found.not_looked_at, found.outdated) == (1, 1)
    assert found.ground_truth == (workspace.human, gt)
    others = put(tmp_path / "others", "a.png")
    (pair, _) = pair_workspace(workspace, gt=gt, labels=others, gan_sr=others).pairs
    assert (pair.labels, pair.gan_sr) == (others / "a.png", others / "a.png")


def test_masks_of_another_model_do_not_count(workspace: Workspace) -> None:
    look_at(workspace, "one model", a=None)
    workspace.settings.write_text(json.dumps({"settings": {}, "target": {"gan_sr_key": "one model"}}))
    assert [pair.name for pair in pair_workspace(workspace).pairs] == ["a"]
    workspace.settings.write_text(json.dumps({"settings": {}, "target": {"gan_sr_key": "another"}}))
    with pytest.raises(UsageError, match=r"holds no human masks that count \(1 do not\); bring some"):
        pair_workspace(workspace)


def test_a_mined_workspace(tmp_path: Path) -> None:
    """GAN results of images with artifacts lie in its dataset, labels in its maps."""
    place = Workspace(tmp_path / "ws")
    place.create()
    scan(Sources(lr=put(tmp_path / "photos", "a.png", "b.png")), place, shard_size=10)
    put(place.masks, "a.png", "b.png")
    put(place.dataset("gan_sr", "a").parent, "a.png")
    look_at(place, a=None, b=None)
    manifest = read_manifest(place)
    assert manifest is not None
    stored = place.group(manifest["id"][1].as_py()) / "labels"
    stored.mkdir(parents=True)
    pairs = pair_workspace(place).pairs
    assert [pair.gan_sr for pair in pairs] == [place.dataset("gan_sr", "a"), None]
    assert [pair.labels for pair in pairs] == [None, stored]


def test_the_masks_of_a_workspace_by_their_folder(tmp_path: Path, workspace: Workspace) -> None:
    """Masks of a workspace are known to have their images' sizes."""
    (pair,) = pair_folders(workspace.masks, put(tmp_path / "given", "a.png")).pairs
    assert pair.whole


def test_folders_that_are_no_workspace_with_masks(tmp_path: Path, workspace: Workspace) -> None:
    with pytest.raises(UsageError, match="elsewhere: has no masks; name the workspace of desra detect or mine"):
        pair_workspace(Workspace(tmp_path / "elsewhere"))
    with pytest.raises(UsageError, match="ws: holds no human masks; bring some with desra import"):
        pair_workspace(workspace)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"holds no human masks, and .*empty no images"):
        pair_workspace(workspace, gt=tmp_path / "empty")
