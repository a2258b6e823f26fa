"""Count the similarity by class over a workspace: find the images, skip those already counted, add up the counts.

A shard has one Parquet file: the sum over its images, with the tokens of these images in the metadata. A token is a
fingerprint of an image, its labels and its masks. All else that a histogram depends on is in the name of the folder.
"""

import contextlib
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from desra_core import __version__
from desra_core.calibration import weights
from desra_core.calibration.weights import HISTOGRAM, CalibratedWeights, ClassHistogram, count_image, merged
from desra_core.detection.class_weights import load_weights
from desra_core.detection.mask import THRESHOLD, valid
from desra_core.errors import ImageError, LostError, TransientError, UsageError, printable
from desra_core.evaluation.mask_files import decode_any_mask
from desra_core.files import content_key, digest, fingerprint, read_bytes
from desra_core.images.codec import Mask, check_size
from desra_core.images.scanning import image_files, normalized
from desra_core.planning.doubts import stored_doubts
from desra_core.planning.plan import check_kind, load_settings, reference_key, target_of
from desra_core.settings import CorpusSettings, Detection, Mining, detector_of
from desra_core.settings.models import Calibrating
from desra_core.stages import read_content, read_labels
from desra_core.workspace import Workspace, products, read_table
from desra_core.workspace.arrays import read_array
from desra_core.workspace.human_masks import read_human_masks
from desra_core.workspace.manifest import File, ImageRef, asked_for, image_refs, read_manifest
from desra_core.workspace.products import Record, Target, flags_of, gather_shard, read_records, read_shard

# Raise it when the meaning or a count of a histogram changes.
HISTOGRAM_VERSION = 1

_COLUMNS = ["id", "similarity_key", "similarity_kept", "segmentation_key", "labels_kept", "failed_stage"]
_MARKED = ["id", "mask_key", "artifact_pixels", "failed_stage"]
_ABOUT = b"desra.counted"
# The settings of `derive_weights`.
_RULE = ("rule", "percentile", "fallback", "min_pixels", "min_images")

# A record, and the masks of the pixels that are left out of the histogram of its image.
RecordAndMasks = tuple[Record, tuple[File, ...]]


def count_stored(
    image: ImageRef, record_and_masks: RecordAndMasks, workspace: Workspace, target: Target, max_pixels: int
) -> pa.Table:
    """Count the pixels of an image by class and similarity, from its stored map; return a `ClassHistogram.to_table`.

    Workers call this function. Label files of more than ``max_pixels`` pixels are refused.

    Raises:
        ImageError: A mask has another size, or is no mask.
        TransientError: The map, the labels or a mask is gone or has changed.
    """
    record, masks = record_and_masks
    shape = record.shape
    similarity = read_array(workspace, image.id, "similarity", key=target.similarity_key)
    labels = read_labels(image, record, workspace, target.segmentation_key, max_pixels)
    if labels is None:
        raise ImageError(image.path, "has no class labels", "run again with --labels or --segmenter")
    frame = (shape[0] - similarity.shape[0]) // 2
    exclude: Mask | None = None
    for file in masks:
        mask = decode_any_mask(read_content(file), file.path)
        remedy = f"masks have the size of the image, or lack a frame of {frame} px"
        check_size(mask, file.path, remedy, shape, similarity.shape)
        mask = valid(mask, frame) if mask.shape == shape else mask
        exclude = mask if exclude is None else exclude | mask
    return count_image(similarity, valid(labels, frame), exclude).to_table()


def read_exclusion(folder: Path | None) -> dict[str, File]:
    """Hash the masks of a folder by normalized name (no folder, no masks); pixels that they mark are not counted.

    Raises:
        UsageError: The folder does not exist or cannot be read, or holds two masks of one name.
        TransientError: A mask cannot be read.
    """
    if folder is None:
        return {}
    files: dict[str, File] = {}
    table, problems, _ = image_files(folder)
    if problems:
        raise UsageError(problems[0].subject, problems[0].reason, problems[0].remedy)
    for name, path in zip(map(normalized, table["name"].to_pylist()), table["path"].to_pylist(), strict=True):
        if name in files:
            reason = f"is a mask of the same image as {files[name].path}"
            raise UsageError(folder / path, reason, "keep one of them")
        files[name] = _hashed(folder / path)
    return files


