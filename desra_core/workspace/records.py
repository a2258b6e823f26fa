"""The record of each image: small, journaled by workers and gathered into tables by the driver.

A record is the unit of resuming. A worker writes it as JSON once a stage has committed its files. When a shard is
done, its records become one Parquet file, and its journal is deleted. A journaled record is always the newest.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from desra_core.errors import ImageError
from desra_core.files.content import reading_errors
from desra_core.workspace import Workspace, read_table
from desra_core.workspace.products import FURTHER

Flags = npt.NDArray[np.bool_]

_NUMBER = "[0-9]" * 8

REGION_FIELDS = [
    *(pa.field(name, pa.int32()) for name in ("x", "y", "width", "height")),
    pa.field("area", pa.int64()),
    pa.field("dominant_class", pa.int16()),
    *(pa.field(name, pa.float64()) for name in ("mean_similarity", "severity")),
]


@dataclass(frozen=True)
class Record:
    """The state of one image in a workspace.

    Attributes:
        icc_profile: Whether the GAN result, or the photo, has a colour profile, which is ignored.
        further_pages: Full pages of that file beside the first, which are not read; None in records from before they
            were counted.
        tile: Side in LR pixels of the windows of inference, where memory forced smaller windows than usual.
        similarity_key, segmentation_key, mask_key: Settings under which each product was made; None where it was not.
            ``mask_key`` is set once the mask is published.
        similarity_kept, labels_kept: Whether the array lies in the image's zarr group.
        proven_weight: When set, the mask is empty for all class weights from this value up, whatever the labels.
        threshold, min_area, weighting_key, labels_hash: The settings under which ``artifact_pixels`` was found:
            ``min_area`` in pixels, ``weighting_key`` for class weights and the origin of the labels.
        artifact_pixels: Pixels in the mask; None while unknown.
        regions: One dict per region, fields as in `desra_core.detection.Region`.
        failed_stage, failed_key, subject, reason, remedy, transient: The failure, if the image failed: the stage, the
            ``run_key`` of the target, and the words of the error.
        seconds: Computing time by stage.
        further: Keys of the products `FURTHER`, by name; on disk, each of these keys has its own column.
    """

    id: str
    height: int | None = None
    width: int | None = None
    icc_profile: bool = False
    further_pages: int | None = None
    tile: int | None = None
    similarity_key: str | None = None
    similarity_kept: bool = False
    segmentation_key: str | None = None
    labels_kept: bool = False
    labels_hash: str | None = None
    weighting_key: str | None = None
    proven_weight: float | None = None
    threshold: float | None = None
    min_area: int | None = None
    mask_key: str | None = None
    artifact_pixels: int | None = None
    regions: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    failed_stage: str | None = None
    failed_key: str | None = None
    subject: str | None = None
    reason: str | None = None
    remedy: str | None = None
    transient: bool = False
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    further: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """Whether the image could not be processed."""
        return self.failed_stage is not None

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of an image that has been decoded."""
        assert self.height is not None
        assert self.width is not None
        return self.height, self.width

    @property
    def error(self) -> ImageError:
        """The failure of a failed image, in the words of the error that was raised."""
        return ImageError(self.subject, self.reason or "", self.remedy or "")


# Types of the fields of a record in tables: by name, or else by annotation.
_TYPES = {
    "str": pa.string(),
    "str | None": pa.string(),
    "bool": pa.bool_(),
    "int | None": pa.int32(),
    "float | None": pa.float64(),
    "min_area": pa.int64(),
    "artifact_pixels": pa.int64(),
    "regions": pa.list_(pa.struct(REGION_FIELDS)),
    "seconds": pa.map_(pa.string(), pa.float64()),
}
_FURTHER_COLUMNS = {product.column: product.name for product in FURTHER}
SCHEMA = pa.schema(
    [
        pa.field(field.name, _TYPES.get(field.name) or _TYPES[str(field.type)], nullable=field.name != "id")
        for field in dataclasses.fields(Record)
        if field.name != "further"
    ]
    + [pa.field(column, pa.string()) for column in _FURTHER_COLUMNS]
)


def without_arrays(record: Record) -> Record:
    """Return the record of an image whose stored arrays are lost: no key is left, so all are computed again."""
    return dataclasses.replace(record, similarity_key=None, segmentation_key=None, further={})


def write_journal(workspace: Workspace, shard: int, record: Record) -> None:
    """Commit the record of one image of a shard in flight (raises `desra_core.errors.TransientError`)."""
    path = workspace.shard_journal(shard) / f"{record.id}.json"
    workspace.publish(path, json.dumps(_as_row(record)).encode())


