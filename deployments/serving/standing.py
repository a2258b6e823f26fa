"""Who serves a workspace: a locked file names the process, the mark of all that it starts, and its Prefect server."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, NamedTuple

from deployments.serving.processes import MARK, end_marked, new_mark
from desra_core.errors import LockedError
from desra_core.files.atomic import flocked
from desra_core.workspace import Workspace


class Served(NamedTuple):
    """The Prefect server by which a workspace is served.

    Attributes
    ----------
    url
        Of its API.
    own
        Whether desra serve has started it, so that its key lies in the workspace.
    """

    url: str
    own: bool


class Standing:
    """Says that this process serves a workspace.

    Attributes
    ----------
    mark
        Environment variables for the processes that it starts.
    """

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self.mark = new_mark()
        self._content: dict[str, Any] = {"pid": os.getpid(), "token": self.mark[MARK]}
        self._write()

    def announce(self, served: Served, history: timedelta) -> None:
        """Write down which server it is and how long it keeps runs, for runs that are started by hand."""
        self._content |= {**served._asdict(), "history": history.total_seconds()}
        self._write()

    def _write(self) -> None:
        self._file.seek(0)
        self._file.truncate()
        json.dump(self._content, self._file)
        self._file.flush()


@contextlib.contextmanager
def standing(workspace: Workspace) -> Iterator[Standing]:
    """Be the one that serves a workspace; processes that a killed one has left are ended first.

    Raises
    ------
    LockedError
        Another one serves it.
    """
    _path(workspace).parent.mkdir(parents=True, exist_ok=True)
    _path(workspace).touch()
    with _path(workspace).open("r+") as file:
        while not flocked(file, fcntl.LOCK_EX):
            free, content = _look(workspace)
            if not free:
                reason = f"is served by process {content.get('pid', '?')} already"
                raise LockedError(workspace.root, reason, "stop that one first")
            time.sleep(0.01)  # another process only looked who serves it
        _end_those_of(_read(file))
        own = Standing(file)
        try:
            yield own
        finally:
            end_marked(own.mark)


def served_at(workspace: Workspace) -> Served | None:
    """Find the server by which a workspace, which must be locked, is served; None when it is not."""
    free, content = _look(workspace)
    return None if free or "url" not in content else Served(content["url"], bool(content.get("own")))


def history_of(workspace: Workspace) -> timedelta | None:
    """Read how long the latest desra serve wanted runs to be kept; None where there was none."""
    _, content = _look(workspace)
    return timedelta(seconds=content["history"]) if "history" in content else None


def end_leftovers(workspace: Workspace) -> None:
    """End the processes of a desra serve that was killed, if there are any."""
    free, content = _look(workspace)
    if free:
        _end_those_of(content)  # who serves from now on has another token


def _look(workspace: Workspace) -> tuple[bool, dict[str, Any]]:
    """Whether no process serves a workspace, and what the latest one that did has written."""
    with contextlib.suppress(OSError), _path(workspace).open("r") as file:
        return flocked(file, fcntl.LOCK_SH), _read(file)
    return True, {}


def _end_those_of(content: dict[str, Any]) -> None:
    if token := content.get("token"):
        end_marked({MARK: token})


def _path(workspace: Workspace) -> Path:
    return workspace.prefect_home / "serve.lock"


def _read(file: IO[str]) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        content = json.load(file)
        return content if isinstance(content, dict) else {}
    return {}
