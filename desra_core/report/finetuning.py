"""Show the gate's latest verdict on a finetune, as a section of the report and as Markdown for the Prefect UI."""

import base64
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from desra_core.errors import ImageError, UsageError, printable
from desra_core.evaluation.table import as_markdown, counted
from desra_core.files import read_bytes
from desra_core.gate.criteria import PicturedRegion, Verdict, VerdictDocument, read_verdict, score_rows
from desra_core.gate.model_registry import Event, current_model, history
from desra_core.images.codec import decode
from desra_core.report.charts import inline, line_chart, thinned
from desra_core.report.document import Cell, as_uri, characters, count, percent, settings_rows, shortened
from desra_core.workspace import Workspace

# A description of each column of `desra_core.gate.criteria.score_rows`.
COLUMNS = {
    "candidate": "iterations and kind of weights; the control is the old model's result with imperceptible noise",
    "judged on": "how many images judged it; a candidate that cannot be the best by a part of them is dropped",
    "regions gone": "of the artifact regions before, those of which less than half is left",
    "removal": "their share, and its 95 % interval",
    "images with added": "images with a region that was not there before; to pass, no more than the control has",
    "artifact area": "artifact pixels after, of those before",
    "IoU with people": "of people's masks with the masks before and after, in percent, and the difference in points",
    "PSNR": "to the old model's results outside of the masks, where nothing should change",
    "SSIM": "structural similarity to them, 1 where nothing changed",
    "GMS": "gradient similarity to them, 1 where nothing changed",
    "LPIPS": "perceptual distance to them in the whole images, 0 where nothing changed",
    "detail lost": "sharpness that clean images lost, below 0 where they became sharper",
}
LOSSES = (
    ("pixel loss", {"pixel": "all pixels", "keep": "outside of the masks"}),
    ("perceptual loss", {"perceptual": "perceptual"}),
    ("GAN losses", {"gan": "generator", "discriminator_real": "real", "discriminator_fake": "fake"}),
)
# The crops of a card, in the order in which the viewer goes through them.
KINDS = {"before": "before", "after": "after", "lr": "LR", "mse_sr": "MSE-SR"}

_ROWS, _CARDS = 200, 8
# A larger file is no crop of the gate: those have at most 128 kB, even of noise.
_LARGEST_FILE, _MAX_PIXELS = 150_000, 2**20
# Each picture in Markdown is some 20 kB, which the server's database keeps.
_MARKDOWN_CARDS = 3


def read_finetuning(workspace: Workspace, mask_key: object) -> dict[str, Any] | None:
    """Read the latest verdict as the variables of ``report_finetuning.html.j2``; None where there is no verdict.

    Args:
        workspace: The workspace.
        mask_key: The mask key of the latest run; a verdict under another key gets a note.

    Raises:
        UsageError: The verdict is damaged.
    """
    read = read_verdict(workspace)
    if read is None:
        return None
    document, judged = read
    verdict, cards = document.verdict, _cards(workspace, document, _CARDS)
    cells = [{name: cell.replace("-", "−") if name == "detail lost" else cell for name, cell in row.items()}
             for row in score_rows(verdict)]  # fmt: skip
    roles = [
        "best" if name == verdict.best else "dropped" if name in verdict.dropped else "candidate"
        for name in (score.candidate for score in verdict.scores)
    ]
    scored = list(zip([*roles, "control"], cells, strict=True))
    # The control is last; of many candidates only the best and the latest are shown.
    rows = [row for row in scored[:-_ROWS] if row[0] == "best"] + scored[-_ROWS:]
    past: list[Event] | None = None
    notes = []
    try:
        past = history(workspace)
        current_model(workspace)
    except UsageError as error:
        notes.append(shortened(error, 480))
    if mask_key is not None and document.mask_key != mask_key:
        notes.insert(0, "The latest run had other settings, or another model, than this verdict rests on.")
    training = document.finetune.training if document.finetune else {}
    if document.finetune and document.finetune.precision:
        # The precision that was used, which may differ from the setting.
        training = training | {"amp": document.finetune.precision}
    saved = re.search(r"iteration_(\d+)", Path(document.best.path).name) if document.best else None
    best = int(saved[1]) if saved else None
    plots = []
    for title, names in LOSSES:
        if figure := _loss_chart(document, title, names, best):
            plots.append(inline(figure, f"The {title} by iteration"))
    return {
        "document": document,
        "judged": judged,
        "notes": notes,
        "tiles": _tiles(verdict),
        "columns": {name: COLUMNS[name] for name in rows[0][1]},
        "rows": rows,
        "cards": cards,
        "kinds": KINDS,
        "characters": sum(characters(cells) for _, cells in cards),  # characters of the page that the pictures take
        "plots": plots,
        "training": settings_rows(training),
        "current": _current(past, document),
    }


