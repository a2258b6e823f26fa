"""Publish the results of a benchmark of either kind: tables, and a page about them, in its folder."""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from desra_core.benchmarking import AnyBenchmark
from desra_core.benchmarking.benchmark import Benchmark, OperatingPoint, Tables
from desra_core.benchmarking.injection import KINDS
from desra_core.benchmarking.labelled import (
    ImageRecord,
    LabelledJob,
    LabelledResults,
    MethodRow,
    labelled_tables,
    read_ground_truth,
    results_of,
)
from desra_core.benchmarking.synthetic import SyntheticSummary, curves, read_trials, summarise, synthetic_tables
from desra_core.errors import ImageError
from desra_core.evaluation.mask_files import FRAME, on_valid_region, read_mask
from desra_core.evaluation.table import counted, document_as_text, fixed
from desra_core.images.codec import Mask
from desra_core.images.parts import RGB, fitted, rgb8
from desra_core.report.charts import bar_chart, heat_table, inline, line_chart
from desra_core.report.document import Cell, cells_within, make_cell, render_page
from desra_core.report.pictures import AGREEMENT_SIDE, MAX_PIXELS, drawn_agreement
from desra_core.stages.run import read_photo
from desra_core.workspace.manifest import File

WORST = 6
# The share of pictures in the 20 MB of a page.
PICTURE_CHARACTERS = 16_000_000

_CURVES = 8


class PublishedBenchmark(NamedTuple):
    """The results of a benchmark: its files, and its tables for the Prefect UI and for a terminal."""

    files: list[Path]
    markdown: str
    text: str
    judged: int  # number of judged images
    failures: list[ImageError]  # the reasons of images that could not be judged


def publish_results(benchmark: AnyBenchmark) -> PublishedBenchmark:
    """Add up the records of a benchmark; write tables and page (raises `desra_core.errors.TransientError`)."""
    failures = benchmark.failed()
    results: LabelledResults | SyntheticSummary
    if benchmark.settings.synthetic:
        results = summarise(read_trials(benchmark))
        tables, judged = synthetic_tables(benchmark, results, failures), results.images
    else:
        results = results_of(benchmark)
        tables, judged = labelled_tables(benchmark, results, failures), len(results.records)
    workspace = benchmark.workspace
    texts = tables.as_files(failures)
    contents = {workspace.root / name: text.encode() for name, text in texts.items()}
    page = workspace.root / f"{tables.stem}.html"
    # The page is written before the tables, so that equal tables prove that their page is there.
    if not (page.exists() and all(path.exists() and path.read_bytes() == data for path, data in contents.items())):
        workspace.publish(page, render(benchmark, results, tables, failures).encode())
        for path, data in contents.items():
            workspace.publish(path, data)
    text = document_as_text(tables.title, tables.sections)
    return PublishedBenchmark([*contents, page], texts[f"{tables.stem}.md"], text, judged, failures)


def render(
    benchmark: AnyBenchmark,
    results: LabelledResults | SyntheticSummary,
    tables: Tables,
    failures: Sequence[ImageError],
) -> str:
    """Render the page of a benchmark: its tables, charts and pictures of the worst images.

    The same results give the same text.
    """
    lead = ""
    worst: list[tuple[str, str, list[Cell]]] = []
    if isinstance(results, SyntheticSummary):
        plots = _synthetic_charts(results) if results.injected else []
    elif results.rows:
        lead = f"{counted(len(benchmark.methods), 'detector')} on {counted(len(results.records), 'image')}."
        rows = [row for row in results.rows if row.part == results.rows[-1].part]
        plots = _labelled_charts(results, rows)
        best = max(rows, key=lambda row: row.scores.values["iou"] or 0)
        if iou := best.scores.values["iou"]:
            lead += f" The masks of {best.point.name} agree best with the ground truth: IoU {fixed(iou)}."
        drawn = cells_within(PICTURE_CHARACTERS, worst_records(benchmark, results.records), _drawing(benchmark))
        for record, cells in drawn:
            facts = (f"{point.name}: {fixed(iou)}" for point, iou in _points(benchmark, record))
            worst.append((record.title, " · ".join(facts), cells))
    else:
        lead, plots = "No image could be judged.", []
    return render_page(
        "benchmark.html.j2",
        benchmark=benchmark,
        title=tables.title,
        lead=lead,
        sections=tables.with_failures(failures),
        plots=plots,
        worst=worst,
        failed=len(failures),
    )


