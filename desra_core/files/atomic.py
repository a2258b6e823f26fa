"""Files outside a workspace, written so that nobody ever sees half of one."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

from desra_core.errors import ImageError, TransientError

_SCRATCH = ".unfinished"


def replace_file(path: Path, write: Callable[[IO[bytes]], object], *, durable: bool = False) -> None:
    """Write a file beside its place, and move it there.

    Parameters
    ----------
    path
        What is there already is replaced; missing folders are made.
    write
        Writes the content.
    durable
        Wait until the disk has it: for what a power cut must not take.

    Raises
    ------
    TransientError
        The disk is full or failed; what was there before is left.
    """
    scratch = scratch_in(path.parent)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with scratch.open("wb") as file:
                write(file)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)


def write_secret(path: Path, text: str) -> None:
    """Write a file that nobody but its owner can ever read.

    Parameters
    ----------
    path
        What is there already is replaced, unless it is this very secret and nobody else could read it; missing folders
        are made.
    text
        The content.

    Raises
    ------
    TransientError
        The disk is full or failed.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError, ValueError):
            there = path.lstat()
            if (there.st_uid, there.st_mode) == (os.getuid(), stat.S_IFREG | 0o600) and path.read_text() == text:
                return
        scratch = scratch_in(path.parent)
        try:
            with open(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(text)
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)


def scratch_in(folder: Path) -> Path:
    """A new name for a file that is gone soon, and that `is_unfinished` if it is left."""
    return folder / f".{uuid.uuid4().hex}{_SCRATCH}"


def is_unfinished(name: str) -> bool:
    """Whether a file of this name is one that is being written, or was left half-written."""
    return name.startswith(".") and name.endswith(_SCRATCH)


def sweep(folder: Path) -> None:
    """Delete what killed processes left half-written in a folder; nobody may be writing there."""
    for scratch in folder.glob(f".*{_SCRATCH}"):
        scratch.unlink(missing_ok=True)


def flocked(file: IO[str], kind: int) -> bool:
    """Whether a lock of `fcntl.flock` could be had at once."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def takes_name(path: Path) -> bool:
    """Whether the disk allows names this long."""
    disk = next((folder for folder in path.parents if os.path.exists(folder)), Path("/"))
    longest = max(len(os.fsencode(part)) for part in path.parts)
    return longest <= os.pathconf(disk, "PC_NAME_MAX") and len(os.fsencode(path)) < os.pathconf(disk, "PC_PATH_MAX")


def check_names(paths: Iterable[Path]) -> None:
    """See that files can be written as far as their names tell.

    Raises
    ------
    ImageError
        The name of one is too long.
    """
    for path in paths:
        if not takes_name(path):
            raise _too_long(path)


def _too_long(subject: object) -> ImageError:
    return ImageError(subject, "is too long a name for a file", "give the image a shorter one")


@contextlib.contextmanager
def storage_errors(subject: object) -> Iterator[None]:
    """Turn a failing disk into one line about ``subject``.

    Raises
    ------
    TransientError
        In place of any OSError but this:
    ImageError
        The name of the file is too long, and will be the next time.
    """
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise _too_long(subject) from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise TransientError(subject, "the disk is full", "free some space and run again") from error
        reason = f"cannot be written ({error.strerror or error})"
        raise TransientError(subject, reason, "check the disk and run again") from error


@contextlib.contextmanager
def reading_errors(subject: object) -> Iterator[None]:
    """Turn what keeps a file from being read for now into one line about ``subject``; that it is not there passes.

    Raises
    ------
    TransientError
        In place of any OSError of the system but FileNotFoundError.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        if not error.errno:  # Arrow's, of damaged files
            raise
        reason = f"cannot be read ({os.strerror(error.errno)})"
        raise TransientError(subject, reason, "check the disk and run again") from None
