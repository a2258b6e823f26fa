"""A sweep deletes the files that no run needs, and nothing else: the next run has nothing to do."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from desra_core.calibration.counting import histogram_key
from desra_core.errors import UsageError
from desra_core.housekeeping import garbage as sweeping
from desra_core.housekeeping.garbage import find_garbage, sweep
from desra_core.images.codec import encode_mask
from desra_core.planning.plan import load_settings, make_plan, publish_tables, save_settings
from desra_core.settings import Detection
from desra_core.workspace import Workspace
from desra_core.workspace.arrays import write_array
from desra_core.workspace.human_masks import HUMAN_MASKS
from desra_core.workspace.products import Record, gather_shard, read_records, read_shard, write_journal
from tests.conftest import photo
from tests.in_process import process
from tests.tasks.test_histories import Corpus, results


@pytest.fixture(scope="module")
def models(
    make_models: Callable[..., tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Path]]:
    """The models of all tests, which a process loads once."""
    folder = tmp_path_factory.mktemp("models")
    return {"models": make_models(folder / "models"), "newer": make_models(folder / "newer", strength=0.7)}


@pytest.fixture
def corpus(tmp_path: Path, models: dict[str, tuple[Path, Path]]) -> Corpus:
    return Corpus(tmp_path, lambda folder, **_: models[folder.name])


def tree(root: Path) -> dict[str, tuple[int, int]]:
    """Every file below a folder, links included: where it lies on the disk, and when it was written."""
    found = {
        str(path.relative_to(root)): path.lstat() for path in root.rglob("*") if path.is_symlink() or path.is_file()
    }
    return {path: (status.st_ino, status.st_mtime_ns) for path, status in found.items()}


def changed(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    return {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}


def holdings(workspace: Workspace) -> set[str]:
    """Masks, pictures and arrays, by path."""
    patterns = ("masks/**/*.png", "dataset/**/*.png", "maps/*/*/*")
    return {str(path.relative_to(workspace.root)) for pattern in patterns for path in workspace.root.glob(pattern)}


def pending(workspace: Workspace) -> int:
    settings, target = load_settings(workspace)
    return make_plan(workspace, pq.read_table(workspace.manifest), target, limit=settings.limit).pending


def going(workspace: Workspace, **options: bool) -> dict[str, str]:
    """Return the items that a sweep would delete, with the reasons."""
    table = find_garbage(workspace, **options).table
    return {row["path"]: row["reason"] for row in table.to_pylist() if row["kind"] != "unknown"}


def swept(workspace: Workspace, **options: bool) -> dict[str, str]:
    """Sweep twice: only the found items are deleted, nothing is left to do, and no result has changed."""
    before, found, left = results(workspace), find_garbage(workspace, **options).table, pending(workspace)
    dropped = sweep(workspace, **options).table
    assert dropped.sort_by("path").equals(found.sort_by("path"))
    assert not going(workspace, **options)
    files = tree(workspace.root)
    assert set(sweep(workspace, **options).table["kind"].to_pylist()) <= {"unknown"}
    assert changed(files, tree(workspace.root)) <= {"lock"}
    assert pending(workspace) == left
    if not options:
        assert results(workspace) == before
    return {row["path"]: row["reason"] for row in found.to_pylist() if row["kind"] != "unknown"}


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_random_histories_end_like_fresh_workspaces(corpus: Corpus, seed: int) -> None:
    """The files are the same, too: no more is kept than the latest settings keep."""
    rng = np.random.default_rng(seed)
    choices = {
        "threshold": [0.5, 0.9],
        "keep": ["artifacts", "maps", "all"],
        "gan_model": [corpus.gan, corpus.newer],
        "keep_mse": [False, True],
    }
    for step in range(4):
        changes = {name: values[rng.integers(len(values))] for name, values in choices.items()}
        if step and rng.integers(2):
            cv2.imwrite(str(corpus.photos / f"{'abcdefg'[rng.integers(7)]}.png"), photo(100 + step, bright=True))
        workspace = corpus.run(**changes)
        if rng.integers(2):
            swept(workspace)
    swept(workspace)
    fresh = corpus.run("fresh", **changes)
    assert not going(fresh)
    assert holdings(workspace) == holdings(fresh)
    assert results(workspace) == results(fresh)
    assert set(read_records(workspace)["id"].to_pylist()) == set(read_records(fresh)["id"].to_pylist())


def test_files_that_only_earlier_settings_kept_are_deleted(corpus: Corpus) -> None:
    workspace = corpus.run(keep="maps", keep_mse=True)
    everything = {path for path in holdings(workspace) if path.startswith("maps")}
    assert not going(workspace)
    corpus.run(keep="artifacts")
    reasons = swept(workspace)
    assert set(reasons.values()) == {"that --keep artifacts and the other settings do not keep"}
    marked = set(pq.read_table(workspace.dataset_manifest)["id"].to_pylist())
    assert len({path.split("/")[2] for path in everything}) == 7 > len(marked)
    arrays = {"similarity", "mse_sr", "gan_sr", "zarr.json"}
    kept = {f"maps/{key[:2]}/{key}.zarr/{array}" for key in marked for array in arrays}
    assert {path for path in holdings(workspace) if path.startswith("maps")} == kept
    assert everything - kept == {path for path in reasons if path.startswith("maps")}
    records = read_records(workspace).to_pylist()
    assert {row["id"] for row in records if row["similarity_kept"]} == marked
    assert not list(workspace.maps.glob("??/")) or all(any(folder.iterdir()) for folder in workspace.maps.iterdir())
    # A looser threshold finds the very artifacts that it would have found without.
    assert results(corpus.run(threshold=0.9)) == results(corpus.run("fresh", threshold=0.9))


def test_labels_go_when_nothing_segments(corpus: Corpus) -> None:
    workspace = corpus.run(keep="maps")
    [record, *_] = read_shard(workspace, 0).values()
    write_array(workspace, record.id, "labels", np.zeros((200, 240), np.uint8), key="mmseg:gone")
    write_journal(workspace, 0, Record(**(record.__dict__ | {"labels_kept": True, "segmentation_key": "mmseg:gone"})))
    gather_shard(workspace, 0)
    group = f"maps/{record.id[:2]}/{record.id}.zarr"
    assert swept(workspace) == {f"{group}/labels": "that --keep maps and the other settings do not keep"}
    [after] = [row for row in read_records(workspace).to_pylist() if row["id"] == record.id]
    assert not after["labels_kept"]
    assert after["similarity_kept"]


def test_images_with_human_masks_are_kept_like_artifacts(corpus: Corpus) -> None:
    """Where the mask was drawn on results of the model in use; the mask itself is always kept."""
    workspace = corpus.run(keep="all")
    target = load_settings(workspace)[1]
    [clean, *_] = [row for row in read_records(workspace).to_pylist() if row["artifact_pixels"] == 0]
    name = next(row["name"] for row in pq.read_table(workspace.manifest).to_pylist() if row["id"] == clean["id"])
    mask = np.zeros((clean["height"], clean["width"]), bool)
    mask[:9] = True
    workspace.publish(workspace.human_mask(name), encode_mask(mask))
    row = {"name": name, "id": clean["id"], "gan_sr_key": target.gan_sr_key, "pixels": int(mask.sum()), "regions": 1}
    workspace.publish_table(workspace.human_manifest, pa.Table.from_pylist([row], HUMAN_MASKS))
    people = tree(workspace.human)
    process(corpus.settings("ws", keep="artifacts"))
    group = f"maps/{clean['id'][:2]}/{clean['id']}.zarr"
    swept(workspace)
    assert {path for path in holdings(workspace) if path.startswith(group)} == {
        f"{group}/{part}" for part in ("zarr.json", "similarity", "mse_sr", "gan_sr")
    }
    corpus.run(keep="artifacts", gan_model=corpus.newer)
    swept(workspace)
    assert not workspace.group(clean["id"]).exists()
    shutil.rmtree(corpus.photos)
    make = corpus.photos / "later.png"
    make.parent.mkdir()
    cv2.imwrite(str(make), photo(50, bright=True))
    corpus.run(gan_model=corpus.newer)
    swept(workspace, vanished=True)
    assert tree(workspace.human) == people


def test_images_that_are_not_done_are_left_alone(corpus: Corpus) -> None:
    """The next run replaces their files; images beyond a limit may be wanted again."""
    workspace = corpus.run(keep="all")
    held = holdings(workspace)
    process(corpus.settings("ws", gan_model=corpus.newer, limit=3))
    assert pending(workspace) == 0
    rows = pq.read_table(workspace.manifest).to_pylist()
    tried = {row["id"] for row in rows[:3]}
    assert {path.split("/")[2][:32] for path in swept(workspace) if ".zarr" in path} <= tried
    assert {path for path in held if path.split("/")[-2][:32] not in tried and "maps" in path} <= holdings(workspace)
    corpus.run(keep="maps")
    process(corpus.settings("ws", keep="artifacts", limit=3))
    held = {path for path in holdings(workspace) if "maps" in path and path.split("/")[2][:32] not in tried}
    assert swept(workspace)
    assert held <= holdings(workspace)
    corpus.run(keep="maps")
    for name in "abcdefg":
        workspace.mask(name).unlink()
    settings, target = load_settings(workspace)
    save_settings(workspace, settings.model_copy(update={"keep": "artifacts"}), replace(target, keep="artifacts"))
    assert pending(workspace) == 8
    before = holdings(workspace)
    swept(workspace)
    assert holdings(workspace) == before


def test_an_image_that_failed_for_good_keeps_no_arrays(corpus: Corpus) -> None:
    settings = {"keep": "all", "keep_mse": True}
    workspace = corpus.run(**settings)
    target = load_settings(workspace)[1]
    record = list(read_shard(workspace, 0).values())[2]
    failure = {"failed_stage": "mask", "failed_key": target.mask_key, "subject": "x", "reason": "y", "remedy": "z",
               "mask_key": None, "artifact_pixels": None}  # fmt: skip
    write_journal(workspace, 0, Record(**(record.__dict__ | failure | {"transient": True})))
    assert not going(workspace)  # it is tried again
    write_journal(workspace, 0, Record(**(record.__dict__ | failure)))  # and the run was cut off
    publish_tables(workspace, target)
    group = f"maps/{record.id[:2]}/{record.id}.zarr"
    assert swept(workspace) == {
        f"{group}/{part}": "of images that failed for good" for part in ("similarity", "gan_sr")
    }
    assert not list(workspace.journal.iterdir())
    [after] = [row for row in read_records(workspace).to_pylist() if row["id"] == record.id]
    assert not after["similarity_kept"]
    assert after["failed_stage"] == "mask"


def test_replaced_and_restored_photos(corpus: Corpus) -> None:
    """Of a photo that comes back, the newer of its two records counts, with and without a sweep."""
    original = (corpus.photos / "c.png").read_bytes()
    for sweeps in (False, True):
        workspace = corpus.run(f"ws{sweeps}", threshold=0.9)
        for content in (photo(77, bright=True), original):
            (corpus.photos / "c.png").write_bytes(
                content if isinstance(content, bytes) else cv2.imencode(".png", content)[1].tobytes()
            )
            corpus.run(workspace.root.name, threshold=0.9)
        assert len(find_garbage(workspace).stale) == 2
        if sweeps:
            reasons = swept(workspace)
            assert {path: reason for path, reason in reasons.items() if reason != "empty folders"} == {
                f"outcomes/{shard:08d}.parquet": "records of images that the manifest does not have" for shard in (0, 1)
            }
            assert not workspace.shard_records(1).exists()
            assert read_records(workspace).num_rows == 7
        assert results(corpus.run(workspace.root.name, threshold=0.5)) == results(corpus.run("fresh", threshold=0.5))
        assert (len(find_garbage(workspace).stale) == 0) == sweeps


def test_vanished_photos_are_deleted_with_vanished(corpus: Corpus) -> None:
    workspace = corpus.run(keep="all")
    before = holdings(workspace)
    ids = {row["name"]: row["id"] for row in pq.read_table(workspace.manifest).to_pylist()}
    content = (corpus.photos / "d.png").read_bytes()
    for name in ("b", "c", "d"):  # b has a twin
        (corpus.photos / f"{name}.png").unlink()
    workspace.publish(workspace.human_mask("c"), encode_mask(np.ones((200, 240), bool)))
    workspace.publish_table(workspace.human_manifest, HUMAN_MASKS.empty_table())
    corpus.run(keep="all")
    assert swept(workspace) == {}
    assert holdings(workspace) == before
    (corpus.photos / "d.png").write_bytes(content)  # it is back, and the next run will see it

    reasons = swept(workspace, vanished=True)
    assert {reason for path, reason in reasons.items() if path[0] != "o"} == {"of images that have vanished"}
    gone = {path for path in before if path.endswith(("/b.png", "/c.png")) or ids["c"] in path}
    assert holdings(workspace) == before - gone
    assert set(pq.read_table(workspace.manifest)["name"].to_pylist()) == {*"adefg", "twin"}
    assert {*pq.read_table(workspace.dataset_manifest)["image"].to_pylist()} == {*"adefg", "twin"}
    assert workspace.human_mask("c").exists()
    corpus.run(keep="all")
    fresh = corpus.run("fresh", keep="all")
    assert results(workspace) == results(fresh)
    assert holdings(workspace) == holdings(fresh)
    cv2.imwrite(str(corpus.photos / "c.png"), photo(2, bright=True))
    corpus.run(keep="all")
    assert workspace.mask("c").exists()


def strew(workspace: Workspace, elsewhere: Path) -> tuple[set[str], set[str]]:
    """Put files of no image into a workspace; returns the paths that a sweep deletes, and the others."""
    elsewhere.mkdir()
    (elsewhere / "a.png").write_bytes(b"mine")
    key = "0" * 32
    goes = {
        "masks/none.png", "masks/sub/deep/none.png", "dataset/lr/none.png", "pages/none.html", f"calibration/{key}",
        f"maps/00/{key}.zarr/similarity", f"maps/00/{key}.zarr/zarr.json", "masks/hollow/inner", "maps/ff", "tmp/half",
    }  # fmt: skip
    stays = {
        "notes.txt", "masks/a.txt", "masks/a.png.bak", "dataset/none.png", "dataset/other/a.png", "maps/00/notes",
        f"maps/zz/{key}.zarr/similarity/c", f"maps/11/{key}.zarr/similarity/c",
        f"maps/33/{'3' * 32}.zarr/mine/a", "calibration/mine/a", "other/a",
        "finetunes/mine/model.pth", "pages/a.txt", "masks/new\nline.txt",
    }  # fmt: skip
    for path in goes | stays:
        place = workspace.root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        if path in ("masks/hollow/inner", "maps/ff"):
            place.mkdir()
        elif path.endswith(("similarity", key)):
            place.mkdir()
            (place / "part").write_bytes(b"12345")
        else:
            place.write_bytes(b"1234567")
    links = {"masks/link.png": elsewhere / "a.png", "masks/linked": elsewhere, "dataset/gan_sr/a": elsewhere,
             "maps/22": elsewhere, "link": elsewhere}  # fmt: skip
    for path, target in links.items():
        (workspace.root / path).symlink_to(target)
    raw = os.fsencode(workspace.masks) + b"/\xff\xfe.png"
    Path(os.fsdecode(raw)).write_bytes(b"raw")
    return goes, stays | links.keys() | {os.fsdecode(b"masks/\xff\xfe.png")}


def test_unknown_files_stay_and_links_are_not_followed(corpus: Corpus, tmp_path: Path) -> None:
    workspace = corpus.run()
    group = workspace.group("3" * 32) / "zarr.json"
    group.parent.mkdir(parents=True)
    group.touch()  # something is in it that no run has made
    files = tree(workspace.root)
    goes, stays = strew(workspace, tmp_path / "elsewhere")
    table = find_garbage(workspace).table
    found = {row["path"]: row for row in table.to_pylist()}
    assert {path for path, row in found.items() if row["kind"] != "unknown"} == goes
    strangers = {path for path, row in found.items() if row["kind"] == "unknown"}
    assert len(strangers) == len(stays)
    assert f"maps/33/{'3' * 32}.zarr/mine" in strangers
    assert f"maps/11/{'0' * 32}.zarr" in strangers
    assert "masks/\\udcff\\udcfe.png" in strangers
    assert sweep(workspace).table.sort_by("path").equals(table.sort_by("path"))
    assert not any((workspace.root / path).exists() for path in goes)
    assert not (workspace.root / "masks/hollow").exists()
    assert not (workspace.root / "masks/sub").exists()
    assert all(os.path.lexists(workspace.root / path) for path in stays)
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["a.png"]
    assert changed(files, tree(workspace.root)) - stays - {"lock"} <= {"calibration/mine/a"}
    assert pending(workspace) == 0


def test_histograms_that_the_next_calibration_needs_stay(corpus: Corpus) -> None:
    workspace = corpus.run(keep="maps")
    counted = [(workspace, histogram_key(load_settings(workspace)[1]))]
    corpus.run(keep="maps", gan_model=corpus.newer)
    counted.append((workspace, histogram_key(load_settings(workspace)[1])))
    for place, key in counted:
        place.publish(place.calibration(key) / "00000000.parquet", b"counts")
    assert swept(workspace) == {f"calibration/{counted[0][1]}": "counts under other settings"}
    assert workspace.calibration(counted[1][1]).exists()


def test_pictures_of_a_delivery_that_was_given_up_are_deleted(corpus: Corpus) -> None:
    workspace = corpus.run()
    left, table = workspace.unpacked("0" * 32) / "sub/a.png", workspace.delivered("0" * 32, 0)
    left.parent.mkdir(parents=True)
    left.write_bytes(b"picture")
    table.write_bytes(b"stays")
    assert swept(workspace) == {
        f"deliveries/{'0' * 32}/unpacked": "pictures that a cut-off delivery has not put into tar files"
    }
    assert list(table.parent.iterdir()) == [table]


def test_folders_that_are_links_are_left(corpus: Corpus, tmp_path: Path) -> None:
    """A user may have them on another disk."""
    workspace = corpus.run(keep="maps")
    for name in ("maps", "masks", "dataset"):
        shutil.move(workspace.root / name, tmp_path / f"{name}.moved")
        (workspace.root / name).symlink_to(tmp_path / f"{name}.moved")
    corpus.run(keep="artifacts")
    (workspace.masks / "none.png").touch()
    files = tree(tmp_path)
    assert swept(workspace) == {}
    assert changed(files, tree(tmp_path)) <= {"ws/lock"}


def test_a_dry_run_changes_nothing(corpus: Corpus, tmp_path: Path) -> None:
    workspace = corpus.run(keep="all")
    (corpus.photos / "b.png").unlink()
    corpus.run(keep="artifacts")
    strew(workspace, tmp_path / "elsewhere")
    files = tree(workspace.root)
    assert going(workspace, vanished=True)
    assert tree(workspace.root) == files


@pytest.mark.parametrize("stride", [pytest.param(4, marks=pytest.mark.slow), 11])
def test_the_sweep_after_a_killed_sweep_goes_on(corpus: Corpus, monkeypatch: pytest.MonkeyPatch, stride: int) -> None:
    workspace = corpus.run("first", keep="maps", keep_mse=True)
    (corpus.photos / "b.png").unlink()
    cv2.imwrite(str(corpus.photos / "e.png"), photo(60, bright=True))
    corpus.run("first", keep="artifacts")
    expected = Workspace(corpus.root / "expected")
    shutil.copytree(workspace.root, expected.root)
    sweep(expected, vanished=True)

    class KilledError(BaseException):
        pass

    steps: list[int] = []

    def until(step: int, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if len(steps) == step:
                raise KilledError
            steps.append(step)
            return real(*arguments, **options)

        return call

    for step in (*range(5), *range(5, 200, stride)):
        steps.clear()
        with monkeypatch.context() as patch:
            for name in ("publish", "publish_table"):
                patch.setattr(Workspace, name, until(step, getattr(Workspace, name)))
            patch.setattr(sweeping.shutil, "rmtree", until(step, shutil.rmtree))
            patch.setattr(Path, "unlink", until(step, Path.unlink))
            patch.setattr(Path, "rename", until(step, Path.rename))
            copied = Workspace(corpus.root / f"killed{step}")
            shutil.copytree(workspace.root, copied.root)
            try:
                sweep(copied, vanished=True)
                break
            except KilledError:
                pass
        assert pending(copied) == 0
        sweep(copied, vanished=True)
        assert results(copied) == results(expected)
        assert holdings(copied) == holdings(expected)
        assert not going(copied, vanished=True)
        records = [read_records(each).sort_by("id") for each in (copied, expected)]
        assert records[0].equals(records[1])
    assert step > 30


def test_without_a_manifest_nothing_is_a_leftover(corpus: Corpus) -> None:
    workspace = corpus.run()
    workspace.manifest.unlink()
    files = tree(workspace.root)
    with pytest.raises(UsageError, match="has no manifest; run desra mine"):
        sweep(workspace)
    assert changed(files, tree(workspace.root)) <= {"lock"}


def test_a_workspace_of_detect(make_pairs: Callable[[Path, int], list[str]], tmp_path: Path) -> None:
    make_pairs(tmp_path, 5)

    def run(**changes: Any) -> Workspace:
        folders = {"mse_sr": tmp_path / "mse_sr", "gan_sr": tmp_path / "gan_sr"}
        return process(Detection(workspace=tmp_path / "ws", min_area="300", **folders, **changes))

    workspace = run(keep="maps")
    shutil.copy(tmp_path / "gan_sr/set1/photo001.png", tmp_path / "gan_sr/set0/photo000.png")
    for changes in ({}, {"threshold": 0.5}, {"keep": "maps"}, {}):
        run(**changes)
        swept(workspace)
    assert len(list(workspace.maps.glob("*/*"))) < 5
