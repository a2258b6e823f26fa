"""Plan a run: resolve its settings to cache keys, and compare these with the records and files of the workspace.

First come the keys and the settings that a workspace keeps, then the plan: which images lack which products. At the end
are the tables for readers, which are made from the same manifest and records: regions, failures, dataset.
"""

from __future__ import annotations

import contextlib
import platform
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from desra_core import __version__
from desra_core.detection.class_weights import Weights, class_names, load_weights
from desra_core.detection.detectors import DEFAULT, NEEDED_INPUTS, AppliedDetector
from desra_core.errors import Failure, UsageError
from desra_core.files import as_json, content_key, fingerprint, read_document
from desra_core.images.codec import most_pixels
from desra_core.images.further_decoders import readable_now
from desra_core.networks.checkpoints import BICUBIC, check_pair, load_pair
from desra_core.networks.segmentation import segmenter_key, try_segmenter
from desra_core.planning.profiles import honour_profiles
from desra_core.planning.reference import describe_reference, is_twin_of
from desra_core.settings import CorpusSettings, Detection, Mining, detector_of, min_area_pixels
from desra_core.workspace import DATASET, Workspace, products, read_table
from desra_core.workspace.human_masks import read_human_masks
from desra_core.workspace.manifest import Corpus, ImageRef, asked_for, image_refs, read_manifest, role_files, scan
from desra_core.workspace.matching import FAILURES, match
from desra_core.workspace.products import REGION_FIELDS, SCHEMA, Flags, Held, Target, flags_of, held_by, read_records

# Raise a version when the meaning or a bit of that product changes: all products that depend on it are made again.
DECODING_VERSION = 2
SUPER_RESOLUTION_VERSION = 1
BICUBIC_VERSION = 2
RRDB_VERSION = 2  # of results of an RRDBNet, which alone had another halo in version 1
MASK_VERSION = 1

_KINDS: dict[str, type[CorpusSettings]] = {kind.verb: kind for kind in (Detection, Mining)}
# Packages on whose versions results depend.
PACKAGES = (
    "torch", "openvino", "spandrel", "mmsegmentation", "numpy", "opencv-python", "pillow", "tifffile", "imagecodecs",
    "pillow-heif", "pillow-jxl-plugin", "rawpy",
)  # fmt: skip

REGIONS = pa.schema(
    [pa.field("image", pa.string()), pa.field("id", pa.string()), *REGION_FIELDS, pa.field("class_name", pa.string())]
)
# Paths are relative to the dataset. Rows of equal ``made_under`` come from the same models and settings; it is null
# where the mask is empty. Where ``mask_by`` is ``person``, pixels and regions are those of the human mask, where it is
# ``detector``, of the detector's mask; the severity is always the detector's.
IMAGES = pa.schema(
    [pa.field(name, pa.string()) for name in ("image", "id", *DATASET)]
    + [pa.field(name, pa.int32()) for name in ("height", "width")]
    + [pa.field("artifact_pixels", pa.int64()), pa.field("regions", pa.int32()), pa.field("severity", pa.float64())]
    + [pa.field("made_under", pa.string()), pa.field("mask_by", pa.string())]
)

_TABLE_COLUMNS = [
    "id", "height", "width", "artifact_pixels", "regions", "mask_key", "failed_stage", "subject", "reason", "remedy",
]  # fmt: skip

_OLD_CMYK = "has the colour model CMYK"  # the reason of versions that refused CMYK even with a profile
_UNPLANNED = ("further_pages", "tile", "regions", "seconds", "checksums", "agreement")
# The columns of the records that decide whether there is anything to do.
COLUMNS = [name for name in SCHEMA.names if name not in _UNPLANNED]


