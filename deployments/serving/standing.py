"""What stands while desra serve is on: who serves a workspace, and the processes that belong to it."""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import psutil

from desra_core.errors import LockedError, UsageError
from desra_core.files.locks import holder, locked, read_note
from desra_core.workspace import Workspace
from tasks.logs import say

# A process that ends by itself so often within so long is not started again.
_MOST_STARTS, _STEADY_SECONDS = 5, 300.0

# The environment variable by which the processes of desra are known, wherever they hang in the tree of processes: a pid
# may be another program's by now, and when a process began moves with the clock.
MARK = "DESRA_SERVE"

_END_SECONDS = 10


def new_mark() -> dict[str, str]:
    """A mark that no process has yet."""
    return {MARK: uuid.uuid4().hex}


class RestlessError(UsageError):
    """A process ends again and again."""


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

    def __init__(self, file: Path) -> None:
        self._file = file
        self.mark = new_mark()
        self._told: dict[str, Any] = {"pid": os.getpid(), "token": self.mark[MARK]}
        self._write()

    def announce(self, served: Served, history: timedelta) -> None:
        """Say which server it is and how long it keeps runs, for runs that are started by hand."""
        self._told |= {**served._asdict(), "history": history.total_seconds()}
        self._write()

    def _write(self) -> None:
        self._file.write_text(json.dumps(self._told))


@contextlib.contextmanager
def standing(workspace: Workspace) -> Iterator[Standing]:
    """Be the one that serves a workspace; processes that a killed one has left are ended first.

    Raises
    ------
    LockedError
        Another one serves it.
    """
    file = _file(workspace)
    file.parent.mkdir(parents=True, exist_ok=True)
    with locked(file) as other:
        if other is not None:
            reason = f"is served by process {other.get('pid', '?')} already"
            raise LockedError(workspace.root, reason, "stop that one first")
        _end_those_of(read_note(file))
        own = Standing(file)
        try:
            yield own
        finally:
            end_marked(own.mark)


def served_at(workspace: Workspace) -> Served | None:
    """The server by which a workspace is served; None when it is not. The workspace must be locked."""
    told = _who_serves(workspace) or {}
    return Served(told["url"], bool(told.get("own"))) if "url" in told else None


def history_of(workspace: Workspace) -> timedelta | None:
    """How long the latest desra serve wanted runs to be kept; None where there was none."""
    told = read_note(_file(workspace))
    return timedelta(seconds=told["history"]) if "history" in told else None


def end_leftovers(workspace: Workspace) -> None:
    """End the processes of a desra serve that was killed, if there are any."""
    told = read_note(_file(workspace))  # before the look at the lock: who serves from now on has another token
    if _who_serves(workspace) is None:
        _end_those_of(told)


class Standby(Protocol):
    """A process that is started again when it ends by itself."""

    name: str
    log: Path

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""

    def start(self) -> None:
        """Start it, or start it again."""


def start_again(process: Standby, starts: list[float], now: float, wait: Callable[[float], object]) -> None:
    """Start a process that has ended by itself, after a pause that grows.

    Parameters
    ----------
    process
        What has ended.
    starts
        When it was started again before, in seconds of the clock that `now` is of; kept up.
    now
        The present.
    wait
        Waits for so many seconds.

    Raises
    ------
    UsageError
        It ends again and again; with that, it is not started.
    DesraError, OSError
        What starting it raises.
    """
    starts[:] = [start for start in starts if now - start < _STEADY_SECONDS] + [now]
    if len(starts) > _MOST_STARTS:
        raise RestlessError(process.log, f"{process.name} ends again and again", "read that log")
    pause = 2 ** len(starts)  # for a cause that passes
    told = f"warning: {process.name} has ended (exit code {process.exit_code}), and is started again in {pause} s"
    say(f"{told}; its log is {process.log}")
    wait(pause)
    began = time.monotonic()
    try:
        process.start()
    finally:  # what a start takes, be it ten minutes, is no time in which the process was steady
        starts[:] = [start + time.monotonic() - began for start in starts]


def elsewhere() -> dict[str, str]:
    """What a process of Python needs in its environment to be started in another folder than this one.

    Relative paths would mean others there, and modules are not to be looked for there.
    """
    told = {"PYTHONSAFEPATH": "1"}
    for name in ("PYTHONPATH", "TMPDIR"):
        if given := os.environ.get(name):
            told[name] = os.pathsep.join(map(os.path.abspath, given.split(os.pathsep)))
    return told


def end_marked(mark: dict[str, str]) -> None:
    """Kill the processes whose environment says so, but for this one. Nothing of what they do is lost by that.

    One that cannot be killed, as it waits for a disk that has gone, is left alone in the end.
    """
    deadline = time.monotonic() + _END_SECONDS
    # Again and again: one of them may just have started another one.
    while (found := _marked(mark)) and time.monotonic() < deadline:
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(found, timeout=_END_SECONDS)


def _marked(mark: dict[str, str]) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and mark.items() <= process.environ().items():
                found.append(process)
    return found


def _end_those_of(told: dict[str, Any]) -> None:
    """End the processes of one that served."""
    if token := told.get("token"):
        end_marked({MARK: token})


def _who_serves(workspace: Workspace) -> dict[str, Any] | None:
    """Return the note of the one that serves a workspace; None where it is not served."""
    with contextlib.suppress(OSError):
        return holder(_file(workspace))
    return None


def _file(workspace: Workspace) -> Path:
    return workspace.prefect_home / "serve.lock"