def unused_masks(folder: Path, exclusion: Mapping[str, File], names: Iterable[str]) -> list[Path]:
    """List the masks that belong to none of the named images (raises `UsageError` if no mask belongs to one)."""
    known = {normalized(name) for name in names}
    unused = [file.path for name, file in sorted(exclusion.items()) if name not in known]
    if len(unused) == len(exclusion):
        remedy = "name a folder whose files mirror those of the images"
        raise UsageError(folder, "holds no mask of any image", remedy)
    return unused


class ShardCount(NamedTuple):
    """The images of a shard that are wanted, counted and failed, by token.

    A sum cannot lose an image again. So nothing counts as done, and ``time`` is None, where the file has counted an
    image that is no longer wanted, and where the file is missing or damaged.
    """

    number: int
    file: Path
    wanted: dict[str, tuple[ImageRef, tuple[File, ...]]]  # the images to be counted, each with its masks
    tokens: frozenset[str]  # of the images in the sum
    failed: dict[str, list[str]]  # subject, reason and remedy of images that cannot be counted
    time: str | None  # when the file was written

    @property
    def missing(self) -> list[str]:
        """Tokens of images that are neither counted nor failed."""
        return [token for token in self.wanted if token not in self.tokens and token not in self.failed]

    @property
    def failures(self) -> list[ImageError]:
        """The reasons why images cannot be counted before their files change."""
        return [ImageError(*error) for error in self.failed.values()]


