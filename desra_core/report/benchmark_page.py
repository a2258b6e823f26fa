"""Publish what comes of a benchmark of either kind: tables, and a page about them, in its folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from desra_core.benchmarking import benchmark_files, synthetic_files
from desra_core.benchmarking.benchmark import Benchmark, plan_benchmark
from desra_core.benchmarking.benchmark_files import Results, told_labels
from desra_core.benchmarking.benchmark_table import (
    PUBLISHED_TITLE,
    Point,
    Row,
    told_paper,
    told_published_rows,
    told_rows,
)
from desra_core.benchmarking.entries import Entry
from desra_core.benchmarking.injection import KINDS
from desra_core.benchmarking.judged import Record
from desra_core.benchmarking.markdown_blocks import blocks_of, for_terminal
from desra_core.benchmarking.stage import mask_path, read_ground_truth
from desra_core.benchmarking.synthetic_benchmark import SyntheticBenchmark, plan_synthetic
from desra_core.benchmarking.synthetic_table import Summary, curves, summarise
from desra_core.errors import ImageError
from desra_core.evaluation.mask_files import FRAME, on_valid_region, read_mask
from desra_core.evaluation.table import fixed
from desra_core.images.codec import Mask
from desra_core.images.crops import RGB, fitted, rgb8
from desra_core.report.charts import bar_chart, heat_table, inline, line_chart
from desra_core.report.document import Cell, cells_within, make_cell, render_page
from desra_core.report.maps import MAX_PIXELS
from desra_core.report.pictures import AGREEMENT_SIDE, drawn_agreement
from desra_core.settings.benchmark import Benchmarking
from desra_core.stages.sources import read_photo
from desra_core.workspace.manifest import File

AnyBenchmark = Benchmark | SyntheticBenchmark

WORST = 6
# Of the page's 20 MB.
PICTURE_CHARACTERS = 16_000_000

_CURVES, _FAILURES = 8, 100


class PublishedBenchmark(NamedTuple):
    """The results of a benchmark: its files, and its tables for the Prefect UI and for a terminal."""

    files: list[Path]
    markdown: str
    text: str
    judged: int  # images
    failures: list[ImageError]  # why others could not be judged


def plan(settings: Benchmarking) -> AnyBenchmark:
    """Find out what there is to do (raises `desra_core.errors.UsageError`). Writes nothing."""
    return plan_synthetic(settings) if settings.synthetic else plan_benchmark(settings)


def publish_results(benchmark: AnyBenchmark) -> PublishedBenchmark:
    """Add up what is there; write tables and page (raises `desra_core.errors.TransientError`)."""
    make: Callable[[], str]
    if isinstance(benchmark, SyntheticBenchmark):
        trials, failures = benchmark.trials(), benchmark.failed()
        summary, judged = summarise(trials), len(trials)
        tables = synthetic_files.as_files(benchmark, summary, failures)
        markdown = synthetic_files.told_summary(benchmark, summary)
        text, stem = for_terminal(markdown), synthetic_files.STEM
        make = partial(render_synthetic, benchmark, summary, failures)
    else:
        results = benchmark_files.results_of(benchmark)
        failures, judged = results.failures, len(results.records)
        tables = benchmark_files.as_files(benchmark, results)
        markdown = benchmark_files.as_markdown(benchmark, results)
        text, stem = benchmark_files.as_console_text(results), benchmark_files.STEM
        make = partial(render, benchmark, results)
    workspace = benchmark.workspace
    contents = {workspace.root / name: table.encode() for name, table in tables.items()}
    page = workspace.root / f"{stem}.html"
    # The page is written before the tables: where the same tables are there already, so is their page.
    if not (page.exists() and all(path.exists() and path.read_bytes() == data for path, data in contents.items())):
        workspace.publish(page, make().encode())
        for path, data in contents.items():
            workspace.publish(path, data)
    return PublishedBenchmark([*contents, page], markdown, text, judged, failures)


def render(benchmark: Benchmark, results: Results) -> str:
    """Render the page of a benchmark on labelled images; the same results give the same text."""
    return render_page("benchmark.html.j2", **_content(benchmark, results))


def worst_records(benchmark: Benchmark, records: Sequence[Record], count: int = WORST) -> list[Record]:
    """Choose the images on which the first contender's IoU is lowest, of equal ones those with the larger masks first.

    Left out are images that it has not judged, and those where neither mask marks anything.
    """
    contender = benchmark.contenders[0]
    entry = contender.entries[0].name
    found = [
        (agreement.iou, -agreement.union, record.title, record)
        for record in records
        if contender.name in record.runs
        and (agreement := record.runs[contender.name].agreements[entry]).iou is not None
        and agreement.iou < 1
    ]
    return [record for *_, record in sorted(found, key=lambda row: row[:3])[:count]]


def _content(benchmark: Benchmark, results: Results) -> dict[str, Any]:
    settings = benchmark.settings
    summed = [row for row in results.rows if row.part == results.rows[-1].part]
    return {
        "name": Path(settings.dataset).name,
        "dataset": settings.dataset,
        "images": len(results.records),
        "methods": len(benchmark.contenders),
        "min_area": settings.min_area,
        "rows": told_rows(results.rows),
        "best": max(summed, key=lambda row: row.scores.iou or 0, default=None),
        "labels": told_labels(results),
        "desra_masks": told_published_rows(results.published),
        "paper_title": PUBLISHED_TITLE,
        "paper": told_paper(),
        "curves": _curves(results.curves, summed),
        "bars": _bars(summed) if summed else [],
        "worst": [
            {
                "name": record.title,
                "facts": " · ".join(f"{entry.name}: {fixed(iou)}" for entry, iou in _entries(benchmark, record)),
                "cells": cells,
            }
            for record, cells in cells_within(
                PICTURE_CHARACTERS, worst_records(benchmark, results.records), _drawing(benchmark)
            )
        ],
        "first": benchmark.contenders[0].entries[0].name,
        "unjudged": len(benchmark.unjudged),
        "lossy": len(benchmark.lossy),
        "failures": results.failures[:_FAILURES],
        "all_failures": len(results.failures),
    }


def _curves(curves: dict[str, list[Point]], rows: Sequence[Row]) -> Markup | None:
    """Precision over recall, and the points at which methods stand in the table; None without any curve."""
    drawn = {
        name: [(recall, precision) for _, agreement in points
               if (recall := agreement.recall) is not None and (precision := agreement.precision) is not None]
        for name, points in list(curves.items())[:_CURVES]
    }  # fmt: skip
    if not any(drawn.values()):
        return None
    marks = {
        row.entry.name: (row.scores.recall, row.scores.precision)
        for row in rows
        if row.contender.name in drawn and row.scores.recall is not None and row.scores.precision is not None
    }
    return inline(line_chart(drawn, xlabel="recall", ylabel="precision", marks=marks), "Precision by recall")


def _bars(rows: Sequence[Row]) -> list[Markup]:
    """Draw IoU and computing time by method."""
    iou = {row.entry.name: np.nan if row.scores.iou is None else row.scores.iou for row in rows}
    intervals = {row.entry.name: interval for row in rows if (interval := row.scores.intervals["iou"])}
    seconds = {row.entry.name: row.seconds for row in rows}
    return [
        inline(bar_chart(iou, xlabel="IoU, and its 95 % interval", intervals=intervals), "IoU by method"),
        inline(
            bar_chart(seconds, xlabel="computing time in one thread, seconds per megapixel"),
            "Seconds per megapixel by method",
        ),
    ]


def _drawing(benchmark: Benchmark) -> Callable[[Record], list[Cell]]:
    """Give a function that draws an image: its results, and the mask of each entry against the ground truth.

    Where a file has gone or changed since, a cell says so.
    """
    work = {judging[:2]: (image, judging) for image, judging in benchmark.work}

    def draw(record: Record) -> list[Cell]:
        image, judging = work[record.part, record.name]
        shape = record.height, record.width

        @cache
        def result(file: File | None) -> RGB:
            assert file is not None
            return rgb8(read_photo(file, MAX_PIXELS).pixels)

        @cache
        def truth() -> Mask:
            return np.pad(read_ground_truth(judging.ground_truth, shape, image.path), FRAME)

        def against(entry: Entry) -> RGB:
            path = mask_path(benchmark.workspace, entry, record.part, record.name)
            mask = on_valid_region(read_mask(path), shape, path)
            return drawn_agreement(np.pad(mask, FRAME), truth(), result(image.gan_sr))

        return [
            make_cell("GAN-SR", lambda: fitted(result(image.gan_sr), AGREEMENT_SIDE)),
            make_cell("MSE-SR", lambda: fitted(result(image.mse_sr), AGREEMENT_SIDE)),
            *(make_cell(entry.name, partial(against, entry)) for entry, _ in _entries(benchmark, record)),
        ]

    return draw


def _entries(benchmark: Benchmark, record: Record) -> Iterator[tuple[Entry, float | None]]:
    """Give the entries that have judged an image, each with its IoU."""
    for contender in benchmark.contenders:
        if contender.name in record.runs:
            for entry in contender.entries:
                yield entry, record.runs[contender.name].agreements[entry.name].iou


def render_synthetic(benchmark: SyntheticBenchmark, summary: Summary, failures: Sequence[ImageError]) -> str:
    """Render the page of a synthetic benchmark; the same results give the same text."""
    title, *blocks = blocks_of(synthetic_files.told_summary(benchmark, summary))
    return render_page(
        "synthetic.html.j2",
        title=title.text,
        blocks=blocks,
        charts=_synthetic_charts(summary) if summary.injected else [],
        mse_sr=benchmark.settings.mse_sr,
        gan_sr=benchmark.settings.gan_sr,
        failures=failures[:_FAILURES],
        all_failures=len(failures),
    )


def _synthetic_charts(summary: Summary) -> list[Markup]:
    """Draw recall by false alarms, and by method and kind."""
    drawn: dict[str, Any] = dict(list(curves(summary).items())[:_CURVES])
    figure = line_chart(drawn, xlabel="share of the clean pixels that is marked", ylabel="recall", log_x=True)
    recall = [
        [np.nan if (share := method.recall(kind=kind).share) is None else share for kind in KINDS]
        for method in summary.methods
    ]
    kinds = [kind.replace("_", " ") for kind in KINDS]
    table = heat_table([method.method for method in summary.methods], kinds, recall)
    return [inline(figure, "Recall by false alarms"), inline(table, "Recall by method and kind")]
