"""The benchmark on a data set with ground-truth masks: its jobs, the record of each image on disk, and the tables."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

from pydantic import TypeAdapter

from desra_core import __version__
from desra_core.benchmarking.benchmark import Benchmark, DecodedPair, Job, Method, OperatingPoint, Tables, plan_jobs
from desra_core.benchmarking.data_sets import Example, given_folders, read_data_set
from desra_core.detection.detectors import Detector, Scores, score_pair
from desra_core.detection.mask import score_mask, valid
from desra_core.errors import ImageError, printable
from desra_core.evaluation import metrics
from desra_core.evaluation.coco_masks import CocoMask, decode_coco_mask
from desra_core.evaluation.mask_files import FRAME, decode_any_mask, on_valid_region
from desra_core.evaluation.metrics import Agreement, MaskScores, compare_masks, pooled, score_masks, scores_document
from desra_core.evaluation.table import Section, as_csv, counted, failure_rows, fixed
from desra_core.files import fingerprint
from desra_core.images.codec import Mask, encode_mask
from desra_core.settings import min_area_pixels
from desra_core.settings.models import Benchmarking
from desra_core.stages import read_content
from desra_core.workspace import Workspace
from desra_core.workspace.manifest import File

# Raise it when a bit of a record changes.
JUDGED_VERSION = 3
ALL = "all parts"

# From the DeSRA paper: IoU, precision and recall of DeSRA, IoU of the others; see docs/method.md.
PUBLISHED: dict[str, tuple[float, float | None, float | None]] = {
    "DeSRA": (0.511, 0.7055, 0.6081),
    "NIQE": (0.029, None, None),
    "PAL4Inpainting": (0.084, None, None),
    "LDL, 0.01": (0.299, None, None),
    "LDL, 0.005": (0.362, None, None),
    "LDL, 0.001": (0.353, None, None),
}
PUBLISHED_TITLE = "Published, on the authors' data (their Real-ESRGAN set; not measured here)"

# Keys of the methods that have scored a pair in this process.
_CALLED: set[str] = set()


@dataclass(frozen=True)
class PixelAgreement:
    """Pixel counts of our mask and another program's: marked in both, marked in one or both, equal in both, and all."""

    intersection: int
    union: int
    equal: int
    pixels: int


@dataclass(frozen=True)
class _MethodRun:
    """The results of a method on an image; dictionaries are by operating point."""

    key: str  # the fingerprint of all that the results depend on
    seconds: dict[str, float]  # the time of one thread for score map and mask
    agreements: dict[str, Agreement]  # with the ground truth
    curve: tuple[tuple[float, Agreement], ...]  # with the ground truth, at `Method.thresholds`
    published: dict[str, PixelAgreement]  # with the DeSRA mask of the data set, if there is such a mask


