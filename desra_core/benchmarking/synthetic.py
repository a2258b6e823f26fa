"""The benchmark that injects artifacts into clean pairs and needs no ground truth: its jobs, sums and tables."""

import statistics
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from pydantic import TypeAdapter

from desra_core import __version__
from desra_core.benchmarking.benchmark import Benchmark, DecodedPair, Job, Method, Tables, plan_jobs
from desra_core.benchmarking.data_sets import Example, given_folders, read_data_set
from desra_core.benchmarking.injection import FULL_CONTRAST, KINDS, SIZES, STRENGTHS
from desra_core.benchmarking.trial import FAINT, GRID, MIN_AREAS, Trial, run_trial
from desra_core.detection.detectors import DEFAULT
from desra_core.errors import Failure, ImageError, printable
from desra_core.evaluation.mask_files import FRAME, decode_any_mask, on_valid_region
from desra_core.evaluation.metrics import ratio, wilson_interval
from desra_core.evaluation.table import Section, as_csv, counted, failure_rows, fixed, in_percent
from desra_core.files import fingerprint
from desra_core.settings.models import SyntheticBenchmarking
from desra_core.stages import read_content
from desra_core.workspace import Workspace
from desra_core.workspace.manifest import File

# Raise it when a bit of a trial changes.
TRIAL_VERSION = 2

# Kinds that add contrast. A table shows their recall by the ratio of this contrast to the MSE result's texture at the
# same place: below 1, from 1 to 2, from 2 to 4, and from 4 on.
_ADDED = frozenset({"blotches", "checkerboard", "worms", "ringing"})
RATIO_BOUNDS = (1.0, 2.0, 4.0)

# The table "Recall at a price" has a column for each of these shares of the clean pixels that may be marked.
BUDGETS = (0.001, 0.003, 0.01, 0.03, 0.1)

_OWN_NOTE = (
    "An artifact is found where at least half of its place is marked. Artifacts are left out where a method marks the "
    "place without them, too. Intervals in brackets hold 95 % and take the artifacts of one image as independent."
)
_PRICE_NOTE = (
    "The highest recall of all thresholds and minimal areas (in brackets) that mark no more than this share of the "
    "clean pixels. Thresholds are those of scores; desra's score is 1 - adjusted similarity, so 0.3 is its "
    "--threshold 0.7."
)
_RATIO_NOTE = (
    "Of artifacts that add something (blotches, checkerboards, worms, ringing), by their contrast as a multiple of the "
    "MSE result's texture at their place: D sees a ratio of contrasts, so texture hides artifacts."
)
_WHY = (
    "D compares local contrasts and nothing else. A shift of colour changes none. A flattened GAN result first grows "
    "like its MSE twin, which is flat itself, and then has to be 2.45 times flatter. A wide blotch has contrast at its "
    "border only. In texture, an artifact has to raise the contrast to 2.45 times that of the twin (weight 1)."
)


@dataclass(frozen=True)
class TrialRecord:
    """The content of an image's file: its trial, or why it failed."""

    key: str
    trial: Trial | None = None
    failure: Failure | None = None


_RECORD = TypeAdapter(TrialRecord)


@dataclass(frozen=True)
class SyntheticJob(Job):
    """A pair to inject artifacts into; ``exclude`` is the mask of artifacts that the pair has already."""

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

    def left(self, workspace: Workspace, methods: Sequence[Method]) -> Self | ImageError | None:  # noqa: ARG002, D102
        result = self.result(workspace)
        return None if isinstance(result, Trial) else (result or self)

    def judge(self, pair: DecodedPair, benchmark: Benchmark[Any]) -> bytes:  # noqa: D102
        detectors = {m.name: m.detector(benchmark.weights) for m in benchmark.methods if m.name in self.missing}
        exclude = None
        if self.exclude:
            mask = decode_any_mask(read_content(self.exclude), self.exclude.path)
            valid = on_valid_region(mask, pair.shape, self.exclude.path)
            exclude = mask if mask.shape == pair.shape else np.pad(valid, FRAME)
        settings = benchmark.settings
        assert isinstance(settings, SyntheticBenchmarking)
        trial = run_trial(
            self.name, pair.inputs, detectors, exclude, seed=settings.seed, min_area=int(settings.min_area)
        )
        return _RECORD.dump_json(TrialRecord(self.key, trial), exclude_none=True)

    def failed(self, error: ImageError, workspace: Workspace) -> bytes:  # noqa: ARG002, D102
        return _RECORD.dump_json(TrialRecord(self.key, failure=error.failure), exclude_none=True)


