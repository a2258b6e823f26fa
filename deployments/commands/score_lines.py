"""What ``desra evaluate`` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import typer

from desra_core.detection.class_weights import class_names
from desra_core.errors import printable
from desra_core.evaluation.bootstrap import Interval
from desra_core.evaluation.evaluation import Evaluation
from desra_core.evaluation.mask_scores import MaskScores
from desra_core.evaluation.metrics import Agreement
from desra_core.evaluation.table import as_text, counted, fixed
from desra_core.workspace.human_masks import resting_in_words
from tasks.logs import SHOWN_FAILURES, say

_SHOWN_CLASSES = 8
_NAMES = {"iou": "IoU", "precision": "precision", "recall": "recall", "f1": "F1"}


def tell_evaluation(evaluation: Evaluation) -> None:
    """Print what was found: the scores, and on standard error what does not fit together and what to beware of."""
    _tell_troubles(evaluation)
    scores = evaluation.scores
    failed = f", {len(evaluation.failures)} failed" if evaluation.failures else ""
    typer.echo(f"{counted(scores.images, 'image')} judged{failed}")
    _tell_scores(scores)
    if scores.empty_pairs:
        value = _told(scores.iou_with_empty, scores.intervals["iou_with_empty"]).strip()
        where = "in mask and ground truth, left out of this IoU"
        typer.echo(f"{counted(scores.empty_pairs, 'image')} with nothing {where}; as agreement they make it {value}")
    if evaluation.prominent and evaluation.severity:
        least = 100 * evaluation.severity.least_noticed
        typer.echo(f"prominent regions, noticed by at least {least:g} % of the viewers; the others do not count")
        _tell_scores(evaluation.prominent)
    if evaluation.classes:
        _tell_classes(evaluation.classes)
    if evaluation.pairing.by_people is not None:
        typer.echo(f"people   {resting_in_words(evaluation.pairing.by_people)}")


def _tell_scores(scores: MaskScores) -> None:
    total = scores.total
    meaning = {
        "iou": f"mean over {counted(scores.images - scores.empty_pairs, 'image')}",
        "precision": f"{total.right} of {counted(total.detected, 'detected region')} right",
        "recall": f"{total.found} of {counted(total.marked, 'ground-truth region')} found",
        "f1": "of precision and recall",
    }
    for measure, name in _NAMES.items():
        if reason := scores.undefined.get(measure):
            typer.echo(f"  {name:9}  undefined: {reason}")
        else:
            told = _told(scores.values[measure], scores.intervals[measure])
            typer.echo(f"  {name:9}  {told}  {meaning[measure]}")


def _tell_classes(classes: Mapping[int, Agreement]) -> None:
    """The classes with the most regions."""
    names = class_names()
    largest = sorted(classes.items(), key=lambda row: (-row[1].detected - row[1].marked, row[0]))
    rows = [
        {
            "class": names[index],
            "IoU": fixed(agreement.iou, 4),
            "precision": _share(agreement.precision, agreement.right, agreement.detected),
            "recall": _share(agreement.recall, agreement.found, agreement.marked),
        }
        for index, agreement in largest[:_SHOWN_CLASSES]
    ]
    typer.echo(as_text(rows))
    if len(classes) > len(rows):
        typer.echo(f"and {counted(len(classes) - len(rows), 'more class', 'more classes')}")


def _tell_troubles(evaluation: Evaluation) -> None:
    pairing, files = evaluation.pairing, len(evaluation.lossy)
    _list("failed", [str(error) for error in evaluation.failures])
    _list("missing", [f"{path}: has no ground truth" for path in pairing.without_ground_truth.values()])
    _list("missing", [f"{path}: has no mask" for path in pairing.without_mask.values()])
    if pairing.not_looked_at:
        say(f"{counted(pairing.not_looked_at, 'image')} that nobody has looked at: not judged")
    if pairing.outdated:
        drawn = "drawn on another photo or on another model's result"
        say(f"warning: {counted(pairing.outdated, 'mask')} by people left out: {drawn}")
    if files:
        are = "is" if files == 1 else "are"
        say(f"warning: {counted(files, 'mask')} {are} JPEG or lossy WebP, thresholded at half: save masks as PNG")
    if evaluation.sizes is not None:
        taken = {"image": "for the image's, and 5 px a side are cropped", "valid": "for the valid region's"}
        say(f"the size of masks as large as their ground truth is taken {taken[evaluation.sizes]} (--size)")
    if evaluation.classes is not None and evaluation.unlabelled:
        are = "is" if evaluation.unlabelled == 1 else "are"
        say(f"warning: {counted(evaluation.unlabelled, 'image')} without class labels {are} left out by class")


def _list(kind: str, lines: Sequence[str]) -> None:
    for line in lines[:SHOWN_FAILURES]:
        say(f"{kind}: {printable(line)}")
    if len(lines) > SHOWN_FAILURES:
        say(f"and {len(lines) - SHOWN_FAILURES} more: --json lists them all")


def _told(value: float | None, interval: Interval | None) -> str:
    bounds = f"({interval[0]:.3f}–{interval[1]:.3f})" if interval else ""
    return f"{fixed(value, 4)}  {bounds:13}"


def _share(value: float | None, part: int, whole: int) -> str:
    return "–" if value is None else f"{value:.3f} ({part} of {whole})"
