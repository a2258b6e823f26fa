"""Start processes, restart those that end by themselves, and end all of them, which are known by a mark.

A locked file in the workspace names the process of desra serve, its mark, and its Prefect server.
"""

import contextlib
import json
import os
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, Self

import psutil

from desra_core.errors import LockedError, UsageError
from desra_core.files import holder, locked, read_document, this_machine
from desra_core.workspace import Workspace
from tasks.logs import say

# The environment variable that marks the processes of desra. Neither pid nor start time would do: another program may
# have the pid by now, and start times move with the clock.
MARK = "DESRA_SERVE"

# A process that is just being replaced by a program (exec) shows no environment for less than this.
_EXEC_SECONDS = 0.1

# A process that ends by itself more often than this, within this time, is not started again.
_MOST_STARTS, _STEADY_SECONDS = 5, 300.0
_END_SECONDS, _STOP_SECONDS = 10, 15


class RestlessError(UsageError):
    """A process ends again and again."""


class Child:
    """A process with a log, and a name for messages. It runs in the folder of its log, since others may vanish."""

    name: str

    def __init__(self, log: Path) -> None:
        self.log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._restarts: list[float] = []  # the times of the latest restarts

    @property
    def exit_code(self) -> int | None:
        """Exit code of the process, below zero where a signal ended it; None while it runs."""
        return self._process.poll() if self._process else None

    def start(self) -> None:
        """Start the process, or start it again."""
        raise NotImplementedError

    def stop(self) -> None:
        """Stop the process."""
        raise NotImplementedError

    @contextlib.contextmanager
    def running(self) -> Iterator[Self]:
        """Start the process for the block, and stop it at the end."""
        try:
            self.start()
            yield self
        finally:
            self.stop()

    def start_again(self, now: float, wait: Callable[[float], object]) -> None:
        """Start the process again after it has ended by itself; the pause before the start grows each time.

        Args:
            now: The time of `time.monotonic`.
            wait: Waits for a number of seconds.

        Raises:
            RestlessError: The process ends again and again, and is not started any more.
            DesraError, OSError: Errors of the start.
        """
        self._restarts = [moment for moment in self._restarts if now - moment < _STEADY_SECONDS] + [now]
        if len(self._restarts) > _MOST_STARTS:
            raise RestlessError(self.log, f"{self.name} ends again and again", "read that log")
        pause = 2 ** len(self._restarts)  # gives the cause time to pass
        ended = f"{self.name} has ended (exit code {self.exit_code})"
        say(f"warning: {ended}, and is started again in {pause} s; its log is {self.log}")
        wait(pause)
        began = time.monotonic()
        try:
            self.start()
        finally:  # the time of a start does not count as steady: move the earlier restarts by as much
            self._restarts = [moment + time.monotonic() - began for moment in self._restarts]

    def _spawn(self, command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                env=environment,
                cwd=self.log.parent,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # so that Ctrl-C in the terminal reaches only this process
            )
        return self._process


def new_mark() -> dict[str, str]:
    """Make a mark that no process has yet, as an environment variable."""
    return {MARK: uuid.uuid4().hex}


def for_other_folder() -> dict[str, str]:
    """Make the environment for a Python in another folder: absolute paths, and no modules from that folder."""
    given = {name: os.environ[name] for name in ("PYTHONPATH", "TMPDIR") if os.environ.get(name)}
    absolute = {name: os.pathsep.join(map(os.path.abspath, paths.split(os.pathsep))) for name, paths in given.items()}
    return {"PYTHONSAFEPATH": "1"} | absolute


def environments() -> Iterator[tuple[psutil.Process, dict[str, str]]]:
    """Yield this user's processes, each with its environment; other users' processes show none."""
    starting = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if environment := process.environ():
                yield process, environment
            else:
                starting.append(process)
    if starting:
        time.sleep(_EXEC_SECONDS)
    for process in starting:
        with contextlib.suppress(psutil.Error):
            yield process, process.environ()