def target_of(settings: CorpusSettings) -> tuple[Target, Weights]:
    """Resolve settings to keys and class weights.

    Raises:
        UsageError: Weights without labels, no MSE model, one model in both roles, a method that lacks its inputs, or an
            unreadable file of weights, config, checkpoint or detector.
    """
    detector = detector_of(settings)
    weights = load_weights(_origin_of_weights(settings, detector))
    mse_sr_key = gan_sr_key = None
    if isinstance(settings, Mining):
        if lacks_twin(settings):
            # A mistyped path is what to say first.
            match(settings.sources, settings.workspace)
            content_key(settings.gan_model)
            raise no_twin(settings)
        mse_sr_key, gan_sr_key = result_keys(settings.mse_model, settings.gan_model, settings.engine)
        if mse_sr_key == gan_sr_key:
            reason = f"is the same as {settings.gan_model}, the GAN model"
            raise UsageError("--mse-model", reason, "give its MSE-trained twin")
    # "none", "labels" where label files are read, or "mmseg:KEY". The key of computed labels covers the GAN results.
    segmentation_key = settings.segmenter.partition(":")[0]
    if segmentation_key == "mmseg":
        segmented = fingerprint(segmenter_key(settings.segmenter), gan_sr_key or DECODING_VERSION)
        segmentation_key = f"mmseg:{segmented}"
    # Results that are files need no key: the id of an image is the hash of their content.
    results = (mse_sr_key, gan_sr_key) if gan_sr_key else ()
    labels_first = "labels" in detector.inputs
    labels_key = segmentation_key if labels_first else None
    similarity_key = fingerprint(*detector.scores_key(DECODING_VERSION, settings.window, labels_key), *results)
    weighting_key = fingerprint("weighting", segmentation_key, weights.key)
    threshold = -detector.score_threshold
    noticed: tuple[object, ...] = ()
    if settings.severity_model is not None:
        from desra_core.detection.severity import load_severity_model

        load_severity_model(settings.severity_model)
        noticed = content_key(settings.severity_model), settings.min_noticed
    parts = MASK_VERSION, similarity_key, weighting_key, threshold, settings.min_area, *noticed
    target = Target(
        similarity_key=similarity_key,
        segmentation_key=segmentation_key,
        weighting_key=weighting_key,
        min_weight=float(weights.values.min()),
        threshold=threshold,
        min_area=settings.min_area,
        keep=settings.keep,
        keep_mse=isinstance(settings, Mining) and settings.keep_mse,
        mask_key=fingerprint("mask", *parts),
        mse_sr_key=mse_sr_key,
        gan_sr_key=gan_sr_key,
        method=detector.name,
        labels_first=labels_first,
    )
    return target, weights


def _origin_of_weights(settings: CorpusSettings, detector: AppliedDetector) -> str:
    """Choose ``published``, ``none`` or a file, after checking that weights and detector get all that they need."""
    given = {"lr": settings.sources.lr is not None, "labels": settings.segmenter != "none"}
    for name in detector.inputs:
        if not given[name]:
            needed, remedy = NEEDED_INPUTS[name]
            raise UsageError("--method", f"{detector.name} needs {needed}", remedy)
    if settings.weights in (None, "none"):
        return "published" if settings.weights is None and given["labels"] and detector.weighs_classes else "none"
    if not detector.weighs_classes:
        raise UsageError("--weights", f"{settings.weights} is for {DEFAULT}, not for {detector.name}", "drop --weights")
    if not given["labels"]:
        remedy = "add --labels or --segmenter, or drop --weights"
        raise UsageError("--weights", f"{settings.weights} needs class labels", remedy)
    return settings.weights


def result_key(model: Path, engine: str) -> str:
    """Return the cache key of the results of a checkpoint (raises `UsageError` where it cannot be read)."""
    content = content_key(model)
    return fingerprint("super_resolution", result_version(model, content), DECODING_VERSION, content, engine)


@lru_cache(maxsize=64)
def result_version(model: Path, content: str) -> int:  # noqa: ARG001, content is part of the key of the cache
    """Find the version of a network's results by the names of its tensors, which every format stores as they are."""
    data = model.read_bytes()
    return RRDB_VERSION if b"rdb1.conv1" in data or b"RDB1.conv1" in data else SUPER_RESOLUTION_VERSION


def result_keys(mse_model: str | None, gan_model: Path, engine: str) -> tuple[str | None, str]:
    """Return the cache keys of the results of a reference, None without one, and of a GAN model.

    The key of bicubic results covers the GAN model, because its scale is theirs.

    Raises:
        UsageError: A checkpoint cannot be read.
    """
    mse_sr_key: str | None = None
    if mse_model and mse_model != BICUBIC:
        mse_sr_key = result_key(Path(mse_model), engine)
    gan_sr_key = result_key(gan_model, engine)
    if mse_model == BICUBIC:
        mse_sr_key = fingerprint(reference_key(mse_model), gan_sr_key)
    return mse_sr_key, gan_sr_key


