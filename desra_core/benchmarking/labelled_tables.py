"""A benchmark with ground-truth masks, added up: the paper's table with times, curves, and all of it as files."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from desra_core import __version__
from desra_core.benchmarking.benchmark import Benchmark
from desra_core.benchmarking.labelled import ImageRecord, LabelledJob, PixelAgreement, read_records
from desra_core.benchmarking.methods import Method, OperatingPoint
from desra_core.errors import ImageError, printable
from desra_core.evaluation import metrics
from desra_core.evaluation.evaluation_files import scores_document
from desra_core.evaluation.metrics import Agreement, Interval, MaskScores, pooled, score_masks
from desra_core.evaluation.table import as_markdown as as_markdown_table
from desra_core.evaluation.table import as_text, fixed

STEM = "benchmark"
ALL = "all parts"

# From the DeSRA paper: IoU, precision and recall, of the others IoU alone; see docs/design.md.
PUBLISHED: dict[str, tuple[float, float | None, float | None]] = {
    "DeSRA": (0.511, 0.7055, 0.6081),
    "NIQE": (0.029, None, None),
    "PAL4Inpainting": (0.084, None, None),
    "LDL, 0.01": (0.299, None, None),
    "LDL, 0.005": (0.362, None, None),
    "LDL, 0.001": (0.353, None, None),
}
PUBLISHED_TITLE = "Published, on the authors' data (their Real-ESRGAN set; not measured here)"
# As many are listed in the Markdown file.
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
    """Agreement of the masks at an operating point with those that came with the data set.

    ``iou`` is the mean over the images, where two empty masks count as 1; ``same`` counts the images whose masks are
    equal, ``equal`` is the share of equal pixels. ``entry`` names the operating point.
    """

    part: str
    entry: str
    images: int
    same: int
    iou: float
    equal: float


@dataclass(frozen=True)
class LabelledResults:
    """All numbers of a benchmark; ``curves`` are by method and ascending threshold, with the sums over all images.

    ``labels_seconds`` per megapixel is the median over the images whose class labels were computed; None without any.
    """

    rows: list[MethodRow]
    published: list[PublishedRow]
    curves: dict[str, Curve]
    labels_seconds: float | None
    records: list[ImageRecord]
    failures: list[ImageError]


def results_of(benchmark: Benchmark[LabelledJob]) -> LabelledResults:
    """Add up the records that are there: rows per part and operating point, those over all parts last."""
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
    measures = {"IoU": "iou"}
    if any(row.scores.empty_pairs for row in rows):
        measures["IoU, both empty = 1"] = "iou_with_empty"
    measures |= {"precision": "precision", "recall": "recall", "F1": "f1"}
    return [
        ({"part": row.part} if several else {})
        | {"method": row.point.name, "images": str(row.scores.images)}
        | {title: _measure(row.scores.values[name], row.scores.intervals[name]) for title, name in measures.items()}
        | {"s/MP": f"{row.seconds:.3f}"}
        for row in rows
    ]


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
    """`PUBLISHED` as text."""
    names = ("IoU", "precision", "recall")
    return [
        {"method": method}
        | {name: "–" if value is None else f"{value:g}" for name, value in zip(names, values, strict=True)}
        for method, values in PUBLISHED.items()
    ]


def times_note(results: LabelledResults) -> str:
    """Say in a sentence what the times cover."""
    note = "s/MP: computing time in one thread for score map and mask, seconds per megapixel, the median over images"
    if results.labels_seconds is None:
        return f"{note}."
    return f"{note}; class labels take {results.labels_seconds:.3f} s/MP more, where they are used."


def as_files(benchmark: Benchmark[LabelledJob], results: LabelledResults) -> dict[str, str]:
    """Markdown, CSV and JSON by file name."""
    document = json.dumps(_as_document(benchmark, results), indent=1, ensure_ascii=False, allow_nan=False)
    return {
        f"{STEM}.md": as_markdown(benchmark, results),
        f"{STEM}.csv": as_csv([_numbers(row) for row in results.rows], ["part", "method"]),
        f"{STEM}.json": f"{document}\n",
    }


def as_markdown(benchmark: Benchmark[LabelledJob], results: LabelledResults) -> str:
    """Format the tables and their explanations as Markdown."""
    settings = benchmark.settings
    count = len(results.records)
    weights = ""
    if any(method.weighted for method in benchmark.methods):
        weights = f"Class weights: {Path(settings.weights or 'published').name}. "
    parts = [
        f"# Benchmark on {printable(Path(settings.dataset).name)}",
        f"{count} image{'' if count == 1 else 's'}; regions above {settings.min_area}"
        f"{'' if settings.min_area.endswith('%') else ' px'}; judged on the valid region, without the 5 px frame. "
        "IoU is the mean over images; a region is right, or found, when at least half of it lies in the other mask; "
        f"in brackets {100 * metrics.CONFIDENCE:g} % intervals by the bootstrap over images. {weights}"
        "Thresholds are those of scores; desra's score is 1 - adjusted similarity, so 0.3 is its --threshold 0.7.",
    ]
    if results.rows:
        parts += [_table(row_cells(results.rows)), f"*{times_note(results)}*"]
    if results.published:
        parts += ["## Agreement with the data set's DeSRA masks", _table(published_cells(results.published))]
    if results.failures:
        lines = [f"- {printable(error)}" for error in results.failures[:_FAILURES]]
        if len(results.failures) > _FAILURES:
            lines.append(f"- and {len(results.failures) - _FAILURES} more, in {STEM}.json")
        parts += ["## Images that could not be judged", "\n".join(lines)]
    parts += [f"## {PUBLISHED_TITLE}", _table(paper_cells())]
    return "\n\n".join(parts) + "\n"


def as_console_text(results: LabelledResults) -> str:
    """Format the tables for a terminal."""
    parts = []
    if results.rows:
        parts += [as_text(row_cells(results.rows)), times_note(results)]
    if results.published:
        parts += ["agreement with the data set's DeSRA masks", as_text(published_cells(results.published))]
    return "\n".join([*parts, f"{PUBLISHED_TITLE[0].lower()}{PUBLISHED_TITLE[1:]}", as_text(paper_cells())])


def as_csv(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Rows as CSV under the names of their columns; without rows, under the given ones."""
    sink = io.StringIO()
    writer = csv.DictWriter(sink, list(rows[0]) if rows else columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return sink.getvalue()


def failure_rows(failures: Iterable[ImageError]) -> list[dict[str, str]]:
    """Failures as plain values for JSON."""
    return [{"file": error.subject, "reason": error.reason, "remedy": error.remedy} for error in failures]


def _curves(methods: Iterable[Method], records: Sequence[ImageRecord]) -> dict[str, Curve]:
    found = {}
    for method in methods:
        runs = [record.runs[method.name].curve for record in records if method.name in record.runs]
        if runs and method.thresholds:
            columns = zip(*runs, strict=True)
            found[method.name] = [(column[0][0], pooled(agreement for _, agreement in column)) for column in columns]
    return found


def _published_row(part: str, point: str, agreed: Sequence[PixelAgreement]) -> PublishedRow:
    ious = [one.intersection / one.union if one.union else 1.0 for one in agreed]
    same = sum(one.equal == one.pixels for one in agreed)
    equal = sum(one.equal for one in agreed) / sum(one.pixels for one in agreed)
    return PublishedRow(part, point, len(agreed), same, sum(ious) / len(ious), equal)


def _numbers(row: MethodRow) -> dict[str, Any]:
    """A row of the CSV file: measures with the bounds of their intervals, and all counts."""
    scores, total = row.scores, row.scores.total
    numbers: dict[str, Any] = {
        "part": row.part,
        "method": row.point.name,
        "threshold": row.point.threshold,
        "images": scores.images,
        "empty_pairs": scores.empty_pairs,
    }
    for measure, value in scores.values.items():
        low, high = scores.intervals[measure] or (None, None)
        numbers |= {measure: value, f"{measure}_low": low, f"{measure}_high": high}
    counts = {name: getattr(total, name) for name in ("detected", "right", "marked", "found")}
    return numbers | counts | {"seconds_per_megapixel": round(row.seconds, 4)}


def _as_document(benchmark: Benchmark[LabelledJob], results: LabelledResults) -> dict[str, Any]:
    """All numbers as plain values that JSON can hold; undefined ones are None."""
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
    return {
        "part": record.part,
        "name": record.name,
        "height": record.height,
        "width": record.width,
        "methods": {
            point: {name: getattr(agreement, name) for name in counts} for point, agreement in agreements.items()
        },
    }


def _table(rows: Sequence[dict[str, str]]) -> str:
    cells = [{name: printable(cell).replace("|", "\\|") for name, cell in row.items()} for row in rows]
    return as_markdown_table(cells)


def _measure(value: float | None, interval: Interval | None) -> str:
    return fixed(value) + (f" ({interval[0]:.2f}–{interval[1]:.2f})" if interval else "")
