"""The results of the benchmark on a data set with ground-truth masks: its rows, their ranks, and the tables."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from desra_core import __version__
from desra_core.benchmarking.annotated import AnnotatedJob, ImageRecord, MethodRun, overlap_grid, read_records
from desra_core.benchmarking.benchmark import (
    FACTORS,
    Benchmark,
    Method,
    OperatingPoint,
    Tables,
)
from desra_core.benchmarking.data_sets import ROLES
from desra_core.errors import ImageError, printable
from desra_core.evaluation import metrics
from desra_core.evaluation.metrics import (
    Agreement,
    MaskScores,
    Overlap,
    mean_iou,
    measure,
    pooled,
    ratio,
    score_masks,
    scores_document,
)
from desra_core.evaluation.score_histogram import (
    AveragePrecision,
    pooled_histogram,
    rank_correlation,
    ranks,
)
from desra_core.evaluation.summary import overlap_told
from desra_core.evaluation.table import Section, as_csv, counted, failure_rows, fixed, in_percent
from desra_core.files import fingerprint
from desra_core.settings.models import Benchmarking, Measuring

ALL = "all parts"

# From the DeSRA paper: IoU, precision and recall.
PUBLISHED = {
    "DeSRA": (0.511, 0.7055, 0.6081),
    "NIQE": (0.029, 0.0494, 0.1054),
    "PAL4Inpainting": (0.084, 0.0855, 0.0992),
    "LDL, 0.01": (0.299, 0.3504, 0.3485),
    "LDL, 0.005": (0.362, 0.2618, 0.5442),
    "LDL, 0.001": (0.353, 0.1410, 0.8391),
}
_CORRESPONDING = (
    "The columns are IoU, precision and recall above, which are computed as by the authors' scripts. DeSRA is the row "
    "desra, with class weights and regions above 4000 px; LDL is the row ldl of the same threshold, though it is not "
    "known whether its masks had the same morphology and minimal area. Which blocks and which threshold NIQE had is "
    "not known, so niqe need not correspond to it. PAL4Inpainting has no row here, and the other methods have none "
    "there. The paper has no F1, PR-AUC, pixel F1, share flagged or rank correlation."
)
PUBLISHED_TITLE = "Published, on the authors' data (their Real-ESRGAN set; not measured here)"

# What is varied.
_KAPPA, _DILATION, THRESHOLD = "overlap (kappa)", "dilation, px", "threshold, × own"

# The measures by which methods are ranked: whether more (1) or less (-1) is better.
RANKED = {"pr_auc": 1, "pixel_f1": 1, "pixel_f1_mean": 1, "recall_at_kappa": 1, "rank_correlation": 1,
          "flagged_share": -1}  # fmt: skip


class MethodRow(NamedTuple):
    """The results of a method at an operating point over the images of a part."""

    part: str
    method: Method
    point: OperatingPoint
    scores: MaskScores
    seconds: float  # per megapixel, for score map and mask in one thread: the median over the images
    curve: AveragePrecision | None  # over the pixels of all images together, of any threshold
    prominent: MaskScores | None  # against the prominent regions alone; None without ratings
    prominent_curve: AveragePrecision | None
    correlation: float | None  # rank correlation of the mean score of a rated region with its share of viewers
    rated: int  # regions that are rated and have a score
    reference_hash: str  # of the reference's results in this part
    rank: float = 0.0  # among the rows of the same part and reference, see `mean_ranks`

    @property
    def entry(self) -> str:
        """The name of the operating point without the reference."""
        return self.method.plain(self.point.name)

    @property
    def reference(self) -> str:
        """The name of the results with which the GAN results are compared."""
        return self.method.reference or ROLES["mse_sr"]

    @property
    def measures(self) -> dict[str, float | None]:
        """The measures of the row by name."""
        area = self.curve and self.curve.value
        return self.scores.values | {"pr_auc": area, "rank_correlation": self.correlation}


class _PublishedRow(NamedTuple):
    """Agreement of the masks at an operating point with the DeSRA masks of the data set."""

    part: str
    entry: str  # the name of the operating point
    images: int
    same: int  # images whose masks are equal
    iou: float  # mean over the images, where two empty masks count as 1
    equal: float  # share of equal pixels


# By name, the points of a curve: what is varied, and the mean rank.
Curves = dict[str, list[tuple[float, float]]]


@dataclass(frozen=True)
class AnnotatedResults:
    """All numbers of a benchmark."""

    rows: list[MethodRow]
    published: list[_PublishedRow]
    curves: dict[str, list[tuple[float, Agreement]]]  # by method and ascending threshold: sums over all images
    labels_seconds: float | None  # per megapixel: the median over the images whose class labels were computed
    records: list[ImageRecord]
    sensitivity: dict[str, Curves]  # mean ranks over all references by what is varied, then by method

    @property
    def overall(self) -> list[MethodRow]:
        """The rows of all parts together."""
        return [row for row in self.rows if row.part == self.rows[-1].part]


def mean_ranks(rows: Sequence[Mapping[str, float | None]]) -> list[float]:
    """Rank rows by each of `RANKED`, the best one as 1, and average the ranks of each row.

    Equal values share the mean of their ranks. A row without a value ranks last; a measure that no row has is left out.
    """
    columns = []
    for name, sign in RANKED.items():
        values = [row[name] for row in rows]
        if any(value is not None for value in values):
            columns.append(ranks([np.inf if value is None else -sign * value for value in values]))
    return list(map(float, np.mean(columns, axis=0))) if columns else [0.0] * len(rows)


def _over_references(rows: Sequence[MethodRow], measures: Sequence[Mapping[str, float | None]]) -> dict[str, float]:
    """Average the rank of each operating point over the references."""
    found: dict[str, list[float]] = {}
    for reference in dict.fromkeys(row.reference for row in rows):
        chosen = [index for index, row in enumerate(rows) if row.reference == reference]
        for index, rank in zip(chosen, mean_ranks([measures[index] for index in chosen]), strict=True):
            found.setdefault(rows[index].entry, []).append(rank)
    return {entry: statistics.fmean(values) for entry, values in found.items()}


def results_of(benchmark: Benchmark[AnnotatedJob]) -> AnnotatedResults:
    """Add up the records of the judged images: rows per part and operating point, and over all parts at the end."""
    records = read_records(benchmark)
    jobs = {(job.part, job.name): job for _, job in benchmark.work}
    by_part: dict[str, list[ImageRecord]] = {}
    for record in records:
        by_part.setdefault(record.part, []).append(record)
    if len(by_part) != 1:
        by_part |= {ALL: records}
    rows, published = [], []
    for part, chosen in by_part.items():
        for method in benchmark.methods:
            judged = [record for record in chosen if method.name in record.runs]
            runs = [(record.megapixels, record.runs[method.name]) for record in judged]
            of = [jobs[record.part, record.name] for record in judged]
            histogram = pooled_histogram(job.histogram_path(benchmark.workspace, method) for job in of)
            pairs = [pair for job, (_, run) in zip(of, runs, strict=True) for pair in _rated(job, run.regions)]
            for point in method.points if runs else ():
                scores = score_masks([run.agreements[point.name] for _, run in runs])
                seconds = statistics.median(run.seconds[point.name] / megapixels for megapixels, run in runs)
                prominent = [run.prominent[point.name] for _, run in runs if point.name in run.prominent]
                rows.append(
                    MethodRow(
                        part, method, point, scores, seconds,
                        curve=histogram.average_precision(),
                        prominent=score_masks(prominent) if prominent else None,
                        prominent_curve=histogram.average_precision(prominent=True) if prominent else None,
                        correlation=rank_correlation([mean for mean, _ in pairs], [share for _, share in pairs]),
                        rated=len(pairs),
                        reference_hash=_reference_hash(benchmark, part, method.reference),
                    )
                )  # fmt: skip
                if agreed := [run.published[point.name] for _, run in runs if point.name in run.published]:
                    total, iou = pooled(agreed), mean_iou(agreed, empty=1.0)
                    same = sum(image.intersection == image.union for image in agreed)
                    equal = 1 - (total.union - total.intersection) / total.pixels
                    published.append(_PublishedRow(part, point.name, len(agreed), same, iou or 0.0, equal))
    curves = {}
    for method in benchmark.methods:
        traced = [record.runs[method.name].curve for record in records if method.name in record.runs]
        if traced and method.thresholds:
            columns = zip(*traced, strict=True)
            curves[method.name] = [(column[0][0], pooled(agreement for _, agreement in column)) for column in columns]
    rates = [record.labels_seconds / record.megapixels for record in records if record.labels_seconds is not None]
    groups: dict[tuple[str, str], list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault((row.part, row.reference), []).append(index)
    for group in groups.values():
        for index, rank in zip(group, mean_ranks([rows[index].measures for index in group]), strict=True):
            rows[index] = rows[index]._replace(rank=rank)
    return AnnotatedResults(
        rows, published, curves, statistics.median(rates) if rates else None, records,
        _sensitivity([row for row in rows if row.part == rows[-1].part], records, benchmark.settings),
    )  # fmt: skip


def _rated(job: AnnotatedJob, means: Sequence[float | None]) -> Iterator[tuple[float, float]]:
    """Yield the mean score of each rated region of an image, and the share of viewers who noticed it."""
    ratings = job.severity.ratings.get(job.title, {}) if job.severity else {}
    for number, rating in ratings.items():
        mean = means[number - 1]
        if rating.noticed is not None and mean is not None:
            yield mean, rating.noticed


def _reference_hash(benchmark: Benchmark[AnnotatedJob], part: str, reference: str) -> str:
    """Identify the results of a reference by the contents of its files in a part of the data set."""
    files = [job.references.get(reference, image.mse_sr) for image, job in benchmark.work if part in (ALL, job.part)]
    return fingerprint(sorted(file.hash for file in files if file))


def _sensitivity(rows: Sequence[MethodRow], records: Sequence[ImageRecord], settings: Measuring) -> dict[str, Curves]:
    """Compute the mean ranks of the rows with another overlap, dilation or threshold, all else being equal."""
    assert isinstance(settings, Benchmarking)
    found: dict[str, Curves] = {_KAPPA: {}, _DILATION: {}, THRESHOLD: {}}

    def add(varied: str, value: float, chosen: Sequence[MethodRow], measures: Sequence[Mapping[str, Any]]) -> None:
        for entry, rank in _over_references(chosen, measures).items():
            found[varied].setdefault(entry, []).append((value, rank))

    def runs(row: MethodRow) -> list[MethodRun]:
        return [record.runs[row.method.name] for record in records if row.method.name in record.runs]

    def regions_found(row: MethodRow, dilation: int, kappa: int) -> dict[str, float | None]:
        times = sum(run.found[row.point.name][dilation][kappa] for run in runs(row))
        return row.measures | {"recall_at_kappa": ratio(times, row.scores.total.marked)}

    dilations, kappas = overlap_grid(settings)
    own = dilations.index(settings.dilate), kappas.index(settings.kappa)
    for index, kappa in enumerate(kappas):
        add(_KAPPA, kappa, rows, [regions_found(row, own[0], index) for row in rows])
    for index, dilate in enumerate(dilations):
        add(_DILATION, dilate, rows, [regions_found(row, index, own[1]) for row in rows])
    # A method with several operating points has one curve, which is named by the one at the method's own threshold.
    nearest = sorted(rows, key=lambda row: -abs(row.point.threshold - row.method.own_threshold))
    traced = {row.method.name: row for row in nearest if row.method.thresholds}
    traced = {row.method.name: traced[row.method.name] for row in rows if row.method.name in traced}
    for index, factor in enumerate(FACTORS if traced else ()):
        chosen = list(traced.values())
        measured = [row.measures | measure([run.curve[index][1] for run in runs(row)]) for row in chosen]
        add(THRESHOLD, factor, chosen, measured)
    return found


def annotated_tables(
    benchmark: Benchmark[AnnotatedJob], results: AnnotatedResults, failures: Sequence[ImageError]
) -> Tables:
    """Format all results as tables with explanations, as CSV and as a document for JSON."""
    assert isinstance(benchmark.settings, Benchmarking)
    title = f"Benchmark on {printable(benchmark.settings.dataset.name)}"
    lines = []
    for row in results.rows:
        scores = row.scores
        line: dict[str, Any] = {"part": row.part, "method": row.entry, "threshold": row.point.threshold}
        line |= {"images": scores.images, "empty_pairs": scores.empty_pairs}
        line |= {"reference": row.reference, "reference_hash": row.reference_hash}
        for name, value in scores.values.items():
            low, high = scores.intervals[name] or (None, None)
            line |= {name: value, f"{name}_low": low, f"{name}_high": high}
        line |= {name: getattr(scores.total, name) for name in ("detected", "right", "marked", "found")}
        line |= _further_numbers(row)
        if row.prominent:
            line |= {f"prominent_{name}": value for name, value in row.prominent.values.items()}
        lines.append(line | {"seconds_per_megapixel": round(row.seconds, 4)})
    return Tables(
        stem="benchmark",
        title=title,
        sections=_sections(benchmark, results),
        csv=as_csv(lines, list(lines[0]) if lines else ["part", "method"]),
        document=_document(benchmark, results, failures),
    )


def _sections(benchmark: Benchmark[AnnotatedJob], results: AnnotatedResults) -> list[Section]:
    settings = benchmark.settings
    assert isinstance(settings, Benchmarking)
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
        sections = [Section(note=f"{preface}\n\n{times}.", table=_method_cells(results.rows, settings))]
        sections += _score_sections(results, settings)
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
    measures = {"IoU": 3, "precision": 4, "recall": 4}
    paper = [
        {"method": method}
        | {name: f"{value:.{digits}f}" for (name, digits), value in zip(measures.items(), row, strict=True)}
        for method, row in PUBLISHED.items()
    ]
    return [*sections, Section(PUBLISHED_TITLE, note=_CORRESPONDING, table=paper)]


def _further_numbers(row: MethodRow) -> dict[str, Any]:
    """Describe the numbers of a row that its masks alone do not give."""
    areas = {"pr_auc": row.curve} | ({"prominent_pr_auc": row.prominent_curve} if row.prominent else {})
    numbers: dict[str, Any] = {"found_at_kappa": row.scores.total.found_at_kappa}
    for name, area in areas.items():
        numbers |= {name: area and area.value, f"{name}_error": area and area.error}
    return numbers | {"rank_correlation": row.correlation, "rated_regions": row.rated, "mean_rank": row.rank}


def _score_sections(results: AnnotatedResults, settings: Benchmarking) -> list[Section]:
    """Describe the scores of later papers: of all regions, of the prominent ones, and over all references."""
    overlap = overlap_told(Overlap(settings.kappa, settings.dilate))
    note = (
        "PR-AUC is the average precision over the pixels of all images together, of any threshold. Pixel F1 is that of "
        f"all pixels, and the mean over images. Found: regions with {overlap}. Flagged: the share of the pixels that "
        "are marked. "
    )
    if any(row.rated for row in results.rows):
        note += "Rank correlation (Spearman): of the mean score of a region with the share of viewers who noticed it. "
    note += "Mean rank: over these columns, the best method as 1 (flagged: the fewest)."
    largest = max((area.error for row in results.rows if (area := row.curve)), default=0.0)
    note += f" The exact PR-AUC may be up to {largest:.1g} from these values."
    sections = [Section("Scores of pixels and regions", note=note, table=_score_cells(results.rows, settings))]
    if any(row.prominent for row in results.rows):
        told = (
            f"Of the regions that at least {100 * settings.prominent:g} % of the viewers noticed; the others do not "
            "count, nor detected regions that are right only by them."
        )
        prominent = [
            row._replace(scores=row.prominent, curve=row.prominent_curve) for row in results.rows if row.prominent
        ]
        table = _method_cells(prominent, settings, seconds=False)
        scores = _score_cells(prominent, settings, ranked=False)
        table = [cells | more for cells, more in zip(table, scores, strict=True)]
        sections.append(Section("Prominent regions", note=told, table=table))
    if settings.reference:
        overall = results.overall
        means = _over_references(overall, [row.measures for row in overall])
        ranked = [
            {"method": entry, "mean rank": fixed(mean, 2)}
            | dict.fromkeys((row.reference for row in overall), "–")
            | {row.reference: fixed(row.rank, 2) for row in overall if row.entry == entry}
            for entry, mean in sorted(means.items(), key=lambda item: item[1])
        ]
        hashes = "; ".join(dict.fromkeys(f"{row.reference} {row.reference_hash[:12]}" for row in overall))
        note = f"The mean rank of each method, the best first, and for each reference. Hashes of the results: {hashes}."
        sections.append(Section("Mean rank over all references", note=note, table=ranked))
    return sections


def _score_cells(rows: Sequence[MethodRow], settings: Benchmarking, *, ranked: bool = True) -> list[dict[str, str]]:
    """Format the scores of rows as text."""
    formatted = []
    for row in rows:
        total, values = row.scores.total, row.scores.values
        cells = _named(row, settings) | {
            "PR-AUC": fixed(row.curve and row.curve.value),
            "pixel F1": fixed(values["pixel_f1"]),
            "mean": fixed(values["pixel_f1_mean"]),
            "found": f"{total.found_at_kappa:,} of {total.marked:,}",
            "flagged": in_percent(values["flagged_share"]),
        }
        if ranked:
            if any(each.rated for each in rows):
                cells["rank correlation"] = fixed(row.correlation)
            cells["mean rank"] = fixed(row.rank, 2)
        formatted.append(cells)
    return _without_single_part(formatted)


def _named(row: MethodRow, settings: Benchmarking) -> dict[str, str]:
    """Name a row: its part, its method and, where there are several, its reference."""
    cells = {"part": row.part, "method": row.entry}
    return cells | {"reference": row.reference} if settings.reference else cells


def _method_cells(rows: Sequence[MethodRow], settings: Benchmarking, *, seconds: bool = True) -> list[dict[str, str]]:
    """Format the rows as text, measures with their 95 % intervals."""
    measures = {"iou": "IoU", "precision": "precision", "recall": "recall", "f1": "F1"}
    if any(row.scores.empty_pairs for row in rows):
        measures = {"iou": "IoU", "iou_with_empty": "IoU, both empty = 1"} | measures
    formatted = []
    for row in rows:
        cells = _named(row, settings) | {"images": str(row.scores.images)}
        for name, title in measures.items():
            interval = row.scores.intervals[name]
            bounds = f" ({interval[0]:.2f}–{interval[1]:.2f})" if interval else ""
            cells[title] = fixed(row.scores.values[name]) + bounds
        formatted.append(cells | ({"s/MP": f"{row.seconds:.3f}"} if seconds else {}))
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
            {"part": row.part, "method": row.entry, "threshold": row.point.threshold,
             "reference": {"name": row.reference, "hash": row.reference_hash},
             "seconds_per_megapixel": round(row.seconds, 4)} | scores_document(row.scores) | _further_numbers(row)
            | ({"prominent": scores_document(row.prominent)} if row.prominent else {})
            for row in results.rows
        ],
        "mean_ranks": _over_references(results.overall, [row.measures for row in results.overall]),
        "sensitivity": results.sensitivity,
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