@dataclass(frozen=True)
class ImageRecord:
    """An image of the data set: its runs by method, or why it failed."""

    part: str
    name: str
    height: int = 0
    width: int = 0
    labels_seconds: float | None = None  # time to compute class labels; None where they were read
    runs: dict[str, _MethodRun] = field(default_factory=dict)
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
    keys: dict[str, str]  # the key of the image's run by method

    def path(self, workspace: Workspace) -> Path:  # noqa: D102
        return workspace.root / "records" / self.part / f"{self.name}.json"

    def mask_path(self, workspace: Workspace, point: OperatingPoint) -> Path:
        """Return the file of the image's mask at an operating point."""
        return workspace.root / "masks" / point.folder / self.part / f"{self.name}.png"

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
                if not (done and all(self.mask_path(workspace, point).is_file() for point in method.points)):
                    lacking.append(method.name)
        return replace(self, missing=tuple(lacking)) if lacking else None

    def judge(self, pair: DecodedPair, benchmark: Benchmark[Any]) -> bytes:  # noqa: D102
        workspace = benchmark.workspace
        truth = read_ground_truth(self.ground_truth, pair.shape, pair.path)
        published = None
        if self.published:
            published = on_valid_region(_decoded(self.published), pair.shape, self.published.path)
        min_area = min_area_pixels(benchmark.settings.min_area, *pair.shape)
        runs = {}
        for method in benchmark.methods:
            if method.name not in self.missing:
                continue
            scores, seconds = _timed_scores(method, method.detector(benchmark.weights), pair)
            cut = partial(score_mask, scores, pair.shape, min_area=min_area)
            curve = [(level, compare_masks(valid(cut(threshold=level), FRAME), truth)) for level in method.thresholds]
            run = runs[method.name] = _MethodRun(self.keys[method.name], {}, {}, tuple(curve), {})
            for point in method.points:
                started = time.thread_time()
                mask = cut(threshold=point.threshold)
                run.seconds[point.name] = round(seconds + time.thread_time() - started, 4)
                run.agreements[point.name] = compare_masks(valid(mask, FRAME), truth)
                if published is not None and method.weighs_classes:
                    ours = valid(mask, FRAME)
                    parts = (ours & published, ours | published, ours == published)
                    both, either, equal = (int(pixels.sum()) for pixels in parts)
                    run.published[point.name] = PixelAgreement(both, either, equal, ours.size)
                workspace.publish(self.mask_path(workspace, point), encode_mask(mask))
        # The record keeps the runs of methods that this benchmark leaves out: a later one may ask for them again.
        record = self.record(workspace) or ImageRecord(self.part, self.name)
        # Labels that were read or not needed this time take no time; then the time of an earlier run stays.
        labels_seconds = record.labels_seconds if pair.seconds is None and record.runs else pair.seconds
        made = ImageRecord(self.part, self.name, *pair.shape, labels_seconds, record.runs | runs)
        return _RECORD.dump_json(made)

    def failed(self, error: ImageError, workspace: Workspace) -> bytes:  # noqa: D102
        record = self.record(workspace) or ImageRecord(self.part, self.name)
        failure = (fingerprint(self.keys), *error.failure)
        return _RECORD.dump_json(replace(record, failure=failure))


def plan_annotated(settings: Benchmarking) -> Benchmark[AnnotatedJob]:
    """Read a data set and list the methods that each image lacks. Writes nothing.

    Raises `UsageError`: the data set or a method cannot be used, or a setting contradicts another.
    """
    data_set = read_data_set(settings.dataset, given_folders(settings), settings.output)
    return plan_jobs(settings, data_set, partial(_job, settings))


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
        score_pair(detector, method.name, pair.path, pair.inputs)
        _CALLED.add(method.key)
    started = time.thread_time()
    scores = score_pair(detector, method.name, pair.path, pair.inputs)
    return scores, time.thread_time() - started


def _job(
    settings: Benchmarking, example: Example, files: dict[str, File], inputs: dict[Method, list[str]]
) -> AnnotatedJob:
    truth, published = files.get("gt_mask") or example.coco_mask, files.get("desra_mask")
    assert truth is not None
    truth_key = truth.hash if isinstance(truth, File) else truth[:3]
    judged = [files["mse_sr"].hash, files["gan_sr"].hash, truth_key, settings.min_area]
    keys = {}
    for method, hashes in inputs.items():
        agreed = published.hash if published and method.weighs_classes else None
        scored = (method.key, method.points, method.thresholds)
        keys[method.name] = fingerprint("judged", JUDGED_VERSION, *scored, judged, hashes, agreed)
    return AnnotatedJob(example.part, example.name, (), truth, published, keys)


def _decoded(file: File) -> Mask:
    return decode_any_mask(read_content(file), file.path)


class MethodRow(NamedTuple):
    """The results of a method at an operating point over the images of a part."""

    part: str
    method: Method
    point: OperatingPoint
    scores: MaskScores
    seconds: float  # per megapixel, for score map and mask in one thread: the median over the images


class _PublishedRow(NamedTuple):
    """Agreement of the masks at an operating point with the DeSRA masks of the data set."""

    part: str
    entry: str  # the name of the operating point
    images: int
    same: int  # images whose masks are equal
    iou: float  # mean over the images, where two empty masks count as 1
    equal: float  # share of equal pixels


