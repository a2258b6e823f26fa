"""Corrected masks become the workspace's masks by people, and the pseudo-GT of its dataset follows at once."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from desra_core.annotations.corrections import Correction
from desra_core.corpus import read_manifest
from desra_core.errors import ImageError
from desra_core.human_masks import HUMAN_MASKS
from desra_core.imageio import decode, read_bytes
from desra_core.pseudo_gt import assemble_pseudo_gt, publish_pseudo_gt
from desra_core.tables import publish_tables
from desra_core.target import load_settings
from desra_core.workspace import DATASET, Workspace, read_table

# Each holds both results of an image.
_THREADS = 4


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


def publish_corrections(workspace: Workspace, corrections: Sequence[Correction]) -> Published:
    """Publish masks by people at all names of their images. The workspace must be locked.

    Raises
    ------
    TransientError
        The disk is full or failed; the same import again goes on.
    """
    _, target = load_settings(workspace)
    names = _all_names(workspace, corrections)
    stale = [(one, _outdated(workspace, one, names[one.id])) for one in corrections if target.super_resolves]
    # A dataset without its mask is made again, should this process end before it has done so.
    for _, outdated in stale:
        for name in outdated:
            workspace.dataset("mask", name).unlink()
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(lambda one: _publish_mask(workspace, one, names[one.id]), corrections))
        workspace.publish_table(workspace.human_manifest, _rows(workspace, corrections, names, target.gan_sr_key))
        renewed = list(pool.map(lambda pair: _renew(workspace, *pair), [pair for pair in stale if pair[1]]))
    if target.super_resolves:
        publish_tables(workspace, target)
    marked = [one for one in corrections if one.pixels]
    return Published(
        images=len(corrections),
        changed=sum(one.changed for one in corrections),
        clean=len(corrections) - len(marked),
        renewed=sum(renewed),
        waiting=sum(target.super_resolves and not _has_pictures(workspace, one.name) for one in marked),
    )


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
    pictured = (name for name in names if _has_pictures(workspace, name))
    return [name for name in pictured if workspace.dataset("mask", name).read_bytes() != correction.png]


def _publish_mask(workspace: Workspace, correction: Correction, names: Sequence[str]) -> None:
    for name in names:
        workspace.publish(workspace.human_mask(name), correction.png)


def _rows(
    workspace: Workspace, corrections: Sequence[Correction], names: dict[str, list[str]], gan_sr_key: str | None
) -> pa.Table:
    """The table of masks by people with these in it, sorted by name."""
    rows = {row["name"]: row for row in read_table(workspace.human_manifest, HUMAN_MASKS).to_pylist()}
    for correction in corrections:
        of_image: dict[str, Any] = {"id": correction.id, "gan_sr_key": gan_sr_key, "pixels": correction.pixels,
                                    "regions": correction.regions}  # fmt: skip
        rows |= {name: of_image | {"name": name} for name in names[correction.id]}
    return pa.Table.from_pylist([rows[name] for name in sorted(rows)], HUMAN_MASKS)


def _renew(workspace: Workspace, correction: Correction, names: Sequence[str]) -> bool:
    """Make the pseudo-GT of an image again; where its pictures are damaged, the next run makes them all."""

    def picture(kind: str) -> Path:
        return workspace.dataset(kind, names[0])

    mask = decode(correction.png, workspace.human_mask(names[0])).pixels[:, :, 0] > 0
    try:
        mse_sr, gan_sr = (decode(read_bytes(picture(kind)), picture(kind)) for kind in ("mse_sr", "gan_sr"))
    except ImageError:
        return False
    pseudo_gt = assemble_pseudo_gt(mse_sr.pixels, gan_sr.pixels, mask)
    publish_pseudo_gt(workspace, names, mask, pseudo_gt, gan_sr.alpha)
    return True
