"""Records of images: journal, tables, and what a power cut leaves of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from desra_core.errors import ImageError
from desra_core.workspace import Workspace
from desra_core.workspace.products import (
    FURTHER,
    SCHEMA,
    Record,
    gather_journals,
    gather_shard,
    read_records,
    read_shard,
    to_table,
    write_journal,
)

REGION = {
    "x": 5,
    "y": 6,
    "width": 30,
    "height": 20,
    "area": 512,
    "dominant_class": 3,
    "mean_similarity": 0.1 + 0.2,
    "severity": 1 / 3,
}
FULL = Record(
    id="full",
    height=64,
    width=80,
    similarity_key="s",
    similarity_kept=True,
    segmentation_key="labels",
    labels_kept=True,
    labels_hash="l",
    weighting_key="w",
    proven_weight=1 / 7,
    threshold=0.7,
    min_area=40,
    mask_key="m",
    artifact_pixels=1024,
    regions=[REGION, REGION | {"dominant_class": None}],
    seconds={"similarity": 0.25, "mask": 0.0001},
)
FAILED = Record(
    id="failed",
    failed_stage="similarity",
    failed_key="m",
    subject="/data/a b.png",
    reason="is empty",
    remedy="copy it again",
    transient=True,
)
ALL = [Record("bare"), FAILED, FULL]


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    workspace = Workspace(tmp_path / "ws")
    workspace.create()
    return workspace


@pytest.mark.parametrize("record", ALL, ids=lambda record: record.id)
def test_round_trip(workspace: Workspace, record: Record) -> None:
    write_journal(workspace, 3, record)
    assert read_shard(workspace, 3) == {record.id: record}
    gather_shard(workspace, 3)
    assert read_shard(workspace, 3) == {record.id: record}
    assert not workspace.shard_journal(3).exists()


def test_the_journal_wins_over_the_table(workspace: Workspace) -> None:
    for record in ALL:
        write_journal(workspace, 0, record)
    gather_shard(workspace, 0)
    newer = replace(FULL, threshold=0.6, regions=[])
    write_journal(workspace, 0, newer)
    expected = {"bare": ALL[0], "failed": FAILED, "full": newer}
    assert read_shard(workspace, 0) == expected
    assert read_records(workspace, ["id", "threshold"]).to_pylist() == [
        {"id": record.id, "threshold": record.threshold} for record in expected.values()
    ]
    gather_shard(workspace, 0)
    assert read_shard(workspace, 0) == expected


def test_records_that_no_worker_could_journal(workspace: Workspace) -> None:
    write_journal(workspace, 0, FULL)
    lost = replace(FULL, mask_key=None, failed_stage="mask")
    gather_shard(workspace, 0, [lost, FAILED])
    assert read_shard(workspace, 0) == {"failed": FAILED, "full": lost}


def test_the_table_is_sorted_and_does_not_depend_on_the_order_of_events(workspace: Workspace) -> None:
    tables = []
    for order in (ALL, ALL[::-1]):
        for record in order:
            write_journal(workspace, 0, record)
        gather_shard(workspace, 0)
        tables.append(workspace.shard_records(0).read_bytes())
        workspace.shard_records(0).unlink()
    assert tables[0] == tables[1]


@pytest.mark.parametrize("content", [b"", b'{"id": "x", "hei'])
def test_a_record_that_a_power_cut_emptied_is_ignored(workspace: Workspace, content: bytes) -> None:
    for record in ALL:
        write_journal(workspace, 0, record)
    (workspace.shard_journal(0) / "full.json").write_bytes(content)
    assert set(read_shard(workspace, 0)) == {"bare", "failed"}
    assert read_records(workspace).num_rows == 2


DAMAGED = {
    "another key": {"heigth": 64},
    "a text for a number": {"height": "tall"},
    "a number that is too large": {"height": 2**40},
    "a list for a record": ["full"],
    "a text for regions": {"regions": "none"},
    "a region with a text": {"regions": [REGION | {"area": "large"}]},
    "a text for seconds": {"seconds": "fast"},
    "a list for a key": {"mask_key": ["m"]},
    "another image": {"id": "bare"},
    "no image": {"id": None},
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_record_costs_its_image_alone(workspace: Workspace, damage: str) -> None:
    """An older record of the image does not count either, since the files may be newer."""
    for record in ALL:
        write_journal(workspace, 0, record)
    gather_shard(workspace, 0)
    write_journal(workspace, 0, replace(FULL, threshold=0.6))
    path = workspace.shard_journal(0) / "full.json"
    change = DAMAGED[damage]
    content = json.loads(path.read_bytes()) | change if isinstance(change, dict) else change
    path.write_text(json.dumps(content))
    assert read_shard(workspace, 0) == {"bare": ALL[0], "failed": FAILED}
    gather_journals(workspace)
    assert sorted(read_records(workspace)["id"].to_pylist()) == ["bare", "failed"]


def test_read_records_takes_finished_shards_and_those_in_flight(workspace: Workspace) -> None:
    assert read_records(workspace).equals(SCHEMA.empty_table())
    for shard, record in enumerate(ALL):
        write_journal(workspace, shard, record)
        if shard != 1:
            gather_shard(workspace, shard)
    table = read_records(workspace)
    assert table.schema.equals(SCHEMA)
    assert sorted(table["id"].to_pylist()) == ["bare", "failed", "full"]
    assert read_records(workspace, ["id", "regions"]).column_names == ["id", "regions"]
    assert workspace.shard_journal(1).exists(), "reading gathers in memory only"
    gather_journals(workspace)
    assert not workspace.shard_journal(1).exists()
    assert pq.read_table(workspace.shard_records(1)).num_rows == 1
    assert sorted(read_records(workspace)["id"].to_pylist()) == ["bare", "failed", "full"]


def test_the_schema_has_every_field() -> None:
    assert to_table(ALL).schema.equals(SCHEMA)
    fields = [name for name in FULL.__dict__ if name != "further"]
    assert SCHEMA.names == [*fields, *(product.column for product in FURTHER)]


def test_a_failure_gives_its_error_back() -> None:
    assert FAILED.failed
    assert not FULL.failed
    assert isinstance(FAILED.error, ImageError)
    assert str(FAILED.error) == "/data/a b.png: is empty; copy it again"
