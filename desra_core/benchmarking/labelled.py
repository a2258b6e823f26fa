"""The benchmark on a data set with ground-truth masks: its jobs, and the record of each image on disk."""

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Self

from pydantic import TypeAdapter

from desra_core.benchmarking.benchmark import (
    Benchmark,
    DecodedPair,
    Job,
    Method,
    OperatingPoint,
    StageSettings,
    plan_benchmark,
)
from desra_core.benchmarking.data_sets import Example, given_folders, read_data_set
from desra_core.detection.detectors import Scores, score_pair
from desra_core.detection.mask import score_mask, valid
from desra_core.errors import ImageError, UsageError
from desra_core.evaluation.coco_masks import CocoMask, decode_coco_mask
from desra_core.evaluation.mask_files import FRAME, decode_mask, on_valid_region
from desra_core.evaluation.metrics import Agreement, compare_masks
from desra_core.files.hashing import fingerprint
from desra_core.images.codec import Mask, encode_mask
from desra_core.settings import min_area_pixels
from desra_core.settings.models import Benchmarking
from desra_core.stages.run import read_content
from desra_core.workspace import Workspace
from desra_core.workspace.manifest import File

# Raise it when a bit of a record changes.
JUDGED_VERSION = 2


@dataclass(frozen=True)
class PixelAgreement:
    """Pixels of our mask and another program's: marked in both, marked in at least one, of equal value, and all."""

    intersection: int
    union: int
    equal: int
    pixels: int


@dataclass(frozen=True)
class MethodRun:
    """The results of a method on an image; ``key`` identifies all that they depend on.

    By operating point: the computing ``seconds`` for score map and mask in one thread, the ``agreements`` with the
    ground truth, and the agreements with the ``published`` DeSRA mask of the data set, if there is such a mask.
    ``curve`` has the agreements with the ground truth at `Method.thresholds`.
    """

    key: str
    seconds: dict[str, float]
    agreements: dict[str, Agreement]
    curve: tuple[tuple[float, Agreement], ...]
    published: dict[str, PixelAgreement]


@dataclass(frozen=True)
class ImageRecord:
    """An image of the data set: its runs by method, or why it failed.

    ``labels_seconds`` is the time to compute class labels; None where they were read. ``failure`` has the key, subject,
    reason and remedy of an error that would come again.
    """

    part: str
    name: str
    height: int = 0
    width: int = 0
    labels_seconds: float | None = None
    runs: dict[str, MethodRun] = field(default_factory=dict)
    failure: tuple[str, str, str, str] | None = None

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
class LabelledJob(Job):
    """An image with its ground truth; ``keys`` has the key of its run by method, ``published`` is its DeSRA mask."""

    ground_truth: File | CocoMask
    published: File | None
    keys: dict[str, str]

    def path(self, workspace: Workspace) -> Path:  # noqa: D102
        return workspace.root / "records" / self.part / f"{self.name}.json"

    def mask_path(self, workspace: Workspace, point: OperatingPoint) -> Path:
        """Return the file of its mask at an operating point."""
        return workspace.root / "masks" / point.folder / self.part / f"{self.name}.png"

    def record(self, workspace: Workspace) -> ImageRecord | None:
        """Read the record, without a failure whose files have changed; None where it is missing or damaged."""
        try:
            record = _RECORD.validate_json(self.path(workspace).read_bytes())
        except (OSError, ValueError):
            return None
        outdated = record.failure is not None and record.failure[0] != fingerprint(self.keys)
        return replace(record, failure=None) if outdated else record

    def left(self, workspace: Workspace, methods: Sequence[Method]) -> Self | None:  # noqa: D102
        record = self.record(workspace)
        runs = record.runs if record else {}
        lacking = []
        for method in methods:
            if method.name in self.keys:
                done = method.name in runs and runs[method.name].key == self.keys[method.name]
                if not (done and all(self.mask_path(workspace, point).is_file() for point in method.points)):
                    lacking.append(method.name)
        failed = record is not None and record.failure is not None
        return None if failed or not lacking else replace(self, missing=tuple(lacking))

    def failure(self, workspace: Workspace) -> ImageError | None:  # noqa: D102
        record = self.record(workspace)
        return ImageError(*record.failure[1:]) if record and record.failure else None

    def judge(self, pair: DecodedPair, workspace: Workspace, settings: StageSettings) -> bytes:  # noqa: D102
        truth = read_ground_truth(self.ground_truth, pair.shape, pair.path)
        published = None
        if self.published:
            published = on_valid_region(_decoded(self.published), pair.shape, self.published.path)
        min_area = min_area_pixels(settings.benchmarking.min_area, *pair.shape)
        runs = {}
        for method in settings.methods:
            if method.name not in self.missing:
                continue
            scores, seconds = _timed_scores(method, pair, settings)
            cut = partial(score_mask, scores, pair.shape, min_area=min_area)
            curve = [(level, compare_masks(valid(cut(threshold=level), FRAME), truth)) for level in method.thresholds]
            run = runs[method.name] = MethodRun(self.keys[method.name], {}, {}, tuple(curve), {})
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
        # The runs of methods that this benchmark leaves out stay in the record: they may be asked for again.
        record = self.record(workspace) or ImageRecord(self.part, self.name)
        labels_seconds = pair.seconds if pair.seconds is not None or not record.runs else record.labels_seconds
        made = ImageRecord(self.part, self.name, *pair.shape, labels_seconds, record.runs | runs)
        return _RECORD.dump_json(made)

    def failed(self, error: ImageError, workspace: Workspace) -> bytes:  # noqa: D102
        record = self.record(workspace) or ImageRecord(self.part, self.name)
        failure = (fingerprint(self.keys), *error.failure)
        return _RECORD.dump_json(replace(record, failure=failure))