def _tiles(verdict: Verdict) -> list[tuple[str, str, bool]]:
    """Write numbers of the best candidate: value, meaning, and whether it falls short of a limit of the gate."""
    best = next((score for score in verdict.scores if score.candidate == verdict.best), None)
    if best is None:
        return []
    asked, noise, lost = verdict.thresholds, verdict.control.images_added, best.detail_loss
    removed = f"of {counted(best.regions, 'artifact region is', 'artifact regions are')} gone"
    added = f"{count(best.images_added)} of {count(best.images)}"
    left = best.area_after / best.area_before if best.area_before else None
    change = "gained" if lost is not None and lost < 0 else "lost"
    sharpness = percent(None if lost is None else abs(lost))
    return [
        (percent(best.removal), removed, best.removal is None or best.removal < asked["min_removal"]),
        (added, f"images gained a region; by noise alone {count(noise)}", best.images_added > noise),
        (percent(left), "of the artifact area is left", False),
        (sharpness, f"of the sharpness of clean images {change}", lost is None or lost > asked["max_detail_loss"]),
    ]


def _cards(workspace: Workspace, document: VerdictDocument, most: int) -> list[tuple[PicturedRegion, list[Cell]]]:
    """Read the crops of the first regions."""
    return [
        (picture, [_crop(workspace.gate, kind, picture.crops.get(kind)) for kind in KINDS])
        for picture in document.pictures[:most]
    ]


def _crop(gate: Path, kind: str, crop: str | None) -> Cell:
    """Read a published crop below the gate's folder; a cell without a picture has the reason."""
    if crop is None:
        return Cell(kind, None, reason="None was made.")
    # Others may have changed the file with this path, and the page must show no file outside the gate's folder.
    if Path(crop).is_absolute() or ".." in Path(crop).parts or "\0" in crop:
        return Cell(kind, None, reason="It lies elsewhere.")
    try:
        data = read_bytes(gate / crop)
        height, width = decode(data, gate / crop, max_pixels=_MAX_PIXELS).pixels.shape[:2]
    except ImageError as error:
        return Cell(kind, None, reason=printable(error.reason))
    if len(data) > _LARGEST_FILE or data[8:12] != b"WEBP":
        return Cell(kind, None, reason="It has been changed.")
    return Cell(kind, as_uri(data), width, height)


def _loss_chart(
    document: VerdictDocument, title: str, names: Mapping[str, str], best: int | None = None
) -> Figure | None:
    """Draw losses by iteration; on the first, the iteration ``best`` is marked. None without any loss."""
    curves = {label: points for name, label in names.items() if len(points := thinned(_points(document, name)))}
    if not curves:
        return None
    first = next(iter(curves.values()))
    marks = {"best": (best, np.interp(best, *first.T))} if best is not None and best <= first[-1, 0] else {}
    return line_chart(curves, xlabel="iteration", ylabel=title, marks=marks)


def _points(document: VerdictDocument, loss: str) -> list[tuple[float, float]]:
    return [(row["iteration"], row[loss]) for row in document.losses if {"iteration", loss} <= row.keys()]


def _current(past: list[Event] | None, document: VerdictDocument) -> str:
    """Name the workspace's current model: the old or the new one of the comparison, or another."""
    if past is None:
        return "unknown"
    if not past:
        return "the old one: none was promoted yet"
    current = past[-1]["model"]
    # The verdict knows the new model by its file, the history by its key. The promotion of a model names both.
    promotions = [event for event in past if event["kind"] == "promotion" and event["model"] == current]
    files = [Path(str(event.get("source"))).name for event in promotions]
    name = "the old one" if current == document.before.key else "neither of these two"
    if document.best and Path(document.best.file).name in files:
        name = "the finetuned one"
    return f"{name}, entry {past[-1]['number']} of its history"


def verdict_markdown(workspace: Workspace) -> str:
    """Write the latest verdict of a workspace in Markdown: outcome, scores, some regions before and after, pixel loss.

    Raises:
        UsageError: The verdict is damaged.
    """
    read = read_verdict(workspace)
    if read is None:
        return "There is no verdict yet.\n"
    document, verdict = read[0], read[0].verdict
    refused = f"**{verdict.outcome.capitalize()}.** " + " ".join(verdict.reasons)
    parts = [f"**{verdict.best} passes.**" if verdict.passed else refused, as_markdown(score_rows(verdict))]
    rows = []
    for picture, crops in _cards(workspace, document, _MARKDOWN_CARDS):
        cells = {cell.kind: f"![{cell.kind}]({cell.uri})" if cell.uri else cell.reason for cell in crops}
        fate = "gone" if picture.region.gone else "still there"
        rows.append({"region of": f"{picture.image}, {fate}", "before": cells["before"], "after": cells["after"]})
    if rows:
        parts.append(as_markdown(rows))
    if figure := _loss_chart(document, "pixel loss", {"pixel": "all pixels"}):
        sink = io.BytesIO()
        figure.savefig(sink, format="png")  # an SVG of `inline` shows inside a page only
        parts.append(f"![pixel loss](data:image/png;base64,{base64.b64encode(sink.getvalue()).decode()})")
    return "\n\n".join(parts) + "\n"
