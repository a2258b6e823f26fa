"""Register the deployments of desra serve on a Prefect server, and mark, resume and delete their runs.

`prefect.yaml` has the same deployments for a server of your own; `tests/deployments/serving/test_schedules.py` compares
the two.
"""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from zoneinfo import ZoneInfo

from deployments.serving import processes
from deployments.serving.connection import connected
from desra_core.errors import UsageError, printable
from desra_core.settings import Machine, Mining
from desra_core.settings.models import Cycling, Finetuning, Period, Serving, parse_period, workspace_of
from tasks.logs import say

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun
    from prefect.client.schemas.responses import DeploymentResponse

T = TypeVar("T")

# The template by which a worker starts every run. Prefect's own template lets a run set its command, environment and
# working folder; even with an empty "env", a run could set its environment. So this one has no variables and no "env".
# It has a command, because without one a worker first starts another process for each run, to prepare a folder.
JOB_TEMPLATE = Path(__file__).with_name("work_pool.json")

# The beginning of the name of a worker on the server; the name of the machine follows.
WORKER = "desra serve on "

# The machine settings that enter a run's parameters; the others are for the cluster that desra serve starts.
_OF_A_RUN = {"scheduler", "cluster", "device", "tile", "log_level", "log_format"}

INTERRUPTED = "Interrupted"

_UNFINISHED = {"type": {"any_": ["RUNNING", "PENDING", "CANCELLING"]}}
_FINAL = {"type": {"any_": ["COMPLETED", "FAILED", "CRASHED", "CANCELLED"]}}
# The beginning of the message of an interrupted run that another run has replaced.
_CUT_OFF = "was cut off"
_ERROR_LENGTH = 300
# HTTP status codes by which the server refuses parameters, or says that the deployment has gone.
_REFUSALS = (404, 409, 422)


class Deployed(NamedTuple):
    """A flow with its parameters and its schedule, as a Prefect server knows it."""

    flow: str
    name: str
    parameters: dict[str, Any]
    period: Period
    timezone: str

    @property
    def entrypoint(self) -> str:
        """The module and function from which a worker imports the flow."""
        return f"flows.{self.flow}.{self.flow}"

    @property
    def full_name(self) -> str:
        """Prefect's name of the deployment."""
        return f"{self.flow}/{self.name}"

    @property
    def tags(self) -> list[str]:
        """Tags of its runs."""
        return ["desra", self.name]

    @property
    def work_pool(self) -> str:
        """Name of the work pool, which takes one run at a time, as a workspace does; others wait."""
        return f"desra-{self.name}"

    @property
    def workspace(self) -> str | None:
        """The workspace that its parameters name."""
        return workspace_of(self.parameters)

    @property
    def schedules(self) -> list[dict[str, Any]]:
        """The schedules in the form of `prefect.yaml`."""
        if self.period.cron:
            return [{"cron": self.period.cron, "timezone": self.timezone}]
        return [{"interval": self.period.every.total_seconds()}] if self.period.every else []


def deployments_of(serving: Serving, machine: Machine) -> list[Deployed]:
    """Make the deployments of a corpus: mine by the clock, finetune on demand, cycle by the clock.

    The parameters do not name the cluster of desra serve, because a deployment outlives that cluster.
    """
    where = machine.model_dump(mode="json", include=_OF_A_RUN, exclude_defaults=True)
    common: dict[str, Any] = {"machine": where} if where else {}

    def given(fields: Iterable[str]) -> dict[str, Any]:
        """Return the given settings as JSON values, without defaults: the flow fills these in."""
        return serving.model_dump(mode="json", include=serving.model_fields_set & set(fields))

    mine = {"mining": given(Mining.model_fields) | {"keep_mse": serving.keep_mse}, "current_model": True}
    if serving.finetune_after:
        mine["trigger"] = {"artifacts": serving.finetune_after, **given({"group_by"})}
    finetune = {"finetuning": given(Finetuning.model_fields), "current_model": True}
    return [
        Deployed(flow, serving.title, parameters | common, period, serving.clock)
        for flow, parameters, period in (
            ("mine", mine, parse_period(serving.mine_at)),
            ("finetune", finetune, Period()),
            ("cycle", {"cycling": given(Cycling.model_fields)}, parse_period(serving.cycle_at)),
        )
    ]


