"""The deployments: `prefect.yaml` and its Python twin, and what a real server makes of them."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path

import httpx
import pytest
from prefect.cli.deploy._config import _load_deploy_configs_and_actions
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentUpdate, WorkPoolCreate, WorkPoolUpdate
from prefect.flows import load_flow_from_entrypoint
from prefect.states import Completed
from prefect.utilities.callables import parameter_schema
from prefect.utilities.templating import apply_values
from prefect.workers.process import ProcessJobConfiguration, ProcessWorker
from rich.console import Console

from deployments.serving import schedules
from deployments.serving.connection import connected
from deployments.serving.schedules import WORKER, check_alone, deployments_of, next_run, register
from desra_core.errors import UsageError
from desra_core.gate.comparison import mining_of
from desra_core.settings import Machine, Mining
from desra_core.settings.models import Cycling, FinetuneTrigger, Finetuning, Serving
from tests.browser import opened
from tests.conftest import client_of, keyed

YAML = Path(schedules.__file__).parents[1] / "prefect.yaml"


def serving(**given: object) -> Serving:
    paths = {name: f"/data/{name}" for name in ("photos", "mse_model", "gan_model", "workspace")}
    return Serving(**(paths | {"timezone": "Europe/Berlin"} | given))


@pytest.fixture
def declared(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict]:
    """The deployments of the YAML, by flow, as Prefect's own loader and templating give them."""
    for name in ("photos", "mse_model", "gan_model", "workspace"):
        monkeypatch.setenv(f"DESRA_{name.upper()}", f"/data/{name}")
    monkeypatch.setenv("DESRA_NAME", "workspace")
    monkeypatch.setenv("DESRA_TIMEZONE", "Europe/Berlin")
    told = StringIO()
    declared, actions = _load_deploy_configs_and_actions(YAML, console=Console(file=told))
    assert told.getvalue() == ""
    assert actions["pull"] == []
    found = [apply_values(deployment, os.environ, remove_notset=False) for deployment in declared]
    return {deployment["entrypoint"].rpartition(".")[2]: deployment for deployment in found}


def test_yaml_and_python_say_the_same(declared) -> None:
    twins = {deployed.flow: deployed for deployed in deployments_of(serving(), Machine())}
    assert declared.keys() == twins.keys() == {"mine", "finetune", "cycle"}
    for flow, deployed in twins.items():
        yaml = declared[flow]
        assert yaml["name"] == deployed.name == "workspace"
        assert yaml["entrypoint"] == deployed.entrypoint
        assert yaml["schedules"] == deployed.schedules, flow
        assert yaml["tags"] == deployed.tags
        assert yaml["work_pool"] == {"name": deployed.work_pool}
        assert "concurrency_limit" not in yaml  # the pool's
        # The same settings, however little of them is spelt out.
        parameters = load_flow_from_entrypoint(deployed.entrypoint).validate_parameters(yaml["parameters"])
        assert parameters == load_flow_from_entrypoint(deployed.entrypoint).validate_parameters(deployed.parameters)


def test_mine_and_cycle_want_the_same_of_every_image(declared) -> None:
    """Else each would redo what the other did, every night."""
    # The patch is that of another preset, and so the default of the field.
    given = serving(preset="cpu", threshold=0.6, patch=256, group_by="folder", finetune_after=7)
    mine, finetune, cycle = deployments_of(given, Machine(device="cpu", workers=3, scheduler="tcp://a:1"))
    cycling = Cycling(**cycle.parameters["cycling"])
    assert Mining(**mine.parameters["mining"]) == mining_of(cycling)
    assert cycling.patch == Finetuning(**finetune.parameters["finetuning"]).patch == 256
    assert cycling.batch == Finetuning(**finetune.parameters["finetuning"]).batch == 8
    assert FinetuneTrigger(**mine.parameters["trigger"]) == FinetuneTrigger(artifacts=7, group_by="folder")
    assert mine.parameters["machine"] == {"device": "cpu", "scheduler": "tcp://a:1"}
    # The cluster that ends with desra serve has no place in a deployment, which does not.
    assert "machine" not in deployments_of(given, Machine(workers=3, memory="4GB"))[0].parameters


