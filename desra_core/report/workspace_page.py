"""Write the report of a workspace: one HTML file that needs no other file."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup

from desra_core.detection.detectors import AppliedDetector
from desra_core.errors import ImageError, UsageError
from desra_core.evaluation.table import counted
from desra_core.files.content import check_names, replace_file
from desra_core.images.scanning import kinds_in_words
from desra_core.report import charts, wording
from desra_core.report.charts import inline
from desra_core.report.document import Cell, cells_within, make_cell, render_page
from desra_core.report.finetuning import read_finetuning
from desra_core.report.image_page import FOLDER, Page, render_pages
from desra_core.report.pictures import KINDS, Crops
from desra_core.report.results import (
    CorpusSummary,
    WorkspaceResults,
    class_counts,
    masked_shares,
    numbers,
    read_results,
    recorded_detector,
    stage_times,
)
from desra_core.report.samples import class_distributions, severity_curve
from desra_core.workspace import Workspace

WORST = 24
PER_IMAGE = 3
MOST = 500
# The share of pictures in the 20 MB of a page. All else takes at most 2 MB: numbers and lengths of rows are limited.
PICTURE_CHARACTERS = 17_000_000

_FAILURES = 200
_CLASSES_DRAWN = 15
_ORDER = [("severity", "descending"), ("image", "ascending"), ("y", "ascending"), ("x", "ascending")]
_AT_ONCE = 1000
_NOTE = 480  # most characters of a note


def write_report(
    workspace: Workspace,
    *,
    worst: int = WORST,
    pages: int = 0,
    output: Path | None = None,
    on_left_out: Callable[[ImageError], None] | None = None,
) -> Path:
    """Write the report of a workspace: a page below 20 MB that needs no other file and no network.

    Two reports of the same results are the same bytes.

    Args:
        workspace: The workspace; its latest run may have been cut off. Only the report in it changes.
        worst: Number of regions to show, the most severe ones first, `MOST` at most. Regions that would make the page
            too large are left out, and the page says so.
        pages: Number of images that get a page of their own, ``pages/NAME.html`` beside the report, which links to it:
            the images with the most severe regions.
        output: The HTML file; ``report.html`` in the workspace by default.
        on_left_out: Called with the reason for each page of an image that cannot be written, because its name is too
            long.

    Returns:
        The file.

    Raises:
        UsageError: The folder is no workspace, a table of it is damaged, or ``output`` is no HTML file.
        TransientError: The disk is full or failed.
    """
    path = workspace.root / "report.html" if output is None else output.absolute()
    if path.suffix.lower() not in (".html", ".htm") or path.is_dir():
        raise UsageError(path, "is no HTML file", "name one with the suffix .html")
    results = read_results(workspace)
    chosen = []
    for region in choose(results.regions, min(pages, MOST), per_image=1):
        page = Page(region["image"], region["id"], f"{FOLDER}/{region['image']}.html")
        try:
            check_names([path.parent / page.path])
            chosen.append(page)
        except ImageError as error:
            if on_left_out:
                on_left_out(error)
    inside = path.resolve().is_relative_to(workspace.root.resolve())
    publish: Callable[[Path, bytes], object] = workspace.publish if inside else replace_file
    for page, text in render_pages(results, chosen, path.name):
        publish(path.parent / page.path, text.encode())
    publish(path, render_page("report.html.j2", **_content(results, min(worst, MOST), chosen)).encode())
    return path


def make_gallery(
    results: WorkspaceResults, worst: int, budget: int
) -> tuple[list[tuple[dict[str, Any], list[Cell]]], int]:
    """Cut out and encode the pictures of the ``worst`` most severe regions, in at most ``budget`` characters.

    Returns:
        Regions (rows of the region table) with their pictures, and the number of regions that did not fit.
    """
    chosen = choose(results.regions, worst)
    images = results.stored_images([region["image"] for region in chosen], [region["id"] for region in chosen])
    kinds = [kind for kind in KINDS if kind != "lr" or "lr" in results.sources]

    def draw(region: dict[str, Any]) -> list[Cell]:
        image = images[region["image"]]
        if 0 in image.shape:
            return [Cell(kind, None, reason="The image has failed since.") for kind in kinds]
        crops = Crops(image, (region["x"], region["y"], region["width"], region["height"]))
        return [make_cell(kind, partial(crops.make, kind)) for kind in kinds]

    rows = cells_within(budget, chosen, draw)
    return rows, len(chosen) - len(rows)


def choose(regions: pa.Table, worst: int, per_image: int = PER_IMAGE) -> list[dict[str, Any]]:
    """Choose the ``worst`` most severe regions, at most ``per_image`` of an image and its copies together.

    Regions with a severity below zero are left out: their mean pixel is not suspect.
    """
    seen: Counter[str] = Counter()
    shown: set[tuple[str, int, int]] = set()
    chosen: list[dict[str, Any]] = []
    for batch in regions.filter(pc.greater_equal(regions["severity"], 0)).sort_by(_ORDER).to_batches(_AT_ONCE):
        for region in batch.to_pylist():
            if len(chosen) >= worst:
                return chosen
            place = (region["id"], region["x"], region["y"])
            if seen[region["id"]] < per_image and place not in shown:
                seen[region["id"]] += 1
                shown.add(place)
                chosen.append(region)
    return chosen


def _content(results: WorkspaceResults, worst: int, pages: list[Page]) -> dict[str, Any]:
    summary = CorpusSummary(results)
    times = stage_times(results.seconds)
    settings, measure = results.settings, recorded_detector(results.settings)
    classes = class_counts(results.regions)
    distribution, people = class_distributions(results, measure), severity_curve(results)
    notes = _notes(results, summary)
    keys = results.document.get("target") or {}
    try:
        finetuning = read_finetuning(results.workspace, keys.get("mask_key"))
    except UsageError as error:
        finetuning = None
        notes.append(wording.shortened(f"The verdict on finetuned models is left out: {error}.", _NOTE))
    budget = PICTURE_CHARACTERS - (finetuning["characters"] if finetuning else 0)
    gallery, left_out = make_gallery(results, worst, budget)
    people_chart: Markup | None = None
    if people and people.points:
        figure = charts.line_chart({"regions by severity": people.points}, xlabel="recall", ylabel="precision",
                                   marks={"all regions": people.points[-1]})  # fmt: skip
        figure.axes[0].set(xlim=(0, 1.02), ylim=(0, 1.02))
        people_chart = inline(figure, "Precision and recall over the severity of the regions")
    return {
        "results": results,
        "workspace": results.workspace.root.absolute(),
        "sources": {wording.ROLES.get(role, role): folder for role, folder in results.sources.items()},
        "summary": summary,
        "notes": notes,
        "finetuning": finetuning,
        "weighted": settings.get("segmenter", "none") != "none" and settings.get("weights") != "none",
        "measure": measure,
        "classes": classes,
        "distribution": distribution,
        "people": people,
        "gallery": gallery,
        "left_out": left_out,
        "worst": worst,
        "pages": pages,
        "links": {page.id: page.link for page in pages},
        "kinds": KINDS | {"difference": measure.heat_name},
        "per_image": PER_IMAGE,
        "failures": results.failures.slice(0, _FAILURES).to_pylist(),
        "times": times,
        # Rate: images per second of one worker that runs all stages.
        "total_rate": max(time.images for time in times) / summary.seconds if summary.seconds > 0 else None,
        "settings": wording.settings_rows(settings),
        "versions": results.document.get("versions") or {},
        "keys": keys,
        "plots": _histograms(results, measure),
        "people_chart": people_chart,
        "class_counts": {row["name"] or "no label": float(row["regions"]) for row in classes[:_CLASSES_DRAWN]},
        "mean_and_median": {wording.stage_name(time.stage): (time.mean, time.median) for time in times},
        "parts": [wording.stage_name(time.stage) for time in times if time.part],
    }


def _notes(results: WorkspaceResults, summary: CorpusSummary) -> list[str]:
    """Write the notes that a reader needs to judge the numbers."""
    notes = []
    if summary.pending:
        pending = counted(summary.pending, "image is", "images are")
        notes.append(f"{pending} still to be done: the same command goes on where it stopped.")
    if summary.outdated:
        outdated = counted(summary.outdated, "image still has", "images still have")
        notes.append(f"{outdated} the artifacts that earlier settings found: the latest run was cut off before.")
    if summary.marked and not results.workspace.regions.exists():
        notes.append("The region table is missing: the run was cut off before it wrote one. Run it again.")
    if results.vanished:
        vanished = counted(results.vanished, "image that is", "images that are")
        notes.append(f"{vanished} no longer in the folders: left out.")
    if others := kinds_in_words(results.passed_over):
        notes.append(f"In the folders, these were passed over: {others}.")
    return notes


def _histograms(results: WorkspaceResults, measure: AppliedDetector) -> list[Markup]:
    """Draw the regions by severity, area and similarity, and the masked shares of images with artifacts."""
    regions, word = results.regions, measure.word
    if regions.num_rows == 0:
        return []
    similarity = measure.value(-numbers(regions["mean_similarity"]))
    top = measure.highest or max(float(similarity.max()), 1e-12)
    shares = masked_shares(results)
    drawn = [
        ("the severity of the regions", "severity", "regions", "asinh", numbers(regions["severity"])),
        ("the area of the regions", "area of a region in pixels", "regions", "log", numbers(regions["area"])),
        (f"the mean {word} of the regions", f"mean {word} of a region", "regions", "linear", similarity),
        ("the masked share of the images with artifacts", "masked share of an image in %", "images", "log",
         100 * shares),
    ]  # fmt: skip
    return [
        inline(charts.histogram(values, scale=scale, xlabel=xlabel, ylabel=ylabel, top=top), f"Histogram of {title}")
        for title, xlabel, ylabel, scale, values in drawn
        if values.size
    ]
