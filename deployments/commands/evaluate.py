"""``desra evaluate``: hold masks against people's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from desra_core.errors import UsageError
from tasks.logs import NowAndThen, say

if TYPE_CHECKING:
    from desra_core.evaluation.evaluation import Evaluation
    from desra_core.evaluation.mask_pairs import Pairing


def evaluate(
    masks: Annotated[Path | None, typer.Option(help="Folder of the masks to judge.")] = None,
    gt: Annotated[
        Path | None, typer.Option(help="Folder of the ground truth, masks with the same paths, suffix aside.")
    ] = None,
    workspace: Annotated[
        Path | None,
        typer.Option(help="Judge this workspace's masks by those that people made in it, which win over --gt."),
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
            help="What masks have that are as large as their ground truth: the image's size, or that without the 5 px "
            "frame. auto: the image's, unless a mask marks something in the frame."
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
    from deployments.commands.score_lines import show_evaluation
    from desra_core.evaluation.evaluation import SeverityLabels, evaluate_masks
    from desra_core.evaluation.severity_labels import read_ratings

    _check_targets(json, output, rated=severity is not None)
    try:
        pairing = _pairing(masks, gt, workspace, labels, gan_sr)
        rated = None if severity is None else SeverityLabels(read_ratings(severity), severity, prominent)
        evaluation = evaluate_masks(pairing, sizes=size, severity=rated, on_judged=NowAndThen("judged {:,} of {:,}"))
        show_evaluation(evaluation)
        _write(evaluation, json, output)
    except KeyboardInterrupt:
        say("interrupted: the same command begins again")
        raise typer.Exit(130) from None
    raise typer.Exit(int(bool(evaluation.failures)))


def _check_targets(json: Path | None, output: Path | None, *, rated: bool) -> None:
    """See that results have a place before anything is read, and that no person's work is lost there."""
    from desra_core.evaluation.severity_labels import has_ratings

    if json is not None and json.exists() and (json.suffix.lower() != ".json" or json.is_dir()):
        raise UsageError(json, "exists and is no JSON file", "name another file for --json")
    if output is not None and output.exists() and not output.is_dir():
        raise UsageError(output, "is no folder", "name a folder for --output")
    if output is not None and not rated and has_ratings(output / "regions.csv"):
        reason = "holds shares of viewers that a person filled in, and would be written anew without them"
        raise UsageError(output / "regions.csv", reason, "give it with --severity, or name another --output")


def _pairing(
    masks: Path | None, gt: Path | None, workspace: Path | None, labels: Path | None, gan_sr: Path | None
) -> Pairing:
    from desra_core.evaluation.mask_pairs import pair_folders, pair_workspace
    from desra_core.workspace import Workspace

    if workspace is not None:
        if masks is not None:
            raise UsageError("--workspace", "and --masks are both given", "leave one out")
        return pair_workspace(Workspace(workspace.absolute()), gt=gt, labels=labels, gan_sr=gan_sr)
    if masks is None or gt is None:
        lacking = "--masks" if masks is None else "--gt"
        raise UsageError(lacking, "is not given", "give --masks and --gt, or --workspace")
    return pair_folders(masks, gt, labels=labels, gan_sr=gan_sr)


def _write(evaluation: Evaluation, json: Path | None, output: Path | None) -> None:
    from desra_core.evaluation.evaluation_files import write_json, write_tables

    if json is not None:
        write_json(evaluation, json)
        typer.echo(f"numbers  {json}")
    if output is not None:
        from desra_core.report.evaluation_page import write_evaluation_page

        write_json(evaluation, output / "evaluation.json")
        write_tables(evaluation, output)
        page = write_evaluation_page(evaluation, output / "evaluation.html")
        typer.echo(f"tables   {output}\npage     {page}")
