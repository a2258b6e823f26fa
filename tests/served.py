"""A running `desra serve`, for tests of what it does and of what it shows."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import httpx
import psutil
from distributed.security import Security

from deployments.serving.processes import MARK, Child
from desra_core.errors import UsageError
from desra_core.workspace import Workspace
from tasks.dask_cluster import _try_connection
from tests.conftest import desra_command

DEAD = "127.0.0.1:9"
PATIENCE = 600
FINAL = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


class Served:
    """A running `desra serve`, and what its server knows."""

    def __init__(self, folder: Path, config: Path) -> None:
        self._said = folder / f"said-{len(list(folder.glob('said-*')))}"
        environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
        with self._said.open("wb") as said:
            self.process = subprocess.Popen(desra_command("serve", config), env=environment, stdout=said, stderr=said)
        self.workspace = Workspace(folder / "ws")
        self.url = ""

    @property
    def ui(self) -> str:
        """Where people watch, once their browser has the key."""
        return self.url.removesuffix("/api").replace(f"{self.key}@", "")

    @property
    def entrance(self) -> str:
        """What a browser opens to get in."""
        return f"{self.ui}/enter#{self.key}"

    def said(self) -> str:
        return self._said.read_text()

    def is_up(self) -> bool:
        assert self.process.poll() is None, self.said()
        if "Ctrl-C stops" not in self.said():
            return False
        told = json.loads((self.workspace.prefect_home / "serve.lock").read_bytes())
        self.key = (self.workspace.prefect_home / "key").read_text()
        self.url, self.token = told["url"].replace("//", f"//{self.key}@"), told["token"]
        return True

    def runs(self, **state: list[str]) -> list[dict[str, Any]]:
        """Runs of deployments, the newest first."""
        query = {"flow_runs": {"state": state, "deployment_id": {"is_null_": False}}, "sort": "START_TIME_DESC"}
        try:
            found = httpx.post(f"{self.url}/flow_runs/filter", json=query, timeout=30).raise_for_status().json()
        except httpx.HTTPError:
            return []
        return [run for run in found if run["start_time"]]

    def ended(self, word: str) -> dict[str, Any] | None:
        """The latest run that ended by saying so."""
        return next((run for run in self.runs(type={"any_": FINAL}) if word in (run["state"]["message"] or "")), None)

    def start(self, flow: str) -> str:
        deployment = httpx.get(f"{self.url}/deployments/name/{flow}/ws").json()
        return httpx.post(f"{self.url}/deployments/{deployment['id']}/create_flow_run", json={}).json()["id"]

    def run(self, run_id: str) -> dict[str, Any]:
        try:
            return httpx.get(f"{self.url}/flow_runs/{run_id}", timeout=30).json()
        except httpx.HTTPError:
            return {"state": {"type": "UNKNOWN"}}

    def processes(self) -> list[psutil.Process]:
        return marked(self.token)

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Send a signal, and wait until the process has ended."""
        self.process.send_signal(number)
        self.process.wait(timeout=60)


def marked(token: str) -> list[psutil.Process]:
    found = []
    for candidate in psutil.process_iter():
        try:
            if candidate.environ().get(MARK) == token:
                found.append(candidate)
        except psutil.Error:
            pass
    return found


def until(condition: Callable[[], Any]) -> Any:
    """Wait until something holds; returns it."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.2)
    raise AssertionError("it never came true")


SLEEP = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]


def knock(scheduler: str, security: Security | None = None) -> None:
    """Try to connect to a scheduler; raise `OSError` or `TypeError` where it lets nobody in.

    A ``Client`` that fails to connect can deadlock when it is collected as garbage.
    """

    asyncio.run(_try_connection(scheduler, security or Security()))


def sleeping(mark: dict[str, str]) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(SLEEP, env=os.environ | mark, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    return process


def is_gone(process: subprocess.Popen[bytes]) -> bool:
    """`end_marked` waits for processes itself, also for those of this test."""
    return not psutil.pid_exists(process.pid) and process.wait() is not None


class HttpProxy(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def log_message(self, *_: object) -> None:
        pass


class Failing(Child):
    """A process that does not even start the first time, or with `always` ever, and else ends at once."""

    name = "the process"
    exit_code = -11

    def __init__(self, *, always: bool = False) -> None:
        super().__init__(Path("process.log"))
        self.starts = 0
        self.always = always

    def start(self) -> None:
        self.starts += 1
        if self.starts == 1 or self.always:
            raise UsageError(self.log, "the process did not start", "read that log")
