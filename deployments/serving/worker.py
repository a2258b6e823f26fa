"""The Prefect worker of desra serve, and the runs that it starts."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from deployments.serving.standing import elsewhere, end_marked

# Of what Prefect, and by its doing Dask, print.
CONSOLE = "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"
# How a worker is called on the server.
NAME = "desra serve on "

_QUERY_SECONDS = 5
_END_SECONDS = 10


class Worker:
    """A Prefect worker that takes the runs of a pool, one at a time.

    Parameters
    ----------
    pool
        The work pool.
    environment
        What the runs are to find in their environment, beside that of this process.
    mark
        The mark of desra serve.
    log
        What worker and runs print.
    """

    name = "the Prefect worker"

    def __init__(self, pool: str, environment: dict[str, str], mark: dict[str, str], log: Path) -> None:
        root, moved = str(Path(__file__).resolve().parents[2]), elsewhere()
        self._command = [sys.executable, "-m", "prefect", "worker", "start", "--type", "process", "--pool", pool,
                         "--limit", "1", "--name", NAME + socket.gethostname()]  # fmt: skip
        self._mark = mark | {"DESRA_SERVE_PART": "runs"}
        self._environment = (
            {CONSOLE: "INFO"}
            | environment
            | moved
            | {
                "PREFECT_WORKER_QUERY_SECONDS": str(_QUERY_SECONDS),
                # Runs have folders of their own, and are to find this very desra with this very Python.
                "PYTHONPATH": os.pathsep.join(filter(None, (root, moved.get("PYTHONPATH")))),
                "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))),
            }
        )
        self.log = log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def exit_code(self) -> int | None:
        """That of the process, which is below zero where a signal ended it; None while it runs."""
        return self._process.poll() if self._process else None

    def start(self) -> None:
        """Start it; runs that an earlier one has started go on."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                env=os.environ | self._environment | self._mark,
                cwd=self.log.parent,  # the folder of desra serve may go meanwhile
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a Ctrl-C in the terminal is for desra serve
            )

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
