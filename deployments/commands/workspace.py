"""``desra status``, ``report``, ``rollback`` and ``gc``: look at a workspace, and keep it in order."""

from pathlib import Path
from typing import Annotated

import pyarrow as pa
import pyarrow.compute as pc
import typer

from deployments.commands.runs import existing_workspace, renew_report, show_failures
from desra_core.errors import LockedError, UsageError, printable
from desra_core.evaluation.table import counted
from desra_core.gate.model_registry import current_model, history, rollback
from desra_core.housekeeping.contents import UNKNOWN, sizes
from desra_core.housekeeping.garbage import find_garbage, sweep
from desra_core.images.scanning import kinds_in_words
from desra_core.planning.keys import load_settings
from desra_core.planning.plan import make_plan
from desra_core.workspace import Workspace, read_table
from desra_core.workspace.manifest import read_manifest, read_passed_over
from desra_core.workspace.matching import FAILURES
from tasks.logs import NowAndThen, say

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
_SHOWN_UNKNOWN = 5


def status(
    workspace: Annotated[Path, typer.Option(help="The workspace to look at.")],
    failures: Annotated[bool, typer.Option("--failures", help="List every failure.")] = False,
    sized: Annotated[
        bool, typer.Option("--sizes/--no-sizes", help="Measure its size on the disk: seconds for a million files.")
    ] = True,
) -> None:
    """Count the images that are done, pending and failed, from the workspace alone."""
    place = Workspace(workspace.absolute())
    settings, target = load_settings(place)
    if not place.manifest.exists():
        raise UsageError(place.root, "has no manifest", f"run desra {settings.verb}")
    manifest = read_manifest(place)
    plan = make_plan(place, manifest, target, limit=settings.limit)
    unscanned = read_table(place.scan_failures, FAILURES)
    failed = pa.concat_tables([unscanned, plan.failures])
    vanished = manifest.num_rows - int(pc.sum(manifest["present"]).as_py() or 0)
    owner = place.owner()
    retried = f", {plan.retries.num_rows} of them failed and will be tried again" if plan.retries.num_rows else ""
    typer.echo(f"workspace  {place.root}")
    typer.echo(f"run        {f'going on: {owner}' if owner else 'none at present'}")
    if model := current_model(place):
        typer.echo(f"model      {model}, current by {history(place)[-1]['kind']} {history(place)[-1]['time']}")
    also = f", and {vanished} vanished ones, whose outputs stay" if vanished else ""
    typer.echo(f"images     {plan.images + unscanned.num_rows}{also}")
    typer.echo(f"done       {plan.done}")
    typer.echo(f"pending    {plan.pending}{retried}")
    typer.echo(f"failed     {failed.num_rows}")
    if others := kinds_in_words(read_passed_over(place)):
        typer.echo(f"passed over {others}")
    if sized:
        by_kind = sizes(place)
        parts = ", ".join(f"{kind} {bytes_in_words(size.bytes)}" for kind, size in by_kind.items())
        files = counted(sum(size.files for size in by_kind.values()), "file")
        total = bytes_in_words(sum(size.bytes for size in by_kind.values()))
        typer.echo(f"size       {total} in {files}: {parts}")
    show_failures(pa.concat_tables([failed, plan.retries]), all_of_them=failures)


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
    with place.locked():
        entry = rollback(place)
        renew_report(place)
    typer.echo(f"current  {entry / 'model.pth'}")


def gc(
    workspace: Annotated[Path, typer.Option(help="The workspace to tidy up.")],
    apply: Annotated[bool, typer.Option("--apply", help="Delete; without this flag, only list.")] = False,
    vanished: Annotated[
        bool, typer.Option("--vanished", help="Drop images, too, that the latest run did not find and are not back.")
    ] = False,
    list_paths: Annotated[bool, typer.Option("--list", help="Name every file and folder that goes.")] = False,
) -> None:
    """Drop files that no run needs any more; a dry run unless --apply is given.

    These are files of images that were replaced, arrays that the settings of the latest run do not keep, finetunes that
    later ones have replaced and from which no model was promoted, with their judgements, and the remains of runs that
    were cut off. Promoted models, the latest finetune, human masks, and files that no run has made stay.
    """
    place = Workspace(workspace.absolute())
    load_settings(place)
    if apply:
        place.create()
        found = sweep(place, vanished=vanished, on_dropped=NowAndThen("dropping: {} of {}")).table
        if vanished and place.report.exists():
            with place.locked():
                renew_report(place)
    else:
        if owner := place.owner():
            raise LockedError(place.root, f"is in use by {owner}", "wait until it has ended")
        found = find_garbage(place, vanished=vanished).table
    strangers = pc.equal(found["kind"], UNKNOWN)
    going, left = found.filter(pc.invert(strangers)), found.filter(strangers)
    if list_paths:
        for batch in going.select(["kind", "bytes", "path"]).to_batches(max_chunksize=2**16):
            for kind, size, path in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                typer.echo(f"{kind:<12} {bytes_in_words(size):>8}  {printable(path)}")
    _sum_up(going, applied=apply)
    for row in left.slice(0, None if list_paths else _SHOWN_UNKNOWN).to_pylist():
        typer.echo(f"unknown, left: {printable(row['path'])} ({bytes_in_words(row['bytes'])})")
    if left.num_rows > _SHOWN_UNKNOWN and not list_paths:
        typer.echo(f"and {left.num_rows - _SHOWN_UNKNOWN} more, unknown and left; --list names them")


def bytes_in_words(count: int) -> str:
    """Format a number of bytes in decimal units, with three digits."""
    value, unit = float(count), 0
    while value >= 999.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.3g} {_UNITS[unit]}"


def _sum_up(table: pa.Table, *, applied: bool) -> None:
    """Print a line for each kind and reason, and the sum."""
    if not table.num_rows:
        typer.echo("nothing to drop")
        return
    groups = table.group_by(["kind", "reason"], use_threads=False)
    rows = groups.aggregate([("files", "sum"), ("bytes", "sum"), ("path", "count")]).to_pylist()
    for row in sorted(rows, key=lambda row: (-row["bytes_sum"], row["kind"], row["reason"])):
        files = row["files_sum"] or row["path_count"]
        typer.echo(f"{row['kind']:<12} {files:>9} {bytes_in_words(row['bytes_sum']):>8}  {row['reason']}")
    files, size = (sum(row[column] for row in rows) for column in ("files_sum", "bytes_sum"))
    total = f"{counted(files, 'file')}, {bytes_in_words(size)}"
    typer.echo(f"dropped {total}" if applied else f"{total} would go: --apply drops them")
