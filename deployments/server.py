"""A real Prefect server for the length of a run, where no other is configured.

Prefect's own ephemeral server loses task runs and survives a killed driver. This one is a child process on a free
loopback port, with its database in the workspace; the next run ends one that a killed run left behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import httpx
import psutil

from desra_core.errors import UsageError
from desra_core.workspace import Workspace

_START_SECONDS = 90
_STOP_SECONDS = 15
_ARRIVAL_SECONDS = 20
# The system's idea of when a process started moves with its clock.
_CLOCK_SECONDS = 5


@contextlib.contextmanager
def prefect_server(workspace: Workspace) -> Iterator[str]:
    """Make sure that Prefect has a server, and yield the address of its API.

    Sets environment variables that Prefect reads when it is imported; call it before. The workspace must be locked.

    Raises
    ------
    UsageError
        The configured server does not answer, or none can be started.
    """
    if configured := os.environ.get("PREFECT_API_URL"):
        _check(configured)
        yield configured
        return
    home = workspace.prefect_home
    home.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    os.environ.update(
        PREFECT_HOME=str(home),
        PREFECT_SERVER_ANALYTICS_ENABLED="false",
        PREFECT_SERVER_LOGGING_LEVEL="WARNING",
        DO_NOT_TRACK="1",
    )
    server = _started(home, port)
    try:
        os.environ["PREFECT_API_URL"] = url
        import_module("prefect")  # takes a second, while the server starts
        _wait_until_healthy(server, url, home)
        yield url
    finally:
        if "prefect" in sys.modules:
            _drain()
        os.environ.pop("PREFECT_API_URL", None)
        _end(server.pid)
        server.wait()
        (home / "server.json").unlink(missing_ok=True)


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


def _drain() -> None:
    """Send the events and logs that Prefect still holds back."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    EventsWorker.drain_all(timeout=_ARRIVAL_SECONDS)
    APILogWorker.drain_all(timeout=_ARRIVAL_SECONDS)


def _started(home: Path, port: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (home / "server.log").open("wb") as log:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    started = psutil.Process(server.pid).create_time()
    (home / "server.json").write_text(json.dumps({"pid": server.pid, "started": started, "port": port}))
    return server


def _wait_until_healthy(server: subprocess.Popen[bytes], url: str, home: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            httpx.get(f"{url}/health", timeout=2).raise_for_status()
            return
        time.sleep(0.05)
    raise UsageError(home / "server.log", "the Prefect server did not start", "read that log")


def _check(url: str) -> None:
    try:
        httpx.get(f"{url}/health", timeout=10)  # any answer will do: some servers want a key first
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        reason = f"no Prefect server answers ({error})"
        raise UsageError(f"PREFECT_API_URL={url}", reason, "start it, or unset the variable") from None


def end_leftover_server(workspace: Workspace) -> None:
    """Stop the server that a killed run left behind. The workspace must be locked."""
    try:
        left = json.loads((workspace.prefect_home / "server.json").read_bytes())
        process = psutil.Process(left["pid"])
        # The pid may be another program's by now.
        if abs(process.create_time() - left["started"]) < _CLOCK_SECONDS:
            _end(process.pid)
        (workspace.prefect_home / "server.json").unlink(missing_ok=True)
    except (OSError, ValueError, KeyError, psutil.Error):
        pass


def _end(pid: int) -> None:
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
