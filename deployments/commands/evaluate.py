"""``desra evaluate``: compare masks with human masks."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from deployments.commands.flags import AsJson
from deployments.commands.runs import show_json, show_people
from desra_core.errors import UsageError
from desra_core.evaluation import evaluation as evaluations
from desra_core.evaluation.evaluation import SeverityLabels, evaluate_masks, has_ratings, read_ratings
from desra_core.evaluation.mask_files import pair_folders, pair_workspace
from desra_core.evaluation.metrics import Overlap
from desra_core.evaluation.summary import notes, score_sections, without_twin
from desra_core.evaluation.table import document_as_text
from desra_core.workspace import Workspace
from tasks.logs import NowAndThen, say, say_each

_SHOWN_CLASSES = 8
_DETAILS = "Details"  # heading of the flags that few need


def evaluate(
    masks: Annotated[Path | None, typer.Option(help="Folder of the masks to judge.")] = None,
    gt: Annotated[
        Path | None, typer.Option(help="Folder of the ground truth, masks with the same paths, suffix aside.")
    ] = None,
    workspace: Annotated[
        Path | None, typer.Option(help="Judge this workspace's masks by its human masks, which win over --gt.")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="Folder of class-index PNGs, for the scores by class.", rich_help_panel=_DETAILS)
    ] = None,
    gan_sr: Annotated[
        Path | None, typer.Option(help="Folder of the GAN results, for the pictures.", rich_help_panel=_DETAILS)
    ] = None,
    severity: Annotated[
        Path | None,
        typer.Option(
            help="CSV with the share of viewers who noticed each ground-truth region: image,region,noticed.",
            rich_help_panel=_DETAILS,
        ),
    ] = None,
    prominent: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="A region noticed by at least this share of viewers is prominent.",
            rich_help_panel=_DETAILS,
        ),
    ] = 0.5,
    kappa: Annotated[
        float,
        typer.Option(
            min=0.01,
            max=1,
            help="A ground-truth region counts in found_at_kappa where at least this share of it lies in the mask.",
            rich_help_panel=_DETAILS,
        ),
    ] = 0.5,
    dilate: Annotated[
        int,
        typer.Option(
            min=0,
            max=1000,
            help="Widen the mask by so many pixels before it counts for found_at_kappa.",
            rich_help_panel=_DETAILS,
        ),
    ] = 0,
    size: Annotated[
        Literal["auto", "image", "valid"],
        typer.Option(
            help="How to take masks that are as large as their ground truth. image: they have the image's size; valid: "
            "the size of the image without its 5 px frame; auto: image, unless a mask marks something in the frame.",
            rich_help_panel=_DETAILS,
        ),
    ] = "auto",
    output: Annotated[Path | None, typer.Option(help="Folder for tables (CSV), numbers (JSON) and a page.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure how well masks agree with a ground truth: IoU, precision and recall as published, F1 and pixel F1.

    On the valid region of each image (without the 5 px frame). IoU is the mean over images; a detected region is right,
    and a ground-truth region is found, when at least half of it lies in the other's mask. Exit code 1 where some files
    cannot be judged.

    --json prints the object that --output writes as evaluation.json. Of the whole set, it has iou, iou_with_empty,
    precision, recall, f1, pixel_f1 (of all pixels), pixel_f1_mean (over images), recall_at_kappa, flagged_share (null
    where undefined), intervals and undefined (95 % bounds, and the reason, by measure), interval_kind, images,
    empty_pairs, kappa, dilate, the pixel counts intersection, union, mask_pixels, ground_truth_pixels and pixels, and
    the region counts detected, right, marked, found and found_at_kappa. Of the files: masks, ground_truth, sizes,
    without_ground_truth, without_mask, not_looked_at, outdated_human_masks, images_by_people, failures and lossy.
    Tables: per_image; with labels per_class and unlabelled_images; with --severity prominent, the measures of the
    prominent regions.
    """
    _check_target(output, rated=severity is not None)
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
    evaluation = evaluate_masks(
        pairing, sizes=size, severity=rated, overlap=Overlap(kappa, dilate), on_judged=NowAndThen("judged {:,} of {:,}")
    )
    for note in notes(evaluation):
        say(f"warning: {note}")
    say_each("failed", evaluation.failures, ": --json lists them all")
    say_each("missing", without_twin(evaluation), ": --json lists them all")
    if as_json:
        show_json(evaluations.as_document(evaluation))
    else:
        typer.echo(document_as_text("", score_sections(evaluation, _SHOWN_CLASSES)))
        show_people(evaluation.pairing.by_people or 0)
    if output is not None:
        from desra_core.report.pages import write_evaluation_page

        evaluations.write_json(evaluation, output / "evaluation.json")
        evaluations.write_tables(evaluation, output)
        page = write_evaluation_page(evaluation, output / "evaluation.html")
        if not as_json:
            typer.echo(f"tables   {output}\npage     {page}")
    raise typer.Exit(int(bool(evaluation.failures)))


def _check_target(output: Path | None, *, rated: bool) -> None:
    """Check, before reading anything, that results can be written and will not overwrite ratings that a person gave."""
    if output is not None and output.exists() and not output.is_dir():
        raise UsageError(output, "is no folder", "name a folder for --output")
    if output is not None and not rated and has_ratings(output / "regions.csv"):
        reason = "holds shares of viewers that a person filled in, and would be written anew without them"
        raise UsageError(output / "regions.csv", reason, "give it with --severity, or name another --output")
