"""A change of settings, files or workspace makes a run repeat the stages that it must, on tiny pairs."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from safetensors.torch import save_file

from desra_core.detection.class_weights import Weights
from desra_core.errors import ImageError, UsageError
from desra_core.images.codec import CLASS_COUNT, encode_png
from desra_core.planning import plan as target_module
from desra_core.planning.plan import (
    REGIONS,
    Plan,
    assess,
    done_images,
    load_settings,
    make_plan,
    prepare,
    save_settings,
    target_of,
    worst_regions,
)
from desra_core.settings import Detection, Machine, min_area_pixels
from desra_core.stages import Stage, StageJob, failure, run_stage
from desra_core.stages.mask import mask_stage
from desra_core.stages.similarity import similarity_stage
from desra_core.workspace import Workspace
from desra_core.workspace.manifest import image_refs
from desra_core.workspace.products import Record, gather_shard, held_by, read_shard, to_table

BOTH = ("mse_sr", "gan_sr")
RNG = np.random.default_rng(3)
BASE = np.clip(128 + 5 * (cv2.GaussianBlur(RNG.random((64, 72, 3)) * 255, (0, 0), 6) - 128), 40, 210)
NOISE = RNG.normal(0, 1, (64, 72, 3)) * np.pad(np.ones((34, 40, 1)), ((15, 15), (16, 16), (0, 0)))
# An artifact at any threshold, one at 0.85 only, none.
STRENGTHS = {"strong": 40, "weak": 7, "clean": 0}
STRONG, WEAK, CLEAN = {"strong"}, {"weak"}, {"clean"}
ALL = STRONG | WEAK | CLEAN


class Lab:
    """A corpus of one image of each strength, and runs on it as the flow does them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        Workspace(root / "ws").create()
        for name, strength in STRENGTHS.items():
            self.put("mse_sr", name, BASE)
            self.put("gan_sr", name, BASE + strength * NOISE)

    @property
    def workspace(self) -> Workspace:
        return Workspace(self.root / "ws")

    def put(self, folder: str, name: str, pixels: np.ndarray) -> None:
        path = self.root / folder / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode_png(np.clip(pixels, 0, 255).astype(np.uint8)))

    def put_labels(self, label: int, folder: str = "labels") -> None:
        for name in STRENGTHS:
            self.put(folder, name, np.full(BASE.shape[:2], label))

    def detection(self, *, labels: str = "", **changes: Any) -> Detection:
        if labels:
            changes["segmenter"] = f"labels:{self.root / labels}"
        paths = {role: self.root / role for role in BOTH}
        return Detection(**(paths | {"workspace": self.root / "ws", "min_area": "200"} | changes))

    def plan(self, **changes: Any) -> Plan:
        return prepare(self.detection(**changes))[1]

    def run(self, **changes: Any) -> dict[str, set[str]]:
        """Run the stages that have something to do; returns the names that each was run on."""
        workspace, plan, weights, _ = prepare(self.detection(**changes))
        ran: dict[str, set[str]] = {}
        for shard in plan.shards:
            rows = plan.rows(shard)
            images = {image.id: image for image in image_refs(rows)}
            records = read_shard(workspace, shard)
            failures = {}
            for function, job in stages(self.detection(**changes), plan, weights):
                held = held_by(workspace, rows, plan.target.gan_sr_key, each=True)
                name = function.__name__.removesuffix("_stage")
                flags = assess(rows, to_table(records.values()), plan.target, held).lacking[name]
                for image_id in np.array(rows["id"].to_pylist())[flags]:
                    if image_id in failures:
                        continue
                    image, record = images[image_id], records.get(image_id, Record(image_id))
                    try:
                        record = run_stage(function, image, record, workspace, job)
                    except ImageError as error:
                        record = failure(image, record, name, plan.target, error)
                    records[image_id] = record
                    if record.failed:
                        failures[image_id] = record
                    ran.setdefault(name, set()).update(image.names)
            gather_shard(workspace, shard, failures.values())
        return ran

    def masks(self) -> dict[str, bytes]:
        return {path.stem: path.read_bytes() for path in sorted((self.root / "ws/masks").iterdir())}

    def marked(self) -> set[str]:
        return {
            name
            for name, data in self.masks().items()
            if cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED).any()
        }

    def groups(self) -> int:
        return len(list((self.root / "ws/maps").glob("*/*.zarr/similarity")))