@dataclass(frozen=True)
class AnnotatedResults:
    """All numbers of a benchmark."""

    rows: list[MethodRow]
    published: list[_PublishedRow]
    curves: dict[str, list[tuple[float, Agreement]]]  # by method and ascending threshold: sums over all images
    labels_seconds: float | None  # per megapixel: the median over the images whose class labels were computed
    records: list[ImageRecord]


def results_of(benchmark: Benchmark[AnnotatedJob]) -> AnnotatedResults:
    """Add up the records of the judged images: rows per part and operating point, and over all parts at the end."""
    records = read_records(benchmark)
    by_part: dict[str, list[ImageRecord]] = {}
    for record in records:
        by_part.setdefault(record.part, []).append(record)
    if len(by_part) != 1:
        by_part |= {ALL: records}
    rows, published = [], []
    for part, chosen in by_part.items():
        for method in benchmark.methods:
            runs = [(record.megapixels, record.runs[method.name]) for record in chosen if method.name in record.runs]
            for point in method.points if runs else ():
                scores = score_masks([run.agreements[point.name] for _, run in runs])
                seconds = statistics.median(run.seconds[point.name] / megapixels for megapixels, run in runs)
                rows.append(MethodRow(part, method, point, scores, seconds))
                if agreed := [run.published[point.name] for _, run in runs if point.name in run.published]:
                    ious = [image.intersection / image.union if image.union else 1.0 for image in agreed]
                    same = sum(image.equal == image.pixels for image in agreed)
                    equal = sum(image.equal for image in agreed) / sum(image.pixels for image in agreed)
                    published.append(_PublishedRow(part, point.name, len(agreed), same, sum(ious) / len(ious), equal))
    curves = {}
    for method in benchmark.methods:
        traced = [record.runs[method.name].curve for record in records if method.name in record.runs]
        if traced and method.thresholds:
            columns = zip(*traced, strict=True)
            curves[method.name] = [(column[0][0], pooled(agreement for _, agreement in column)) for column in columns]
    rates = [record.labels_seconds / record.megapixels for record in records if record.labels_seconds is not None]
    return AnnotatedResults(rows, published, curves, statistics.median(rates) if rates else None, records)


def annotated_tables(
    benchmark: Benchmark[AnnotatedJob], results: AnnotatedResults, failures: Sequence[ImageError]
) -> Tables:
    """Format all results as tables with explanations, as CSV and as a document for JSON."""
    assert isinstance(benchmark.settings, Benchmarking)
    name = printable(benchmark.settings.dataset.name)
    lines = []
    for row in results.rows:
        scores = row.scores
        line: dict[str, Any] = {"part": row.part, "method": row.point.name, "threshold": row.point.threshold}
        line |= {"images": scores.images, "empty_pairs": scores.empty_pairs}
        for measure, value in scores.values.items():
            low, high = scores.intervals[measure] or (None, None)
            line |= {measure: value, f"{measure}_low": low, f"{measure}_high": high}
        line |= {name: getattr(scores.total, name) for name in ("detected", "right", "marked", "found")}
        lines.append(line | {"seconds_per_megapixel": round(row.seconds, 4)})
    return Tables(
        stem="benchmark",
        title=f"Benchmark on {name}",
        sections=_sections(benchmark, results),
        csv=as_csv(lines, list(lines[0]) if lines else ["part", "method"]),
        document=_document(benchmark, results, failures),
    )


