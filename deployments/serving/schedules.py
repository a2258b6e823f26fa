"""The deployments of desra serve for its corpus, the same as those in `prefect.yaml` for your own server.

`tests/deployments/serving/test_schedules.py` holds the two against each other.
"""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from zoneinfo import ZoneInfo

from desra_core.errors import UsageError, printable
from desra_core.settings import Machine, Mining
from desra_core.settings.models import Cycling, Finetuning
from desra_core.settings.serving import Period, Serving, parse_period, workspace_of

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.responses import DeploymentResponse

# The template by which a worker starts every run. Prefect's own template takes any command, environment and working
# folder from a run; even with an empty "env" here, a run could set its environment. Without a command here, a worker
# would first start another process for each run, to prepare a folder.
JOB_TEMPLATE = Path(__file__).with_name("work_pool.json")

# The beginning of the name of a worker on the server; the name of the machine follows.
WORKER = "desra serve on "

# The machine settings that enter a run's parameters; the others are for the cluster that desra serve starts.
_OF_A_RUN = {"scheduler", "device", "tile", "log_level", "log_format"}


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

    Their parameters leave out the cluster of desra serve, which a deployment outlives.
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
    known = [_own(deployed, client) for deployed in deployments]
    _make_pool(deployments[0], client)
    for deployed, there in zip(deployments, known, strict=True):
        # A schedule that a person has paused in the UI stays so.
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
    """Check that no other machine takes runs of the pool: each would take the other machine's runs for dead."""
    from prefect.exceptions import ObjectNotFound

    with contextlib.suppress(ObjectNotFound):
        for worker in client.read_workers_for_work_pool(client.read_work_pool(pool).name):
            online = worker.status is not None and worker.status.value == "ONLINE"
            if online and worker.name != WORKER + socket.gethostname():
                remedy = "stop that one, which the server notices after two minutes, or give another --name"
                raise UsageError(f"the work pool {pool}", f"has another worker already ({worker.name})", remedy)


def next_run(deployed: Deployed, client: SyncPrefectClient) -> datetime | None:
    """Return when a deployment runs next by its schedule, in its time zone; None without a next run.

    Raises:
        UsageError: The server cannot plan runs.
    """
    from prefect.exceptions import PrefectHTTPStatusError

    if not deployed.schedules:
        return None
    deployment = client.read_deployment_by_name(deployed.full_name)
    if deployment.paused:
        return None
    try:
        client.request("POST", "/deployments/{id}/schedule", path_params={"id": str(deployment.id)}, json={})
    except PrefectHTTPStatusError as error:
        reason = f"cannot be planned by the Prefect server, which answers {error.response.status_code}"
        remedy = "read the log of the server; is its SQLAlchemy below 2.1?"
        raise UsageError(deployed.full_name, reason, remedy) from None
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
    # From a fixed Monday, or each start of desra serve would begin the interval anew.
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


def _own(deployed: Deployed, client: SyncPrefectClient) -> DeploymentResponse | None:
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
