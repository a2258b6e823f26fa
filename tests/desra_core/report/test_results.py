"""The numbers of the report, against counting row by row, and their words."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from desra_core.planning.plan import REGIONS, load_settings, make_plan
from desra_core.report import write_report
from desra_core.report.results import (
    CorpusSummary,
    class_counts,
    flat_seconds,
    read_results,
    stage_times,
)
from desra_core.settings import Detection
from desra_core.workspace import Workspace
from desra_core.workspace.manifest import read_manifest
from desra_core.workspace.products import SCHEMA, read_records
from tests.desra_core.report.conftest import SIZE, write
from tests.desra_core.report.pages import look_at, words
from tests.in_process import process


def test_regions_are_counted_by_class(tmp_path: Path, make_pairs) -> None:
    for name in make_pairs(tmp_path, 3):
        write(tmp_path / "labels" / f"{name}.png", np.full(SIZE, 4, np.uint8))
    folders = {role: tmp_path / role for role in ("mse_sr", "gan_sr")}
    process(Detection(workspace=tmp_path / "ws", segmenter=f"labels:{tmp_path / 'labels'}", **folders))
    page = write_report(Workspace(tmp_path / "ws")).read_text()
    assert re.search(r"class regions share .* tree \d+ 100 %", words(page))
    assert 'aria-label="Artifact regions by class"' in page


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
    assert CorpusSummary(results).outdated == 0
    assert CorpusSummary(replace(results, target=replace(results.target, mask_key="new"))).outdated == 10
