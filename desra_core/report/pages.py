"""Write the pages of evaluations, benchmarks and calibrations, and the tables of these in the Prefect UI."""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from desra_core.benchmarking import AnyBenchmark, annotated_results
from desra_core.benchmarking.annotated import AnnotatedJob, ImageRecord, read_ground_truth
from desra_core.benchmarking.annotated_results import THRESHOLD, AnnotatedResults, MethodRow
from desra_core.benchmarking.benchmark import Benchmark, OperatingPoint, Tables
from desra_core.benchmarking.synthetic import SyntheticSummary, curves, read_trials, summarise, synthetic_tables
from desra_core.calibration import weights
from desra_core.calibration.summary import COMPARISON, by_pixels, thin_classes, weight_sections
from desra_core.calibration.weights import CalibratedWeights
from desra_core.detection.class_weights import class_names
from desra_core.errors import ImageError
from desra_core.evaluation.evaluation import Evaluation
from desra_core.evaluation.mask_files import FRAME, on_valid_region, read_mask
from desra_core.evaluation.metrics import Agreement, ImageAgreement, wilson_interval
from desra_core.evaluation.summary import CLASSES, detail_sections, notes, score_sections
from desra_core.evaluation.table import Section, as_json, counted, document_as_markdown, document_as_text, fixed
from desra_core.files import read_bytes, replace_file
from desra_core.images.codec import CLASS_COUNT, Mask, decode
from desra_core.images.parts import RGB, fitted, rgb8
from desra_core.learning.severity import FittedSeverity
from desra_core.report.charts import MOST_CURVES, bar_chart, distributions, inline, line_chart, save, small_charts
from desra_core.report.document import Cell, cells_within, make_cell, render_page
from desra_core.report.pictures import AGREEMENT_SIDE, MAX_PIXELS, drawn_agreement
from desra_core.settings.models import SyntheticBenchmarking
from desra_core.stages import read_photo
from desra_core.workspace.manifest import File

PICTURES = {"gan_sr": "GAN-SR", "agreement": "mask against ground truth"}
WORST = 6

_DRAWN_CLASSES = 12
# The figure of D by class has this many bins, two for each interval, and at most this many classes.
_D_BINS, _D_CLASSES = 40, 24
_DIFFERENCES = 12
_CURVES = (
    f"How the similarity D is distributed in the classes with most pixels, {_D_CLASSES} at most. The line of a class "
    "is where its weight lifts D to 1: pixels to the right of it count as wholly alike. Thin classes have the weight "
    "of the fallback."
)
# The most characters that pictures may take of a page's 20 MB.
PICTURE_CHARACTERS = 16_000_000


def write_evaluation_page(evaluation: Evaluation, path: Path) -> Path:
    """Write the page of an evaluation to ``path``, as one HTML file that needs no other file; return ``path``.

    The same evaluation gives the same bytes.

    Raises:
        TransientError: The disk is full or failed.
    """
    worst = {
        kind: [(image.pair.name, _facts(image.agreement), _pictures(image)) for image in images]
        for kind, images in worst_images(evaluation.images).items()
    }
    chart = _class_chart(evaluation)
    page = render_page(
        "document.html.j2",
        title="Masks against a ground truth",
        lead="",
        notes=notes(evaluation),
        sections=score_sections(evaluation, CLASS_COUNT) + detail_sections(evaluation),
        charts={CLASSES: [("", chart)]} if chart else {},
        worst=worst,
        captions=PICTURES,
        flip="gan_sr agreement",
        about={
            "masks": evaluation.pairing.masks,
            "ground truth": ", ".join(map(str, evaluation.pairing.ground_truth)),
        },
    )
    replace_file(path, page.encode())
    return path


def worst_images(images: Sequence[ImageAgreement], count: int = WORST) -> dict[str, list[ImageAgreement]]:
    """Choose the images with the lowest IoU, the most missed and the most false regions, each image once.

    Each kind gets at most ``count`` images, and only images with its fault.
    """
    kinds: dict[str, Callable[[ImageAgreement], float]] = {
        "Lowest IoU": lambda image: 0 if image.agreement.iou is None else 1 - image.agreement.iou,
        "Most missed regions": lambda image: image.agreement.marked - image.agreement.found,
        "Most false regions": lambda image: image.agreement.detected - image.agreement.right,
    }
    chosen: dict[str, list[ImageAgreement]] = {}
    shown: set[str] = set()
    for kind, badness in kinds.items():
        left = [image for image in images if badness(image) > 0 and image.pair.name not in shown]
        # Of equally bad images, such as those without overlap, the one with more pixels in either mask comes first.
        chosen[kind] = sorted(left, key=lambda image: (-badness(image), -image.agreement.union))[:count]
        shown |= {image.pair.name for image in chosen[kind]}
    return {kind: found for kind, found in chosen.items() if found}


