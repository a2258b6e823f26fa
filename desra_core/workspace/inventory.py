"""Look up the files of images in a workspace: the products, as columns, and the pictures; write the pseudo-GT."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from desra_core.images.codec import Mask, Pixels, encode_mask, encode_png
from desra_core.workspace import DATASET, Workspace
from desra_core.workspace.human_masks import human_mask_rows
from desra_core.workspace.manifest import image_refs, read_manifest
from desra_core.workspace.matching import ROLES
from desra_core.workspace.products import ARRAYS, Flags, flags_of


class Held(NamedTuple):
    """The files of a workspace for some manifest rows, by row."""

    masks: Flags  # whether there is a mask
    pictures: npt.NDArray[np.int8]  # the number of pictures in the dataset, up to ``len(DATASET)``
    arrays: dict[str, Flags]  # whether there is an array, by the name of the array
    marked: Flags  # whether a person has marked an artifact

    def filter(self, flags: Flags) -> Held:
        """Keep some rows."""
        arrays = {name: held[flags] for name, held in self.arrays.items()}
        return Held(self.masks[flags], self.pictures[flags], arrays, self.marked[flags])


def held_by(workspace: Workspace, rows: pa.Table, gan_sr_key: str | None, *, each: bool = False) -> Held:
    """Look up which files a workspace holds for some manifest rows.

    Args:
        workspace: The workspace.
        rows: The rows.
        gan_sr_key: The model in whose results people marked artifacts, if any.
        each: Look for the files of each row instead of listing the whole workspace; this is faster for few rows.
    """
    names, ids = rows["name"].combine_chunks(), rows["id"].combine_chunks()
    looked_for = names.to_pylist() if each else []

    def pictures(folder: Path) -> Flags:
        """Flag the rows with a picture in a folder, but for pictures that a power cut has emptied."""
        found = [] if each or not folder.is_dir() else list(_pngs(folder))
        for name in looked_for:
            with contextlib.suppress(OSError):
                if (folder / f"{name}.png").stat().st_size:
                    found.append(name)
        return flags_of(pc.is_in(names, pa.array(found, pa.string())))

    if each:
        groups = (workspace.group(image_id) for image_id in ids.to_pylist())
    else:
        groups = (Path(group.path) for folder in _folders(workspace.maps) for group in _folders(folder))
    arrays = pa.array((f"{group.stem}/{array.name}" for group in groups for array in _folders(group)), pa.string())
    marked = np.zeros(len(ids), bool)
    if gan_sr_key:
        human = human_mask_rows(workspace, gan_sr_key)
        marked = flags_of(pc.is_in(ids, human.filter(pc.greater(human["pixels"], 0))["id"].combine_chunks()))
    return Held(
        pictures(workspace.masks),
        np.sum([pictures(workspace.dataset(kind, "").parent) for kind in DATASET], axis=0, dtype=np.int8),
        {name: flags_of(pc.is_in(pc.binary_join_element_wise(ids, name, "/"), arrays)) for name in ARRAYS},
        marked,
    )


def is_text(name: str) -> bool:
    """Check whether the name of a file is valid text, as the names of images are."""
    return name.isascii() or not any("\ud800" <= character <= "\udfff" for character in name)


def _folders(folder: Path | os.DirEntry[str]) -> list[os.DirEntry[str]]:
    """List the folders in a folder; none where that does not exist."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if entry.is_dir() and is_text(entry.name)]
    except OSError:
        return []


def _pngs(folder: Path | str, prefix: str = "") -> Iterator[str]:
    """Yield the names of the pictures below a folder, but for those that a power cut has emptied."""
    for entry in os.scandir(folder):
        if not is_text(entry.name):
            continue
        if entry.is_dir():
            yield from _pngs(entry.path, f"{prefix}{entry.name}/")
        elif entry.stat().st_size:
            yield prefix + entry.name.removesuffix(".png")


def picture_files(workspace: Workspace, verb: str, names: Sequence[str]) -> dict[str, dict[str, Path]]:
    """Return the files of some images by name and kind, the mask included; a file may have vanished.

    Args:
        workspace: The workspace.
        verb: With ``mine``, the files are in the dataset: lr, mse_sr, gan_sr and pseudo_gt. Otherwise they are the
            sources: mse_sr and gan_sr, and lr and labels where there are any.
        names: Of images in the manifest.
    """
    if verb == "mine":
        kinds = ("lr", "mse_sr", "gan_sr", "pseudo_gt")
        files = {name: {kind: workspace.dataset(kind, name) for kind in kinds} for name in names}
    else:
        manifest = read_manifest(workspace)
        rows = manifest.filter(pc.is_in(manifest["name"], pa.array(names, pa.string())))
        images = [image for row in range(rows.num_rows) for image in image_refs(rows.slice(row, 1))]
        files = {
            image.names[0]: {role: file.path for role in ROLES if (file := getattr(image, role)) is not None}
            for image in images
        }
    return {name: of_image | {"mask": workspace.mask(name)} for name, of_image in files.items()}


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
