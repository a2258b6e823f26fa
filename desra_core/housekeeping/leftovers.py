"""What no run needs of a workspace any more: the manifest, the settings of the latest run and the records decide.

Images that are still to be done are left alone: the run that does them replaces what they have. So are those beyond
``--limit``; those that have vanished, unless they are to go; and what people have drawn, always.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from desra_core.errors import UsageError
from desra_core.housekeeping.holdings import (
    EMPTY,
    LEFTOVERS,
    UNKNOWN,
    Leftover,
    holdings,
    is_key,
    table_of,
)
from desra_core.housekeeping.sizes import entries, size_of, size_of_file
from desra_core.housekeeping.stale_records import record_leftovers, stale_records
from desra_core.housekeeping.superseded import UNFINISHED, stranger, superseded
from desra_core.planning.keys import load_settings
from desra_core.planning.plan import Standing, assess
from desra_core.settings import CorpusSettings
from desra_core.workspace import Workspace
from desra_core.workspace.inventory import OnDisk, flags_of
from desra_core.workspace.manifest import read_manifest
from desra_core.workspace.products import ARRAYS, Target, kept_arrays, kept_whole
from desra_core.workspace.records import SCHEMA, read_records

_VANISHED, _REPLACED = "of images that have vanished", "of images that the manifest does not have"
_FAILED, _EMPTY = "of images that failed for good", "empty folders"


class Leftovers(NamedTuple):
    """What may go, and what the workspace is to say then.

    Attributes
    ----------
    table
        What no run needs, and what is unknown and stays (schema `desra_core.housekeeping.holdings.LEFTOVERS`).
    manifest
        The manifest without what goes.
    target
        What the latest run wanted.
    stale
        The records that go (schema `desra_core.housekeeping.stale_records.STALE`).
    unmapped, unlabelled
        Ids of images whose maps or labels go, while they stay themselves.
    """

    table: pa.Table
    manifest: pa.Table
    target: Target
    stale: pa.Table
    unmapped: pa.Array
    unlabelled: pa.Array


def find_leftovers(workspace: Workspace, *, vanished: bool = False) -> Leftovers:
    """Find what no run needs any more; nothing is changed. No run may be going on.

    Parameters
    ----------
    workspace
        Of any run that got as far as its manifest.
    vanished
        Images go, too, that the latest run did not find and whose files are not there now.

    Raises
    ------
    UsageError
        The folder is no workspace, or a table of it is damaged or missing.
    """
    settings, target = load_settings(workspace)
    manifest = read_manifest(workspace)
    if manifest is None:
        raise UsageError(workspace.root, "has no manifest", f"run desra {settings.verb}")
    staying = _without_vanished(manifest, settings) if vanished else manifest
    held = holdings(workspace)
    reasons = _reasons(held, workspace, settings, target, manifest, staying)
    held = held.append_column("reason", reasons)
    maps = held.filter(pc.and_(pc.equal(held["kind"], "maps"), reasons.is_valid()))
    unmapped, unlabelled = (
        maps.filter(pc.equal(maps["part"], part))["owner"].combine_chunks() for part in ("similarity", "labels")
    )
    stale = stale_records(workspace, staying)
    others = [
        *unfinished(workspace),
        *_counts(workspace, target),
        *superseded(workspace, settings),
        *record_leftovers(workspace, stale, unmapped, unlabelled),
    ]
    leftovers = held.filter(pc.or_(reasons.is_valid(), pc.equal(held["kind"], UNKNOWN))).select(LEFTOVERS.names)
    table = pa.concat_tables([leftovers.cast(LEFTOVERS), table_of(others, LEFTOVERS)]).combine_chunks()
    return Leftovers(table, staying, target, stale, unmapped, unlabelled)


def _without_vanished(manifest: pa.Table, settings: CorpusSettings) -> pa.Table:
    """The manifest without the images that the latest scan did not find, but for files that have come back."""
    sources = settings.sources
    paths = manifest[f"{sources.identity[-1]}_path"].to_pylist()
    present = manifest["present"].to_pylist()
    stays = [there or os.path.lexists(sources.main / path) for there, path in zip(present, paths, strict=True)]
    return manifest.filter(pa.array(stays, pa.bool_()))


def _reasons(
    held: pa.Table,
    workspace: Workspace,
    settings: CorpusSettings,
    target: Target,
    manifest: pa.Table,
    staying: pa.Table,
) -> pa.Array:
    """Why each of the holdings may go; null for what stays."""
    kinds, owners = held["kind"].combine_chunks(), held["owner"].combine_chunks()
    of_maps = pc.equal(kinds, "maps")

    def known(rows: pa.Table) -> pa.Array:
        return pc.if_else(of_maps, *(pc.is_in(owners, rows[field].combine_chunks()) for field in ("id", "name")))

    lost = pc.if_else(known(manifest), _VANISHED, _REPLACED)
    reasons = pc.if_else(pc.or_(known(staying), pc.equal(kinds, UNKNOWN)), pa.scalar(None, pa.string()), lost)
    fates = _fates(workspace, settings, target, staying)
    reasons = pc.coalesce(reasons, pc.if_else(of_maps, _unkept(held, fates, target), pa.scalar(None, pa.string())))
    # The file that makes a folder a zarr group goes with the last array.
    of_group = pc.and_(of_maps, pc.equal(held["part"], ""))
    stays = pc.and_(reasons.is_null(), pc.and_(pc.invert(of_group), pc.not_equal(kinds, EMPTY)))
    left = pc.is_in(owners, owners.filter(stays))
    reasons = pc.if_else(pc.and_(of_group, left), pa.scalar(None, pa.string()), reasons)
    return pc.if_else(pc.equal(kinds, EMPTY), _EMPTY, reasons)


def _fates(workspace: Workspace, settings: CorpusSettings, target: Target, manifest: pa.Table) -> pa.Table:
    """List the images with which the latest run is done: ``id``, whether it ``failed``, and a flag per array kept."""
    rows = manifest.filter(manifest["present"])
    rows = rows.slice(0, rows.num_rows if settings.limit is None else settings.limit)
    records = read_records(workspace, [name for name in SCHEMA.names if name not in ("regions", "seconds")])
    held = OnDisk.of(workspace).held(rows, target.gan_sr_key)
    work = assess(rows, records, target, held)
    whole = kept_whole(target.keep, Standing(rows, records, target).marked, held.marked)
    kept = {array: flags & ~work.failed for array, flags in kept_arrays(target, whole).items()}
    kept["mse_sr"] |= target.keep_mse
    ids = rows["id"].combine_chunks()
    fates = pa.table({"id": ids, "failed": work.failed} | kept)
    return fates.filter(pc.invert(pc.is_in(ids, ids.filter(pa.array(work.pending)))))


def _unkept(held: pa.Table, fates: pa.Table, target: Target) -> pa.Array:
    """Why arrays of images are not kept by the settings of the latest run; null where they are, or it is not done."""
    index = pc.index_in(held["owner"].combine_chunks(), fates["id"].combine_chunks())
    kept = np.zeros(len(index), bool)
    for array in ARRAYS:
        flags = flags_of(fates[array].combine_chunks().take(index))
        kept |= flags & flags_of(pc.equal(held["part"], array))
    failed = pc.fill_null(fates["failed"].combine_chunks().take(index), False)
    unkept = pc.if_else(failed, _FAILED, f"that --keep {target.keep} and the other settings do not keep")
    return pc.if_else(pc.and_(index.is_valid(), pc.invert(pa.array(kept))), unkept, pa.scalar(None, pa.string()))


def unfinished(workspace: Workspace) -> Iterator[Leftover]:
    """What runs that were cut off have left half-written; locking the workspace deletes it."""
    for entry in entries(workspace.root / "tmp"):
        size = size_of(entry.path) if entry.is_dir(follow_symlinks=False) else size_of_file(entry)
        yield Leftover("tmp", f"tmp/{entry.name}", *size, UNFINISHED)


def _counts(workspace: Workspace, target: Target) -> Iterator[Leftover]:
    """Histograms of other settings, and what is none."""
    counted = list(entries(workspace.root / "calibration"))
    if not counted:
        return
    from desra_core.calibration.counting import histogram_key

    current = histogram_key(target)
    for entry in counted:
        if not (is_key(entry.name) and entry.is_dir(follow_symlinks=False)):
            yield stranger(workspace, entry)
        elif entry.name != current:
            size = size_of(entry.path)
            yield Leftover("calibration", f"calibration/{entry.name}", *size, "counts under other settings")
