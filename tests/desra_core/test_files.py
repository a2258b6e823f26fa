"""Files are replaced whole, or left as they were; keys of files depend on their content; one process holds a lock."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from desra_core.errors import TransientError, UsageError
from desra_core.files import (
    content_key,
    digest,
    holder,
    locked,
    paths_in,
    read_document,
    replace_file,
    sweep,
    write_secret,
)
from desra_core.workspace import Workspace

# Holds a lock, and has a child that outlives it.
HOLD = """
import subprocess, sys
from pathlib import Path
from desra_core.files import locked
with locked(Path(sys.argv[1]), {"who": "another"}):
    wait = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    child = subprocess.Popen(wait, stdin=int(sys.argv[2]), stdout=subprocess.DEVNULL)
    print("held", flush=True)
    sys.stdin.read()
"""


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("durable", [True, False])
def test_content_is_written_and_replaced(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "new" / "folder" / "file.json"
    for content in (b"one", b"", b"two" * 100_000):
        replace_file(path, content, durable=durable)
        assert path.read_bytes() == content
    assert left(path.parent) == {"file.json"}


def test_a_secret_is_replaced_whole_and_left_where_it_is_the_same(tmp_path: Path) -> None:
    path = tmp_path / "new" / "key"
    write_secret(path, "one")
    with path.open() as reader:
        before = path.stat()
        write_secret(path, "one")
        assert path.stat() == before
        write_secret(path, "two")
        assert reader.read() == "one"  # whoever reads meanwhile gets a whole one
    path.chmod(0o644)
    before = path.stat()
    write_secret(path, "two")
    assert path.stat().st_ino != before.st_ino  # nobody has it open from when it was readable
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("two", 0o600)
    assert left(path.parent) == {"key"}


@pytest.mark.parametrize("name", ["x" * 255, "ü" * 127, "日本" * 42, ".hidden", "with space"])
def test_any_file_name_works(tmp_path: Path, name: str) -> None:
    replace_file(tmp_path / name, b"x")
    assert left(tmp_path) == {name}


def test_other_files_of_the_folder_stay(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("other")
    (tmp_path / ".file").write_text("hidden")
    replace_file(tmp_path / "file", b"x")
    sweep(tmp_path)
    assert left(tmp_path) == {"other", ".file", "file"}


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), MemoryError()], ids=repr)
@pytest.mark.parametrize("before", [b"before", None])
def test_an_error_while_writing(tmp_path: Path, error: BaseException, before: bytes | None) -> None:
    path = tmp_path / "file"
    if before:
        path.write_bytes(before)

    def write(file: IO[bytes]) -> None:
        file.write(b"half")
        raise error

    with pytest.raises(type(error)):
        replace_file(path, write)
    assert left(tmp_path) == ({"file"} if before else set())
    assert before is None or path.read_bytes() == before


@given(st.lists(st.tuples(st.binary(max_size=50), st.integers(0, 60))))
@settings(deadline=None, max_examples=50)
def test_a_write_that_breaks_off_leaves_the_old_or_the_new_content(
    tmp_path_factory: pytest.TempPathFactory, steps: list
) -> None:
    """Writes byte by byte, of which some break off after a number of bytes."""
    path = tmp_path_factory.mktemp("x") / "file"
    expected = None

    def write(file: IO[bytes], content: bytes, limit: int) -> None:
        for number, byte in enumerate(content):
            if number == limit:
                raise RuntimeError
            file.write(bytes([byte]))

    for content, limit in steps:
        try:
            replace_file(path, lambda file, content=content, limit=limit: write(file, content, limit))
            expected = content
        except RuntimeError:
            assert limit < len(content)
        assert (path.read_bytes() if path.exists() else None) == expected
        assert left(path.parent) <= {"file"}


def test_a_file_larger_than_the_disk_allows(tmp_path: Path) -> None:
    """A limit on the size of files stands for it."""
    path = tmp_path / "file"
    path.write_bytes(b"before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        for write in (lambda file: file.write(bytes(200_000)), lambda file: np.save(file, np.zeros(50_000))):
            with pytest.raises(TransientError) as caught:
                replace_file(path, write)
            assert str(caught.value).startswith(f"{path}: cannot be written (")
            assert "\n" not in str(caught.value)
            assert path.read_bytes() == b"before"
            assert left(tmp_path) == {"file"}
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no /dev/full")
def test_a_full_disk(tmp_path: Path) -> None:
    def write(_: IO[bytes]) -> None:
        with Path("/dev/full").open("wb") as full:
            full.write(b"x")

    with pytest.raises(TransientError, match="file: the disk is full; free some space and run again"):
        replace_file(tmp_path / "file", write)
    assert left(tmp_path) == set()


def test_paths_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder" / "full").mkdir(parents=True)
    for path in (tmp_path / "file" / "below", tmp_path / "folder"):
        with pytest.raises(TransientError, match=f"{path}: cannot be written"):
            replace_file(path, b"x")
    assert left(tmp_path) == {"file", "folder"}


def test_readers_of_the_old_file_keep_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    replace_file(path, b"old")
    with path.open("rb") as reader:
        replace_file(path, b"new content")
        assert reader.read() == b"old"
    assert path.read_bytes() == b"new content"


def test_rights_are_those_of_a_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("x")
    replace_file(tmp_path / "file", b"x")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "file")}
    assert len(modes) == 1


KILLED = """
import os, signal, sys
from pathlib import Path
from desra_core.files import replace_file

