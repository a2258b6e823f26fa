"""Put the report together: one HTML file that asks for nothing else."""

from __future__ import annotations

import base64
import hashlib
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import matplotlib.colors
from markupsafe import Markup

from desra_core import __version__
from desra_core.atomic import replace_file
from desra_core.errors import UsageError
from desra_core.report import plots, wording
from desra_core.report.crops import HEAT, OUTLINE
from desra_core.report.finetuning import Finetuning, read_finetuning
from desra_core.report.gallery import KINDS, PER_IMAGE, make_gallery
from desra_core.report.results import Results, read_results
from desra_core.report.summary import (
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


def write_report(workspace: Workspace, *, worst: int = WORST, output: Path | None = None) -> Path:
    """Write the report of a workspace: a page below 20 MB that needs no other file and no network.

    Two reports of the same results are the same bytes.

    Parameters
    ----------
    workspace
        Of any run, a cut off one too. Nothing in it changes but the report.
    worst
        Number of regions to show, the most severe ones first, `MOST` at most. What would make the page too large
        is left out, and the page says so.
    output
        The HTML file; ``report.html`` in the workspace by default.

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
    page = render(read_results(workspace), min(worst, MOST)).encode()
    if path.resolve().is_relative_to(workspace.root.resolve()):
        workspace.publish(path, page)
    else:
        replace_file(path, lambda file: file.write(page))
    return path


def render(results: Results, worst: int) -> str:
    """The page as text."""
    folder = resources.files("desra_core.report")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (folder / name).read_text("utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    words = (wording.count, wording.percent, wording.decimal, wording.duration, wording.shortened, wording.stage_name,
             wording.short_path)  # fmt: skip
    environment.filters |= {function.__name__: function for function in words} | {"csp_hash": _csp_hash}
    return environment.get_template("report.html.j2").render(_content(results, worst))


def _content(results: Results, worst: int) -> dict[str, Any]:
    summary = summarize(results)
    times = stage_times(results.seconds)
    settings = results.settings
    finetuning, damage = _finetuning(results)
    pictures = PICTURE_CHARACTERS - (finetuning.characters if finetuning else 0)
    return {
        "workspace": results.workspace.root.absolute(),
        "verb": results.verb,
        "version": __version__,
        "changed": wording.moment(results.changed),
        "sources": {wording.ROLES.get(role, role): folder for role, folder in results.sources.items()},
        "summary": summary,
        "notes": _notes(results, summary) + damage,
        "finetuning": finetuning,
        "weighted": settings.get("segmenter", "none") != "none" and settings.get("weights") != "none",
        "threshold": settings.get("threshold"),
        "classes": class_counts(results.regions),
        "classes_at_once": _CLASSES_AT_ONCE,
        "labelled": results.regions["class_name"].null_count < results.regions.num_rows,
        "plots": _plots(results),
        "gallery": make_gallery(results, worst, pictures),
        "kinds": KINDS,
        "per_image": PER_IMAGE,
        "heat": ", ".join(_heat_colours()),
        "outline": "#" + bytes(OUTLINE).hex(),
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
    return notes


def _plots(results: Results) -> list[Markup]:
    regions = results.regions
    if regions.num_rows == 0:
        return []
    drawn = [
        plots.severity_histogram(numbers(regions["severity"])),
        plots.area_histogram(numbers(regions["area"])),
        plots.similarity_histogram(numbers(regions["mean_similarity"])),
    ]
    shares = masked_shares(results)
    return [*drawn, plots.share_histogram(shares)] if shares.size else drawn


def _total_rate(times: list[StageTime]) -> float | None:
    """Images per second of one worker that runs all stages."""
    seconds = sum(time.total for time in times if not time.part)
    images = max((time.images for time in times), default=0)
    return images / seconds if seconds > 0 else None


def _heat_colours() -> list[str]:
    return [matplotlib.colors.to_hex(matplotlib.colormaps[HEAT](step / 12)) for step in range(13)]


def _csp_hash(script: str) -> str:
    """How a content security policy names an inline script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
