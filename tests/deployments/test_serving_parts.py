"""The parts of `desra serve`: signals, restarts, servers that do not answer or are another machine's."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import psutil
import pytest
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelled, Completed, Crashed, Failed, Running, State

from deployments.serving import connection, serve
from deployments.serving.connection import connected
from deployments.serving.flow_runs import INTERRUPTED, Endings, resume_interrupted
from deployments.serving.processes import new_mark, start_again
from deployments.serving.retention import HISTORY
from deployments.serving.schedules import check_alone, deployments_of, register
from deployments.serving.serve import alarm_at_the_end, look_after, stoppable
from deployments.serving.server import Server
from deployments.serving.worker import NAME, prefect_worker
from desra_core.errors import UsageError
from desra_core.settings import Machine
from desra_core.settings.serving import Serving
from desra_core.workspace import Workspace
from flows import webhook
from tests.conftest import client_of


@pytest.fixture
def hangup() -> Iterator[None]:
    """The end of a terminal ends a process, whatever these tests run under."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_once_and_later_ones_do_not_disturb(number, hangup, capsys) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    ended = False
    with stoppable():
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            ended = True
    assert ended
    assert capsys.readouterr().err == "stopping\nstopped\n"
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_nohup_outlives_its_terminal(hangup) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stoppable():
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(0.1)
        outlived = True
    assert outlived


class Failing:
    """A process that does not even start the first time, or with `always` ever, and else ends at once."""

    name = "the process"
    log = Path("process.log")
    exit_code = -11

    def __init__(self, *, always: bool = False) -> None:
        self.starts = 0
        self.always = always

    def start(self) -> None:
        self.starts += 1
        if self.starts == 1 or self.always:
            raise UsageError(self.log, "the process did not start", "read that log")


def test_what_ends_again_and_again_is_given_up(capsys, monkeypatch) -> None:
    process, starts, pauses = Failing(), [], []
    for moment in (0, 1, 2, 3, 400, 401, 402, 403, 404):  # now and then is no reason
        with contextlib.nullcontext() if moment else pytest.raises(UsageError, match="did not start"):
            start_again(process, starts, moment, pauses.append)
    with pytest.raises(UsageError, match=r"process\.log: the process ends again and again; read that log"):
        start_again(process, starts, 405, pauses.append)
    assert process.starts == 9
    assert pauses == [2, 4, 8, 16, 2, 4, 8, 16, 32]
    assert (
        "the process has ended (exit code -11), and is started again in 4 s; its log is process.log"
        in capsys.readouterr().err
    )


def test_starts_that_take_ten_minutes_and_fail_are_given_up(monkeypatch) -> None:
    clock = [0.0]

    class Slow(Failing):
        def start(self) -> None:
            clock[0] += 1200
            super().start()

    process, starts = Slow(always=True), []
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    for _ in range(5):
        with pytest.raises(UsageError, match="did not start"):
            start_again(process, starts, clock[0], lambda _: None)
    with pytest.raises(UsageError, match="ends again and again"):
        start_again(process, starts, clock[0], lambda _: None)


def test_why_a_start_has_failed_is_told(prefect_environment, tmp_path, monkeypatch, capsys) -> None:
    paths = {name: tmp_path / name for name in ("photos", "mse_model", "gan_model", "workspace")}
    Workspace(paths["workspace"]).create()
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with client_of(prefect_environment), pytest.raises(UsageError, match="ends again and again"):
        look_after(None, Failing(always=True), None, Serving(**paths), Endings("desra-workspace"))
    assert capsys.readouterr().err.count("warning: process.log: the process did not start; read that log\n") == 5


