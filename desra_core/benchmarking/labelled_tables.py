"""The results of a benchmark with ground-truth masks: the paper's table with times, curves, and files."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from desra_core import __version__
from desra_core.benchmarking.benchmark import Benchmark, Method, OperatingPoint
from desra_core.benchmarking.labelled import ImageRecord, LabelledJob, PixelAgreement, read_records
from desra_core.errors import ImageError, printable
from desra_core.evaluation import metrics, table
from desra_core.evaluation.metrics import Agreement, MaskScores, pooled, score_masks, scores_document
from desra_core.evaluation.table import Section, counted, failure_rows, fixed

STEM = "benchmark"
ALL = "all parts"

# From the DeSRA paper: IoU, precision and recall of DeSRA, IoU of the others; see docs/design.md.
PUBLISHED: dict[str, tuple[float, float | None, float | None]] = {
    "DeSRA": (0.511, 0.7055, 0.6081),
    "NIQE": (0.029, None, None),
    "PAL4Inpainting": (0.084, None, None),
    "LDL, 0.01": (0.299, None, None),
    "LDL, 0.005": (0.362, None, None),
    "LDL, 0.001": (0.353, None, None),
}
PUBLISHED_TITLE = "Published, on the authors' data (their Real-ESRGAN set; not measured here)"
# Failures that the Markdown file lists.
_FAILURES = 50

Curve = list[tuple[float, Agreement]]


class MethodRow(NamedTuple):
    """A method at an operating point over the images of a part.

    ``seconds`` per megapixel are the median over images, for score map and mask in one thread.
    """

    part: str
    method: Method
    point: OperatingPoint
    scores: MaskScores
    seconds: float


class PublishedRow(NamedTuple):
    """Agreement of the masks at an operating point with the DeSRA masks of the data set.

    ``entry`` names the operating point. ``same`` counts the images whose masks are equal, ``iou`` is the mean over the
    images, where two empty masks count as 1, and ``equal`` is the share of equal pixels.
    """

    part: str
    entry: str
    images: int
    same: int
    iou: float
    equal: float


@dataclass(frozen=True)
class LabelledResults:
    """All numbers of a benchmark.

    ``curves`` are by method and ascending threshold, with the sums over all images. ``labels_seconds`` per megapixel is
    the median over the images whose class labels were computed; None where none were.
    """

    rows: list[MethodRow]
    published: list[PublishedRow]
    curves: dict[str, Curve]
    labels_seconds: float | None
    records: list[ImageRecord]
    failures: list[ImageError]


def results_of(benchmark: Benchmark[LabelledJob]) -> LabelledResults:
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
                    published.append(_published_row(part, point.name, agreed))
    rates = [record.labels_seconds / record.megapixels for record in records if record.labels_seconds is not None]
    return LabelledResults(
        rows=rows,
        published=published,
        curves=_curves(benchmark.methods, records),
        labels_seconds=statistics.median(rates) if rates else None,
        records=records,
        failures=benchmark.failed(),
    )


def row_cells(rows: Sequence[MethodRow]) -> list[dict[str, str]]:
    """Format the rows as text, measures with their 95 % intervals."""
    several = len({row.part for row in rows}) > 1
    measures = {"iou": "IoU", "precision": "precision", "recall": "recall", "f1": "F1"}
    if any(row.scores.empty_pairs for row in rows):
        measures = {"iou": "IoU", "iou_with_empty": "IoU, both empty = 1"} | measures
    formatted = []
    for row in rows:
        cells = {"part": row.part} if several else {}
        cells |= {"method": row.point.name, "images": str(row.scores.images)}
        for name, title in measures.items():
            interval = row.scores.intervals[name]
            bounds = f" ({interval[0]:.2f}–{interval[1]:.2f})" if interval else ""
            cells[title] = fixed(row.scores.values[name]) + bounds
        formatted.append(cells | {"s/MP": f"{row.seconds:.3f}"})
    return formatted


def published_cells(rows: Sequence[PublishedRow]) -> list[dict[str, str]]:
    """Format the agreement with published masks as text."""
    several = len({row.part for row in rows}) > 1
    return [
        ({"part": row.part} if several else {})
        | {
            "method": row.entry,
            "images": str(row.images),
            "images equal": f"{row.same} of {row.images}",
            "equal pixels": f"{100 * row.equal:.4f} %",
            "IoU": f"{row.iou:.4f}",
        }
        for row in rows
    ]


def paper_cells() -> list[dict[str, str]]:
    """Format the published numbers as text."""
    names = ("method", "IoU", "precision", "recall")
    rows = ((method, *("–" if value is None else f"{value:g}" for value in row)) for method, row in PUBLISHED.items())
    return [dict(zip(names, row, strict=True)) for row in rows]


def times_note(results: LabelledResults) -> str:
    """Explain the times in a sentence."""
    note = "s/MP: computing time in one thread for score map and mask, seconds per megapixel, the median over images"
    if results.labels_seconds is None:
        return f"{note}."
    return f"{note}; class labels take {results.labels_seconds:.3f} s/MP more, where they are used."


def title_of(benchmark: Benchmark[LabelledJob]) -> str:
    """Return the title of the results."""
    return f"Benchmark on {printable(Path(benchmark.settings.dataset).name)}"


def sections_of(benchmark: Benchmark[LabelledJob], results: LabelledResults) -> list[Section]:
    """List the tables and their explanations."""
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
        sections.append(Section(note=times_note(results), table=row_cells(results.rows)))
    if results.published:
        cells = published_cells(results.published)
        sections.append(Section("Agreement with the data set's DeSRA masks", table=cells))
    return [*sections, Section(PUBLISHED_TITLE, table=paper_cells())]


def as_files(benchmark: Benchmark[LabelledJob], results: LabelledResults) -> dict[str, str]:
    """Format all results as Markdown, CSV and JSON, by file name."""
    sections = sections_of(benchmark, results)
    if results.failures:
        lines = [printable(error) for error in results.failures[:_FAILURES]]
        if len(results.failures) > _FAILURES:
            lines.append(f"and {len(results.failures) - _FAILURES} more, in {STEM}.json")
        sections.append(Section("Images that could not be judged", lines))
    rows = [_numbers(row) for row in results.rows]
    return {
        f"{STEM}.md": table.document_as_markdown(title_of(benchmark), sections),
        f"{STEM}.csv": table.as_csv(rows, list(rows[0]) if rows else ["part", "method"]),
        f"{STEM}.json": table.as_json(_as_document(benchmark, results)),
    }


def _curves(methods: Iterable[Method], records: Sequence[ImageRecord]) -> dict[str, Curve]:
    found = {}
    for method in methods:
        runs = [record.runs[method.name].curve for record in records if method.name in record.runs]
        if runs and method.thresholds:
            columns = zip(*runs, strict=True)
            found[method.name] = [(column[0][0], pooled(agreement for _, agreement in column)) for column in columns]
    return found


def _published_row(part: str, point: str, agreed: Sequence[PixelAgreement]) -> PublishedRow:
    ious = [image.intersection / image.union if image.union else 1.0 for image in agreed]
    same = sum(image.equal == image.pixels for image in agreed)
    equal = sum(image.equal for image in agreed) / sum(image.pixels for image in agreed)
    return PublishedRow(part, point, len(agreed), same, sum(ious) / len(ious), equal)


def _numbers(row: MethodRow) -> dict[str, Any]:
    """Make a row of the CSV file: measures with the bounds of their intervals, and all counts."""
    scores, total = row.scores, row.scores.total
    numbers: dict[str, Any] = {"part": row.part, "method": row.point.name, "threshold": row.point.threshold}
    numbers |= {"images": scores.images, "empty_pairs": scores.empty_pairs}
    for measure, value in scores.values.items():
        low, high = scores.intervals[measure] or (None, None)
        numbers |= {measure: value, f"{measure}_low": low, f"{measure}_high": high}
    counts = {name: getattr(total, name) for name in ("detected", "right", "marked", "found")}
    return numbers | counts | {"seconds_per_megapixel": round(row.seconds, 4)}


def _as_document(benchmark: Benchmark[LabelledJob], results: LabelledResults) -> dict[str, Any]:
    """Describe all numbers in plain values for JSON; undefined ones are None."""
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
        "images": [_image(record) for record in results.records],
        "failures": failure_rows(results.failures),
        "without_ground_truth": [str(path) for path in benchmark.unjudged],
        "published": {"title": PUBLISHED_TITLE} | {
            name: dict(zip(("iou", "precision", "recall"), values, strict=True)) for name, values in PUBLISHED.items()
        },
    }  # fmt: skip


def _image(record: ImageRecord) -> dict[str, Any]:
    agreements = {point: agreement for run in record.runs.values() for point, agreement in run.agreements.items()}
    counts = ("iou", "detected", "right", "marked", "found")
    methods = {point: {name: getattr(agreement, name) for name in counts} for point, agreement in agreements.items()}
    return {name: getattr(record, name) for name in ("part", "name", "height", "width")} | {"methods": methods}
