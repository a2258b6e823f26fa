"""Human masks: which images have one, and on which results they were drawn.

A human mask counts for the image content and the GAN model on whose result it was drawn: another model is wrong in
other places. Masks that do not count stay, and count again when the photo and the model are the same again.

A workspace remembers the detector masks that it exported: such a mask is no human mask if it comes back unchanged.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from desra_core.errors import ImageError, LostError, UsageError
from desra_core.files import digest, fingerprint, paths_in, read_checked, replace_file
from desra_core.images.codec import Mask, decode_mask
from desra_core.workspace import Workspace, as_parquet, read_table

# ``id`` is the id of the image. ``gan_sr_key`` is the key of the model; null for results in files, which the id covers.
# ``checksum`` is that of the mask's file; null in rows of an older desra.
HUMAN_MASKS = pa.schema(
    [("name", pa.string()), ("id", pa.string()), ("gan_sr_key", pa.string()), ("pixels", pa.int64()),
     ("regions", pa.int32()), ("checksum", pa.string())]
)  # fmt: skip
# Detector masks that were exported: the id of the image, and the `mask_key` of the mask.
EXPORTED = pa.schema([("id", pa.string()), ("mask", pa.string())])


class HumanMask(NamedTuple):
    """A human mask: a name of its image, its file, and how many pixels and 8-connected regions it marks.

    ``checksum`` is that of the file; None where it was not taken.
    """

    name: str
    path: Path
    pixels: int
    regions: int
    checksum: str | None = None

    def content(self) -> bytes:
        """Read the file of the mask.

        Raises:
            ImageError: It is not as it was imported, and no run can make it again.
            TransientError: It cannot be read.
        """
        try:
            return read_checked(self.path, self.checksum)
        except LostError as error:
            raise ImageError(
                error.subject, error.reason, "import the mask again, or bring it back from a copy"
            ) from None

    def read(self) -> Mask:
        """Read the mask, ``(H, W)`` bool (raises as `content`)."""
        return decode_mask(self.content(), self.path)


def human_mask_rows(workspace: Workspace, gan_sr_key: str | None) -> pa.Table:
    """List the human masks that count under a key of GAN results, None for files (schema `HUMAN_MASKS`).

    Raises:
        UsageError: Their table is damaged, or is gone although there are masks.
    """
    remedy = "bring it back from a copy, or delete it and import the masks again"
    if not workspace.human_manifest.exists() and next(workspace.human.rglob("*.png"), None):
        reason = f"is not there, so no mask in {workspace.human} counts"
        raise UsageError(workspace.human_manifest, reason, "bring it back from a copy, or import the masks again")
    rows = read_table(workspace.human_manifest, HUMAN_MASKS, remedy=remedy)
    there = [workspace.human_mask(name).exists() for name in rows["name"].to_pylist()]
    rows = rows.filter(pa.array(there, pa.bool_()))
    keys = rows["gan_sr_key"]
    return rows.filter(pc.is_null(keys) if gan_sr_key is None else pc.fill_null(pc.equal(keys, gan_sr_key), False))


def read_human_masks(workspace: Workspace, gan_sr_key: str | None) -> dict[str, HumanMask]:
    """Return the human masks that count for results of a model, by image id."""
    return {row["id"]: _mask_of(row, workspace) for row in human_mask_rows(workspace, gan_sr_key).to_pylist()}


def all_human_masks(workspace: Workspace) -> list[HumanMask]:
    """List all human masks, also those that do not count (raises `UsageError`: their table is damaged)."""
    return [_mask_of(row, workspace) for row in read_table(workspace.human_manifest, HUMAN_MASKS).to_pylist()]


def _mask_of(row: dict[str, Any], workspace: Workspace) -> HumanMask:
    path = workspace.human_mask(row["name"])
    return HumanMask(row["name"], path, row["pixels"], row["regions"], row["checksum"])


def find_human_mask(
    workspace: Workspace, image_id: str, names: Iterable[str], gan_sr_key: str | None
) -> HumanMask | None:
    """Return the human mask that counts for an image, if there is one."""
    if not any(workspace.human_mask(name).exists() for name in names):  # for most images, no table is read
        return None
    return read_human_masks(workspace, gan_sr_key).get(image_id)


def rename_human_masks(workspace: Workspace, renamed: Mapping[str, str]) -> None:
    """Rename human masks by a map from old to new names of images, where no old name is also a new name.

    Where the mask of another image has the new name already, both stay as they are.
    """
    table = read_table(workspace.human_manifest, HUMAN_MASKS)
    names = dict.fromkeys(table["name"].to_pylist())
    moved = {old: renamed[old] for old in names if old in renamed and renamed[old] not in names}
    moved = {old: new for old, new in moved.items() if workspace.human_mask(old).exists()}
    for old, new in moved.items():
        workspace.publish(workspace.human_mask(new), workspace.human_mask(old).read_bytes(), durable=True)
    if moved:
        table = table.set_column(0, "name", pa.array((moved.get(name, name) for name in names), pa.string()))
        workspace.publish_table(workspace.human_manifest, table.sort_by("name"))
    for old in moved:
        workspace.human_mask(old).unlink()


def mask_key(mask: Mask) -> str:
    """Return a key for the pixels of an ``(H, W)`` mask."""
    return digest(repr(mask.shape).encode() + np.packbits(mask).tobytes())


def exported_masks(workspace: Workspace, ids: Iterable[str]) -> frozenset[tuple[str, str]]:
    """Read the image id and the `mask_key` of each detector mask of some images that was ever exported."""
    wanted = pa.array(set(ids), pa.string())
    found: set[tuple[str, str]] = set()
    for path in paths_in(workspace.exported, "*.parquet"):
        table = read_table(path, EXPORTED, remedy="delete it: the folder of its export still has its masks")
        table = table.filter(pc.is_in(table["id"], wanted))
        found.update(zip(table["id"].to_pylist(), table["mask"].to_pylist(), strict=True))
    return frozenset(found)


def remember_exported(workspace: Workspace, masks: Iterable[tuple[str, str]]) -> None:
    """Add masks to `exported_masks` (raises `desra_core.errors.TransientError`); the workspace need not be locked."""
    masks = set(masks)
    new = sorted(masks - exported_masks(workspace, (image_id for image_id, _ in masks)))
    if new:
        table = pa.Table.from_arrays(list(map(list, zip(*new, strict=True))), schema=EXPORTED)
        # Each export has its own file, since another export may be writing, too.
        path = workspace.exported / f"{fingerprint(new)}.parquet"
        replace_file(path, as_parquet(table), durable=True)