def test_a_workspace_that_vanishes_ends_it_and_is_told(tmp_path, monkeypatch) -> None:
    """Before anything that is started again makes another one at that place."""
    told = []
    monkeypatch.setattr(webhook, "tell_webhook", lambda address, message: told.append((address, message)))
    paths = {name: tmp_path / name for name in ("photos", "mse_model", "gan_model", "workspace")}
    serving = Serving(**paths, webhook="http://hook.example/x")
    line = f"{paths['workspace']}: is no workspace any more; bring it back and start desra serve again"
    monkeypatch.setattr(serve, "_POLL_SECONDS", 0)
    with pytest.raises(UsageError, match=line), alarm_at_the_end(serving):
        look_after(None, Failing(), None, serving, Endings("desra-workspace"))
    [(address, message)] = told
    assert address == "http://hook.example/x"
    assert message["text"] == f"workspace: desra serve has ended: {line}"
    assert message["workspace"] == str(paths["workspace"])
    assert not paths["workspace"].exists()


def test_a_server_that_says_nothing_keeps_nobody(monkeypatch) -> None:
    monkeypatch.setattr(connection, "_ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(connection, "_MOST_RETRIES", 0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/api"
        monkeypatch.setenv("PREFECT_API_URL", url)
        started = time.monotonic()
        with (
            temporary_settings({PREFECT_API_URL: url}),
            pytest.raises(
                UsageError, match=rf"{url}: the Prefect server does not do what it is asked \(.+\); see its log"
            ),
            connected() as client,
        ):
            client.hello()
        assert time.monotonic() - started < 10


def test_two_machines_do_not_serve_one_pool(prefect_environment) -> None:
    own = NAME + socket.gethostname()
    with client_of(prefect_environment), connected() as client:
        check_alone("desra-alone", client)  # there is no such pool yet
        client.create_work_pool(WorkPoolCreate(name="desra-alone", type="process"))
        client.send_worker_heartbeat("desra-alone", own, heartbeat_interval_seconds=30)
        check_alone("desra-alone", client)
        client.send_worker_heartbeat("desra-alone", f"{NAME}elsewhere", heartbeat_interval_seconds=30)
        told = r"the work pool desra-alone: has another worker already \(desra serve on elsewhere\); stop that one"
        with pytest.raises(UsageError, match=told):
            check_alone("desra-alone", client)


def test_how_each_run_has_ended_is_a_line(prefect_environment, capsys) -> None:
    """Of desra serve, by the word of the server: one that was killed says nothing itself."""
    paths = {name: f"/data/{name}" for name in ("photos", "workspace", "mse_model", "gan_model")}
    deployments = deployments_of(Serving(**paths, name="outcomes", mine_at="never", cycle_at="never"), Machine())
    with client_of(prefect_environment), connected() as client:
        register(deployments, client, own=True)
        mine = client.read_deployment_by_name("mine/outcomes").id

        def end(name: str, state: State) -> UUID:
            run = client.create_flow_run_from_deployment(mine)
            client.update_flow_run(run.id, name=name)
            client.set_flow_run_state(run.id, Running(), force=True)
            client.set_flow_run_state(run.id, state, force=True)
            return run.id

        end("before", Completed(message="40 of 40 images computed"))
        endings = Endings("desra-outcomes")
        endings.say_new()
        for name, state in (
            ("first", Completed(message="1 of 41 images computed")),
            ("second", Failed(message="/gan.pth: does not exist; check the path")),
            ("third", Crashed(message="Process exited with status code: -9")),
            ("fourth", Cancelled(message="by somebody")),
            ("fifth", Crashed(name=INTERRUPTED, message="the run died; the next run goes on with what it left")),
        ):
            end(name, state)
        endings.say_new()
        assert resume_interrupted("desra-outcomes", client) == [
            "warning: fifth was cut off: another run goes on with what it left"
        ]
        sixth = end("sixth", Failed(message="a reason\nof two lines"))
        endings.say_new()
        for state in (Running(), Failed()):  # as by Retry in the UI
            client.set_flow_run_state(sixth, state, force=True)
        endings.say_new()
        endings.say_new()
    assert capsys.readouterr().err.splitlines() == [
        "first completed: 1 of 41 images computed",
        "error: second failed: /gan.pth: does not exist; check the path",
        "error: third crashed: Process exited with status code: -9",
        "warning: fourth cancelled: by somebody",
        "error: sixth failed: a reason\\nof two lines",
        "error: sixth failed: no reason is known",
    ]


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
