"""The products of an image, the record of the products that an image has, and the search for their files.

Stages, cache keys, columns and arrays all follow from `PRODUCTS`. This module imports no stage: when a run begins, it
finds the stage of a product by the product's name.

A record is the unit of resuming. A worker writes it as JSON to a journal after a stage has committed its files. When a
shard is done, its records become one Parquet file, and its journal is deleted. A journaled record is always the newest.
Because files may get lost, a run compares the records with what the workspace really holds, see `held_by`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from desra_core.detection.agreement import PairAgreement
from desra_core.detection.detectors import DEFAULT
from desra_core.errors import ImageError
from desra_core.files import as_json, fingerprint, parse_json, paths_in, reading_errors
from desra_core.workspace import DATASET, Workspace, read_table
from desra_core.workspace.human_masks import human_mask_rows

Flags = npt.NDArray[np.bool_]
# One value, or one for each of many images.
F = TypeVar("F", bool, npt.NDArray[np.bool_])

_NUMBER = "[0-9]" * 8


@dataclass(frozen=True)
class Target:
    """The settings of a run as keys: an image is done when its record and its files agree with these.

    ``threshold`` is minus the score above which a pixel is suspect, as in the records: with DeSRA the threshold of the
    adjusted similarity. ``method`` is the detector; ``labels_first`` says whether its scores depend on the labels.
    """

    similarity_key: str
    segmentation_key: str
    weighting_key: str
    min_weight: float
    threshold: float
    min_area: str
    keep: str
    mask_key: str
    mse_sr_key: str | None = None
    gan_sr_key: str | None = None
    keep_mse: bool = False
    method: str = DEFAULT
    labels_first: bool = False

    @property
    def super_resolves(self) -> bool:
        """Whether the results are computed, rather than read from files."""
        return self.gan_sr_key is not None

    @property
    def segments(self) -> bool:
        """Whether labels are computed, rather than read or absent."""
        return self.segmentation_key.startswith("mmseg:")

    @property
    def runs_networks(self) -> bool:
        """Whether anything is inferred."""
        return self.super_resolves or self.segments

    @property
    def reads_labels(self) -> bool:
        """Whether labels are read from files."""
        return self.segmentation_key == "labels"

    @property
    def run_key(self) -> str:
        """The key of all products of the run: an image that failed for good under this key is not tried again."""
        keys = [product.key(self) for product in FURTHER]
        return fingerprint(self.mask_key, *keys) if any(keys) else self.mask_key


@dataclass(frozen=True)
class Product:
    """A product that a run makes of every image that needs it, and the stage that makes the product."""

    # The name of the stage, on disk and in Dask. The module ``desra_core.stages.NAME`` has the function ``NAME_stage``
    # and, where it runs networks, ``network``.
    name: str
    title: str  # the stage in words for people
    key: Callable[[Target], str | None]  # gives the cache key under a target, or None where the product is not wanted
    # The arrays that the stage stores in the zarr group of the image. The last of them is the product.
    arrays: tuple[str, ...] = ()
    # Gives the arrays that must exist before the stage runs, as far as the run makes them.
    needs: Callable[[Target], tuple[str, ...]] = lambda _: ()
    gpu: bool = False  # whether the stage runs networks, on a GPU where there is one
    column: str = ""  # the column of the record with the key under which the product was made
    kept: str | None = None  # the column that says whether the product was stored; None if no column does


# In an order for readers; `stages_for` puts the products of a run in the order of their needs. A further product is
# declared between segmentation and mask, with a ``column``: it is made of every image whose similarity map is stored,
# and is deleted with that map.
PRODUCTS = (
    Product(
        "super_resolution",
        "super-resolution",
        key=lambda target: target.similarity_key if target.super_resolves else None,
        arrays=("mse_sr", "gan_sr", "similarity"),
        gpu=True,
        column="similarity_key",
        kept="similarity_kept",
    ),
    Product(
        "similarity",
        "similarity",
        key=lambda target: None if target.super_resolves else target.similarity_key,
        arrays=("similarity",),
        needs=lambda target: ("labels",) if target.labels_first else (),
        column="similarity_key",
        kept="similarity_kept",
    ),
    Product(
        "segmentation",
        "segmentation",
        key=lambda target: target.segmentation_key if target.segments else None,
        arrays=("labels",),
        # Images that are proven clean by the similarity map need no labels.
        needs=lambda target: ("gan_sr",) if target.labels_first else ("gan_sr", "similarity"),
        gpu=True,
        column="segmentation_key",
        kept="labels_kept",
    ),
    Product("mask", "mask and regions", key=lambda target: target.mask_key, needs=lambda _: ARRAYS, column="mask_key"),
)
# Products beside these, which have entries in `Record.further`; the columns of these are fields of `Record`.
FURTHER = tuple(each for each in PRODUCTS if each.column not in ("similarity_key", "segmentation_key", "mask_key"))
ARRAYS: tuple[str, ...] = tuple(dict.fromkeys(array for product in PRODUCTS for array in product.arrays))


def stages_for(target: Target) -> list[Product]:
    """List the products of a run, each after the products that it needs."""
    wanted = {product.name: product for product in PRODUCTS if product.key(target)}
    makers = {array: name for name, product in wanted.items() for array in product.arrays}
    graph = {name: [makers[array] for array in each.needs(target) if array in makers] for name, each in wanted.items()}
    return [wanted[name] for name in TopologicalSorter(graph).static_order()]


def kept_whole(keep: str, artifact: F, marked: F) -> F:
    """Decide whether everything of an image is kept, the pair of a mined photo and its pictures in the dataset too.

    Args:
        keep: The setting: ``artifacts``, ``maps`` or ``all``.
        artifact, marked: Whether the detector found an artifact, and whether a person marked one.
    """
    return artifact | marked | (keep == "all")


def kept_arrays(target: Target, whole: F) -> dict[str, F]:
    """Decide which arrays of done images are kept.

    Args:
        target: The settings of the run.
        whole: Whether everything of an image is kept, by `kept_whole`.

    Returns:
        By the name of the array: whether it is kept.
    """
    with_maps = whole | (target.keep != "artifacts")
    kept = {
        "similarity": with_maps,
        "labels": with_maps & target.segments,
        "mse_sr": whole & target.super_resolves | target.keep_mse,
        "gan_sr": whole & target.super_resolves,
    }
    return kept | {product.arrays[-1]: with_maps & (product.key(target) is not None) for product in FURTHER}


def spared_arrays(target: Target) -> tuple[str, ...]:
    """Name the arrays that stay of an image whose similarity map is not kept."""
    kept = kept_arrays(replace(target, keep="artifacts"), False)
    return tuple(array for array, is_kept in kept.items() if is_kept)


REGION_FIELDS = [
    *(pa.field(name, pa.int32()) for name in ("x", "y", "width", "height")),
    pa.field("area", pa.int64()),
    pa.field("dominant_class", pa.int16()),
    *(pa.field(name, pa.float64()) for name in ("mean_similarity", "severity")),
]


@dataclass(frozen=True)
class Record:
    """The state of one image in a workspace."""

    id: str
    height: int | None = None
    width: int | None = None
    icc_profile: bool = False  # whether the photo, or the GAN result where results are files, has a colour profile
    # What became of that profile, see `desra_core.images.colour.Treatment`; None without one, and in records from
    # before profiles were honoured.
    colour_profile: str | None = None
    # Full pages of that file beside the first, which are not read; None in records from before they were counted.
    further_pages: int | None = None
    # Side in LR pixels of the windows of inference, where memory forced smaller windows than usual.
    tile: int | None = None
    similarity_key: str | None = None  # settings of the similarity map; None where none was made
    similarity_kept: bool = False  # whether the map lies in the image's zarr group
    segmentation_key: str | None = None  # settings of the labels; None where none were computed
    labels_kept: bool = False
    # ``artifact_pixels`` was found under ``labels_hash``, ``weighting_key``, ``threshold`` and ``min_area``.
    labels_hash: str | None = None
    weighting_key: str | None = None  # of the class weights and the origin of the labels
    # When set, the mask is empty for all class weights from this value up, whatever the labels.
    proven_weight: float | None = None
    threshold: float | None = None
    min_area: int | None = None  # in pixels
    mask_key: str | None = None  # settings of the mask; set once it is published
    artifact_pixels: int | None = None  # pixels in the mask; None while unknown
    # One dict per region, fields as in `desra_core.detection.Region`.
    regions: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    # The failure, if the image failed: the stage, the ``run_key`` of the target, and the words of the error.
    failed_stage: str | None = None
    failed_key: str | None = None
    subject: str | None = None
    reason: str | None = None
    remedy: str | None = None
    transient: bool = False
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)  # computing time by stage
    # The `checksum` of each published picture: ``masks``, and the kinds of the dataset as ``dataset/KIND``. Empty in
    # records from before they were taken. Arrays have their own.
    checksums: dict[str, str] = dataclasses.field(default_factory=dict)
    # How the two results agree: see `desra_core.detection.agreement`. None where that was not measured.
    agreement: dict[str, float | None] | None = None
    # Keys of the products `FURTHER`, by name; on disk, each of these keys has its own column.
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
    "checksums": pa.map_(pa.string(), pa.string()),
    "agreement": pa.struct([pa.field(name, pa.float64()) for name in PairAgreement._fields]),
}
_MAPS = ("seconds", "checksums")
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
    return replace(record, similarity_key=None, segmentation_key=None, further={})


def write_journal(workspace: Workspace, shard: int, record: Record) -> None:
    """Write the record of one image of a shard in progress (raises `desra_core.errors.TransientError`)."""
    path = workspace.shard_journal(shard) / f"{record.id}.json"
    workspace.publish(path, as_json(_as_row(record)))


def read_shard(workspace: Workspace, shard: int) -> dict[str, Record]:
    """Read all records of a shard by image id; a record in the journal replaces the image's record in the table.

    Raises:
        UsageError: The table is damaged.
        TransientError: Something cannot be read now.
    """
    rows = read_table(workspace.shard_records(shard), SCHEMA).to_pylist()
    records = {row["id"]: _from_row(row) for row in rows}
    journal = workspace.shard_journal(shard)
    for path in paths_in(journal, "*.json"):
        try:
            with reading_errors(path):
                data = path.read_bytes()
        except FileNotFoundError:  # `gather_shard` has deleted it meanwhile
            continue
        # Where a power cut has emptied a record, its image is computed again: the files may be newer than the table.
        records.pop(path.stem, None)
        with contextlib.suppress(ValueError, TypeError, AttributeError, OverflowError, pa.ArrowException):
            (row,) = to_table([_from_row(parse_json(data))]).to_pylist()
            if row["id"] == path.stem:
                records[path.stem] = _from_row(row)
    return records


def gather_shard(workspace: Workspace, shard: int, records: Iterable[Record] = ()) -> None:
    """Write a shard's table from its old table, its journal, and ``records`` that no worker could journal."""
    newest = read_shard(workspace, shard) | {record.id: record for record in records}
    workspace.publish_table(workspace.shard_records(shard), to_table(newest[key] for key in sorted(newest)))
    shutil.rmtree(workspace.shard_journal(shard), ignore_errors=True)