def stages(detection: Detection, plan: Plan, weights: Weights) -> list[tuple[Stage, StageJob]]:
    job = StageJob(detection, plan.target, weights, "", "cpu", tile=256, threads=1, max_pixels=10**6)
    return [(similarity_stage, job), (mask_stage, job)]


def weights_file(path: Path, weight: float) -> str:
    rows = [f"{index},name,{weight}" for index in range(CLASS_COUNT)]
    path.write_text("\n".join(["ade20k_index,name,weight", *rows]))
    return str(path)


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


def fresh_masks(tmp_path: Path, **changes: Any) -> dict[str, bytes]:
    """Return the masks of an undisturbed run."""
    (tmp_path / "fresh").mkdir()
    fresh = Lab(tmp_path / "fresh")
    for folder in tmp_path.glob("labels*"):
        shutil.copytree(folder, tmp_path / "fresh" / folder.name)
    fresh.run(**changes)
    return fresh.masks()


# --- keys ---


def keys_changed(before: Detection, after: Detection) -> set[str]:
    one, other = asdict(target_of(before)[0]), asdict(target_of(after)[0])
    return {key for key in one if key.endswith("_key") and one[key] != other[key]}


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"window": 13}, ["similarity_key", "mask_key"]),
        ({"threshold": 0.6}, ["mask_key"]),
        ({"min_area": "300"}, ["mask_key"]),
        ({"min_area": "1%"}, ["mask_key"]),
        ({"weights": "none"}, ["weighting_key", "mask_key"]),
        ({"labels": ""}, ["segmentation_key", "weighting_key", "mask_key"]),
        ({"labels": "elsewhere"}, []),
        ({"weights": "published"}, []),
        ({"keep": "all"}, []),
        ({"limit": 1, "shard_size": 7}, []),
        ({"mse_sr": Path("a"), "gan_sr": Path("b"), "lr": Path("c"), "workspace": Path("d")}, []),
    ],
    ids=str,
)
def test_keys_change_with_what_they_must(lab: Lab, changes: dict[str, Any], keys: list[str]) -> None:
    before = lab.detection(labels="labels")
    assert keys_changed(before, lab.detection(**({"labels": "labels"} | changes))) == set(keys)


