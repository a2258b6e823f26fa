"""Start a finetune at the end of a mining run, if enough new artifacts have gathered."""

from __future__ import annotations

from typing import cast

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import DeploymentFilter, FlowFilter, FlowRunFilter
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.runtime import deployment

from desra_core.errors import LockedError
from desra_core.settings.serving import FinetuneTrigger
from desra_core.training.pools import count_new
from desra_core.workspace import Workspace


@task(task_run_name="start-finetune", cache_policy=NO_CACHE)
def start_finetune(workspace: Workspace, trigger: FinetuneTrigger) -> int:
    """Submit the finetune deployment beside that of this run, if enough has gathered and none is waiting yet.

    Returns:
        The number of images with artifacts that have gathered since the last finetune; 0 if another process has locked
        the workspace meanwhile.
    """
    logger = get_run_logger()
    try:
        with workspace.locked():
            gathered = count_new(workspace, trigger.group_by)
    except LockedError as error:  # by a command that began after the mining, which is done nevertheless
        logger.info("%s; the next run counts the images that have gathered", error)
        return 0
    since = f"{gathered} images with artifacts have gathered since the last finetune"
    if gathered < trigger.artifacts:
        logger.info("%s; the next begins at %d", since, trigger.artifacts)
    elif not deployment.id:
        logger.info("%s, but this run has no deployment whose finetune could be started", since)
    elif _is_waiting(name := f"finetune/{deployment.name}"):
        logger.info("%s; a finetune is waiting already", since)
    else:
        # Not as a run within this one, which ends now.
        run = cast(FlowRun, run_deployment(name, timeout=0, as_subflow=False, tags=["gathered"]))
        logger.info("%s: started %s", since, run.name)
    return gathered


def _is_waiting(name: str) -> bool:
    """Say whether a run of the deployment is scheduled."""
    flow_name, _, deployment_name = name.partition("/")
    with get_client(sync_client=True) as client:
        waiting = client.read_flow_runs(
            flow_filter=FlowFilter.model_validate({"name": {"any_": [flow_name]}}),
            deployment_filter=DeploymentFilter.model_validate({"name": {"any_": [deployment_name]}}),
            flow_run_filter=FlowRunFilter.model_validate({"state": {"type": {"any_": ["SCHEDULED", "PENDING"]}}}),
            limit=1,
        )
    return bool(waiting)
