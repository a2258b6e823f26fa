"""Read, hash, write and lock whole files.

A write is atomic, and a failure of the disk becomes an error of one line. The system frees a lock when the process that
holds the lock ends, in whatever way. A note in the lock file names that process. Some network file systems keep locks
within one machine; there the process that holds a lock shows other machines that it lives, by touching the file.
"""

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import socket
import stat
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import xxhash

from desra_core.errors import ImageError, LostError, TransientError, UsageError
from desra_core.remote import Remote

_SCRATCH = ".unfinished"
# The last member of a JSON object that `as_json` made: the checksum of all bytes before it.
_CHECKSUM = re.compile(rb',\n "checksum": "(\d+:[0-9a-f]{16})"\n\}\Z')

# How often the holder of a lock touches the file, and after how long without that it counts as dead on other machines.
_TOUCH_SECONDS, _DEAD_SECONDS = 2.0, 15.0
# Identifies the machine, from its start to its end; containers share it with their host, and so its locks.
_MACHINE = Path("/proc/sys/kernel/random/boot_id")


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
        scratch: A new path on the same disk for the unfinished file; by default one of `scratch_in` beside ``path``.
        mode: Permissions of the file, less the umask.

    Raises:
        ImageError: The name is too long.
        TransientError: The disk is full or failed; the file is as it was before.
    """
    with storage_errors(path):
        if scratch is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch = scratch_in(path.parent)
        try:
            with open(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(content) if isinstance(content, bytes) else content(file)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)


def write_output(root: Path, relative: str, data: bytes) -> None:
    """Write a file below a folder, which may be a URL, whole or not at all.

    Raises:
        ImageError: The name is too long.
        UsageError: The URL takes no files.
        TransientError: The disk is full or failed, or the storage does not answer or refuses access.
    """
    path = root / relative
    if isinstance(path, Remote):
        path.write_bytes(data)
    else:
        replace_file(path, data)


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


def as_json(document: Any) -> bytes:
    """Format JSON values; an object gets its `checksum` as last member, by which `parse_json` knows damaged bytes."""
    data = json.dumps(document, indent=1).encode()
    if not isinstance(document, dict) or not document:
        return data
    body = data.removesuffix(b"\n}")
    return body + f',\n "checksum": "{checksum(body)}"\n}}'.encode()


def parse_json(data: bytes) -> Any:
    """Parse JSON, without the checksum of `as_json`; raises `ValueError` where the checksum or the JSON is wrong."""
    if found := _CHECKSUM.search(data):
        body = data[: found.start()]
        if checksum(body) != found[1].decode():
            raise ValueError("the checksum does not fit")
        data = body + b"}"
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("it nests too deeply") from None


def write_json(path: Path, document: Any, *, durable: bool = False) -> None:
    """Write a JSON file by `as_json`, whole (raises `TransientError`)."""
    replace_file(path, as_json(document), durable=durable)


def read_json(path: Path) -> Any:
    """Read a JSON file; None where it is missing or damaged."""
    try:
        return parse_json(path.read_bytes())
    except (OSError, ValueError):
        return None


def read_document(path: Path) -> dict[str, Any]:
    """Read a JSON object, such as the note in a lock file; ``{}`` where it is missing, damaged or no object."""
    document = read_json(path)
    return document if isinstance(document, dict) else {}


def scratch_in(folder: Path, name: str = "") -> Path:
    """Return a new path for an unfinished file, maybe of a name; `is_unfinished` and `sweep` recognise it."""
    return folder / f".{name}{uuid.uuid4().hex}{_SCRATCH}"


def is_unfinished(name: str) -> bool:
    """Check whether a file's name was made by `scratch_in`."""
    return name.startswith(".") and name.endswith(_SCRATCH)


def sweep(folder: Path, name: str = "") -> None:
    """Delete the unfinished files of killed processes in a folder where no process writes, or none of that name."""
    for scratch in folder.glob(f".{glob.escape(name)}{'[0-9a-f]' * 32 if name else '*'}{_SCRATCH}"):
        scratch.unlink(missing_ok=True)