def register(deployments: Sequence[Deployed], client: SyncPrefectClient, *, own: bool = False) -> None:
    """Register the deployments of a workspace and their work pool on a server, in place of earlier ones.

    Args:
        deployments: The deployments.
        client: Of the server.
        own: Whether the server is the workspace's own. If so, delete the deployments under earlier names and paths of
            the workspace, whose runs no worker would take.

    Raises:
        UsageError: The server does not accept a deployment, or has one of its name for another workspace.
    """
    from prefect.deployments.runner import DeploymentApplyError, RunnerDeployment

    if own:
        _forget_others(deployments, client)
    known = [_registered(deployed, client) for deployed in deployments]
    _make_pool(deployments[0], client)
    for deployed, there in zip(deployments, known, strict=True):
        # A schedule that a person has paused in the UI stays paused.
        active = there is None or not there.schedules or any(schedule.active for schedule in there.schedules)
        try:
            RunnerDeployment.from_entrypoint(
                deployed.entrypoint,
                name=deployed.name,
                parameters=deployed.parameters,
                schedules=[_schedule(schedule, active=active) for schedule in deployed.schedules],
                tags=deployed.tags,
                work_pool_name=deployed.work_pool,
                job_variables={},
                paused=there is not None and there.paused,
            ).apply()
        except (DeploymentApplyError, ValueError) as error:
            remedy = "see the settings of the schedules and of the corpus"
            raise UsageError(deployed.full_name, f"is not accepted ({printable(error)})", remedy) from None


def check_alone(pool: str, client: SyncPrefectClient) -> None:
    """Check that no other machine takes runs of the pool: each would treat the other's runs as dead."""
    from prefect.exceptions import ObjectNotFound

    with contextlib.suppress(ObjectNotFound):
        for worker in client.read_workers_for_work_pool(client.read_work_pool(pool).name):
            online = worker.status is not None and worker.status.value == "ONLINE"
            if online and worker.name != WORKER + socket.gethostname():
                remedy = "stop that one, which the server notices after two minutes, or give another --name"
                raise UsageError(f"the work pool {pool}", f"has another worker already ({worker.name})", remedy)


def next_run(deployed: Deployed, client: SyncPrefectClient) -> datetime | None:
    """Return when a deployment runs next by its schedule, in its time zone; None without a next run."""
    if not deployed.schedules:
        return None
    deployment = client.read_deployment_by_name(deployed.full_name)
    if deployment.paused:
        return None
    client.request("POST", "/deployments/{id}/schedule", path_params={"id": str(deployment.id)}, json={})
    query = {
        "deployments": {"id": {"any_": [str(deployment.id)]}},
        "flow_runs": {
            "state": {"type": {"any_": ["SCHEDULED"]}},
            "next_scheduled_start_time": {"after_": datetime.now(UTC).isoformat()},
        },
        "sort": "NEXT_SCHEDULED_START_TIME_ASC",
        "limit": 1,
    }
    for run in client.request("POST", "/flow_runs/filter", json=query).json():
        return datetime.fromisoformat(run["next_scheduled_start_time"]).astimezone(ZoneInfo(deployed.timezone))
    return None


def mark_interrupted(pool: str, client: SyncPrefectClient, why: str, *, settled: timedelta | None = None) -> list[str]:
    """Mark the dead runs of a work pool on the server, with the runs and tasks that they have called.

    A run with a process on this machine is alive, even while it waits to try again and holds no workspace.

    Args:
        pool: Name of the work pool.
        client: Of the server.
        why: The reason, for the message of each run.
        settled: Leave out runs whose state is newer than this: their process may be about to start.

    Returns:
        The names of the marked runs.
    """
    # List processes first, then runs: a run that ends in between reports its end itself.
    going_on = {environment.get("PREFECT__FLOW_RUN_ID") for _, environment in processes.environments()}
    runs = [run for run in _runs(pool, client, _UNFINISHED) if str(run.id) not in going_on]
    return _mark(runs, client, why, settled)


def mark_killed(workspace: Path, client: SyncPrefectClient, *, settled: timedelta | None = None) -> list[str]:
    """Mark the dead among the runs that people started, on the workspace's own server, as `mark_interrupted` does.

    The caller must hold the lock of the workspace, which a live run would hold.
    """
    from prefect.client.schemas.filters import FlowRunFilter

    by_hand = {"deployment_id": {"is_null_": True}, "parent_task_run_id": {"is_null_": True}, "state": _UNFINISHED}
    runs = _all(client.read_flow_runs, flow_run_filter=FlowRunFilter.model_validate(by_hand))
    ours = [run for run in runs if workspace_of(run.parameters) == str(workspace)]
    return _mark(ours, client, "it was killed", settled)


