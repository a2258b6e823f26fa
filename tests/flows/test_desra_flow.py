"""How flows end: one line, retries of what may pass, an alarm by a real webhook. On a real Prefect server."""

from __future__ import annotations

import json
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import cv2
import httpx
import numpy as np
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext
from prefect.logging.handlers import APILogHandler
from prefect.states import Cancelled, Crashed

from deployments.serving.schedules import deployments_of, register
from desra_core.errors import ImageError, LockedError, TransientError, UsageError
from desra_core.settings import Detection, Machine, Mining
from desra_core.settings.models import Comparing, Cycling, Finetuning, Serving
from desra_core.workspace import Workspace
from flows import desra_flow as module
from flows import desra_flow as webhook_module
from flows.compare import compare
from flows.cycle import cycle
from flows.desra_flow import desra_flow, report_cancelled, report_failure, run_name
from flows.detect import detect
from flows.finetune import finetune
from flows.mine import mine
from tasks.logs import say
from tests.conftest import client_of, keyed

PATHS = {name: f"/data/{name}" for name in ("photos", "workspace", "mse_model", "gan_model")}


class Ended(NamedTuple):
    in_one_line: str
    problem: TransientError | None = None
    to_look_at: bool = False


@pytest.fixture(scope="module")
def url(prefect_environment) -> Iterator[str]:
    with client_of(prefect_environment):
        yield keyed(prefect_environment)


