"""The benchmark without ground truth, whose artifacts are injected into clean pairs: its jobs, and their sums."""

import statistics
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from pydantic import TypeAdapter

from desra_core.benchmarking.benchmark import Benchmark, DecodedPair, Job, Method, StageSettings, plan_benchmark
from desra_core.benchmarking.data_sets import Example, given_folders, read_pairs
from desra_core.benchmarking.places import SIZES, STRENGTHS
from desra_core.benchmarking.trial import GRID, MIN_AREAS, Design, Trial, run_trial
from desra_core.errors import Failure, ImageError, UsageError
from desra_core.evaluation.mask_files import FRAME, decode_mask, on_valid_region
from desra_core.evaluation.metrics import ratio, wilson_interval
from desra_core.files.hashing import fingerprint
from desra_core.settings.models import Benchmarking
from desra_core.stages.run import read_content
from desra_core.workspace import Workspace
from desra_core.workspace.manifest import File

# Raise it when a bit of a trial changes.
TRIAL_VERSION = 2

# Bounds of contrast over texture. For each range between them, the recall of the kinds in `_ADDED` is given.
RATIOS = (1.0, 2.0, 4.0)
_ADDED = frozenset({"blotches", "checkerboard", "worms", "ringing"})


@dataclass(frozen=True)
class TrialRecord:
    """The content of an image's file: its trial, or why it failed."""

    key: str
    trial: Trial | None = None
    failure: Failure | None = None


_RECORD = TypeAdapter(TrialRecord)


@dataclass(frozen=True)
class SyntheticJob(Job):
    """A pair to inject artifacts into; ``exclude`` is the mask of the artifacts that it has already."""

    exclude: File | None
    key: str

    def path(self, workspace: Workspace) -> Path:  # noqa: D102
        return workspace.root / "trials" / f"{self.name}.json"

    def result(self, workspace: Workspace) -> Trial | ImageError | None:
        """Read the trial or the failure; None where the file has neither under this key."""
        try:
            record = _RECORD.validate_json(self.path(workspace).read_bytes())
        except (OSError, ValueError):
            return None
        if record.key != self.key:
            return None
        return ImageError(*record.failure) if record.failure else record.trial

    def left(self, workspace: Workspace, methods: Sequence[Method]) -> Self | None:  # noqa: ARG002, D102
        return self if self.result(workspace) is None else None

    def failure(self, workspace: Workspace) -> ImageError | None:  # noqa: D102
        result = self.result(workspace)
        return result if isinstance(result, ImageError) else None

    def judge(self, pair: DecodedPair, workspace: Workspace, settings: StageSettings) -> bytes:  # noqa: ARG002, D102
        detectors = {m.name: m.detector(settings.weights) for m in settings.methods if m.name in self.missing}
        exclude = None
        if self.exclude:
            mask = decode_mask(read_content(self.exclude), self.exclude.path)
            valid = on_valid_region(mask, pair.shape, self.exclude.path)
            exclude = mask if mask.shape == pair.shape else np.pad(valid, FRAME)
        asked = settings.benchmarking
        design = Design(seed=asked.seed, min_area=int(asked.min_area))
        trial = run_trial(self.name, pair.inputs, detectors, design, exclude)
        return _RECORD.dump_json(TrialRecord(self.key, trial), exclude_none=True)

    def failed(self, error: ImageError, workspace: Workspace) -> bytes:  # noqa: ARG002, D102
        return _RECORD.dump_json(TrialRecord(self.key, failure=error.failure), exclude_none=True)


def plan_synthetic(settings: Benchmarking) -> Benchmark[SyntheticJob]:
    """Find the pairs and list the methods that each lacks. Writes nothing.

    Raises `UsageError`: a folder or a method cannot be used, or a setting is lacking or contradicts another.
    """
    folders = given_folders(settings)
    for role in ("mse_sr", "gan_sr"):
        if role not in folders:
            flag = f"--{role.replace('_', '-')}"
            raise UsageError(flag, "is not given", "desra benchmark synthetic needs --mse-sr and --gan-sr")
    if settings.min_area.endswith("%"):
        raise UsageError("--min-area", f"{settings.min_area} differs from image to image", "give pixels")
    return plan_benchmark(settings, read_pairs(folders, settings.output), _job)