class Counting:
    """The images of a workspace that have a map and labels made with the target's settings, shard by shard.

    ``images`` is the number of these images; copies of an image count once. ``shards`` has the numbers of their shards.
    """

    def __init__(self, workspace: Workspace, target: Target, rows: pa.Table, exclusion: Mapping[str, File]) -> None:
        self.workspace = workspace
        self.target = target
        self._rows = rows
        self._exclusion = exclusion
        human = read_human_masks(workspace, target.gan_sr_key)
        self._human = {image_id: _hashed(mask.path) for image_id, mask in human.items()}
        self._folder = workspace.calibration(histogram_key(target))
        self.images = len(rows["id"].unique())
        self.shards: list[int] = sorted(rows["shard"].unique().to_pylist())

    def some_files(self) -> list[Path]:
        """List the files of the first and the last of the images, and the first mask of the exclusion."""
        files = [path for image in image_refs(self._rows.take([0, -1 % self._rows.num_rows])) for path in image.files]
        return files + [mask.path for mask in list(self._exclusion.values())[:1]]

    @property
    def human_masks(self) -> int:
        """The number of images with a human mask; the pixels that the human mask marks are not counted."""
        return len(self._human.keys() & set(self._rows["id"].to_pylist()))

    def suspect(self) -> tuple[int, int]:
        """Count the images with detected artifacts but no mask to exclude them, and the pixels of these artifacts."""
        records = read_records(self.workspace, _MARKED)
        marked = pc.and_(pc.equal(records["mask_key"], self.target.mask_key), records["failed_stage"].is_null())
        marked = pc.and_(marked, pc.greater(records["artifact_pixels"], 0))
        unmasked = pa.array({image.id for image in image_refs(self._rows) if not self._masks(image)}, pa.string())
        found = records.filter(pc.and_kleene(marked, pc.is_in(records["id"], unmasked)))
        return found.num_rows, int(pc.sum(found["artifact_pixels"]).as_py() or 0)

    def shard(self, number: int) -> ShardCount:
        """Read which images of a shard are counted."""
        wanted = {}
        for image in image_refs(self._rows.filter(pc.equal(self._rows["shard"], number))):
            masks = self._masks(image)
            labels = image.labels.hash if image.labels and self.target.reads_labels else None
            wanted[fingerprint(image.id, labels, [mask.hash for mask in masks])] = (image, masks)
        file = self._folder / f"{number:08d}.parquet"
        with contextlib.suppress(OSError, pa.ArrowException, ValueError, LookupError, TypeError):
            about: dict[str, Any] = json.loads(pq.read_schema(file).metadata[_ABOUT])
            tokens = frozenset(about["tokens"])
            failed = {token: error for token, error in about["failures"].items() if token in wanted}
            if tokens <= wanted.keys():
                return ShardCount(number, file, wanted, tokens, failed, about["time"])
        return ShardCount(number, file, wanted, frozenset(), {}, None)

    def missing(self) -> dict[int, int]:
        """Count the images that are not counted yet, by shard."""
        counts = {number: len(self.shard(number).missing) for number in self.shards}
        return {number: count for number, count in counts.items() if count}

    def work(self, shard: ShardCount) -> dict[str, tuple[ImageRef, RecordAndMasks]]:
        """List the images of a shard that are not counted yet, by token, each with its argument for `count_stored`."""
        records = read_shard(self.workspace, shard.number)
        work = {}
        for token in shard.missing:
            image, masks = shard.wanted[token]
            # Regions and times may be large, and are not needed.
            work[token] = (image, (replace(records[image.id], regions=[], seconds={}), masks))
        return work

    def most_pixels(self) -> int:
        """Return the number of pixels of the largest image that can be counted."""
        records = read_records(self.workspace, ["id", "height", "width"])
        sizes = records.filter(pc.is_in(records["id"], self._rows["id"].combine_chunks()))
        return int(pc.max(pc.multiply(sizes["height"].cast("int64"), sizes["width"])).as_py() or 0)

    def add(self, number: int, results: Mapping[str, pa.Table | ImageError]) -> None:
        """Add the results of `count_stored` by token, tables or errors, to the file of a shard.

        Transient errors are left out. Where a map or labels are lost, the image's record is marked, so that the next
        run makes these arrays anew.
        """
        shard = self.shard(number)
        tables, failed, lost = {}, {}, []
        for token, result in results.items():
            if not isinstance(result, ImageError):
                tables[token] = result
            elif isinstance(result, LostError):
                lost.append(shard.wanted[token][0].id)
            elif not isinstance(result, TransientError):
                failed[token] = result.failure
        if lost:
            records = read_shard(self.workspace, number)
            gather_shard(self.workspace, number, [products.without_arrays(records[image_id]) for image_id in lost])
        if not tables and not failed:
            return
        stored = [read_table(shard.file, HISTOGRAM)] if shard.time else []
        table = merged([*stored, *tables.values()], shard.file).to_table()
        about = {
            "tokens": sorted(shard.tokens | tables.keys()),
            "failures": shard.failed | failed,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        metadata = table.schema.metadata | {_ABOUT: json.dumps(about).encode()}
        self.workspace.publish_table(shard.file, table.replace_schema_metadata(metadata))
        shutil.rmtree(shard.file.with_suffix(""), ignore_errors=True)  # left by a killed run of an older desra

    def counted(self) -> list[ShardCount]:
        """List the shards that have a file."""
        return [shard for number in self.shards if (shard := self.shard(number)).time]

    def histogram(self) -> ClassHistogram:
        """Add up all shards (raises `UsageError` where a file is damaged)."""
        return merged((read_table(shard.file, HISTOGRAM) for shard in self.counted()), self._folder)

    def _masks(self, image: ImageRef) -> tuple[File, ...]:
        human = [self._human[image.id]] if image.id in self._human else []
        names = [name for name in map(normalized, image.names) if name in self._exclusion]
        return (*human, *(self._exclusion[name] for name in names))


def histogram_key(target: Target) -> str:
    """Name the folder of the histograms by the versions and settings of counting, similarity and segmentation."""
    return fingerprint("histogram", HISTOGRAM_VERSION, target.similarity_key, target.segmentation_key)


def corpus_of(calibrating: Calibrating) -> CorpusSettings:
    """Make the settings of the run that precedes a calibration: those of the latest run, changed, with all maps kept.

    Raises:
        UsageError: No pairs or no labels are known, only one folder is given, or the workspace belongs to another kind
            of run or to another detector.
    """
    workspace = Workspace(calibrating.workspace)
    folders = {"mse_sr": calibrating.mse_sr, "gan_sr": calibrating.gan_sr}
    given: dict[str, Any] = {name: folder for name, folder in folders.items() if folder is not None}
    if len(given) == 1:
        lacking = "--gan-sr" if "mse_sr" in given else "--mse-sr"
        raise UsageError(lacking, "is not given", "give both folders, or none for those of the latest run")
    kind: type[CorpusSettings] = Detection
    recorded: dict[str, Any] = {}
    if workspace.settings.exists():
        settings, _ = load_settings(workspace)
        kind, recorded = type(settings), settings.model_dump()
    elif not given:
        remedy = "name one of desra detect or mine, or give --mse-sr and --gan-sr"
        raise UsageError(workspace.root, "is no workspace with a run in it", remedy)
    if kind is not Detection and given:  # raises, because the workspace belongs to desra mine
        check_kind(workspace, Detection(workspace=workspace.root, **given))
    if calibrating.segmenter != "none":
        given["segmenter"] = calibrating.segmenter
    keep = "all" if recorded.get("keep") == "all" else "maps"
    corpus = kind(**(recorded | given | {"workspace": workspace.root, "keep": keep}))
    if corpus.segmenter == "none":
        raise UsageError("--labels", "are needed, because each class has its own weight", "add --labels or --segmenter")
    detector = detector_of(corpus)
    if not detector.weighs_classes:
        reason = f"is of desra detect --method {detector.name}, which weighs no classes"
        raise UsageError(workspace.root, reason, "name another workspace")
    return corpus


def plan_counting(corpus: CorpusSettings, exclusion: Mapping[str, File]) -> Counting:
    """Find the images whose maps and labels are in a workspace. The workspace must be locked.

    Raises:
        UsageError: As `desra_core.planning.plan.target_of`; or the workspace has no manifest.
        TransientError: A mask cannot be read.
    """
    workspace = Workspace(corpus.workspace)
    target, _ = target_of(corpus)
    if not workspace.manifest.exists():
        raise UsageError(workspace.root, "has no manifest", f"run desra {corpus.verb}")
    rows = asked_for(read_manifest(workspace)).slice(0, corpus.limit)
    records = read_records(workspace, _COLUMNS)
    index = pc.index_in(rows["id"].combine_chunks(), records["id"].combine_chunks())
    record = {name: records[name].combine_chunks().take(index) for name in _COLUMNS}
    mapped = pc.and_(pc.equal(record["similarity_key"], target.similarity_key), record["similarity_kept"])
    labelled = rows["labels_hash"].combine_chunks().is_valid()
    if not target.reads_labels:
        labelled = pc.and_(pc.equal(record["segmentation_key"], target.segmentation_key), record["labels_kept"])
    whole = pc.and_(index.is_valid(), record["failed_stage"].is_null())
    rows = rows.filter(pa.array(flags_of(mapped) & flags_of(labelled) & flags_of(whole)))
    return Counting(workspace, target, rows, exclusion)


def derive_calibration(calibrating: Calibrating, corpus: CorpusSettings, counting: Counting) -> CalibratedWeights:
    """Derive weights and thresholds from the counted histograms.

    Raises:
        UsageError: No pixel was counted, or a file is damaged.
    """
    histogram = counting.histogram()
    if not histogram.pixels.any():
        reason = "holds no pixel to be counted"
        raise UsageError(corpus.workspace, reason, "see desra status for what failed, and the masks of --exclude")
    rows = weights.derive_weights(histogram, **calibrating.model_dump(include=set(_RULE)))
    ours, published = weights.weight_values(rows), load_weights("published").values
    below = tuple(weights.false_alarm_rate(histogram, values, THRESHOLD) or 0.0 for values in (ours, published))
    if not isinstance(corpus, Mining):
        models = {role: str(getattr(corpus, role)) for role in ("mse_sr", "gan_sr")}
    else:
        models = {
            "mse_model": corpus.mse_model,
            "mse_model_key": reference_key(corpus.mse_model),
            "gan_model": str(corpus.gan_model),
            "gan_model_key": content_key(corpus.gan_model),
            "photos": str(corpus.photos),
            "precision": corpus.precision,
            "backend": corpus.backend,
        }
    origin = {
        "desra": __version__,
        "counted": max(shard.time for shard in counting.counted() if shard.time),
        "run": f"desra {corpus.verb}",
        "workspace": str(corpus.workspace),
        **models,
        "segmenter": corpus.segmenter,
        "window": corpus.window,
        "exclude": str(calibrating.exclude) if calibrating.exclude else None,
        **{name: getattr(calibrating, name) for name in _RULE},
        "images": histogram.seen,
        "pixels": int(histogram.pixels.sum()),
        "excluded_pixels": histogram.excluded,
        "doubts": [printable(doubt) for doubt in stored_doubts(counting.workspace, corpus, counting.target)],
    }
    suggested = weights.suggest(histogram, ours, published, calibrating.false_alarm_rate)
    return CalibratedWeights(rows, histogram, suggested, (below[0], below[1]), origin)


def _hashed(path: Path) -> File:
    return File(path, digest(read_bytes(path)))
