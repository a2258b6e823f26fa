"""Locks on files. The system frees a lock when its process ends, in any way; a note in the file names the process."""

import contextlib
import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any


@contextlib.contextmanager
def locked(
    path: Path, note: Mapping[str, Any] | None = None, *, read_only: bool = False
) -> Iterator[dict[str, Any] | None]:
    """Hold the lock of a file (``flock``), unless another process holds it.

    Args:
        path: The file. A missing file is made, a missing folder is not.
        note: Written into the file as JSON for as long as the lock is held; None leaves the content as it is.
        read_only: Lock a file that exists and that this user may not write. Network file systems refuse such locks.

    Yields:
        None where this process has the lock now, else the note of the process that has it, as `holder` returns it.

    Raises:
        FileNotFoundError: The folder is missing, or the file was deleted meanwhile.
        OSError: The file cannot be opened.
    """
    with path.open("r" if read_only else "a+") as file:
        while not _flocked(file, fcntl.LOCK_EX):
            if (other := holder(path)) is not None:
                yield other
                return
            time.sleep(0.01)  # another process was in `holder` just now
        if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            raise FileNotFoundError(errno.ENOENT, "was deleted", str(path))
        if note is not None:
            file.truncate(0)
            file.write(json.dumps(note))
            file.flush()
        try:
            yield None
        finally:
            if note is not None:
                file.truncate(0)


def holder(path: Path) -> dict[str, Any] | None:
    """Return the note of the process that holds the lock of a file, ``{}`` without one; None where the lock is free.

    Raises:
        OSError: The file is there but cannot be read.
    """
    try:
        with path.open() as file:
            return None if _flocked(file, fcntl.LOCK_SH) else read_note(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def read_note(path: Path) -> dict[str, Any]:
    """Read the note in a lock file, whether the lock is held or not; ``{}`` where there is none."""
    try:
        note = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def _flocked(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