@pytest.fixture
def by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a deployment had started the run."""
    monkeypatch.setenv("PREFECT__RUNTIME__DEPLOYMENT__ID", "3f1ba9c2-0000-4000-8000-000000000000")
    monkeypatch.setattr(module, "PAUSES", (0, 0))


class Hook(BaseHTTPRequestHandler):
    answer = 200
    received: list[dict[str, Any]] = []  # noqa: RUF012
    answers = threading.Event()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.answers.wait()
        self.received.append(body)
        self.send_response(self.answer)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def webhook(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hook]]:
    class Mine(Hook):
        received: list[dict[str, Any]] = []  # noqa: RUF012
        answers = threading.Event()

    Mine.answers.set()
    with ThreadingHTTPServer(("127.0.0.1", 0), Mine) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        monkeypatch.setenv("DESRA_WEBHOOK", f"http://127.0.0.1:{server.server_port}/hook")
        yield Mine
        Mine.answers.set()
        server.shutdown()


def latest(url: str, name: str) -> dict[str, Any]:
    query = {"flows": {"name": {"any_": [name]}}, "sort": "EXPECTED_START_TIME_DESC", "limit": 1}
    return httpx.post(f"{url}/flow_runs/filter", json=query).json()[0]


def logs(url: str, run: dict[str, Any], *, wait_for: str) -> str:
    """Return the log of a run once it holds some words: Prefect sends logs every two seconds, or when told to."""
    APILogHandler().flush()
    query = {"logs": {"flow_run_id": {"any_": [run["id"]]}}}
    for _ in range(100):
        told = "\n".join(log["message"] for log in httpx.post(f"{url}/logs/filter", json=query).json())
        if wait_for in told:
            return told
        time.sleep(0.1)
    raise AssertionError(told)


def raising(name: str, *errors: Exception) -> tuple[Any, list[int]]:
    """A flow that fails by one error after the other and then succeeds, and how often it was tried."""
    left, tries = list(errors), []

    def flow(machine: Machine = Machine()) -> Ended:  # noqa: B008
        """Fails.

        Args:
            machine: Where.
        """
        tries.append(len(tries))
        if left:
            raise left.pop(0)
        return Ended("all is well")

    flow.__name__ = name
    return desra_flow(flow), tries


def test_a_refusal_is_one_line_without_a_traceback(url, webhook) -> None:
    error = LockedError("/ws", "is in use by process 7", "wait until it has ended")
    flow, tries = raising("refused", error)
    with pytest.raises(LockedError) as raised:
        flow()
    assert raised.value is error
    run = latest(url, "refused")
    assert (run["state"]["name"], run["state"]["message"]) == ("Failed", str(error))
    assert run["name"].startswith("refused corpus 20")
    told = logs(url, run, wait_for="finished running")
    assert "Traceback" not in told
    assert f"Failed: {error}" in told
    [message] = webhook.received
    assert message["run"] == run["name"]
    assert message["message"] == str(error)
    assert message["url"].endswith(f"/runs/flow-run/{run['id']}")
    assert message["text"] == f"refused failed: {run['name']}: {error} {message['url']}"
    assert message.keys() == {
        "text", "deployment", "flow", "run", "run_id", "state", "message", "url", "workspace",
    }  # fmt: skip
    assert len(tries) == 1


def test_a_completed_run_prints_a_line(url, webhook) -> None:
    flow, _ = raising("well")
    assert flow() == Ended("all is well")
    run = latest(url, "well")
    assert (run["state"]["name"], run["state"]["message"]) == ("Completed", "all is well")
    assert webhook.received == []


def said(stderr: str) -> list[tuple[str, str, str, str]]:
    """Level, run, workspace and message of lines of JSON."""
    told = [json.loads(line) for line in stderr.splitlines() if line.startswith("{")]
    return [(line["level"], line.get("run"), line.get("workspace"), line["message"]) for line in told]


def test_how_a_run_went_is_a_line_on_stderr(url, by_itself, capsys) -> None:
    """One line, also where the run has called others."""

    @desra_flow
    def inner(flawed: bool) -> Ended:
        """Is called."""
        return Ended("all is well", to_look_at=flawed)

    @desra_flow
    def night(detection: Detection, machine: Machine, flawed: bool) -> Ended:
        """Calls another one."""
        return inner(flawed)

    detection = Detection(mse_sr="/data/mse", gan_sr="/data/gan", workspace="/data/ws")
    for flawed, level in ((False, "info"), (True, "warning")):
        night(detection, Machine(log_format="json"), flawed)
        run = latest(url, "night")["name"]
        assert said(capsys.readouterr().err) == [(level, run, "/data/ws", f"{run} completed: all is well")]
    say("error: what comes then is about it, too")
    assert said(capsys.readouterr().err) == [("error", run, "/data/ws", "what comes then is about it, too")]
    night(detection, Machine(), flawed)
    assert f"\nwarning: {latest(url, 'night')['name']} completed: all is well\n" in "\n" + capsys.readouterr().err


def test_only_errors_that_may_pass_are_tried_again(url, by_itself) -> None:
    full = TransientError("/ws", "the disk is full", "free some space")
    flow, tries = raising("patient", full, ConnectionError("reset"))
    assert flow() == Ended("all is well")
    assert len(tries) == 3
    told = logs(url, latest(url, "patient"), wait_for="reset")
    assert "TransientError: /ws: the disk is full; free some space; tried again in 0 s" in told

    flow, tries = raising("exhausted", full, full, full, full)
    with pytest.raises(TransientError):
        flow()
    assert len(tries) == 3
    assert latest(url, "exhausted")["state"]["message"] == str(full)
    for error in (UsageError("--x", "is bad", "mend it"), ImageError("a.png", "is truncated", "replace it")):
        flow, tries = raising("hopeless", error)
        with pytest.raises(type(error)):
            flow()
        assert len(tries) == 1


def test_a_run_by_hand_fails_at_once(url) -> None:
    full = TransientError("/ws", "the disk is full", "free some space")
    flow, tries = raising("impatient", full)
    with pytest.raises(TransientError):
        flow()
    assert len(tries) == 1


def test_an_incomplete_run_of_a_deployment_fails(url, by_itself, monkeypatch) -> None:
    broken = TransientError("2 shards could not finish", "the disk is full", "run again")

    @desra_flow
    def partial() -> Ended:
        """Ends, but for something."""
        return Ended("nearly", broken)

    with pytest.raises(TransientError):
        partial()
    assert latest(url, "partial")["state"]["message"] == str(broken)
    monkeypatch.delenv("PREFECT__RUNTIME__DEPLOYMENT__ID")
    assert partial().problem == broken


@pytest.mark.parametrize("trouble", ["refuses", "does not answer", "is not there"])
def test_a_webhook_in_trouble_changes_nothing(trouble, url, webhook, monkeypatch, capsys) -> None:
    monkeypatch.setattr(webhook_module, "_WEBHOOK_SECONDS", 0.3)
    if trouble == "refuses":
        webhook.answer = 500
    elif trouble == "does not answer":
        webhook.answers.clear()
    else:
        monkeypatch.setenv("DESRA_WEBHOOK", "http://127.0.0.1:9/hook")
    flow, _ = raising("unheard", UsageError("--x", "is bad", "mend it"))
    with pytest.raises(UsageError):
        flow()
    run = latest(url, "unheard")
    assert run["state"]["message"] == "--x: is bad; mend it"
    said = "the webhook refused the message: HTTP 500" if trouble == "refuses" else "the webhook was not reached: "
    told = logs(url, run, wait_for=said)
    stderr = capsys.readouterr().err
    assert f"warning: {run['name']}: {said}" in stderr
    assert "/hook" not in told + stderr  # the address is a secret


def test_a_run_within_a_run_sends_no_message_of_its_own(url, webhook) -> None:
    inner, _ = raising("inner", UsageError("--x", "is bad", "mend it"))

    @desra_flow
    def outer() -> Ended:
        """Calls another one."""
        return inner()

    with pytest.raises(UsageError):
        outer()
    assert [message["flow"] for message in webhook.received] == ["outer"]


def test_the_worker_reports_a_killed_run(url, webhook, capsys) -> None:
    """Which runs the hook in another process, without the environment of the run."""
    with get_client(sync_client=True) as client:
        serving = Serving(**PATHS, name="killed", mine_at="never", cycle_at="never")
        register(deployments_of(serving, Machine(log_format="json")), client)
        deployment = client.read_deployment_by_name("mine/killed")
        run = client.create_flow_run_from_deployment(deployment.id)
        client.update_flow_run(run.id, name="mine photos")  # as a run calls itself when it begins
        report_failure(mine, run, Crashed(message="Process exited with status code: -9"))
        report_cancelled(mine, run, Cancelled(message="by somebody"))
        run.parameters["curent_model"] = True
        report_failure(mine, run, Crashed(message="Process exited with status code: 1"))
    about = ("mine photos", "/data/workspace")
    assert said(capsys.readouterr().err)[:2] == [
        ("error", *about, "mine photos crashed: Process exited with status code: -9"),
        ("warning", *about, "mine photos was cancelled"),
    ]
    killed, unknown = webhook.received
    assert (killed["deployment"], killed["run"], killed["state"]) == ("killed", "mine photos", "Crashed")
    assert killed["workspace"] == "/data/workspace"
    assert killed["message"] == "Process exited with status code: -9"
    assert unknown["message"].startswith("parameters: Function expects parameters ['mining', ")
    assert "; edit the parameters of the deployment" in unknown["message"]


def test_a_run_within_a_run_is_tried_again_with_the_one_around_it(url, by_itself) -> None:
    inner, tries = raising("inner", *[TransientError("/ws", "the disk is full", "free some space")] * 9)

    @desra_flow
    def outer() -> Ended:
        """Calls another one."""
        return inner()

    with pytest.raises(TransientError):
        outer()
    assert len(tries) == 3


@pytest.mark.parametrize(
    ("field", "path"), [("workspace", "ws"), ("workspace", ""), ("mse_model", "mse.pth"), ("mse_model", "./bicubic")]
)
def test_a_path_that_depends_on_where_the_run_is_is_refused(field, path, url) -> None:
    with pytest.raises(UsageError):
        mine(mining=PATHS | {field: path})
    told = f"mining.{field}: {path or '.'} is not accepted (a run needs the whole path); begin it with /"
    assert latest(url, "mine")["state"]["message"].endswith(told)


def test_a_whole_path_may_be_written_in_any_way() -> None:
    given = PATHS | {"mse_model": "/models//mse.pth"}
    assert mine.validate_parameters({"mining": given})["mining"].mse_model == "/models/mse.pth"


@pytest.mark.slow
def test_images_with_passing_failures_are_tried_again(url, by_itself, make_pairs, tmp_path) -> None:
    """Until it has passed; what cannot pass in this run is no failure of it."""
    names = make_pairs(tmp_path, 2)
    workspace = Workspace(tmp_path / "ws")
    workspace.create()
    large = np.zeros((3000, 3000), np.uint8)
    for role in ("mse_sr", "gan_sr"):
        cv2.imwrite(str(tmp_path / role / "large.png"), large)
    in_the_way = workspace.mask(names[0])
    (in_the_way / "a").mkdir(parents=True)
    settings = Detection(mse_sr=tmp_path / "mse_sr", gan_sr=tmp_path / "gan_sr", workspace=workspace.root)
    machine = Machine(workers=1, memory="600MB")
    with pytest.raises(TransientError):
        detect(settings, machine)
    run = latest(url, "detect")
    assert run["state"]["type"] == "FAILED"
    told = f"1 image: failed for a reason that may pass, the first: {in_the_way}: cannot be written (Is a "
    assert run["state"]["message"].startswith(told)
    assert logs(url, run, wait_for="finished running").count("tried again in 0 s") == 2
    shutil.rmtree(in_the_way)
    summary = detect(settings, machine)
    assert summary.problem is None
    assert summary.in_one_line.startswith("1 of 3 images computed: ")
    assert summary.in_one_line.endswith(", 1 image failed")


def test_a_vanished_workspace_is_an_error_at_once(url, by_itself, tmp_path) -> None:
    gone = tmp_path / "gone"
    for flow, settings in ((finetune, Finetuning(workspace=gone)), (compare, Comparing(workspace=gone, after=gone))):
        with pytest.raises(UsageError, match="gone: is no workspace with a run in it"):
            flow(settings)
    assert not gone.exists()


def test_no_run_by_itself_makes_a_workspace(url, by_itself, make_models, tmp_path) -> None:
    """Where one has vanished, a disk is not mounted: all would be mined anew, to another disk."""
    mse, gan = make_models(tmp_path)
    paths = {"photos": tmp_path, "workspace": tmp_path / "gone", "mse_model": mse, "gan_model": gan}
    told = "gone: is no workspace: all earlier results are gone with it; bring it back, or "
    for flow, settings in ((mine, Mining(**paths)), (cycle, Cycling(**paths))):
        with pytest.raises(UsageError, match=told):
            flow(settings)
    assert not (tmp_path / "gone").exists()
    (tmp_path / "gone").mkdir()  # what is left where a disk was
    with pytest.raises(UsageError, match=told):
        mine(Mining(**paths))
    assert not list((tmp_path / "gone").iterdir())


def test_a_cycle_checks_its_last_inputs_before_it_mines(url, by_itself, make_models, tmp_path) -> None:
    mse, gan = make_models(tmp_path)
    Workspace(tmp_path / "ws").create()
    settings = Cycling(photos=tmp_path, workspace=tmp_path / "ws", mse_model=mse, gan_model=gan, preset="cpu",
                       lpips=tmp_path / "alexnet.pth")  # fmt: skip
    with pytest.raises(UsageError, match=r"alexnet\.pth: does not exist"):
        cycle(settings)
    assert not Workspace(settings.workspace).manifest.exists()


def test_parameters_of_an_earlier_version_are_refused_in_one_line(url) -> None:
    with pytest.raises(UsageError):
        mine(mining={"photos": "/p", "workspace": "/ws", "mse_model": "m", "gan_model": "g", "thresold": 0.5})
    message = latest(url, "mine")["state"]["message"]
    assert "\n" not in message
    assert "mining.thresold: 0.5 is not accepted (Extra inputs are not permitted); edit the parameters" in message
    for given, told in (({"window": 10}, "mining.window: 10 is not accepted (is even, "), ({}, "mining: is missing; ")):
        with pytest.raises(UsageError) as refused:
            mine.validate_parameters({"mining": PATHS | given} if given else {})
        assert str(refused.value).startswith(told)


def test_a_run_is_named_by_the_minute_in_which_it_starts() -> None:
    """Also when it is asked for its name again, as a run is that goes on after it was cut off."""
    started = datetime.now(UTC) - timedelta(hours=3)
    run = FlowRun(id=uuid.uuid4(), flow_id=uuid.uuid4(), start_time=started)
    parameters = {"finetuning": {"workspace": "/data/holidays"}}
    with FlowRunContext.model_construct(flow=finetune, flow_run=run, parameters=parameters):
        assert run_name() == f"finetune holidays {started.astimezone():%Y-%m-%d %H:%M}"
    soon = datetime.now(UTC) + timedelta(minutes=2)  # of the clock: Prefect prepares it some seconds before
    waiting = FlowRun(id=uuid.uuid4(), flow_id=uuid.uuid4(), expected_start_time=soon)
    with FlowRunContext.model_construct(flow=finetune, flow_run=waiting, parameters=parameters):
        assert run_name() == f"finetune holidays {soon.astimezone():%Y-%m-%d %H:%M}"
    new = FlowRun(id=uuid.uuid4(), flow_id=uuid.uuid4())
    with FlowRunContext.model_construct(flow=finetune, flow_run=new, parameters=parameters):
        before = datetime.now().astimezone()
        name = run_name()
        assert name.removeprefix("finetune holidays ") in {f"{now:%Y-%m-%d %H:%M}" for now in
                                                           (before, datetime.now().astimezone())}  # fmt: skip


@pytest.mark.parametrize(
    ("features", "chosen", "told"),
    [("avx2 avx512_bf16 amx_bf16", {}, "a fifth"), ("avx2 avx512_bf16", {}, "half"), ("avx2", {}, ""),
     ("avx512_bf16", {"precision": "float32"}, "")],
)  # fmt: skip
def test_a_cpu_that_is_fast_in_bfloat16_is_named(features, chosen, told, tmp_path, capsys) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: fpu {features}\n")
    module.suggest_bfloat16(Mining(**PATHS | chosen), tmp_path / "cpuinfo")
    said = capsys.readouterr().err
    assert (f"takes about {told} of the time" in said) if told else not said
