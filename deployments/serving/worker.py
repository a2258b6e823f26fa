"""The Prefect worker of desra serve, and the runs that it starts."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from deployments.serving.connection import CONSOLE
from deployments.serving.processes import Child, elsewhere, end_marked

# The name of a worker on the server, up to that of the machine.
NAME = "desra serve on "

_END_SECONDS = 10


class Worker(Child):
    """A Prefect worker that takes the runs of a pool, one at a time.

    ``environment`` holds what the runs find in theirs beside that of this process; ``mark`` is that of desra serve;
    ``log`` takes the lines of worker and runs.
    """

    name = "the Prefect worker"

    def __init__(self, pool: str, environment: dict[str, str], mark: dict[str, str], log: Path) -> None:
        super().__init__(log)
        root, moved = str(Path(__file__).resolve().parents[2]), elsewhere()
        self._command = [sys.executable, "-m", "prefect", "worker", "start", "--type", "process", "--pool", pool,
                         "--limit", "1", "--name", NAME + socket.gethostname()]  # fmt: skip
        self._mark = mark | {"DESRA_SERVE_PART": "runs"}
        self._environment = {CONSOLE: "INFO"} | environment | moved | {
            "PREFECT_WORKER_QUERY_SECONDS": "5",
            # Runs have folders of their own, and are to find this very desra with this very Python.
            "PYTHONPATH": os.pathsep.join(filter(None, (root, moved.get("PYTHONPATH")))),
            "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))),
        }  # fmt: skip

    def start(self) -> None:
        """Start it; runs that an earlier one has started go on."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._spawn(self._command, os.environ | self._environment | self._mark)

    def stop(self) -> None:
        """Kill it with all runs."""
        end_marked(self._mark)
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_SECONDS)


@contextlib.contextmanager
def prefect_worker(pool: str, environment: dict[str, str], mark: dict[str, str], log: Path) -> Iterator[Worker]:
    """Have a worker, as `Worker` says."""
    worker = Worker(pool, environment, mark, log)
    try:
        worker.start()
        yield worker
    finally:
        worker.stop()
