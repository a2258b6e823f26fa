"""`desra serve` as a team has it: a real server, workers and runs, folders that grow and vanish, kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from deployments.serving import serve
from deployments.serving.processes import new_mark, serving_alone
from deployments.serving.schedules import Endings
from deployments.serving.serve import Worker, alarm_at_the_end, look_after, stoppable
from deployments.serving.server import HISTORY, Server
from desra_core.errors import UsageError
from desra_core.settings import Mining
from desra_core.settings.models import Serving
from desra_core.workspace import Workspace
from flows import desra_flow as webhooks
from tasks.dask_cluster import ServedCluster
from tests.conftest import MODELS, client_of, desra_command, held, refusal
from tests.in_process import process
from tests.served import FINAL, PATIENCE, Failing, knock, until


@pytest.fixture
def webhook() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    received: list[dict[str, Any]] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hook) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/hook", received
        server.shutdown()


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.slow
def test_a_folder_that_grows_vanishes_and_comes_back(serve, make_photos, webhook, tmp_path) -> None:
    photos = tmp_path / "photos"
    make_photos(photos, 3)
    served = serve(**{"mine-at": "every 10 seconds", "webhook": webhook[0]})
    assert "mine/ws: every 10 seconds, next on 20" in served.said()
    until(lambda: served.ended("3 of 3 images computed"))
    idle = until(lambda: served.ended("nothing new: "))
    assert idle["state"]["type"] == "COMPLETED"
    assert idle["total_run_time"] < 30

    before = files(served.workspace.masks)
    make_photos(photos, 5)
    until(lambda: served.ended("2 of 5 images computed"))
    assert before.items() <= files(served.workspace.masks).items()

    # An unmounted disk: one line, nothing touched, the next run goes on.
    before = files(served.workspace.masks) | {"manifest": (0, served.workspace.manifest.read_bytes())}
    photos.rename(tmp_path / "elsewhere")
    failed = until(lambda: served.ended("is no folder"))
    assert failed["state"]["type"] == "FAILED"
    assert failed["state"]["message"].startswith(f"{photos}: is no folder; ")
    assert "\n" not in failed["state"]["message"]
    query = {"logs": {"flow_run_id": {"any_": [failed["id"]]}, "level": {"ge_": 40}}}
    logged = until(lambda: httpx.post(f"{served.url}/logs/filter", json=query).json())
    assert {log["message"] for log in logged} == {f"Failed: {failed['state']['message']}"}
    told = until(lambda: webhook[1])[0]
    assert (told["deployment"], told["workspace"]) == ("ws", str(served.workspace.root))
    assert told["message"] == failed["state"]["message"]
    line = f"error: {failed['name']} failed: {told['message']}\n"
    assert line in (served.workspace.prefect_home / "worker.log").read_text()
    until(lambda: line in served.said())
    (tmp_path / "elsewhere").rename(photos)
    since = failed["start_time"]
    until(lambda: (run := served.ended("nothing new: ")) and run["start_time"] > since)
    after = files(served.workspace.masks) | {"manifest": (0, served.workspace.manifest.read_bytes())}
    assert after == before

    # The server dies: it is started again, at the same place, and runs go on.
    pid = json.loads((served.workspace.prefect_home / "server.json").read_bytes())["pid"]
    os.kill(pid, signal.SIGKILL)
    until(lambda: "the Prefect server has ended (exit code -9), and is started again" in served.said())
    moment = time.time()
    until(lambda: (run := served.ended("nothing new: ")) and _seconds(run["start_time"]) > moment)

    served.stop(signal.SIGINT)
    assert served.process.returncode == 0
    assert "Traceback" not in served.said()
    assert served.processes() == []


@pytest.mark.slow
def test_a_missing_twin_is_trained_first(serve, make_photos, sharp_photos, tmp_path) -> None:
    """By a Prefect server of its own, which has ended when that of desra serve starts."""
    make_photos(tmp_path / "photos", 3)
    twin = tmp_path / "ws" / "twin" / "twin.pth"
    sharp = sharp_photos(tmp_path / "sharp", 6, 160)
    models = {"mse-model": twin, "gan-model": MODELS / "gan.pth", "twin-photos": sharp, "preset": "cpu"}
    served = serve(**models)
    assert served.said().startswith(f"training the MSE twin of {MODELS / 'gan.pth'} first, since there is none\n")
    assert twin.exists()
    served.start("mine")
    until(lambda: served.ended("3 of 3 images computed"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_cut_off_is_gone_on_with(number, serve, make_photos, make_models, tmp_path) -> None:
    make_photos(tmp_path / "photos", 200)
    served = serve()
    run_id = served.start("mine")
    until(lambda: any(served.workspace.journal.glob("*/*.json")))
    own = served.processes()
    assert len(own) >= 3  # server, worker, run
    served.stop(number)
    if number == signal.SIGTERM:
        assert served.processes() == [], [process.cmdline() for process in served.processes()]
        assert "the next start goes on with it" in served.said()
    again = serve()
    assert not any(process.is_running() for process in own)
    assert "was cut off: another run goes on from there" in again.said()
    cut = again.run(run_id)
    assert (cut["state"]["type"], cut["state"]["name"]) == ("CRASHED", "Crashed")
    query = {
        "flow_runs": {"id": {"any_": [run_id]}},
        "task_runs": {"state": {"type": {"any_": ["RUNNING", "PENDING"]}}},
    }
    assert httpx.post(f"{again.url}/task_runs/filter", json=query).json() == []
    done = until(lambda: again.ended("200 images computed"))
    assert done["state"]["type"] == "COMPLETED"
    again.stop()

    mse, gan = tmp_path / "models" / "mse.pth", tmp_path / "models" / "gan.pth"
    undisturbed = tmp_path / "undisturbed"
    mining = Mining(photos=tmp_path / "photos", mse_model=mse, gan_model=gan, workspace=undisturbed, keep_mse=True)
    assert {name: data for name, (_, data) in files(process(mining).masks).items()} == {
        name: data for name, (_, data) in files(served.workspace.masks).items()
    }


@pytest.mark.slow
def test_a_server_that_dies_in_mid_run_does_not_disturb_it(serve, make_photos, tmp_path) -> None:
    make_photos(tmp_path / "photos", 200)
    served = serve()
    run_id = served.start("mine")
    until(lambda: any(served.workspace.journal.glob("*/*.json")))
    os.kill(json.loads((served.workspace.prefect_home / "server.json").read_bytes())["pid"], signal.SIGKILL)
    run = until(lambda: (run := served.run(run_id)) and run["state"]["type"] in FINAL and run)
    assert run["state"]["message"].startswith("200 of 200 images computed")


@pytest.mark.slow
def test_a_run_that_a_person_cancels(serve, make_photos, webhook, tmp_path) -> None:
    """In the UI: the run ends without an alarm and is not started again; the next run goes on with its work."""
    make_photos(tmp_path / "photos", 200)
    served = serve(webhook=webhook[0])
    run_id = served.start("mine")
    until(lambda: any(served.workspace.journal.glob("*/*.json")))
    state = {"state": {"type": "CANCELLING", "name": "Cancelling"}}
    httpx.post(f"{served.url}/flow_runs/{run_id}/set_state", json=state).raise_for_status()
    until(lambda: served.run(run_id)["state"]["type"] == "CANCELLED")
    until(lambda: served.workspace.owner() is None)
    kept = files(served.workspace.masks)
    served.start("mine")
    done = until(lambda: served.ended("images computed"))
    assert done["state"]["type"] == "COMPLETED"
    assert done["state"]["message"].startswith(f"{200 - len(kept)} of 200 images computed: ")
    assert kept.items() <= files(served.workspace.masks).items()
    assert len(served.runs()) == 2
    assert not webhook[1]


@pytest.mark.slow
def test_others_on_the_machine_get_nowhere(serve, make_photos, tmp_path) -> None:
    """They post a command, ask the workers to run something, and look for keys, those of a killed one too."""
    make_photos(tmp_path / "photos", 1)
    served = serve()
    home = served.workspace.prefect_home
    told = [process.environ() for process in served.processes()]
    [scheduler] = {environment["DESRA_SCHEDULER"] for environment in told if "DESRA_SCHEDULER" in environment}
    guarded = ServedCluster.model_validate_json(scheduler).address
    assert guarded.startswith("tls://")
    for address in (guarded, guarded.replace("tls://", "tcp://")):
        with pytest.raises((OSError, TypeError)):
            knock(address)
    secrets = {path: path.read_text() for path in (home / "key", home / "report", home / "dask.pem")}
    assert {path.stat().st_mode & 0o777 for path in secrets} == {0o600}
    deployment = httpx.get(f"{served.url}/deployments/name/mine/ws").json()["id"]
    posted = {"job_variables": {"command": f"touch {tmp_path / 'posted'}"}}
    for url, status in ((served.ui + "/api", 401), (served.url, 422)):
        for origin in ({}, {"Origin": "http://evil.example"}):
            answer = httpx.post(f"{url}/deployments/{deployment}/create_flow_run", json=posted, headers=origin)
            assert answer.status_code == status
    assert not (tmp_path / "posted").exists()

    served.stop(signal.SIGKILL)
    again = serve()
    assert (home / "key").read_text() != secrets[home / "key"]
    assert (home / "dask.pem").read_text() != secrets[home / "dask.pem"]
    again.stop()
    assert not (home / "key").exists()
    assert not (home / "dask.pem").exists()


@pytest.mark.slow
def test_one_run_at_a_time(serve, make_photos, tmp_path) -> None:
    """Two that are asked for at once: the second one waits, and finds nothing new."""
    make_photos(tmp_path / "photos", 30)
    served = serve()
    first, second = served.start("mine"), served.start("mine")
    ends = {}
    for run_id in (first, second):
        run = until(lambda run_id=run_id: (run := served.run(run_id))["state"]["type"] in FINAL and run)
        assert run["state"]["type"] == "COMPLETED"
        ends[run["state"]["message"].partition(":")[0]] = run
    assert ends.keys() == {"30 of 30 images computed", "nothing new"}
    worked, idle = ends["30 of 30 images computed"], ends["nothing new"]
    assert _seconds(idle["start_time"]) > _seconds(worked["end_time"])
    # A run by hand meanwhile is seen on the same server.
    mse, gan = tmp_path / "models" / "mse.pth", tmp_path / "models" / "gan.pth"
    command = desra_command("mine", tmp_path / "photos", "--mse-model", mse, "--gan-model", gan,
                            "--workspace", tmp_path / "ws", "--threshold", "0.6")  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    by_hand = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert by_hand.returncode == 0, by_hand.stderr
    watch = f"watch at {served.ui}/enter (key in {served.workspace.prefect_home / 'key'})\n"
    assert watch in by_hand.stderr
    assert watch in served.said()
    assert served.process.poll() is None


@pytest.fixture
def config(make_models, make_photos, tmp_path) -> Callable[..., Path]:
    mse, gan = make_models(tmp_path / "models")
    make_photos(tmp_path / "photos", 1)

    def write(**given: object) -> Path:
        settings = {"photos": tmp_path / "photos", "workspace": tmp_path / "ws", "mse-model": mse, "gan-model": gan}
        path = tmp_path / "serve.toml"
        path.write_text("\n".join(f"{key} = {json.dumps(str(value))}" for key, value in (settings | given).items()))
        return path

    return write


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (
            {"mine-at": "at night"},
            "mine-at in FILE: at night is not accepted (no time like daily at 2:00 or every 15 minutes",
        ),
        ({"history": "2 hours"}, "history in FILE: 2 hours is not accepted (is less than a day)"),
        ({"timezone": "Here"}, "timezone in FILE: Here is not accepted (no such time zone)"),
        ({"webhook": "slack"}, "webhook in FILE: slack is not accepted"),
        ({"mine-when": "never"}, "FILE: has the unknown key mine_when; keys are "),
        ({"photos": "/nowhere/photos"}, "/nowhere/photos: does not exist; name the folder that photos come to"),
        ({"mse-model": "/nowhere/mse.pth"}, "/nowhere/mse.pth"),
    ],
)
def test_a_bad_setting_is_an_error_before_anything_starts(given, line, config, desra_here) -> None:
    file = config(**given)
    assert line.replace("FILE", str(file)) in refusal(desra_here("serve", file))


def test_a_workspace_is_served_by_one_process(config, desra_here, tmp_path) -> None:
    workspace = Workspace(tmp_path / "ws")
    workspace.create()
    with serving_alone(workspace):
        assert f"is served by process {os.getpid()} already" in refusal(desra_here("serve", config()))
    with held(workspace) as holder:
        assert f"is in use by process {holder}" in refusal(desra_here("serve", config()))


def test_a_server_that_is_down_is_an_error(config, desra_here) -> None:
    """PREFECT_API_URL names one that does not answer."""
    settings = config(**{"cycle-at": "never", "perceptual": "off"})
    told = refusal(desra_here("serve", settings), server=True)
    assert "PREFECT_API_URL=http://127.0.0.1:9/api: no Prefect server answers" in told


def _seconds(moment: str) -> float:
    from datetime import datetime

    return datetime.fromisoformat(moment).timestamp()


@pytest.fixture
def hangup() -> Iterator[None]:
    """The end of a terminal ends a process, whatever these tests run under."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_later_signals_do_not_disturb_the_end(number, hangup, capsys) -> None:
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
        outlived = True
    assert outlived


