"""Plan a run: compare the manifest, the records and the files of a workspace with the target of the run."""

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
from desra_core.planning.keys import check_kind, check_models, save_settings, target_of
from desra_core.settings import CorpusSettings, min_area_pixels
from desra_core.workspace import DATASET, Workspace
from desra_core.workspace.inventory import Held, held_by
from desra_core.workspace.manifest import Corpus, ImageRef, asked_for, image_refs, read_manifest, role_files, scan
from desra_core.workspace.matching import FAILURES
from desra_core.workspace.products import Target, kept_whole, stages_for
from desra_core.workspace.records import SCHEMA, Flags, flags_of, gather_journals, read_records

# The columns of the records that decide whether there is anything to do.
COLUMNS = [name for name in SCHEMA.names if name not in ("icc_profile", "further_pages", "tile", "regions", "seconds")]


class Work(NamedTuple):
    """The work that is left, as flags per manifest row.

    Attributes:
        lacking: The rows for which a stage must run, by stage name. The mask stage runs last, for all these rows.
        failed: Images that failed for good under the very same settings.
        dropped: Images that are computed again only because their maps were not kept.
        whole: Images of which everything is kept, see `kept_whole`.
    """

    lacking: dict[str, Flags]
    failed: Flags
    dropped: Flags
    whole: Flags

    @property
    def pending(self) -> Flags:
        """Rows with anything to do."""
        return self.lacking["mask"]


class Standing:
    """Compare the records of manifest rows with a target: arrays of one flag per row.

    Attributes:
        same_labels: The label file is the one that was read, or none is read.
        same_similarity: The similarity map was computed under these settings.
        clean: The mask is known to be empty, published or not: the image had an empty mask under settings that mark at
            least as much, namely with the same class weights or with all weights from ``proven_weight`` up.
        current: The published mask is the one that the target asks for.
        failed, failed_for_good: The image failed; it would fail again, since file and settings are the same.
    """

    def __init__(self, rows: pa.Table, records: pa.Table, target: Target) -> None:
        index = pc.index_in(rows["id"].combine_chunks(), records["id"].combine_chunks())
        self.columns = {name: records[name].combine_chunks().take(index) for name in records.column_names}
        self.same_labels = np.ones(rows.num_rows, bool)
        if target.reads_labels:
            self.same_labels = flags_of(pc.equal(self.columns["labels_hash"], rows["labels_hash"].combine_chunks()))
        self.same_similarity = self.equal("similarity_key", target.similarity_key)
        if target.labels_first:
            self.same_similarity &= self.same_labels
        same_weighting = self.equal("weighting_key", target.weighting_key) & self.same_labels
        weighted_alike = same_weighting | (self._number("proven_weight") <= target.min_weight)
        as_strict = self._number("threshold") >= target.threshold
        as_strict &= self._number("min_area") <= _min_areas(self.columns, target)
        self.clean = self.same_similarity & (self._number("artifact_pixels") == 0) & as_strict & weighted_alike
        made_so = self.equal("mask_key", target.mask_key) & self.same_labels
        self.current = made_so | (self.clean & flags_of(self.columns["mask_key"].is_valid()))
        self.failed = flags_of(self.columns["failed_stage"].is_valid())
        self.failed_for_good = self.failed & self.equal("failed_key", target.run_key) & self.same_labels
        self.failed_for_good &= ~self.says("transient")

    def equal(self, column: str, value: str) -> Flags:
        """Flag the rows whose record has this value."""
        return flags_of(pc.equal(self.columns[column], value))

    def says(self, column: str) -> Flags:
        """Flag the rows whose record has true in this column."""
        return flags_of(self.columns[column])

    def _number(self, column: str) -> npt.NDArray[np.float64]:
        return np.asarray(pc.cast(self.columns[column], pa.float64()).to_numpy(zero_copy_only=False))


