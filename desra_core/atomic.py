"""Files outside a workspace, written so that nobody ever sees half of one."""

from __future__ import annotations

import contextlib
import os
import stat
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO

from desra_core.workspace import storage_errors

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
