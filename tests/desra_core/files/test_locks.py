"""Locks on files: one process holds a lock, and other processes get its note."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from desra_core.files.content import holder, locked, read_note

# Holds a lock, and has a child that outlives it.
HOLD = """
import subprocess, sys
from pathlib import Path
from desra_core.files.content import locked
with locked(Path(sys.argv[1]), {"who": "another"}):
    wait = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    child = subprocess.Popen(wait, stdin=int(sys.argv[2]), stdout=subprocess.DEVNULL)
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lock"


def test_the_note_is_there_as_long_as_the_lock_is_held(path: Path) -> None:
    assert holder(path) is None
    with locked(path, {"who": "me"}) as other:
        assert other is None
        assert holder(path) == read_note(path) == {"who": "me"}
        with locked(path, {"who": "else"}) as other:
            assert other == {"who": "me"}
        assert holder(path) == {"who": "me"}
    assert holder(path) is None
    assert path.read_bytes() == b""


def test_without_a_note_the_content_stays(path: Path) -> None:
    path.write_text('{"who": "the last one"}')
    with locked(path) as other:
        assert other is None
        assert holder(path) == {"who": "the last one"}
    assert read_note(path) == {"who": "the last one"}


@pytest.mark.parametrize("content", ["", "[]", "{", '"text"', "\0"])
def test_a_lock_without_a_readable_note_is_held(path: Path, content: str) -> None:
    with path.open("w") as file:  # as any program may lock it, an older desra too
        file.write(content)
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        assert holder(path) == {}
        with locked(path, {"who": "me"}) as other:
            assert other == {}
        assert path.read_text() == content
    assert holder(path) is None


def test_a_killed_holder_frees_the_lock_though_its_child_lives(path: Path) -> None:
    theirs, ours = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path), str(theirs)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, pass_fds=[theirs],
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    assert holder(path) == {"who": "another"}
    process.kill()
    process.communicate()
    with locked(path, {"who": "me"}) as other:
        assert other is None
        assert json.loads(path.read_text()) == {"who": "me"}
    os.close(ours)  # at which the child ends
    os.close(theirs)


def test_looking_for_the_holder_does_not_take_the_lock(path: Path) -> None:
    with locked(path):
        pass
    with path.open() as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        looks_away = threading.Timer(0.1, fcntl.flock, [looking, fcntl.LOCK_UN])
        looks_away.start()
        with locked(path) as other:
            assert other is None
        looks_away.join()


def test_a_file_that_may_only_be_read(path: Path) -> None:
    path.touch(0o444)
    with locked(path, read_only=True) as other:
        assert other is None
        with locked(path, read_only=True) as other:
            assert other == {}


def test_a_folder_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), locked(tmp_path / "no" / "lock"):
        pass
    assert holder(tmp_path / "no" / "lock") is None


def test_a_file_that_was_deleted_just_before(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock = fcntl.flock

    def delete(file: object, kind: int) -> None:
        path.unlink()
        flock(file, kind)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "flock", delete)
    with pytest.raises(FileNotFoundError), locked(path):
        pass
