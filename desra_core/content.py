"""What a file holds, as a key: for checkpoints and configs, on which every result depends."""

from __future__ import annotations

import hashlib
import os
import pickle
import struct
from functools import lru_cache
from pathlib import Path

from desra_core.errors import UsageError

# What torch.load and safetensors raise for files that are no checkpoint, or only a part of one.
LOAD_ERRORS = (
    AssertionError, AttributeError, EOFError, LookupError, OSError, RuntimeError, TypeError, ValueError,
    pickle.UnpicklingError, struct.error,
)  # fmt: skip


def content_key(path: Path) -> str:
    """Hash the content of a file, 128 bits of BLAKE2b as hex, remembered while the file's status stays the same.

    Raises
    ------
    UsageError
        It is missing, a folder, or unreadable.
    """
    try:
        status = path.stat()
        return _hashed(path, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    except FileNotFoundError:
        raise UsageError(path, "does not exist", "check the path") from None
    except OSError as error:
        raise UsageError(path, f"cannot be read ({os.strerror(error.errno or 0)})", "give a readable file") from None


@lru_cache(maxsize=64)
def _hashed(path: Path, *_status: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