def gather_journals(workspace: Workspace) -> None:
    """Turn the journals that a killed run left into tables. The workspace must be locked."""
    for shard in _journaled_shards(workspace):
        gather_shard(workspace, shard)


def read_records(workspace: Workspace, columns: list[str] | None = None) -> pa.Table:
    """Read the newest record of every image, as one table with the given columns of `SCHEMA`.

    Shards in progress are gathered in memory only. An image that came back after it was replaced may have two records;
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
    table = pa.concat_tables(tables)
    if "id" not in names or pc.count_distinct(table["id"]).as_py() == table.num_rows:
        return table
    backwards = table["id"].combine_chunks().take(np.arange(table.num_rows)[::-1])
    last = pc.index_in(backwards, backwards).to_numpy() == np.arange(table.num_rows)
    return table.filter(pa.array(last[::-1])).combine_chunks()


def checksums_of(workspace: Workspace, ids: Iterable[str]) -> dict[str, dict[str, str]]:
    """Read the checksums of the pictures of some images, by id (see `Record`)."""
    records = read_records(workspace, ["id", "checksums"])
    records = records.filter(pc.is_in(records["id"], pa.array(ids, pa.string())))
    return {row["id"]: dict(row["checksums"] or ()) for row in records.to_pylist()}


def shards_of_records(workspace: Workspace) -> pa.Table:
    """List the id of every image that has a record in a finished shard, and that shard: columns ``id``, ``shard``."""
    found = [pa.table({"id": pa.array([], pa.string()), "shard": pa.array([], pa.int32())})]
    for shard in finished_shards(workspace):
        ids = read_table(workspace.shard_records(shard), SCHEMA, ["id"])["id"]
        found.append(pa.table({"id": ids, "shard": pa.array(np.full(len(ids), shard), pa.int32())}))
    return pa.concat_tables(found[::-1])  # of two records, that of the later shard is the newer one


def finished_shards(workspace: Workspace) -> list[int]:
    """List the shards that have a table, sorted."""
    return sorted(int(path.stem) for path in paths_in(workspace.records, f"{_NUMBER}.parquet"))


def to_table(records: Iterable[Record]) -> pa.Table:
    """Return records as rows of `SCHEMA`."""
    rows = [_as_row(one) | {name: list(getattr(one, name).items()) for name in _MAPS} for one in records]
    return pa.Table.from_pylist(rows, SCHEMA)


def flags_of(values: pa.Array) -> Flags:
    """Return Arrow booleans as NumPy ones; null is false."""
    return np.asarray(pc.fill_null(values, False).to_numpy(zero_copy_only=False), dtype=bool)


def _journaled_shards(workspace: Workspace) -> list[int]:
    return sorted(int(folder.name) for folder in paths_in(workspace.journal, _NUMBER))


def _as_row(record: Record) -> dict[str, Any]:
    """Convert a record to a row, in which every further product has its own column."""
    fields = {name: value for name, value in record.__dict__.items() if name != "further"}
    return fields | {column: record.further.get(name) for column, name in _FURTHER_COLUMNS.items()}


def _from_row(row: dict[str, Any]) -> Record:
    """Convert a row of a table or of a journal to a record."""
    keys = {name: row.pop(column, None) for column, name in _FURTHER_COLUMNS.items()}
    maps: dict[str, Any] = {name: dict(row.pop(name, None) or {}) for name in _MAPS}
    regions = row.pop("regions", None) or []
    further = {name: key for name, key in keys.items() if key}
    return Record(**row, **maps, regions=regions, further=further)


class Held(NamedTuple):
    """The files of a workspace for some manifest rows, by row."""

    masks: Flags  # whether there is a mask
    pictures: npt.NDArray[np.int8]  # the number of pictures in the dataset, up to ``len(DATASET)``
    arrays: dict[str, Flags]  # whether there is an array, by the name of the array
    marked: Flags  # whether a person has marked an artifact

    def filter(self, flags: Flags) -> Held:
        """Keep some rows."""
        arrays = {name: held[flags] for name, held in self.arrays.items()}
        return Held(self.masks[flags], self.pictures[flags], arrays, self.marked[flags])


def held_by(workspace: Workspace, rows: pa.Table, gan_sr_key: str | None, *, each: bool = False) -> Held:
    """Look up which files a workspace holds for some manifest rows.

    Args:
        workspace: The workspace.
        rows: The rows.
        gan_sr_key: The key of the GAN results in which people may have marked artifacts; None for results in files,
            whose images never count as marked by people: only the dataset of a mined corpus depends on that.
        each: Look for the files of each row instead of listing the whole workspace; this is faster for few rows.
    """
    names, ids = rows["name"].combine_chunks(), rows["id"].combine_chunks()
    looked_for = names.to_pylist() if each else []

    def pictures(folder: Path) -> Flags:
        """Flag the rows with a picture in a folder, but for pictures that a power cut has emptied."""
        found = [] if each or not folder.is_dir() else list(_pngs(folder))
        for name in looked_for if folder.is_dir() else ():
            with contextlib.suppress(OSError):
                if (folder / f"{name}.png").stat().st_size:
                    found.append(name)
        return flags_of(pc.is_in(names, pa.array(found, pa.string())))

    each_stored = (f"{one}/{name}" for one in ids.to_pylist() for name in _folders(workspace.group(one)))
    arrays = pa.array(each_stored if each else _stored_arrays(workspace.maps), pa.string())
    marked = np.zeros(len(ids), bool)
    if gan_sr_key:
        human = human_mask_rows(workspace, gan_sr_key)
        marked = flags_of(pc.is_in(ids, human.filter(pc.greater(human["pixels"], 0))["id"].combine_chunks()))
    return Held(
        pictures(workspace.masks),
        np.sum([pictures(workspace.dataset(kind, "").parent) for kind in DATASET], axis=0, dtype=np.int8),
        {name: flags_of(pc.is_in(pc.binary_join_element_wise(ids, name, "/"), arrays)) for name in ARRAYS},
        marked,
    )


def is_text(name: str) -> bool:
    """Check whether the name of a file is valid text, as the names of images are."""
    return name.isascii() or not any("\ud800" <= character <= "\udfff" for character in name)


def _folders(folder: Path | str) -> list[str]:
    """List the names of the folders in a folder; none where that does not exist."""
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if entry.is_dir() and is_text(entry.name)]
    except OSError:
        return []


def _stored_arrays(maps: Path) -> Iterator[str]:
    """Yield ``ID/NAME`` for each array that is stored below a folder."""
    for part in _folders(maps):
        for group in _folders(place := os.path.join(maps, part)):
            image_id = group.removesuffix(".zarr")
            for name in _folders(os.path.join(place, group)):
                yield f"{image_id}/{name}"


def _pngs(folder: Path | str, prefix: str = "") -> Iterator[str]:
    """Yield the names of the pictures below a folder, but for those that a power cut has emptied.

    A folder that this user may not enter counts as empty: writing there fails with a clear error.
    """
    below = []
    with contextlib.suppress(PermissionError), os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if not is_text(name):
                continue
            if entry.is_dir():
                below.append(name)
            elif entry.stat().st_size:
                yield prefix + name.removesuffix(".png")
    for name in below:
        yield from _pngs(os.path.join(folder, name), f"{prefix}{name}/")
