"""The Prefect worker of desra serve: its environment, and how it ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil

from deployments.serving import serve
from deployments.serving.processes import new_mark
from deployments.serving.retention import HISTORY
from deployments.serving.server import Server
from deployments.serving.worker import prefect_worker
from desra_core.workspace import Workspace


def test_a_worker_ends_with_what_it_has_started(tmp_path) -> None:
    mark = new_mark()
    beside = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env=os.environ | mark)
    with prefect_worker("pool", {}, mark, tmp_path / "ws" / "worker.log") as worker:
        environment = worker._environment | worker._mark
        run = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env=os.environ | environment)
        assert worker.exit_code is None
    assert worker.exit_code is not None
    assert run.wait(timeout=10) is not None
    assert beside.poll() is None
    beside.communicate(b"\n")
    run.stdin.close()


def test_relative_paths_of_the_environment_stay_what_they_are(tmp_path, monkeypatch) -> None:
    """Worker and server have folders of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "lib:/abs")
    monkeypatch.setenv("TMPDIR", "scratch")
    workspace = Workspace(tmp_path / "ws")
    workspace.prefect_home.mkdir(parents=True)
    server = Server(workspace, history=HISTORY)
    with prefect_worker("pool", {}, new_mark(), workspace.prefect_home / "worker.log") as worker:
        server._launch()
        for process in (worker._process, server._process):
            told = psutil.Process(process.pid).environ()
            assert told["PYTHONPATH"].endswith(f"{tmp_path / 'lib'}:/abs")
            assert told["TMPDIR"] == str(tmp_path / "scratch")
            assert told["PYTHONSAFEPATH"] == "1"
    server.stop()


def test_runs_find_this_desra_with_this_python(tmp_path) -> None:
    with prefect_worker("pool", {}, new_mark(), tmp_path / "worker.log") as worker:
        found = subprocess.run(
            ["python", "-c", "import sys, deployments; print(sys.executable, deployments.__file__)"],
            cwd=tmp_path, env=os.environ | worker._environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
    python, module = found.stdout.split()
    assert Path(python).parent == Path(sys.executable).parent
    assert Path(module) == Path(serve.__file__).parents[1] / "__init__.py"