def plan_synthetic(settings: SyntheticBenchmarking) -> Benchmark[SyntheticJob]:
    """Find the pairs and list the methods that each lacks. Writes nothing.

    Raises `UsageError`: a folder or a method cannot be used, or a setting contradicts another.
    """
    data_set = read_data_set(None, given_folders(settings), settings.output)
    return plan_jobs(settings, data_set, partial(_job, settings))


def read_trials(benchmark: Benchmark[SyntheticJob]) -> list[Trial]:
    """Read the trials of the images that are done."""
    results = [job.result(benchmark.workspace) for _, job in benchmark.work]
    return [result for result in results if isinstance(result, Trial)]


class Rate(NamedTuple):
    """The number of artifacts that were found, and the number of artifacts that count."""

    found: int
    counted: int

    @property
    def share(self) -> float | None:
        """The share of these artifacts that was found, 0..1; None without artifacts."""
        return ratio(self.found, self.counted)

    @property
    def interval(self) -> tuple[float, float]:
        """The share's 95 % interval, as if the artifacts of one image were independent."""
        return wilson_interval(self.found, self.counted)


class _GridPoint(NamedTuple):
    """A method at one threshold and minimal area."""

    threshold: float
    min_area: int
    rate: Rate  # without artifacts whose places are marked in the clean pair too
    false_regions: int
    false_pixels: int  # clean pixels that are marked
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
class _MethodSummary:
    """One method over all images that it can be run on."""

    method: str
    # At the method's own threshold and the default minimal area. All other fields but ``curve`` are at this point.
    default: _GridPoint
    cells: dict[tuple[str, float, int], Rate]  # the recall by kind, strength and size
    # The recall of the kinds that add contrast, in the four ranges of contrast over texture between `RATIO_BOUNDS`.
    by_ratio: tuple[Rate, ...]
    marked_before: int  # artifacts that do not count, because at least half of their place is marked in the clean pair
    iou: float | None  # the mean over the artifacts that are found; None without any
    seconds_per_megapixel: float | None  # time to compute scores: the median over the images; None without images
    curve: tuple[_GridPoint, ...]  # all points, by threshold and minimal area

    def recall(self, *, kind: str | None = None, strength: float | None = None, size: int | None = None) -> Rate:
        """Add up the recall at the default point over artifacts of a kind, strength and size; None stands for all."""
        wanted = (kind, strength, size)
        return _total(
            rate
            for cell, rate in self.cells.items()
            if all(value is None or value == own for value, own in zip(wanted, cell, strict=True))
        )

    def best(self, pixel_share: float) -> _GridPoint | None:
        """Choose the point with the highest recall among those that mark at most this share of the clean pixels."""
        allowed = [point for point in self.curve if point.rate.counted and (point.pixel_share or 0) <= pixel_share]
        return max(allowed, key=lambda point: (point.rate.share or 0, -point.false_pixels), default=None)


@dataclass(frozen=True)
class SyntheticSummary:
    """All methods over all images."""

    images: int
    clean_pixels: int  # pixels that are not excluded
    injected: int
    faint: int  # artifacts left out for too little contrast
    methods: tuple[_MethodSummary, ...]


def summarise(trials: Sequence[Trial]) -> SyntheticSummary:
    """Add up the trials of several images, which have the same thresholds and minimal areas."""
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


