"""``desra export`` and ``desra import``: masks to labelling tools and back."""

import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from desra_core.annotations.corrections import (
    Correction,
    ImportSummary,
    publish_corrections,
    read_corrections,
    undo_import,
)
from desra_core.annotations.export import Exported, export_workspace
from desra_core.errors import UsageError
from desra_core.evaluation.table import counted
from desra_core.planning.keys import load_settings
from desra_core.workspace import Workspace
from tasks.logs import say, say_each


def export_masks(
    workspace: Annotated[Path, typer.Option(help="The workspace whose masks are to be looked at.")],
    form: Annotated[
        Literal["coco", "labelme", "folder"],
        typer.Option(
            "--format",
            help="coco: one JSON for CVAT, FiftyOne and others, with pictures; labelme: a JSON beside each picture; "
            "folder: masks, results and pseudo-GT in plain folders.",
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder to write: a new one, or that of an earlier export.")],
    everything: Annotated[
        bool, typer.Option("--all", help="Clean images too, as far as their pictures are there.")
    ] = False,
    worst: Annotated[int | None, typer.Option(min=1, help="Only so many images, the most severe.")] = None,
    images: Annotated[
        bool, typer.Option("--images/--no-images", help="With coco: copy the GAN results, or name them where they lie.")
    ] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that were edited since.")] = False,
) -> None:
    """Export images and masks so that people can look at them, and correct them.

    Takes images with artifacts and images with a human mask, which counts in place of the detector's. Pictures are the
    GAN results, for coco and labelme as 8-bit RGB. Copies of an image are exported once.
    Exit code 1 where some images cannot be read.
    """
    if not images and form != "coco":
        raise UsageError("--no-images", f"and --format {form} are both given", "only coco does without pictures")
    place = Workspace(workspace.absolute())
    exported = export_workspace(
        place, output.absolute(), form, everything=everything, worst=worst, pictures=images, overwrite=overwrite
    )
    say_each("failed", exported.failures)
    _show_export(exported, form, place, output.absolute())
    raise typer.Exit(int(bool(exported.failures)))


def import_masks(
    workspace: Annotated[Path, typer.Option(help="The workspace whose images were annotated.")],
    form: Annotated[
        Literal["labelme", "coco"] | None, typer.Argument(metavar="FORMAT", help="labelme or coco.")
    ] = None,
    path: Annotated[
        Path | None, typer.Argument(metavar="PATH", help="The folder of LabelMe files, or one of them; the COCO file.")
    ] = None,
    label: Annotated[
        str | None,
        typer.Option(help="Take only shapes with this label; by default all, of coco those of `artifact` if there."),
    ] = None,
    unchanged: Annotated[
        bool, typer.Option("--unchanged", help="Take masks too that are as exported: a person has confirmed them.")
    ] = False,
    undo: Annotated[
        bool, typer.Option("--undo", help="Take the latest import back; once more, the one before it.")
    ] = False,
) -> None:
    """Bring masks that people corrected back, as WORKSPACE/human/NAME.png.

    A picture without any shape becomes an empty mask: nothing is wrong there. Pictures that are not among the files, or
    whose mask is as exported, keep their masks. Pseudo-GT, finetune, evaluation and calibration prefer these
    masks to the detector's. All or nothing: with a line for each file that does not fit, nothing changes, and the exit
    code is 2.
    """
    if not undo and (form is None or path is None):
        raise UsageError("import", "lacks what to bring", "give labelme or coco, and the folder or file, or --undo")
    if undo and (form is not None or label is not None or unchanged):
        raise UsageError("--undo", "and something to import are both given", "leave one out")
    place = Workspace(workspace.absolute())
    settings, _ = load_settings(place)
    with place.locked():
        if form is None or path is None:
            undone = undo_import(place)
            images = counted(undone.names, "image")
            typer.echo(f"taken back: the masks of {images}, of which {undone.restored} have an earlier mask again")
            _show_renewed(undone.renewed)
            typer.echo(f"masks    {place.human}")
            return
        corrections, errors = read_corrections(place, form, path, label, unchanged=unchanged)
        if errors:
            say_each("error", errors)
            say("nothing was imported")
            raise typer.Exit(2)
        taken = [correction for correction in corrections if unchanged or not correction.as_exported]
        published = publish_corrections(place, taken) if taken else None
    if published is None:
        typer.echo("nothing to import: every mask is as exported")
    else:
        _show_taken(published, taken)
    _show_left_out(taken, len(corrections) - len(taken))
    if published is None:
        return
    typer.echo(f"masks    {place.human}, which pseudo-GT, finetune, evaluation and calibration prefer")
    _show_renewed(published.renewed)
    root, waiting = _quoted(place.root), counted(published.waiting, "image")
    following = f"desra evaluate --workspace {root}; desra finetune --workspace {root} --output RUN"
    if published.waiting:
        following = f"desra {settings.verb}, again: it makes the pictures of {waiting} to train on"
    typer.echo(f"next     {following}")


def _show_export(exported: Exported, form: str, workspace: Workspace, output: Path) -> None:
    images, regions = counted(exported.images, "image"), counted(exported.regions, "region")
    human = f", {exported.by_people} of them with a human mask" if exported.by_people else ""
    left_out = f", {len(exported.failures)} left out" if exported.failures else ""
    typer.echo(f"{images} with {regions} exported{human}{left_out}")
    if exported.unpictured:
        say(f"{counted(exported.unpictured, 'clean image')} left out: desra mine --keep all keeps their pictures")
    typer.echo(f"export   {output}\npictures {exported.pictures}")
    if form != "folder":
        tool = f"labelme {_quoted(output)}" if form == "labelme" else "annotate, in CVAT for instance"
        source = output if form == "labelme" else output / "annotations.json"
        typer.echo(f"next     {tool}; then desra import {form} {_quoted(source)} --workspace {_quoted(workspace.root)}")


def _show_taken(published: ImportSummary, taken: Sequence[Correction]) -> None:
    typer.echo(
        f"{counted(published.images, 'human mask')}, {published.changed} of them other than the detector's and "
        f"{published.clean} without any artifact"
    )
    kinds = Counter(kind for correction in taken for kind in correction.kinds)
    drawn = ", ".join(_shapes(count, kind) for kind, count in kinds.most_common())
    images = counted(sum(bool(correction.kinds) for correction in taken), "image")
    typer.echo(f"regions  {kinds.total()} in {images}" + (f": {drawn}" if drawn else ""))


def _show_left_out(taken: Sequence[Correction], as_exported: int) -> None:
    """Print how many masks and shapes of the files were not imported, and why."""
    if as_exported:
        masks = counted(as_exported, "image, whose mask is", "images, whose masks are")
        keeps = "it keeps" if as_exported == 1 else "they keep"
        typer.echo(f"left out {masks} as exported: {keeps} what counts now; --unchanged takes such masks too")
    reasons = Counter(reason for correction in taken for reason in correction.left_out)
    for reason, count in reasons.most_common():
        noun, _, rest = reason.partition(" ")
        images = sum(reason in correction.left_out for correction in taken)
        typer.echo(f"left out {_shapes(count, noun)} {rest}, in {counted(images, 'image')}")


def _show_renewed(renewed: int) -> None:
    if renewed:
        typer.echo(f"dataset  mask and pseudo-GT of {counted(renewed, 'image')} made again")


def _shapes(count: int, kind: str) -> str:
    """Format a count like ``2 boxes``; the letters RLE have no plural."""
    return counted(count, kind, f"{kind}es" if kind.endswith("x") else kind if kind == "RLE" else "")


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
