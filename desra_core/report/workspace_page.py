"""The report of a workspace: one HTML file that asks for nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup

from desra_core.detection.detectors import AppliedDetector
from desra_core.errors import ImageError, UsageError
from desra_core.files.atomic import check_names, replace_file
from desra_core.images.scanning import kinds_in_words
from desra_core.report import charts, wording
from desra_core.report.charts import inline
from desra_core.report.distribution import Distributions, class_distributions
from desra_core.report.document import Cell, cells_within, make_cell, render_page
from desra_core.report.finetuning import read_finetuning
from desra_core.report.human import SeverityCurve, severity_curve
from desra_core.report.image_page import FOLDER, Page, render_pages
from desra_core.report.pictures import KINDS, Crops
from desra_core.report.results import (
    CorpusSummary,
    StageTime,
    WorkspaceResults,
    class_counts,
    masked_shares,
    numbers,
    read_results,
    recorded_detector,
    stage_times,
    summarize,
)
from desra_core.workspace import Workspace

WORST = 24
PER_IMAGE = 3
MOST = 500
# Of the page's 20 MB; what is not a picture has fixed numbers of rows of limited length, 2 MB at the very most.
PICTURE_CHARACTERS = 17_000_000

_FAILURES, _FAILURES_AT_ONCE = 200, 10
_CLASSES_AT_ONCE = 15
_SUFFIXES = (".html", ".htm")
_ORDER = [("severity", "descending"), ("image", "ascending"), ("y", "ascending"), ("x", "ascending")]
_NOTE = 480  # characters


class Gallery(NamedTuple):
    """Regions (rows of the region table), each with its pictures, and how many more did not fit into the page."""

    rows: list[tuple[dict[str, Any], list[Cell]]]
    left_out: int


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
        workspace: Of any run, a cut off one too. Nothing in it changes but the report.
        worst: Number of regions to show, the most severe ones first, `MOST` at most. Regions that would make the page
            too large are left out, and the page says so.
        pages: Number of images to write a page of their own about, to ``pages/NAME.html`` beside the report, which
            links to them; those with the most severe regions.
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
    if path.suffix.lower() not in _SUFFIXES or path.is_dir():
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
    for page, text in render_pages(results, chosen, path.name):
        _publish(workspace, path.parent / page.path, text)
    _publish(workspace, path, render_page("report.html.j2", **_content(results, min(worst, MOST), chosen)))
    return path


def _publish(workspace: Workspace, path: Path, text: str) -> None:
    if path.resolve().is_relative_to(workspace.root.resolve()):
        workspace.publish(path, text.encode())
    else:
        replace_file(path, text.encode())


def make_gallery(results: WorkspaceResults, worst: int, budget: int) -> Gallery:
    """Cut out and encode the pictures of the ``worst`` most severe regions, in at most ``budget`` characters."""
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
    return Gallery(rows, len(chosen) - len(rows))


def choose(regions: pa.Table, worst: int, per_image: int = PER_IMAGE) -> list[dict[str, Any]]:
    """Choose the most severe regions, worst first, at most ``per_image`` of one image and of its copies together.

    Left out are those with a severity below zero: on average, their pixels are no artifact.
    """
    regions = regions.filter(pc.greater_equal(regions["severity"], 0))
    reach = 4 * worst
    while worst > 0:
        found = regions.take(pc.select_k_unstable(regions, min(reach, regions.num_rows), _ORDER)).to_pylist()
        seen: Counter[str] = Counter()
        shown: set[tuple[str, int, int]] = set()
        chosen = []
        for region in found:
            place = (region["id"], region["x"], region["y"])
            if seen[region["id"]] < per_image and place not in shown:
                seen[region["id"]] += 1
                shown.add(place)
                chosen.append(region)
        if len(chosen) >= worst or len(found) == regions.num_rows:
            return chosen[:worst]
        reach *= 8
    return []


def _content(results: WorkspaceResults, worst: int, pages: list[Page]) -> dict[str, Any]:
    summary = summarize(results)
    times = stage_times(results.seconds)
    settings, measure = results.settings, recorded_detector(results.settings)
    classes = class_counts(results.regions)
    distribution, people = class_distributions(results, measure), severity_curve(results)
    notes = _notes(results, summary)
    try:
        finetuning = read_finetuning(results.workspace, (results.document.get("target") or {}).get("mask_key"))
    except UsageError as error:
        finetuning = None
        notes.append(wording.shortened(f"The verdict on finetuned models is left out: {error}.", _NOTE))
    pictures = PICTURE_CHARACTERS - (finetuning["characters"] if finetuning else 0)
    return {
        "workspace": results.workspace.root.absolute(),
        "verb": results.verb,
        "changed": wording.moment(results.changed),
        "sources": {wording.ROLES.get(role, role): folder for role, folder in results.sources.items()},
        "summary": summary,
        "notes": notes,
        "finetuning": finetuning,
        "weighted": settings.get("segmenter", "none") != "none" and settings.get("weights") != "none",
        "measure": measure,
        "classes": classes,
        "distribution": distribution,
        "people": people,
        "classes_at_once": _CLASSES_AT_ONCE,
        "labelled": results.regions["class_name"].null_count < results.regions.num_rows,
        "gallery": make_gallery(results, worst, pictures),
        "worst": worst,
        "pages": pages,
        "links": {page.id: page.link for page in pages},
        "kinds": KINDS | {"difference": measure.picture},
        "per_image": PER_IMAGE,
        "failures": results.failures.slice(0, _FAILURES).to_pylist(),
        "failures_at_once": _FAILURES_AT_ONCE,
        "times": times,
        # Images per second of one worker that runs all stages.
        "total_rate": max(time.images for time in times) / summary.seconds if summary.seconds > 0 else None,
        "settings": wording.settings_rows(settings),
        "versions": results.document.get("versions") or {},
        "keys": results.document.get("target") or {},
        "plots": _histograms(results, measure),
        **_charts(classes, distribution, people, times, measure),
    }


def _notes(results: WorkspaceResults, summary: CorpusSummary) -> list[str]:
    """Write the notes that a reader needs to judge the numbers."""
    notes = []
    if summary.pending:
        notes.append(f"{summary.pending:,} images are still to be done: the same command goes on where it stopped.")
    if summary.outdated:
        notes.append(
            f"{summary.outdated:,} images still have the artifacts that earlier settings found: the latest run was "
            "cut off before it came to them."
        )
    if summary.marked and not results.workspace.regions.exists():
        notes.append("The region table is missing: the run was cut off before it wrote one. Run it again.")
    if results.vanished:
        notes.append(f"{results.vanished:,} images that are no longer in the folders are left out.")
    if others := kinds_in_words(results.passed_over):
        notes.append(f"In the folders, these were passed over: {others}.")
    return notes


def _histograms(results: WorkspaceResults, measure: AppliedDetector) -> list[Markup]:
    """Draw the regions by severity, area and similarity, and the masked shares of images with artifacts."""
    regions, word = results.regions, measure.word
    if regions.num_rows == 0:
        return []
    values = measure.value(-numbers(regions["mean_similarity"]))
    top = measure.highest or max(float(values.max()), 1e-12)
    drawn = {
        "the severity of the regions": charts.histogram(
            numbers(regions["severity"]), scale="asinh", xlabel="severity", ylabel="regions"
        ),
        "the area of the regions": charts.histogram(
            numbers(regions["area"]), scale="log", xlabel="area of a region in pixels", ylabel="regions"
        ),
        f"the mean {word} of the regions": charts.histogram(
            values, scale="linear", top=top, xlabel=f"mean {word} of a region", ylabel="regions"
        ),
    }
    shares = masked_shares(results)
    if shares.size:
        drawn["the masked share of the images with artifacts"] = charts.histogram(
            100 * shares, scale="log", xlabel="masked share of an image in %", ylabel="images"
        )
    return [inline(figure, f"Histogram of {values}") for values, figure in drawn.items()]


def _charts(
    classes: list[dict[str, Any]],
    distribution: Distributions | None,
    people: SeverityCurve | None,
    times: list[StageTime],
    measure: AppliedDetector,
) -> dict[str, Markup | str]:
    """Draw the charts that a page has once, by their names in the template; empty where there is nothing to draw."""
    drawn: dict[str, Markup | str] = dict.fromkeys(("distribution_chart", "people_chart", "time_bars"), "")
    counts = {count["name"] or "no label": float(count["regions"]) for count in classes[:_CLASSES_AT_ONCE]}
    bars = charts.bar_chart(counts, xlabel="artifact regions")
    drawn["class_chart"] = inline(bars, "Artifact regions by class")
    if distribution:
        figure = charts.distributions(
            distribution.histograms, edges=distribution.edges, xlabel=measure.axis, marks=distribution.marks
        )
        drawn["distribution_chart"] = inline(figure, f"Distribution of {measure.axis} by class")
    if people and people.points:
        figure = charts.line_chart({"regions by severity": people.points}, xlabel="recall", ylabel="precision",
                                   marks={"all regions": people.points[-1]})  # fmt: skip
        figure.axes[0].set(xlim=(0, 1.02), ylim=(0, 1.02))
        drawn["people_chart"] = inline(figure, "Precision and recall over the severity of the regions")
    if times:
        seconds = {wording.stage_name(time.stage): (time.mean, time.median) for time in times}
        parts = frozenset(wording.stage_name(time.stage) for time in times if time.part)
        drawn["time_bars"] = inline(charts.stage_bars(seconds, parts), "Seconds per image by stage")
    return drawn
