"""Put the report together: one HTML file that asks for nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from markupsafe import Markup

from desra_core.errors import ImageError, UsageError
from desra_core.files.atomic import check_names, replace_file
from desra_core.images.scanning import kinds_in_words
from desra_core.report import charts, plots, wording
from desra_core.report.distribution import Distributions, class_distributions
from desra_core.report.document import render_page
from desra_core.report.finetuning import Finetuning, read_finetuning
from desra_core.report.gallery import KINDS, PER_IMAGE, make_gallery
from desra_core.report.human import SeverityCurve, severity_curve
from desra_core.report.image_page import Page, choose_pages, render_pages
from desra_core.report.measure import Measure, measure_of
from desra_core.report.results import Results, read_results
from desra_core.report.summary import (
    ClassCount,
    StageTime,
    Summary,
    class_counts,
    masked_shares,
    numbers,
    stage_times,
    summarize,
)
from desra_core.workspace import Workspace

WORST = 24
MOST = 500
# Of the page's 20 MB; what is not a picture has fixed numbers of rows of limited length, 2 MB at the very most.
PICTURE_CHARACTERS = 17_000_000

_FAILURES, _FAILURES_AT_ONCE = 200, 10
_CLASSES_AT_ONCE = 15
_SUFFIXES = (".html", ".htm")


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

    Parameters
    ----------
    workspace
        Of any run, a cut off one too. Nothing in it changes but the report.
    worst
        Number of regions to show, the most severe ones first, `MOST` at most. What would make the page too large
        is left out, and the page says so.
    pages
        Number of images to write a page of their own about, to ``pages/NAME.html`` beside the report, which links to
        them; those with the most severe regions.
    output
        The HTML file; ``report.html`` in the workspace by default.
    on_left_out
        Called with the reason for each page of an image that cannot be written, because its name is too long.

    Returns
    -------
    The file.

    Raises
    ------
    UsageError
        The folder is no workspace, a table of it is damaged, or ``output`` is no HTML file.
    TransientError
        The disk is full or failed.
    """
    path = workspace.root / "report.html" if output is None else output.absolute()
    if path.suffix.lower() not in _SUFFIXES or path.is_dir():
        raise UsageError(path, "is no HTML file", "name one with the suffix .html")
    results = read_results(workspace)
    chosen = []
    for page in choose_pages(results, min(pages, MOST)):
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


def _content(results: Results, worst: int, pages: list[Page]) -> dict[str, Any]:
    summary = summarize(results)
    times = stage_times(results.seconds)
    settings, measure = results.settings, measure_of(results.settings)
    classes = class_counts(results.regions)
    distribution, people = class_distributions(results, measure), severity_curve(results)
    finetuning, damage = _finetuning(results)
    pictures = PICTURE_CHARACTERS - (finetuning.characters if finetuning else 0)
    return {
        "workspace": results.workspace.root.absolute(),
        "verb": results.verb,
        "changed": wording.moment(results.changed),
        "sources": {wording.ROLES.get(role, role): folder for role, folder in results.sources.items()},
        "summary": summary,
        "notes": _notes(results, summary) + damage,
        "finetuning": finetuning,
        "weighted": settings.get("segmenter", "none") != "none" and settings.get("weights") != "none",
        "measure": measure,
        "classes": classes,
        "class_chart": _class_chart(classes),
        "distribution": distribution,
        "distribution_chart": _distribution_chart(distribution, measure) if distribution else "",
        "people": people,
        "people_chart": _people_chart(people) if people and people.points else "",
        "classes_at_once": _CLASSES_AT_ONCE,
        "labelled": results.regions["class_name"].null_count < results.regions.num_rows,
        "plots": _plots(results, measure),
        "gallery": make_gallery(results, worst, pictures),
        "worst": worst,
        "pages": pages,
        "links": {page.id: page.link for page in pages},
        "kinds": KINDS | {"difference": measure.picture},
        "per_image": PER_IMAGE,
        "failures": results.failures.slice(0, _FAILURES).to_pylist(),
        "failures_at_once": _FAILURES_AT_ONCE,
        "times": times,
        "time_bars": plots.stage_bars(times) if times else "",
        "total_rate": _total_rate(times),
        "settings": wording.settings_rows(settings),
        "versions": results.document.get("versions") or {},
        "keys": results.document.get("target") or {},
    }


def _finetuning(results: Results) -> tuple[Finetuning | None, list[str]]:
    """What became of the latest finetune, and a note where that cannot be read."""
    try:
        mask_key = (results.document.get("target") or {}).get("mask_key")
        return read_finetuning(results.workspace, mask_key), []
    except UsageError as error:
        return None, [wording.shortened(f"The verdict on finetuned models is left out: {error}.", 480)]


def _notes(results: Results, summary: Summary) -> list[str]:
    """What a reader has to know to judge the numbers."""
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


def _plots(results: Results, measure: Measure) -> list[Markup]:
    regions = results.regions
    if regions.num_rows == 0:
        return []
    drawn = [
        plots.severity_histogram(numbers(regions["severity"])),
        plots.area_histogram(numbers(regions["area"])),
        plots.similarity_histogram(measure.value(numbers(regions["mean_similarity"])), measure),
    ]
    shares = masked_shares(results)
    return [*drawn, plots.share_histogram(shares)] if shares.size else drawn


def _class_chart(classes: list[ClassCount]) -> Markup:
    shown = {count.name or "no label": float(count.regions) for count in classes[:_CLASSES_AT_ONCE]}
    return plots.inline(charts.bar_chart(shown, xlabel="artifact regions"), "Artifact regions by class")


def _distribution_chart(found: Distributions, measure: Measure) -> Markup:
    xlabel = measure.picture if measure.is_score else "D"
    figure = charts.distributions(found.histograms, edges=found.edges, xlabel=xlabel, marks=found.marks)
    return plots.inline(figure, f"Distribution of {xlabel} by class")


def _people_chart(people: SeverityCurve) -> Markup:
    figure = charts.line_chart({"regions by severity": people.points}, xlabel="recall", ylabel="precision",
                               marks={"all regions": people.points[-1]})  # fmt: skip
    figure.axes[0].set(xlim=(0, 1.02), ylim=(0, 1.02))
    return plots.inline(figure, "Precision and recall over the severity of the regions")


def _total_rate(times: list[StageTime]) -> float | None:
    """Images per second of one worker that runs all stages."""
    seconds = sum(time.total for time in times if not time.part)
    images = max((time.images for time in times), default=0)
    return images / seconds if seconds > 0 else None
