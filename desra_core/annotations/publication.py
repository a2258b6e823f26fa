"""Corrected masks become the workspace's masks by people, and back; the pseudo-GT of its dataset follows at once.

Each import leaves a table of what it took the place of, so that it can be taken back: the latest one first.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from desra_core.annotations.corrections import Correction
from desra_core.detection.pseudo_gt import assemble_pseudo_gt
from desra_core.errors import ImageError, UsageError
from desra_core.files.atomic import storage_errors
from desra_core.files.hashing import read_bytes
from desra_core.images.codec import decode, decode_mask
from desra_core.planning.keys import load_settings
from desra_core.planning.tables import publish_tables
from desra_core.workspace import DATASET, Workspace, read_table
from desra_core.workspace.dataset import publish_pseudo_gt
from desra_core.workspace.human_masks import HUMAN_MASKS
from desra_core.workspace.manifest import read_manifest

# Each holds both results of an image.
_THREADS = 4
# What counted at each name before the import; nulls where no person's mask did. ``image`` tells whose name it is.
_REPLACED = HUMAN_MASKS.append(pa.field("png", pa.binary())).append(pa.field("image", pa.string()))
# Comes after all numbers.
_UNFINISHED = "unfinished.parquet"


class Published(NamedTuple):
    """How many images got a mask, of how many it is not the detector's, and in how many nothing is marked.

    ``renewed`` are those whose pseudo-GT was made again; ``waiting`` those with artifacts whose pictures the next run
    has to make.
    """

    images: int
    changed: int
    clean: int
    renewed: int
    waiting: int


class Undone(NamedTuple):
    """At how many names of images something came of taking an import back.

    ``names``: where masks were taken back; ``restored``: where an older person's mask counts again; ``renewed``: where
    the dataset's pictures were made again or went.
    """

    names: int
    restored: int
    renewed: int


def publish_corrections(workspace: Workspace, corrections: Sequence[Correction]) -> Published:
    """Publish masks by people at all names of their images. The workspace must be locked.

    Raises
    ------
    TransientError
        The disk is full or failed; the same import again goes on.
    """
    _, target = load_settings(workspace)
    names = _all_names(workspace, corrections)
    _remember(workspace, names)
    stale = [(one, _outdated(workspace, one, names[one.id])) for one in corrections if target.super_resolves]
    # A dataset without its mask is made again, should this process end before it has done so.
    for _, outdated in stale:
        for name in outdated:
            workspace.dataset("mask", name).unlink()
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(lambda one: _publish_mask(workspace, one, names[one.id]), corrections))
        workspace.publish_table(workspace.human_manifest, _rows(workspace, corrections, names, target.gan_sr_key))
        renewed = list(
            pool.map(lambda pair: _renew(workspace, pair[0].png, pair[1]), [pair for pair in stale if pair[1]])
        )
    if target.super_resolves:
        publish_tables(workspace, target)
    _finish(workspace)
    marked = [one for one in corrections if one.pixels]
    return Published(
        images=len(corrections),
        changed=sum(one.changed for one in corrections),
        clean=len(corrections) - len(marked),
        renewed=sum(renewed),
        waiting=sum(target.super_resolves and not _has_pictures(workspace, one.name) for one in marked),
    )


def undo_import(workspace: Workspace) -> Undone:
    """Take back the latest import that is left: masks by people and dataset are as before. It must be locked.

    Raises
    ------
    UsageError
        There is none.
    TransientError
        The disk is full or failed; the same again goes on.
    """
    _, target = load_settings(workspace)
    latest = max(_imports(workspace), default=None)
    if latest is None:
        raise UsageError(workspace.root, "holds no import that could be taken back", "bring masks with desra import")
    rows = _by_names_of_now(workspace, read_table(latest, _REPLACED).to_pylist())
    pngs = {name: row.pop("png") for name, row in rows.items()}
    counting = {name: png for name, png in pngs.items() if png and rows[name]["gan_sr_key"] == target.gan_sr_key}
    wanted = {name: counting.get(name) or _detected(workspace, name) for name in pngs if target.super_resolves}
    stale = {name: png for name, png in wanted.items() if png and _is_outdated(workspace, name, png)}
    for name in stale:
        workspace.dataset("mask", name).unlink()
    for name, png in pngs.items():
        if png:
            workspace.publish(workspace.human_mask(name), png)
        else:
            workspace.human_mask(name).unlink(missing_ok=True)
    kept = {name: row for name, row in _known(workspace).items() if name not in pngs}
    workspace.publish_table(workspace.human_manifest, _table(kept | {name: rows[name] for name in pngs if pngs[name]}))
    for name, png in stale.items():
        if name in counting or target.keep == "all" or decode_mask(png, workspace.mask(name)).any():
            _renew(workspace, png, [name])
        else:
            workspace.withdraw_dataset(name)
    if target.super_resolves:
        publish_tables(workspace, target)
    latest.unlink()
    return Undone(len(pngs), len(counting), len(stale))


def _imports(workspace: Workspace) -> list[Path]:
    """What the imports that can be taken back took the place of, a table each; one that was killed comes last."""
    return sorted(workspace.imports.glob("*.parquet"))


def _remember(workspace: Workspace, names: dict[str, list[str]]) -> None:
    """Write down what an import takes the place of at the names of some images.

    What an import that was killed has written down stays: some of its masks may be in place.
    """
    known, path = _known(workspace), workspace.imports / _UNFINISHED
    rows = {row["name"]: row for row in read_table(path, _REPLACED).to_pylist()}
    for image_id, of_image in names.items():
        for name in of_image:
            mask, row = workspace.human_mask(name), {"name": name, "image": image_id}
            if name in known and mask.exists():
                row |= known[name] | {"png": read_bytes(mask)}
            rows.setdefault(name, row)
    workspace.publish_table(path, pa.Table.from_pylist([rows[name] for name in sorted(rows)], _REPLACED))


def _finish(workspace: Workspace) -> None:
    """Give what `_remember` wrote the next number."""
    *earlier, unfinished = _imports(workspace)
    number = int(earlier[-1].stem) + 1 if earlier else 1
    with storage_errors(unfinished):
        unfinished.rename(workspace.imports / f"{number:06d}.parquet")


def _by_names_of_now(workspace: Workspace, replaced: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Rows of the schema `_REPLACED` by the names that their images have now: a file that joins may change a name."""
    known, then = _known(workspace), {row["name"] for row in replaced}
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