def sync_path(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk (raises `OSError`)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot do it for folders
            raise
    finally:
        os.close(descriptor)


def takes_name(path: Path) -> bool:
    """Check whether the disk of a path allows a path and names of this length."""
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


def paths_in(folder: Path, pattern: str) -> list[Path]:
    """List the entries of a folder whose names match a pattern, sorted; none where there is no such folder.

    `Path.glob` would return nothing, too, where the folder cannot be read now (from Python 3.12 on).

    Raises:
        TransientError: The folder cannot be read.
    """
    with reading_errors(folder), contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return sorted(folder / name for name in os.listdir(folder) if fnmatchcase(name, pattern))
    return []


def content_key(path: Path) -> str:
    """Hash a file's content, 128 bits of BLAKE2b as hex; a process keeps the hash until inode, size or times change.

    Raises:
        UsageError: The file is missing, no file, or unreadable.
    """
    if isinstance(path, Remote):
        try:
            return hash_file(path)
        except TransientError as error:
            raise UsageError(*error.failure) from None
    try:
        status = _status(path)
        return _remembered(path, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    except FileNotFoundError:
        raise UsageError(path, "does not exist", "check the path") from None
    except OSError as error:
        raise UsageError(path, f"cannot be read ({error.strerror})", "give a readable file") from None


def fingerprint(*parts: Any) -> str:
    """Return a key for JSON-like values: equal values give equal keys, on any machine."""
    return digest(json.dumps(parts, sort_keys=True).encode())


def digest(data: bytes) -> str:
    """Hash content, 128 bits of BLAKE2b as hex. A workspace identifies files and images by this hash."""
    return _hasher(data).hexdigest()


def checksum(data: bytes | memoryview) -> str:
    """Return size and XXH3 hash of content, ``SIZE:HASH`` with 64 bits as hex: it tells damage, and is no identity."""
    return f"{len(data)}:{xxhash.xxh3_64_hexdigest(data)}"


def file_checksum(path: Path) -> str:
    """Return the `checksum` of a file, read in parts (raises `OSError`)."""
    found, size = xxhash.xxh3_64(), 0
    with path.open("rb") as file:
        while part := file.read(2**20):
            found.update(part)
            size += len(part)
    return f"{size}:{found.hexdigest()}"


def read_checked(path: Path, expected: str | None) -> bytes:
    """Read a whole file that a run has written.

    Args:
        path: The file.
        expected: Its `checksum` when it was written; None where it is not known.

    Raises:
        LostError: The file is damaged.
        TransientError: The file is gone or may not be read, or the storage failed.
    """
    data = read_bytes(path)
    if expected is not None and checksum(data) != expected:
        raise LostError(path, "is not as it was written", "find and mend all such files with desra verify --repair")
    return data


def hash_file(path: Path) -> str:
    """Return the `digest` of a file (raises as `read_bytes`)."""
    if isinstance(path, Remote):
        return digest(path.read_bytes())
    with read_errors(path):
        _status(path)
        return _hashed(path)


def read_bytes(path: Path) -> bytes:
    """Read a whole file.

    Raises:
        TransientError: The file is gone or may not be read, is no file, or the storage failed.
    """
    with read_errors(path):
        return read_input(path)


def read_input(path: Path) -> bytes:
    """Read a whole file that a person named (raises `OSError`, also for pipes and devices, which might never end)."""
    if not isinstance(path, Remote):
        _status(path)
    return path.read_bytes()


def _status(path: Path) -> os.stat_result:
    try:
        status = path.stat()
    except ValueError:  # a null character, which the name of no file has
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)) from None
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.ENOTSUP, "it is a pipe or a device")
    return status


def _hashed(path: Path, *_status: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, _hasher).hexdigest()


_remembered = lru_cache(maxsize=64)(_hashed)  # the status is only a part of the cache's key