def synthetic_tables(
    benchmark: Benchmark[SyntheticJob], summary: SyntheticSummary, failures: Sequence[ImageError]
) -> Tables:
    """Format the results as tables with explanations, as CSV (recall by kind, strength and size) and for JSON."""
    rows = to_rows(summary)
    assert isinstance(benchmark.settings, SyntheticBenchmarking)
    settings = benchmark.settings.model_dump(mode="json")
    return Tables(
        stem="synthetic",
        title=f"Synthetic benchmark on {printable(benchmark.settings.gan_sr.name)}",
        sections=sections_of(summary),
        brief=brief_of(summary),
        csv=as_csv(rows["recall"], list(rows["recall"][0]) if rows["recall"] else ["method"]),
        document={"desra": __version__, "settings": settings, **rows, "failures": failure_rows(failures)},
    )


def sections_of(summary: SyntheticSummary) -> list[Section]:
    """List all sections: tables with explanations, of which the recall by kind says what DeSRA does not see."""
    methods = summary.methods
    if not methods or not summary.injected:
        nothing = "Nothing could be injected: the images are too small, or marked or excluded as a whole."
        return [Section(note=nothing)]
    preface = (
        f"{summary.injected} artifacts in {summary.images} pairs ({summary.clean_pixels / 1e6:.1f} MP that count as "
        f"clean); {summary.faint} more were left out, because the image gave them less than {FAINT:g} grey levels of "
        f"contrast. Strength 1 adds {FULL_CONTRAST:g} grey levels of contrast (RMS), or takes the whole texture away. "
        "False alarms are marked regions of the unchanged pairs, also artifacts that were not excluded. Regions of at "
        f"most {methods[0].default.min_area:,} px are dropped, unless said otherwise."
    )
    kinds = [
        {"kind": _named(kind)} | {method.method: _share(method.recall(kind=kind)) for method in methods}
        for kind in (*KINDS, None)
    ]
    by_kind = Section("Recall by kind", table=kinds)
    if any(method.method.partition(", ")[0] == DEFAULT for method in methods):
        by_kind = Section(f"Recall by kind: what {DEFAULT} does not see", note=_WHY, table=kinds)
    bounds = RATIO_BOUNDS
    ranges = [f"below {bounds[0]:g}", *(f"{low:g} to {high:g}" for low, high in pairwise(bounds))]
    ratios = [
        {"contrast / texture": words} | {method.method: _share(method.by_ratio[number]) for method in methods}
        for number, words in enumerate([*ranges, f"{bounds[-1]:g} and more"])
    ]
    own, prices = [], []
    for method in methods:
        point = method.default
        own.append({
            "method": method.method,
            "threshold": f"{point.threshold:.4g}",
            "recall": _share(point.rate),
            "IoU of finds": fixed(method.iou, 2),
            "marked before": str(method.marked_before),
            "false regions per MP": fixed(point.regions_per_megapixel, 2),
            "clean pixels marked": in_percent(point.pixel_share, form=".3g"),
            "s per MP": fixed(method.seconds_per_megapixel, 2),
        })  # fmt: skip
        prices.append({"method": method.method})
        for budget in BUDGETS:
            best = method.best(budget)
            at = f" ({best.threshold:.3g}, {best.min_area})" if best else ""
            prices[-1][f"{100 * budget:g} %"] = in_percent(best.rate.share if best else None, form=".3g") + at
    return [
        Section(note=preface),
        Section("Methods at their own thresholds", note=_OWN_NOTE, table=own),
        by_kind,
        Section("Recall by contrast over texture", note=_RATIO_NOTE, table=ratios),
        Section("Recall at a price", note=_PRICE_NOTE, table=prices),
        *(
            Section(f"{method.method}: recall by kind, strength and size", table=_cell_rows(method))
            for method in methods
        ),
    ]