def worst_records(
    benchmark: Benchmark[LabelledJob], records: Sequence[ImageRecord], count: int = WORST
) -> list[ImageRecord]:
    """Choose the images with the lowest IoU of the first method; a tie is decided by the larger masks.

    Images that the method has not judged and images with two empty masks are left out.
    """
    method = benchmark.methods[0]
    point = method.points[0].name
    judged = [(record.runs[method.name].agreements[point], record) for record in records if method.name in record.runs]
    worst = [(agreement.iou, -agreement.union, record.title, record) for agreement, record in judged
             if agreement.iou is not None and agreement.iou < 1]  # fmt: skip
    return [record for *_, record in sorted(worst, key=lambda row: row[:3])[:count]]


def _labelled_charts(results: LabelledResults, rows: Sequence[MethodRow]) -> list[tuple[str, Markup]]:
    """Draw precision over recall, with a mark at the threshold of each row, then IoU and time by row; with captions."""
    drawn = {
        name: [(agreement.recall, agreement.precision) for _, agreement in points
               if agreement.recall is not None and agreement.precision is not None]
        for name, points in list(results.curves.items())[:_CURVES]
    }  # fmt: skip
    marks = {
        row.point.name: (row.scores.total.recall, row.scores.total.precision)
        for row in rows
        if row.method.name in drawn and row.scores.total.recall is not None and row.scores.total.precision is not None
    }
    charts = []
    if any(drawn.values()):
        figure = line_chart(drawn, xlabel="recall", ylabel="precision", marks=marks)
        caption = (
            "Precision and recall of all regions while the threshold goes from a fifth to five times a method's own; "
            "the points are the rows of the table."
        )
        charts.append((caption, inline(figure, "Precision by recall")))
    iou = {row.point.name: np.nan if row.scores.values["iou"] is None else row.scores.values["iou"] for row in rows}
    intervals = {row.point.name: interval for row in rows if (interval := row.scores.intervals["iou"])}
    agreement = bar_chart(iou, xlabel="IoU, and its 95 % interval", intervals=intervals)
    seconds = {row.point.name: row.seconds for row in rows}
    times = bar_chart(seconds, xlabel="computing time in one thread, seconds per megapixel")
    return [*charts, ("", inline(agreement, "IoU by method")), ("", inline(times, "Seconds per megapixel by method"))]


def _drawing(benchmark: Benchmark[LabelledJob]) -> Callable[[ImageRecord], list[Cell]]:
    """Return a function that draws the results of an image, and its masks over the ground truth."""
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
    """Yield the operating points of the methods that were run on an image, each with its IoU."""
    for method in benchmark.methods:
        if method.name in record.runs:
            for point in method.points:
                yield point, record.runs[method.name].agreements[point.name].iou


def _synthetic_charts(summary: SyntheticSummary) -> list[tuple[str, Markup]]:
    """Draw recall by false alarms, and by method and kind; with captions."""
    drawn: dict[str, Any] = dict(list(curves(summary).items())[:_CURVES])
    figure = line_chart(drawn, xlabel="share of the clean pixels that is marked", ylabel="recall", log_x=True)
    shares = [[method.recall(kind=kind).share for kind in KINDS] for method in summary.methods]
    recall = [[np.nan if share is None else share for share in row] for row in shares]
    kinds = [kind.replace("_", " ") for kind in KINDS]
    table = heat_table([method.method for method in summary.methods], kinds, recall)
    caption = (
        "Recall while the threshold and the minimal area change: the most that is found for a share of clean pixels."
    )
    return [
        (caption, inline(figure, "Recall by false alarms")),
        ("Recall of each kind at the methods' own thresholds.", inline(table, "Recall by method and kind")),
    ]