def end_marked(mark: dict[str, str]) -> None:
    """Kill the processes whose environment has a mark, except this process; no finished work is lost.

    A process that cannot be killed within 10 s, because it waits for a disk that has gone, is left alone.
    """

    def marked() -> list[psutil.Process]:
        found = environments()
        return [each for each, environment in found if mark.items() <= environment.items() and each.pid != os.getpid()]

    deadline = time.monotonic() + _END_SECONDS
    # Look again after each kill: a process may just have started another one.
    while (found := marked()) and time.monotonic() < deadline:
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(found, timeout=_END_SECONDS)


def end_process(pid: int) -> None:
    """Stop a process and its children."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        left = [*process.children(recursive=True), process]
        for end in (psutil.Process.terminate, psutil.Process.kill):
            for member in left:
                with contextlib.suppress(psutil.Error):
                    end(member)
            _, left = psutil.wait_procs(left, timeout=_STOP_SECONDS)


class Served(NamedTuple):
    """The Prefect server of a workspace: the URL of its API, and whether desra serve started it (with a key)."""

    url: str
    own: bool


class Service:
    """This process, as it serves a workspace; the processes that it starts have ``mark`` in their environment."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.mark = new_mark()
        me = {"pid": os.getpid(), "host": socket.gethostname(), "machine": this_machine()}
        self._note: dict[str, Any] = me | {"token": self.mark[MARK]}
        self._file.write_text(json.dumps(self._note))

    def announce(self, served: Served, history: timedelta) -> None:
        """Write the server, and how long it keeps runs, to the locked file, for runs that are started by hand."""
        self._note |= {**served._asdict(), "history": history.total_seconds()}
        self._file.write_text(json.dumps(self._note))


@contextlib.contextmanager
def serving_alone(workspace: Workspace) -> Iterator[Service]:
    """Serve a workspace as the only process; first end the processes that a killed desra serve has left.

    Raises:
        LockedError: Another process serves the workspace.
    """
    file = _file(workspace)
    file.parent.mkdir(parents=True, exist_ok=True)
    with locked(file) as other:
        if other is not None:
            reason = f"is served by process {other.get('pid', '?')} already"
            raise LockedError(workspace.root, reason, "stop that one first")
        if token := read_document(file).get("token"):
            end_marked({MARK: token})
        own = Service(file)
        try:
            yield own
        finally:
            end_marked(own.mark)


def served_at(workspace: Workspace) -> Served | None:
    """Find the Prefect server of the desra serve of a workspace, which must be locked; None without desra serve.

    Raises:
        UsageError: It is on another machine, where it answers to that machine alone.
    """
    note = _who_serves(workspace) or {}
    served = Served(note["url"], bool(note.get("own"))) if "url" in note else None
    if served and served.own and note.get("machine", here := this_machine()) != here:
        reason = f"is served by desra serve on {note.get('host')}, whose Prefect server answers only there"
        raise UsageError(workspace.root, reason, "run on that host, or stop it first")
    return served


def history_of(workspace: Workspace) -> timedelta | None:
    """Read the setting ``history`` of the latest desra serve, how long runs stay; None where there was none."""
    note = read_document(_file(workspace))
    return timedelta(seconds=note["history"]) if "history" in note else None


def end_leftovers(workspace: Workspace) -> None:
    """End the processes of a desra serve that was killed, if there are any."""
    note = read_document(_file(workspace))  # read before the lock is checked: a new desra serve has another token
    if note.get("token") and _who_serves(workspace) is None:
        end_marked({MARK: note["token"]})


def _who_serves(workspace: Workspace) -> dict[str, Any] | None:
    """Return the note of the process that serves a workspace; None where there is none."""
    with contextlib.suppress(OSError):
        return holder(_file(workspace))
    return None


def _file(workspace: Workspace) -> Path:
    return workspace.prefect_home / "serve.lock"