def test_another_decoding_version_changes_the_keys_that_depend_on_pixels(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.py").touch()
    (tmp_path / "checkpoint.pth").touch()
    segmenter = f"mmseg:{tmp_path / 'config.py'},{tmp_path / 'checkpoint.pth'}"
    for changes in ({}, *({"method": method} for method in ("ldl", "ssim", "niqe"))):
        made = {"threshold": 0.5, "segmenter": segmenter} | changes
        before = asdict(target_of(lab.detection(**made))[0])
        with monkeypatch.context() as patched:
            patched.setattr(target_module, "DECODING_VERSION", 99)
            after = asdict(target_of(lab.detection(**made))[0])
        changed = {key for key in before if key.endswith("_key") and before[key] != after[key]}
        assert changed == {"similarity_key", "segmentation_key", "weighting_key", "mask_key"}


@pytest.mark.parametrize(
    ("tensor", "changes"),
    [("body.0.rdb1.conv1.weight", True), ("model.1.sub.0.RDB1.conv1.0.weight", True), ("body.0.weight", False)],
)
def test_the_version_of_an_rrdbnet_changes_the_keys_of_its_results_alone(
    tensor: str, changes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = tmp_path / "model.pth", tmp_path / "model.safetensors"
    torch.save({"params": {tensor: torch.zeros(1)}}, files[0])
    save_file({tensor: torch.zeros(1)}, files[1])
    before = [target_module.result_key(file, "float32") for file in files]
    monkeypatch.setattr(target_module, "RRDB_VERSION", 99)
    target_module.result_version.cache_clear()
    after = [target_module.result_key(file, "float32") for file in files]
    target_module.result_version.cache_clear()
    assert [old != new for old, new in zip(before, after, strict=True)] == [changes] * 2


def test_machine_facts_are_no_settings_of_a_detection() -> None:
    assert not set(Machine.model_fields) & set(Detection.model_fields)


def test_weights_count_by_their_values(lab: Lab, tmp_path: Path) -> None:
    one = lab.detection(labels="labels", weights=weights_file(tmp_path / "a.csv", 1.5))
    same = lab.detection(labels="labels", weights=weights_file(tmp_path / "b.csv", 1.50))
    other = lab.detection(labels="labels", weights=weights_file(tmp_path / "c.csv", 1.6))
    assert keys_changed(one, same) == set()
    assert keys_changed(one, other) == {"weighting_key", "mask_key"}
    assert target_of(one)[0].min_weight == 1.5


@pytest.mark.parametrize("weights", ["published", "some.csv"])
def test_weights_need_labels(lab: Lab, weights: str) -> None:
    with pytest.raises(UsageError, match=r"--weights.*needs class labels"):
        target_of(lab.detection(weights=weights))
    assert target_of(lab.detection(weights="none"))[0].min_weight == 1


@pytest.mark.parametrize(
    ("min_area", "pixels"), [("0", 0), ("4000", 4000), ("0.1%", 10), ("100%", 10_000), ("57%", 5700), ("0.019%", 1)]
)
def test_min_area_in_pixels(min_area: str, pixels: int) -> None:
    assert min_area_pixels(min_area, 100, 100) == pixels


def test_settings_round_trip(lab: Lab) -> None:
    detection = lab.detection(labels="labels", min_area="0.5%", threshold=0.1 + 0.2)
    target, _ = target_of(detection)
    workspace = Workspace(lab.root / "ws")
    with pytest.raises(UsageError, match="no workspace with a run in it"):
        load_settings(workspace)
    save_settings(workspace, detection, target)
    assert load_settings(workspace) == (detection, target)
    workspace.settings.write_bytes(b"")
    with pytest.raises(UsageError, match=r"settings\.json: is damaged; run the last desra mine or detect again"):
        load_settings(workspace)


# --- repeated stages ---


def test_first_run_and_then_nothing(lab: Lab) -> None:
    plan = lab.plan()
    assert (plan.images, plan.pending, plan.done, plan.failed, plan.dropped) == (3, 3, 0, 0, 0)
    assert lab.run() == {"similarity": ALL, "mask": ALL}
    assert lab.marked() == STRONG
    assert lab.groups() == 1
    plan = lab.plan()
    assert (plan.pending, plan.done, plan.shards) == (0, 3, {})
    assert lab.run() == {}


@pytest.mark.parametrize("changes", [{"threshold": 0.6}, {"min_area": "300"}, {"threshold": 0.5, "min_area": "10%"}])
def test_stricter_settings_need_nothing_for_empty_images(lab: Lab, tmp_path: Path, changes: dict[str, Any]) -> None:
    lab.run()
    assert lab.run(**changes) == {"mask": STRONG}
    assert lab.masks() == fresh_masks(tmp_path, **changes)
    assert lab.run(**changes) == {}


@pytest.mark.parametrize("changes", [{"threshold": 0.85}, {"min_area": "100"}, {"min_area": "1%"}])
def test_looser_settings_compute_dropped_maps_again(lab: Lab, tmp_path: Path, changes: dict[str, Any]) -> None:
    lab.run()
    assert lab.plan(**changes).dropped == 2
    assert lab.run(**changes) == {"similarity": WEAK | CLEAN, "mask": ALL}
    assert lab.masks() == fresh_masks(tmp_path, **changes)
    assert lab.marked() == (STRONG | WEAK if "threshold" in changes else STRONG)
    assert lab.run(**changes) == {}


def test_kept_maps_need_only_the_mask(lab: Lab, tmp_path: Path) -> None:
    assert lab.run(keep="maps") == {"similarity": ALL, "mask": ALL}
    assert lab.groups() == 3
    plan = lab.plan(keep="maps", threshold=0.85)
    assert plan.dropped == 0
    assert lab.run(keep="maps", threshold=0.85) == {"mask": ALL}
    assert lab.marked() == STRONG | WEAK
    assert lab.masks() == fresh_masks(tmp_path, threshold=0.85)


def test_keep_maps_needs_the_maps_of_all(lab: Lab) -> None:
    lab.run()
    assert lab.plan(keep="maps").dropped == 2
    assert lab.run(keep="maps") == {"similarity": WEAK | CLEAN, "mask": WEAK | CLEAN}
    assert lab.groups() == 3
    assert lab.run(keep="maps") == {}
    assert lab.run(keep="artifacts") == {}


def test_another_window_does_everything_again(lab: Lab, tmp_path: Path) -> None:
    lab.run()
    assert lab.plan(window=7).dropped == 0
    assert lab.run(window=7) == {"similarity": ALL, "mask": ALL}
    assert lab.masks() == fresh_masks(tmp_path, window=7)


def test_a_changed_file_replaces_all_outputs(lab: Lab, tmp_path: Path) -> None:
    lab.run()
    (old,) = (lab.root / "ws/maps").glob("*/*.zarr")
    lab.put("gan_sr", "strong", BASE + 50 * NOISE)
    assert lab.run() == {"similarity": STRONG, "mask": STRONG}
    assert lab.marked() == STRONG
    assert not old.exists()
    assert lab.groups() == 1
    shutil.copy(lab.root / "mse_sr/strong.png", lab.root / "mse_sr/twin.png")
    shutil.copy(lab.root / "gan_sr/strong.png", lab.root / "gan_sr/twin.png")
    lab.run()
    lab.put("gan_sr", "strong", BASE)
    lab.run()
    assert lab.groups() == 1, "the twin still shows what the other one did"


def test_percentages_are_of_each_image(lab: Lab) -> None:
    """Of 64x72 pixels 4.35 % are 200.4, so the two settings mean the same, and the mask is made from the kept map."""
    lab.run(min_area="200")
    assert lab.run(min_area="4.35%") == {"mask": STRONG}
    assert lab.run(min_area="4.4%") == {"mask": STRONG}
    assert lab.run(min_area="4.3%") == {"similarity": WEAK | CLEAN, "mask": ALL}


def test_a_missing_mask_is_made_again(lab: Lab) -> None:
    lab.run()
    before = lab.masks()
    for path in (lab.root / "ws/masks").iterdir():
        path.unlink()
    assert lab.run() == {"mask": ALL}
    assert lab.masks() == before


def test_a_mask_that_a_power_cut_emptied_is_made_again(lab: Lab) -> None:
    lab.run()
    before = lab.masks()
    for path in (lab.root / "ws/masks").iterdir():
        path.write_bytes(b"")
    assert lab.plan().pending == 3
    assert lab.run() == {"mask": ALL}
    assert lab.masks() == before


def test_a_missing_group_is_made_again(lab: Lab) -> None:
    lab.run()
    before = lab.masks()
    shutil.rmtree(lab.root / "ws/maps")
    assert lab.run() == {"similarity": STRONG, "mask": STRONG}
    assert lab.groups() == 1
    assert lab.masks() == before


@pytest.mark.parametrize("damage", ["array", "metadata", "chunk"])
def test_a_damaged_group_is_mended_by_the_second_run_at_the_latest(lab: Lab, tmp_path: Path, damage: str) -> None:
    lab.run()
    (array,) = (lab.root / "ws/maps").glob("*/*.zarr/similarity")
    if damage == "array":
        shutil.rmtree(array)
    elif damage == "metadata":
        (array / "zarr.json").unlink()
    else:
        (chunk,) = (path for path in array.rglob("*") if path.is_file() and path.name != "zarr.json")
        chunk.write_bytes(b"")
    changes = {"threshold": 0.69}
    lab.run(**changes)
    lab.run(**changes)
    assert lab.plan(**changes).pending == 0
    assert lab.masks() == fresh_masks(tmp_path, **changes)


def test_a_map_of_other_settings_does_not_count(lab: Lab, tmp_path: Path) -> None:
    """A run with another window was killed after it had stored a map and before it had said so."""
    lab.run()
    workspace, plan, weights, _ = prepare(lab.detection(window=7))
    for image in image_refs(plan.rows(0)):
        similarity_stage(image, Record(image.id), workspace, stages(lab.detection(window=7), plan, weights)[0][1])
    changes = {"threshold": 0.72}
    lab.run(**changes)
    lab.run(**changes)
    assert lab.masks() == fresh_masks(tmp_path, **changes)


def test_records_in_the_journal_count(lab: Lab) -> None:
    """A run that was killed between the stages goes on with the second one."""
    workspace, plan, weights, _ = prepare(lab.detection())
    function, job = stages(lab.detection(), plan, weights)[0]
    for image in image_refs(plan.rows(0)):
        run_stage(function, image, Record(image.id), workspace, job)
    assert lab.run() == {"mask": ALL}
    assert lab.marked() == STRONG


KILLED = {
    "threshold": ({"threshold": 0.5}, {"threshold": 0.85}),
    "area": ({"min_area": "4000"}, {"min_area": "0"}),
    "weights": ({"weights": "2.0"}, {"weights": "1.0"}),
    "labels": ({"weights": "2.0"}, {"weights": "2.0", "labels": "others"}),
}


@pytest.mark.parametrize("what", KILLED)
def test_a_run_that_was_killed_at_its_start_makes_nothing_clean(lab: Lab, tmp_path: Path, what: str) -> None:
    """Its settings are those of the latest run, but no image has been looked at under them."""
    lab.put_labels(3)
    lab.put_labels(4, "others")

    def given(changes: dict[str, str]) -> dict[str, Any]:
        weights = weights_file(tmp_path / "weights.csv", float(changes.get("weights", "1")))
        Path(weights).write_text(Path(weights).read_text().replace("4,name,2.0", "4,name,1.0"))
        return {"labels": "labels", "threshold": 0.7} | changes | {"weights": weights}

    before, after = KILLED[what]
    lab.run(**given(before))
    clean_before = done_images(lab.workspace, lab.plan(**given(before)).target)
    assert clean_before.filter(pc.equal(clean_before["artifact_pixels"], 0)).num_rows
    plan = lab.plan(**given(after))
    done = done_images(lab.workspace, plan.target).to_pylist()
    assert len(done) == plan.done < 3
    lab.run(**given(after))
    truly = {row["name"]: row["artifact_pixels"] for row in done_images(lab.workspace, plan.target).to_pylist()}
    assert len(truly) == 3
    assert all(truly[row["name"]] == row["artifact_pixels"] for row in done)


# --- failures ---


def test_permanent_failures_are_left_alone_until_something_changes(lab: Lab) -> None:
    good = (lab.root / "gan_sr/clean.png").read_bytes()
    (lab.root / "gan_sr/clean.png").write_bytes(good[:99])
    assert lab.run() == {"similarity": ALL, "mask": STRONG | WEAK}
    plan = lab.plan()
    assert (plan.done, plan.failed, plan.pending) == (2, 1, 0)
    (row,) = plan.failures.to_pylist()
    assert (row["name"], row["stage"]) == ("clean", "similarity")
    assert lab.run() == {}
    assert set(lab.masks()) == STRONG | WEAK
    assert lab.run(threshold=0.6)["similarity"] == CLEAN
    assert lab.run(threshold=0.6) == {}
    (lab.root / "gan_sr/clean.png").write_bytes(good)
    assert lab.run(threshold=0.6) == {"similarity": CLEAN, "mask": CLEAN}
    assert lab.plan(threshold=0.6).done == 3


def test_transient_failures_are_tried_again(lab: Lab) -> None:
    masks = lab.root / "ws/masks"
    masks.write_bytes(b"in the way")
    assert lab.run() == {"similarity": ALL, "mask": ALL}
    plan = lab.plan()
    assert (plan.done, plan.failed, plan.pending) == (0, 0, 3)
    masks.unlink()
    assert "mask" in lab.run()
    assert lab.plan().done == 3
    assert lab.marked() == STRONG


# --- labels ---


def test_labels_weigh(lab: Lab, tmp_path: Path) -> None:
    """Sky has weight 1, so nothing changes but keys; a class of weight 4 makes the artifact vanish."""
    lab.put_labels(2)
    lab.run()
    assert lab.run(labels="labels") == {"mask": STRONG}
    assert lab.marked() == STRONG
    heavy = weights_file(tmp_path / "heavy.csv", 20.0)
    assert lab.run(labels="labels", weights=heavy) == {"mask": STRONG}
    assert lab.marked() == set()
    assert lab.run(labels="labels", weights=heavy) == {}
    assert lab.run(labels="labels")["similarity"] == STRONG
    assert lab.marked() == STRONG


def test_changed_labels_do_the_mask_again(lab: Lab, tmp_path: Path) -> None:
    lab.put_labels(2)
    lab.run(labels="labels")
    lab.put_labels(3)
    assert lab.run(labels="labels")["mask"] >= STRONG
    assert lab.masks() == fresh_masks(tmp_path, labels="labels")
    assert lab.run(labels="labels") == {}


def test_the_folder_of_labels_does_not_matter(lab: Lab) -> None:
    lab.put_labels(2)
    lab.put_labels(2, "elsewhere")
    lab.run(labels="labels")
    assert lab.run(labels="elsewhere") == {}


def test_bad_labels_fail_until_they_are_corrected(lab: Lab) -> None:
    lab.put_labels(150)
    lab.run(labels="labels")
    assert lab.plan(labels="labels").failed == 3
    assert lab.run(labels="labels") == {}
    lab.put_labels(2)
    assert lab.run(labels="labels")["mask"] == ALL
    assert lab.plan(labels="labels").done == 3
    assert lab.marked() == STRONG


def test_without_labels_after_with_labels(lab: Lab, tmp_path: Path) -> None:
    lab.put_labels(12)
    lab.run(labels="labels")
    lab.run()
    assert lab.masks() == fresh_masks(tmp_path)


# --- plans ---


def test_a_limit_takes_the_first_names(lab: Lab) -> None:
    plan = lab.plan(limit=2)
    assert (plan.images, plan.pending) == (2, 2)
    assert lab.run(limit=2) == {"similarity": {"clean", "strong"}, "mask": {"clean", "strong"}}
    assert lab.run() == {"similarity": WEAK, "mask": WEAK}


def test_a_duplicate_gets_its_mask_without_being_compared(lab: Lab) -> None:
    lab.run()
    for role in BOTH:
        shutil.copy(lab.root / role / "strong.png", lab.root / role / "twin.png")
    assert lab.run() == {"mask": {"strong", "twin"}}
    assert lab.masks()["twin"] == lab.masks()["strong"]
    assert lab.run() == {}


def test_vanished_images_are_not_planned(lab: Lab) -> None:
    lab.run()
    (lab.root / "gan_sr/weak.png").unlink()
    plan = lab.plan()
    assert (plan.images, plan.done) == (2, 2)
    assert lab.plan(threshold=0.85).pending == 2


def test_shards_count_what_is_pending(lab: Lab) -> None:
    plan = lab.plan(shard_size=2)
    assert plan.shards == {0: 2, 1: 1}
    assert plan.rows(0)["name"].to_pylist() == ["clean", "strong"]
    lab.run(shard_size=2)
    assert lab.plan(shard_size=2, threshold=0.6).shards == {0: 1}


def test_both_ways_to_look_at_the_disk_agree(lab: Lab) -> None:
    lab.run()
    workspace, plan, _, _ = prepare(lab.detection())
    (workspace.masks / "weak.png").write_bytes(b"")
    (workspace.masks / "clean.png").unlink()
    rows = plan.rows(0)
    for each in (False, True):
        held = held_by(workspace, rows, None, each=each)
        assert held.masks.tolist() == held.arrays["similarity"].tolist() == [False, True, False]
        assert not held.arrays["labels"].any()


def test_masks_in_a_folder_that_may_not_be_entered_are_missing(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """As another user's; a run that has to write there says so."""
    lab.run()
    workspace, plan, _, _ = prepare(lab.detection())
    scandir = os.scandir

    def refused(path: Any) -> Any:
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    (workspace.masks / "sub").mkdir()
    monkeypatch.setattr("os.scandir", refused)
    assert held_by(workspace, plan.rows(0), None).masks.tolist() == [True, True, True]


def test_make_plan_writes_nothing(lab: Lab) -> None:
    lab.run()
    workspace, plan, _, _ = prepare(lab.detection())
    before = {path: path.stat().st_mtime_ns for path in (lab.root / "ws").rglob("*")}
    make_plan(workspace, plan.rows(0), plan.target)
    assert {path: path.stat().st_mtime_ns for path in (lab.root / "ws").rglob("*")} == before


def test_the_worst_regions_are_none_with_a_severity_below_zero(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "ws")
    rows = [
        {"image": name, "severity": severity} for name, severity in (("a", -3.0), ("b", 2.0), ("c", 0.0), ("d", 9.0))
    ]
    workspace.publish_table(workspace.regions, pa.Table.from_pylist(rows, REGIONS))
    assert worst_regions(workspace, 10)["image"].to_pylist() == ["d", "b", "c"]
    assert worst_regions(workspace, 1)["image"].to_pylist() == ["d"]