def _hasher(data: bytes = b"") -> hashlib.blake2b:
    return hashlib.blake2b(data, digest_size=16)


@contextlib.contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Turn a failure to read a file into an error of one line (raises `TransientError`)."""
    try:
        with reading_errors(path):
            yield
    except FileNotFoundError:
        raise TransientError(path, "there is no such file", "check its path, or put it back") from None


@contextlib.contextmanager
def locked(
    path: Path, note: Mapping[str, Any] | None = None, *, read_only: bool = False
) -> Iterator[dict[str, Any] | None]:
    """Hold the lock of a file (``flock``), unless another process holds it.

    With `this_machine` as ``machine`` in the notes, this holds on a disk of several machines that do not see each
    other's locks, too. A process on another machine that has left its note, because it was killed, costs 15 s there.

    Args:
        path: The file. A missing file is made, a missing folder is not.
        note: Written into the file as JSON for as long as the lock is held; None leaves the content as it is.
        read_only: Lock a file that exists and that this user may not write. Network file systems refuse such locks.

    Yields:
        None where this process has the lock now, else the note of the process that has it, as `holder` returns it.

    Raises:
        FileNotFoundError: The folder is missing, or the file was deleted meanwhile.
        OSError: The file cannot be opened.
        UsageError: The disk has no file locks.
    """
    with path.open("r" if read_only else "a+") as file:
        while not _flocked(file, fcntl.LOCK_EX):
            if (other := holder(path)) is not None:
                yield other
                return
            time.sleep(0.01)  # another process is in `holder`, which locks the file for a moment
        if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            raise FileNotFoundError(errno.ENOENT, "was deleted", str(path))
        if note is None:
            yield None
            return
        if (other := _alive_elsewhere(path)) is not None:
            yield other
            return
        file.truncate(0)
        file.write(json.dumps(note))
        file.flush()
        try:
            with _touched(file) if "machine" in note else contextlib.nullcontext():
                yield None
        finally:
            # Else another machine has taken the lock over. On SMB, no one can read a file that is locked.
            if read_json(path) in (None, json.loads(json.dumps(note))):
                file.truncate(0)


def holder(path: Path) -> dict[str, Any] | None:
    """Return the note of the process that holds the lock of a file, ``{}`` without one; None where the lock is free.

    Raises:
        OSError: The file is there but cannot be read.
        UsageError: The disk has no file locks.
    """
    try:
        with path.open() as file:
            if not _flocked(file, fcntl.LOCK_SH):
                return read_document(path)
        return _alive_elsewhere(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def this_machine() -> str:
    """Return a name for this machine that no other has."""
    return _MACHINE.read_text().strip() if _MACHINE.exists() else socket.gethostname()


def _alive_elsewhere(path: Path) -> dict[str, Any] | None:
    """Return the note of a process on another machine, if that touches the file; None where there is no such process.

    The clocks of the machines may differ, so the time of the last touch alone tells nothing.
    """
    note = read_document(path)
    if note.get("machine", here := this_machine()) == here:
        return None
    touched, deadline = _last_touch(path), time.monotonic() + _DEAD_SECONDS
    while time.monotonic() < deadline:
        time.sleep(_TOUCH_SECONDS / 4)
        if _last_touch(path) != touched:
            return note
    return None


def _last_touch(path: Path) -> int:
    with path.open() as file:  # network file systems ask the server when a file is opened, else they may remember
        return os.fstat(file.fileno()).st_mtime_ns


@contextlib.contextmanager
def _touched(file: IO[str]) -> Iterator[None]:
    """Touch an open file again and again during the block."""
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(_TOUCH_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(file.fileno())

    thread = threading.Thread(target=touch, name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _flocked(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # another process holds it; network file systems say so by EACCES
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF):
            raise
        reason = f"cannot be locked ({error.strerror})"
        raise UsageError(file.name, reason, "use a disk with file locks, such as one of this machine") from error
    return True