def assess(rows: pa.Table, records: pa.Table, target: Target, held: Held) -> Work:
    """Find out which manifest rows lack which products.

    Args:
        rows: Rows of a manifest.
        records: Records of any images, columns of `desra_core.workspace.records.SCHEMA`.
        target: The keys of the run.
        held: The files of the workspace for these rows; a record whose files are gone does not count.
    """
    standing = Standing(rows, records.select(COLUMNS), target)
    map_claimed = standing.says("similarity_kept")
    artifact = flags_of(pc.greater(standing.columns["artifact_pixels"], 0))
    whole = kept_whole(target.keep, artifact, held.marked)
    # Images that a person has marked are kept whole under any --keep: training reads them.
    forced = kept_whole(target.keep, np.zeros(rows.num_rows, bool), held.marked)

    has_similarity = standing.same_similarity & map_claimed & held.arrays["similarity"]
    has_pair = held.arrays["mse_sr"] & held.arrays["gan_sr"] | (not target.super_resolves)
    has = {
        product.name: standing.equal(product.column, product.key(target) or "")
        & (standing.says(product.kept) if product.kept else True)
        & held.arrays[product.arrays[-1]]
        for product in stages_for(target)
        if product.arrays and "similarity" not in product.arrays
    }
    all_rows = np.ones(rows.num_rows, bool)
    has_further = np.logical_and.reduce([all_rows, *(has[name] for name in has if name != "segmentation")])
    all_maps = np.logical_and.reduce([has_similarity, *has.values()])
    intact = has_similarity | ~map_claimed

    kept = np.where(forced, all_maps & has_pair, all_maps)
    if target.keep == "artifacts":
        kept = np.where(forced, kept, (intact & (has_further | ~map_claimed)) | standing.clean)
    exported = (held.pictures == np.where(whole, len(DATASET), 0)) | (not target.super_resolves)
    done = standing.current & held.masks & kept & exported & ~standing.failed
    pending = ~done & ~standing.failed_for_good
    # An image that is known to be clean needs only its mask, where maps of clean images are not kept.
    mask_only = standing.clean & intact & (target.keep == "artifacts") & ~forced
    similarity = pending & ~(has_similarity & has_pair) & ~mask_only
    lacking = {name: pending & ~made & ~mask_only for name, made in has.items()}
    lacking |= {"super_resolution" if target.super_resolves else "similarity": similarity, "mask": pending}
    dropped = similarity & standing.same_similarity & ~standing.failed & ~map_claimed
    return Work(lacking, standing.failed_for_good, dropped, whole)


def done_images(workspace: Workspace, target: Target) -> pa.Table:
    """List the images that are done under the settings of the latest run, a row for each present name, by name.

    Columns are name, id, height, width, artifact_pixels and regions (as in `workspace.records.SCHEMA`). An image
    without artifact pixels is clean under these settings, even if it was done under older ones.
    """
    manifest = read_manifest(workspace)
    assert manifest is not None
    rows = manifest.filter(manifest["present"])
    standing = Standing(rows, read_records(workspace, [*COLUMNS, "regions"]), target)
    columns = {"name": rows["name"], "id": rows["id"]}
    columns |= {name: standing.columns[name] for name in ("height", "width", "artifact_pixels", "regions")}
    return pa.table(columns).filter(pa.array(standing.current & ~standing.failed)).combine_chunks()


class Plan:
    """The work of a run, by shard.

    Attributes:
        target: The keys of the run.
        images: Number of names in the run.
        failed: Names that failed for good before.
        pending: Names with anything to do.
        dropped: Pending names that are computed again only because a looser setting needs maps that ``--keep`` dropped.
        failures, retries: Why the failed names failed, and why pending names failed when they were last tried (schema
            `desra_core.workspace.matching.FAILURES`).
        shards: Number of pending names by shard, of the shards that have any.
    """

    def __init__(self, manifest: pa.Table, rows: pa.Table, records: pa.Table, target: Target, held: Held) -> None:
        work = assess(rows, records, target, held)
        self.target = target
        self.failures = failure_table(rows.filter(pa.array(work.failed)), records)
        self.retries = failure_table(rows.filter(pa.array(work.pending)), records)
        self.images = rows.num_rows
        self.failed = int(work.failed.sum())
        self.dropped = int(work.dropped.sum())
        self._manifest = manifest
        self._rows = rows
        # An image with several names is done under all of them or under none.
        pending = flags_of(pc.is_in(rows["id"], rows["id"].filter(pa.array(work.pending)).combine_chunks()))
        self._pending = rows.filter(pa.array(pending))
        self._held = held.filter(pending)
        self.pending = self._pending.num_rows
        shards, counts = np.unique(self._pending["shard"].to_numpy(), return_counts=True)
        self.shards: dict[int, int] = dict(zip(shards.tolist(), counts.tolist(), strict=True))

    @property
    def idle_shards(self) -> list[int]:
        """List the shards without anything to do, sorted."""
        every: list[int] = np.unique(self._rows["shard"].to_numpy()).tolist()
        return [number for number in every if number not in self.shards]

    @property
    def done(self) -> int:
        """Number of names with a current mask."""
        return int(self.images - self.failed - self.pending)

    def most_pixels(self) -> int:
        """Read from headers the pixel count of the largest pending photo, or GAN result where results are files."""
        role = "lr" if self.target.super_resolves else "gan_sr"
        return most_pixels(role_files(self._pending.select([f"{role}_path"]), role))

    def rows(self, shard: int) -> pa.Table:
        """Get the manifest rows of one shard that are part of the run, finished ones included."""
        return self._rows.filter(pc.equal(self._rows["shard"], shard))

    def pending_rows(self, shard: int) -> tuple[pa.Table, Held]:
        """Get the manifest rows of one shard with anything to do, and the files that the workspace held for them."""
        flags = pc.equal(self._pending["shard"], shard).combine_chunks()
        return self._pending.filter(flags), self._held.filter(flags_of(flags))

    def image_refs(self, shard: int) -> list[ImageRef]:
        """Get the images of a shard with anything to do, each at every name that it ever had."""
        rows, _ = self.pending_rows(shard)
        return image_refs(rows, self._manifest.filter(pc.equal(self._manifest["shard"], shard)))

    def after(self, workspace: Workspace) -> Plan:
        """Plan again after the run, for its pending images only: the lock has kept all others as they were."""
        if not self.pending:
            return self
        held = held_by(workspace, self._pending, self.target.gan_sr_key, each=True)
        after = Plan(self._manifest, self._pending, read_records(workspace, COLUMNS), self.target, held)
        after.images, after.failed = self.images, self.failed + after.failed
        after._rows, after.failures = self._rows, pa.concat_tables([self.failures, after.failures])
        return after


