"""Find and delete files that no run needs: the manifest, the records and the settings of the latest run decide.

Files of pending images stay, since the next run replaces them. So do files of images beyond ``--limit``, and of
vanished images unless ``--vanished`` is given. Human masks always stay.
"""

import contextlib
import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from desra_core.errors import TransientError, UsageError
from desra_core.housekeeping.contents import (
    EMPTY,
    ITEMS,
    KEY,
    UNKNOWN,
    Item,
    entries,
    images_contents,
    item,
    table_of,
)
from desra_core.housekeeping.old_finetunes import UNFINISHED, old_finetunes
from desra_core.planning.keys import load_settings
from desra_core.planning.plan import COLUMNS, assess, publish_tables
from desra_core.settings import CorpusSettings
from desra_core.workspace import Workspace, read_table
from desra_core.workspace.inventory import held_by
from desra_core.workspace.manifest import read_manifest
from desra_core.workspace.products import ARRAYS, Target, kept_arrays
from desra_core.workspace.records import SCHEMA, finished_shards, flags_of, gather_journals, read_records

_STALE = pa.schema([("id", pa.string()), ("shard", pa.int32())])
_STAYS = pa.scalar(None, pa.string())


class Garbage(NamedTuple):
    """The items that may be deleted, and what is left of the tables.

    Attributes:
        table: Items that no run needs, and unknown ones, which stay (schema `desra_core.housekeeping.contents.ITEMS`).
        manifest: The manifest without the images that go.
        target: The keys of the latest run.
        stale: The records that go: columns ``id``, and ``shard``, the shard whose table has the record.
        unmapped, unlabelled: Ids of images whose maps or labels go, while the images themselves stay.
    """

    table: pa.Table
    manifest: pa.Table
    target: Target
    stale: pa.Table
    unmapped: pa.Array
    unlabelled: pa.Array


def find_garbage(workspace: Workspace, *, vanished: bool = False) -> Garbage:
    """Find files that no run needs any more; nothing is changed. No run may be going on.

    Args:
        workspace: Of any run that got as far as its manifest.
        vanished: Find files of images, too, that the latest run did not find and whose photos are not there now.

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
    held = table_of(images_contents(workspace))
    reasons = _reasons(held, _unkept(held, workspace, settings, target, staying), manifest, staying)
    held = held.set_column(ITEMS.get_field_index("reason"), "reason", reasons)
    going = held.filter(pc.or_(reasons.is_valid(), pc.equal(held["kind"], UNKNOWN)))
    maps = held.filter(pc.and_(pc.equal(held["kind"], "maps"), reasons.is_valid()))
    unmapped, unlabelled = (
        maps.filter(pc.equal(maps["part"], part))["owner"].combine_chunks() for part in ("similarity", "labels")
    )
    found = Garbage(going, staying, target, _stale_records(workspace, staying), unmapped, unlabelled)
    others = [
        *_unfinished(workspace),
        *_histograms(workspace, target),
        *old_finetunes(workspace, settings),
        *_shrunk_tables(workspace, found),
    ]
    return found._replace(table=pa.concat_tables([going, table_of(others)]).combine_chunks())


def _reasons(held: pa.Table, unkept: pa.Array, manifest: pa.Table, staying: pa.Table) -> pa.Array:
    """Explain why each item may go; null for items that stay."""
    kinds, owners = held["kind"].combine_chunks(), held["owner"].combine_chunks()
    of_maps = pc.equal(kinds, "maps")

    def known(rows: pa.Table) -> pa.Array:
        return pc.if_else(of_maps, *(pc.is_in(owners, rows[field].combine_chunks()) for field in ("id", "name")))

    lost = pc.if_else(known(manifest), "of images that have vanished", "of images that the manifest does not have")
    reasons = pc.if_else(pc.or_(known(staying), pc.equal(kinds, UNKNOWN)), _STAYS, lost)
    reasons = pc.coalesce(reasons, pc.if_else(of_maps, unkept, _STAYS))
    # The file that makes a folder a zarr group may go when no array of the group stays.
    of_group = pc.and_(of_maps, pc.equal(held["part"], ""))
    stays = pc.and_(reasons.is_null(), pc.and_(pc.invert(of_group), pc.not_equal(kinds, EMPTY)))
    left = pc.is_in(owners, owners.filter(stays))
    reasons = pc.if_else(pc.and_(of_group, left), _STAYS, reasons)
    return pc.if_else(pc.equal(kinds, EMPTY), "empty folders", reasons)


def _unkept(
    held: pa.Table, workspace: Workspace, settings: CorpusSettings, target: Target, manifest: pa.Table
) -> pa.Array:
    """Explain why the latest run's settings do not keep an array; null where they do, or the image is not done."""
    rows = manifest.filter(manifest["present"]).slice(0, settings.limit)
    on_disk = held_by(workspace, rows, target.gan_sr_key)
    work = assess(rows, read_records(workspace, COLUMNS), target, on_disk)
    wanted = {array: flags & ~work.failed for array, flags in kept_arrays(target, work.whole).items()}
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


def _unfinished(workspace: Workspace) -> Iterator[Item]:
    """List half-written files of killed runs; locking the workspace deletes them."""
    for entry in entries(workspace.root / "tmp"):
        yield item(workspace, entry.path, "tmp", UNFINISHED)