def brief_of(summary: SyntheticSummary) -> list[Section]:
    """Sum up all methods in one table for a terminal: recall of all artifacts and of each kind, and false alarms."""
    if not summary.methods or not summary.injected:
        return sections_of(summary)
    note = f"{summary.injected:,} artifacts in {counted(summary.images, 'pair')}: recall in %, false regions per MP, "
    note += "clean pixels marked in %"
    elsewhere = "The files have the tables by strength, size, texture and price:"

    def percent(share: float | None) -> str:
        return fixed(None if share is None else 100 * share, 0)

    rows = []
    for method in summary.methods:
        point = method.default
        clean = None if point.pixel_share is None else 100 * point.pixel_share
        rows.append(
            {"method": method.method, "all": percent(point.rate.share)}
            | {_named(kind): percent(method.recall(kind=kind).share) for kind in KINDS}
            | {"false/MP": fixed(point.regions_per_megapixel, 2), "clean %": fixed(clean, 2)}
        )
    return [Section(note=note, table=rows), Section(note=elsewhere)]


def to_rows(summary: SyntheticSummary) -> dict[str, list[dict[str, Any]]]:
    """List the tables for JSON and CSV, with shares in 0..1.

    ``recall`` is by method, kind, strength and size at the default point. ``methods`` has each method at its default
    point, ``curve`` has each method at all points. ``texture`` is the recall by contrast over texture.
    """
    tables: dict[str, list[dict[str, Any]]] = {"recall": [], "methods": [], "curve": [], "texture": []}
    for method in summary.methods:
        name = {"method": method.method}
        for (kind, strength, size), rate in method.cells.items():
            tables["recall"].append(name | {"kind": kind, "strength": strength, "size": size} | _rate(rate))
        own = {
            "already": method.marked_before,
            "iou": method.iou,
            "seconds_per_megapixel": method.seconds_per_megapixel,
        }
        tables["methods"].append(name | _point(method.default) | own)
        tables["curve"] += [name | _point(point) for point in method.curve]
        for low, rate in zip((0.0, *RATIO_BOUNDS), method.by_ratio, strict=True):
            tables["texture"].append(name | {"at_least": low} | _rate(rate))
    return tables


def curves(summary: SyntheticSummary) -> dict[str, list[tuple[float, float]]]:
    """Trace the operating curve of each method; a point that marks more than another but finds no more is left out.

    Points are ascending pairs: the share of the clean pixels that is marked, and the recall.
    """
    fronts = {}
    for method in summary.methods:
        points = {(point.pixel_share or 0.0, point.rate.share or 0.0) for point in method.curve if point.rate.counted}
        front: list[tuple[float, float]] = []
        for price, recall in sorted(points, key=lambda point: (point[0], -point[1])):
            if not front or recall > front[-1][1]:
                front.append((price, recall))
        fronts[method.method] = front
    return fronts


def _job(
    settings: SyntheticBenchmarking, example: Example, files: dict[str, File], inputs: dict[Method, list[str]]
) -> SyntheticJob:
    exclude = files.get("exclude")
    methods = [(method.key, method.points, method.thresholds, hashes) for method, hashes in inputs.items()]
    content = [files["mse_sr"].hash, files["gan_sr"].hash, exclude.hash if exclude else None]
    # The name is in the key because it determines the places of the artifacts.
    asked = (settings.min_area, settings.seed, STRENGTHS, SIZES, GRID, MIN_AREAS)
    key = fingerprint("trial", TRIAL_VERSION, example.name, content, methods, asked)
    return SyntheticJob(example.part, example.name, tuple(method.name for method in inputs), {}, exclude, key)


