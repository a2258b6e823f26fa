"""Write the pages of evaluations, benchmarks and calibrations, and the tables of these in the Prefect UI."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import chain, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib.figure import Figure

from desra_core.benchmarking import AnyBenchmark, annotated
from desra_core.benchmarking.annotated import AnnotatedJob, AnnotatedResults, ImageRecord, MethodRow
from desra_core.benchmarking.benchmark import Benchmark, OperatingPoint, Tables
from desra_core.benchmarking.injection import KINDS
from desra_core.benchmarking.synthetic import SyntheticSummary, curves, read_trials, summarise, synthetic_tables
from desra_core.calibration import weights
from desra_core.calibration.weights import CalibratedWeights, ClassWeight
from desra_core.detection.class_weights import class_names
from desra_core.detection.mask import THRESHOLD
from desra_core.errors import ImageError
from desra_core.evaluation.evaluation import Evaluation, class_rows, image_rows, rated_regions
from desra_core.evaluation.mask_files import FRAME, on_valid_region, read_mask
from desra_core.evaluation.metrics import ImageAgreement, MaskScores, wilson_interval
from desra_core.evaluation.table import as_json, as_markdown, counted, document_as_markdown, document_as_text, fixed
from desra_core.files import read_bytes, replace_file
from desra_core.images.codec import Mask, decode
from desra_core.images.parts import RGB, fitted, rgb8
from desra_core.report.charts import MOST_CURVES, bar_chart, distributions, heat_table, inline, line_chart, save
from desra_core.report.document import Cell, cells_within, make_cell, render_page
from desra_core.report.pictures import AGREEMENT_SIDE, MAX_PIXELS, drawn_agreement
from desra_core.stages import read_photo
from desra_core.workspace.manifest import File

PICTURES = {"gan_sr": "GAN-SR", "agreement": "mask against ground truth"}
NAMES = {"iou": "IoU", "precision": "precision", "recall": "recall", "f1": "F1"}
WORST = 6

_ROWS, _LISTED = 200, 200
_BINS, _DRAWN_CLASSES = 20, 12
# The figure of D by class has this many bins, two for each interval, and at most this many classes.
_D_BINS, _D_CLASSES = 40, 24
_DIFFERENCES = 12
# Edges of the bins of areas of regions, in pixels.
_EDGES = (0, 1000, 4000, 16_000, 64_000, math.inf)
_FOUND, _RIGHT = "share of ground-truth regions that are found", "share of detected regions that are right"
# The most characters that pictures may take of a page's 20 MB.
PICTURE_CHARACTERS = 16_000_000


def write_evaluation_page(evaluation: Evaluation, path: Path) -> Path:
    """Write the page of an evaluation to ``path``, as one HTML file that needs no other file; return ``path``.

    The same evaluation gives the same bytes.

    Raises:
        TransientError: The disk is full or failed.
    """
    prominent = evaluation.prominent
    worst = {
        kind: [(image, _pictures(image)) for image in images]
        for kind, images in worst_images(evaluation.images).items()
    }
    rows = sorted(image_rows(evaluation), key=lambda row: (row["iou"] is None, row["iou"]))
    ranked = sorted((evaluation.classes or {}).items(), key=lambda item: (-item[1].marked, item[0]))
    by_class = {class_names()[index]: (counts.found, counts.marked) for index, counts in ranked if counts.marked}
    page = render_page(
        "evaluation.html.j2",
        evaluation=evaluation,
        masks=evaluation.pairing.masks,
        tiles=_tiles(evaluation.scores),
        rated=rated_regions(evaluation),
        prominent_tiles=_tiles(prominent) if prominent else [],
        notes=_evaluation_notes(evaluation),
        plots=_evaluation_charts(evaluation),
        worst=worst,
        kinds=PICTURES,
        rows=rows[:_ROWS],
        all_rows=len(rows),
        classes=sorted(class_rows(evaluation), key=lambda row: (-row["marked"] - row["detected"], row["class"])),
        class_chart=_shares(dict(list(by_class.items())[:_DRAWN_CLASSES]), _FOUND, "by class") if by_class else "",
        listed=_LISTED,
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


def _tiles(scores: MaskScores) -> list[tuple[str, str, bool, str]]:
    """Write value, name and interval of each measure; a dash and the reason where it is undefined."""
    tiles = []
    for measure, name in NAMES.items():
        value, interval = scores.values[measure], scores.intervals[measure]
        more = f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else "no interval"
        if value is None:
            more = f"undefined: {scores.undefined[measure]}"
        tiles.append((fixed(value), name, False, more))
    return tiles


def _evaluation_notes(evaluation: Evaluation) -> list[str]:
    """Write the notes that a reader needs to judge the numbers."""
    notes = []
    if evaluation.scores.images == 1:
        notes.append("One image was judged: these numbers may not hold for other images.")
    if evaluation.failures:
        notes.append(f"{counted(len(evaluation.failures), 'file')} could not be judged: see below.")
    if evaluation.lossy:
        lossy = counted(len(evaluation.lossy), "mask is", "masks are")
        notes.append(f"{lossy} JPEG or lossy WebP, thresholded at half: edges are uncertain.")
    if evaluation.sizes is not None:
        taken = {"image": "the image's, so 5 px a side were cropped", "valid": "that of the image without 5 px a side"}
        notes.append(f"Masks and ground truth have one size, which was taken for {taken[evaluation.sizes]}; "
                     "give --size if that is wrong.")  # fmt: skip
    if evaluation.pairing.outdated:
        outdated = counted(evaluation.pairing.outdated, "human mask does not count: it was",
                           "human masks do not count: they were")  # fmt: skip
        notes.append(f"{outdated} drawn on another photo or on another model's result.")
    return notes


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


def _evaluation_charts(evaluation: Evaluation) -> list[Markup]:
    """Draw how the measures spread over images, and the recall and precision of regions by area where defined."""
    histograms: dict[str, npt.NDArray[np.int64]] = {}
    marks: dict[str, float] = {}
    for measure in ("iou", "precision", "recall"):
        values = [getattr(image.agreement, measure) for image in evaluation.images]
        counts, edges = np.histogram([value for value in values if value is not None], _BINS, (0, 1))
        histograms[NAMES[measure]] = counts
        of_set = evaluation.scores.values[measure]
        if of_set is not None:
            marks[NAMES[measure]] = of_set
    figure = distributions(histograms, edges=edges, xlabel="of one image; the line: of all", marks=marks)
    charts = [inline(figure, "How the measures of single images spread, and those of all")]
    sides = {_FOUND: [image.marked for image in evaluation.images], _RIGHT: [im.detected for im in evaluation.images]}
    for title, of_images in sides.items():
        regions = list(chain.from_iterable(of_images))
        parts = {}
        for low, high in pairwise(_EDGES):
            name = f"{low:,.0f} to {high:,.0f} px" if math.isfinite(high) else f"from {low:,.0f} px"
            covered = [region.covered for region in regions if low <= region.area < high]
            parts[name] = sum(covered), len(covered)
        if regions:
            charts.append(_shares(parts, title, "by area"))
    return charts


def _shares(parts: Mapping[str, tuple[int, int]], title: str, of_what: str) -> Markup:
    """Draw a bar for each (part, whole), with its 95 % interval."""
    named = {f"{name} ({whole:,})": (part, whole) for name, (part, whole) in parts.items() if whole}
    values = {name: part / whole for name, (part, whole) in named.items()}
    intervals = {name: wilson_interval(part, whole) for name, (part, whole) in named.items()}
    return inline(bar_chart(values, xlabel=title, intervals=intervals), f"The {title}, {of_what}")


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
    if benchmark.settings.synthetic:
        results = summarise(read_trials(benchmark))
        tables, judged = synthetic_tables(benchmark, results, failures), results.images
    else:
        results = annotated.results_of(benchmark)
        tables, judged = annotated.annotated_tables(benchmark, results, failures), len(results.records)
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
    text = document_as_text(tables.title, tables.sections)
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
    worst: list[tuple[str, str, list[Cell]]] = []
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
            return np.pad(annotated.read_ground_truth(job.ground_truth, shape, image.path), FRAME)

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
    """Draw recall by false alarms, and recall by method and kind; with captions."""
    figure = line_chart(curves(summary), xlabel="share of the clean pixels that is marked", ylabel="recall", log_x=True)
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
    rows = calibrated.rows
    seen = [row for row in rows if row.pixels]
    changed = weights.largest_differences(rows, _DIFFERENCES)
    ratios = {row.name: row.weight / row.published_weight for row in changed}
    differences = bar_chart(ratios, xlabel="weight as a multiple of the published one") if ratios else None
    return render_page(
        "calibration.html.j2",
        name=output.name,
        calibrated=calibrated,
        states={state: [row for row in rows if row.state == state] for state in ("calibrated", "thin", "unseen")},
        distributions=inline(class_distributions(calibrated), "Distribution of the similarity in each class"),
        drawn=min(len(seen), _D_CLASSES),
        differences=differences and inline(differences, "Largest differences to the published weights"),
        classes=weight_rows(seen),
        unseen=weight_rows([row for row in rows if not row.pixels]),
        threshold=_threshold_text(calibrated.suggested.threshold),
        published_threshold=_threshold_text(calibrated.suggested.published_threshold),
        default_threshold=THRESHOLD,
        origin={name.replace("_", " "): value for name, value in calibrated.origin.items() if value is not None},
    )


def class_distributions(calibrated: CalibratedWeights) -> Figure:
    """Draw D in each class, like figure 10 of the paper; a line marks the D that the weight lifts to 1."""
    seen = [row for row in _by_pixels(calibrated.rows) if row.pixels]
    rows = {row.name + (", thin" if row.state == "thin" else ""): row for row in seen[:_D_CLASSES]}
    counts = calibrated.histogram.counts.reshape(len(calibrated.rows), _D_BINS, -1).sum(axis=2)
    return distributions(
        {name: counts[row.class_index] for name, row in rows.items()},
        edges=np.linspace(0, 1, _D_BINS + 1),
        xlabel="similarity D; a line where the class's weight lifts it to 1",
        marks={name: 1 / row.weight for name, row in rows.items()},
    )


def weight_rows(rows: list[ClassWeight]) -> list[dict[str, str]]:
    """Write classes as rows of a table, the classes with most pixels first."""
    cells = []
    for row in _by_pixels(rows):
        ratio = row.weight / row.published_weight
        note = "as published" if math.isclose(ratio, 1, rel_tol=5e-4) else f"{ratio:.2f} x published"
        cells.append({
            "class": f"{row.class_index} {row.name}",
            "pixels": f"{row.pixels:,}",
            "images": f"{row.images:,}",
            "interval": "–" if row.interval is None else str(row.interval),
            "published interval": str(row.published_interval),
            "weight": f"{row.weight:.3f}",
            "published weight": f"{row.published_weight:.3f}",
            "note": note if row.state == "calibrated" else f"{row.state}: fallback",
        })  # fmt: skip
    return cells


def calibration_markdown(calibrated: CalibratedWeights) -> str:
    """Write the weights of all classes that were seen, and the thresholds, in Markdown."""
    histogram, suggested = calibrated.histogram, calibrated.suggested
    seen = [row for row in calibrated.rows if row.pixels]
    unseen = counted(len(calibrated.rows) - len(seen), "class is", "classes are")
    pixels = int(histogram.pixels.sum())
    parts = [
        f"{counted(pixels, 'pixel')} of {counted(histogram.seen, 'image')}; {unseen} unseen.",
        f"At most {100 * suggested.rate:.12g} % of the pixels are below the threshold "
        f"{_threshold_text(suggested.threshold)}, with the published weights below "
        f"{_threshold_text(suggested.published_threshold)}, before erosion, dilation, hole filling and area filter.",
        as_markdown(weight_rows(seen)),
    ]
    return "\n\n".join(parts) + "\n"


def _by_pixels(rows: list[ClassWeight]) -> list[ClassWeight]:
    return sorted(rows, key=lambda row: (-row.pixels, row.class_index))


def _threshold_text(value: float | None) -> str:
    """Write a threshold as it is given to ``--threshold``."""
    return "none" if value is None else f"{value:.4g}"