def _histograms(workspace: Workspace, target: Target) -> Iterator[Item]:
    """List histograms of other settings, and unknown files among them."""
    from desra_core.calibration.counting import histogram_key

    current = histogram_key(target)
    for entry in entries(workspace.root / "calibration"):
        if not (KEY.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)):
            yield item(workspace, entry.path, UNKNOWN)
        elif entry.name != current:
            yield item(workspace, entry.path, "calibration", "counts under other settings")


def _stale_records(workspace: Workspace, manifest: pa.Table) -> pa.Table:
    """Find records of images that the manifest lacks, and older records of images that are now in another shard."""
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


def _rewritten(workspace: Workspace, found: Garbage) -> Iterator[tuple[int, pa.Table]]:
    """Yield each shard whose table changes, with its new table: without the records, maps and labels that go."""
    for shard in finished_shards(workspace):
        path = workspace.shard_records(shard)
        gone = found.stale.filter(pc.equal(found.stale["shard"], shard))["id"].combine_chunks()
        ids = read_table(path, SCHEMA, ["id"])["id"]
        if not any(pc.any(pc.is_in(ids, some)).as_py() for some in (gone, found.unmapped, found.unlabelled)):
            continue
        table = read_table(path, SCHEMA)
        table = table.filter(pc.invert(pc.is_in(table["id"], gone)))
        for name, some in (("similarity_kept", found.unmapped), ("labels_kept", found.unlabelled)):
            kept = pc.and_(table[name], pc.invert(pc.is_in(table["id"], some)))
            table = table.set_column(SCHEMA.get_field_index(name), SCHEMA.field(name), kept)
        yield shard, table


def _shrunk_tables(workspace: Workspace, found: Garbage) -> Iterator[Item]:
    """List the tables of shards that become smaller, with the bytes freed; empty ones are deleted whole."""
    affected = set(found.stale["shard"].to_pylist())
    for shard, table in _rewritten(workspace, found):
        if shard in affected:
            path = workspace.shard_records(shard)
            sink = io.BytesIO()
            pq.write_table(table, sink)
            freed = path.stat().st_size - (sink.tell() if table.num_rows else 0)
            whole = item(workspace, path, "outcomes", "records of images that the manifest does not have")
            yield whole._replace(files=int(not table.num_rows), bytes=max(0, freed))


def sweep(
    workspace: Workspace, *, vanished: bool = False, on_dropped: Callable[[int, int], None] | None = None
) -> Garbage:
    """Delete the garbage of a workspace: rows of the manifest first, then records, then files.

    A sweep that is killed at any moment leaves a valid workspace, and the next one goes on.

    Args:
        workspace: Of any run that got as far as its manifest.
        vanished: As for `find_garbage`.
        on_dropped: Called with the number of files and folders deleted so far, and of all.

    Returns:
        The items that were deleted.

    Raises:
        LockedError: A run holds the workspace.
        UsageError: As `find_garbage`.
        TransientError: Something cannot be deleted.
    """
    scratch = table_of(_unfinished(workspace))  # locking the workspace deletes these
    with workspace.locked():
        gather_journals(workspace)
        found = find_garbage(workspace, vanished=vanished)
        workspace.publish_table(workspace.manifest, found.manifest)
        for shard, table in _rewritten(workspace, found):
            if table.num_rows:
                workspace.publish_table(workspace.shard_records(shard), table)
            else:
                workspace.shard_records(shard).unlink()
        _drop(workspace, found.table, on_dropped)
        if workspace.regions.exists():
            publish_tables(workspace, found.target)
    return found._replace(table=pa.concat_tables([scratch, found.table]))


def _drop(workspace: Workspace, table: pa.Table, on_dropped: Callable[[int, int], None] | None) -> None:
    """Delete files and folders, and then the folders above that they leave empty."""
    listed = table.filter(pc.invert(pc.is_in(table["kind"], pa.array((UNKNOWN, EMPTY, "outcomes", "tmp")))))
    folders = set(table.filter(pc.equal(table["kind"], EMPTY))["path"].to_pylist())
    for number, path in enumerate(listed["path"].to_pylist(), 1):
        place = workspace.root / path
        try:
            _delete(workspace, place)
        except OSError as error:
            reason = f"cannot be deleted ({error.strerror or error})"
            raise TransientError(place, reason, "check its permissions and run again") from error
        folders.add(os.path.dirname(path))
        if on_dropped:
            on_dropped(number, listed.num_rows)
    for folder in map(PurePosixPath, sorted(folders, key=len, reverse=True)):
        with contextlib.suppress(OSError):  # raised by a folder that is not empty: it stays, with all above it
            for each in (folder, *folder.parents):
                if len(each.parts) > 1 + (each.parts[:1] == ("dataset",)):  # folders above these always stay
                    (workspace.root / each).rmdir()


def _delete(workspace: Workspace, place: Path) -> None:
    """Delete a file, or a folder in one go, since half of a folder could be taken for the whole."""
    if place.is_symlink() or not place.is_dir():
        place.unlink(missing_ok=True)
        return
    shutil.rmtree(place.rename(workspace.scratch()))
