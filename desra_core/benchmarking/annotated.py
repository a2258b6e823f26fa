"""The benchmark on a data set with ground-truth masks: its jobs, and the record of each image on disk."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import TypeAdapter

from desra_core.benchmarking.benchmark import (
    Benchmark,
    DecodedPair,
    Job,
    Method,
    OperatingPoint,
    plan_jobs,
)
from desra_core.benchmarking.data_sets import Example, given_folders, read_data_set, reference_role
from desra_core.detection.detectors import Detector, Scores, score_pair
from desra_core.detection.mask import Components, Flags, score_mask, valid
from desra_core.errors import ImageError, UsageError
from desra_core.evaluation.coco_masks import CocoMask, decode_coco_mask
from desra_core.evaluation.evaluation import SeverityLabels, read_ratings
from desra_core.evaluation.heat_maps import read_heat_map
from desra_core.evaluation.mask_files import FRAME, decode_any_mask, on_valid_region
from desra_core.evaluation.metrics import (
    Agreement,
    Overlap,
    compare_masks,
    prominent_agreement,
    shares_inside,
)
from desra_core.evaluation.score_histogram import (
    count_scores,
    region_means,
)
from desra_core.files import fingerprint
from desra_core.images.codec import Mask, encode_mask
from desra_core.settings import min_area_pixels
from desra_core.settings.models import Benchmarking
from desra_core.stages import read_content
from desra_core.workspace import Workspace
from desra_core.workspace.manifest import File

# Raise it when a bit of a record changes.
JUDGED_VERSION = 3

# The sensitivity of the ranking is shown at these shares of a region, and with masks widened by so many pixels.
KAPPAS = tuple(tenth / 10 for tenth in range(1, 10))
DILATIONS = (0, 1, 2, 4, 8, 16)

# Keys of the methods that have scored a pair in this process.
_CALLED: set[str] = set()


@dataclass(frozen=True)
class MethodRun:
    """The results of a method on an image; dictionaries are by operating point."""

    key: str  # the fingerprint of all that the results depend on
    seconds: dict[str, float]  # the time of one thread for score map and mask
    agreements: dict[str, Agreement]  # with the ground truth
    curve: tuple[tuple[float, Agreement], ...]  # with the ground truth, at `Method.thresholds`
    published: dict[str, Agreement]  # with the DeSRA mask of the data set, if there is such a mask
    prominent: dict[str, Agreement]  # with the prominent regions of the ground truth; empty without ratings
    found: dict[str, tuple[tuple[int, ...], ...]]  # regions found by dilation and share, see `overlap_grid`
    regions: tuple[float | None, ...]  # the mean score of each region of the ground truth; None where it has none


@dataclass(frozen=True)
class ImageRecord:
    """An image of the data set: its runs by method, or why it failed."""

    part: str
    name: str
    height: int = 0
    width: int = 0
    labels_seconds: float | None = None  # time to compute class labels; None where they were read
    runs: dict[str, MethodRun] = field(default_factory=dict)
    failure: tuple[str, str, str, str] | None = None  # key of the job; subject, reason and remedy of an `ImageError`

    @property
    def title(self) -> str:
        """Part and name of the image."""
        return f"{self.part}/{self.name}" if self.part else self.name

    @property
    def megapixels(self) -> float:
        """Size of a result in millions of pixels."""
        return self.height * self.width / 1e6


_RECORD = TypeAdapter(ImageRecord)


@dataclass(frozen=True)
class AnnotatedJob(Job):
    """An image with its ground truth."""

    ground_truth: File | CocoMask
    published: File | None  # the image's DeSRA mask in the data set
    severity: SeverityLabels | None  # the ratings of this image; None where no image was rated
    heat_maps: dict[str, File]  # by method
    keys: dict[str, str]  # the key of the image's run by method

    def path(self, workspace: Workspace) -> Path:  # noqa: D102
        return workspace.root / "records" / self.part / f"{self.name}.json"

    def mask_path(self, workspace: Workspace, point: OperatingPoint) -> Path:
        """Return the file of the image's mask at an operating point."""
        return workspace.root / "masks" / point.folder / self.part / f"{self.name}.png"

    def histogram_path(self, workspace: Workspace, method: Method) -> Path:
        """Return the file of the image's `ScoreHistogram`."""
        return workspace.root / "histograms" / method.folder / self.part / f"{self.name}.npz"

    @property
    def title(self) -> str:
        """Part and name of the image, by which ratings name it."""
        return f"{self.part}/{self.name}" if self.part else self.name

    def record(self, workspace: Workspace) -> ImageRecord | None:
        """Read the record, without a failure if the files have changed since; None where it is missing or damaged."""
        try:
            record = _RECORD.validate_json(self.path(workspace).read_bytes())
        except (OSError, ValueError):
            return None
        outdated = record.failure is not None and record.failure[0] != fingerprint(self.keys)
        return replace(record, failure=None) if outdated else record

    def left(self, workspace: Workspace, methods: Sequence[Method]) -> Self | ImageError | None:  # noqa: D102
        record = self.record(workspace)
        if record and record.failure:
            return ImageError(*record.failure[1:])
        runs = record.runs if record else {}
        lacking = []
        for method in methods:
            if method.name in self.keys:
                done = method.name in runs and runs[method.name].key == self.keys[method.name]
                files = [self.mask_path(workspace, point) for point in method.points]
                if not (done and all(path.is_file() for path in [*files, self.histogram_path(workspace, method)])):
                    lacking.append(method.name)
        return replace(self, missing=tuple(lacking)) if lacking else None

    def judge(self, pair: DecodedPair, benchmark: Benchmark[Any]) -> bytes:  # noqa: D102
        workspace, settings = benchmark.workspace, benchmark.settings
        assert isinstance(settings, Benchmarking)
        overlap, (dilations, kappas) = Overlap(settings.kappa, settings.dilate), overlap_grid(settings)
        truth = read_ground_truth(self.ground_truth, pair.shape, pair.path)
        regions = Components(truth)
        prominent = self._prominent(regions)
        ignored = None if prominent is None else truth & ~regions.chosen(prominent)
        published = None
        if self.published:
            published = on_valid_region(_decoded(self.published), pair.shape, self.published.path)
        min_area = min_area_pixels(settings.min_area, *pair.shape)
        runs = {}
        for method in benchmark.methods:
            if method.name not in self.missing:
                continue
            if method.is_stored:
                stored = self.heat_maps[method.name]
                scores, seconds = read_heat_map(read_content(stored), stored.path, pair.shape), 0.0
            else:
                scores, seconds = _timed_scores(method, method.detector(benchmark.weights), pair)
            cut = partial(score_mask, scores, pair.shape, min_area=min_area)
            curve = tuple(
                (level, compare_masks(valid(cut(threshold=level), FRAME), truth, overlap))
                for level in method.thresholds
            )
            scored = _on_valid_region(scores, truth.shape)
            histogram = count_scores(scored, truth, ignored).encoded()
            workspace.publish(self.histogram_path(workspace, method), histogram)
            means = tuple(region_means(scored, regions))
            run = runs[method.name] = MethodRun(self.keys[method.name], {}, {}, curve, {}, {}, {}, means)
            for point in method.points:
                started = time.thread_time()
                mask = cut(threshold=point.threshold)
                run.seconds[point.name] = round(seconds + time.thread_time() - started, 4)
                ours = valid(mask, FRAME)
                run.agreements[point.name] = compare_masks(ours, truth, overlap)
                if prominent is not None:
                    run.prominent[point.name] = prominent_agreement(ours, truth, prominent, overlap)
                shares = [shares_inside(regions, ours, dilate) for dilate in dilations]
                run.found[point.name] = tuple(
                    tuple(int((inside >= kappa).sum()) for kappa in kappas) for inside in shares
                )
                if published is not None and method.compares_masks:
                    run.published[point.name] = compare_masks(ours, published)
                workspace.publish(self.mask_path(workspace, point), encode_mask(mask))
        # The record keeps the runs of methods that this benchmark leaves out: a later one may ask for them again.
        record = self.record(workspace) or ImageRecord(self.part, self.name)
        # Labels that were read or not needed this time take no time; then the time of an earlier run stays.
        labels_seconds = record.labels_seconds if pair.seconds is None and record.runs else pair.seconds
        made = ImageRecord(self.part, self.name, *pair.shape, labels_seconds, record.runs | runs)
        return _RECORD.dump_json(made)

    def _prominent(self, regions: Components) -> Flags | None:
        """Flag the prominent regions; None without ratings (raises `ImageError`: the ratings are of other regions)."""
        if self.severity is None:
            return None
        try:
            self.severity.check(self.title, np.add(regions.boxes, (FRAME, FRAME, 0, 0)).tolist())
        except UsageError as error:
            raise ImageError(*error.failure) from None
        return np.isin(np.arange(1, len(regions) + 1), list(self.severity.prominent(self.title)))

    def failed(self, error: ImageError, workspace: Workspace) -> bytes:  # noqa: D102
        record = self.record(workspace) or ImageRecord(self.part, self.name)
        failure = (fingerprint(self.keys), *error.failure)
        return _RECORD.dump_json(replace(record, failure=failure))


