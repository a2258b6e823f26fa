"""Write files whole or not at all, and turn failures of a disk into errors of one line."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

from desra_core.errors import ImageError, TransientError

_SCRATCH = ".unfinished"


def replace_file(
    path: Path,
    content: bytes | Callable[[IO[bytes]], object],
    *,
    durable: bool = False,
    scratch: Path | None = None,
    mode: int = 0o666,
) -> None:
    """Write a file beside its place and move it there, so that readers see the whole old or the whole new content.

    Args:
        path: The file; missing folders are made.
        content: The bytes, or a function that writes them.
        durable: Wait until the content is on the disk, so that it survives a power cut.
        scratch: A new name on the same disk for the unfinished file; by default `scratch_in` the folder of ``path``.
        mode: Rights of the file, less the umask.

    Raises:
        ImageError: The name is too long.
        TransientError: The disk is full or failed; the file is as it was before.
    """
    scratch = scratch or scratch_in(path.parent)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(content) if isinstance(content, bytes) else content(file)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)


def write_secret(path: Path, text: str) -> None:
    """Write a file that only its owner can read, unless the file holds this secret already.

    Raises:
        TransientError: The disk is full or failed.
    """
    with contextlib.suppress(OSError, ValueError):
        there = path.lstat()
        if (there.st_uid, there.st_mode) == (os.getuid(), stat.S_IFREG | 0o600) and path.read_text() == text:
            return
    replace_file(path, text.encode(), mode=0o600)


def scratch_in(folder: Path) -> Path:
    """Return a new name for an unfinished file, by which `is_unfinished` and `sweep` know it."""
    return folder / f".{uuid.uuid4().hex}{_SCRATCH}"


def is_unfinished(name: str) -> bool:
    """Check whether a file's name was made by `scratch_in`."""
    return name.startswith(".") and name.endswith(_SCRATCH)


def sweep(folder: Path) -> None:
    """Delete the unfinished files of killed processes in a folder where no process writes."""
    for scratch in folder.glob(f".*{_SCRATCH}"):
        scratch.unlink(missing_ok=True)


def takes_name(path: Path) -> bool:
    """Check whether the disk allows names this long."""
    disk = next((folder for folder in path.parents if os.path.exists(folder)), Path("/"))
    longest = max(len(os.fsencode(part)) for part in path.parts)
    return longest <= os.pathconf(disk, "PC_NAME_MAX") and len(os.fsencode(path)) < os.pathconf(disk, "PC_PATH_MAX")


def check_names(paths: Iterable[Path]) -> None:
    """Raise `ImageError` for the first path whose name is too long for the disk."""
    for path in paths:
        if not takes_name(path):
            raise _too_long(path)


def _too_long(subject: object) -> ImageError:
    return ImageError(subject, "is too long a name for a file", "give the image a shorter one")


@contextlib.contextmanager
def storage_errors(subject: object) -> Iterator[None]:
    """Turn a failure to write the file ``subject`` into an error of one line.

    Raises:
        ImageError: The name of the file is too long.
        TransientError: In place of any other OSError.
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
    """Turn a failure to read the file ``subject`` into an error of one line.

    Raises:
        FileNotFoundError: There is no such file.
        TransientError: In place of any other OSError of the system.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except PermissionError:
        raise TransientError(subject, "may not be read (permission denied)", "give read permission to it") from None
    except OSError as error:
        if not error.errno:  # Arrow raises such errors for damaged files
            raise
        reason = f"cannot be read ({os.strerror(error.errno)})"
        raise TransientError(subject, reason, "check the disk and run again") from None