def read_trials(benchmark: Benchmark[SyntheticJob]) -> list[Trial]:
    """Read the trials of the images that are done."""
    results = [job.result(benchmark.workspace) for _, job in benchmark.work]
    return [result for result in results if isinstance(result, Trial)]


class Rate(NamedTuple):
    """The number of artifacts that were found, and of all of them."""

    found: int
    trials: int

    @property
    def share(self) -> float | None:
        """0..1; None without trials."""
        return ratio(self.found, self.trials)

    @property
    def interval(self) -> tuple[float, float]:
        """The share's 95 % interval, as if the artifacts of one image were independent."""
        return wilson_interval(self.found, self.trials)


class GridPoint(NamedTuple):
    """A method at one threshold and minimal area.

    ``rate`` leaves out artifacts whose places are marked even without the artifact. ``false_regions`` and
    ``false_pixels`` are counted among the ``clean_pixels``.
    """

    threshold: float
    min_area: int
    rate: Rate
    false_regions: int
    false_pixels: int
    clean_pixels: int

    @property
    def regions_per_megapixel(self) -> float | None:
        """False regions in a million clean pixels; None without clean pixels."""
        return ratio(1e6 * self.false_regions, self.clean_pixels)

    @property
    def pixel_share(self) -> float | None:
        """Share of the clean pixels that are marked; None without clean pixels."""
        return ratio(self.false_pixels, self.clean_pixels)


@dataclass(frozen=True)
class MethodSummary:
    """One method over all images that it can be run on.

    Attributes:
        default: At the method's own threshold and the default minimal area. All other fields but ``curve`` are at this
            point.
        cells: The recall by kind, strength and size.
        ratios: The recall of artifacts that add something, by contrast over texture: below the first of `RATIOS`, from
            it to the second, and so on.
        already: The number of artifacts whose places are marked without them.
        iou: The mean over the artifacts that are found; None without any.
        seconds_per_megapixel: The median over the images of the time to compute scores; None without any.
        curve: All points, by threshold and minimal area.
    """

    method: str
    default: GridPoint
    cells: dict[tuple[str, float, int], Rate]
    ratios: tuple[Rate, ...]
    already: int
    iou: float | None
    seconds_per_megapixel: float | None
    curve: tuple[GridPoint, ...]

    def recall(self, *, kind: str | None = None, strength: float | None = None, size: int | None = None) -> Rate:
        """Add up the recall of the artifacts of a kind, strength and size at the default point; None takes all."""
        wanted = (kind, strength, size)
        rates = [
            rate
            for cell, rate in self.cells.items()
            if all(value is None or value == own for value, own in zip(wanted, cell, strict=True))
        ]
        return Rate(sum(rate.found for rate in rates), sum(rate.trials for rate in rates))

    def best(self, pixel_share: float) -> GridPoint | None:
        """Choose the point with the highest recall among those that mark at most this share of the clean pixels."""
        allowed = [point for point in self.curve if point.rate.trials and (point.pixel_share or 0) <= pixel_share]
        return max(allowed, key=lambda point: (point.rate.share or 0, -point.false_pixels), default=None)


@dataclass(frozen=True)
class SyntheticSummary:
    """All methods over all images.

    ``clean_pixels`` counts pixels that are not excluded, ``faint`` the artifacts left out for too little contrast.
    """

    images: int
    clean_pixels: int
    injected: int
    faint: int
    methods: tuple[MethodSummary, ...]


