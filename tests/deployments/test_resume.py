"""Runs that are killed, and what the next one finds."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from prefect.exceptions import TerminationSignal
from typer import Exit

from deployments.cli import run_and_exit
from deployments.serving.schedules import INTERRUPTED
from desra_core.workspace import Workspace
from tests.conftest import desra_command

PAIRS = 24


def finished(workspace: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in workspace.glob("masks/**/*.png")}


def results(workspace: Path) -> dict[str, bytes]:
    folders = [path for name in ("masks", "dataset") for path in workspace.glob(f"{name}/**/*") if path.is_file()]
    paths = [*sorted(folders), workspace / "regions.parquet"]
    return {str(path.relative_to(workspace)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def corpus(make_pairs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    make_pairs(folder, PAIRS)
    return folder


def arguments(corpus: Path, workspace: Path) -> list[str]:
    inputs = ("--mse-sr", corpus / "mse_sr", "--gan-sr", corpus / "gan_sr")
    return desra_command("detect", *inputs, "--workspace", workspace, "--shard-size", "10")


@pytest.fixture(scope="module")
def undisturbed(corpus, desra, tmp_path_factory) -> dict[str, bytes]:
    workspace = tmp_path_factory.mktemp("undisturbed") / "ws"
    run = desra(*arguments(corpus, workspace)[3:])
    assert run.returncode == 0, run.stderr
    return results(workspace)


def kill_when(command: list[str], environment: dict[str, str], ready) -> bool:
    """SIGKILL a run as soon as ``ready()`` holds, and wait for its workers to end; False if it ended before."""
    run = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while run.poll() is None:
        if ready():
            family = psutil.Process(run.pid).children(recursive=True)
            run.send_signal(signal.SIGKILL)
            run.wait()
            _, alive = psutil.wait_procs(family, timeout=60)
            assert not alive, "something of the killed run goes on"
            return True
        time.sleep(0.002)
    return False


def test_killed_it_ends_as_if_undisturbed(corpus, undisturbed, desra, prefect_environment, tmp_path) -> None:
    workspace = tmp_path / "ws"
    command = [*arguments(corpus, workspace), "--workers", "1"]
    assert kill_when(command, prefect_environment, lambda: len(finished(workspace)) >= 9)
    before = finished(workspace)
    last = desra(*command[3:])
    assert last.returncode == 0, last.stderr
    assert before.items() <= finished(workspace).items()
    assert results(workspace) == undisturbed


@pytest.mark.slow
def test_a_second_run_is_refused_and_a_dead_owner_replaced(corpus, undisturbed, prefect_environment, tmp_path) -> None:
    """With the embedded server: the killed run's one is ended by the next run, and no process stays behind."""
    environment = {key: value for key, value in prefect_environment.items() if key != "PREFECT_API_URL"}
    workspace = tmp_path / "ws"
    command = arguments(corpus, workspace)
    first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not finished(workspace):
        assert first.poll() is None
        time.sleep(0.01)
    second = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert second.returncode == 2
    assert f"process {first.pid} on {os.uname().nodename}" in second.stderr
    assert "started" in second.stderr
    assert Workspace(workspace).owner() is not None
    first.kill()
    first.wait()
    server = json.loads((workspace / "prefect" / "server.json").read_bytes())
    assert psutil.pid_exists(server["pid"])
    assert Workspace(workspace).owner() is None
    third = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert third.returncode == 0, third.stderr
    assert "warning: the Prefect server" not in third.stderr
    assert results(workspace) == undisturbed
    assert not psutil.pid_exists(server["pid"])
    assert not (workspace / "prefect" / "server.json").exists()
    if "nothing to do" in third.stdout:  # the first one was as good as through
        subprocess.run([*command, "--threshold", "0.65"], env=environment, capture_output=True, check=True)
    with contextlib.closing(sqlite3.connect(workspace / "prefect" / "prefect.db")) as database:
        ended = database.execute("SELECT state_type, state_name FROM flow_run ORDER BY start_time").fetchall()
    assert ended == [("CRASHED", INTERRUPTED), ("COMPLETED", "Completed")]


@pytest.mark.parametrize(
    ("number", "to_all"),
    [
        (signal.SIGINT, True),  # as a terminal does
        pytest.param(signal.SIGINT, False, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, False, marks=pytest.mark.slow),
    ],
)
def test_an_interrupt_ends_quietly_and_says_how_to_go_on(number, to_all, corpus, prefect_environment, tmp_path) -> None:
    workspace = tmp_path / "ws"
    command = [*arguments(corpus, workspace)[:-1], "2", "--workers", "1"]  # more shards than are in flight
    run = subprocess.Popen(
        command,
        env=prefect_environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell makes what it starts in the background, these tests perhaps, ignore SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while len(finished(workspace)) < 3:
        assert run.poll() is None
        time.sleep(0.01)
    (os.killpg if to_all else os.kill)(run.pid, number)
    _, stderr = run.communicate(timeout=60)
    assert run.returncode == 128 + number, stderr
    assert "goes on where it stopped" in stderr
    assert "Traceback" not in stderr
    assert "failed:" not in stderr


@pytest.mark.parametrize(("signalled", "code"), [(KeyboardInterrupt, 130), (lambda: SystemExit(143), 143)])
def test_an_error_while_a_run_is_stopped_does_not_hide_the_stop(signalled, code, capsys) -> None:
    def run() -> int:
        try:
            raise signalled()
        finally:
            raise TimeoutError("a cluster that does not close")

    with pytest.raises((SystemExit, Exit)) as ended:
        run_and_exit(run)
    assert (ended.value.exit_code if isinstance(ended.value, Exit) else ended.value.code) == code
    with pytest.raises(SystemExit, match="143"):
        run_and_exit(lambda: (_ for _ in ()).throw(TerminationSignal(signal.SIGTERM)))
    with pytest.raises(TimeoutError):
        run_and_exit(lambda: (_ for _ in ()).throw(TimeoutError()))