def write(file):
    file.write(bytes(100_000))
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

replace_file(Path(sys.argv[1]), write)
"""


def test_sweep_deletes_unfinished_files_of_a_killed_process(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"before"
    assert len(os.listdir(tmp_path)) == 2
    sweep(tmp_path)
    assert left(tmp_path) == {"file"}
    sweep(tmp_path / "nowhere")


def test_a_key_follows_the_content(tmp_path: Path) -> None:
    path, copy = tmp_path / "a", tmp_path / "b"
    path.write_bytes(b"content")
    copy.write_bytes(b"content")
    assert content_key(path) == content_key(copy) == digest(b"content")
    copy.write_bytes(b"other")
    assert content_key(copy) == digest(b"other")


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="none: does not exist; check the path"):
        content_key(tmp_path / "none")
    with pytest.raises(UsageError, match=r"cannot be read \(Is a directory\)"):
        content_key(tmp_path)


def test_keys_of_a_run_need_no_torch() -> None:
    code = "import sys, desra_core.planning.plan; assert not {'torch', 'spandrel'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lock"


def test_the_note_is_there_as_long_as_the_lock_is_held(path: Path) -> None:
    assert holder(path) is None
    with locked(path, {"who": "me"}) as other:
        assert other is None
        assert holder(path) == read_document(path) == {"who": "me"}
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
    assert read_document(path) == {"who": "the last one"}


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


def test_a_folder_is_listed_or_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else records of a folder that cannot be read now would be taken for missing, and computed or deleted."""
    for name in ("b.json", "a.json", "c.txt", ".hidden.json"):
        (tmp_path / name).touch()
    assert [path.name for path in paths_in(tmp_path, "*.json")] == [".hidden.json", "a.json", "b.json"]
    assert paths_in(tmp_path / "no", "*") == paths_in(tmp_path / "c.txt", "*") == []

    def refuse(folder: object) -> list[str]:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("os.listdir", refuse)
    with pytest.raises(TransientError, match=r"cannot be read \(Too many open files\); check the disk and run again"):
        paths_in(tmp_path, "*")


def test_a_disk_without_file_locks_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: object, kind: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UsageError, match="cannot be locked") as error, locked(path):
        pass
    assert error.value.subject == str(path)
    workspace = Workspace(path.parent)
    workspace.lock.touch()
    assert workspace.owner() is None  # desra status only looks


def test_a_file_that_was_deleted_just_before(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock = fcntl.flock

    def delete(file: object, kind: int) -> None:
        path.unlink()
        flock(file, kind)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "flock", delete)
    with pytest.raises(FileNotFoundError), locked(path):
        pass