def summarise(trials: Sequence[Trial]) -> SyntheticSummary:
    """Add up the trials of several images (raises `ValueError` where their thresholds or minimal areas differ)."""
    return SyntheticSummary(
        images=len(trials),
        clean_pixels=sum(trial.clean_pixels for trial in trials),
        injected=sum(len({response.case for response in trial.responses}) for trial in trials),
        faint=sum(trial.faint for trial in trials),
        methods=tuple(
            _summarise(method, [trial for trial in trials if method in trial.thresholds])
            for method in dict.fromkeys(method for trial in trials for method in trial.thresholds)
        ),
    )


def _job(
    settings: Benchmarking, example: Example, files: dict[str, File], inputs: dict[Method, list[str]]
) -> SyntheticJob:
    exclude = files.get("exclude")
    methods = [(method.key, method.points, method.thresholds, hashes) for method, hashes in inputs.items()]
    content = [files["mse_sr"].hash, files["gan_sr"].hash, exclude.hash if exclude else None]
    # The name is in the key because it determines the places of the artifacts.
    asked = (settings.min_area, settings.seed, STRENGTHS, SIZES, GRID, MIN_AREAS)
    key = fingerprint("trial", TRIAL_VERSION, example.name, content, methods, asked)
    return SyntheticJob(example.part, example.name, tuple(method.name for method in inputs), exclude, key)


def _summarise(method: str, trials: Sequence[Trial]) -> MethodSummary:
    first = trials[0]
    thresholds, min_areas = first.thresholds[method], first.min_areas
    for trial in trials:
        axes = (trial.thresholds[method], trial.default[method], trial.min_areas, trial.min_area)
        if axes != (thresholds, first.default[method], min_areas, first.min_area):
            raise ValueError(f"{trial.image} was tried with other thresholds or areas of {method} than others were")
    responses = [response for trial in trials for response in trial.responses if response.method == method]
    alarms = [alarm for trial in trials for alarm in trial.false_alarms if alarm.method == method]
    # By response, threshold and minimal area.
    shape = (len(responses), len(thresholds), len(min_areas))
    counted = ~np.array([response.already for response in responses], np.bool_).reshape(shape)
    found = counted & np.array([response.found for response in responses], np.bool_).reshape(shape)
    clean_pixels = sum(trial.clean_pixels for trial in trials)
    false_alarms = (np.array([alarm[part] for alarm in alarms]).sum(axis=0) for part in (1, 2))
    tables = (found.sum(axis=0), counted.sum(axis=0), *false_alarms)
    curve = {}
    for row, threshold in enumerate(thresholds):
        for column, min_area in enumerate(min_areas):
            hits, tries, regions, pixels = (int(table[row, column]) for table in tables)
            curve[threshold, min_area] = GridPoint(
                threshold, min_area, Rate(hits, tries), regions, pixels, clean_pixels
            )

    default = thresholds.index(first.default[method]), min_areas.index(first.min_area)
    cells: dict[tuple[str, float, int], Rate] = {}
    ratios = [Rate(0, 0)] * (len(RATIOS) + 1)
    fits = []
    for response, tried, hit in zip(responses, counted[:, *default].tolist(), found[:, *default].tolist(), strict=True):
        cell = response.case.kind, response.case.strength, response.case.size
        cells[cell] = _plus(cells.get(cell, Rate(0, 0)), hit, tried)
        if response.case.kind in _ADDED:
            ratio = bisect_right(RATIOS, response.contrast / max(response.texture, 1e-9))
            ratios[ratio] = _plus(ratios[ratio], hit, tried)
        if hit:
            fits.append(response.iou)
    seconds = [1e6 * trial.seconds[method] / trial.scored_pixels for trial in trials if trial.scored_pixels]
    return MethodSummary(
        method=method,
        default=curve[first.default[method], first.min_area],
        cells=dict(sorted(cells.items())),
        ratios=tuple(ratios),
        already=int((~counted[:, *default]).sum()),
        iou=sum(fits) / len(fits) if fits else None,
        seconds_per_megapixel=statistics.median(seconds) if seconds else None,
        curve=tuple(curve.values()),
    )


def _plus(rate: Rate, found: bool, tried: bool) -> Rate:
    return Rate(rate.found + found, rate.trials + tried)
