"""Records of images that a workspace does not have any more: the tables of shards only grow by themselves."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from desra_core.housekeeping.holdings import Leftover
from desra_core.workspace import Workspace, read_table
from desra_core.workspace.records import SCHEMA, finished_shards

# A record that goes: the image's id, and the shard whose table it is in.
STALE = pa.schema([("id", pa.string()), ("shard", pa.int32())])


def stale_records(workspace: Workspace, manifest: pa.Table) -> pa.Table:
    """Find the records that do not count (schema `STALE`).

    They are of no image of the manifest; or the image has one in its own shard, too: a photo that was replaced and came
    back is in another shard than before.
    """
    tables = [STALE.empty_table()]
    for shard in finished_shards(workspace):
        ids = read_table(workspace.shard_records(shard), SCHEMA, ["id"])["id"]
        tables.append(pa.table([ids, pa.array([shard] * len(ids), pa.int32())], schema=STALE))
    records = pa.concat_tables(tables).combine_chunks()
    ids = records["id"].combine_chunks()
    shards = manifest["shard"].combine_chunks().take(pc.index_in(ids, manifest["id"].combine_chunks()))
    at_home = pc.fill_null(pc.equal(shards, records["shard"].combine_chunks()), False)
    elsewhere = pc.and_(pc.invert(at_home), pc.is_in(ids, ids.filter(at_home)))
    return records.filter(pc.or_(shards.is_null(), elsewhere))


def shrunk(table: pa.Table, stale: pa.Array, unmapped: pa.Array, unlabelled: pa.Array) -> pa.Table:
    """The table of a shard without some records, and with others that say that maps or labels are not kept.

    Parameters
    ----------
    table
        Records, schema `desra_core.workspace.records.SCHEMA`.
    stale, unmapped, unlabelled
        Ids of images.
    """
    table = table.filter(pc.invert(pc.is_in(table["id"], stale)))
    for name, ids in (("similarity_kept", unmapped), ("labels_kept", unlabelled)):
        kept = pc.and_(table[name], pc.invert(pc.is_in(table["id"], ids)))
        table = table.set_column(SCHEMA.get_field_index(name), SCHEMA.field(name), kept)
    return table


def rewritten(
    workspace: Workspace, stale: pa.Table, unmapped: pa.Array, unlabelled: pa.Array
) -> Iterator[tuple[int, pa.Table]]:
    """The shards whose tables are to change, each with its table then."""
    for shard in finished_shards(workspace):
        path = workspace.shard_records(shard)
        gone = stale.filter(pc.equal(stale["shard"], shard))["id"].combine_chunks()
        ids = read_table(path, SCHEMA, ["id"])["id"]
        if any(pc.any(pc.is_in(ids, some)).as_py() for some in (gone, unmapped, unlabelled)):
            yield shard, shrunk(read_table(path, SCHEMA), gone, unmapped, unlabelled)


def record_leftovers(
    workspace: Workspace, stale: pa.Table, unmapped: pa.Array, unlabelled: pa.Array
) -> Iterator[Leftover]:
    """What the tables of shards lose, file by file; those that would be empty go."""
    affected = set(stale["shard"].to_pylist())
    for shard, table in rewritten(workspace, stale, unmapped, unlabelled):
        if shard in affected:
            path = workspace.shard_records(shard)
            sink = io.BytesIO()
            pq.write_table(table, sink)
            freed = path.stat().st_size - (sink.tell() if table.num_rows else 0)
            place = path.relative_to(workspace.root).as_posix()
            reason = "records of images that the manifest does not have"
            yield Leftover("outcomes", place, int(not table.num_rows), max(0, freed), reason)