def resume_interrupted(pool: str, client: SyncPrefectClient) -> list[str]:
    """Submit a run for each deployment that has interrupted runs; return the lines to print about them."""
    from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
    from prefect.states import Crashed

    lines = []
    resumed: set[UUID] = set()
    for run in _runs(pool, client, {"name": {"any_": [INTERRUPTED]}}):
        assert run.deployment_id is not None
        try:
            if run.deployment_id not in resumed:
                # Keep the run's parameters, which a person may have changed in the UI, except those of the machine.
                parameters = {name: value for name, value in run.parameters.items() if name != "machine"}
                client.create_flow_run_from_deployment(
                    run.deployment_id, parameters=parameters, idempotency_key=f"instead of {run.id}"
                )
                resumed.add(run.deployment_id)
                lines.append(f"warning: {run.name} {_CUT_OFF}: another run goes on from there")
            message = f"{_CUT_OFF}; another run went on from there"
        except PrefectHTTPStatusError as error:
            if error.response.status_code not in _REFUSALS:
                raise
            reason = printable(error.response.text)[:_ERROR_LENGTH]
            message = f"{_CUT_OFF}, and is not resumed: the server does not accept another run ({reason})"
            lines.append(f"error: {run.name} {message}")
        with contextlib.suppress(ObjectNotFound):  # it was deleted meanwhile
            client.set_flow_run_state(run.id, Crashed(message=message), force=True)
    return lines


def drop_missed(pool: str, client: SyncPrefectClient, *, settled: timedelta) -> None:
    """Delete the overdue runs of each deployment, except the latest one, which takes in all new images.

    Runs pile up in a week without desra serve, or during a long cycle. Runs that have waited for less than
    ``settled`` are left alone.
    """
    from prefect.exceptions import ObjectNotFound

    latest = datetime.now(UTC) - settled
    kept: set[UUID | None] = set()
    for run in _runs(pool, client, {"type": {"any_": ["SCHEDULED"]}}):
        if run.auto_scheduled and run.expected_start_time and run.expected_start_time < latest:
            if run.deployment_id in kept:
                with contextlib.suppress(ObjectNotFound):  # it was deleted meanwhile
                    client.delete_flow_run(run.id)
            kept.add(run.deployment_id)


class Endings:
    """Print how each run of a pool has ended, as the server knows it: a killed run prints nothing itself.

    ``queue`` is the number of runs that run and that wait for their turn; empty while the server does not answer.
    """

    def __init__(self, pool: str) -> None:
        self.pool = pool
        self._latest = datetime.now(UTC)
        self._said: set[tuple[UUID, datetime | None]] = set()  # a run that is tried again ends twice
        self.queue: dict[str, int] = {}

    def say_new(self) -> None:
        """Print a line for each run that has ended since the last call, except interrupted runs; count the others."""
        queue: dict[str, int] = {}
        with contextlib.suppress(UsageError), connected() as client:  # a silent server is reported elsewhere
            due = {"before_": datetime.now(UTC)}
            waiting = _runs(self.pool, client, {"type": {"any_": ["SCHEDULED"]}}, expected_start_time=due)
            queue = {"running": len(_runs(self.pool, client, _UNFINISHED)), "waiting": len(waiting)}
            ended = _runs(self.pool, client, _FINAL, end_time={"after_": self._latest})
            for run in sorted(ended, key=lambda run: run.end_time or self._latest):
                assert run.state is not None
                end, state, message = (run.id, run.end_time), run.state, run.state.message or "no reason is known"
                if end in self._said or state.name == INTERRUPTED or message.startswith(_CUT_OFF):
                    continue
                self._said.add(end)
                self._latest = run.end_time or self._latest
                level = "" if state.is_completed() else "warning: " if state.is_cancelled() else "error: "
                name = (state.name or state.type.value).lower()
                say(f"{level}{printable(run.name)} {name}: {printable(message)}", run=run.name)
        self.queue = queue


def _make_pool(deployed: Deployed, client: SyncPrefectClient) -> None:
    """Create or update the work pool of a deployment; a pool that a person has paused stays paused."""
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectNotFound

    paused = False
    with contextlib.suppress(ObjectNotFound):
        paused = client.read_work_pool(deployed.work_pool).is_paused
    pool = WorkPoolCreate(
        name=deployed.work_pool, type="process", concurrency_limit=1, is_paused=paused,
        base_job_template=json.loads(JOB_TEMPLATE.read_bytes()),
        description=f"One run at a time for {deployed.workspace}.",
    )  # fmt: skip
    client.create_work_pool(pool, overwrite=True)


