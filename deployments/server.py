"""A real Prefect server, for the length of a run or of desra serve, where no other is configured.

Prefect's own ephemeral server loses task runs and survives a killed driver. This one is a child process on a loopback
port, with its database in the workspace; the next run ends one that a killed run left behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from importlib import import_module
from pathlib import Path

import httpx
import psutil

from deployments.guarded import ENTRANCE, HOSTS
from deployments.interrupted import mark_killed
from deployments.retention import HISTORY, compact, forget_results, server_settings
from deployments.standing import MARK, end_leftovers, end_marked, history_of, new_mark, served_at
from desra_core.atomic import write_secret
from desra_core.errors import UsageError
from desra_core.workspace import Workspace

# Prefect's clients send it to the server, and read it from their environment, which nobody else on a machine can.
_KEY = "PREFECT_API_AUTH_STRING"

_START_SECONDS = 90
_STOP_SECONDS = 15
_ARRIVAL_SECONDS = 20


@contextlib.contextmanager
def prefect_server(workspace: Workspace) -> Iterator[str]:
    """Make sure that Prefect has a server, and yield the address of its API.

    That is the one that is configured, or that of desra serve for this workspace, or one for the length of this run.
    Sets environment variables that Prefect reads when it is imported; call it before. The workspace must be locked.

    Raises
    ------
    UsageError
        The configured server does not answer, none can be started, or the key of that of desra serve is not ours.
    """
    if configured := os.environ.get("PREFECT_API_URL"):
        check_server(configured)
        yield configured
        return
    if served := served_at(workspace):
        configure(workspace, served, _read_key(workspace))
        yield served
        return
    server = Server(workspace, history=history_of(workspace) or HISTORY)
    try:
        server.start()
        _tell_killed(workspace, server.url)
        yield server.url
    finally:
        server.stop()


class Server:
    """A Prefect server on this machine, with its home in a workspace, for the one who can read its key there.

    Parameters
    ----------
    workspace
        Must be locked when the server is first started.
    port
        To listen on; any free one by default.
    history
        How long it keeps runs.
    mark
        Environment variables of its process, by which it is known.

    Attributes
    ----------
    url
        Address of its API.
    log
        What it prints.

    Raises
    ------
    UsageError
        Somebody else listens on the port.
    """

    name = "the Prefect server"

    def __init__(
        self,
        workspace: Workspace,
        *,
        port: int = 0,
        history: timedelta,
        mark: dict[str, str] | None = None,
    ) -> None:
        self._workspace = workspace
        self._home = workspace.prefect_home
        self.log = self._home / "server.log"
        self._history = history
        self._mark = mark or new_mark()
        self._key = f"desra:{secrets.token_urlsafe(32)}"
        self._process: subprocess.Popen[bytes] | None = None
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that has just ended may linger
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                raise UsageError(f"--port {port}", f"cannot be had ({error.strerror})", "give another one") from None
            self._port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}/api"

    @property
    def exit_code(self) -> int | None:
        """That of the process, which is below zero where a signal ended it; None while it runs."""
        return self._process.poll() if self._process else None

    def start(self) -> None:
        """Start it, or start it again, and wait until it answers.

        Raises
        ------
        UsageError
            It does not.
        """
        self._home.mkdir(parents=True, exist_ok=True)
        compact(self._home)
        forget_results(self._home, self._history)
        write_secret(_key_file(self._workspace), self._key)
        configure(self._workspace, self.url, self._key)
        self._launch()
        import_module("prefect")  # takes a second, while the server starts
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and self.exit_code is None:
            with contextlib.suppress(httpx.HTTPError):
                httpx.get(f"{self.url}/health", timeout=2).raise_for_status()
                return
            time.sleep(0.05)
        raise UsageError(self.log, "the Prefect server did not start", "read that log")

    def stop(self) -> None:
        """Stop it, when it has got all that this process has to tell."""
        if "prefect" in sys.modules and self._process is not None and self.exit_code is None:
            _drain()
        for name in ("PREFECT_API_URL", _KEY):
            os.environ.pop(name, None)
        if self._process is not None:
            end_process(self._process.pid)
            self._process.poll()
        for path in (self._home / "server.json", _key_file(self._workspace)):
            path.unlink(missing_ok=True)

    def _launch(self) -> None:
        command = [sys.executable, "-m", "uvicorn", "--factory", "deployments.guarded:create_app",
                   "--app-dir", str(Path(__file__).resolve().parents[1]), "--host", "127.0.0.1",
                   "--port", str(self._port), "--log-level", "warning"]  # fmt: skip
        guard = {
            "PREFECT_SERVER_API_AUTH_STRING": self._key,
            "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": ",".join(f"http://{host}:{self._port}" for host in HOSTS),
        }
        # Who knows better has the last word, but on who may enter.
        environment = server_settings(self._history) | os.environ | self._mark | guard
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        (self._home / "server.json").write_text(json.dumps({"pid": self._process.pid, "token": self._mark[MARK]}))


def watch_at(workspace: Workspace, url: str) -> str:
    """Where a browser watches a server; one of ours gets its key there, from behind the ``#``, which is never sent.

    Parameters
    ----------
    workspace
        That of the run.
    url
        Of the API.
    """
    page = url.removesuffix("/api")
    with contextlib.suppress(OSError):
        if os.environ.get(_KEY) == (key := _key_file(workspace).read_text()):
            return f"{page}{ENTRANCE}#{key}"
    return page


def configure(workspace: Workspace, url: str, key: str) -> None:
    """Tell Prefect, in this process and in those that it starts, of a server with its home in a workspace."""
    # A proxy for the world is none for this machine.
    direct = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    direct = f"{direct},127.0.0.1" if direct else "127.0.0.1"
    os.environ.update(
        no_proxy=direct,
        NO_PROXY=direct,
        PREFECT_HOME=str(workspace.prefect_home),
        PREFECT_API_URL=url,
        PREFECT_API_AUTH_STRING=key,
        PREFECT_SERVER_ANALYTICS_ENABLED="false",
        PREFECT_SERVER_LOGGING_LEVEL="WARNING",
        PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT="false",
        DO_NOT_TRACK="1",
    )


def wait_for_task_runs(flow_run_id: str, expected: int) -> bool:
    """Wait until the server knows how each task run of a flow run ended.

    Returns
    -------
    False when they have not all arrived in good time.
    """
    from prefect.client.orchestration import get_client

    _drain()
    query = {
        "flow_runs": {"id": {"any_": [flow_run_id]}},
        "task_runs": {"state": {"type": {"any_": ["COMPLETED", "FAILED", "CRASHED", "CANCELLED"]}}},
    }
    deadline = time.monotonic() + _ARRIVAL_SECONDS
    with get_client(sync_client=True) as client:  # it knows of keys and passwords
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError):
                if client.request("POST", "/task_runs/count", json=query).json() >= expected:
                    return True
            time.sleep(0.1)
    return False


def check_server(url: str) -> None:
    """See that a configured server answers.

    Raises
    ------
    UsageError
        It does not.
    """
    try:
        httpx.get(f"{url}/health", timeout=10)  # any answer will do: some servers want a key first
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        reason = f"no Prefect server answers ({error})"
        raise UsageError(f"PREFECT_API_URL={url}", reason, "start it, or unset the variable") from None


def end_leftover_server(workspace: Workspace) -> None:
    """Stop the server that a killed run left behind. The workspace must be locked."""
    if served_at(workspace):
        return
    end_leftovers(workspace)
    left = workspace.prefect_home / "server.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        end_marked({MARK: json.loads(left.read_bytes())["token"]})
    left.unlink(missing_ok=True)


def end_process(pid: int) -> None:
    """Stop a process and its children."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        family = [*process.children(recursive=True), process]
        for member in family:
            with contextlib.suppress(psutil.Error):
                member.terminate()
        _, alive = psutil.wait_procs(family, timeout=_STOP_SECONDS)
        for member in alive:
            with contextlib.suppress(psutil.Error):
                member.kill()
        psutil.wait_procs(alive, timeout=_STOP_SECONDS)


def _tell_killed(workspace: Workspace, url: str) -> None:
    """Tell the server of a workspace, which must be locked, of runs that people had started and that were killed."""
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

    with (
        contextlib.suppress(httpx.HTTPError),
        # Prefect may have been imported before.
        temporary_settings({PREFECT_API_URL: url, PREFECT_API_AUTH_STRING: os.environ[_KEY]}),
        get_client(sync_client=True) as client,
    ):
        mark_killed(workspace.root, client)


def _key_file(workspace: Workspace) -> Path:
    return workspace.prefect_home / "key"


def _read_key(workspace: Workspace) -> str:
    """The key of the server that stands in a workspace.

    Raises
    ------
    UsageError
        It cannot be read: somebody else has started that server.
    """
    path = _key_file(workspace)
    try:
        return path.read_text()
    except OSError as error:
        reason = f"the key of the Prefect server cannot be read ({error.strerror})"
        raise UsageError(path, reason, "run as the one who has started desra serve") from None


def _drain() -> None:
    """Send the events and logs that Prefect still holds back."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    EventsWorker.drain_all(timeout=_ARRIVAL_SECONDS)
    APILogWorker.drain_all(timeout=_ARRIVAL_SECONDS)
