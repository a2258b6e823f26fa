"""Runs that were cut off, on a real server: found among the runs that go on, marked, and replaced."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.states import Cancelled, Completed, Crashed, Failed, Running, State

from deployments.serving.connection import connected
from deployments.serving.schedules import (
    INTERRUPTED,
    Deployed,
    Endings,
    _all,
    deployments_of,
    drop_missed,
    mark_interrupted,
    mark_killed,
    register,
    resume_interrupted,
)
from desra_core.settings import Machine
from desra_core.settings.models import Serving
from tests.conftest import client_of

Json = dict[str, Any]


class Pool:
    """The deployments of a workspace on a server, and their runs."""

    def __init__(self, client: SyncPrefectClient, name: str, mine_at: str = "never") -> None:
        paths = {key: f"/data/{key}" for key in ("photos", "mse_model", "gan_model", "workspace")}
        serving = Serving(**paths, name=name, mine_at=mine_at, cycle_at="never", timezone="UTC")
        self.client = client
        self.deployments: dict[str, Deployed] = {it.flow: it for it in deployments_of(serving, Machine())}
        self.known: set[str] = set()
        self.name = self.deployments["mine"].work_pool

    def ask(self, verb: str, path: str, **content: Any) -> Any:
        answer = self.client.request(verb, path, json=content)
        return answer.json() if answer.content else None

    def deployment(self, flow: str) -> Json:
        if flow not in self.known:
            register([self.deployments[flow]], self.client)
            self.known.add(flow)
        return self.ask("GET", f"/deployments/name/{self.deployments[flow].full_name}")

    def run(self, flow: str, kind: str = "RUNNING", **parameters: Any) -> str:
        """A run of a deployment in some state."""
        path = f"/deployments/{self.deployment(flow)['id']}/create_flow_run"
        return self.become(self.ask("POST", path, parameters=parameters)["id"], kind)

    def become(self, run_id: str, kind: str, name: str | None = None, what: str = "flow_runs") -> str:
        state = {"type": kind, "name": name or kind.title()}
        self.ask("POST", f"/{what}/{run_id}/set_state", state=state, force=True)
        return run_id

    def called(self, run_id: str) -> tuple[str, str]:
        """A task of a run, and a run that the run has called: both go on."""
        keys = iter(("a", "b"))

        def task() -> str:
            task_run = {"flow_run_id": run_id, "task_key": "t", "dynamic_key": next(keys)}
            return self.become(self.ask("POST", "/task_runs/", **task_run)["id"], "RUNNING", what="task_runs")

        flow = self.ask("POST", "/flows/", name="called")["id"]
        child = self.ask("POST", "/flow_runs/", flow_id=flow, parent_task_run_id=task())["id"]
        return task(), self.become(child, "RUNNING")

    def state(self, run_id: str, what: str = "flow_runs") -> tuple[str, str]:
        state = self.ask("GET", f"/{what}/{run_id}")["state"]
        return state["type"], state["name"]

    def waiting(self) -> list[Json]:
        """The runs that are to come."""
        query = {
            "work_pools": {"name": {"any_": [self.name]}},
            "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}},
        }
        return self.ask("POST", "/flow_runs/filter", **query)


@pytest.fixture
def pool(prefect_environment, request) -> Iterator[Pool]:
    with (
        client_of(prefect_environment),
        get_client(sync_client=True) as client,
    ):
        yield Pool(client, request.node.name.replace("[", "-").replace("]", ""))


def test_interrupted_runs_are_marked_with_their_subflows_and_tasks(pool) -> None:
    run = pool.run("cycle")
    task, child = pool.called(run)
    deep_task, grandchild = pool.called(child)
    done, to_come = pool.run("mine", "COMPLETED"), pool.run("mine", "SCHEDULED")
    pending, cancelled = pool.run("mine", "PENDING"), pool.become(pool.run("mine"), "CANCELLING")
    by_hand = pool.become(pool.ask("POST", "/flow_runs/", flow_id=pool.deployment("mine")["flow_id"])["id"], "RUNNING")
    elsewhere = Pool(pool.client, f"{pool.name}-elsewhere").run("mine")

    assert len(mark_interrupted(pool.name, pool.client, "somebody did it")) == 3
    state = pool.ask("GET", f"/flow_runs/{run}")["state"]
    assert (state["type"], state["name"]) == ("CRASHED", INTERRUPTED)
    assert state["message"].startswith("somebody did it; ")
    assert pool.state(pending) == ("CRASHED", INTERRUPTED)
    assert pool.state(child) == pool.state(grandchild) == ("CRASHED", "Crashed")
    assert pool.state(task, "task_runs") == pool.state(deep_task, "task_runs") == ("CRASHED", "Crashed")
    assert pool.state(cancelled)[0] == "CANCELLED"
    assert [pool.state(it)[0] for it in (done, to_come, by_hand, elsewhere)] == [
        "COMPLETED", "SCHEDULED", "RUNNING", "RUNNING",
    ]  # fmt: skip
    assert mark_interrupted(pool.name, pool.client, "again") == []


def test_runs_by_hand_are_marked_apart_from_their_subflows(pool) -> None:
    """On the server of a workspace that is free, so that none of these goes on."""
    of_pool = pool.run("cycle")
    _, child = pool.called(of_pool)
    flow = pool.deployment("mine")["flow_id"]
    parameters = {"machine": {}, "mining": {"photos": "/data/photos", "workspace": "/data/workspace"}}

    def started() -> str:
        return pool.ask("POST", "/flow_runs/", flow_id=flow, parameters=parameters)["id"]

    by_hand, done = pool.become(started(), "RUNNING"), pool.become(started(), "COMPLETED")
    task, grandchild = pool.called(by_hand)
    own = Path("/data/workspace")
    assert mark_killed(own, pool.client, settled=timedelta(minutes=2)) == []
    assert mark_killed(Path("/data/elsewhere"), pool.client) == []
    assert len(mark_killed(own, pool.client)) == 1
    assert [pool.state(it) for it in (by_hand, done, of_pool, child)] == [
        ("CRASHED", INTERRUPTED), ("COMPLETED", "Completed"), ("RUNNING", "Running"), ("RUNNING", "Running"),
    ]  # fmt: skip
    assert pool.state(task, "task_runs")[0] == pool.state(grandchild)[0] == "CRASHED"
    assert pool.ask("GET", f"/flow_runs/{by_hand}")["state"]["message"].startswith(
        "it was killed; the next run goes on"
    )
    pool.become(of_pool, "COMPLETED")
    assert resume_interrupted(pool.name, pool.client) == []


def test_one_missed_run_is_left(pool) -> None:
    """As after a week without desra serve, or when a cycle took a day."""
    often = Pool(pool.client, f"{pool.name}-often", mine_at="every 60 seconds")
    now = datetime.now(UTC)
    span = {"start_time": str(now - timedelta(minutes=10)), "end_time": str(now + timedelta(minutes=5))}
    often.ask("POST", f"/deployments/{often.deployment('mine')['id']}/schedule", **span, min_runs=1, max_runs=50)
    asked_for = often.run("mine", "SCHEDULED")

    def missed() -> list[datetime]:
        """The moments of runs by the clock that wait and have been due."""
        waiting = [run["expected_start_time"] for run in often.waiting() if run["id"] != asked_for]
        return sorted(moment for moment in map(datetime.fromisoformat, waiting) if moment < now)

    before = missed()
    assert len(before) == 10
    settled = datetime.now(UTC) - before[5] - timedelta(seconds=30)  # six are long due
    drop_missed(often.name, often.client, settled=settled)
    assert missed() == before[5:]
    assert asked_for in {run["id"] for run in often.waiting()}
    often.client.delete_deployment(often.deployment("mine")["id"])  # whose clock would go on


def test_a_run_that_has_a_process_goes_on(pool) -> None:
    """It may hold no workspace: as it starts, as it ends, and while it waits to try again."""
    run = pool.run("mine")
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE,
                               env=os.environ | {"PREFECT__FLOW_RUN_ID": run})  # fmt: skip
    assert mark_interrupted(pool.name, pool.client, "no") == []
    process.communicate(b"\n")
    assert len(mark_interrupted(pool.name, pool.client, "yes")) == 1


def test_new_runs_may_not_have_a_process_yet(pool) -> None:
    run = pool.run("mine", "PENDING")
    assert mark_interrupted(pool.name, pool.client, "no", settled=timedelta(minutes=2)) == []
    assert pool.state(run)[0] == "PENDING"
    assert len(mark_interrupted(pool.name, pool.client, "yes", settled=timedelta(0))) == 1


def test_one_run_per_deployment_goes_on_with_the_latest_parameters(pool) -> None:
    given = pool.deployment("mine")["parameters"]["mining"]
    cut = [
        pool.run("mine", mining=given | {"threshold": threshold}, machine={"scheduler": "tcp://gone:1"})
        for threshold in (0.4, 0.5)
    ]
    pool.run("cycle")
    mark_interrupted(pool.name, pool.client, "cut")
    told = resume_interrupted(pool.name, pool.client)
    assert [line.partition(" was cut off: ")[2] for line in told] == ["another run goes on from there"] * 2
    waiting = {run["parameters"].keys() - {"trigger"} == {"cycling"}: run["parameters"] for run in pool.waiting()}
    assert waiting.keys() == {True, False}
    assert waiting[False]["mining"]["threshold"] == 0.5
    assert "machine" not in waiting[False]
    assert {pool.state(run) for run in cut} == {("CRASHED", "Crashed")}
    assert resume_interrupted(pool.name, pool.client) == []
    # It died before it could say that it had submitted one: there is no second one.
    pool.become(cut[1], "CRASHED", INTERRUPTED)
    resume_interrupted(pool.name, pool.client)
    assert len(pool.waiting()) == 2


def _newer_version(pool: Pool, deployment: str) -> None:
    pool.ask("PATCH", f"/deployments/{deployment}", enforce_parameter_schema=True)


def _deleted(pool: Pool, deployment: str) -> None:
    pool.ask("DELETE", f"/deployments/{deployment}")


@pytest.mark.parametrize("event", [_newer_version, _deleted])
def test_a_run_that_is_no_longer_accepted_is_reported_once(event: Callable[[Pool, str], None], pool) -> None:
    deployment = pool.deployment("mine")["id"]
    pool.ask("PATCH", f"/deployments/{deployment}", enforce_parameter_schema=False)
    run = pool.run("mine", mining={"thresold": 0.5})
    event(pool, deployment)
    mark_interrupted(pool.name, pool.client, "cut")
    (told,) = resume_interrupted(pool.name, pool.client)
    assert "was cut off, and is not resumed: the server does not accept another run (" in told
    assert "\n" not in told
    assert pool.state(run) == ("CRASHED", "Crashed")
    assert pool.waiting() == []
    assert resume_interrupted(pool.name, pool.client) == []


def test_a_server_gives_a_page_at_a_time() -> None:
    there = list(range(450))
    assert _all(lambda offset: there[offset : offset + 200]) == there


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
            ("fifth", Crashed(name=INTERRUPTED, message="the run died; the next run goes on from there")),
        ):
            end(name, state)
        endings.say_new()
        assert resume_interrupted("desra-outcomes", client) == [
            "warning: fifth was cut off: another run goes on from there"
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
