"""Per-image arrays in zarr: one group per image, tiles as chunks, few files, published whole or not at all."""

from __future__ import annotations

import contextlib
import shutil
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
    """Store a 2-D array of an image under the key of the settings that made it, in place of any older one.

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
            chunks=(_CHUNK, _CHUNK),
            shards=_shards(array.shape),
            compressors=BloscCodec(cname="lz4", clevel=1, shuffle="bitshuffle"),
            attributes={"key": key},
            fill_value=_missing(array.dtype),
            zarr_format=3,
        )
        try:
            stored[:] = array
            shutil.rmtree(group / name, ignore_errors=True)
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
        if stored.attrs.get("key") == key and not _has_missing(array):
            return array
    except (OSError, ValueError, TypeError, KeyError, RuntimeError):
        pass
    shutil.rmtree(path, ignore_errors=True)
    raise TransientError(path, "is damaged, or of a run that was cut off", "run again: it is made anew")


def drop_arrays(workspace: Workspace, image_id: str) -> None:
    """Delete the group of an image, if there is one."""
    shutil.rmtree(workspace.group(image_id), ignore_errors=True)


def _missing(dtype: npt.DTypeLike) -> float:
    """What zarr gives for a chunk that is not there: no similarity is NaN, and no class 255."""
    return np.nan if np.dtype(dtype).kind == "f" else 255


def _has_missing(array: npt.NDArray[Any]) -> bool:
    return bool(np.isnan(array).any() if array.dtype.kind == "f" else (array == 255).any())


def _shards(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Whole chunks that cover the array in one zarr shard, or in a few where it is large."""
    return tuple(min(-(-side // _CHUNK) * _CHUNK, _SHARD) for side in shape)


def _move(scratch: Any, target: Any) -> None:
    try:
        scratch.rename(target)
    except OSError:
        shutil.rmtree(scratch, ignore_errors=True)
        if not target.exists():
            raise
