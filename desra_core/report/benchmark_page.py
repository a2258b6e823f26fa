"""Publish the results of a benchmark of either kind: tables, and a page about them, in its folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from desra_core.benchmarking import labelled_tables, synthetic_tables
from desra_core.benchmarking.benchmark import Benchmark, OperatingPoint
from desra_core.benchmarking.injection import KINDS
from desra_core.benchmarking.labelled import ImageRecord, LabelledJob, plan_labelled, read_ground_truth
from desra_core.benchmarking.labelled_tables import Curve, LabelledResults, MethodRow
from desra_core.benchmarking.synthetic import SyntheticJob, SyntheticSummary, plan_synthetic, read_trials, summarise
from desra_core.errors import ImageError
from desra_core.evaluation.mask_files import FRAME, on_valid_region, read_mask
from desra_core.evaluation.table import document_as_text, fixed
from desra_core.images.codec import Mask
from desra_core.images.crops import RGB, fitted, rgb8
from desra_core.report.charts import bar_chart, heat_table, inline, line_chart
from desra_core.report.document import Cell, cells_within, make_cell, render_page
from desra_core.report.maps import MAX_PIXELS
from desra_core.report.pictures import AGREEMENT_SIDE, drawn_agreement
from desra_core.settings.benchmark import Benchmarking
from desra_core.stages.sources import read_photo
from desra_core.workspace.manifest import File

AnyBenchmark = Benchmark[Any]

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
    return plan_synthetic(settings) if settings.synthetic else plan_labelled(settings)


def publish_results(benchmark: AnyBenchmark) -> PublishedBenchmark:
    """Add up what is there; write tables and page (raises `desra_core.errors.TransientError`)."""
    make: Callable[[], str]
    if benchmark.settings.synthetic:
        trials, failures = read_trials(benchmark), benchmark.failed()
        summary, judged, stem = summarise(trials), len(trials), synthetic_tables.STEM
        tables = synthetic_tables.as_files(benchmark, summary, failures)
        title, sections = synthetic_tables.title_of(benchmark), synthetic_tables.sections_of(summary)
        make = partial(render_synthetic, benchmark, summary, failures)
    else:
        results = labelled_tables.results_of(benchmark)
        failures, judged, stem = results.failures, len(results.records), labelled_tables.STEM
        tables = labelled_tables.as_files(benchmark, results)
        title, sections = labelled_tables.title_of(benchmark), labelled_tables.sections_of(benchmark, results)
        make = partial(render, benchmark, results)
    workspace = benchmark.workspace
    contents = {workspace.root / name: table.encode() for name, table in tables.items()}
    page = workspace.root / f"{stem}.html"
    # The page is written before the tables: where the same tables are there already, so is their page.
    if not (page.exists() and all(path.exists() and path.read_bytes() == data for path, data in contents.items())):
        workspace.publish(page, make().encode())
        for path, data in contents.items():
            workspace.publish(path, data)
    text = document_as_text(title, sections)
    return PublishedBenchmark([*contents, page], tables[f"{stem}.md"], text, judged, failures)


def render(benchmark: Benchmark[LabelledJob], results: LabelledResults) -> str:
    """Render the page of a benchmark on labelled images; the same results give the same text."""
    return render_page("benchmark.html.j2", **_content(benchmark, results))


def worst_records(
    benchmark: Benchmark[LabelledJob], records: Sequence[ImageRecord], count: int = WORST
) -> list[ImageRecord]:
    """Choose the images on which the first method's IoU is lowest, of equal ones those with the larger masks first.

    Left out are images that it has not judged, and those where neither mask marks anything.
    """
    method = benchmark.methods[0]
    point = method.points[0].name
    found = [
        (agreement.iou, -agreement.union, record.title, record)
        for record in records
        if method.name in record.runs
        and (agreement := record.runs[method.name].agreements[point]).iou is not None
        and agreement.iou < 1
    ]
    return [record for *_, record in sorted(found, key=lambda row: row[:3])[:count]]


def _content(benchmark: Benchmark[LabelledJob], results: LabelledResults) -> dict[str, Any]:
    settings = benchmark.settings
    summed = [row for row in results.rows if row.part == results.rows[-1].part]
    return {
        "name": Path(settings.dataset).name,
        "dataset": settings.dataset,
        "images": len(results.records),
        "methods": len(benchmark.methods),
        "min_area": settings.min_area,
        "rows": labelled_tables.row_cells(results.rows),
        "best": max(summed, key=lambda row: row.scores.values["iou"] or 0, default=None),
        "labels": labelled_tables.times_note(results),
        "desra_masks": labelled_tables.published_cells(results.published),
        "paper_title": labelled_tables.PUBLISHED_TITLE,
        "paper": labelled_tables.paper_cells(),
        "curves": _curves(results.curves, summed),
        "bars": _bars(summed) if summed else [],
        "worst": [
            {
                "name": record.title,
                "facts": " · ".join(f"{point.name}: {fixed(iou)}" for point, iou in _points(benchmark, record)),
                "cells": cells,
            }
            for record, cells in cells_within(
                PICTURE_CHARACTERS, worst_records(benchmark, results.records), _drawing(benchmark)
            )
        ],
        "first": benchmark.methods[0].points[0].name,
        "unjudged": len(benchmark.unjudged),
        "lossy": len(benchmark.lossy),
        "failures": results.failures[:_FAILURES],
        "all_failures": len(results.failures),
    }


def _curves(curves: dict[str, Curve], rows: Sequence[MethodRow]) -> Markup | None:
    """Precision over recall, and the points at which methods stand in the table; None without any curve."""
    drawn = {
        name: [(recall, precision) for _, agreement in points
               if (recall := agreement.recall) is not None and (precision := agreement.precision) is not None]
        for name, points in list(curves.items())[:_CURVES]
    }  # fmt: skip
    if not any(drawn.values()):
        return None
    marks = {
        row.point.name: (row.scores.total.recall, row.scores.total.precision)
        for row in rows
        if row.method.name in drawn and row.scores.total.recall is not None and row.scores.total.precision is not None
    }
    return inline(line_chart(drawn, xlabel="recall", ylabel="precision", marks=marks), "Precision by recall")


def _bars(rows: Sequence[MethodRow]) -> list[Markup]:
    """Draw IoU and computing time by method."""
    iou = {row.point.name: np.nan if row.scores.values["iou"] is None else row.scores.values["iou"] for row in rows}
    intervals = {row.point.name: interval for row in rows if (interval := row.scores.intervals["iou"])}
    seconds = {row.point.name: row.seconds for row in rows}
    return [
        inline(bar_chart(iou, xlabel="IoU, and its 95 % interval", intervals=intervals), "IoU by method"),
        inline(
            bar_chart(seconds, xlabel="computing time in one thread, seconds per megapixel"),
            "Seconds per megapixel by method",
        ),
    ]


def _drawing(benchmark: Benchmark[LabelledJob]) -> Callable[[ImageRecord], list[Cell]]:
    """Give a function that draws an image: its results, and its mask at each operating point against the ground truth.

    Where a file has gone or changed since, a cell says so.
    """
    work = {(job.part, job.name): (image, job) for image, job in benchmark.work}

    def draw(record: ImageRecord) -> list[Cell]:
        image, job = work[record.part, record.name]
        shape = record.height, record.width

        @cache
        def result(file: File | None) -> RGB:
            assert file is not None
            return rgb8(read_photo(file, MAX_PIXELS).pixels)

        @cache
        def truth() -> Mask:
            return np.pad(read_ground_truth(job.ground_truth, shape, image.path), FRAME)

        def against(point: OperatingPoint) -> RGB:
            path = job.mask_path(benchmark.workspace, point)
            mask = on_valid_region(read_mask(path), shape, path)
            return drawn_agreement(np.pad(mask, FRAME), truth(), result(image.gan_sr))

        return [
            make_cell("GAN-SR", lambda: fitted(result(image.gan_sr), AGREEMENT_SIDE)),
            make_cell("MSE-SR", lambda: fitted(result(image.mse_sr), AGREEMENT_SIDE)),
            *(make_cell(point.name, partial(against, point)) for point, _ in _points(benchmark, record)),
        ]

    return draw


def _points(benchmark: Benchmark[LabelledJob], record: ImageRecord) -> Iterator[tuple[OperatingPoint, float | None]]:
    """Give the operating points of the methods that were run on an image, each with its IoU."""
    for method in benchmark.methods:
        if method.name in record.runs:
            for point in method.points:
                yield point, record.runs[method.name].agreements[point.name].iou


def render_synthetic(
    benchmark: Benchmark[SyntheticJob], summary: SyntheticSummary, failures: Sequence[ImageError]
) -> str:
    """Render the page of a synthetic benchmark; the same results give the same text."""
    return render_page(
        "synthetic.html.j2",
        title=synthetic_tables.title_of(benchmark),
        sections=synthetic_tables.sections_of(summary),
        charts=_synthetic_charts(summary) if summary.injected else [],
        mse_sr=benchmark.settings.mse_sr,
        gan_sr=benchmark.settings.gan_sr,
        failures=failures[:_FAILURES],
        all_failures=len(failures),
    )


def _synthetic_charts(summary: SyntheticSummary) -> list[Markup]:
    """Draw recall by false alarms, and by method and kind."""
    drawn: dict[str, Any] = dict(list(synthetic_tables.curves(summary).items())[:_CURVES])
    figure = line_chart(drawn, xlabel="share of the clean pixels that is marked", ylabel="recall", log_x=True)
    recall = [
        [np.nan if (share := method.recall(kind=kind).share) is None else share for kind in KINDS]
        for method in summary.methods
    ]
    kinds = [kind.replace("_", " ") for kind in KINDS]
    table = heat_table([method.method for method in summary.methods], kinds, recall)
    return [inline(figure, "Recall by false alarms"), inline(table, "Recall by method and kind")]