def test_the_reason_of_a_failed_start_is_printed(prefect_environment, tmp_path, monkeypatch, capsys) -> None:
    paths = {name: tmp_path / name for name in ("photos", "mse_model", "gan_model", "workspace")}
    Workspace(paths["workspace"]).create()
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with client_of(prefect_environment), pytest.raises(UsageError, match="ends again and again"):
        look_after(None, Failing(always=True), None, Serving(**paths), Endings("desra-workspace"))
    assert capsys.readouterr().err.count("warning: process.log: the process did not start; read that log\n") == 5


def test_a_vanished_workspace_ends_desra_serve(tmp_path, monkeypatch) -> None:
    """Before anything that is started again makes another one at that place."""
    told = []
    monkeypatch.setattr(webhooks, "post_to_webhook", lambda address, message: told.append((address, message)))
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


def test_a_worker_ends_with_its_runs(tmp_path) -> None:
    mark = new_mark()
    beside = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env=os.environ | mark)
    with Worker("pool", {}, mark, tmp_path / "ws" / "worker.log").running() as worker:
        environment = worker._environment | worker._mark
        run = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env=os.environ | environment)
        assert worker.exit_code is None
    assert worker.exit_code is not None
    assert run.wait(timeout=10) is not None
    assert beside.poll() is None
    beside.communicate(b"\n")
    run.stdin.close()


