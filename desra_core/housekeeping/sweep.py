"""Delete what no run needs any more. Killed at any moment, it leaves a valid workspace, and the next sweep goes on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc

from desra_core.errors import TransientError
from desra_core.housekeeping.contents import EMPTY, UNKNOWN, table_of
from desra_core.housekeeping.garbage import Garbage, find_garbage, rewritten, unfinished
from desra_core.planning.tables import publish_tables
from desra_core.workspace import Workspace
from desra_core.workspace.records import gather_journals


def sweep(
    workspace: Workspace, *, vanished: bool = False, on_dropped: Callable[[int, int], None] | None = None
) -> Garbage:
    """Delete the garbage of a workspace: first from the manifest, then from the records, and the files last.

    Args:
        workspace: Of any run that got as far as its manifest.
        vanished: As for `desra_core.housekeeping.garbage.find_garbage`.
        on_dropped: Called with the number of files and folders deleted so far, and of all.

    Returns:
        What was deleted.

    Raises:
        LockedError: A run holds the workspace.
        UsageError: As `find_garbage`.
        TransientError: Something cannot be deleted.
    """
    scratch = table_of(unfinished(workspace))  # which goes when the workspace is locked
    with workspace.locked():
        gather_journals(workspace)
        found = find_garbage(workspace, vanished=vanished)
        workspace.publish_table(workspace.manifest, found.manifest)
        for shard, table in rewritten(workspace, found.stale, found.unmapped, found.unlabelled):
            if table.num_rows:
                workspace.publish_table(workspace.shard_records(shard), table)
            else:
                workspace.shard_records(shard).unlink()
        _drop(workspace, found.table, on_dropped)
        if workspace.regions.exists():
            publish_tables(workspace, found.target)
    return found._replace(table=pa.concat_tables([scratch, found.table]))


def _drop(workspace: Workspace, table: pa.Table, on_dropped: Callable[[int, int], None] | None) -> None:
    """Delete files and folders, and then the folders above that they leave empty."""
    listed = table.filter(pc.invert(pc.is_in(table["kind"], pa.array((UNKNOWN, EMPTY, "outcomes", "tmp")))))
    folders = set(table.filter(pc.equal(table["kind"], EMPTY))["path"].to_pylist())
    for number, path in enumerate(listed["path"].to_pylist(), 1):
        place = workspace.root / path
        try:
            _delete(workspace, place)
        except OSError as error:
            reason = f"cannot be deleted ({error.strerror or error})"
            raise TransientError(place, reason, "check its permissions and run again") from error
        folders.add(os.path.dirname(path))
        if on_dropped:
            on_dropped(number, listed.num_rows)
    for folder in sorted(folders, key=len, reverse=True):
        _fold(workspace, PurePosixPath(folder))


def _delete(workspace: Workspace, place: Path) -> None:
    """Delete a file, or a folder: that in one go, since half of it could be taken for the whole."""
    if place.is_symlink() or not place.is_dir():
        place.unlink(missing_ok=True)
        return
    scratch = workspace.scratch()
    place.rename(scratch)
    shutil.rmtree(scratch)


def _fold(workspace: Workspace, folder: PurePosixPath) -> None:
    """Delete a folder that holds nothing, and those above that held nothing else, up to those that a workspace has."""
    while len(folder.parts) > 1 + (folder.parts[:1] == ("dataset",)):
        try:
            (workspace.root / folder).rmdir()
        except OSError:
            return
        folder = folder.parent
