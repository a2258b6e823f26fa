"""Publish corrected masks as the workspace's human masks, and undo it; the pseudo-GT of its dataset follows at once.

Each import leaves a table of the masks that it replaced, so that the latest one can be undone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from desra_core.annotations.corrections import Correction
from desra_core.detection.mask import assemble_pseudo_gt
from desra_core.errors import ImageError, UsageError
from desra_core.files.atomic import storage_errors
from desra_core.files.hashing import read_bytes
from desra_core.images.codec import decode, decode_mask
from desra_core.planning.keys import load_settings
from desra_core.planning.tables import publish_tables
from desra_core.workspace import DATASET, Workspace, read_table
from desra_core.workspace.human_masks import HUMAN_MASKS
from desra_core.workspace.manifest import read_manifest
from desra_core.workspace.pictures import publish_pseudo_gt

# Each holds both results of an image.
_THREADS = 4
# The human mask at each name before the import, nulls where there was none; ``image`` is the id of the name's image.
_REPLACED = HUMAN_MASKS.append(pa.field("png", pa.binary())).append(pa.field("image", pa.string()))
# Comes after all numbers.
_UNFINISHED = "unfinished.parquet"


class ImportSummary(NamedTuple):
    """Counts of images of an import.

    Attributes:
        images, changed, clean: Those that got a mask, whose mask is not the detector's, and whose mask is empty.
        renewed: Those whose pseudo-GT was made again.
        waiting: Those with artifacts whose pictures the next run has to make.
    """

    images: int
    changed: int
    clean: int
    renewed: int
    waiting: int


class UndoSummary(NamedTuple):
    """Counts of names of images of an import that was undone.

    Attributes:
        names, restored: Where masks were taken back, and where an older human mask counts again.
        renewed: Where the dataset's pictures were made again or removed.
    """

    names: int
    restored: int
    renewed: int


def publish_corrections(workspace: Workspace, corrections: Sequence[Correction]) -> ImportSummary:
    """Publish human masks at all names of their images. The workspace must be locked.

    Raises:
        TransientError: The disk is full or failed; the same import again goes on.
    """
    _, target = load_settings(workspace)
    names = _all_names(workspace, {one.id for one in corrections})
    _remember(workspace, names)
    stale: list[tuple[bytes, list[str]]] = []
    for one in corrections if target.super_resolves else []:
        outdated = [name for name in names[one.id] if _is_outdated(workspace, name, one.png)]
        if outdated:
            stale.append((one.png, outdated))
    _drop_masks(workspace, (name for _, outdated in stale for name in outdated))

    def publish(one: Correction) -> None:
        for name in names[one.id]:
            workspace.publish(workspace.human_mask(name), one.png)

    rows = _human_rows(workspace)
    for one in corrections:
        row = {"id": one.id, "gan_sr_key": target.gan_sr_key, "pixels": one.pixels, "regions": one.regions}
        rows |= {name: row | {"name": name} for name in names[one.id]}
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(publish, corrections))
        _publish_human_rows(workspace, rows)
        renewed = list(pool.map(lambda pair: _renew(workspace, *pair), stale))
    if target.super_resolves:
        publish_tables(workspace, target)
    *earlier, unfinished = _imports(workspace)
    number = int(earlier[-1].stem) + 1 if earlier else 1
    with storage_errors(unfinished):
        unfinished.rename(workspace.imports / f"{number:06d}.parquet")
    marked = [one for one in corrections if one.pixels]
    return ImportSummary(
        images=len(corrections),
        changed=sum(one.changed for one in corrections),
        clean=len(corrections) - len(marked),
        renewed=sum(renewed),
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
    pngs: dict[str, bytes | None] = {name: row.pop("png") for name, row in rows.items()}
    counting = {name: png for name, png in pngs.items() if png and rows[name]["gan_sr_key"] == target.gan_sr_key}
    stale: dict[str, bytes] = {}
    for name in list(pngs) if target.super_resolves else []:
        detected = workspace.mask(name)
        wanted = counting.get(name) or (read_bytes(detected) if detected.exists() else None)
        if wanted and _is_outdated(workspace, name, wanted):
            stale[name] = wanted
    _drop_masks(workspace, stale)
    for name, png in pngs.items():
        if png:
            workspace.publish(workspace.human_mask(name), png)
        else:
            workspace.human_mask(name).unlink(missing_ok=True)
    kept = {name: row for name, row in _human_rows(workspace).items() if name not in pngs}
    _publish_human_rows(workspace, kept | {name: rows[name] for name in pngs if pngs[name]})
    for name, png in stale.items():
        if name in counting or target.keep == "all" or decode_mask(png, workspace.mask(name)).any():
            _renew(workspace, png, [name])
        else:
            workspace.withdraw_dataset(name)
    if target.super_resolves:
        publish_tables(workspace, target)
    latest.unlink()
    return UndoSummary(len(pngs), len(counting), len(stale))


def _imports(workspace: Workspace) -> list[Path]:
    """The tables of the imports that can be undone, in their order; one that was killed comes last."""
    return sorted(workspace.imports.glob("*.parquet"))


def _remember(workspace: Workspace, names: dict[str, list[str]]) -> None:
    """Write down the masks that an import replaces.

    Rows that an import which was killed has written stay: some of its masks may be in place.
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
    """Rows of the schema `_REPLACED` by the present names of their images: a file that joins may change a name."""
    known, then = _human_rows(workspace), {row["name"] for row in replaced}
    new: dict[str, list[str]] = {}
    for name in known.keys() - then:
        new.setdefault(known[name]["id"], []).append(name)
    rows = {}
    for row in replaced:
        name, image_id = row["name"], row["image"]
        if new.get(image_id) and (name not in known or known[name]["id"] != image_id):
            name = new[image_id].pop()
        rows[name] = row | {"name": name}
    return rows


