"""``desra gc``: drop what no run needs any more; and what a workspace takes of the disk."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import pyarrow.compute as pc
import typer

from deployments.commands.runs import renew_report
from desra_core.errors import LockedError, printable
from desra_core.housekeeping.contents import UNKNOWN, sizes
from desra_core.housekeeping.garbage import find_garbage
from desra_core.housekeeping.sweep import sweep
from desra_core.planning.keys import load_settings
from desra_core.workspace import Workspace
from tasks.logs import LINE_SECONDS, say

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
_SHOWN_UNKNOWN = 5


def gc(
    workspace: Annotated[Path, typer.Option(help="The workspace to tidy up.")],
    apply: Annotated[bool, typer.Option("--apply", help="Delete; without it, only say what would go.")] = False,
    vanished: Annotated[
        bool,
        typer.Option("--vanished", help="Drop images, too, that the latest run did not find and that are not back."),
    ] = False,
    list_paths: Annotated[bool, typer.Option("--list", help="Name every file and folder that goes.")] = False,
) -> None:
    """Drop what no run needs any more; a dry run unless --apply is given.

    That is what belongs to images that were replaced, arrays that the settings of the latest run do not keep,
    finetunes that others have replaced and from which no model was promoted, what judged them, and what runs that were
    cut off have left. Promoted models, the latest finetune, masks by people, and files that no run has made stay.
    """
    place = Workspace(workspace.absolute())
    load_settings(place)
    if apply:
        place.create()
        found = sweep(place, vanished=vanished, on_dropped=_DroppingLines()).table
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
        _list(going)
    _tell(going, applied=apply)
    for row in left.slice(0, None if list_paths else _SHOWN_UNKNOWN).to_pylist():
        typer.echo(f"unknown, left: {printable(row['path'])} ({told_bytes(row['bytes'])})")
    if left.num_rows > _SHOWN_UNKNOWN and not list_paths:
        typer.echo(f"and {left.num_rows - _SHOWN_UNKNOWN} more that are unknown and left; --list names them")


def size_line(workspace: Workspace) -> str:
    """What a workspace takes of the disk, in all and by kind."""
    by_kind = sizes(workspace)
    total = told_bytes(sum(size.bytes for size in by_kind.values()))
    parts = ", ".join(f"{kind} {told_bytes(size.bytes)}" for kind, size in by_kind.items())
    return f"{total} in {sum(size.files for size in by_kind.values())} files: {parts}"


def told_bytes(count: int) -> str:
    """A number of bytes in decimal units, with three digits."""
    value, unit = float(count), 0
    while value >= 999.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.3g} {_UNITS[unit]}"


def _list(table: pa.Table) -> None:
    for batch in table.select(["kind", "bytes", "path"]).to_batches(max_chunksize=2**16):
        for kind, size, path in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            typer.echo(f"{kind:<12} {told_bytes(size):>8}  {printable(path)}")


def _tell(table: pa.Table, *, applied: bool) -> None:
    """A line for each kind and reason, and their sum."""
    if not table.num_rows:
        typer.echo("nothing to drop")
        return
    groups = table.group_by(["kind", "reason"], use_threads=False)
    rows = groups.aggregate([("files", "sum"), ("bytes", "sum"), ("path", "count")]).to_pylist()
    for row in sorted(rows, key=lambda row: (-row["bytes_sum"], row["kind"], row["reason"])):
        files = row["files_sum"] or row["path_count"]
        typer.echo(f"{row['kind']:<12} {files:>9} {told_bytes(row['bytes_sum']):>8}  {row['reason']}")
    total = f"{sum(row['files_sum'] for row in rows)} files, {told_bytes(sum(row['bytes_sum'] for row in rows))}"
    typer.echo(f"dropped {total}" if applied else f"{total} would go: --apply drops them")


class _DroppingLines:
    """Says now and then how far it is."""

    def __init__(self) -> None:
        self._said = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self._said >= LINE_SECONDS:
            self._said = time.monotonic()
            say(f"dropping: {done} of {total}")