def _summarise(method: str, trials: Sequence[Trial]) -> _MethodSummary:
    first = trials[0]
    thresholds, min_areas = first.thresholds[method], first.min_areas
    responses = [response for trial in trials for response in trial.responses if response.method == method]
    alarms = [alarm for trial in trials for alarm in trial.false_alarms if alarm.method == method]
    # Both arrays have the axes response, threshold and minimal area.
    shape = (len(responses), len(thresholds), len(min_areas))
    counted = ~np.array([response.already for response in responses], np.bool_).reshape(shape)
    found = counted & np.array([response.found for response in responses], np.bool_).reshape(shape)
    clean_pixels = sum(trial.clean_pixels for trial in trials)
    false_alarms = (np.array([getattr(alarm, part) for alarm in alarms]).sum(axis=0) for part in ("regions", "pixels"))
    tables = (found.sum(axis=0), counted.sum(axis=0), *false_alarms)
    curve = {}
    for row, threshold in enumerate(thresholds):
        for column, min_area in enumerate(min_areas):
            hits, tries, regions, pixels = (int(table[row, column]) for table in tables)
            curve[threshold, min_area] = _GridPoint(
                threshold, min_area, Rate(hits, tries), regions, pixels, clean_pixels
            )

    default = thresholds.index(first.default[method]), min_areas.index(first.min_area)
    cells: dict[tuple[str, float, int], list[tuple[bool, bool]]] = {}
    by_ratio: list[list[tuple[bool, bool]]] = [[] for _ in range(len(RATIO_BOUNDS) + 1)]
    fits = []
    for response, tried, hit in zip(responses, counted[:, *default].tolist(), found[:, *default].tolist(), strict=True):
        case = response.case
        cells.setdefault((case.kind, case.strength, case.size), []).append((hit, tried))
        if case.kind in _ADDED:
            by_ratio[bisect_right(RATIO_BOUNDS, response.contrast / max(response.texture, 1e-9))].append((hit, tried))
        if hit:
            fits.append(response.iou)
    seconds = [1e6 * trial.seconds[method] / trial.scored_pixels for trial in trials if trial.scored_pixels]
    return _MethodSummary(
        method=method,
        default=curve[first.default[method], first.min_area],
        cells={cell: _total(rows) for cell, rows in sorted(cells.items())},
        by_ratio=tuple(map(_total, by_ratio)),
        marked_before=int((~counted[:, *default]).sum()),
        iou=sum(fits) / len(fits) if fits else None,
        seconds_per_megapixel=statistics.median(seconds) if seconds else None,
        curve=tuple(curve.values()),
    )


def _total(rates: Iterable[tuple[int, int]]) -> Rate:
    """Add up pairs of the number of artifacts that were found and the number that count."""
    rows = list(rates)
    return Rate(sum(found for found, _ in rows), sum(tried for _, tried in rows))


def _named(kind: str | None) -> str:
    return (kind or "all").replace("_", " ")


def _axes(method: _MethodSummary) -> tuple[list[float], list[int]]:
    return sorted({strength for _, strength, _ in method.cells}), sorted({size for *_, size in method.cells})


def _cell_rows(method: _MethodSummary) -> list[dict[str, str]]:
    strengths, sizes = _axes(method)

    def row(kind: str | None) -> dict[str, str]:
        cells = {f"strength {value:g}": method.recall(kind=kind, strength=value) for value in strengths}
        cells |= {f"{size:,} px": method.recall(kind=kind, size=size) for size in sizes}
        return {"kind": _named(kind)} | {name: _share(rate) for name, rate in cells.items()}

    return [row(kind) for kind in (*KINDS, None)]


def _point(point: _GridPoint) -> dict[str, Any]:
    return {
        "threshold": point.threshold,
        "min_area": point.min_area,
        **_rate(point.rate),
        "false_regions": point.false_regions,
        "false_regions_per_megapixel": point.regions_per_megapixel,
        "false_pixels": point.false_pixels,
        "false_pixel_share": point.pixel_share,
    }


def _rate(rate: Rate) -> dict[str, Any]:
    low, high = rate.interval
    return {"found": rate.found, "counted": rate.counted, "recall": rate.share, "low": low, "high": high}


def _share(rate: Rate) -> str:
    share = in_percent(rate.share, rate.interval, form=".0f")
    return share if rate.share is None else f"{share} of {rate.counted}"