def read_shard(workspace: Workspace, shard: int) -> dict[str, Record]:
    """Read all records of a shard by image id, the journal's over the table's.

    Raises:
        UsageError: The table is damaged.
        TransientError: Something cannot be read now.
    """
    records = {record.id: record for record in _records(read_table(workspace.shard_records(shard), SCHEMA))}
    journaled = _journaled(workspace.shard_journal(shard))
    return {key: record for key, record in (records | journaled).items() if record is not None}


def gather_shard(workspace: Workspace, shard: int, records: Iterable[Record] = ()) -> None:
    """Write a shard's table from its journal and from ``records``, which no worker could journal."""
    newest = read_shard(workspace, shard) | {record.id: record for record in records}
    workspace.publish_table(workspace.shard_records(shard), to_table(newest[key] for key in sorted(newest)))
    shutil.rmtree(workspace.shard_journal(shard), ignore_errors=True)


def gather_journals(workspace: Workspace) -> None:
    """Turn what a killed run left in its journals into tables. The workspace must be locked."""
    for shard in _journaled_shards(workspace):
        gather_shard(workspace, shard)


def read_records(workspace: Workspace, columns: list[str] | None = None) -> pa.Table:
    """Read the newest record of every image, as one table with the given columns of `SCHEMA`.

    Shards in flight are gathered in memory only. An image that came back after it was replaced may have two records;
    the record in the later shard is newer.
    """
    names = columns or SCHEMA.names
    journaled = set(_journaled_shards(workspace))
    tables = [SCHEMA.empty_table().select(names)]
    for shard in sorted(journaled.union(finished_shards(workspace))):
        if shard in journaled:
            tables.append(to_table(read_shard(workspace, shard).values()).select(names))
        else:
            tables.append(read_table(workspace.shard_records(shard), SCHEMA, columns))
    table = pa.concat_tables(tables).combine_chunks()
    if "id" not in names or pc.count_distinct(table["id"]).as_py() == table.num_rows:
        return table
    backwards = table["id"].combine_chunks().take(np.arange(table.num_rows)[::-1])
    last = pc.index_in(backwards, backwards).to_numpy() == np.arange(table.num_rows)
    return table.filter(pa.array(last[::-1])).combine_chunks()


def finished_shards(workspace: Workspace) -> list[int]:
    """List the shards that have a table, sorted."""
    return sorted(int(path.stem) for path in workspace.records.glob(f"{_NUMBER}.parquet"))


def to_table(records: Iterable[Record]) -> pa.Table:
    """Return records as rows of `SCHEMA`."""
    rows = [_as_row(record) | {"seconds": list(record.seconds.items())} for record in records]
    return pa.Table.from_pylist(rows, SCHEMA)


def flags_of(values: pa.Array) -> Flags:
    """Return Arrow booleans as NumPy ones; null is false."""
    return np.asarray(pc.fill_null(values, False).to_numpy(zero_copy_only=False), dtype=bool)


def _journaled_shards(workspace: Workspace) -> list[int]:
    return sorted(int(folder.name) for folder in workspace.journal.glob(_NUMBER))


def _journaled(folder: Path) -> dict[str, Record | None]:
    """Read the records of a journal by image id (raises `TransientError`); None for a record that is damaged.

    The image of a damaged record begins anew: its files may be newer than its older record in the table.
    """
    records: dict[str, Record | None] = {}
    with reading_errors(folder):
        paths = sorted(folder.glob("*.json"))
    for path in paths:
        try:
            with reading_errors(path):
                data = path.read_bytes()
            (record,) = _records(to_table([_from_row(json.loads(data))]))
            records[path.stem] = record if record.id == path.stem else None
        except FileNotFoundError:  # gathered meanwhile
            continue
        except (ValueError, TypeError, AttributeError, OverflowError, pa.ArrowException):  # emptied by a power cut
            records[path.stem] = None
    return records


def _records(table: pa.Table) -> list[Record]:
    return [
        _from_row(row | {"seconds": dict(row["seconds"] or {}), "regions": row["regions"] or []})
        for row in table.to_pylist()
    ]


def _as_row(record: Record) -> dict[str, Any]:
    """Convert a record to a row, in which every further product has its own column."""
    fields = {name: value for name, value in record.__dict__.items() if name != "further"}
    return fields | {column: record.further.get(name) for column, name in _FURTHER_COLUMNS.items()}


def _from_row(row: dict[str, Any]) -> Record:
    keys = {name: row.pop(column, None) for column, name in _FURTHER_COLUMNS.items()}
    return Record(**row, further={name: key for name, key in keys.items() if key})
