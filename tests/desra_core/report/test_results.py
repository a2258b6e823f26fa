"""The numbers and curves of the report, against counting row by row and anew at every level, and their words."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from desra_core.detection.class_weights import class_names
from desra_core.detection.detectors import applied
from desra_core.images.codec import encode_png
from desra_core.planning.plan import REGIONS, load_settings, make_plan
from desra_core.report import results as results_module
from desra_core.report import write_report
from desra_core.report.results import (
    BINS,
    CorpusSummary,
    class_counts,
    class_distributions,
    flat_seconds,
    quantile,
    read_results,
    recorded_detector,
    stage_times,
)
from desra_core.settings import Detection
from desra_core.workspace import Workspace
from desra_core.workspace.arrays import read_array, write_array
from desra_core.workspace.manifest import read_manifest
from desra_core.workspace.products import SCHEMA, read_records
from tests.desra_core.report.conftest import SIZE
from tests.desra_core.report.pages import look_at, words
from tests.in_process import process

SHAPE = (60, 70)
RNG = np.random.default_rng(1)
LABELS = {f"photo{index:03d}": RNG.choice([2, 4, 9, 12], SIZE, p=[0.7, 0.2, 0.06, 0.04]).astype(np.uint8)
          for index in range(6)}  # fmt: skip


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory, make_pairs) -> Path:
    """A folder with a corpus and label files, and in ``ws`` its workspace with all maps."""
    folder = tmp_path_factory.mktemp("labelled")
    for name in make_pairs(folder, 6):
        path = folder / "labels" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_png(LABELS[name.partition("/")[2]]))
    process(detection(folder))
    return folder


def detection(folder: Path, **changes: object) -> Detection:
    given = {"workspace": folder / "ws", "segmenter": f"labels:{folder / 'labels'}", "keep": "maps"} | changes
    return Detection(mse_sr=folder / "mse_sr", gan_sr=folder / "gan_sr", **given)


@pytest.fixture
def copied(labelled: Path, tmp_path: Path) -> Workspace:
    return Workspace(Path(shutil.copytree(labelled / "ws", tmp_path / "ws")))


def whole(workspace: Workspace) -> dict[str, np.ndarray]:
    """The histograms of all stored maps by class name."""
    counts: dict[str, np.ndarray] = {}
    for row in pq.read_table(workspace.manifest).to_pylist():
        key = zarr.open_array(workspace.group(row["id"]) / "similarity", mode="r").attrs["key"]
        similarity = read_array(workspace, row["id"], "similarity", key=key).astype(np.float64)
        labels = LABELS[row["name"].partition("/")[2]][5:-5, 5:-5]
        for label in np.unique(labels):
            values = similarity[labels == label]
            found = [int(((values >= low / BINS) & (values < (low + 1) / BINS)).sum()) for low in range(BINS)]
            found[-1] += int((values == 1).sum())
            name = class_names()[label]
            counts[name] = counts.get(name, np.zeros(BINS, int)) + found
    return counts


def test_small_images_are_counted_whole(labelled: Path) -> None:
    results = read_results(Workspace(labelled / "ws"))
    found = class_distributions(results, recorded_detector(results.settings))
    assert found is not None
    expected = whole(Workspace(labelled / "ws"))
    assert {name: counts.tolist() for name, counts in found.histograms.items()} == {
        name: counts.tolist() for name, counts in expected.items()
    }
    assert (found.images, found.kept, found.classes) == (6, 6, 4)
    for name, mark in found.marks.items():
        bins = expected[name]
        below = np.interp(mark, found.edges, np.concatenate([[0], np.cumsum(bins)]))
        assert below / bins.sum() == pytest.approx(0.15)
    assert list(found.marks.values()) == sorted(found.marks.values())


def test_the_report_gives_the_size_of_the_sample(labelled: Path, tmp_path: Path) -> None:
    text = words(write_report(Workspace(labelled / "ws"), output=tmp_path / "r.html").read_text())
    assert "D by class" in text
    assert "85 % of its pixels lie above the line" in text
    assert "Rests on a sample: 6 of the 6 images whose maps and labels are kept" in text
    assert "with --keep maps only" not in text
    page = (tmp_path / "r.html").read_text()
    assert 'aria-label="Artifact regions by class"' in page
    assert 'aria-label="Distribution of D by class"' in page
    assert words(page).count("0.") > 10


def test_the_sample_is_bounded(labelled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = read_results(Workspace(labelled / "ws"))
    monkeypatch.setattr(results_module, "IMAGES", 2)
    monkeypatch.setattr(results_module, "_TILE", 50)
    monkeypatch.setattr(results_module, "_TILES", 3)
    found = class_distributions(results, applied())
    assert found is not None
    assert (found.images, found.kept) == (2, 6)
    pixels = sum(int(counts.sum()) for counts in found.histograms.values())
    assert 0 < pixels <= 2 * 3 * 50 * 50
    again = class_distributions(results, applied())
    assert again is not None
    assert again.marks == found.marks


def test_damaged_maps_are_passed_over_and_stay(copied: Workspace, labelled: Path) -> None:
    rows = pq.read_table(copied.manifest).to_pylist()
    damaged, lost = (copied.group(row["id"]) for row in rows[:2])
    shutil.rmtree(damaged / "similarity" / "c")
    shutil.rmtree(lost)
    before = {str(path) for path in copied.root.rglob("*")}
    found = class_distributions(read_results(copied), applied())
    assert found is not None
    assert found.images == 4
    assert {str(path) for path in copied.root.rglob("*")} == before


def test_stored_labels_count_as_label_files_do(copied: Workspace, labelled: Path) -> None:
    """Labels as a segmentation model stores them."""
    results = read_results(copied)
    from_files = class_distributions(results, applied())
    table = pq.read_table(copied.manifest)
    metadata = {key: value for key, value in table.schema.metadata.items() if key != b"labels"}
    for row in table.to_pylist():
        write_array(copied, row["id"], "labels", LABELS[row["name"].partition("/")[2]], key="key")
    for column in [name for name in table.column_names if name.startswith("labels_")]:
        kind = table.schema.field(column).type
        table = table.set_column(table.schema.get_field_index(column), column, pa.nulls(6, kind))
    pq.write_table(table.replace_schema_metadata(metadata), copied.manifest)
    for path in copied.records.iterdir():
        records = pq.read_table(path)
        kept = pa.array([True] * records.num_rows)
        pq.write_table(records.set_column(records.schema.get_field_index("labels_kept"), "labels_kept", kept), path)
    stored = class_distributions(read_results(copied), applied())
    assert from_files is not None
    assert stored is not None
    assert {name: counts.tolist() for name, counts in stored.histograms.items()} == {
        name: counts.tolist() for name, counts in from_files.histograms.items()
    }


def test_without_labels_there_are_no_classes(workspace: Workspace) -> None:
    assert class_distributions(read_results(workspace), applied()) is None


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8).filter(any), st.floats(0.01, 0.99))
@settings(max_examples=60, deadline=None)
def test_a_quantile_has_its_share_below(counts: list[int], share: float) -> None:
    edges = np.linspace(0, 2, len(counts) + 1)
    value = quantile(np.array(counts), edges, share)
    below = np.interp(value, edges, np.concatenate([[0], np.cumsum(counts)])) / sum(counts)
    assert below == pytest.approx(share)


def test_a_workspace_that_people_have_looked_at(workspace: Workspace) -> None:
    results = read_results(workspace)
    assert CorpusSummary(results).looked_at == 0
    assert "human masks" not in words(write_report(workspace).read_text())
    people = {name: np.zeros(SIZE, np.bool_) for name in ("set0/photo000", "set0/photo008", "again/photo008")}
    look_at(workspace, people, gan_sr_key="of another model")
    assert CorpusSummary(results).looked_at == 0
    look_at(workspace, people)
    assert CorpusSummary(results).looked_at == 2, "a copy is the same image"
    text = words(write_report(workspace).read_text())
    assert f"human masks of 2 images; desra evaluate --workspace {workspace.root} holds the artifact masks" in text


def seconds_table(*rows: tuple[str, float]) -> pa.Table:
    return pa.table({"stage": [stage for stage, _ in rows], "seconds": [seconds for _, seconds in rows]})


def test_a_real_workspace_in_numbers(corpus: Path) -> None:
    results = read_results(Workspace(corpus / "ws"))
    summary = CorpusSummary(results)
    assert (summary.images, summary.done, summary.failed, summary.pending) == (21, 18, 3, 0)
    assert (summary.marked, summary.regions, summary.outdated) == (10, 10, 0)
    records = {row["id"]: row for row in read_records(results.workspace).to_pylist()}
    rows = [records[row["id"]] for row in results.images.to_pylist() if records[row["id"]]["mask_key"]]
    assert summary.artifact_pixels == sum(row["artifact_pixels"] for row in rows) > 0
    assert summary.pixels == 18 * 200 * 240
    assert summary.pixel_share == summary.artifact_pixels / summary.pixels
    times = [dict(record["seconds"]) for record in records.values()]
    assert summary.seconds == pytest.approx(sum(sum(stages.values()) for stages in times))
    assert results.failures["name"].to_pylist() == sorted(["broken <b>", "no twin", "other size"])


def test_a_limit_and_vanished_images(workspace: Workspace) -> None:
    document = json.loads(workspace.settings.read_bytes())
    document["settings"]["limit"] = 4
    workspace.settings.write_text(json.dumps(document))
    manifest = pq.read_table(workspace.manifest)
    present = pa.array([index >= 2 for index in range(manifest.num_rows)])
    index = manifest.schema.get_field_index("present")
    pq.write_table(manifest.set_column(index, "present", present), workspace.manifest)
    results = read_results(workspace)
    assert results.images["name"].to_pylist() == manifest["name"].to_pylist()[2:6]
    assert set(results.regions["image"].to_pylist()) <= set(results.images["name"].to_pylist())
    assert results.vanished == 2


def test_images_that_were_not_asked_for_are_left_out_as_in_the_status(workspace: Workspace) -> None:
    """Neither the limit nor what is pending counts them; their regions stay in the table of the whole workspace."""
    document = json.loads(workspace.settings.read_bytes())
    document["settings"]["limit"] = 3
    workspace.settings.write_text(json.dumps(document))
    manifest = pq.read_table(workspace.manifest)
    asked = pa.array([index % 2 == 1 for index in range(manifest.num_rows)])
    pq.write_table(manifest.set_column(manifest.schema.get_field_index("asked"), "asked", asked), workspace.manifest)
    results = read_results(workspace)
    assert results.images["name"].to_pylist() == manifest["name"].to_pylist()[1:6:2]
    assert (results.vanished, results.unasked) == (0, manifest.num_rows // 2 + manifest.num_rows % 2)
    assert make_plan(workspace, read_manifest(workspace), load_settings(workspace)[1], limit=3).images == 3
    assert f"{results.unasked} images that were not asked for by the latest run" in words(
        write_report(workspace).read_text()
    )


def test_parts_of_a_stage_are_not_counted_twice() -> None:
    table = seconds_table(
        ("mask", 1.0), ("super_resolution", 4.0), ("super_resolution", 8.0), ("inference", 3.0), ("inference", 7.0),
        ("mask", 2.0), ("mask", 9.0), ("other_stage", 1.0),
    )  # fmt: skip
    times = stage_times(table)
    assert [(time.stage, time.part) for time in times] == [
        ("super_resolution", False), ("inference", True), ("mask", False), ("other_stage", False),
    ]  # fmt: skip
    assert times[2] == ("mask", False, 3, 12.0, 2.0, 4.0)
    assert times[2].rate == 0.25
    assert stage_times(seconds_table(("mask", 0.0)))[0].rate is None
    assert stage_times(pa.table({"stage": pa.array([], pa.string()), "seconds": pa.array([], pa.float64())})) == []


def test_seconds_of_sliced_maps() -> None:
    """Arrow's keys and items of a slice are those of the whole."""
    rows = [{"id": str(index), "seconds": [("mask", float(index)), ("similarity", 1.0)]} for index in range(6)]
    records = pa.Table.from_pylist(rows, SCHEMA).slice(2, 3)
    times = stage_times(flat_seconds(records["seconds"]))
    assert [(time.stage, time.images, time.total) for time in times] == [("similarity", 3, 3.0), ("mask", 3, 9.0)]


def test_classes() -> None:
    rows = [
        {"image": image, "area": area, "mean_similarity": similarity, "class_name": name}
        for image, area, similarity, name in [
            ("a", 10, 0.2, "sky"), ("a", 20, 0.4, "sky"), ("b", 30, 0.5, "wall"), ("c", 5, 0.6, None),
        ]
    ]  # fmt: skip
    counts = class_counts(pa.Table.from_pylist(rows, REGIONS))
    assert [tuple(count[key] for key in ("name", "regions", "share", "images", "pixels")) for count in counts] == [
        ("sky", 2, 0.5, 1, 30), (None, 1, 0.25, 1, 5), ("wall", 1, 0.25, 1, 30),
    ]  # fmt: skip
    assert counts[0]["mean_similarity"] == pytest.approx(0.3)


def test_outdated_masks_are_counted(workspace: Workspace) -> None:
    results = read_results(workspace)
    assert CorpusSummary(replace(results, document={"target": {"mask_key": "new"}})).outdated == 10
    assert CorpusSummary(replace(results, document={})).outdated == 0
