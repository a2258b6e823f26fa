"""What is left to do: the manifest and the records held against what a run wants. The workspace alone decides."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from desra_core.detection.class_weights import Weights
from desra_core.errors import Failure
from desra_core.images.codec import most_pixels
from desra_core.planning.keys import Target, check_kind, check_models, save_settings, target_of
from desra_core.settings import CorpusSettings, min_area_pixels
from desra_core.workspace import DATASET, Workspace
from desra_core.workspace.inventory import Flags, OnDisk, flags_of
from desra_core.workspace.manifest import Corpus, ImageRef, asked_for, image_refs, read_manifest, role_files, scan
from desra_core.workspace.matching import FAILURES
from desra_core.workspace.records import gather_journals, read_records

_COLUMNS = [
    "id", "height", "width", "similarity_key", "similarity_kept", "segmentation_key", "labels_kept", "labels_hash",
    "weighting_key", "proven_weight", "threshold", "min_area", "mask_key", "artifact_pixels",
    "failed_stage", "failed_key", "subject", "reason", "remedy", "transient",
]  # fmt: skip


class Work(NamedTuple):
    """Per manifest row, which products are to be made, and where that stands.

    ``similarity`` stands for the results too, where they are inferred: one stage makes both.
    """

    similarity: Flags
    segmentation: Flags
    mask: Flags
    failed: Flags
    dropped: Flags

    @property
    def pending(self) -> Flags:
        """Rows with anything to do."""
        return self.similarity | self.segmentation | self.mask


def assess(rows: pa.Table, records: pa.Table, target: Target, on_disk: OnDisk) -> Work:
    """Hold manifest rows against their records.

    Parameters
    ----------
    rows
        Rows of a manifest.
    records
        Records of any images, columns of `desra_core.workspace.records.SCHEMA`.
    target
        What is wanted.
    on_disk
        What the workspace holds; a record whose files are gone does not count.

    Returns
    -------
    ``failed`` are images that failed for good under the very same settings; ``dropped`` those that are computed
    again only because their maps were not kept.
    """
    record = _records(rows, records.select(_COLUMNS))
    same_labels, same_similarity, empty, current = _standing(rows, record, target)
    ids = rows["id"].combine_chunks()
    has_similarity = same_similarity & flags_of(record["similarity_kept"]) & on_disk.has_array(ids, "similarity")
    has_labels = _equal(record, "segmentation_key", target.segmentation_key) & flags_of(record["labels_kept"])
    has_labels &= on_disk.has_array(ids, "labels")
    has_pair = np.ones(rows.num_rows, bool)
    exported = has_pair
    # All of these is kept: what a person has marked is trained on, whatever the detector says.
    everything = np.full(rows.num_rows, target.keep == "all")
    if target.super_resolves:
        has_pair = on_disk.has_array(ids, "mse_sr") & on_disk.has_array(ids, "gan_sr")
        everything |= on_disk.marked_by_people(ids, target.gan_sr_key)
        wanted = flags_of(pc.greater(record["artifact_pixels"], 0)) | everything
        exported = on_disk.count_pictures(rows["name"].combine_chunks()) == np.where(wanted, len(DATASET), 0)
    masked = current & on_disk.has_mask(rows["name"].combine_chunks())
    intact = has_similarity | ~flags_of(record["similarity_kept"])
    mapped = has_similarity & (has_labels | (not target.segments))
    kept = (intact | empty) if target.keep == "artifacts" else mapped
    kept = np.where(everything, mapped & has_pair, kept)

    failed = flags_of(record["failed_stage"].is_valid())
    for_good = failed & _equal(record, "failed_key", target.mask_key) & same_labels & ~flags_of(record["transient"])
    pending = ~(masked & kept & exported & ~failed) & ~for_good
    skippable = empty & intact & (target.keep == "artifacts") & ~everything
    similarity = pending & ~(has_similarity & has_pair) & ~skippable
    return Work(
        similarity=similarity,
        segmentation=pending & ~has_labels & ~skippable & target.segments,
        mask=pending,
        failed=for_good,
        dropped=similarity & same_similarity & ~failed & ~flags_of(record["similarity_kept"]),
    )


def _records(rows: pa.Table, records: pa.Table) -> dict[str, pa.Array]:
    """The record of each manifest row, by column; nulls where there is none."""
    index = pc.index_in(rows["id"].combine_chunks(), records["id"].combine_chunks())
    return {name: records[name].combine_chunks().take(index) for name in records.column_names}


def _equal(record: dict[str, pa.Array], column: str, value: str) -> Flags:
    return flags_of(pc.equal(record[column], value))


class _Standing(NamedTuple):
    """What records say of images, held against a target.

    ``empty`` are images whose mask is known to be empty, whether it is published or not; of ``current`` ones the mask
    that was published is the one that is wanted: it was made so, or an empty one is still right under settings that are
    only stricter.
    """

    same_labels: Flags
    same_similarity: Flags
    empty: Flags
    current: Flags


def _standing(rows: pa.Table, record: dict[str, pa.Array], target: Target) -> _Standing:
    """Hold the records of manifest rows against a target: the one place that knows what makes an image clean."""

    def number(column: str) -> npt.NDArray[np.float64]:
        return np.asarray(pc.cast(record[column], pa.float64()).to_numpy(zero_copy_only=False))

    same_labels = np.ones(rows.num_rows, bool)
    if target.reads_labels:
        same_labels = flags_of(pc.equal(record["labels_hash"], rows["labels_hash"].combine_chunks()))
    same_similarity = _equal(record, "similarity_key", target.similarity_key) & (
        same_labels | (not target.labels_first)
    )
    same_weighting = _equal(record, "weighting_key", target.weighting_key) & same_labels
    stricter = (number("threshold") >= target.threshold) & (number("min_area") <= _min_areas(record, target))
    weighted_alike = same_weighting | (number("proven_weight") <= target.min_weight)
    empty = same_similarity & (number("artifact_pixels") == 0) & stricter & weighted_alike
    published = flags_of(record["mask_key"].is_valid())
    current = (_equal(record, "mask_key", target.mask_key) & same_labels) | (empty & published)
    return _Standing(same_labels, same_similarity, empty, current)


def done_images(workspace: Workspace, target: Target) -> pa.Table:
    """The images that are done under the settings of the latest run, a row for each present name, sorted by name.

    Columns are name, id, height, width, artifact_pixels and regions (as in `workspace.records.SCHEMA`). An image
    without artifact pixels is clean under these settings, whichever older ones it was done with.
    """
    manifest = read_manifest(workspace)
    assert manifest is not None
    rows = manifest.filter(manifest["present"])
    records = read_records(workspace, [*_COLUMNS, "regions"])
    record = _records(rows, records)
    done = pa.array(_standing(rows, record, target).current & flags_of(record["failed_stage"].is_null()))
    columns = {"name": rows["name"], "id": rows["id"]}
    columns |= {name: record[name] for name in ("height", "width", "artifact_pixels", "regions")}
    return pa.table(columns).filter(done).combine_chunks()


class Plan:
    """The work of a run, by shard.

    Attributes
    ----------
    target
        What is wanted.
    images, failed, pending, dropped
        Names in the run; those that failed for good before; those with anything to do; those among them that are
        computed again only because a looser setting needs maps that ``--keep`` dropped.
    failures, retries
        Why those failed, and why some of the pending ones did when they were last tried (schema
        `desra_core.workspace.matching.FAILURES`).
    shards
        Number of pending names by shard, of the shards that have any.
    """

    def __init__(
        self, manifest: pa.Table, rows: pa.Table, work: Work, target: Target, failures: pa.Table, retries: pa.Table
    ) -> None:
        self.target = target
        self.failures = failures
        self.retries = retries
        self.images = rows.num_rows
        self.failed = int(work.failed.sum())
        self.dropped = int(work.dropped.sum())
        self._manifest = manifest
        self._rows = rows
        # An image with several names is done under all of them or under none.
        pending = rows.filter(pc.is_in(rows["id"], rows["id"].filter(pa.array(work.pending)).combine_chunks()))
        self.pending = pending.num_rows
        self._role = "lr" if target.super_resolves else "gan_sr"
        self._pending = pending.select([f"{self._role}_path"])
        shards, counts = np.unique(pending["shard"].to_numpy(), return_counts=True)
        self.shards: dict[int, int] = dict(zip(shards.tolist(), counts.tolist(), strict=True))

    @property
    def idle_shards(self) -> list[int]:
        """The shards without anything to do, sorted."""
        every: list[int] = np.unique(self._rows["shard"].to_numpy()).tolist()
        return [number for number in every if number not in self.shards]

    @property
    def done(self) -> int:
        """Names whose mask is there and up to date."""
        return int(self.images - self.failed - self.pending)

    def most_pixels(self) -> int:
        """The pixels of the largest photo, or GAN result where that is a file, with anything to do, by the headers."""
        return most_pixels(role_files(self._pending, self._role))

    def rows(self, shard: int) -> pa.Table:
        """The manifest rows of one shard that are part of the run, finished ones included."""
        return self._rows.filter(pc.equal(self._rows["shard"], shard))

    def image_refs(self, shard: int) -> list[ImageRef]:
        """The images of these rows, each at every name that it ever had."""
        return image_refs(self.rows(shard), self._manifest.filter(pc.equal(self._manifest["shard"], shard)))


def make_plan(workspace: Workspace, manifest: pa.Table, target: Target, *, limit: int | None = None) -> Plan:
    """Find out what a run has to do; nothing is computed or written."""
    rows = asked_for(manifest)
    rows = rows.slice(0, rows.num_rows if limit is None else limit)
    records = read_records(workspace, _COLUMNS)
    work = assess(rows, records, target, OnDisk.of(workspace))
    failures, retries = (failure_table(rows.filter(pa.array(flags)), records) for flags in (work.failed, work.pending))
    return Plan(manifest, rows, work, target, failures, retries)


class Prepared(NamedTuple):
    """A run that may begin; ``scanned`` is None where the manifest was trusted."""

    workspace: Workspace
    plan: Plan
    weights: Weights
    scanned: Corpus | None


def prepare(
    settings: CorpusSettings, *, rescan: bool = True, on_hashed: Callable[[int, int], None] | None = None
) -> Prepared:
    """Scan the folders, resolve the settings and find out what there is to do. The workspace must be locked.

    Parameters
    ----------
    settings
        What is wanted.
    rescan
        Look for new and changed files first; otherwise trust the manifest.
    on_hashed
        As for `desra_core.workspace.manifest.scan`.

    Raises
    ------
    UsageError
        As `target_of`, `check_kind`, `check_models` and `desra_core.workspace.manifest.scan`.
    """
    workspace = Workspace(settings.workspace)
    check_kind(workspace, settings)
    target, weights = target_of(settings)
    check_models(workspace, settings, target)
    gather_journals(workspace)
    manifest = None if rescan else read_manifest(workspace)
    scanned = None
    if manifest is None:
        scanned = scan(
            settings.sources,
            workspace,
            shard_size=settings.shard_size,
            limit=settings.limit,
            on_hashed=on_hashed,
        )
        manifest = scanned.manifest
    save_settings(workspace, settings, target)
    plan = make_plan(workspace, manifest, target, limit=settings.limit)
    return Prepared(workspace, plan, weights, scanned)


def failure_table(manifest: pa.Table, records: pa.Table) -> pa.Table:
    """Failed records as rows of the schema `desra_core.workspace.matching.FAILURES`, one per name."""
    failed = records.filter(records["failed_stage"].is_valid())
    index = pc.index_in(manifest["id"].combine_chunks(), failed["id"].combine_chunks())
    rows = manifest.filter(index.is_valid())
    record = failed.take(index.drop_null())
    columns = [rows["name"], record["failed_stage"], *(record[field] for field in Failure._fields)]
    return pa.table(columns, schema=FAILURES)


def _min_areas(record: dict[str, pa.Array], target: Target) -> npt.NDArray[np.float64]:
    if not target.min_area.endswith("%"):
        return np.full(len(record["id"]), float(target.min_area))
    sides = [pc.fill_null(record[side], 0).to_numpy() for side in ("height", "width")]
    sizes, which = np.unique(np.stack(sides), axis=1, return_inverse=True)
    areas = [min_area_pixels(target.min_area, int(h), int(w)) if h else -1.0 for h, w in sizes.T]
    return np.array(areas, np.float64)[which.ravel()]