def test_relative_paths_of_the_environment_become_absolute(tmp_path, monkeypatch) -> None:
    """Worker and server have folders of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "lib:/abs")
    monkeypatch.setenv("TMPDIR", "scratch")
    workspace = Workspace(tmp_path / "ws")
    workspace.prefect_home.mkdir(parents=True)
    server = Server(workspace, history=HISTORY)
    with Worker("pool", {}, new_mark(), workspace.prefect_home / "worker.log").running() as worker:
        server._launch()
        for process in (worker._process, server._process):
            told = until(psutil.Process(process.pid).environ)  # Linux shows none for a moment after the start
            assert told["PYTHONPATH"].endswith(f"{tmp_path / 'lib'}:/abs")
            assert told["TMPDIR"] == str(tmp_path / "scratch")
            assert told["PYTHONSAFEPATH"] == "1"
    server.stop()


def test_runs_find_this_desra_with_this_python(tmp_path) -> None:
    with Worker("pool", {}, new_mark(), tmp_path / "worker.log").running() as worker:
        found = subprocess.run(
            ["python", "-c", "import sys, deployments; print(sys.executable, deployments.__file__)"],
            cwd=tmp_path, env=os.environ | worker._environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
    python, module = found.stdout.split()
    assert Path(python).parent == Path(sys.executable).parent
    assert Path(module) == Path(serve.__file__).parents[1] / "__init__.py"
