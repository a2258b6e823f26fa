"""The files of images in a workspace: which there are, as columns, where pictures lie, and the pseudo-GT."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from desra_core.images.codec import Mask, Pixels, encode_mask, encode_png
from desra_core.workspace import DATASET, Workspace, read_table
from desra_core.workspace.human_masks import HUMAN_MASKS, human_mask_rows, that_count
from desra_core.workspace.manifest import MANIFEST, image_refs
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
        marked = np.zeros(len(ids), bool)
        if gan_sr_key:
            masks = that_count(self._human_masks, gan_sr_key)
            marked = flags_of(pc.is_in(ids, masks.filter(pc.greater(masks["pixels"], 0))["id"].combine_chunks()))
        paths = {name: pc.binary_join_element_wise(ids, name, "/") for name in ARRAYS}
        return Held(
            flags_of(pc.is_in(names, self._masks)),
            np.sum([flags_of(pc.is_in(names, pictures)) for pictures in self._pictures], axis=0, dtype=np.int8),
            {name: flags_of(pc.is_in(paths[name], self._arrays)) for name in ARRAYS},
            marked,
        )


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


def _pngs(folder: Path | str, prefix: str = "") -> Iterator[str]:
    """Names of the pictures below a folder, if there is one, that no power cut has emptied."""
    if not os.path.isdir(folder):
        return
    for entry in os.scandir(folder):
        if not is_text(entry.name):
            continue
        if entry.is_dir():
            yield from _pngs(entry.path, f"{prefix}{entry.name}/")
        elif entry.stat().st_size:
            yield prefix + entry.name.removesuffix(".png")


def picture_files(workspace: Workspace, verb: str, names: Sequence[str]) -> dict[str, dict[str, Path]]:
    """Return the files of some images by name and kind, the mask included; a file may have gone since.

    Args:
        workspace: The workspace.
        verb: ``mine`` where it has a dataset with lr, mse_sr, gan_sr and pseudo_gt; else the files are the sources:
            mse_sr, gan_sr, and lr and labels as far as there are any.
        names: Of images in the manifest.
    """
    files: dict[str, dict[str, Path]] = {}
    if verb == "mine":
        kinds = ("lr", "mse_sr", "gan_sr", "pseudo_gt")
        files = {name: {kind: workspace.dataset(kind, name) for kind in kinds} for name in names}
    else:
        manifest = read_table(workspace.manifest, MANIFEST)
        rows = manifest.filter(pc.is_in(manifest["name"], pa.array(names, pa.string())))
        for row in range(rows.num_rows):
            (image,) = image_refs(rows.slice(row, 1))
            found = {"mse_sr": image.mse_sr, "gan_sr": image.gan_sr, "lr": image.lr, "labels": image.labels}
            files[image.names[0]] = {kind: file.path for kind, file in found.items() if file is not None}
    for name, kinds_of_image in files.items():
        kinds_of_image["mask"] = workspace.mask(name)
    return files


def publish_pseudo_gt(
    workspace: Workspace, names: Iterable[str], mask: Mask, pseudo_gt: Pixels, alpha: Pixels | None
) -> None:
    """Write pseudo-GT and mask of an image to the dataset of a mined workspace, at all its names.

    The mask comes last: where it is there, so is the pseudo-GT that was made with it.

    Args:
        workspace, names: A mined workspace, and the names of the image.
        mask, pseudo_gt: As of `assemble_pseudo_gt`.
        alpha: ``(H, W)`` of the results, or None.

    Raises:
        TransientError: The disk is full or failed.
    """
    for kind, data in (("pseudo_gt", encode_png(pseudo_gt, alpha)), ("mask", encode_mask(mask))):
        for name in names:
            workspace.publish(workspace.dataset(kind, name), data)
