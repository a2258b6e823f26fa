"""Per-image arrays in zarr: one group per image, tiles as chunks, few files, published whole or not at all."""

import contextlib
import re
import shutil
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash
import zarr
from zarr.codecs import BloscCodec
from zarr.storage import MemoryStore

from desra_core.errors import LostError, TransientError
from desra_core.files import reading_errors
from desra_core.workspace import Workspace

_CHUNK = 512
_SHARD = 4096
_ABOUT = "zarr.json"  # zarr's own file about an array
_UNTOLD = "0" * 16  # in place of the checksum, before it is known and while it is computed
_CHECKSUM = re.compile(rb'"checksum": "([0-9a-f]{16})"')


def write_array(workspace: Workspace, image_id: str, name: str, array: npt.NDArray[Any], *, key: str) -> None:
    """Store an ``(H, W)`` or ``(H, W, C)`` array under its cache key, over any older one (raises `TransientError`)."""
    group = workspace.group(image_id)
    # Before the fence, because zarr makes folders that are missing. Its name sorts behind those of fences, which are
    # taken away in this order: who finds it gone knows from the fence that the run has ended.
    made = workspace.tmp / f"made-{uuid.uuid4().hex}"
    with workspace.writing(group / name):
        try:
            if not (group / "zarr.json").exists():
                zarr.open_group(made, mode="a", zarr_format=3)
                workspace.publish(group / "zarr.json", (made / "zarr.json").read_bytes())
            _store(made / name, array, {"key": key, "crc32": _crc32(array), "checksum": _UNTOLD})
            about = made / name / _ABOUT
            about.write_text(about.read_text().replace(_UNTOLD, _files_hash(made / name)))
            whole = (made / name).rename(workspace.scratch())
            drop_array(workspace, image_id, name)
            try:
                whole.rename(group / name)
            except OSError:  # where Dask runs an image twice, the other run has written the same bytes
                shutil.rmtree(whole, ignore_errors=True)
                if not (group / name).exists():
                    raise
        finally:
            shutil.rmtree(made, ignore_errors=True)


def stored_bytes(array: npt.NDArray[Any]) -> int:
    """Return the bytes that `write_array` would take for an array."""
    memory: dict[str, Any] = {}
    _store(MemoryStore(memory), array, {})
    return sum(map(len, memory.values()))


def _store(store: Any, array: npt.NDArray[Any], attributes: dict[str, Any]) -> None:
    """Write an array to a new folder or another store of zarr."""
    stored = zarr.create_array(
        store,
        shape=array.shape,
        dtype=array.dtype,
        chunks=(_CHUNK, _CHUNK, *array.shape[2:]),
        shards=(*(min(-(-side // _CHUNK) * _CHUNK, _SHARD) for side in array.shape[:2]), *array.shape[2:]),
        compressors=BloscCodec(cname="lz4", clevel=1, shuffle="bitshuffle"),
        attributes=attributes,
        zarr_format=3,
    )
    stored[:] = array


class StoredArray:
    """An array of a workspace, opened to be read; reading never changes or deletes anything.

    Attributes:
        shape, key: The shape and the cache key of the array.

    Raises:
        LostError: The array is missing or damaged.
        TransientError: The disk or the system refuses to read the array for now.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with _reading(path):
            self._array: Any = zarr.open_array(path, mode="r")
            self.shape: tuple[int, ...] = self._array.shape
            self.key: Any = self._array.attrs.get("key")

    def whole(self) -> npt.NDArray[Any]:
        """Read the whole array and check its CRC, because zarr reads a lost chunk as zeros (raises as the class)."""
        with _reading(self._path):
            array: npt.NDArray[Any] = self._array[:]
            if self._array.attrs.get("crc32") != _crc32(array):
                raise _lost(self._path)
        return array

    def window(self, rows: slice, columns: slice) -> npt.NDArray[Any]:
        """Read only the chunks under a window, unchecked: a lost chunk reads as zeros (raises as the class)."""
        with _reading(self._path):
            array: npt.NDArray[Any] = self._array[rows, columns]
        return array


def check_array(path: Path) -> None:
    """Check that the files of a stored array are as they were written.

    Raises:
        LostError: They are not; or the array, of an older desra without this checksum, is damaged.
        TransientError: The disk or the system refuses to read the array for now.
    """
    with _reading(path):
        found = _CHECKSUM.search((path / _ABOUT).read_bytes())
        if found is None:
            StoredArray(path).whole()
        elif _files_hash(path) != found[1].decode():
            raise _lost(path)


def read_array(workspace: Workspace, image_id: str, name: str, *, key: str | None) -> npt.NDArray[Any]:
    """Read a whole array of an image; the array must have been made under the given key.

    Raises:
        LostError: The array is missing, damaged, or was made under another key.
        TransientError: The array cannot be read now.
    """
    path = workspace.group(image_id) / name
    stored = StoredArray(path)
    if stored.key != key:
        raise _lost(path)
    return stored.whole()


def find_array(workspace: Workspace, image_id: str, name: str, *, key: str | None) -> npt.NDArray[Any] | None:
    """Read an array as `read_array` does; None where the array is lost and the caller has to make it again."""
    if not (workspace.group(image_id) / name).exists():  # an error would keep the caller's arrays for a while
        return None
    with contextlib.suppress(LostError):
        return read_array(workspace, image_id, name, key=key)
    return None


def drop_array(workspace: Workspace, image_id: str, name: str) -> None:
    """Delete an array of an image, if it is there (raises as `Workspace.drop`)."""
    workspace.drop(workspace.group(image_id) / name)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Raise `LostError` for a lost array, and `TransientError` for one that cannot be read now."""
    try:
        with reading_errors(path):
            yield
    except (FileNotFoundError, ValueError, TypeError, LookupError, RuntimeError, AttributeError) as error:
        if "new thread" in str(error):  # zarr reads in threads, of which the system may have no more
            raise TransientError(path, f"cannot be read ({error})", "run again") from None
        raise _lost(path) from None


def _lost(path: Path) -> LostError:
    return LostError(path, "is missing, damaged, or of a run that was cut off", "run again: it is made anew")


def _files_hash(folder: Path) -> str:
    """Hash names, sizes and bytes of the files of an array, but for the checksum that one of them holds."""
    found = xxhash.xxh3_64()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        data = path.read_bytes()
        if path.name == _ABOUT:
            data = _CHECKSUM.sub(f'"checksum": "{_UNTOLD}"'.encode(), data)
        found.update(f"{path.relative_to(folder)} {len(data)} ".encode())
        found.update(data)
    return found.hexdigest()


def _crc32(array: npt.NDArray[Any]) -> int:
    return zlib.crc32(np.ascontiguousarray(array).data)
