"""List the files of a workspace as columns: masks, stored arrays, dataset pictures and masks by people."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from desra_core.workspace import DATASET, Workspace
from desra_core.workspace.human_masks import HUMAN_MASKS, human_mask_rows, that_count
from desra_core.workspace.products import ARRAYS

Flags = npt.NDArray[np.bool_]


class Held(NamedTuple):
    """The files of a workspace for some manifest rows, by row.

    ``pictures`` counts those of the dataset, up to ``len(DATASET)``; ``arrays`` are flags by the name of the array;
    ``marked`` are images in which a person has marked an artifact.
    """

    masks: Flags
    pictures: npt.NDArray[np.int8]
    arrays: dict[str, Flags]
    marked: Flags

    def filter(self, flags: Flags) -> Held:
        """Keep some rows."""
        arrays = {name: held[flags] for name, held in self.arrays.items()}
        return Held(self.masks[flags], self.pictures[flags], arrays, self.marked[flags])


class OnDisk:
    """Which masks, stored arrays, dataset pictures (kind, name) and masks by people a workspace holds."""

    def __init__(
        self,
        masks: Iterable[str],
        arrays: Iterable[tuple[str, str]],
        pictures: Iterable[tuple[str, str]] = (),
        human_masks: pa.Table | None = None,
    ) -> None:
        self._masks = pa.array(masks, pa.string())
        self._arrays = pa.array((f"{image_id}/{name}" for image_id, name in arrays), pa.string())
        by_kind: dict[str, list[str]] = {kind: [] for kind in DATASET}
        for kind, name in pictures:
            by_kind[kind].append(name)
        self._pictures = [pa.array(names, pa.string()) for names in by_kind.values()]
        self._human_masks = HUMAN_MASKS.empty_table() if human_masks is None else human_masks

    @classmethod
    def of(cls, workspace: Workspace) -> OnDisk:
        """List a workspace."""
        groups = (entry for folder in _folders(workspace.maps) for entry in _folders(folder))
        return cls(
            _pngs(workspace.masks),
            ((group.name.removesuffix(".zarr"), array.name) for group in groups for array in _folders(group)),
            ((kind, name) for kind in DATASET for name in _pngs(workspace.dataset(kind, "").parent)),
            human_mask_rows(workspace),
        )

    @classmethod
    def of_rows(cls, workspace: Workspace, rows: pa.Table) -> OnDisk:
        """Look for what belongs to some manifest rows."""
        names, ids = rows["name"].to_pylist(), rows["id"].to_pylist()
        masks = (name for name in names if _holds_data(workspace.mask(name)))
        arrays = ((key, array.name) for key in ids for array in _folders(workspace.group(key)))
        kinds = DATASET if workspace.dataset_manifest.parent.is_dir() else ()
        pictures = ((kind, name) for kind in kinds for name in names if _holds_data(workspace.dataset(kind, name)))
        return cls(masks, arrays, pictures, human_mask_rows(workspace))

    def held(self, rows: pa.Table, gan_sr_key: str | None) -> Held:
        """Look up manifest rows; ``gan_sr_key`` is the model in whose results people marked artifacts, if any."""
        names, ids = rows["name"].combine_chunks(), rows["id"].combine_chunks()
        return Held(
            flags_of(pc.is_in(names, self._masks)),
            np.sum([flags_of(pc.is_in(names, pictures)) for pictures in self._pictures], axis=0, dtype=np.int8),
            {name: self.has_array(ids, name) for name in ARRAYS},
            self.marked_by_people(ids, gan_sr_key) if gan_sr_key else np.zeros(len(ids), bool),
        )

    def marked_by_people(self, ids: pa.Array, gan_sr_key: str | None) -> Flags:
        """Say for each image whether a person marked an artifact in its results of this model."""
        masks = that_count(self._human_masks, gan_sr_key)
        marked = masks.filter(pc.greater(masks["pixels"], 0))
        return flags_of(pc.is_in(ids, marked["id"].combine_chunks()))

    def has_array(self, ids: pa.Array, name: str) -> Flags:
        """Say for each image whether it has a stored array of that name."""
        return flags_of(pc.is_in(pc.binary_join_element_wise(ids, name, "/"), self._arrays))


def is_text(name: str) -> bool:
    """Say whether the name of a file is text; no image has another one."""
    return name.isascii() or not any("\ud800" <= character <= "\udfff" for character in name)


def flags_of(values: pa.Array) -> Flags:
    """Arrow booleans as NumPy ones; null is false."""
    return np.asarray(pc.fill_null(values, False).to_numpy(zero_copy_only=False), dtype=bool)


def _folders(folder: Path | os.DirEntry[str]) -> list[os.DirEntry[str]]:
    """The folders in a folder, if there is one."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if entry.is_dir() and is_text(entry.name)]
    except OSError:
        return []


def _holds_data(path: Path) -> bool:
    """Whether it is a file that no power cut has emptied."""
    try:
        return path.stat().st_size > 0
    except OSError:
        return False


def _pngs(folder: Path) -> Iterator[str]:
    """Names of the pictures below a folder."""
    return (path.removesuffix(".png") for path in _paths(folder, ""))


def _paths(folder: Path, prefix: str) -> Iterator[str]:
    """Relative paths of the non-empty files below a folder."""
    if not folder.is_dir():
        return
    for entry in os.scandir(folder):
        if not is_text(entry.name):
            continue
        if entry.is_dir():
            yield from _paths(Path(entry.path), f"{prefix}{entry.name}/")
        elif entry.stat().st_size:
            yield prefix + entry.name
