"""Who serves a workspace: a locked file names the process, the mark of all that it starts, and its Prefect server."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from deployments.serving.processes import MARK, end_marked, new_mark
from desra_core.errors import LockedError
from desra_core.files.locks import holder, locked, read_note
from desra_core.workspace import Workspace


class Served(NamedTuple):
    """The Prefect server of a workspace: the URL of its API, and whether desra serve has started it, with its key."""

    url: str
    own: bool


class Service:
    """Says that this process serves a workspace; ``mark`` is the environment of the processes that it starts."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.mark = new_mark()
        self._note: dict[str, Any] = {"pid": os.getpid(), "token": self.mark[MARK]}
        self._file.write_text(json.dumps(self._note))

    def announce(self, served: Served, history: timedelta) -> None:
        """Write down which server it is and how long it keeps runs, for runs that are started by hand."""
        self._note |= {**served._asdict(), "history": history.total_seconds()}
        self._file.write_text(json.dumps(self._note))


@contextlib.contextmanager
def standing(workspace: Workspace) -> Iterator[Service]:
    """Be the one that serves a workspace; processes that a killed one has left are ended first.

    Raises:
        LockedError: Another one serves it.
    """
    file = _file(workspace)
    file.parent.mkdir(parents=True, exist_ok=True)
    with locked(file) as other:
        if other is not None:
            reason = f"is served by process {other.get('pid', '?')} already"
            raise LockedError(workspace.root, reason, "stop that one first")
        _end_those_of(read_note(file))
        own = Service(file)
        try:
            yield own
        finally:
            end_marked(own.mark)


def served_at(workspace: Workspace) -> Served | None:
    """Find the server by which a workspace, which must be locked, is served; None when it is not."""
    note = _who_serves(workspace) or {}
    return Served(note["url"], bool(note.get("own"))) if "url" in note else None


def history_of(workspace: Workspace) -> timedelta | None:
    """Read how long the latest desra serve wanted runs to be kept; None where there was none."""
    note = read_note(_file(workspace))
    return timedelta(seconds=note["history"]) if "history" in note else None


def end_leftovers(workspace: Workspace) -> None:
    """End the processes of a desra serve that was killed, if there are any."""
    note = read_note(_file(workspace))  # before the look at the lock: who serves from now on has another token
    if _who_serves(workspace) is None:
        _end_those_of(note)


def _end_those_of(note: dict[str, Any]) -> None:
    """End the processes of one that served."""
    if token := note.get("token"):
        end_marked({MARK: token})


def _who_serves(workspace: Workspace) -> dict[str, Any] | None:
    """Return the note of the one that serves a workspace; None where it is not served."""
    with contextlib.suppress(OSError):
        return holder(_file(workspace))
    return None


def _file(workspace: Workspace) -> Path:
    return workspace.prefect_home / "serve.lock"
