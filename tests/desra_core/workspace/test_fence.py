"""Workers that wake after their run has ended."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from desra_core import files
from desra_core.errors import ImageError, LockedError, TransientError
from desra_core.workspace import Workspace
from desra_core.workspace.arrays import drop_array, write_array
from desra_core.workspace.products import Record, write_journal

IMAGE = "ab" * 16
ROOT = Path(__file__).resolve().parents[3]

# Holds the workspace, and says by what its workers would know it.
DRIVER = """
import pickle, sys
from pathlib import Path
from desra_core.workspace import Workspace
with Workspace(Path(sys.argv[1])).locked() as held, held.fenced() as fenced:
    print(pickle.dumps(fenced).hex(), flush=True)
    sys.stdin.read()
"""
# Writes and deletes until it is told that its run has ended.
WORKER = """
import itertools, pickle, sys
import numpy as np
from desra_core.errors import TransientError
from desra_core.workspace.arrays import write_array
from desra_core.workspace.products import Record, write_journal
fenced, image = sys.argv[-2:]
workspace = pickle.loads(bytes.fromhex(fenced))
try:
    for number in itertools.count():
        workspace.publish(workspace.mask("a"), b"%d" % number)
        write_array(workspace, image, "similarity", np.full((9, 9), number), key=str(number))
        write_journal(workspace, 0, Record(image, height=number))
        if not number % 3:
            workspace.withdraw("a")
            workspace.drop_group(image)
        if not number:
            print("working", flush=True)
except TransientError as error:
    print(error)