def _schedule(schedule: dict[str, Any], *, active: bool) -> Any:
    from prefect.schedules import Cron, Interval

    if "cron" in schedule:
        return Cron(schedule["cron"], timezone=schedule["timezone"], active=active)
    # Count from a fixed Monday: else each start of desra serve would begin the interval anew.
    return Interval(schedule["interval"], anchor_date=datetime(2024, 1, 1, tzinfo=UTC), active=active)


def _forget_others(deployments: Sequence[Deployed], client: SyncPrefectClient) -> None:
    """Delete the deployments of this workspace under other names, and the deployments of vanished workspaces."""
    from prefect.client.schemas.filters import DeploymentFilter

    kept = {(deployed.name, deployed.workspace) for deployed in deployments}
    own = {workspace for _, workspace in kept}
    desra = DeploymentFilter.model_validate({"tags": {"all_": ["desra"]}})
    for there in client.read_deployments(deployment_filter=desra):
        workspace = workspace_of(there.parameters)
        renamed = workspace in own and (there.name, workspace) not in kept
        moved = workspace not in own and workspace is not None and not Path(workspace).exists()
        if renamed or moved:
            client.delete_deployment(there.id)


def _registered(deployed: Deployed, client: SyncPrefectClient) -> DeploymentResponse | None:
    """Return the deployment on the server, or None; raise where it belongs to another workspace."""
    from prefect.exceptions import ObjectNotFound

    try:
        there = client.read_deployment_by_name(deployed.full_name)
    except ObjectNotFound:
        return None
    if (known := workspace_of(there.parameters)) != deployed.workspace:
        reason = f"is the deployment of another workspace, {known}, on this Prefect server"
        raise UsageError(deployed.full_name, reason, f"give that of {deployed.workspace} another --name")
    return there


def _mark(runs: list[FlowRun], client: SyncPrefectClient, why: str, settled: timedelta | None) -> list[str]:
    """Give dead runs their final state; return their names."""
    from prefect.exceptions import ObjectNotFound
    from prefect.states import Cancelled, Crashed

    names = []
    for run in runs:
        assert run.state is not None
        # After the clock was set back, a state may lie in the future.
        if settled is not None and abs(datetime.now(UTC) - run.state.timestamp) < settled:
            continue
        state: Any = Crashed(name=INTERRUPTED, message=f"{why}; the next run goes on from there")
        if run.state.is_cancelling():
            state = Cancelled(message=why)
        with contextlib.suppress(ObjectNotFound):  # it was deleted meanwhile
            _end(run.id, client, why, state)
            names.append(run.name)
    return names


def _end(run_id: UUID, client: SyncPrefectClient, why: str, state: Any) -> None:
    """Give a run its final state, after the unfinished runs and tasks that it has called."""
    from prefect.client.schemas.filters import FlowRunFilter, TaskRunFilter
    from prefect.states import Crashed

    called = {"parent_flow_run_id": {"any_": [str(run_id)]}, "state": _UNFINISHED}
    for child in _all(client.read_flow_runs, flow_run_filter=FlowRunFilter.model_validate(called)):
        _end(child.id, client, why, Crashed(message=why))
    tasks = _all(
        client.read_task_runs,
        flow_run_filter=FlowRunFilter.model_validate({"id": {"any_": [run_id]}}),
        task_run_filter=TaskRunFilter.model_validate({"state": _UNFINISHED}),
    )
    for task in tasks:
        client.set_task_run_state(task.id, Crashed(message=why), force=True)
    client.set_flow_run_state(run_id, state, force=True)


def _runs(pool: str, client: SyncPrefectClient, state: dict[str, Any], **also: Any) -> list[FlowRun]:
    """List the runs of a pool's deployments in some states, the newest first; ``also`` are Prefect's filters."""
    from prefect.client.schemas.filters import FlowRunFilter, WorkPoolFilter
    from prefect.client.schemas.sorting import FlowRunSort

    return _all(
        client.read_flow_runs,
        work_pool_filter=WorkPoolFilter.model_validate({"name": {"any_": [pool]}}),
        flow_run_filter=FlowRunFilter.model_validate({"state": state, "deployment_id": {"is_null_": False}} | also),
        sort=FlowRunSort.EXPECTED_START_TIME_DESC,
    )


def _all(read: Callable[..., list[T]], **query: Any) -> list[T]:
    """Read all pages of an answer."""
    found: list[T] = []
    while page := read(**query, offset=len(found)):
        found += page
    return found