def _known(workspace: Workspace) -> dict[str, dict[str, Any]]:
    """The rows of the masks by people, by name."""
    return {row["name"]: row for row in read_table(workspace.human_manifest, HUMAN_MASKS).to_pylist()}


def _detected(workspace: Workspace, name: str) -> bytes | None:
    """The detector's mask of an image, as its file is; None where there is none."""
    path = workspace.mask(name)
    return read_bytes(path) if path.exists() else None


def _all_names(workspace: Workspace, corrections: Sequence[Correction]) -> dict[str, list[str]]:
    """All names of the images, vanished ones too, by id."""
    manifest = read_manifest(workspace)
    assert manifest is not None
    ids = pa.array({correction.id for correction in corrections}, pa.string())
    rows = manifest.filter(pc.is_in(manifest["id"], ids))
    names: dict[str, list[str]] = {}
    for image_id, name in zip(rows["id"].to_pylist(), rows["name"].to_pylist(), strict=True):
        names.setdefault(image_id, []).append(name)
    return names


def _has_pictures(workspace: Workspace, name: str) -> bool:
    return all(workspace.dataset(kind, name).exists() for kind in DATASET)


def _outdated(workspace: Workspace, correction: Correction, names: Sequence[str]) -> list[str]:
    """The names at which the dataset has the image with another mask."""
    return [name for name in names if _is_outdated(workspace, name, correction.png)]


def _is_outdated(workspace: Workspace, name: str, png: bytes) -> bool:
    return _has_pictures(workspace, name) and workspace.dataset("mask", name).read_bytes() != png


def _publish_mask(workspace: Workspace, correction: Correction, names: Sequence[str]) -> None:
    for name in names:
        workspace.publish(workspace.human_mask(name), correction.png)


def _rows(
    workspace: Workspace, corrections: Sequence[Correction], names: dict[str, list[str]], gan_sr_key: str | None
) -> pa.Table:
    """The table of masks by people with these in it, sorted by name."""
    rows = _known(workspace)
    for correction in corrections:
        of_image: dict[str, Any] = {"id": correction.id, "gan_sr_key": gan_sr_key, "pixels": correction.pixels,
                                    "regions": correction.regions}  # fmt: skip
        rows |= {name: of_image | {"name": name} for name in names[correction.id]}
    return _table(rows)


def _table(rows: dict[str, dict[str, Any]]) -> pa.Table:
    """Rows by name as a table, sorted by name."""
    return pa.Table.from_pylist([rows[name] for name in sorted(rows)], HUMAN_MASKS)


def _renew(workspace: Workspace, png: bytes, names: Sequence[str]) -> bool:
    """Make the pseudo-GT of an image again; where its pictures are damaged, the next run makes them all."""

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
