"""``desra status``, ``verify``, ``report``, ``rollback``, ``gc``, ``export`` and ``import``: work on a workspace."""

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import typer

from deployments.commands.flags import AsJson
from deployments.commands.runs import existing_workspace, renew_report, run_flow, show_failures, show_json
from deployments.serving.server import end_leftover_server
from desra_core.annotations import corrections
from desra_core.annotations.export import Exported, export_workspace
from desra_core.errors import LockedError, UsageError, printable
from desra_core.evaluation.table import counted
from desra_core.gate.model_registry import current_model, history, rollback
from desra_core.housekeeping.contents import UNKNOWN, sizes
from desra_core.housekeeping.garbage import find_garbage, sweep
from desra_core.images.scanning import kinds_in_words
from desra_core.planning.doubts import stored_doubts
from desra_core.planning.plan import load_settings, make_plan, settings_document
from desra_core.settings import Machine
from desra_core.settings.models import Verifying
from desra_core.workspace import Workspace, read_table
from desra_core.workspace.manifest import read_manifest, read_passed_over
from desra_core.workspace.matching import FAILURES
from tasks.logs import NowAndThen, say, say_each

if TYPE_CHECKING:
    from flows.verify import Verified

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
_SHOWN_UNKNOWN = 5


def status(
    workspace: Annotated[Path, typer.Option(help="The workspace to look at.")],
    failures: Annotated[bool, typer.Option("--failures", help="List every failure.")] = False,
    sized: Annotated[
        bool, typer.Option("--sizes", help="Measure its size on the disk, which reads every folder.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Count the images that are done, pending and failed, from the workspace alone.

    --json prints one object: workspace, run (who holds the workspace, or null), model (of the promoted one its path,
    and the kind and time of the event that made it current; or null), reference, doubts (why its two models may be no
    pair, a line each), images, vanished, done, pending, retried (of the pending ones those that failed and will be
    tried again), failed, passed_over (files of other kinds, by kind), failures (of the failed and retried ones: name,
    stage, subject, reason, remedy) and size (with --sizes: bytes and files of the whole, and by_kind of each part; else
    null).
    """
    place = Workspace(workspace.absolute())
    settings, target = load_settings(place)
    if not place.manifest.exists():
        raise UsageError(place.root, "has no manifest", f"run desra {settings.verb}")
    manifest = read_manifest(place)
    plan = make_plan(place, manifest, target, limit=settings.limit)
    unscanned = read_table(place.scan_failures, FAILURES)
    failed = pa.concat_tables([unscanned, plan.failures])
    tried = pa.concat_tables([failed, plan.retries])
    model, by_kind = current_model(place), sizes(place) if sized else {}
    found: dict[str, Any] = {
        "workspace": place.root,
        "run": place.owner(),
        "model": {"path": model} | {name: history(place)[-1][name] for name in ("kind", "time")} if model else None,
        "reference": settings_document(place).get("reference"),
        "doubts": [printable(doubt) for doubt in stored_doubts(place, settings, target)],
        "images": plan.images + unscanned.num_rows,
        "vanished": manifest.num_rows - int(pc.sum(manifest["present"]).as_py() or 0),
        "done": plan.done,
        "pending": plan.pending,
        "retried": plan.retries.num_rows,
        "failed": failed.num_rows,
        "passed_over": read_passed_over(place),
    }
    if as_json:
        whole = {name: sum(getattr(size, name) for size in by_kind.values()) for name in ("bytes", "files")}
        measured = whole | {"by_kind": {kind: size._asdict() for kind, size in by_kind.items()}}
        show_json(found | {"failures": tried.to_pylist(), "size": measured if sized else None})
        return
    _show_status(found)
    if sized:
        parts = ", ".join(f"{kind} {bytes_in_words(size.bytes)}" for kind, size in by_kind.items())
        files = counted(sum(size.files for size in by_kind.values()), "file")
        total = bytes_in_words(sum(size.bytes for size in by_kind.values()))
        typer.echo(f"size       {total} in {files}: {parts}")
    show_failures(tried, all_of_them=failures)


def run_verify(settings: Verifying, machine: Machine, *, as_json: bool = False) -> int:
    """Check the files of a workspace, and print what is damaged, missing or unknown; return the exit code."""
    place = existing_workspace(settings.workspace)
    with place.locked() as place:
        end_leftover_server(place)
        ended = run_flow(place, settings, machine)
    checked, marked = ended.checked, {damage.path for damage in ended.marked}
    if as_json:
        damaged = [damage._asdict() | {"marked": damage.path in marked} for damage in checked.damaged]
        counts = {"files": checked.files, "bytes": checked.bytes, "untold": ended.untold, "unchecked": ended.unchecked}
        found = {"damaged": damaged, "missing": checked.missing, "unknown": ended.unknown}
        show_json({"workspace": place.root} | counts | found)
    else:
        say_each("damaged", [damage.error for damage in checked.damaged], most=None)
        say_each("missing", checked.missing, most=None)
        _show_verified(ended, place)
    return int(len(checked.damaged) > len(marked))


def _show_verified(ended: "Verified", place: Workspace) -> None:
    checked = ended.checked
    typer.echo(f"checked  {counted(checked.files, 'file')}, {bytes_in_words(checked.bytes)}")
    if not checked.damaged and not checked.missing:
        typer.echo("found    all as they were written")
    else:
        typer.echo(f"found    {len(checked.damaged)} damaged, {len(checked.missing)} missing")
    if ended.unchecked:
        typer.echo(f"left out {counted(ended.unchecked, 'image')}, whose records are damaged")
    if ended.untold:
        images = counted(ended.untold, "image")
        typer.echo(f"older    pictures of {images} had no checksums, since an older desra wrote them")
    say_each("unknown", ended.unknown, ": desra gc --list names them")
    if ended.marked or checked.missing:
        typer.echo("next     the last desra mine or detect, or the last training, again: it makes them again")
    elif checked.damaged:
        typer.echo(f"next     desra verify --repair --workspace {shlex.quote(str(place.root))}")


def report(
    workspace: Annotated[Path, typer.Option(help="The workspace to report on.")],
    output: Annotated[Path | None, typer.Option(help="File to write; WORKSPACE/report.html by default.")] = None,
    worst: Annotated[int, typer.Option(min=0, max=500, help="How many of the worst regions to show.")] = 24,
    pages: Annotated[
        int, typer.Option(min=0, max=500, help="How many of the worst images get a page of their own in pages/.")
    ] = 0,
) -> None:
    """Write one self-contained HTML page about a workspace: summary, settings, speed, failures, worst regions."""
    place = Workspace(workspace.absolute())
    load_settings(place)
    from desra_core.report import write_report

    written = write_report(
        place, worst=worst, pages=pages, output=output, on_left_out=lambda error: say(f"failed: {printable(error)}")
    )
    typer.echo(f"report   {written}")


def roll_back(workspace: Annotated[Path, typer.Option(help="The workspace whose latest promotion to undo.")]) -> None:
    """Undo the latest promotion: the model before becomes current again."""
    place = existing_workspace(workspace.absolute())
    with place.locked() as place:
        entry = rollback(place)
        renew_report(place)
    typer.echo(f"current  {entry / 'model.pth'}")


def gc(
    workspace: Annotated[Path, typer.Option(help="The workspace to tidy up.")],
    apply: Annotated[bool, typer.Option("--apply", help="Delete; without this flag, only list.")] = False,
    vanished: Annotated[
        bool,
        typer.Option("--vanished", help="Also drop images that the latest run did not find and are not back."),
    ] = False,
    list_paths: Annotated[bool, typer.Option("--list", help="Name every file and folder that goes.")] = False,
    as_json: AsJson = False,
) -> None:
    """Drop files that no run needs any more; a dry run unless --apply is given.

    These are files of images that were replaced, arrays that the settings of the latest run do not keep, finetunes that
    later ones have replaced and from which no model was promoted, with their judgements, and the remains of runs that
    were cut off. Promoted models, the latest finetune, human masks, and files that no run has made stay.

    --json prints one object: workspace, applied (whether they are deleted), files and bytes (of all that goes), groups
    (kind, reason, files and bytes, the largest first), paths (with --list: kind, bytes and path of each; else null) and
    unknown (path and bytes of what no run has made, which stays).
    """
    place = Workspace(workspace.absolute())
    load_settings(place)
    if apply:
        place.create()
        found = sweep(place, vanished=vanished, on_dropped=NowAndThen("dropping: {} of {}")).table
        if vanished and place.report.exists():
            with place.locked() as place:
                renew_report(place)
    else:
        if owner := place.owner():
            raise LockedError(place.root, f"is in use by {owner}", "wait until it has ended")
        found = find_garbage(place, vanished=vanished).table
    strangers = pc.equal(found["kind"], UNKNOWN)
    going, left = found.filter(pc.invert(strangers)), found.filter(strangers)
    groups = _groups(going)
    total = {name: sum(group[name] for group in groups) for name in ("files", "bytes")}
    if as_json:
        document = {"workspace": place.root, "applied": apply} | total | {"groups": groups}
        paths = going.select(["kind", "bytes", "path"]).to_pylist() if list_paths else None
        show_json(document | {"paths": paths, "unknown": left.select(["path", "bytes"]).to_pylist()})
        return
    if list_paths:
        for batch in going.select(["kind", "bytes", "path"]).to_batches(max_chunksize=2**16):
            for kind, size, path in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                typer.echo(f"{kind:<12} {bytes_in_words(size):>8}  {printable(path)}")
    for group in groups:
        size = bytes_in_words(group["bytes"])
        typer.echo(f"{group['kind']:<12} {group['files']:>9} {size:>8}  {group['reason']}")
    summed = f"{counted(total['files'], 'file')}, {bytes_in_words(total['bytes'])}"
    if groups:
        typer.echo(f"dropped {summed}" if apply else f"{summed} would go: --apply drops them")
    else:
        typer.echo("nothing to drop")
    for row in left.slice(0, None if list_paths else _SHOWN_UNKNOWN).to_pylist():
        typer.echo(f"unknown, left: {printable(row['path'])} ({bytes_in_words(row['bytes'])})")
    if left.num_rows > _SHOWN_UNKNOWN and not list_paths:
        typer.echo(f"and {left.num_rows - _SHOWN_UNKNOWN} more, unknown and left; --list names them")


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
        typer.Option(
            help="Take only shapes with this label; by default all, of COCO those of category artifact if any."
        ),
    ] = None,
    unchanged: Annotated[
        bool, typer.Option("--unchanged", help="Take also masks that are as exported: a person has confirmed them.")
    ] = False,
    undo: Annotated[
        bool, typer.Option("--undo", help="Undo the latest import; given again, the import before it.")
    ] = False,
) -> None:
    """Read masks that people corrected or drew, and store them as WORKSPACE/human/NAME.png.

    Pseudo-GT, finetune, evaluation and calibration use a human mask in place of the detector's mask. A picture without
    any shape gets an empty mask: a person says that nothing is wrong there. A picture keeps its mask where it has no
    file, or where its file is as it was exported. If one file does not fit, a line names it, no mask changes, and the
    exit code is 2.
    """
    if not undo and (form is None or path is None):
        raise UsageError("import", "lacks what to bring", "give labelme or coco, and the folder or file, or --undo")
    if undo and (form is not None or label is not None or unchanged):
        raise UsageError("--undo", "and something to import are both given", "leave one out")
    place = Workspace(workspace.absolute())
    settings, _ = load_settings(place)
    with place.locked() as place:
        if form is None or path is None:
            undone = corrections.undo_import(place)
            images = counted(undone.names, "image")
            typer.echo(f"taken back: the masks of {images}, of which {undone.restored} have an earlier mask again")
            _show_renewed(undone.renewed)
            typer.echo(f"masks    {place.human}")
            return
        found, errors = corrections.read_corrections(place, form, path, label, unchanged=unchanged)
        if errors:
            say_each("error", errors)
            say("nothing was imported")
            raise typer.Exit(2)
        taken = [correction for correction in found if unchanged or not correction.as_exported]
        published = corrections.publish_corrections(place, taken) if taken else None
    if published is None:
        typer.echo("nothing to import: every mask is as exported")
        _show_left_out(taken, len(found))
        return
    _show_taken(published, taken)
    _show_left_out(taken, len(found) - len(taken))
    typer.echo(f"masks    {place.human}, which pseudo-GT, finetune, evaluation and calibration prefer")
    _show_renewed(published.renewed)
    root, waiting = shlex.quote(str(place.root)), counted(published.waiting, "image")
    following = f"desra evaluate --workspace {root}; desra finetune --workspace {root} --output RUN"
    if published.waiting:
        following = f"desra {settings.verb}, again: it makes the pictures of {waiting} to train on"
    typer.echo(f"next     {following}")


def bytes_in_words(count: int) -> str:
    """Format a number of bytes in decimal units, with three digits."""
    value, unit = float(count), 0
    while value >= 999.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.3g} {_UNITS[unit]}"


def _show_status(found: Mapping[str, Any]) -> None:
    """Print a line for each part of a status that has something to say."""
    retried = f", {found['retried']} of them failed and will be tried again" if found["retried"] else ""
    also = f", and {found['vanished']} vanished ones, whose outputs stay" if found["vanished"] else ""
    typer.echo(f"workspace  {found['workspace']}")
    typer.echo(f"run        {f'going on: {owner}' if (owner := found['run']) else 'none at present'}")
    if model := found["model"]:
        typer.echo(f"model      {model['path']}, current by {model['kind']} {model['time']}")
    if found["reference"]:
        typer.echo(f"reference  {printable(found['reference'])}")
    for doubt in found["doubts"]:
        typer.echo(f"doubt      {doubt}")
    typer.echo(f"images     {found['images']}{also}")
    typer.echo(f"done       {found['done']}")
    typer.echo(f"pending    {found['pending']}{retried}")
    typer.echo(f"failed     {found['failed']}")
    if others := kinds_in_words(found["passed_over"]):
        typer.echo(f"passed over {others}")


def _groups(going: pa.Table) -> list[dict[str, Any]]:
    """Add up files and bytes by kind and reason, the largest first."""
    sums = going.group_by(["kind", "reason"], use_threads=False)
    rows = sums.aggregate([("files", "sum"), ("bytes", "sum"), ("path", "count")]).to_pylist()
    groups = [
        {name: row[name] for name in ("kind", "reason")}
        | {"files": row["files_sum"] or row["path_count"], "bytes": row["bytes_sum"]}
        for row in rows
    ]
    return sorted(groups, key=lambda group: (-group["bytes"], group["kind"], group["reason"]))


def _show_export(exported: Exported, form: str, workspace: Workspace, output: Path) -> None:
    images, regions = counted(exported.images, "image"), counted(exported.regions, "region")
    human = f", {exported.by_people} of them with a human mask" if exported.by_people else ""
    left_out = f", {len(exported.failures)} left out" if exported.failures else ""
    typer.echo(f"{images} with {regions} exported{human}{left_out}")
    if exported.unpictured:
        say(f"{counted(exported.unpictured, 'clean image')} left out: desra mine --keep all keeps their pictures")
    typer.echo(f"export   {output}\npictures {exported.pictures}")
    if form != "folder":
        source = shlex.quote(str(output if form == "labelme" else output / "annotations.json"))
        tool = f"labelme {source}" if form == "labelme" else "annotate, in CVAT for instance"
        root = shlex.quote(str(workspace.root))
        typer.echo(f"next     {tool}; then desra import {form} {source} --workspace {root}")


def _show_taken(published: corrections.ImportSummary, taken: Sequence[corrections.Correction]) -> None:
    typer.echo(
        f"{counted(published.images, 'human mask')}, {published.changed} of them other than the detector's and "
        f"{published.clean} without any artifact"
    )
    kinds = Counter(kind for correction in taken for kind in correction.kinds)
    drawn = ", ".join(_shapes(count, kind) for kind, count in kinds.most_common())
    images = counted(sum(bool(correction.kinds) for correction in taken), "image")
    typer.echo(f"regions  {kinds.total()} in {images}" + (f": {drawn}" if drawn else ""))


def _show_left_out(taken: Sequence[corrections.Correction], as_exported: int) -> None:
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
    """Format a count like ``2 boxes``; RLE has no plural."""
    return counted(count, kind, f"{kind}es" if kind.endswith("x") else kind if kind == "RLE" else "")
