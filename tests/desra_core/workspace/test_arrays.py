"""Stored arrays: reading never deletes, and lost arrays differ from arrays that cannot be read now."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from desra_core.errors import LostError, TransientError
from desra_core.evaluation.metrics import read_labels
from desra_core.images.parts import Rectangle
from desra_core.report.pictures import StoredImage
from desra_core.workspace import Workspace, read_table
from desra_core.workspace.arrays import find_array, read_array, write_array
from desra_core.workspace.products import SCHEMA, Record, gather_shard, read_shard, to_table, write_journal

IMAGE = "ab" * 16
ARRAY = np.random.default_rng(0).random((700, 600)).astype(np.float32)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    workspace = Workspace(tmp_path / "ws")
    workspace.create()
    write_array(workspace, IMAGE, "similarity", ARRAY, key="k")
    write_array(workspace, IMAGE, "labels", np.zeros((60, 80), np.uint8), key="k")
    return workspace


@contextmanager
def no_more_files() -> Iterator[None]:
    """The process has as many open files as it may."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read_label_window(workspace: Workspace) -> object:
    return StoredImage({}, workspace.group(IMAGE), (60, 80)).labels()


READERS: dict[str, Callable[[Workspace], object]] = {
    "read": lambda workspace: read_array(workspace, IMAGE, "similarity", key="k"),
    "find": lambda workspace: find_array(workspace, IMAGE, "similarity", key="k"),
    "window": lambda workspace: StoredImage({}, workspace.group(IMAGE), (710, 610)).scores(Rectangle(0, 0, 100, 100)),
    "labels": read_label_window,
    "evaluate": lambda workspace: read_labels(workspace.group(IMAGE) / "labels"),
}


@pytest.mark.parametrize("reader", READERS)
def test_too_many_open_files_cost_nothing(workspace: Workspace, reader: str) -> None:
    READERS[reader](workspace)  # starts the threads in which zarr reads
    before = contents(workspace.maps)
    with no_more_files(), pytest.raises(TransientError, match="cannot be read") as raised:
        READERS[reader](workspace)
    assert not isinstance(raised.value, LostError)
    assert contents(workspace.maps) == before
    READERS[reader](workspace)


def test_another_key_costs_nothing(workspace: Workspace) -> None:
    before = contents(workspace.maps)
    with pytest.raises(LostError, match=r"similarity: is missing, damaged, or of a run that was cut off; run again"):
        read_array(workspace, IMAGE, "similarity", key="other")
    assert find_array(workspace, IMAGE, "similarity", key="other") is None
    assert find_array(workspace, IMAGE, "similarity", key=None) is None
    assert contents(workspace.maps) == before
    assert np.array_equal(read_array(workspace, IMAGE, "similarity", key="k"), ARRAY)


def cut(array: Path) -> None:
    (chunk,) = (path for path in array.rglob("*") if path.is_file() and path.name != "zarr.json")
    chunk.write_bytes(chunk.read_bytes()[:-1000])


def flip(array: Path) -> None:
    (chunk,) = (path for path in array.rglob("*") if path.is_file() and path.name != "zarr.json")
    data = bytearray(chunk.read_bytes())
    data[len(data) // 3] ^= 16
    chunk.write_bytes(data)


def lose_chunk(array: Path) -> None:
    shutil.rmtree(array / "c")


def lose_metadata(array: Path) -> None:
    (array / "zarr.json").unlink()


def spoil_metadata(array: Path) -> None:
    (array / "zarr.json").write_text("{}")


@pytest.mark.parametrize("damage", [cut, flip, lose_chunk, lose_metadata, spoil_metadata, shutil.rmtree])
def test_a_lost_array_stays_until_it_is_written_again(workspace: Workspace, damage: Callable[[Path], None]) -> None:
    array = workspace.group(IMAGE) / "similarity"
    damage(array)
    before = contents(workspace.maps)
    with pytest.raises(LostError):
        read_array(workspace, IMAGE, "similarity", key="k")
    assert find_array(workspace, IMAGE, "similarity", key="k") is None
    assert contents(workspace.maps) == before
    write_array(workspace, IMAGE, "similarity", ARRAY, key="k")
    assert np.array_equal(read_array(workspace, IMAGE, "similarity", key="k"), ARRAY)


def test_tables_and_records_that_cannot_be_read_now_are_not_called_damaged(workspace: Workspace) -> None:
    write_journal(workspace, 0, Record(IMAGE))
    workspace.publish_table(workspace.shard_records(1), to_table([Record("x")]))
    with no_more_files():
        with pytest.raises(TransientError, match=r"parquet: cannot be read \(Too many open files\); check the disk"):
            read_table(workspace.shard_records(1), SCHEMA)
        with pytest.raises(TransientError, match=r"0000: cannot be read \(Too many open files\); check the disk"):
            gather_shard(workspace, 0)
    assert list(read_shard(workspace, 0)) == [IMAGE]