def _human_rows(workspace: Workspace) -> dict[str, dict[str, Any]]:
    """The rows of the human masks by name, those included that do not count."""
    return {row["name"]: row for row in read_table(workspace.human_manifest, HUMAN_MASKS).to_pylist()}


def _publish_human_rows(workspace: Workspace, rows: dict[str, dict[str, Any]]) -> None:
    table = pa.Table.from_pylist([rows[name] for name in sorted(rows)], HUMAN_MASKS)
    workspace.publish_table(workspace.human_manifest, table)


def _all_names(workspace: Workspace, ids: set[str]) -> dict[str, list[str]]:
    """All names of images, vanished ones too, by id."""
    manifest = read_manifest(workspace)
    assert manifest is not None
    rows = manifest.filter(pc.is_in(manifest["id"], pa.array(ids, pa.string())))
    names: dict[str, list[str]] = {}
    for image_id, name in zip(rows["id"].to_pylist(), rows["name"].to_pylist(), strict=True):
        names.setdefault(image_id, []).append(name)
    return names


def _has_pictures(workspace: Workspace, name: str) -> bool:
    return all(workspace.dataset(kind, name).exists() for kind in DATASET)


def _is_outdated(workspace: Workspace, name: str, png: bytes) -> bool:
    """Whether the dataset has the image with another mask."""
    return _has_pictures(workspace, name) and workspace.dataset("mask", name).read_bytes() != png


def _drop_masks(workspace: Workspace, names: Iterable[str]) -> None:
    """Delete masks of the dataset: if this process is killed, the next run makes pictures without a mask again."""
    for name in names:
        workspace.dataset("mask", name).unlink(missing_ok=True)


def _renew(workspace: Workspace, png: bytes, names: Sequence[str]) -> bool:
    """Make the pseudo-GT of an image again; False where its pictures are damaged, which the next run makes again."""

    def picture(kind: str) -> Path:
        return workspace.dataset(kind, names[0])

    mask = decode_mask(png, workspace.human_mask(names[0]))
    try:
        mse_sr, gan_sr = (decode(read_bytes(picture(kind)), picture(kind)) for kind in ("mse_sr", "gan_sr"))
    except ImageError:
        return False
    pseudo_gt = assemble_pseudo_gt(mse_sr.pixels, gan_sr.pixels, mask)
    publish_pseudo_gt(workspace, names, mask, pseudo_gt, gan_sr.alpha)
    return True