def reference_key(mse_model: str) -> str:
    """Identify a reference: the content of a checkpoint, or bicubic enlargement as this version defines it."""
    return fingerprint(BICUBIC, BICUBIC_VERSION) if mse_model == BICUBIC else content_key(Path(mse_model))


def lacks_twin(mining: Mining) -> bool:
    """Check whether no MSE model is given and the workspace has no twin.

    Raises:
        UsageError: No MSE model is given, and the workspace has the twin of another GAN model.
    """
    twin = Workspace(mining.workspace).twin
    if mining.mse_model != str(twin) or not twin.exists():
        return mining.mse_model == str(twin)
    given = "mse_model" in mining.model_fields_set
    if not given and is_twin_of(mining.gan_model, read_document(twin.with_suffix(".json"))) is False:
        remedy = f"delete {twin.parent} and train one of this model, or give --mse-model"
        raise UsageError(twin, "is the twin of another GAN model", remedy)
    return False


def no_twin(mining: Mining) -> UsageError:
    """Make the error for a run without an MSE model."""
    gan_model, output = (shlex.quote(str(path)) for path in (mining.gan_model, mining.mse_model))
    train = f"desra twin SHARP_PHOTOS --gan-model {gan_model} --output {output}"
    remedy = f"train one: {train}, or let desra cycle do it with --twin-photos SHARP_PHOTOS or --self"
    return UsageError("--mse-model", "is not given, and the workspace has no twin of the GAN model", remedy)


