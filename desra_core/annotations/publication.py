"""Publish corrected masks as the workspace's human masks, and undo an import; the pseudo-GT is updated at once.

Each import leaves a table of the masks that it replaced, so that the latest one can be undone.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from desra_core.annotations.corrections import Correction
from desra_core.detection.mask import assemble_pseudo_gt
from desra_core.errors import ImageError, UsageError
from desra_core.files.content import read_bytes, storage_errors
from desra_core.images.codec import decode, decode_mask
from desra_core.planning.keys import load_settings
from desra_core.planning.plan import publish_tables
from desra_core.workspace import DATASET, Workspace, read_table
from desra_core.workspace.human_masks import HUMAN_MASKS
from desra_core.workspace.inventory import publish_pseudo_gt
from desra_core.workspace.manifest import read_manifest
from desra_core.workspace.products import Target

# Each holds both results of an image.
_THREADS = 4
# The human mask at each name before the import, nulls where there was none; ``image`` is the id of the name's image.
_REPLACED = HUMAN_MASKS.append(pa.field("png", pa.binary())).append(pa.field("image", pa.string()))
# In a sorted list, this name comes after all numbered tables.
_UNFINISHED = "unfinished.parquet"


class ImportSummary(NamedTuple):
    """Counts of images of an import."""

    images: int  # that got a mask
    changed: int  # whose mask is not the detector's
    clean: int  # whose mask is empty
    renewed: int  # whose pseudo-GT was made again
    waiting: int  # whose mask is not empty, but whose pictures the next run has to make


class UndoSummary(NamedTuple):
    """Counts of the image names of an import that was undone."""

    names: int  # where masks were taken back
    restored: int  # where an older human mask counts again
    renewed: int  # where the dataset's pictures were made again or removed


def publish_corrections(workspace: Workspace, corrections: Sequence[Correction]) -> ImportSummary:
    """Publish human masks at all names of their images. The workspace must be locked.

    Raises:
        TransientError: The disk is full or failed; the same import again goes on.
    """
    _, target = load_settings(workspace)
    manifest = read_manifest(workspace)
    assert manifest is not None
    names: dict[str, list[str]] = {one.id: [] for one in corrections}  # vanished names too
    for name, image_id in zip(manifest["name"].to_pylist(), manifest["id"].to_pylist(), strict=True):
        if image_id in names:
            names[image_id].append(name)
    _remember(workspace, names)
    masks: dict[str, bytes | None] = {}
    rows: dict[str, dict[str, Any]] = {}
    for one in corrections:
        row = {"id": one.id, "gan_sr_key": target.gan_sr_key, "pixels": one.pixels, "regions": one.regions}
        masks |= dict.fromkeys(names[one.id], one.png)
        rows |= {name: row | {"name": name} for name in names[one.id]}
    renewed = _replace_masks(workspace, target, masks, rows)
    *earlier, unfinished = _imports(workspace)
    number = int(earlier[-1].stem) + 1 if earlier else 1
    with storage_errors(unfinished):
        unfinished.rename(unfinished.with_name(f"{number:06d}.parquet"))
    marked = [one for one in corrections if one.pixels]
    return ImportSummary(
        images=len(corrections),
        changed=sum(one.changed for one in corrections),
        clean=len(corrections) - len(marked),
        renewed=len({rows[name]["id"] for name, whole in renewed.items() if whole}),
        waiting=sum(target.super_resolves and not _has_pictures(workspace, one.name) for one in marked),
    )


def undo_import(workspace: Workspace) -> UndoSummary:
    """Undo the latest import that is left: human masks and dataset are as before. The workspace must be locked.

    Raises:
        UsageError: There is none.
        TransientError: The disk is full or failed; the same again goes on.
    """
    _, target = load_settings(workspace)
    latest = max(_imports(workspace), default=None)
    if latest is None:
        raise UsageError(workspace.root, "holds no import that could be taken back", "bring masks with desra import")
    rows = _by_present_names(workspace, read_table(latest, _REPLACED).to_pylist())
    masks: dict[str, bytes | None] = {name: row.pop("png") for name, row in rows.items()}
    renewed = _replace_masks(workspace, target, masks, {name: row for name, row in rows.items() if masks[name]})
    latest.unlink()
    counting = sum(bool(png) and rows[name]["gan_sr_key"] == target.gan_sr_key for name, png in masks.items())
    return UndoSummary(len(masks), counting, len(renewed))


def _replace_masks(
    workspace: Workspace, target: Target, masks: Mapping[str, bytes | None], rows: Mapping[str, dict[str, Any]]
) -> dict[str, bool]:
    """Put human masks in place, or remove them (None), and update the pictures of the dataset.

    Returns:
        By each name whose dataset pictures were outdated: whether the pictures could be made again.
    """
    counting = {name for name, row in rows.items() if row["gan_sr_key"] == target.gan_sr_key}
    stale: dict[str, bytes] = {}
    for name, png in masks.items() if target.super_resolves else ():
        detected = workspace.mask(name)
        wanted = png if name in counting else None
        if name not in counting and detected.exists():
            wanted = read_bytes(detected)
        if wanted and _has_pictures(workspace, name) and workspace.dataset("mask", name).read_bytes() != wanted:
            stale[name] = wanted
    for name in stale:
        # If this process is killed, the next run makes pictures without a mask again.
        workspace.dataset("mask", name).unlink(missing_ok=True)

    def put(name: str) -> None:
        if png := masks[name]:
            workspace.publish(workspace.human_mask(name), png)
        else:
            workspace.human_mask(name).unlink(missing_ok=True)

    def renew(name: str) -> bool:
        mask = decode_mask(stale[name], workspace.mask(name))
        if name not in counting and target.keep != "all" and not mask.any():
            workspace.withdraw_dataset(name)
            return True
        files = [workspace.dataset(kind, name) for kind in ("mse_sr", "gan_sr")]
        try:
            mse_sr, gan_sr = (decode(read_bytes(file), file) for file in files)
        except ImageError:  # the next run makes these pictures again
            return False
        pseudo_gt = assemble_pseudo_gt(mse_sr.pixels, gan_sr.pixels, mask)
        publish_pseudo_gt(workspace, [name], mask, pseudo_gt, gan_sr.alpha)
        return True

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(put, masks))
        kept = {name: row for name, row in _human_rows(workspace).items() if name not in masks} | dict(rows)
        table = pa.Table.from_pylist([kept[name] for name in sorted(kept)], HUMAN_MASKS)
        workspace.publish_table(workspace.human_manifest, table)
        renewed = dict(zip(stale, pool.map(renew, stale), strict=True))
    if target.super_resolves:
        publish_tables(workspace, target)
    return renewed


def _imports(workspace: Workspace) -> list[Path]:
    """List the tables of the imports that can be undone, in their order; an import that was killed comes last."""
    return sorted(workspace.imports.glob("*.parquet"))


def _remember(workspace: Workspace, names: dict[str, list[str]]) -> None:
    """Write down the masks that an import replaces.

    The rows of an import that was killed stay: some of its masks may be in place.
    """
    known, path = _human_rows(workspace), workspace.imports / _UNFINISHED
    rows = {row["name"]: row for row in read_table(path, _REPLACED).to_pylist()}
    for image_id, of_image in names.items():
        for name in of_image:
            mask, row = workspace.human_mask(name), {"name": name, "image": image_id}
            if name in known and mask.exists():
                row |= known[name] | {"png": read_bytes(mask)}
            rows.setdefault(name, row)
    workspace.publish_table(path, pa.Table.from_pylist([rows[name] for name in sorted(rows)], _REPLACED))


def _by_present_names(workspace: Workspace, replaced: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Map rows of the schema `_REPLACED` to the present names of their images: a new file may change a name."""
    known, then = _human_rows(workspace), {row["name"] for row in replaced}
    new: dict[str, list[str]] = {}
    for name in known.keys() - then:
        new.setdefault(known[name]["id"], []).append(name)
    rows: dict[str, dict[str, Any]] = {}
    for row in replaced:
        name, image_id = row["name"], row["image"]
        if new.get(image_id) and (name not in known or known[name]["id"] != image_id):
            name = new[image_id].pop()
        rows[name] = row | {"name": name}
    return rows


def _human_rows(workspace: Workspace) -> dict[str, dict[str, Any]]:
    """Read the rows of all human masks by name, also of masks that do not count."""
    return {row["name"]: row for row in read_table(workspace.human_manifest, HUMAN_MASKS).to_pylist()}


def _has_pictures(workspace: Workspace, name: str) -> bool:
    return all(workspace.dataset(kind, name).exists() for kind in DATASET)
