"""What a benchmark found, as files: Markdown for people, CSV and JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from desra_core import __version__
from desra_core.benchmarking.benchmark import Benchmark
from desra_core.benchmarking.benchmark_table import (
    PUBLISHED,
    PUBLISHED_TITLE,
    Point,
    PublishedRow,
    Row,
    as_csv,
    curves,
    labels_seconds,
    published_rows,
    table_rows,
    told_paper,
    told_published_rows,
    told_rows,
)
from desra_core.benchmarking.judged import Record
from desra_core.errors import ImageError, printable
from desra_core.evaluation import metrics
from desra_core.evaluation.evaluation_files import scores_document
from desra_core.evaluation.table import as_markdown as as_markdown_table
from desra_core.evaluation.table import as_text

STEM = "benchmark"
# Of the Markdown file.
_FAILURES = 50


@dataclass(frozen=True)
class Results:
    """All numbers of a benchmark.

    ``labels_seconds`` per megapixel is None where labels were read, or where there are none.
    """

    rows: list[Row]
    published: list[PublishedRow]
    curves: dict[str, list[Point]]
    labels_seconds: float | None
    records: list[Record]
    failures: list[ImageError]


def results_of(benchmark: Benchmark) -> Results:
    """Add up what is there."""
    records = benchmark.records()
    return Results(
        rows=table_rows(benchmark.contenders, records),
        published=published_rows(benchmark.contenders, records),
        curves=curves(benchmark.contenders, records),
        labels_seconds=labels_seconds(records),
        records=records,
        failures=benchmark.failed(),
    )


def as_files(benchmark: Benchmark, results: Results) -> dict[str, str]:
    """Markdown, CSV and JSON by file name."""
    document = json.dumps(as_document(benchmark, results), indent=1, ensure_ascii=False, allow_nan=False)
    return {
        f"{STEM}.md": as_markdown(benchmark, results),
        f"{STEM}.csv": as_csv(results.rows),
        f"{STEM}.json": f"{document}\n",
    }


def as_markdown(benchmark: Benchmark, results: Results) -> str:
    """The tables, and what a reader has to know about them."""
    settings = benchmark.settings
    parts = [f"# Benchmark on {printable(Path(settings.dataset).name)}", _how(benchmark, results)]
    if results.rows:
        parts.append(_table(told_rows(results.rows)))
        parts.append(f"*{told_labels(results)}*")
    if results.published:
        parts += ["## Agreement with the data set's DeSRA masks", _table(told_published_rows(results.published))]
    if results.failures:
        parts += ["## Images that could not be judged", _list(results.failures)]
    parts += [f"## {PUBLISHED_TITLE}", _table(told_paper())]
    return "\n\n".join(parts) + "\n"


def as_console_text(results: Results) -> str:
    """The tables for a terminal."""
    parts = []
    if results.rows:
        parts += [as_text(told_rows(results.rows)), told_labels(results)]
    if results.published:
        parts += ["agreement with the data set's DeSRA masks", as_text(told_published_rows(results.published))]
    return "\n".join([*parts, f"{PUBLISHED_TITLE[0].lower()}{PUBLISHED_TITLE[1:]}", as_text(told_paper())])


def told_labels(results: Results) -> str:
    """What the times do not count."""
    told = "s/MP: computing time in one thread for score map and mask, seconds per megapixel, the median over images"
    if results.labels_seconds is None:
        return f"{told}."
    return f"{told}; class labels take {results.labels_seconds:.3f} s/MP more, where they are used."


def as_document(benchmark: Benchmark, results: Results) -> dict[str, Any]:
    """All numbers as plain values that JSON can hold; what is undefined is None."""
    return {
        "desra": __version__,
        "settings": benchmark.settings.model_dump(mode="json"),
        "table": [
            {"part": row.part, "method": row.entry.name, "threshold": row.entry.threshold,
             "seconds_per_megapixel": round(row.seconds, 4)} | scores_document(row.scores)
            for row in results.rows
        ],
        "labels_seconds_per_megapixel": results.labels_seconds,
        "desra_masks": [row._asdict() for row in results.published],
        "curves": {
            name: [{"threshold": point.threshold, "precision": point.agreement.precision,
                    "recall": point.agreement.recall, "f1": point.agreement.f1} for point in points]
            for name, points in results.curves.items()
        },
        "images": [_image(record) for record in results.records],
        "failures": [{"file": error.subject, "reason": error.reason, "remedy": error.remedy}
                     for error in results.failures],
        "without_ground_truth": [str(path) for path in benchmark.unjudged],
        "published": {"title": PUBLISHED_TITLE} | {
            name: dict(zip(("iou", "precision", "recall"), values, strict=True)) for name, values in PUBLISHED.items()
        },
    }  # fmt: skip


def _image(record: Record) -> dict[str, Any]:
    agreements = {entry: agreement for run in record.runs.values() for entry, agreement in run.agreements.items()}
    return {
        "part": record.part,
        "name": record.name,
        "height": record.height,
        "width": record.width,
        "methods": {
            entry: {"iou": agreement.iou, "detected": agreement.detected, "right": agreement.right,
                    "marked": agreement.marked, "found": agreement.found}
            for entry, agreement in agreements.items()
        },
    }  # fmt: skip


def _how(benchmark: Benchmark, results: Results) -> str:
    settings = benchmark.settings
    count = len(results.records)
    return (
        f"{count} image{'' if count == 1 else 's'}; regions above {settings.min_area}"
        f"{'' if settings.min_area.endswith('%') else ' px'}; judged on the valid region, without the 5 px frame. "
        "IoU is the mean over images; a region is right, or found, when at least half of it lies in the other mask; "
        f"in brackets {100 * metrics.CONFIDENCE:g} % intervals by the bootstrap over images. {_weights(benchmark)}"
        "Thresholds are those of scores; desra's score is 1 - adjusted similarity, so 0.3 is its --threshold 0.7."
    )


def _weights(benchmark: Benchmark) -> str:
    """Which class weights the weighted contenders have."""
    if not any(contender.weighted for contender in benchmark.contenders):
        return ""
    source = benchmark.settings.weights or "published"
    return f"Class weights: {source if source == 'published' else Path(source).name}. "


def _table(rows: Sequence[dict[str, str]]) -> str:
    return as_markdown_table(
        [{name: printable(cell).replace("|", "\\|") for name, cell in row.items()} for row in rows]
    )


def _list(failures: Sequence[ImageError]) -> str:
    lines = [f"- {printable(error)}" for error in failures[:_FAILURES]]
    if len(failures) > _FAILURES:
        lines.append(f"- and {len(failures) - _FAILURES} more, in {STEM}.json")
    return "\n".join(lines)