def _facts(agreement: Agreement) -> str:
    missed, false = agreement.marked - agreement.found, agreement.detected - agreement.right
    return f"IoU {fixed(agreement.iou)} · {missed} of {agreement.marked} missed · {false} of {agreement.detected} false"


def agreement_picture(image: ImageAgreement, gan_sr: RGB | None) -> RGB:
    """Read two masks again and draw them with `drawn_agreement`.

    Raises:
        ImageError: A mask cannot be read any more, or has another size now.
    """
    mask, truth = (_read_mask(path, image.shape) for path in (image.pair.mask, image.pair.ground_truth))
    return drawn_agreement(mask, truth, gan_sr)


def gan_sr_of(image: ImageAgreement) -> RGB | None:
    """Read the whole GAN result of an image; None where its file is not known, cannot be read or has another size."""
    path = image.pair.gan_sr
    if path is None:
        return None
    try:
        pixels = decode(read_bytes(path), path, max_pixels=MAX_PIXELS).pixels
    except ImageError:
        return None
    return rgb8(pixels) if pixels.shape[:2] == image.shape else None


def _class_chart(evaluation: Evaluation) -> Markup:
    """Draw the share of ground-truth regions that are found, of the classes with most regions; empty without any."""
    ranked = sorted((evaluation.classes or {}).items(), key=lambda item: (-item[1].marked, item[0]))
    shares, intervals = {}, {}
    for index, counts in ranked[:_DRAWN_CLASSES]:
        if counts.recall is not None:
            name = f"{class_names()[index]} ({counts.marked:,})"
            shares[name], intervals[name] = counts.recall, wilson_interval(counts.found, counts.marked)
    figure = bar_chart(shares, xlabel="share of ground-truth regions that are found", intervals=intervals)
    return inline(figure, "Recall by class") if shares else Markup()


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
    results: AnnotatedResults | SyntheticSummary
    if isinstance(benchmark.settings, SyntheticBenchmarking):
        results = summarise(read_trials(benchmark))
        tables, judged = synthetic_tables(benchmark, results, failures), results.images
    else:
        results = annotated_results.results_of(benchmark)
        tables, judged = annotated_results.annotated_tables(benchmark, results, failures), len(results.records)
    workspace = benchmark.workspace
    markdown = document_as_markdown(tables.title, tables.with_failures(failures))
    texts = {"md": markdown, "csv": tables.csv, "json": as_json(tables.document)}
    contents = {workspace.root / f"{tables.stem}.{suffix}": text.encode() for suffix, text in texts.items()}
    page = workspace.root / f"{tables.stem}.html"
    # The page is written first, so that tables with these contents prove that the page is up to date.
    if not (page.exists() and all(path.exists() and path.read_bytes() == data for path, data in contents.items())):
        workspace.publish(page, render_benchmark(benchmark, results, tables, failures).encode())
        for path, data in contents.items():
            workspace.publish(path, data)
    text = document_as_text(tables.title, tables.brief or tables.sections)
    return PublishedBenchmark([*contents, page], markdown, text, judged, failures)


def render_benchmark(
    benchmark: AnyBenchmark,
    results: AnnotatedResults | SyntheticSummary,
    tables: Tables,
    failures: Sequence[ImageError],
) -> str:
    """Render the page of a benchmark: its tables, charts and pictures of the worst images.

    The same results give the same text.
    """
    lead = ""
    worst: dict[str, list[tuple[str, str, list[Cell]]]] = {}
    if isinstance(results, SyntheticSummary):
        plots = _synthetic_charts(results) if results.injected else []
    elif results.rows:
        lead = f"{counted(len(benchmark.methods), 'detector')} on {counted(len(results.records), 'image')}."
        rows = [row for row in results.rows if row.part == results.rows[-1].part]
        plots = _annotated_charts(results, rows)
        best = max(rows, key=lambda row: row.scores.values["iou"] or 0)
        if iou := best.scores.values["iou"]:
            lead += f" The masks of {best.point.name} agree best with the ground truth: IoU {fixed(iou)}."
        drawn = cells_within(PICTURE_CHARACTERS, worst_records(benchmark, results.records), _drawing(benchmark))
        cases = []
        for record, cells in drawn:
            facts = (f"{point.name}: {fixed(iou)}" for point, iou in _points(benchmark, record))
            cases.append((record.title, f"IoU {' · '.join(facts)}", cells))
        worst = {f"Lowest IoU of {benchmark.methods[0].points[0].name}": cases} if cases else {}
    else:
        lead, plots = "No image could be judged.", []
    failed = [f"{counted(len(failures), 'image')} could not be judged: see the last section"] if failures else []
    settings = benchmark.settings
    return render_page(
        "document.html.j2",
        title=tables.title,
        lead=lead,
        notes=failed + benchmark.notes,
        sections=tables.with_failures(failures),
        charts={tables.sections[0].heading: plots} if plots else {},
        worst=worst,
        captions={},
        flip="GAN-SR MSE-SR",
        about={"data set": getattr(settings, "dataset", None), "GAN-SR": settings.gan_sr, "MSE-SR": settings.mse_sr},
    )


