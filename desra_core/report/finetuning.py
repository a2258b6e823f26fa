"""What the gate found of the latest finetune, and how that was trained: a section of the report."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import ClassVar, NamedTuple

from markupsafe import Markup

from desra_core.errors import UsageError
from desra_core.gate.criteria import Score, Verdict
from desra_core.gate.model_registry import Event, current_model, history
from desra_core.gate.verdict import FinetuneRecord, VerdictDocument, read_verdict, score_rows
from desra_core.report import plots, wording
from desra_core.report.cards import KINDS, Card, make_card
from desra_core.workspace import Workspace

# A line for each of `desra_core.gate.verdict.COLUMNS`.
COLUMNS = {
    "candidate": "iterations and kind of weights; the control is the old model's result with noise that nobody sees",
    "regions gone": "of the artifact regions before, those of which less than half is left",
    "removal": "their share, and its 95 % interval",
    "images with added": "images with a region that was not there before; no more of them than in the control pass",
    "artifact area": "artifact pixels after, of those before",
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
_ROWS, _CARDS, _EVENTS = 200, 8, 10


class Tile(NamedTuple):
    """A number of the best candidate; ``missed`` where the gate asks for another one."""

    value: str
    meaning: str
    missed: bool


class Row(NamedTuple):
    """A row of the score table; ``role`` is best, control or candidate."""

    role: str
    cells: dict[str, str]


class Entry(NamedTuple):
    """An event in the history of the workspace's model."""

    number: str
    what: str
    when: str
    key: str


@dataclass(frozen=True)
class Finetuning:
    """The content of the section.

    Attributes
    ----------
    judged
        When.
    notes
        What a reader has to know to judge the rest.
    best
        The best candidate; None where there are none.
    columns
        Those of the score table, explained.
    current
        Which of the two models is the workspace's current one.
    """

    kinds: ClassVar[dict[str, str]] = KINDS

    document: VerdictDocument
    judged: str
    notes: list[str]
    best: Score | None
    tiles: list[Tile]
    columns: dict[str, str]
    rows: list[Row]
    cards: list[Card]
    plots: list[Markup]
    training: list[wording.Setting]
    current: str
    history: list[Entry]

    @property
    def characters(self) -> int:
        """What the pictures take in the page."""
        return sum(len(cell.uri or "") for card in self.cards for cell in card.cells)


def read_finetuning(workspace: Workspace, mask_key: object) -> Finetuning | None:
    """Read the latest verdict and what belongs to it; None where there is none.

    Parameters
    ----------
    workspace
        Nothing in it changes.
    mask_key
        Of the settings of the latest run, to tell a verdict under other ones.

    Raises
    ------
    UsageError
        The verdict is damaged.
    """
    read = read_verdict(workspace)
    if read is None:
        return None
    document, judged = read
    best, rows = document.best_score, _rows(document.verdict)
    past, notes = _history(workspace)
    if mask_key is not None and document.mask_key != mask_key:
        notes.insert(0, "The latest run had other settings, or another model, than this verdict rests on.")
    return Finetuning(
        document=document,
        judged=wording.moment(judged),
        notes=notes,
        best=best,
        tiles=_tiles(document.verdict, best) if best else [],
        columns={name: COLUMNS[name] for name in rows[0].cells},
        rows=rows,
        cards=[make_card(workspace.gate, picture) for picture in document.pictures[:_CARDS]],
        plots=_plots(document),
        training=_training(document.finetune) if document.finetune else [],
        current=_current(past, document),
        history=[_entry(event) for event in (past or [])[: -_EVENTS - 1 : -1]],
    )


def _tiles(verdict: Verdict, best: Score) -> list[Tile]:
    asked, noise = verdict.thresholds, verdict.control.images_added
    left = best.area_after / best.area_before if best.area_before else None
    lost = best.detail_loss
    sharper = lost is not None and lost < 0
    return [
        Tile(
            wording.percent(best.removal),
            f"of {wording.count(best.regions)} artifact regions are gone",
            best.removal is None or best.removal < asked["min_removal"],
        ),
        Tile(
            f"{wording.count(best.images_added)} of {wording.count(best.images)}",
            f"images gained a region; by noise alone {wording.count(noise)}",
            best.images_added > noise,
        ),
        Tile(wording.percent(left), "of the artifact area is left", False),
        Tile(
            wording.percent(None if lost is None else abs(lost)),
            f"of the sharpness of clean images {'gained' if sharper else 'lost'}",
            lost is None or lost > asked["max_detail_loss"],
        ),
    ]


def _rows(verdict: Verdict) -> list[Row]:
    """The score table, the control last; of very many candidates the last ones and the best."""
    rows = [{name: cell.replace("-", "−") if name == "detail lost" else cell for name, cell in row.items()}
            for row in score_rows(verdict)]  # fmt: skip
    roles = ["best" if score.candidate == verdict.best else "candidate" for score in verdict.scores]
    told = [Row(role, cells) for role, cells in zip([*roles, "control"], rows, strict=True)]
    return [row for row in told[:-_ROWS] if row.role == "best"] + told[-_ROWS:]


def _training(finetune: FinetuneRecord) -> list[wording.Setting]:
    """The settings of the finetune, with the number format that it was computed in, whatever had been asked for."""
    settled = {"amp": finetune.precision} if finetune.precision else {}
    return wording.settings_rows(finetune.training | settled)


def _plots(document: VerdictDocument) -> list[Markup]:
    """The curves of the losses that were logged, with a line where the best candidate was saved."""
    saved = re.search(r"iteration_(\d+)", Path(document.best.path).name) if document.best else None
    drawn = []
    for title, names in LOSSES:
        curves = {
            label: [(row["iteration"], row[name]) for row in document.losses if {"iteration", name} <= row.keys()]
            for name, label in names.items()
        }
        drawn.append(plots.loss_curves(title, curves, best=int(saved[1]) if saved else None))
    return [plot for plot in drawn if plot]


def _history(workspace: Workspace) -> tuple[list[Event] | None, list[str]]:
    """The events so far, oldest first, None where they cannot be read; and what is wrong with the current model."""
    past: list[Event] | None = None
    try:
        past = history(workspace)
        current_model(workspace)
    except UsageError as error:
        return past, [wording.shortened(error, 480)]
    return past, []


def _current(past: list[Event] | None, document: VerdictDocument) -> str:
    """Which model is current, told by the two that were compared."""
    if past is None:
        return "unknown"
    if not past:
        return "the old one: none was promoted yet"
    model = past[-1]
    if document.best and Path(str(model.get("source"))).name == Path(document.best.file).name:
        return "the finetuned one"
    return "the old one" if model["model"] == document.before.key else "another one than these two"


def _entry(event: Event) -> Entry:
    kinds = {"origin": "where the first finetune started", "promotion": "promoted"}
    what = f"rolled back to {event.get('restores')}" if event["kind"] == "rollback" else event["kind"]
    try:
        when = wording.moment(datetime.fromisoformat(str(event.get("time"))))
    except (ValueError, OverflowError):
        when = "unknown"
    return Entry(str(event["number"]), kinds.get(str(what), str(what)), when, str(event["model"]))
