"""``desra evaluate``: compare masks with human masks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import typer

from deployments.commands.runs import show_people
from desra_core.detection.class_weights import class_names
from desra_core.errors import UsageError
from desra_core.evaluation import evaluation as evaluations
from desra_core.evaluation.evaluation import Evaluation, SeverityLabels, evaluate_masks, has_ratings, read_ratings
from desra_core.evaluation.mask_files import pair_folders, pair_workspace
from desra_core.evaluation.metrics import Agreement, Interval, MaskScores
from desra_core.evaluation.table import as_text, counted, fixed
from desra_core.workspace import Workspace
from tasks.logs import NowAndThen, say, say_each

_SHOWN_CLASSES = 8
_NAMES = {"iou": "IoU", "precision": "precision", "recall": "recall", "f1": "F1"}


def evaluate(
    masks: Annotated[Path | None, typer.Option(help="Folder of the masks to judge.")] = None,
    gt: Annotated[
        Path | None, typer.Option(help="Folder of the ground truth, masks with the same paths, suffix aside.")
    ] = None,
    workspace: Annotated[
        Path | None, typer.Option(help="Judge this workspace's masks by its human masks, which win over --gt.")
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="Folder of class-index PNGs, for the scores by class.")] = None,
    gan_sr: Annotated[Path | None, typer.Option(help="Folder of the GAN results, for the pictures.")] = None,
    severity: Annotated[
        Path | None,
        typer.Option(help="CSV with the share of viewers who noticed each ground-truth region: image,region,noticed."),
    ] = None,
    prominent: Annotated[
        float, typer.Option(min=0, max=1, help="A region noticed by at least this share of viewers is prominent.")
    ] = 0.5,
    size: Annotated[
        Literal["auto", "image", "valid"],
        typer.Option(
            help="How to take masks that are as large as their ground truth. image: they have the image's size; valid: "
            "the size of the image without its 5 px frame; auto: image, unless a mask marks something in the frame."
        ),
    ] = "auto",
    json: Annotated[Path | None, typer.Option(help="File to write all numbers to.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for tables (CSV), numbers (JSON) and a page.")] = None,
) -> None:
    """Measure how well masks agree with a ground truth: IoU, precision and recall as published, and F1.

    On the valid region of each image (without the 5 px frame). IoU is the mean over images; a detected region is right,
    and a ground-truth region is found, when at least half of it lies in the other's mask. Exit code 1 where some files
    cannot be judged.
    """
    _check_targets(json, output, rated=severity is not None)
    if workspace is not None and masks is not None:
        raise UsageError("--workspace", "and --masks are both given", "leave one out")
    if workspace is not None:
        pairing = pair_workspace(Workspace(workspace.absolute()), gt=gt, labels=labels, gan_sr=gan_sr)
    elif masks is not None and gt is not None:
        pairing = pair_folders(masks, gt, labels=labels, gan_sr=gan_sr)
    else:
        lacking = "--masks" if masks is None else "--gt"
        raise UsageError(lacking, "is not given", "give --masks and --gt, or --workspace")
    rated = None if severity is None else SeverityLabels(read_ratings(severity), severity, prominent)
    evaluation = evaluate_masks(pairing, sizes=size, severity=rated, on_judged=NowAndThen("judged {:,} of {:,}"))
    _show(evaluation)
    if json is not None:
        evaluations.write_json(evaluation, json)
        typer.echo(f"numbers  {json}")
    if output is not None:
        from desra_core.report.pages import write_evaluation_page

        evaluations.write_json(evaluation, output / "evaluation.json")
        evaluations.write_tables(evaluation, output)
        page = write_evaluation_page(evaluation, output / "evaluation.html")
        typer.echo(f"tables   {output}\npage     {page}")
    raise typer.Exit(int(bool(evaluation.failures)))


def _check_targets(json: Path | None, output: Path | None, *, rated: bool) -> None:
    """Check, before reading anything, that results can be written and will not overwrite ratings that a person gave."""
    if json is not None and json.exists() and (json.suffix.lower() != ".json" or json.is_dir()):
        raise UsageError(json, "exists and is no JSON file", "name another file for --json")
    if output is not None and output.exists() and not output.is_dir():
        raise UsageError(output, "is no folder", "name a folder for --output")
    if output is not None and not rated and has_ratings(output / "regions.csv"):
        reason = "holds shares of viewers that a person filled in, and would be written anew without them"
        raise UsageError(output / "regions.csv", reason, "give it with --severity, or name another --output")


def _show(evaluation: Evaluation) -> None:
    """Print the scores, and on stderr warnings and the files that do not fit together."""
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
    pairing = evaluation.pairing
    without_gt = [f"{path}: has no ground truth" for path in pairing.without_ground_truth.values()]
    without_mask = [f"{path}: has no mask" for path in pairing.without_mask.values()]
    for kind, lines in (("failed", evaluation.failures), ("missing", without_gt), ("missing", without_mask)):
        say_each(kind, lines, ": --json lists them all")
    if pairing.not_looked_at:
        say(f"{counted(pairing.not_looked_at, 'image')} without a human mask: not judged")
    if pairing.outdated:
        drawn = "drawn on another photo or on another model's result"
        say(f"warning: {counted(pairing.outdated, 'human mask')} left out: {drawn}")
    if evaluation.lossy:
        lossy = counted(len(evaluation.lossy), "mask is", "masks are")
        say(f"warning: {lossy} JPEG or lossy WebP, thresholded at half: save masks as PNG")
    if evaluation.sizes is not None:
        taken = {"image": "the image's, so 5 px a side are cropped", "valid": "that of the image without 5 px a side"}
        say(f"masks and ground truth have one size, which is taken for {taken[evaluation.sizes]} (--size)")
    if evaluation.classes is not None and evaluation.unlabelled:
        lacking = counted(evaluation.unlabelled, "image without class labels is", "images without class labels are")
        say(f"warning: {lacking} left out by class")


def _with_interval(value: float | None, interval: Interval | None) -> str:
    bounds = f"({interval[0]:.3f}–{interval[1]:.3f})" if interval else ""
    return f"{fixed(value, 4)}  {bounds:13}"


def _share(value: float | None, part: int, whole: int) -> str:
    return "–" if value is None else f"{value:.3f} ({part} of {whole})"