def plan_labelled(settings: Benchmarking) -> Benchmark[LabelledJob]:
    """Read a data set and list the methods that each image lacks. Writes nothing.

    Raises `UsageError`: the data set or a method cannot be used, or a setting contradicts another.
    """
    if settings.exclude:
        raise UsageError("--exclude", "is for the synthetic benchmark", "leave it out")
    data_set = read_data_set(Path(settings.dataset), given_folders(settings), settings.output)
    return plan_benchmark(settings, data_set, _job)


def read_records(benchmark: Benchmark[LabelledJob]) -> list[ImageRecord]:
    """Read the records of the images that are done, with the runs of the methods that are asked for."""
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


def _timed_scores(method: Method, pair: DecodedPair, settings: StageSettings) -> tuple[Scores, float]:
    """Compute the score map of a pair, and measure the seconds of this thread."""
    detector = method.detector(settings.weights)
    if next(_calls(method.key)) == 0:  # the first call of a process also loads libraries and compiles
        score_pair(detector, method.name, pair.path, pair.inputs)
    started = time.thread_time()
    scores = score_pair(detector, method.name, pair.path, pair.inputs)
    return scores, time.thread_time() - started


@cache
def _calls(_key: str) -> Iterator[int]:
    """Count the calls of a method in this process."""
    return itertools.count()


def _job(
    settings: Benchmarking, example: Example, files: dict[str, File], inputs: dict[Method, list[str]]
) -> LabelledJob:
    truth, published = files.get("gt_mask") or example.coco_mask, files.get("desra_mask")
    assert truth is not None
    truth_key = truth.hash if isinstance(truth, File) else truth[:3]
    judged = [files["mse_sr"].hash, files["gan_sr"].hash, truth_key, settings.min_area]
    keys = {}
    for method, hashes in inputs.items():
        agreed = published.hash if published and method.weighs_classes else None
        scored = (method.key, method.points, method.thresholds)
        keys[method.name] = fingerprint("judged", JUDGED_VERSION, *scored, judged, hashes, agreed)
    return LabelledJob(example.part, example.name, (), truth, published, keys)


def _decoded(file: File) -> Mask:
    return decode_mask(read_content(file), file.path)
