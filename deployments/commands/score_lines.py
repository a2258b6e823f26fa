"""The lines that ``desra evaluate`` prints."""

from __future__ import annotations

from collections.abc import Mapping

import typer

from deployments.commands.runs import show_people
from desra_core.detection.class_weights import class_names
from desra_core.evaluation.evaluation import Evaluation
from desra_core.evaluation.metrics import Agreement, Interval, MaskScores
from desra_core.evaluation.table import as_text, counted, fixed
from tasks.logs import say, say_each

_SHOWN_CLASSES = 8
_NAMES = {"iou": "IoU", "precision": "precision", "recall": "recall", "f1": "F1"}


def show_evaluation(evaluation: Evaluation) -> None:
    """Print the scores, and on standard error which files do not fit together and what to beware of."""
    _warn(evaluation)
    scores = evaluation.scores
    failed = f", {len(evaluation.failures)} failed" if evaluation.failures else ""
    typer.echo(f"{counted(scores.images, 'image')} judged{failed}")
    _show_scores(scores)
    if scores.empty_pairs:
        value = _with_interval(scores.values["iou_with_empty"], scores.intervals["iou_with_empty"]).strip()
        where = "in mask and ground truth, left out of this IoU"
        typer.echo(f"{counted(scores.empty_pairs, 'image')} with nothing {where}; as agreement they make it {value}")
    if evaluation.prominent and evaluation.severity:
        least = 100 * evaluation.severity.least_noticed
        typer.echo(f"prominent regions, noticed by at least {least:g} % of the viewers; the others do not count")
        _show_scores(evaluation.prominent)
    if evaluation.classes:
        _show_classes(evaluation.classes)
    show_people(evaluation.pairing.by_people or 0)


def _show_scores(scores: MaskScores) -> None:
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
            value = _with_interval(scores.values[measure], scores.intervals[measure])
            typer.echo(f"  {name:9}  {value}  {meaning[measure]}")


def _show_classes(classes: Mapping[int, Agreement]) -> None:
    """Print the classes with the most regions."""
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


def _warn(evaluation: Evaluation) -> None:
    pairing, files = evaluation.pairing, len(evaluation.lossy)
    without_gt = [f"{path}: has no ground truth" for path in pairing.without_ground_truth.values()]
    without_mask = [f"{path}: has no mask" for path in pairing.without_mask.values()]
    for kind, lines in (("failed", evaluation.failures), ("missing", without_gt), ("missing", without_mask)):
        say_each(kind, lines, ": --json lists them all")
    if pairing.not_looked_at:
        say(f"{counted(pairing.not_looked_at, 'image')} without a mask by a person: not judged")
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


def _with_interval(value: float | None, interval: Interval | None) -> str:
    bounds = f"({interval[0]:.3f}–{interval[1]:.3f})" if interval else ""
    return f"{fixed(value, 4)}  {bounds:13}"


def _share(value: float | None, part: int, whole: int) -> str:
    return "–" if value is None else f"{value:.3f} ({part} of {whole})"
