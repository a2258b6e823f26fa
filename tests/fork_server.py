"""Run commands in forks of a process that has imported everything, so that a start costs next to nothing.

`ForkServer` starts this file as a script, and sends commands to it.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import pkgutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

PATIENCE = 1200


class ForkServer:
    """A running fork server; it runs one command at a time."""

    def __init__(self, environment: dict[str, str]) -> None:
        ours, its = socket.socketpair()
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(its.fileno())], env=environment, pass_fds=[its.fileno()]
        )
        its.close()
        with ours:
            self._asking, self._answers = ours.makefile("w"), ours.makefile("r")

    def run(
        self,
        *arguments: str,
        environment: Mapping[str, str] = MappingProxyType({}),
        meanwhile: Callable[[int], object] = lambda _: None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end, or kill it after some minutes.

        Args:
            arguments: The command.
            environment: Variables beside those of the server.
            meanwhile: Called with the id of the command's process.
        """
        with TemporaryDirectory() as folder:
            output = {name: f"{folder}/{name}" for name in ("stdout", "stderr")}
            asked = {"arguments": arguments, "environment": dict(environment), "folder": os.getcwd()}
            self._asking.write(json.dumps(asked | output) + "\n")
            self._asking.flush()
            pid = int(self._answers.readline())
            killer = threading.Timer(PATIENCE, os.kill, (pid, signal.SIGKILL))
            killer.start()
            meanwhile(pid)
            code = int(self._answers.readline())
            killer.cancel()
            stdout, stderr = (Path(path).read_text(errors="replace") for path in output.values())
        return subprocess.CompletedProcess(list(arguments), code, stdout, stderr)

    def close(self) -> None:
        """End the server."""
        self._asking.close()
        self._answers.close()
        self._process.wait(timeout=60)


def serve(asked: socket.socket) -> None:
    """Fork for each command that arrives; return in each fork at once, and in the server when no more can arrive."""
    answers = asked.makefile("w")
    for line in asked.makefile("r"):
        command = json.loads(line)
        if not (child := os.fork()):
            begin(command)
            return
        print(child, file=answers, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)


def begin(command: dict[str, Any]) -> None:
    """Turn a fork into the process of a command."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in enumerate(("stdout", "stderr"), start=1):
        os.dup2(os.open(command[name], os.O_WRONLY | os.O_CREAT, 0o600), number)
    os.environ.update(command["environment"])
    os.chdir(command["folder"])
    sys.argv = ["desra", *command["arguments"]]
    sys.orig_argv = [sys.executable, "-m", "deployments.cli", *command["arguments"]]


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])
    for package in ("desra_core", "tasks", "flows", "deployments"):
        for module in pkgutil.walk_packages([f"{sys.path[0]}/{package}"], f"{package}."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    import PIL.Image
    from matplotlib.figure import Figure
    from prefect.settings import get_current_settings

    from deployments import cli
    from desra_core import third_party

    get_current_settings().flows.heartbeat_frequency = None  # as of runs that start their own server
    # Commands import these late.
    third_party.mend_basicsr()
    for name in ("basicsr.archs.rrdbnet_arch", "fastapi", "prefect.flow_engine", "prefect.task_engine",
                 "prefect.utilities.visualization", "spandrel", "torch._dynamo", "torchvision.models"):  # fmt: skip
        importlib.import_module(name)
    PIL.Image.init()
    Figure().subplots().figure.savefig(io.BytesIO(), format="svg")  # finds the fonts
    with socket.socket(fileno=int(sys.argv[1])) as asked:
        serve(asked)
    if sys.argv[0] == "desra":
        cli.run_as_process()