def make_plan(workspace: Workspace, manifest: pa.Table, target: Target, *, limit: int | None = None) -> Plan:
    """Plan a run over a manifest; nothing is computed or written."""
    rows = asked_for(manifest).slice(0, limit)
    held = held_by(workspace, rows, target.gan_sr_key)
    return Plan(manifest, rows, read_records(workspace, COLUMNS), target, held)


class Prepared(NamedTuple):
    """A run that may begin; ``scanned`` is None where the manifest was trusted."""

    workspace: Workspace
    plan: Plan
    weights: Weights
    scanned: Corpus | None


def prepare(
    settings: CorpusSettings, *, rescan: bool = True, on_hashed: Callable[[int, int], None] | None = None
) -> Prepared:
    """Scan the folders, resolve the settings and plan the run. The workspace must be locked.

    Args:
        settings: Settings of the run.
        rescan: Look for new and changed files first; otherwise trust the manifest.
        on_hashed: As for `desra_core.workspace.manifest.scan`.

    Raises:
        UsageError: As `target_of`, `check_kind`, `check_models` and `desra_core.workspace.manifest.scan`.
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
            settings.sources, workspace, shard_size=settings.shard_size, limit=settings.limit, on_hashed=on_hashed
        )
        manifest = scanned.manifest
    save_settings(workspace, settings, target)
    plan = make_plan(workspace, manifest, target, limit=settings.limit)
    return Prepared(workspace, plan, weights, scanned)


def failure_table(manifest: pa.Table, records: pa.Table) -> pa.Table:
    """Turn failed records into rows of the schema `desra_core.workspace.matching.FAILURES`, one per name."""
    rows, failed = with_records(manifest, records.filter(records["failed_stage"].is_valid()))
    columns = [rows["name"], failed["failed_stage"], *(failed[field] for field in Failure._fields)]
    return pa.table(columns, schema=FAILURES)


def with_records(manifest: pa.Table, records: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Return the rows of a manifest that have a record, and the record of each row."""
    index = pc.index_in(manifest["id"].combine_chunks(), records["id"].combine_chunks())
    return manifest.filter(index.is_valid()).combine_chunks(), records.take(index.drop_null()).combine_chunks()


def _min_areas(record: dict[str, pa.Array], target: Target) -> npt.NDArray[np.float64]:
    if not target.min_area.endswith("%"):
        return np.full(len(record["id"]), float(target.min_area))
    sides = [pc.fill_null(record[side], 0).to_numpy() for side in ("height", "width")]
    sizes, which = np.unique(np.stack(sides), axis=1, return_inverse=True)
    areas = [min_area_pixels(target.min_area, int(h), int(w)) if h else -1.0 for h, w in sizes.T]
    return np.array(areas, np.float64)[which.ravel()]