def plan_annotated(settings: Benchmarking) -> Benchmark[AnnotatedJob]:
    """Read a data set and list the methods that each image lacks. Writes nothing.

    Raises `UsageError`: the data set or a method cannot be used, or a setting contradicts another.
    """
    columns = settings.image_column, settings.mask_column, settings.prominence_column
    data_set = read_data_set(settings.dataset, given_folders(settings), settings.output, columns)
    severity = SeverityLabels(data_set.ratings, settings.dataset, settings.prominent) if data_set.ratings else None
    if settings.severity:
        if severity:
            raise UsageError("--severity", f"is given beside the shares in {settings.dataset}", "leave one out")
        severity = SeverityLabels(read_ratings(settings.severity), settings.severity, settings.prominent)
        severity.check_images({example.title for example in data_set.examples} | data_set.lacking)
    return plan_jobs(settings, data_set, partial(_job, settings, severity), tuple(settings.references))


def read_records(benchmark: Benchmark[AnnotatedJob]) -> list[ImageRecord]:
    """Read the records of the images that are done, with only the runs of this benchmark's methods."""
    unfinished = {(job.part, job.name) for _, job in benchmark.missing()}
    records = []
    for _, job in benchmark.work:
        record = job.record(benchmark.workspace)
        if record and not record.failure and (job.part, job.name) not in unfinished:
            records.append(replace(record, runs={name: record.runs[name] for name in job.keys}))
    return records