def _sections(benchmark: Benchmark[AnnotatedJob], results: AnnotatedResults) -> list[Section]:
    settings = benchmark.settings
    weights = ""
    if any(method.weighted for method in benchmark.methods):
        weights = f"Class weights: {Path(settings.weights or 'published').name}. "
    preface = (
        f"{counted(len(results.records), 'image')}; regions above {settings.min_area}"
        f"{'' if settings.min_area.endswith('%') else ' px'}; judged on the valid region, without the 5 px frame. "
        "IoU is the mean over images; a region is right, or found, when at least half of it lies in the other mask; "
        f"in brackets {100 * metrics.CONFIDENCE:g} % intervals by the bootstrap over images. {weights}"
        "Thresholds are those of scores; desra's score is 1 - adjusted similarity, so 0.3 is its --threshold 0.7."
    )
    sections = [Section(note=preface)]
    if results.rows:
        times = (
            "s/MP: computing time in one thread for score map and mask, seconds per megapixel, the median over images"
        )
        if results.labels_seconds is not None:
            times += f"; class labels take {results.labels_seconds:.3f} s/MP more, where they are used"
        sections = [Section(note=f"{preface}\n\n{times}.", table=_method_cells(results.rows))]
    if results.published:
        cells = [
            {
                "part": row.part,
                "method": row.entry,
                "images": str(row.images),
                "images equal": f"{row.same} of {row.images}",
                "equal pixels": f"{100 * row.equal:.4f} %",
                "IoU": f"{row.iou:.4f}",
            }
            for row in results.published
        ]
        note = "IoU is the mean over images, where two empty masks count as 1."
        sections.append(
            Section("Agreement with the data set's DeSRA masks", note=note, table=_without_single_part(cells))
        )
    measures = ("IoU", "precision", "recall")
    paper = [
        {"method": method}
        | {name: "–" if value is None else f"{value:g}" for name, value in zip(measures, row, strict=True)}
        for method, row in PUBLISHED.items()
    ]
    return [*sections, Section(PUBLISHED_TITLE, table=paper)]


def _method_cells(rows: Sequence[MethodRow]) -> list[dict[str, str]]:
    """Format the rows as text, measures with their 95 % intervals."""
    measures = {"iou": "IoU", "precision": "precision", "recall": "recall", "f1": "F1"}
    if any(row.scores.empty_pairs for row in rows):
        measures = {"iou": "IoU", "iou_with_empty": "IoU, both empty = 1"} | measures
    formatted = []
    for row in rows:
        cells = {"part": row.part, "method": row.point.name, "images": str(row.scores.images)}
        for name, title in measures.items():
            interval = row.scores.intervals[name]
            bounds = f" ({interval[0]:.2f}–{interval[1]:.2f})" if interval else ""
            cells[title] = fixed(row.scores.values[name]) + bounds
        formatted.append(cells | {"s/MP": f"{row.seconds:.3f}"})
    return _without_single_part(formatted)


def _without_single_part(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Leave out the column of parts where all rows are of one part."""
    if len({row["part"] for row in rows}) > 1:
        return rows
    return [{name: cell for name, cell in row.items() if name != "part"} for row in rows]


def _document(
    benchmark: Benchmark[AnnotatedJob], results: AnnotatedResults, failures: Sequence[ImageError]
) -> dict[str, Any]:
    """Describe all numbers in plain values for JSON; undefined ones are None."""
    images = []
    for record in results.records:
        image = {name: getattr(record, name) for name in ("part", "name", "height", "width")}
        agreements = {point: agreement for run in record.runs.values() for point, agreement in run.agreements.items()}
        counts = ("iou", "detected", "right", "marked", "found")
        methods = {point: {name: getattr(agreed, name) for name in counts} for point, agreed in agreements.items()}
        images.append(image | {"methods": methods})
    return {
        "desra": __version__,
        "settings": benchmark.settings.model_dump(mode="json"),
        "table": [
            {"part": row.part, "method": row.point.name, "threshold": row.point.threshold,
             "seconds_per_megapixel": round(row.seconds, 4)} | scores_document(row.scores)
            for row in results.rows
        ],
        "labels_seconds_per_megapixel": results.labels_seconds,
        "desra_masks": [row._asdict() for row in results.published],
        "curves": {
            name: [{"threshold": threshold, "precision": agreement.precision, "recall": agreement.recall,
                    "f1": agreement.f1} for threshold, agreement in curve]
            for name, curve in results.curves.items()
        },
        "images": images,
        "failures": failure_rows(failures),
        "without_ground_truth": [str(path) for path in benchmark.unjudged],
        "published": {"title": PUBLISHED_TITLE} | {
            name: dict(zip(("iou", "precision", "recall"), values, strict=True)) for name, values in PUBLISHED.items()
        },
    }  # fmt: skip
