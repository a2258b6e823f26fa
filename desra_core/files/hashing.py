"""Content of files as keys, and reading checkpoints without running code in them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import re
import struct
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from desra_core.errors import TransientError, UsageError

# Raised by torch.load and safetensors for files that are no checkpoint, or only a part of one.
LOAD_ERRORS = (
    AssertionError, AttributeError, EOFError, LookupError, OSError, RuntimeError, TypeError, ValueError,
    pickle.UnpicklingError, struct.error,
)  # fmt: skip


def content_key(path: Path) -> str:
    """Hash the content of a file, 128 bits of BLAKE2b as hex, remembered while the file's status stays the same.

    Raises:
        UsageError: It is missing, a folder, or unreadable.
    """
    try:
        status = path.stat()
        return _hashed(path, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    except FileNotFoundError:
        raise UsageError(path, "does not exist", "check the path") from None
    except OSError as error:
        raise UsageError(path, f"cannot be read ({os.strerror(error.errno or 0)})", "give a readable file") from None


def load_checkpoint(path: Path) -> Any:
    """Read a file of ``torch.save`` onto the CPU, without running code in it.

    The training log that mmengine saves beside weights, which needs mmengine's classes and NumPy's, is left out.

    Raises:
        Exception: One of `LOAD_ERRORS`.
    """
    import torch

    torch.serialization.add_safe_globals([*_stand_ins(), *_numpy_classes()])
    with path.open("rb") as file:  # by its path, torch judges a file by its suffix
        return torch.load(file, map_location="cpu", weights_only=True)


def load_failure(path: Path, error: Exception, way: str) -> UsageError:
    """Return the error to show for one of `LOAD_ERRORS`; ``way`` says how to save the weights of a trusted file."""
    refused = re.search(r"GLOBAL (\S+)", str(error))
    if refused is None:
        return UsageError(path, "is not a checkpoint, or only a part of one", "download or copy the checkpoint again")
    reason = f"holds an object of {refused[1]} beside its weights, and loading such objects can run code"
    return UsageError(path, reason, f"if you trust it, and where {refused[1].partition('.')[0]} is installed, {way}")


class _TrainingLog:
    """In place of mmengine's HistoryBuffer; holds nothing."""

    def __setstate__(self, state: object) -> None:
        """Called by the unpickler."""


def _nothing(*_: object) -> None:
    """In place of ``getattr``, by which a HistoryBuffer looks up its methods."""


def _stand_ins() -> list[tuple[Any, str]]:
    methods = [(_nothing, f"{module}.getattr") for module in ("builtins", "__builtin__")]
    return [(_TrainingLog, "mmengine.logging.history_buffer.HistoryBuffer"), *methods]


def _numpy_classes() -> list[Any]:
    """The functions and classes in pickles of NumPy arrays and numbers, under the names of NumPy 1 and 2."""
    import numpy as np

    rebuild, scalar = np.zeros(1).__reduce__()[0], np.float64(0).__reduce__()[0]
    modules = ("numpy.core.multiarray", "numpy._core.multiarray")
    named = [(rebuild, f"{module}._reconstruct") for module in modules]
    named += [(scalar, f"{module}.scalar") for module in modules]
    return [*named, np.ndarray, np.dtype, *{type(np.dtype(kind)) for kind in np.typecodes["AllInteger"] + "?efdg"}]


@lru_cache(maxsize=64)
def _hashed(path: Path, *_status: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, _hasher).hexdigest()


def _hasher(data: bytes = b"") -> hashlib.blake2b:
    return hashlib.blake2b(data, digest_size=16)


def fingerprint(*parts: Any) -> str:
    """Return a key for JSON-like values: equal values give equal keys, on any machine."""
    return digest(json.dumps(parts, sort_keys=True).encode())


def digest(data: bytes) -> str:
    """Hash content, 128 bits of BLAKE2b as hex: by it, a workspace identifies files and images."""
    return _hasher(data).hexdigest()


def hash_file(path: Path) -> str:
    """Return the `digest` of a file (raises as `read_bytes`)."""
    with _unread(path), path.open("rb") as file:
        return hashlib.file_digest(file, _hasher).hexdigest()


def read_bytes(path: Path) -> bytes:
    """Read a whole file.

    Raises:
        TransientError: The file is gone or may not be read, or the storage failed.
    """
    with _unread(path):
        return path.read_bytes()


@contextlib.contextmanager
def _unread(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise TransientError(path, "the file has vanished", "put it back, or run again without it") from None
    except PermissionError:
        raise TransientError(path, "may not be read (permission denied)", "give read permission to it") from None
    except OSError as error:
        raise TransientError(path, f"cannot be read ({error.strerror})", "check the disk and run again") from None