def test_a_flow_that_never_runs_by_itself_has_no_schedule() -> None:
    mine, finetune, cycle = deployments_of(
        serving(mine_at="every 15 minutes", cycle_at="never", finetune_after=0), Machine()
    )
    assert mine.schedules == [{"interval": 900.0}]
    assert finetune.schedules == cycle.schedules == []
    assert "trigger" not in mine.parameters


def test_forms_have_help_texts() -> None:
    """Every parameter of a deployed flow, and every field of its settings, is described."""
    for deployed in deployments_of(serving(), Machine()):
        schema = parameter_schema(load_flow_from_entrypoint(deployed.entrypoint))
        assert all(parameter.get("description") for parameter in schema.properties.values())
        for definition in schema.definitions.values():
            assert all(field.get("description") for field in definition.get("properties", {}).values())


def test_empty_fields_of_a_form_are_left_to_the_preset() -> None:
    """A form sends the defaults that it shows."""
    for flow in ("finetune", "cycle"):
        [fields] = [
            definition["properties"]
            for definition in parameter_schema(load_flow_from_entrypoint(f"flows.{flow}.{flow}")).definitions.values()
            if "preset" in definition["properties"]
        ]
        shown = {name: field["default"] for name, field in fields.items() if "default" in field}
        required = {"workspace": "/data/ws", "photos": "/p", "mse_model": "/m", "gan_model": "/g"}
        for kind in (Finetuning, Cycling):
            given = {name: value for name, value in required.items() if name in kind.model_fields}
            for preset in ("cpu", "paper"):
                sent = {name: value for name, value in shown.items() if name in kind.model_fields}
                assert kind(**sent | given | {"preset": preset}) == kind(**given, preset=preset)


@pytest.fixture(scope="module")
def client(prefect_environment) -> Iterator[SyncPrefectClient]:
    with (
        client_of(prefect_environment),
        get_client(sync_client=True) as client,
    ):
        yield client


def test_a_server_takes_deployments_and_refuses_bad_values(client, prefect_environment) -> None:
    register(deployments_of(serving(name="corpus", mine_at="daily at 2:00"), Machine()), client)
    url = keyed(prefect_environment)
    found = httpx.get(f"{url}/deployments/name/mine/corpus").json()
    assert found["schedules"][0]["schedule"] == {"cron": "0 2 * * *", "timezone": "Europe/Berlin", "day_or": True}
    assert set(found["tags"]) == {"desra", "corpus"}
    pool = httpx.get(f"{url}/work_pools/desra-corpus").json()
    assert (pool["type"], pool["concurrency_limit"]) == ("process", 1)

    def start(flow: str, **parameters: object) -> httpx.Response:
        deployment = httpx.get(f"{url}/deployments/name/{flow}/corpus").json()
        # The server answers 503 while another writer holds its SQLite; Prefect's clients try again too.
        for _ in range(60):
            body = {"parameters": parameters}
            answer = httpx.post(f"{url}/deployments/{deployment['id']}/create_flow_run", json=body, timeout=60)
            if answer.status_code != 503:
                break
            time.sleep(1)
        return answer

    mining = found["parameters"]["mining"]
    for bad, word in (({"threshold": 2}, "threshold"), ({"window": "wide"}, "window"), ({"thresold": 0.5}, "thresold")):
        refused = start("mine", mining=mining | bad)
        assert refused.status_code in (409, 422)
        assert word in refused.text
    assert start("finetune", finetuning={"patch": 8, "workspace": "/data/workspace"}).status_code in (409, 422)
    accepted = start("mine", mining=mining | {"threshold": 0.5})
    assert accepted.status_code == 201
    assert accepted.json()["work_pool_name"] == "desra-corpus"

    # A pause in the UI outlives a restart of desra serve: of the deployment, of its schedule, of the pool.
    [mine, *_] = deployments_of(serving(name="corpus", mine_at="daily at 2:00"), Machine())
    moment = next_run(mine, client)
    assert (moment.hour, moment.tzname()) in ((2, "CET"), (2, "CEST"))
    client.pause_deployment(found["id"])
    register([mine], client)
    assert next_run(mine, client) is None
    client.resume_deployment(found["id"])
    register([mine], client)
    assert next_run(mine, client) == moment
    [schedule] = client.read_deployment(found["id"]).schedules
    for active in (False, True):
        client.update_deployment_schedule(found["id"], schedule.id, active=active)
        client.update_work_pool("desra-corpus", WorkPoolUpdate(is_paused=not active))
        register([mine], client)
        [schedule] = client.read_deployment(found["id"]).schedules
        assert (schedule.active, client.read_work_pool("desra-corpus").is_paused) == (active, not active)

    # An interval is counted on, not begun anew at each start.
    [weekly, *_] = deployments_of(serving(name="corpus", mine_at="every week"), Machine())
    register([weekly], client)
    [schedule] = client.read_deployment(found["id"]).schedules
    assert schedule.schedule.anchor_date == datetime(2024, 1, 1, tzinfo=UTC)
    assert next_run(weekly, client).weekday() == 0

    # What is given anew replaces what was given before, schedules included.
    register(deployments_of(serving(name="corpus", mine_at="never", threshold=0.6), Machine())[:1], client)
    found = httpx.get(f"{url}/deployments/name/mine/corpus").json()
    assert found["schedules"] == []
    assert found["parameters"]["mining"]["threshold"] == 0.6
    # Another workspace of the same name is not overwritten.
    with pytest.raises(UsageError, match="/elsewhere/workspace another --name"):
        register(deployments_of(serving(name="corpus", workspace="/elsewhere/workspace"), Machine()), client)


