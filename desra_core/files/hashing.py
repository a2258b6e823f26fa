"""The content of files, and keys made of it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from desra_core.errors import TransientError, UsageError
from desra_core.files.atomic import reading_errors


def content_key(path: Path) -> str:
    """Hash the content of a file, 128 bits of BLAKE2b as hex, remembered while the file's status stays the same.

    Raises:
        UsageError: The file is missing, a folder, or unreadable.
    """
    try:
        status = path.stat()
        return _remembered(path, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    except FileNotFoundError:
        raise UsageError(path, "does not exist", "check the path") from None
    except OSError as error:
        raise UsageError(path, f"cannot be read ({os.strerror(error.errno or 0)})", "give a readable file") from None


def fingerprint(*parts: Any) -> str:
    """Return a key for JSON-like values: equal values give equal keys, on any machine."""
    return digest(json.dumps(parts, sort_keys=True).encode())


def digest(data: bytes) -> str:
    """Hash content, 128 bits of BLAKE2b as hex. A workspace identifies files and images by this hash."""
    return _hasher(data).hexdigest()


def hash_file(path: Path) -> str:
    """Return the `digest` of a file (raises as `read_bytes`)."""
    with _read_errors(path):
        return _hashed(path)


def read_bytes(path: Path) -> bytes:
    """Read a whole file.

    Raises:
        TransientError: The file is gone or may not be read, or the storage failed.
    """
    with _read_errors(path):
        return path.read_bytes()


def _hashed(path: Path, *_status: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, _hasher).hexdigest()


_remembered = lru_cache(maxsize=64)(_hashed)


def _hasher(data: bytes = b"") -> hashlib.blake2b:
    return hashlib.blake2b(data, digest_size=16)


@contextlib.contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    try:
        with reading_errors(path):
            yield
    except FileNotFoundError:
        raise TransientError(path, "the file has vanished", "put it back, or run again without it") from None
