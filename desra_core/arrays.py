"""Per-image arrays in zarr: one group per image, tiles as chunks, few files, published whole or not at all."""

from __future__ import annotations

import contextlib
import shutil
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import BloscCodec

from desra_core.errors import TransientError
from desra_core.workspace import Workspace, storage_errors

_CHUNK = 512
_SHARD = 4096


def write_array(workspace: Workspace, image_id: str, name: str, array: npt.NDArray[Any], *, key: str) -> None:
    """Store an ``(H, W)`` or ``(H, W, C)`` array under the key of the settings that made it, in place of any older one.

    Raises
    ------
    TransientError
        The disk is full or failed.
    """
    group = workspace.group(image_id)
    with storage_errors(group / name):
        if not (group / "zarr.json").exists():
            zarr.open_group(group, mode="a", zarr_format=3)
        scratch = workspace.scratch()
        stored = zarr.create_array(
            scratch,
            shape=array.shape,
            dtype=array.dtype,
            chunks=(_CHUNK, _CHUNK, *array.shape[2:]),
            shards=_shards(array.shape),
            compressors=BloscCodec(cname="lz4", clevel=1, shuffle="bitshuffle"),
            attributes={"key": key, "crc32": _crc32(array)},
            zarr_format=3,
        )
        try:
            stored[:] = array
            drop_array(workspace, image_id, name)
            # Where Dask runs an image twice, both write the same bytes: whoever comes second changes nothing.
            with contextlib.suppress(FileExistsError):
                _move(scratch, group / name)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def read_array(workspace: Workspace, image_id: str, name: str, *, key: str | None) -> npt.NDArray[Any]:
    """Read a whole array of an image that was made under the given key.

    Raises
    ------
    TransientError
        It is not there, not whole, or was made under another key. It is dropped, so that the next run makes it
        anew.
    """
    path = workspace.group(image_id) / name
    try:
        stored = zarr.open_array(path, mode="r")
        array: npt.NDArray[Any] = stored[:]  # type: ignore[assignment]
        # A chunk that is not there would be read as zeros.
        if stored.attrs.get("key") == key and stored.attrs.get("crc32") == _crc32(array):
            return array
    except (OSError, ValueError, TypeError, KeyError, RuntimeError):
        pass
    drop_array(workspace, image_id, name)
    raise TransientError(path, "is damaged, or of a run that was cut off", "run again: it is made anew")


def find_array(workspace: Workspace, image_id: str, name: str, *, key: str | None) -> npt.NDArray[Any] | None:
    """As `read_array`, but None for what is not there."""
    try:
        return read_array(workspace, image_id, name, key=key)
    except TransientError:
        return None


def drop_array(workspace: Workspace, image_id: str, name: str) -> None:
    """Delete an array of an image, if it is there."""
    shutil.rmtree(workspace.group(image_id) / name, ignore_errors=True)


def _crc32(array: npt.NDArray[Any]) -> int:
    return zlib.crc32(np.ascontiguousarray(array).data)


def _shards(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Whole chunks that cover the array in one zarr shard, or in a few where it is large."""
    return (*(min(-(-side // _CHUNK) * _CHUNK, _SHARD) for side in shape[:2]), *shape[2:])


def _move(scratch: Any, target: Any) -> None:
    try:
        scratch.rename(target)
    except OSError:
        shutil.rmtree(scratch, ignore_errors=True)
        if not target.exists():
            raise