def read_ground_truth(source: File | CocoMask, shape: tuple[int, int], image: Path) -> Mask:
    """Read the ground truth of an image of ``(H, W)``: ``(H - 10, W - 10)`` bool (raises `ImageError`)."""
    if isinstance(source, File):
        return on_valid_region(_decoded(source), shape, source.path)
    if (source.height, source.width) != shape:
        sizes = f"is {shape[1]}x{shape[0]}, but {source.width}x{source.height} in the COCO file"
        raise ImageError(image, sizes, "correct width and height there, or give the image that was labelled")
    return on_valid_region(decode_coco_mask(source), shape, image)


def _timed_scores(method: Method, detector: Detector, pair: DecodedPair) -> tuple[Scores, float]:
    """Compute the score map of a pair, and measure how many seconds this thread takes."""
    if method.key not in _CALLED:  # the first call of a process also loads libraries and compiles
        score_pair(detector, method.name, pair.path, pair.inputs_of(method))
        _CALLED.add(method.key)
    started = time.thread_time()
    scores = score_pair(detector, method.name, pair.path, pair.inputs_of(method))
    return scores, time.thread_time() - started


def overlap_grid(settings: Benchmarking) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """List the dilations and the shares of a region at which regions are counted, those of the settings among them."""
    return tuple(sorted({*DILATIONS, settings.dilate})), tuple(sorted({*KAPPAS, settings.kappa}))


def _on_valid_region(scores: Scores, shape: tuple[int, int]) -> Scores:
    """Crop scores to the valid region of ``shape``; pixels of it without a score get minus infinity."""
    scores = scores.astype(np.result_type(scores, np.float32))
    lacking = (shape[0] - scores.shape[0]) // 2
    return np.pad(scores, lacking, constant_values=-np.inf) if lacking > 0 else valid(scores, -lacking)


def _job(
    settings: Benchmarking,
    severity: SeverityLabels | None,
    example: Example,
    files: dict[str, File],
    inputs: dict[Method, list[str]],
) -> AnnotatedJob:
    truth, published = files.get("gt_mask") or example.coco_mask, files.get("desra_mask")
    assert truth is not None
    truth_key = truth.hash if isinstance(truth, File) else truth[:3]
    judged: list[object] = [files["gan_sr"].hash, truth_key, settings.min_area, settings.kappa, settings.dilate]
    if severity:
        own = severity.ratings.get(example.title, {})
        severity = severity._replace(ratings={example.title: own})
        judged.append([severity.least_noticed, *([number, *rating[:2]] for number, rating in sorted(own.items()))])
    references = {name: files[reference_role(name)] for name in settings.references}
    heat_maps = {method.name: files[method.name] for method in inputs if method.is_stored}
    keys = {}
    for method, hashes in inputs.items():
        agreed = published.hash if published and method.compares_masks else None
        reference = references.get(method.reference, files["mse_sr"]).hash
        scored = (method.key, method.points, method.thresholds, reference)
        keys[method.name] = fingerprint("judged", JUDGED_VERSION, *scored, judged, hashes, agreed)
    return AnnotatedJob(example.part, example.name, (), references, truth, published, severity, heat_maps, keys)


def _decoded(file: File) -> Mask:
    return decode_any_mask(read_content(file), file.path)