POSTED = (
    {"command": "touch posted"},
    {"env": {"PYTHONSTARTUP": "posted.py"}},
    {"env.PATH": "/posted"},
    {"working_dir": "/posted"},
    {"name": "posted"},
    {"labels": {"posted": "posted"}},
    {"stream_output": False},
)


def test_a_request_cannot_choose_the_process_of_a_run(client, prefect_environment) -> None:
    """The server refuses a process in a posted run; the worker ignores one that is written to a run or a deployment."""
    deployed = deployments_of(serving(name="closed", mine_at="never"), Machine())[0]
    _make_open_pool(deployed.work_pool, client)  # as an older version has left it
    register([deployed], client)
    url, there = keyed(prefect_environment), client.read_deployment_by_name(deployed.full_name)
    assert there.job_variables == {}
    pool, run = client.read_work_pool(deployed.work_pool), client.create_flow_run_from_deployment(there.id)

    async def configured() -> ProcessJobConfiguration:
        async with get_client() as patient:
            patched = await patient.read_flow_run(run.id)
            return await ProcessJobConfiguration.resolve_for_flow_run(
                patched, client=patient, work_pool=pool, worker_name="worker"
            )

    for posted in POSTED:
        body = {"job_variables": posted}
        assert httpx.post(f"{url}/deployments/{there.id}/create_flow_run", json=body).status_code == 422, posted
        httpx.patch(f"{url}/flow_runs/{run.id}", json=body)
        httpx.patch(f"{url}/deployments/{there.id}", json=body)
        taken = asyncio.run(configured())
        assert (taken.command, taken.working_dir, taken.stream_output) == ("python -m prefect.engine", None, True)
        assert "posted" not in str(taken), posted
    client.delete_flow_run(run.id)


def _make_open_pool(name: str, client: SyncPrefectClient) -> None:
    template = ProcessWorker.get_default_base_job_template()
    pool = WorkPoolCreate(name=name, type="process", base_job_template=template)
    client.create_work_pool(pool, overwrite=True)


def test_a_workspace_that_was_moved_or_renamed_leaves_nothing_behind(client) -> None:
    """On its own server, which has moved along."""
    before = deployments_of(serving(name="before", mine_at="daily at 2:00"), Machine())
    register(before, client)
    somebodys = client.create_flow_from_name("somebody's own")
    kept = client.create_deployment(flow_id=somebodys, name="somebody's own", tags=["own"])
    run = client.create_flow_run_from_deployment(client.read_deployment_by_name("mine/before").id)
    client.set_flow_run_state(run.id, Completed(), force=True)
    for name, workspace in (("before", "/moved/workspace"), ("renamed", "/moved/workspace")):
        own = serving(name=name, workspace=workspace, mine_at="never", cycle_at="never")
        register(deployments_of(own, Machine()), client, own=True)
        there = [it for it in client.read_deployments() if "desra" in it.tags]
        assert {it.name for it in there} == {name}
        assert len(there) == 3
        assert "/data/workspace" not in str([it.parameters for it in there])
    assert client.read_deployment(kept).name == "somebody's own"
    assert client.read_flow_run(run.id).parameters["mining"]["workspace"] == "/data/workspace"