def worst_records(
    benchmark: Benchmark[AnnotatedJob], records: Sequence[ImageRecord], count: int = WORST
) -> list[ImageRecord]:
    """Choose the images with the lowest IoU of the first method; of equal ones, those with the larger masks first.

    Images that the method has not judged and images with two empty masks are left out.
    """
    method = benchmark.methods[0]
    point = method.points[0].name
    judged = [(record.runs[method.name].agreements[point], record) for record in records if method.name in record.runs]
    worst = [(agreement.iou, -agreement.union, record.title, record) for agreement, record in judged
             if agreement.iou is not None and agreement.iou < 1]  # fmt: skip
    return [record for *_, record in sorted(worst, key=lambda row: row[:3])[:count]]


def _pictures(image: ImageAgreement) -> list[Cell]:
    gan_sr = gan_sr_of(image)
    cells = [make_cell("gan_sr", partial(fitted, gan_sr, AGREEMENT_SIDE))] if gan_sr is not None else []
    return [*cells, make_cell("agreement", partial(agreement_picture, image, gan_sr))]


def _annotated_charts(results: AnnotatedResults, rows: Sequence[MethodRow]) -> list[tuple[str, Markup]]:
    """Draw precision over recall, with a mark at the threshold of each row, then IoU and time by row; with captions."""
    drawn = {
        name: [(agreement.recall, agreement.precision) for _, agreement in points
               if agreement.recall is not None and agreement.precision is not None]
        for name, points in list(results.curves.items())[:MOST_CURVES]
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
    if len(rows) > 1:
        caption = (
            "How the mean rank (1 is the best) depends on the overlap at which a region counts as found, on the "
            "dilation of the masks before, and on the threshold; all else as in the table."
        )
        figure = small_charts(results.sensitivity, ylabel="mean rank", log_x=[THRESHOLD])
        charts.append((caption, inline(figure, "Sensitivity of the ranking")))
    seconds = {row.point.name: row.seconds for row in rows}
    times = bar_chart(seconds, xlabel="computing time in one thread, seconds per megapixel")
    return [*charts, ("", inline(agreement, "IoU by method")), ("", inline(times, "Seconds per megapixel by method"))]


def _drawing(benchmark: Benchmark[AnnotatedJob]) -> Callable[[ImageRecord], list[Cell]]:
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
            mask = _read_mask(job.mask_path(benchmark.workspace, point), shape)
            return drawn_agreement(mask, truth(), result(image.gan_sr))

        return [
            make_cell("GAN-SR", lambda: fitted(result(image.gan_sr), AGREEMENT_SIDE)),
            make_cell("MSE-SR", lambda: fitted(result(image.mse_sr), AGREEMENT_SIDE)),
            *(make_cell(point.name, partial(against, point)) for point, _ in _points(benchmark, record)),
        ]

    return draw


def _points(benchmark: Benchmark[AnnotatedJob], record: ImageRecord) -> Iterator[tuple[OperatingPoint, float | None]]:
    """Yield the operating points of the methods that were run on an image, each with its IoU."""
    for method in benchmark.methods:
        if method.name in record.runs:
            for point in method.points:
                yield point, record.runs[method.name].agreements[point.name].iou


def _synthetic_charts(summary: SyntheticSummary) -> list[tuple[str, Markup]]:
    """Draw recall by false alarms; with a caption."""
    figure = line_chart(curves(summary), xlabel="share of the clean pixels that is marked", ylabel="recall", log_x=True)
    caption = (
        "Recall while the threshold and the minimal area change: the most that is found for a share of clean pixels."
    )
    return [(caption, inline(figure, "Recall by false alarms"))]


def _read_mask(path: Path, shape: tuple[int, int]) -> Mask:
    """Read the mask of an image of ``(H, W)``, with or without its frame: ``(H, W)`` bool, the frame empty."""
    return np.pad(on_valid_region(read_mask(path), shape, path), FRAME)


def write_calibration(calibrated: CalibratedWeights, output: Path) -> list[Path]:
    """Write the weights file, and beside it a page and the figure of D by class; return these files.

    The same weights give the same bytes.

    Raises:
        TransientError: The disk is full or failed.
    """
    page, picture = output.with_suffix(".html"), output.with_suffix(".svg")
    weights.write_weights(calibrated, output)
    save(class_distributions(calibrated), picture)
    replace_file(page, render_calibration(calibrated, output).encode())
    return [output, page, picture]


def render_calibration(calibrated: CalibratedWeights, output: Path) -> str:
    """Render the page about the weights in the file ``output``."""
    charts = {"": [(_CURVES, inline(class_distributions(calibrated), "Distribution of the similarity in each class"))]}
    changed = weights.largest_differences(calibrated.rows, _DIFFERENCES)
    if ratios := {row.name: row.weight / row.published_weight for row in changed}:
        figure = bar_chart(ratios, xlabel="weight as a multiple of the published one")
        charts[COMPARISON] = [("", inline(figure, "Largest differences to the published weights"))]
    doubts, thin = calibrated.origin["doubts"], thin_classes(calibrated)
    return render_page(
        "document.html.j2",
        title=f"Class weights in {output.name}",
        lead="",
        notes=[f"{note}." for note in doubts] + ([thin] if thin else []),
        sections=weight_sections(calibrated),
        charts=charts,
        worst={},
        captions={},
        flip="",
        about={name.replace("_", " "): value for name, value in calibrated.origin.items() if name != "doubts"},
    )


def write_reliability(fitted: FittedSeverity, output: Path) -> Path:
    """Write the page about a severity model beside its file, and return the page (raises as `write_calibration`)."""
    page = output.with_suffix(".html")
    points = [(100 * one.predicted, 100 * one.observed) for one in fitted.reliability]
    curves = {"observed on images left out of the fit": points, "as predicted": [(0.0, 0.0), (100.0, 100.0)]}
    figure = line_chart(curves, xlabel="predicted: % of viewers who notice it", ylabel="observed, %")
    numbers = fitted._asdict()
    replace_file(page, render_page(
        "document.html.j2",
        title=f"How many viewers notice a region: {output.name}",
        lead="",
        notes=[],
        sections=[Section(bullets=[
            f"{counted(fitted.ratings, 'rating')} of {counted(fitted.regions, 'region')} in "
            f"{counted(fitted.images, 'image')}; {fitted.noticed:.0%} say yes",
            f"mean squared error {fitted.brier:.3f}; by the mean share alone {fitted.brier_of_mean:.3f}",
            f"rank correlation of predicted and observed shares of regions: {fitted.rank_correlation:.2f}",
        ]), Section("Reliability", table=[
            {"predicted": f"{one.predicted:.0%}", "observed": f"{one.observed:.0%}", "ratings": f"{one.ratings:,}"}
            for one in fitted.reliability
        ])],
        charts={"Reliability": [("", inline(figure, "Observed shares of viewers by predicted ones"))]},
        worst={},
        captions={},
        flip="",
        about={name.replace("_", " "): numbers[name] for name in ("images", "regions", "ratings")},
    ).encode())  # fmt: skip
    return page


def class_distributions(calibrated: CalibratedWeights) -> Figure:
    """Draw D in each class, like figure 10 of the paper; a line marks the D that the weight lifts to 1."""
    seen = [row for row in by_pixels(calibrated.rows) if row.pixels]
    rows = {row.name + (", thin" if row.state == "thin" else ""): row for row in seen[:_D_CLASSES]}
    counts = calibrated.histogram.counts.reshape(len(calibrated.rows), _D_BINS, -1).sum(axis=2)
    return distributions(
        {name: counts[row.class_index] for name, row in rows.items()},
        edges=np.linspace(0, 1, _D_BINS + 1),
        xlabel="similarity D; a line where the class's weight lifts it to 1",
        marks={name: 1 / row.weight for name, row in rows.items()},
    )
