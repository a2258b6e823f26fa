"""Runs that were cut off: the server learns that they have ended, and others go on with what they left."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from desra_core.errors import printable

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

INTERRUPTED = "Interrupted"

_UNFINISHED = {"type": {"any_": ["RUNNING", "PENDING", "CANCELLING"]}}
_MOST = 200
_ERROR_LENGTH = 300


def mark_interrupted(
    pool: str, client: SyncPrefectClient, why: str, *, older_than: timedelta = timedelta(0)
) -> list[str]:
    """Tell the server that no run of a work pool is going on, nor what these runs have called; returns their names.

    Parameters
    ----------
    pool
        The work pool.
    client
        Of the server.
    why
        What cut them off.
    older_than
        Leave out runs whose state is newer.
    """
    from prefect.states import Cancelled, Crashed

    latest = datetime.now(UTC) - older_than
    found = [run for run in _runs(pool, client, _UNFINISHED) if run.state and run.state.timestamp <= latest]
    for run in found:
        _mark_parts(run, client, why)
        state: Any = Crashed(name=INTERRUPTED, message=f"{why}; the next run goes on with what it left")
        if run.state and run.state.is_cancelling():
            state = Cancelled(message=why)
        client.set_flow_run_state(run.id, state, force=True)
    return [run.name for run in found]


def resume_interrupted(pool: str, client: SyncPrefectClient) -> list[str]:
    """Submit a run in the place of those that were cut off, one per deployment; returns a line for each.

    Parameters
    ----------
    pool, client
        As for `mark_interrupted`.
    """
    from prefect.exceptions import PrefectHTTPStatusError
    from prefect.states import Crashed

    lines = []
    resumed: set[UUID] = set()
    for run in _runs(pool, client, {"name": {"any_": [INTERRUPTED]}}):
        assert run.deployment_id is not None
        try:
            if run.deployment_id not in resumed:
                # Its own parameters, for somebody may have given others in the UI, but on the machine as it is.
                parameters = {name: value for name, value in run.parameters.items() if name != "machine"}
                client.create_flow_run_from_deployment(run.deployment_id, parameters=parameters)
                resumed.add(run.deployment_id)
                lines.append(f"{run.name} was cut off: another run goes on with what it left")
            told = "was cut off; another run went on with what it left"
        except PrefectHTTPStatusError as error:
            reason = printable(error.response.text)[:_ERROR_LENGTH]
            told = f"was cut off, and is not gone on with: its parameters are no longer accepted ({reason})"
            lines.append(f"{run.name} {told}")
        client.set_flow_run_state(run.id, Crashed(message=told), force=True)
    return lines


def _runs(pool: str, client: SyncPrefectClient, state: dict[str, Any]) -> list[FlowRun]:
    """The runs of a pool in some states, the newest first."""
    from prefect.client.schemas.filters import FlowRunFilter, WorkPoolFilter
    from prefect.client.schemas.sorting import FlowRunSort

    return client.read_flow_runs(
        work_pool_filter=WorkPoolFilter.model_validate({"name": {"any_": [pool]}}),
        flow_run_filter=FlowRunFilter.model_validate({"state": state}),
        sort=FlowRunSort.EXPECTED_START_TIME_DESC,
        limit=_MOST,
    )


def _mark_parts(run: FlowRun, client: SyncPrefectClient, why: str) -> None:
    """Mark the unfinished runs that a run has called, and the tasks of all of them."""
    from prefect.client.schemas.filters import FlowRunFilter, TaskRunFilter
    from prefect.states import Crashed

    of_run = {"parent_flow_run_id": {"any_": [str(run.id)]}, "state": _UNFINISHED}
    children = [child.id for child in client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate(of_run))]
    for child in children:
        client.set_flow_run_state(child, Crashed(message=why), force=True)
    tasks = client.read_task_runs(
        flow_run_filter=FlowRunFilter.model_validate({"id": {"any_": [run.id, *children]}}),
        task_run_filter=TaskRunFilter.model_validate({"state": _UNFINISHED}),
        limit=_MOST,
    )
    for task in tasks:
        client.set_task_run_state(task.id, Crashed(message=why), force=True)
