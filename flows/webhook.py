"""Report the end of a run: a line on stderr for a run of a deployment, a message to the webhook for a failure."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import Any

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.flows import Flow
from prefect.logging.loggers import flow_run_logger
from prefect.settings import get_current_settings
from pydantic import ValidationError

from desra_core.errors import printable
from desra_core.settings import Machine
from desra_core.settings.serving import workspace_of
from tasks.logs import configure, say

WEBHOOK = "DESRA_WEBHOOK"

_SECONDS = 5


def report_failure(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Write to log, stderr and webhook why a run failed: a hook for ``on_failure`` and ``on_crashed``. Never fails."""
    logger = flow_run_logger(flow_run, flow)
    logger.error("%s: %s", state.name, _reason(flow, flow_run, state))
    if flow_run.parent_task_run_id:  # the run that called this one reports it
        return
    message = failure_message(flow, flow_run, state)
    if flow_run.deployment_id:  # a run by hand ends with a message of the command
        _say(f"error: {message['run']} {(state.name or '').lower()}: {message['message']}", flow_run, message)
    if (webhook := os.environ.get(WEBHOOK)) and (trouble := post_to_webhook(webhook, message)):
        logger.warning(trouble)
        _say(f"warning: {message['run']}: {trouble}", flow_run, message)


def report_cancelled(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Say on stderr that a run was cancelled: a hook for ``on_cancellation``."""
    if not flow_run.parent_task_run_id:
        message = failure_message(flow, flow_run, state)
        _say(f"warning: {message['run']} was cancelled", flow_run, message)


def _say(line: str, flow_run: FlowRun, message: Mapping[str, str | None]) -> None:
    """Print a line in the format of the run: the Prefect worker, which reports crashed runs, has not configured it."""
    with contextlib.suppress(ValidationError):
        machine = Machine.model_validate(flow_run.parameters.get("machine", {}))
        configure(machine.log_level, machine.log_format)
    say(line, run=message["run"], workspace=message["workspace"])


def post_to_webhook(address: str, message: Mapping[str, str | None]) -> str | None:
    """Send a message to a webhook. Never fails.

    Args:
        address: URL of the webhook.
        message: The fields of a JSON object.

    Returns:
        The reason if the webhook was not reached, without the address, which is secret.
    """
    try:
        httpx.post(address, json=message, timeout=_SECONDS).raise_for_status()
    except httpx.HTTPStatusError as error:
        return f"the webhook was not reached: HTTP {error.response.status_code}"
    except Exception as error:  # noqa: BLE001 - whatever is wrong there, something else has failed for its own reason
        return f"the webhook was not reached: {type(error).__name__}"
    return None


def failure_message(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> dict[str, str | None]:
    """Make the JSON message of a failed run for the webhook; Slack and Mattermost show its ``text``."""
    message = _reason(flow, flow_run, state)
    name, deployment = flow_run.name, os.environ.get("PREFECT__DEPLOYMENT_NAME")
    if deployment is None and flow_run.deployment_id:  # in the Prefect worker, which reports a crashed run
        deployment = str(flow_run.deployment_id)
        with contextlib.suppress(Exception), get_client(sync_client=True) as client:  # or the message goes without
            name = client.read_flow_run(flow_run.id).name
            deployment = client.read_deployment(flow_run.deployment_id).name
    page = get_current_settings().ui_url
    url = f"{page}/runs/flow-run/{flow_run.id}" if page else None
    return {
        "text": f"{flow.name} {(state.name or '').lower()}: {name}: {message}" + (f" {url}" if url else ""),
        "deployment": deployment,
        "flow": flow.name,
        "run": name,
        "run_id": str(flow_run.id),
        "state": state.name,
        "message": message,
        "url": url,
        "workspace": workspace_of(flow_run.parameters),
    }


def _reason(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> str:
    """Say why a run failed; one with parameters that the flow does not take crashes without a reason of its own."""
    if state.is_crashed():
        try:
            flow.validate_parameters(flow_run.parameters)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the reason
            return printable(error)
    return printable(state.message or "no reason is known")
