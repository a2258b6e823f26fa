"""What stands while desra serve is on: who serves a workspace, and the processes that belong to it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from desra_core.errors import LockedError
from desra_core.workspace import Workspace

# The environment variable by which the processes of desra serve are known, wherever they hang in the tree of processes.
MARK = "DESRA_SERVE"

_END_SECONDS = 10


class Standing:
    """Says that this process serves a workspace.

    Attributes
    ----------
    mark
        Environment variables for the processes that it starts.
    """

    def __init__(self, file: Any) -> None:
        self._file = file
        token = uuid.uuid4().hex
        self.mark = {MARK: token}
        self._told = {"pid": os.getpid(), "token": token, "url": None}
        self._write()

    def announce(self, url: str) -> None:
        """Say where the API of the server is, for runs that are started by hand."""
        self._told["url"] = url
        self._write()

    def _write(self) -> None:
        self._file.seek(0)
        self._file.truncate()
        json.dump(self._told, self._file)
        self._file.flush()


@contextlib.contextmanager
def standing(workspace: Workspace) -> Iterator[Standing]:
    """Be the one that serves a workspace; processes that a killed one has left are ended first.

    Raises
    ------
    LockedError
        Another one serves it.
    """
    _file(workspace).parent.mkdir(parents=True, exist_ok=True)
    _file(workspace).touch()
    with _file(workspace).open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = f"process {_read(workspace).get('pid', '?')}"
            raise LockedError(workspace.root, f"is served by {holder} already", "stop that one first") from None
        _end_those_of(workspace)
        yield Standing(file)
        file.seek(0)
        file.truncate()


def served_at(workspace: Workspace) -> str | None:
    """The address of the API by which a workspace is served; None when it is not."""
    try:
        with _file(workspace).open("r") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return _read(workspace).get("url")
    except OSError:
        pass
    return None


def end_leftovers(workspace: Workspace) -> None:
    """End the processes of a desra serve that was killed, if there are any."""
    with contextlib.suppress(OSError), _file(workspace).open("r") as file:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        _end_those_of(workspace)


def end_marked(mark: dict[str, str]) -> None:
    """Kill the processes whose environment says so, but for this one. Nothing of what they do is lost by that."""
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


def _end_those_of(workspace: Workspace) -> None:
    """End the processes of the latest desra serve."""
    if token := _read(workspace).get("token"):
        end_marked({MARK: token})


def _file(workspace: Workspace) -> Path:
    return workspace.prefect_home / "serve.lock"


def _read(workspace: Workspace) -> dict[str, Any]:
    try:
        told = json.loads(_file(workspace).read_bytes())
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}
