"""Find what no run needs of a workspace: the manifest, the settings of the latest run and the records decide.

Images that are still to be done are left alone: the run that does them replaces what they have. So are those beyond
``--limit``, and vanished ones unless ``--vanished`` is given. Human masks always stay.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from desra_core.errors import UsageError
from desra_core.housekeeping.contents import (
    EMPTY,
    ITEMS,
    UNKNOWN,
    Item,
    entries,
    images_contents,
    is_key,
    item,
    table_of,
)
from desra_core.housekeeping.old_finetunes import UNFINISHED, old_finetunes
from desra_core.planning.keys import load_settings
from desra_core.planning.plan import Standing, assess
from desra_core.settings import CorpusSettings
from desra_core.workspace import Workspace, read_table
from desra_core.workspace.inventory import OnDisk, flags_of
from desra_core.workspace.manifest import read_manifest
from desra_core.workspace.products import ARRAYS, Target, kept_arrays, kept_whole
from desra_core.workspace.records import SCHEMA, finished_shards, read_records

_STALE = pa.schema([("id", pa.string()), ("shard", pa.int32())])
_STAYS = pa.scalar(None, pa.string())


class Garbage(NamedTuple):
    """The items that may be deleted, and the sizes that remain.

    Attributes:
        table: Items that no run needs, and unknown ones, which stay (schema `desra_core.housekeeping.contents.ITEMS`).
        manifest: The manifest without what goes.
        target: The keys of the latest run.
        stale: The records that go: columns ``id`` and ``shard``, in whose table they are.
        unmapped, unlabelled: Ids of images whose maps or labels go, while they stay themselves.
    """

    table: pa.Table
    manifest: pa.Table
    target: Target
    stale: pa.Table
    unmapped: pa.Array
    unlabelled: pa.Array


def find_garbage(workspace: Workspace, *, vanished: bool = False) -> Garbage:
    """Find what no run needs any more; nothing is changed. No run may be going on.

    Args:
        workspace: Of any run that got as far as its manifest.
        vanished: Images go, too, that the latest run did not find and whose files are not there now.

    Raises:
        UsageError: The folder is no workspace, or a table of it is damaged or missing.
    """
    settings, target = load_settings(workspace)
    manifest = read_manifest(workspace)
    if manifest is None:
        raise UsageError(workspace.root, "has no manifest", f"run desra {settings.verb}")
    staying = manifest
    if vanished:
        sources, present = settings.sources, manifest["present"].to_pylist()
        paths = manifest[f"{sources.identity[-1]}_path"].to_pylist()
        stays = [there or os.path.lexists(sources.main / path) for there, path in zip(present, paths, strict=True)]
        staying = manifest.filter(pa.array(stays, pa.bool_()))
    held = images_contents(workspace)
    reasons = _reasons(held, workspace, settings, target, manifest, staying)
    held = held.set_column(ITEMS.get_field_index("reason"), "reason", reasons)
    maps = held.filter(pc.and_(pc.equal(held["kind"], "maps"), reasons.is_valid()))
    unmapped, unlabelled = (
        maps.filter(pc.equal(maps["part"], part))["owner"].combine_chunks() for part in ("similarity", "labels")
    )
    stale = _stale_records(workspace, staying)
    others = [
        *unfinished(workspace),
        *_histograms(workspace, target),
        *old_finetunes(workspace, settings),
        *_shrunk_tables(workspace, stale, unmapped, unlabelled),
    ]
    going = held.filter(pc.or_(reasons.is_valid(), pc.equal(held["kind"], UNKNOWN)))
    table = pa.concat_tables([going, table_of(others)]).combine_chunks()
    return Garbage(table, staying, target, stale, unmapped, unlabelled)


def _reasons(
    held: pa.Table,
    workspace: Workspace,
    settings: CorpusSettings,
    target: Target,
    manifest: pa.Table,
    staying: pa.Table,
) -> pa.Array:
    """Why each item may go; null for what stays."""
    kinds, owners = held["kind"].combine_chunks(), held["owner"].combine_chunks()
    of_maps = pc.equal(kinds, "maps")

    def known(rows: pa.Table) -> pa.Array:
        return pc.if_else(of_maps, *(pc.is_in(owners, rows[field].combine_chunks()) for field in ("id", "name")))

    lost = pc.if_else(known(manifest), "of images that have vanished", "of images that the manifest does not have")
    reasons = pc.if_else(pc.or_(known(staying), pc.equal(kinds, UNKNOWN)), _STAYS, lost)
    unkept = _unkept(held, workspace, settings, target, staying)
    reasons = pc.coalesce(reasons, pc.if_else(of_maps, unkept, _STAYS))
    # The file that makes a folder a zarr group goes with the last array.
    of_group = pc.and_(of_maps, pc.equal(held["part"], ""))
    stays = pc.and_(reasons.is_null(), pc.and_(pc.invert(of_group), pc.not_equal(kinds, EMPTY)))
    left = pc.is_in(owners, owners.filter(stays))
    reasons = pc.if_else(pc.and_(of_group, left), _STAYS, reasons)
    return pc.if_else(pc.equal(kinds, EMPTY), "empty folders", reasons)


def _unkept(
    held: pa.Table, workspace: Workspace, settings: CorpusSettings, target: Target, manifest: pa.Table
) -> pa.Array:
    """Why arrays are not kept by the settings of the latest run; null where they are, or the image is not done."""
    rows = manifest.filter(manifest["present"])
    rows = rows.slice(0, rows.num_rows if settings.limit is None else settings.limit)
    records = read_records(workspace, [name for name in SCHEMA.names if name not in ("regions", "seconds")])
    on_disk = OnDisk.of(workspace).held(rows, target.gan_sr_key)
    work = assess(rows, records, target, on_disk)
    whole = kept_whole(target.keep, Standing(rows, records, target).marked, on_disk.marked)
    wanted = {array: flags & ~work.failed for array, flags in kept_arrays(target, whole).items()}
    wanted["mse_sr"] |= target.keep_mse
    ids = rows["id"].combine_chunks()
    done = pc.invert(pc.is_in(ids, ids.filter(pa.array(work.pending))))
    index = pc.index_in(held["owner"].combine_chunks(), ids.filter(done))
    kept = np.zeros(len(index), bool)
    for array in ARRAYS:
        flags = flags_of(pa.array(wanted[array]).filter(done).take(index))
        kept |= flags & flags_of(pc.equal(held["part"], array))
    failed = pc.fill_null(pa.array(work.failed).filter(done).take(index), False)
    settings_drop = f"that --keep {target.keep} and the other settings do not keep"
    unkept = pc.if_else(failed, "of images that failed for good", settings_drop)
    return pc.if_else(pc.and_(index.is_valid(), pc.invert(pa.array(kept))), unkept, _STAYS)


def unfinished(workspace: Workspace) -> Iterator[Item]:
    """List what runs that were cut off have left half-written; locking the workspace deletes it."""
    for entry in entries(workspace.root / "tmp"):
        yield item(workspace, entry.path, "tmp", UNFINISHED)


def _histograms(workspace: Workspace, target: Target) -> Iterator[Item]:
    """Histograms of other settings, and unknown files among them."""
    from desra_core.calibration.counting import histogram_key

    current = histogram_key(target)
    for entry in entries(workspace.root / "calibration"):
        if not (is_key(entry.name) and entry.is_dir(follow_symlinks=False)):
            yield item(workspace, entry.path, UNKNOWN)
        elif entry.name != current:
            yield item(workspace, entry.path, "calibration", "counts under other settings")


def _stale_records(workspace: Workspace, manifest: pa.Table) -> pa.Table:
    """Find the records that do not count, because the tables of shards only grow by themselves.

    They are of no image of the manifest; or the image has one in its own shard, too: a photo that was replaced and came
    back is in another shard than before.
    """
    tables = [_STALE.empty_table()]
    for shard in finished_shards(workspace):
        ids = read_table(workspace.shard_records(shard), SCHEMA, ["id"])["id"]
        tables.append(pa.table([ids, pa.array([shard] * len(ids), pa.int32())], schema=_STALE))
    records = pa.concat_tables(tables).combine_chunks()
    ids = records["id"].combine_chunks()
    shards = manifest["shard"].combine_chunks().take(pc.index_in(ids, manifest["id"].combine_chunks()))
    at_home = pc.fill_null(pc.equal(shards, records["shard"].combine_chunks()), False)
    elsewhere = pc.and_(pc.invert(at_home), pc.is_in(ids, ids.filter(at_home)))
    return records.filter(pc.or_(shards.is_null(), elsewhere))


def rewritten(
    workspace: Workspace, stale: pa.Table, unmapped: pa.Array, unlabelled: pa.Array
) -> Iterator[tuple[int, pa.Table]]:
    """Give each shard whose table is to change, with its table then.

    It lacks the stale records, and the others say which maps and labels are not kept.
    """
    for shard in finished_shards(workspace):
        path = workspace.shard_records(shard)
        gone = stale.filter(pc.equal(stale["shard"], shard))["id"].combine_chunks()
        ids = read_table(path, SCHEMA, ["id"])["id"]
        if not any(pc.any(pc.is_in(ids, some)).as_py() for some in (gone, unmapped, unlabelled)):
            continue
        table = read_table(path, SCHEMA)
        table = table.filter(pc.invert(pc.is_in(table["id"], gone)))
        for name, some in (("similarity_kept", unmapped), ("labels_kept", unlabelled)):
            kept = pc.and_(table[name], pc.invert(pc.is_in(table["id"], some)))
            table = table.set_column(SCHEMA.get_field_index(name), SCHEMA.field(name), kept)
        yield shard, table


def _shrunk_tables(workspace: Workspace, stale: pa.Table, unmapped: pa.Array, unlabelled: pa.Array) -> Iterator[Item]:
    """List the tables of shards that become smaller, with the bytes freed; empty ones are deleted whole."""
    affected = set(stale["shard"].to_pylist())
    for shard, table in rewritten(workspace, stale, unmapped, unlabelled):
        if shard in affected:
            path = workspace.shard_records(shard)
            sink = io.BytesIO()
            pq.write_table(table, sink)
            freed = path.stat().st_size - (sink.tell() if table.num_rows else 0)
            reason = "records of images that the manifest does not have"
            found = item(workspace, path, "outcomes", reason)
            yield found._replace(files=int(not table.num_rows), bytes=max(0, freed))
