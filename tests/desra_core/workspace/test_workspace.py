"""Committing files, and who may write."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from desra_core.errors import LockedError, TransientError, UsageError
from desra_core.files import fingerprint
from desra_core.workspace import Workspace
from desra_core.workspace.arrays import read_array, write_array

HOLDER = """
import sys
from pathlib import Path
from desra_core.workspace import Workspace
workspace = Workspace(Path(sys.argv[1]))
workspace.create()
with workspace.locked():
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    workspace = Workspace(tmp_path / "ws")
    workspace.create()
    return workspace


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def holder(workspace: Workspace) -> subprocess.Popen[str]:
    """Another process that holds the workspace until its input is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(workspace.root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[3],
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_publish_makes_folders_and_replaces(workspace: Workspace) -> None:
    path = workspace.mask("sub/a")
    workspace.publish(path, b"one")
    assert path.read_bytes() == b"one"
    workspace.publish(path, b"two", durable=True)
    assert path.read_bytes() == b"two"
    assert list((workspace.root / "tmp").iterdir()) == []


def test_publish_leaves_equal_files_alone(workspace: Workspace) -> None:
    path = workspace.mask("a")
    workspace.publish(path, b"same")
    os.utime(path, ns=(1, 1))
    workspace.publish(path, b"same")
    assert path.stat().st_mtime_ns == 1
    workspace.publish(path, b"some")
    assert path.stat().st_mtime_ns != 1


def test_readers_never_see_half_a_file(workspace: Workspace) -> None:
    path = workspace.mask("a")
    versions = {bytes([letter]) * 300_000 for letter in b"abcdef"}
    seen: set[bytes] = set()
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            if path.exists():
                seen.add(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(20):
        for version in sorted(versions):
            workspace.publish(path, version)
    stop.set()
    reader.join()
    assert seen
    assert seen <= versions


def test_publish_table(workspace: Workspace) -> None:
    table = pa.table({"a": [1, 2]})
    workspace.publish_table(workspace.regions, table)
    os.utime(workspace.regions, ns=(1, 1))
    workspace.publish_table(workspace.regions, table)
    assert workspace.regions.stat().st_mtime_ns == 1
    assert pq.read_table(workspace.regions).equals(table)


def test_a_full_disk_is_transient_and_loses_nothing(small_disk: Path) -> None:
    workspace = Workspace(small_disk / "ws")
    workspace.create()
    path = workspace.mask("a")
    workspace.publish(path, b"before")
    with pytest.raises(TransientError, match=r"a\.png: the disk is full; free some space and run again"):
        workspace.publish(path, bytes(200_000))
    assert path.read_bytes() == b"before"
    with pytest.raises(TransientError, match="the disk is full"):
        write_array(workspace, "ab" * 16, "similarity", np.random.default_rng(0).random((300, 300)), key="k")
    assert list((workspace.root / "tmp").iterdir()) == [], "unfinished files must not fill the disk further"
    workspace.publish(path, b"after")
    assert path.read_bytes() == b"after"


def test_unusable_targets_are_refused(workspace: Workspace) -> None:
    workspace.publish(workspace.mask("a"), b"file")
    with pytest.raises(TransientError, match="cannot be written"):
        workspace.publish(workspace.masks / "a.png" / "b.png", b"file")


def test_leftovers_are_wiped_when_a_run_starts(workspace: Workspace) -> None:
    workspace.scratch().write_bytes(b"half")
    (workspace.scratch() / "c").mkdir(parents=True)
    (workspace.scratch()).symlink_to(workspace.lock)
    with workspace.locked() as held:
        assert [path.name for path in (workspace.root / "tmp").rglob("*")] == [held.fence]
        held.publish(workspace.mask("a"), b"mask")
    assert list((workspace.root / "tmp").iterdir()) == []
    assert workspace.lock.exists()


def test_a_second_process_is_refused_and_reads_who_holds_the_lock(workspace: Workspace) -> None:
    process = holder(workspace)
    try:
        owner = workspace.owner()
        assert owner is not None
        with pytest.raises(LockedError) as caught, workspace.locked():
            pass
        for text in (owner, str(caught.value)):
            assert f"process {process.pid} on {os.uname().nodename}, started 20" in text
        assert str(workspace.root) in str(caught.value)
    finally:
        process.communicate()
    assert workspace.owner() is None
    with workspace.locked():
        pass


def test_a_killed_owner_loses_the_lock(workspace: Workspace) -> None:
    process = holder(workspace)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert json.loads((workspace.root / "lock").read_text())["pid"] == process.pid
    assert workspace.owner() is None
    with workspace.locked():
        assert json.loads((workspace.root / "lock").read_text())["pid"] == os.getpid()
    assert (workspace.root / "lock").read_text() == ""


def test_the_same_process_may_ask_again(workspace: Workspace) -> None:
    with workspace.locked() as held:
        held.scratch().write_bytes(b"in use")
        with workspace.locked() as again:
            assert again.fence == held.fence
            assert len(list((workspace.root / "tmp" / str(held.fence)).iterdir())) == 1
        assert workspace.owner() is not None
        process = subprocess.run(
            [sys.executable, "-c", HOLDER, str(workspace.root)],
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).resolve().parents[3],
        )
        assert "LockedError" in process.stderr
        assert f"process {os.getpid()} on" in process.stderr
    assert workspace.owner() is None


def test_asking_for_the_owner_takes_no_lock(workspace: Workspace) -> None:
    """`desra status` looks while `desra detect` starts: neither may take the other for an owner."""
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            workspace.owner()

    looker = threading.Thread(target=look)
    looker.start()
    try:
        for _ in range(150):
            with workspace.locked():
                pass
    finally:
        stop.set()
        looker.join()


def test_the_lock_is_freed_by_an_error(workspace: Workspace) -> None:
    with pytest.raises(KeyError), workspace.locked():
        raise KeyError
    assert workspace.owner() is None


def test_create_refuses_other_folders(tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/photo.png").touch()
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="foreign: is a folder with other things in it"):
        Workspace(tmp_path / "foreign").create()
    for path in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(UsageError, match="cannot serve as workspace"):
            Workspace(path).create()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "foreign", "photo.png"]


def test_create_accepts_new_and_empty_folders_and_workspaces(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new/nested"):
        workspace = Workspace(tmp_path / name)
        workspace.create()
        workspace.publish(workspace.mask("a"), b"mask")
        workspace.create()
        assert workspace.mask("a").exists()


@pytest.mark.parametrize("place", ["new", "new/nested/ws", "empty"])
def test_a_command_that_is_refused_leaves_nothing_behind(tmp_path: Path, place: str) -> None:
    (tmp_path / "empty").mkdir()
    workspace = Workspace(tmp_path / place)
    with pytest.raises(UsageError), workspace.opened():
        raise UsageError("photos", "are none", "name some")
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


def test_a_command_that_is_refused_leaves_what_was_there(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "ws")
    with pytest.raises(TypeError), workspace.opened():
        raise TypeError(workspace.publish(workspace.mask("a"), b"mask"))
    assert workspace.lock.exists()
    assert workspace.mask("a").exists()
    made = Workspace(tmp_path / "made")
    made.create()
    with pytest.raises(KeyError), made.opened():
        raise KeyError
    assert made.lock.exists(), "desra serve has made it, or a person"


def test_a_refused_command_leaves_the_lock_of_another_command(workspace: Workspace) -> None:
    process = holder(workspace)
    with pytest.raises(LockedError), workspace.opened():
        pass
    assert workspace.lock.exists()
    process.communicate()


def test_a_refused_command_raises_its_own_error_where_cleaning_up_fails(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "new/ws")
    with pytest.raises(UsageError, match="are none"), workspace.opened():
        raise UsageError((tmp_path / "new/other").write_text("photos"), "are none", "name some")
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "other"]


def test_a_lock_that_a_refused_command_took_away(workspace: Workspace) -> None:
    workspace.lock.unlink()
    with workspace.locked():
        assert workspace.owner() is not None
    shutil.rmtree(workspace.root)
    with pytest.raises(LockedError, match="was in use by a command that was refused; run again"), workspace.locked():
        pass


def test_owner_of_nothing(tmp_path: Path) -> None:
    assert Workspace(tmp_path / "nowhere").owner() is None


def test_fingerprints_are_stable_and_differ_by_value() -> None:
    assert fingerprint("a", 1, 0.7, {"x": 1, "y": None}) == fingerprint("a", 1, 0.7, {"y": None, "x": 1})
    # Written to disk by earlier versions: a change makes every user's images stale.
    assert fingerprint("similarity", 1, 11) == "66eb0e5bf2ce4cf9df8db115499c19d6"
    distinct = [("a",), ("a", None), ("a", 1), ("a", "1"), ("a", 1.5), (["a"], 1), ("a", [1])]
    assert len({fingerprint(*parts) for parts in distinct}) == len(distinct)


def test_arrays_round_trip_in_place_of_older_ones(workspace: Workspace) -> None:
    name, rng = "ab" * 16, np.random.default_rng(0)
    shapes = [((700, 513, 3), np.uint16), ((700, 513), np.float32), ((5, 9), np.float32), ((5, 9), np.uint8)]
    for shape, dtype in shapes:
        array = (rng.random(shape) * 255).astype(dtype)
        write_array(workspace, name, "map", array, key="k")
        write_array(workspace, name, "map", array, key="k")
        stored = read_array(workspace, name, "map", key="k")
        assert stored.dtype == dtype
        assert np.array_equal(stored, array)
    assert sum(path.is_file() for path in (workspace.group(name) / "map").rglob("*")) == 2
    workspace.drop_group(name)
    workspace.drop_group(name)
    assert not workspace.group(name).exists()
    with pytest.raises(TransientError):
        read_array(workspace, name, "map", key="k")


def test_a_deleted_lock_file_is_made_again(tmp_path) -> None:
    workspace = Workspace(tmp_path / "ws")
    workspace.create()
    (workspace.root / "lock").unlink()
    with workspace.locked():
        assert (workspace.root / "lock").exists()