def save_settings(workspace: Workspace, settings: CorpusSettings, target: Target) -> None:
    """Write the settings and keys of a run, its reference in words, and the versions that results depend on."""
    document = {
        "verb": settings.verb,
        "settings": settings.model_dump(mode="json"),
        "reference": describe_reference(settings),
        "target": asdict(target),
        "versions": versions(PACKAGES),
    }
    workspace.publish(workspace.settings, as_json(document))


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of desra, of Python and of those packages that are installed under these names."""
    found = {"desra": __version__, "python": platform.python_version()}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):  # OpenCV has several names
            found[name] = version(name)
    return found


def check_kind(workspace: Workspace, settings: CorpusSettings) -> None:
    """Check that a workspace is new or of this kind of run (raises `UsageError`).

    A run of another kind would take all images of the workspace for replaced ones.
    """
    kind = settings_document(workspace).get("verb", settings.verb)
    if kind != settings.verb:
        reason = f"belongs to runs of desra {kind}"
        raise UsageError(workspace.root, reason, f"name another folder as workspace of desra {settings.verb}")


def check_models(workspace: Workspace, settings: CorpusSettings, target: Target) -> None:
    """Check that models can be loaded and run, unless the latest run used them.

    Raises:
        UsageError: A model cannot be loaded or run or sees nothing, their scales differ, or they give the same results.
    """
    before = settings_document(workspace).get("target", {})
    keys = {"mse_sr_key": target.mse_sr_key, "gan_sr_key": target.gan_sr_key}
    if isinstance(settings, Mining) and not keys.items() <= before.items():
        check_pair(*load_pair(settings.mse_model, settings.gan_model, engine=settings.engine))
    if target.segments and before.get("segmentation_key") != target.segmentation_key:
        try_segmenter(settings.segmenter)


def load_settings(workspace: Workspace) -> tuple[CorpusSettings, Target]:
    """Read the settings and keys of the latest run.

    Raises:
        UsageError: The folder is no workspace, or no run has written its settings there.
    """
    document = settings_document(workspace)
    if not document and workspace.settings.exists():
        remedy = "run the last desra mine or detect again: it writes it anew"
        raise UsageError(workspace.settings, "is damaged", remedy)
    try:
        settings = _KINDS[document["verb"]].model_validate(document["settings"])
        return settings, Target(**document["target"])
    except (ValueError, KeyError, TypeError):
        raise UsageError(workspace.root, "is no workspace with a run in it", "name one, or run desra mine") from None


def settings_document(workspace: Workspace) -> dict[str, Any]:
    """Read the document of `save_settings`: verb, settings, reference, target, versions; empty if it cannot be read.

    Raises:
        UsageError: The workspace is of a newer desra.
    """
    workspace.check_format()
    document = read_document(workspace.settings)
    return document if isinstance(document.get("settings"), dict) else {}


class Work(NamedTuple):
    """The work that is left, as flags per manifest row."""

    # The rows for which a stage must run, by stage name. The mask stage runs last, for all these rows.
    lacking: dict[str, Flags]
    failed: Flags  # images that failed for good under the very same settings
    dropped: Flags  # images that are computed again only because their maps were not kept
    whole: Flags  # images of which everything is kept, see `kept_whole`

    @property
    def pending(self) -> Flags:
        """Rows with anything to do."""
        return self.lacking["mask"]


class Standing:
    """Compare the records of manifest rows with a target: arrays of one flag per row.

    Attributes:
        same_similarity: The similarity map was computed under these settings.
        clean: An earlier mask was empty, and these settings are as strict or stricter: so their mask is empty, too.
        current: A mask is published that is right under these settings: it was made under them, or the image is clean.
        failed: The image failed.
        failed_for_good: The image failed under the very same settings and files, for a reason that does not pass.

    A photo whose colour profile an older version has ignored has none of these products.
    """

    def __init__(self, rows: pa.Table, records: pa.Table, target: Target) -> None:
        self._records = records
        self._index = pc.index_in(rows["id"].combine_chunks(), records["id"].combine_chunks())
        same_labels = np.ones(rows.num_rows, bool)
        if target.reads_labels:
            same_labels = self.equal("labels_hash", rows["labels_hash"].combine_chunks())
        # `desra_core.planning.profiles` has noted what becomes of all profiles that can be read.
        heeded = flags_of(self.column("colour_profile").is_valid()) | ~self.says("icc_profile")
        heeded |= not target.super_resolves
        self.same_similarity = self.equal("similarity_key", target.similarity_key) & heeded
        if target.labels_first:
            self.same_similarity &= same_labels
        # An empty mask stays empty under a lower threshold, a larger least area or higher class weights.
        was_empty = self.same_similarity & (self._number("artifact_pixels") == 0)
        same_weights = self.equal("weighting_key", target.weighting_key) & same_labels
        enough_weight = same_weights | (target.min_weight >= self._number("proven_weight"))
        as_strict = target.threshold <= self._number("threshold")
        as_strict &= self._min_areas(target.min_area) >= self._number("min_area")
        self.clean = was_empty & enough_weight & as_strict
        same_mask = self.equal("mask_key", target.mask_key) & same_labels & heeded
        self.current = same_mask | (self.clean & flags_of(self.column("mask_key").is_valid()))
        self.failed = flags_of(self.column("failed_stage").is_valid())
        same_run = self.equal("failed_key", target.run_key) & same_labels
        passed = [*readable_now(), *([_OLD_CMYK] if target.super_resolves else [])]  # detect still refuses CMYK
        overcome = flags_of(pc.is_in(self.column("reason"), pa.array(passed, pa.string())))
        self.failed_for_good = self.failed & same_run & ~self.says("transient") & ~overcome

    def column(self, name: str) -> pa.Array:
        """Get a column of the records, one value per row; it is made anew, since all of them at once are large."""
        return self._records[name].combine_chunks().take(self._index)

    def equal(self, column: str, value: str | pa.Array) -> Flags:
        """Flag the rows whose record has this value in a column, or of an array the value of the row."""
        return flags_of(pc.equal(self.column(column), value))

    def says(self, column: str) -> Flags:
        """Flag the rows whose record has true in this column."""
        return flags_of(self.column(column))

    def _number(self, column: str) -> npt.NDArray[np.float64]:
        return np.asarray(pc.cast(self.column(column), pa.float64()).to_numpy(zero_copy_only=False))

    def _min_areas(self, min_area: str) -> npt.NDArray[np.float64]:
        """Compute the least area of each image in pixels; a share of an image of unknown size is -1."""
        if not min_area.endswith("%"):
            return np.full(len(self._index), float(min_area))
        sides = [pc.fill_null(self.column(side), 0).to_numpy() for side in ("height", "width")]
        sizes, which = np.unique(np.stack(sides), axis=1, return_inverse=True)
        areas = [min_area_pixels(min_area, int(h), int(w)) if h else -1.0 for h, w in sizes.T]
        return np.array(areas, np.float64)[which.ravel()]


def assess(rows: pa.Table, records: pa.Table, target: Target, held: Held) -> Work:
    """Find out which manifest rows lack which products.

    An image is done when its mask is current, and the arrays and the dataset's pictures that are to be kept are there.

    Args:
        rows: Rows of a manifest.
        records: Records of any images, columns of `desra_core.workspace.products.SCHEMA`.
        target: The keys of the run.
        held: The files of the workspace for these rows; a record whose files are gone does not count.
    """
    standing = Standing(rows, records.select(COLUMNS), target)
    artifact = flags_of(pc.greater(standing.column("artifact_pixels"), 0))
    whole = products.kept_whole(target.keep, artifact, held.marked)
    # Images that a person has marked are kept whole, and all images with --keep all, whatever the detector marks.
    always_whole = products.kept_whole(target.keep, np.zeros(rows.num_rows, bool), held.marked)

    map_was_kept = standing.says("similarity_kept")
    has_map = standing.same_similarity & map_was_kept & held.arrays["similarity"]
    has_pair = held.arrays["mse_sr"] & held.arrays["gan_sr"] | (not target.super_resolves)
    # By name: whether a product that is made after the similarity map, and stored as an array, is there.
    has_later = {
        product.name: standing.equal(product.column, product.key(target) or "")
        & (standing.says(product.kept) if product.kept else True)
        & held.arrays[product.arrays[-1]]
        for product in products.stages_for(target)
        if product.arrays and "similarity" not in product.arrays
    }
    has_all = np.logical_and.reduce([has_map, *has_later.values()])
    has_arrays = has_all
    if target.keep == "artifacts":
        # An image that is clean, or whose map was dropped, needs no arrays. An image with a map needs all products that
        # are made after the map, except the labels: only the mask is computed from them.
        with_map = np.logical_and.reduce([has_map, *(has_later[name] for name in has_later if name != "segmentation")])
        has_arrays = standing.clean | ~map_was_kept | with_map
    has_arrays = np.where(always_whole, has_all & has_pair, has_arrays & (has_pair | ~whole))
    has_pictures = (held.pictures == np.where(whole, len(DATASET), 0)) | (not target.super_resolves)
    done = standing.current & held.masks & has_arrays & has_pictures & ~standing.failed
    pending = ~done & ~standing.failed_for_good
    # An image that is known to be clean gets only its mask, unless its arrays are kept too, or its map is lost.
    mask_only = standing.clean & (target.keep == "artifacts") & ~always_whole & (has_map | ~map_was_kept)
    computed = pending & ~mask_only
    compared = computed & ~(has_map & has_pair)
    lacking = {name: computed & ~made for name, made in has_later.items()}
    lacking |= {"super_resolution" if target.super_resolves else "similarity": compared, "mask": pending}
    dropped = compared & standing.same_similarity & ~standing.failed & ~map_was_kept
    return Work(lacking, standing.failed_for_good, dropped, whole)


def done_images(workspace: Workspace, target: Target) -> pa.Table:
    """List the images that have a current mask under the settings of a run: a row for each present name, by name.

    Columns are ``name``, and id, height, width, artifact_pixels and regions as in `workspace.products.SCHEMA`. An image
    without artifact pixels is clean under these settings, even if its mask was made under older ones.
    """
    manifest = read_manifest(workspace)
    rows = manifest.filter(manifest["present"])
    standing = Standing(rows, read_records(workspace, [*COLUMNS, "regions"]), target)
    columns = {"name": rows["name"], "id": rows["id"]}
    columns |= {name: standing.column(name) for name in ("height", "width", "artifact_pixels", "regions")}
    return pa.table(columns).filter(pa.array(standing.current & ~standing.failed)).combine_chunks()


class Plan:
    """The work of a run, by shard.

    Attributes:
        target: The keys of the run.
        images: Number of names in the run.
        failed: Names that failed for good before.
        pending: Names with anything to do.
        dropped: Pending names that are computed again only because ``--keep`` dropped maps that a looser setting needs.
        failures, retries: Why the failed names failed, and why pending names failed when they were last tried (schema
            `desra_core.workspace.matching.FAILURES`).
        shards: Number of pending names by shard, of the shards that have any.
    """

    def __init__(self, manifest: pa.Table, rows: pa.Table, records: pa.Table, target: Target, held: Held) -> None:
        work = assess(rows, records, target, held)
        self.target = target
        named = rows.select(["name", "id"])  # a copy of all columns would be large
        self.failures = failure_table(named.filter(pa.array(work.failed)), records)
        self.retries = failure_table(named.filter(pa.array(work.pending)), records)
        self.images = rows.num_rows
        self.failed = int(work.failed.sum())
        self.dropped = int(work.dropped.sum())
        self._manifest = manifest
        self._rows = rows
        # An image with several names is done under all of them or under none.
        pending = pc.is_in(rows["id"], rows["id"].filter(pa.array(work.pending)).combine_chunks())
        self._is_pending = flags_of(pending)
        self._held = held
        self.pending = int(self._is_pending.sum())
        shards, counts = np.unique(rows["shard"].to_numpy()[self._is_pending], return_counts=True)
        self.shards: dict[int, int] = dict(zip(shards.tolist(), counts.tolist(), strict=True))

    @property
    def idle_shards(self) -> list[int]:
        """List the shards without anything to do, sorted."""
        every: list[int] = np.unique(self._rows["shard"].to_numpy()).tolist()
        return [number for number in every if number not in self.shards]

    @property
    def ids(self) -> pa.Array:
        """The ids of the images of the run, one per name."""
        return self._rows["id"].combine_chunks()

    @property
    def done(self) -> int:
        """Number of names with nothing left to do."""
        return int(self.images - self.failed - self.pending)

    def most_pixels(self) -> int:
        """Read the pixel count of the largest pending photo, or GAN result where results are files, from its header."""
        role = "lr" if self.target.super_resolves else "gan_sr"
        return most_pixels(role_files(self._pending([f"{role}_{field}" for field in ("path", "size", "offset")]), role))

    def some_files(self) -> list[Path]:
        """List the photos, results and labels of the first and the last pending image."""
        rows = self._pending(self._rows.column_names)
        return [path for image in image_refs(rows.take([0, -1 % rows.num_rows])) for path in image.files]

    def rows(self, shard: int) -> pa.Table:
        """Get the manifest rows of one shard that are part of the run, finished ones included."""
        return self._rows.filter(pc.equal(self._rows["shard"], shard))

    def pending_rows(self, shard: int) -> tuple[pa.Table, Held]:
        """Get the pending manifest rows of one shard, and the files that the workspace held for them."""
        flags = self._is_pending & (self._rows["shard"].to_numpy() == shard)
        return self._rows.filter(pa.array(flags)), self._held.filter(flags)

    def image_refs(self, shard: int) -> list[ImageRef]:
        """Get the pending images of one shard, each with every name that it ever had."""
        rows, _ = self.pending_rows(shard)
        return image_refs(rows, self._manifest.filter(pc.equal(self._manifest["shard"], shard)))

    def after(self, workspace: Workspace) -> Plan:
        """Plan again after the run, for its pending images only: the lock has kept all other images as they were."""
        if not self.pending:
            return self
        rows = self._pending(self._rows.column_names)
        held = held_by(workspace, rows, self.target.gan_sr_key, each=True)
        after = Plan(self._manifest, rows, read_records(workspace, COLUMNS), self.target, held)
        after.images, after.failed = self.images, self.failed + after.failed
        after.failures = pa.concat_tables([self.failures, after.failures])
        return after

    def _pending(self, columns: list[str]) -> pa.Table:
        return self._rows.select(columns).filter(pa.array(self._is_pending))


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
    products.gather_journals(workspace)
    scanned = None
    if rescan or not workspace.manifest.exists():
        scanned = scan(
            settings.sources, workspace, shard_size=settings.shard_size, limit=settings.limit, on_hashed=on_hashed
        )
    manifest = read_manifest(workspace) if scanned is None else scanned.manifest
    save_settings(workspace, settings, target)
    if target.super_resolves:
        honour_profiles(workspace, manifest)
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


def publish_tables(workspace: Workspace, target: Target) -> None:
    """Write the tables of regions and failures, and for a mined corpus that of the dataset (raises `TransientError`).

    The table of regions has one row per region and name, sorted by name, then from top to bottom.
    """
    manifest = read_manifest(workspace)
    records = read_records(workspace, _TABLE_COLUMNS)
    if target.super_resolves:
        workspace.publish_table(workspace.dataset_manifest, _dataset(workspace, manifest, records, target))
    workspace.publish_table(workspace.regions, _regions(manifest, records))
    failed = failure_table(manifest.filter(manifest["present"]), records)
    failures = pa.concat_tables([read_table(workspace.scan_failures, FAILURES), failed]).sort_by("name")
    workspace.publish_table(workspace.failures, failures.replace_schema_metadata(None))


def _regions(manifest: pa.Table, records: pa.Table) -> pa.Table:
    rows, regional = with_records(manifest, records)
    lists = regional["regions"].combine_chunks()
    images = rows.select(["name", "id"]).take(pc.list_parent_indices(lists))
    regions = pc.list_flatten(lists)
    fields = [pc.struct_field(regions, field.name) for field in REGION_FIELDS]
    classes = pa.array(class_names(), pa.string()).take(pc.struct_field(regions, "dominant_class"))
    return pa.table([*images.columns, *fields, classes], schema=REGIONS)


def images_to_mention(workspace: Workspace) -> dict[str, list[str]]:
    """Name the images whose files were read in part: by what is to be said of them."""
    manifest = asked_for(read_manifest(workspace))
    records = read_records(workspace, ["id", "further_pages", "colour_profile"])
    flags = {
        "only the first of several pages is read of": pc.greater(records["further_pages"], 0),
        "read as sRGB, because its colour profile cannot be used:": pc.equal(records["colour_profile"], "unusable"),
    }
    found = {}
    for said, flag in flags.items():
        ids = records["id"].filter(flag).combine_chunks()
        if names := manifest["name"].filter(pc.is_in(manifest["id"], ids)).to_pylist():
            found[said] = names
    return found


def worst_regions(workspace: Workspace, count: int) -> pa.Table:
    """List the most severe regions of a workspace, worst first (schema `REGIONS`), none with a severity below zero."""
    regions = read_table(workspace.regions, REGIONS)
    regions = regions.filter(pc.greater_equal(regions["severity"], 0))
    return regions.take(pc.select_k_unstable(regions, count, [("severity", "descending"), ("image", "ascending")]))


def _dataset(workspace: Workspace, manifest: pa.Table, records: pa.Table, target: Target) -> pa.Table:
    """Make the table of the dataset: one row per image name, sorted by name."""
    human = read_human_masks(workspace, target.gan_sr_key)
    # An image that only a person has marked may not have its pictures yet.
    pictured = [key for key, mask in human.items() if mask.pixels and workspace.dataset("mask", mask.name).exists()]
    marked = flags_of(pc.is_in(records["id"], pa.array(pictured, pa.string())))
    whole = products.kept_whole(target.keep, flags_of(pc.greater(records["artifact_pixels"], 0)), marked)
    records = records.filter(pa.array(whole & flags_of(pc.is_valid(records["mask_key"]))))
    rows, records = with_records(manifest, records)
    names = rows["name"].combine_chunks()
    files = [pc.binary_join_element_wise(kind, pc.binary_join_element_wise(names, "png", "."), "/") for kind in DATASET]
    lists = records["regions"].combine_chunks()
    severities = pc.struct_field(pc.list_flatten(lists), "severity")
    severity = np.bincount(pc.list_parent_indices(lists), weights=severities, minlength=len(lists))
    ids = records["id"]
    pixels = _preferring(records["artifact_pixels"], ids, {key: mask.pixels for key, mask in human.items()})
    regions = _preferring(pc.list_value_length(lists), ids, {key: mask.regions for key, mask in human.items()})
    made_under = pc.if_else(pc.greater(pixels, 0), records["mask_key"], pa.scalar(None, pa.string()))
    mask_by = _preferring(pa.array(["detector"] * len(ids), pa.string()), ids, dict.fromkeys(human, "person"))
    columns = [names, ids, *files, records["height"], records["width"], pixels, regions]
    columns += [pa.array(severity, pa.float64()), made_under, mask_by]
    return pa.table(columns, schema=IMAGES)


def _preferring(values: pa.Array, ids: pa.Array, by_id: Mapping[str, int | str]) -> pa.Array:
    """Replace the values of those images whose ids are in ``by_id``."""
    index = pc.index_in(ids, pa.array(by_id, pa.string()))
    return pc.if_else(index.is_valid(), pa.array(by_id.values(), values.type).take(index), values)
