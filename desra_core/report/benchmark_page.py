"""Publish the results of a benchmark of either kind: tables, and a page about them, in its folder."""

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
from desra_core.benchmarking.labelled_tables import LabelledResults, MethodRow
from desra_core.benchmarking.synthetic import SyntheticJob, SyntheticSummary, plan_synthetic, read_trials, summarise
from desra_core.errors import ImageError
from desra_core.evaluation.mask_files import FRAME, on_valid_region, read_mask
from desra_core.evaluation.table import document_as_text, fixed
from desra_core.images.codec import Mask
from desra_core.images.parts import RGB, fitted, rgb8
from desra_core.report.charts import bar_chart, heat_table, inline, line_chart
from desra_core.report.document import Cell, cells_within, make_cell, render_page
from desra_core.report.pictures import AGREEMENT_SIDE, MAX_PIXELS, drawn_agreement
from desra_core.settings.models import Benchmarking
from desra_core.stages.run import read_photo
from desra_core.workspace.manifest import File

AnyBenchmark = Benchmark[Any]

WORST = 6
# The share of pictures in the 20 MB of a page.
PICTURE_CHARACTERS = 16_000_000

_CURVES, _FAILURES = 8, 100


class PublishedBenchmark(NamedTuple):
    """The results of a benchmark: its files, and its tables for the Prefect UI and for a terminal."""

    files: list[Path]
    markdown: str
    text: str
    judged: int  # number of judged images
    failures: list[ImageError]  # the reasons of images that could not be judged


def plan(settings: Benchmarking) -> AnyBenchmark:
    """Plan a benchmark of either kind, and write nothing (raises `desra_core.errors.UsageError`)."""
    return plan_synthetic(settings) if settings.synthetic else plan_labelled(settings)


def publish_results(benchmark: AnyBenchmark) -> PublishedBenchmark:
    """Add up the records of a benchmark; write tables and page (raises `desra_core.errors.TransientError`)."""
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
    # The page is written before the tables, so that equal tables prove that their page is there.
    if not (page.exists() and all(path.exists() and path.read_bytes() == data for path, data in contents.items())):
        workspace.publish(page, make().encode())
        for path, data in contents.items():
            workspace.publish(path, data)
    text = document_as_text(title, sections)
    return PublishedBenchmark([*contents, page], tables[f"{stem}.md"], text, judged, failures)


def render(benchmark: Benchmark[LabelledJob], results: LabelledResults) -> str:
    """Render the page of a benchmark on labelled images; the same results give the same text."""
    summed = [row for row in results.rows if row.part == results.rows[-1].part]
    worst = cells_within(PICTURE_CHARACTERS, worst_records(benchmark, results.records), _drawing(benchmark))
    return render_page(
        "benchmark.html.j2",
        benchmark=benchmark,
        results=results,
        name=Path(benchmark.settings.dataset).name,
        rows=labelled_tables.row_cells(results.rows),
        best=max(summed, key=lambda row: row.scores.values["iou"] or 0, default=None),
        times_note=labelled_tables.times_note(results),
        desra_masks=labelled_tables.published_cells(results.published),
        paper_title=labelled_tables.PUBLISHED_TITLE,
        paper=labelled_tables.paper_cells(),
        curves=_curves(results, summed),
        bars=_bars(summed) if summed else [],
        worst=[
            (record, " · ".join(f"{point.name}: {fixed(iou)}" for point, iou in _points(benchmark, record)), cells)
            for record, cells in worst
        ],
        listed=_FAILURES,
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


def render_synthetic(
    benchmark: Benchmark[SyntheticJob], summary: SyntheticSummary, failures: Sequence[ImageError]
) -> str:
    """Render the page of a synthetic benchmark; the same results give the same text."""
    return render_page(
        "synthetic.html.j2",
        title=synthetic_tables.title_of(benchmark),
        sections=synthetic_tables.sections_of(summary),
        plots=_synthetic_charts(summary) if summary.injected else [],
        settings=benchmark.settings,
        failures=failures,
        listed=_FAILURES,
    )


def _curves(results: LabelledResults, rows: Sequence[MethodRow]) -> Markup | None:
    """Draw precision over recall, with a mark at the threshold of each method in the table; None without any curve."""
    drawn = {
        name: [(agreement.recall, agreement.precision) for _, agreement in points
               if agreement.recall is not None and agreement.precision is not None]
        for name, points in list(results.curves.items())[:_CURVES]
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
    times = bar_chart(seconds, xlabel="computing time in one thread, seconds per megapixel")
    return [
        inline(bar_chart(iou, xlabel="IoU, and its 95 % interval", intervals=intervals), "IoU by method"),
        inline(times, "Seconds per megapixel by method"),
    ]


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


def _synthetic_charts(summary: SyntheticSummary) -> list[Markup]:
    """Draw recall by false alarms, and by method and kind."""
    drawn: dict[str, Any] = dict(list(synthetic_tables.curves(summary).items())[:_CURVES])
    figure = line_chart(drawn, xlabel="share of the clean pixels that is marked", ylabel="recall", log_x=True)
    shares = [[method.recall(kind=kind).share for kind in KINDS] for method in summary.methods]
    recall = [[np.nan if share is None else share for share in row] for row in shares]
    kinds = [kind.replace("_", " ") for kind in KINDS]
    table = heat_table([method.method for method in summary.methods], kinds, recall)
    return [inline(figure, "Recall by false alarms"), inline(table, "Recall by method and kind")]