"""


def fail(late: Workspace) -> None:
    """Do what `run_stage` does with an image that failed for good."""
    late.withdraw("a")
    write_journal(late, 0, Record(IMAGE, failed_stage="mask"))


CHANGES: dict[str, Callable[[Workspace], object]] = {
    "mask": lambda late: late.publish(late.mask("a"), b"older"),
    "new mask": lambda late: late.publish(late.mask("below/b"), b"older"),
    "pictures": lambda late: late.publish_pseudo_gt(["a"], np.ones((4, 4), bool), np.zeros((4, 4, 3), np.uint8), None),
    "table": lambda late: late.publish_table(late.regions, pa.table({"a": [0]})),
    "array": lambda late: write_array(late, IMAGE, "similarity", np.zeros((5, 5)), key="older"),
    "new array": lambda late: write_array(late, IMAGE, "labels", np.zeros((5, 5)), key="older"),
    "array of a dropped image": lambda late: write_array(late, "cd" * 16, "labels", np.zeros((5, 5)), key="older"),
    "record": lambda late: write_journal(late, 0, Record(IMAGE, mask_key="older")),
    "record of a shard that is done": lambda late: write_journal(late, 1, Record(IMAGE, mask_key="older")),
    "withdrawal": lambda late: late.withdraw("a"),
    "dropped array": lambda late: drop_array(late, IMAGE, "similarity"),
    "dropped arrays": lambda late: late.drop_group(IMAGE),
    "failure": fail,
}


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    workspace = Workspace(tmp_path / "ws")
    workspace.create()
    return workspace


def fill(workspace: Workspace) -> None:
    """Write what a run writes of an image."""
    workspace.publish(workspace.mask("a"), b"newer")
    for kind in ("lr", "mask", "pseudo_gt"):
        workspace.publish(workspace.dataset(kind, "a"), b"newer")
    workspace.publish_table(workspace.regions, pa.table({"a": [1, 2]}))
    write_array(workspace, IMAGE, "similarity", np.ones((5, 5)), key="newer")
    write_journal(workspace, 0, Record(IMAGE, mask_key="newer"))


def content(workspace: Workspace) -> dict[str, bytes]:
    """Read all files of results; unfinished ones may vanish meanwhile."""
    places = [place for place in workspace.root.iterdir() if place.name != "tmp" and not place.name.startswith("lock")]
    files = [path for place in places for path in (place, *place.rglob("*")) if path.is_file()]
    return {str(path.relative_to(workspace.root)): path.read_bytes() for path in files}


def killed_run(workspace: Workspace) -> Workspace:
    """Begin a run in another process, and kill it; return the workspace of its workers."""
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(workspace.root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    )
    assert driver.stdout is not None
    line = driver.stdout.readline()
    driver.kill()
    driver.communicate()
    fenced: Workspace = pickle.loads(bytes.fromhex(line.decode()))
    return fenced


@pytest.mark.parametrize("change", CHANGES)
def test_a_worker_of_an_ended_run_changes_nothing(workspace: Workspace, change: str) -> None:
    with workspace.locked() as held, held.fenced() as late:
        fill(late)
    before = content(workspace)
    with pytest.raises(TransientError, match="ws: this run has ended, or another one has taken the workspace over"):
        CHANGES[change](late)
    assert content(workspace) == before


def test_a_worker_of_a_killed_run_changes_nothing_once_another_has_begun(workspace: Workspace) -> None:
    late = killed_run(workspace)
    CHANGES["mask"](late)
    assert workspace.mask("a").read_bytes() == b"older", "until then, its work counts"
    with workspace.locked() as held:
        fill(held)
        before = content(workspace)
        for change in CHANGES.values():
            with pytest.raises(TransientError, match="this run has ended"):
                change(late)
        assert content(workspace) == before
    assert content(workspace) == before


def test_a_driver_that_another_has_overtaken_changes_nothing(workspace: Workspace) -> None:
    """As where the file locks of two hosts do not know of each other."""
    with workspace.locked() as overtaken:
        workspace.lock.unlink()
        with Workspace(workspace.root).locked() as held:
            fill(held)
            before = content(workspace)
            for change in CHANGES.values():
                with pytest.raises(TransientError, match="this run has ended"):
                    change(overtaken)
            with pytest.raises(TransientError, match="this run has ended"), overtaken.fenced():
                pass
            assert content(workspace) == before


def test_a_fence_of_a_part_ends_before_its_run(workspace: Workspace) -> None:
    with workspace.locked() as held:
        with held.fenced() as part:
            part.publish(workspace.mask("a"), b"part")
        with pytest.raises(TransientError, match="this run has ended"):
            part.publish(workspace.mask("a"), b"late")
        with held.fenced() as other:
            other.publish(workspace.mask("a"), b"other")
        held.publish(workspace.mask("b"), b"run")
    assert {path.name: path.read_bytes() for path in workspace.masks.iterdir()} == {"a.png": b"other", "b.png": b"run"}
    assert list(workspace.tmp.iterdir()) == []


@contextlib.contextmanager
def busy_worker(late: Workspace) -> Iterator[subprocess.Popen[str]]:
    """A process that writes and deletes."""
    arguments = [sys.executable, "-c", WORKER, pickle.dumps(late).hex(), IMAGE]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, cwd=ROOT) as worker:
        try:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "working\n"
            yield worker
        finally:
            worker.kill()


def test_no_change_passes_while_the_fence_is_taken_away(workspace: Workspace) -> None:
    with busy_worker(killed_run(workspace)) as worker, workspace.locked():
        before = content(workspace)
        assert "this run has ended" in worker.communicate()[0]
        assert content(workspace) == before


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(8))
def test_a_worker_that_stands_still_in_the_middle_of_a_write(workspace: Workspace, moment: int) -> None:
    with busy_worker(killed_run(workspace)) as worker:
        with pytest.raises(subprocess.TimeoutExpired):
            worker.wait(moment / 300)
        os.kill(worker.pid, signal.SIGSTOP)
        with workspace.locked() as held:
            fill(held)
            before = content(workspace)
        os.kill(worker.pid, signal.SIGCONT)
        assert "this run has ended" in worker.communicate()[0]
        assert content(workspace) == before


def test_other_errors_are_reported_as_they_are(workspace: Workspace) -> None:
    with workspace.locked() as held:
        held.publish(workspace.mask("a"), b"file")
        with pytest.raises(TransientError, match="cannot be written"):
            held.publish(workspace.masks / "a.png" / "b.png", b"file")
        with pytest.raises(ImageError, match="too long a name"):
            held.publish(workspace.mask("n" * 300), b"file")
        held.drop(workspace.masks / "a.png" / "b.png")
        held.drop(workspace.mask("never"))
    assert list(workspace.tmp.iterdir()) == []


class OtherMachine:
    """Processes for which the disk of the workspace is that of a network file system, with their own file locks.

    Their disk is an overlay above ours. It keeps flocks to itself, and its folders stay known under their old names.
    """

    def __init__(self, folder: Path) -> None:
        self._name = folder / "machine"
        self._name.write_text("another-machine")
        self.root = folder / "there" / "ws"

    def start(self, code: str, *arguments: object) -> subprocess.Popen[str]:
        """Run Python code with the workspace, and then these arguments, as its arguments."""
        enter = 'mount --bind "$0" /proc/sys/kernel/random/boot_id && exec "$@"'
        command = ["unshare", "--mount", "sh", "-c", enter, self._name, sys.executable, "-c", code, self.root]
        return subprocess.Popen(
            [*map(str, [*command, *arguments])], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )

    @contextlib.contextmanager
    def running(self, code: str, *arguments: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
        """Run Python code during the block; yields the process, and its first line."""
        with self.start(code, *arguments) as process:
            try:
                assert process.stdout is not None
                yield process, process.stdout.readline().strip()
            finally:
                process.kill()


@pytest.fixture
def other_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OtherMachine]:
    for name in ("lower", "work", "there"):
        (tmp_path / name).mkdir()
    options = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/here,workdir={tmp_path}/work"
    (tmp_path / "here").mkdir()
    mount = ["mount", "-t", "overlay", "overlay", "-o", options, str(tmp_path / "there")]
    may = subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode == 0
    if not may or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("an overlay cannot be mounted here")
    monkeypatch.setattr(files, "_DEAD_SECONDS", 6.0)
    yield OtherMachine(tmp_path)
    subprocess.run(["umount", "-l", str(tmp_path / "there")], check=True)


@pytest.fixture
def here(tmp_path: Path, other_machine: OtherMachine) -> Workspace:
    workspace = Workspace(tmp_path / "here/ws")
    workspace.create()
    return workspace


# Waits for a line, and then writes once more.
OVERTAKEN = DRIVER.replace("sys.stdin.read()", "sys.stdin.readline(); fenced.publish(fenced.mask('a'), b'older')")


def test_file_locks_of_machines_that_do_not_see_each_other(here: Workspace, other_machine: OtherMachine) -> None:
    with other_machine.running(DRIVER) as (driver, _):
        with here.lock.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # else this disk is no such disk
        with pytest.raises(LockedError, match=f"in use by process {driver.pid} on .*; wait until it has ended"):
            here.locked().__enter__()
        assert f"process {driver.pid} on" in str(here.owner())
        assert json.loads(here.lock.read_text())["pid"] == driver.pid
        driver.communicate()
    assert here.lock.read_text() == ""
    with here.locked():
        pass


def test_a_driver_that_was_killed_on_another_machine(here: Workspace, other_machine: OtherMachine) -> None:
    """A worker of it may even know the folder of its run under its old name; see `Workspace._take_away`."""
    with other_machine.running(DRIVER) as (driver, late):
        pass
    assert json.loads(here.lock.read_text())["pid"] == driver.pid
    with other_machine.running(WORKER, late, IMAGE) as (worker, said):
        assert said == "working"
        with here.locked():
            before = content(here)
            assert "run again" in worker.communicate()[0]
            assert content(here) == before


def test_a_driver_that_stood_still_on_another_machine(here: Workspace, other_machine: OtherMachine) -> None:
    with other_machine.running(OVERTAKEN) as (driver, _):
        os.kill(driver.pid, signal.SIGSTOP)
        with here.locked() as held:
            fill(held)
            before = content(here)
            os.kill(driver.pid, signal.SIGCONT)
            driver.communicate("go on\n")
            assert driver.returncode
            assert content(here) == before
            assert json.loads(here.lock.read_text())["pid"] == os.getpid(), "it left the note of the other alone"


def test_two_machines_that_begin_at_once(here: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one writes its note when this one has looked for a note."""

    def take_away(workspace: Workspace, _: Path) -> None:
        workspace.lock.write_text(json.dumps({"host": "other", "pid": 7, "fence": "its own"}))

    here.scratch().touch()
    monkeypatch.setattr(Workspace, "_take_away", take_away)
    with pytest.raises(LockedError, match="in use by process 7 on other"):
        here.locked().__enter__()