@pytest.mark.slow
def test_the_form_in_a_browser(client, prefect_environment, tmp_path) -> None:
    """Each setting has a field with its help text; a bad value is refused; a preset holds."""
    register(deployments_of(serving(name="form", preset="cpu", mine_at="never", cycle_at="never"), Machine()), client)
    # As somebody has it who gives no more than the preset.
    finetune = client.read_deployment_by_name("finetune/form")
    client.update_deployment(
        finetune.id, DeploymentUpdate(parameters={"finetuning": {"workspace": "/data/workspace", "preset": "cpu"}})
    )
    url, ui = keyed(prefect_environment), prefect_environment["PREFECT_API_URL"].removesuffix("/api")
    with opened(f"{ui}/enter#{prefect_environment['PREFECT_API_AUTH_STRING']}", tmp_path / "b", height=4000) as page:
        page.go(f"{ui}/deployments/deployment/{finetune.id}/run")

        def shows(text: str) -> None:
            for _ in range(150):
                if text in page.evaluate("document.body.innerText"):
                    return
                time.sleep(0.2)
            raise AssertionError(page.evaluate("document.body.innerText"))

        def fill_in(label: str, value: str) -> None:
            page.evaluate(_FILL_IN % {"label": json.dumps(label), "value": json.dumps(value)})
            time.sleep(1)  # before that, the form would send what was there

        shows("Submit")
        for field in Finetuning.model_fields.values():
            shows(" ".join(str(field.description).split()))
        fill_in("Mask Share", "2")
        page.evaluate(_SUBMIT)
        shows("Validation failed for field 'finetuning.mask_share'. Failure reason: 2 is greater than the maximum of 1")
        fill_in("Mask Share", "0.3")
        query = {"deployments": {"id": {"any_": [str(finetune.id)]}}}
        page.evaluate(_SUBMIT)
        for again in range(1, 150):
            # The form drops a click while it is still busy with what it has refused.
            if again % 50 == 0 and "Validation failed" in page.evaluate("document.body.innerText"):
                page.evaluate(_SUBMIT)
            if runs := httpx.post(f"{url}/flow_runs/filter", json=query).json():
                break
            time.sleep(0.2)
        assert runs, page.evaluate("document.body.innerText")
    [run] = runs
    sent = Finetuning(**run["parameters"]["finetuning"])
    assert sent == Finetuning(workspace=Path("/data/workspace"), preset="cpu", mask_share=0.3)


_SUBMIT = "[...document.querySelectorAll('button')].find(button => button.innerText.trim() === 'Submit').click()"


_FILL_IN = """(() => {
    let box = [...document.querySelectorAll('label, .p-label')].find(it => it.innerText.trim().startsWith(%(label)s));
    while (!box.querySelector('input')) box = box.parentElement;
    const input = box.querySelector('input');
    Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value').set.call(input, %(value)s);
    for (const kind of ['input', 'change']) input.dispatchEvent(new Event(kind, {bubbles: true}));
})()"""


def test_two_machines_do_not_serve_one_pool(prefect_environment) -> None:
    own = WORKER + socket.gethostname()
    with client_of(prefect_environment), connected() as client:
        check_alone("desra-alone", client)  # there is no such pool yet
        client.create_work_pool(WorkPoolCreate(name="desra-alone", type="process"))
        client.send_worker_heartbeat("desra-alone", own, heartbeat_interval_seconds=30)
        check_alone("desra-alone", client)
        client.send_worker_heartbeat("desra-alone", f"{WORKER}elsewhere", heartbeat_interval_seconds=30)
        told = r"the work pool desra-alone: has another worker already \(desra serve on elsewhere\); stop that one"
        with pytest.raises(UsageError, match=told):
            check_alone("desra-alone", client)
