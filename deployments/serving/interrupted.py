"""Runs that were cut off or missed: the server learns of it, and others go on with what they left."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import psutil

from desra_core.errors import printable
from desra_core.settings.serving import workspace_of

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

T = TypeVar("T")

INTERRUPTED = "Interrupted"

_UNFINISHED = {"type": {"any_": ["RUNNING", "PENDING", "CANCELLING"]}}
_FINAL = {"type": {"any_": ["COMPLETED", "FAILED", "CRASHED", "CANCELLED"]}}
# How the message of a run begins that was marked as interrupted, once others have gone on with what it left.
_CUT_OFF = "was cut off"
_ERROR_LENGTH = 300
# What the server answers where it does not take the parameters, or where the deployment has gone.
_REFUSALS = (404, 409, 422)


def mark_interrupted(pool: str, client: SyncPrefectClient, why: str, *, settled: timedelta | None = None) -> list[str]:
    """Tell the server that runs of a work pool have ended, and what these have called; returns their names.

    Those that have a process on this machine go on, also if they hold no workspace, as one that waits to try again.

    Parameters
    ----------
    pool
        The work pool.
    client
        Of the server.
    why
        What cut them off.
    settled
        Leave out runs whose state is newer than that: their process may be about to start.
    """
    going_on = _going_on()  # before: one that ends meanwhile says so to the server
    runs = [run for run in _runs(pool, client, _UNFINISHED) if str(run.id) not in going_on]
    return _mark(runs, client, why, settled)


def mark_killed(workspace: Path, client: SyncPrefectClient, *, settled: timedelta | None = None) -> list[str]:
    """Tell the server that runs which people had started by hand have ended, and what these have called.

    Parameters
    ----------
    workspace
        Of the runs. Nobody but the caller may hold it, as one that goes on does.
    client, settled
        As for `mark_interrupted`; the server must be that of the workspace.
    """
    from prefect.client.schemas.filters import FlowRunFilter

    by_hand = {"deployment_id": {"is_null_": True}, "parent_task_run_id": {"is_null_": True}, "state": _UNFINISHED}
    runs = _all(client.read_flow_runs, flow_run_filter=FlowRunFilter.model_validate(by_hand))
    ours = [run for run in runs if workspace_of(run.parameters) == str(workspace)]
    return _mark(ours, client, "it was killed", settled)


def resume_interrupted(pool: str, client: SyncPrefectClient) -> list[str]:
    """Submit a run in the place of those that were cut off, one per deployment; returns a line for each.

    Parameters
    ----------
    pool, client
        As for `mark_interrupted`.
    """
    from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
    from prefect.states import Crashed

    lines = []
    resumed: set[UUID] = set()
    for run in _runs(pool, client, {"name": {"any_": [INTERRUPTED]}}):
        assert run.deployment_id is not None
        try:
            if run.deployment_id not in resumed:
                # Its own parameters, for somebody may have given others in the UI, but on the machine as it is.
                parameters = {name: value for name, value in run.parameters.items() if name != "machine"}
                client.create_flow_run_from_deployment(
                    run.deployment_id, parameters=parameters, idempotency_key=f"instead of {run.id}"
                )
                resumed.add(run.deployment_id)
                lines.append(f"warning: {run.name} {_CUT_OFF}: another run goes on with what it left")
            told = f"{_CUT_OFF}; another run went on with what it left"
        except PrefectHTTPStatusError as error:
            if error.response.status_code not in _REFUSALS:
                raise
            reason = printable(error.response.text)[:_ERROR_LENGTH]
            told = f"{_CUT_OFF}, and is not gone on with: the server does not accept another run ({reason})"
            lines.append(f"error: {run.name} {told}")
        with contextlib.suppress(ObjectNotFound):  # somebody has deleted it meanwhile
            client.set_flow_run_state(run.id, Crashed(message=told), force=True)
    return lines


def drop_missed(pool: str, client: SyncPrefectClient, *, settled: timedelta) -> int:
    """Of the runs that a clock should have started some time ago and that wait, leave the latest of each deployment.

    One takes in all that has come since, be it after a week without desra serve or at the end of a long cycle.

    Parameters
    ----------
    pool, client
        As for `mark_interrupted`.
    settled
        Leave out runs that have not waited so long.

    Returns
    -------
    How many were deleted.
    """
    from prefect.exceptions import ObjectNotFound

    latest = datetime.now(UTC) - settled
    waiting = _runs(pool, client, {"type": {"any_": ["SCHEDULED"]}})
    missed = [
        run for run in waiting if run.auto_scheduled and run.expected_start_time and run.expected_start_time < latest
    ]
    first = {run.deployment_id: run.id for run in reversed(missed)}
    superfluous = [run.id for run in missed if first[run.deployment_id] != run.id]
    for run_id in superfluous:
        with contextlib.suppress(ObjectNotFound):  # somebody has deleted it meanwhile
            client.delete_flow_run(run_id)
    return len(superfluous)


def ended_since(pool: str, client: SyncPrefectClient, moment: datetime) -> list[FlowRun]:
    """The runs of a work pool that have ended since a moment, the earliest first, but for those that were cut off.

    Parameters
    ----------
    pool, client
        As for `mark_interrupted`.
    moment
        By the clock of who told the server so.
    """
    ended = _runs(pool, client, _FINAL, end_time={"after_": moment})
    whole = [run for run in ended if run.state and not (run.state.message or "").startswith(_CUT_OFF)]
    return sorted((run for run in whole if run.state_name != INTERRUPTED), key=lambda run: run.end_time or moment)


def _going_on() -> set[str | None]:
    """The ids of the runs that have a process on this machine."""
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            found.add(process.environ().get("PREFECT__FLOW_RUN_ID"))
    return found


def _mark(runs: list[FlowRun], client: SyncPrefectClient, why: str, settled: timedelta | None) -> list[str]:
    """Give dead runs their final state; returns their names."""
    from prefect.exceptions import ObjectNotFound
    from prefect.states import Cancelled, Crashed

    names = []
    for run in runs:
        assert run.state is not None
        # By a clock that was set back, a state is from the future.
        if settled is not None and abs(datetime.now(UTC) - run.state.timestamp) < settled:
            continue
        state: Any = Crashed(name=INTERRUPTED, message=f"{why}; the next run goes on with what it left")
        if run.state.is_cancelling():
            state = Cancelled(message=why)
        with contextlib.suppress(ObjectNotFound):  # somebody has deleted it meanwhile
            _end(run.id, client, why, state)
            names.append(run.name)
    return names


def _runs(pool: str, client: SyncPrefectClient, state: dict[str, Any], **also: Any) -> list[FlowRun]:
    """The runs of a pool's deployments in some states, the newest first; ``also`` are Prefect's filters."""
    from prefect.client.schemas.filters import FlowRunFilter, WorkPoolFilter
    from prefect.client.schemas.sorting import FlowRunSort

    return _all(
        client.read_flow_runs,
        work_pool_filter=WorkPoolFilter.model_validate({"name": {"any_": [pool]}}),
        flow_run_filter=FlowRunFilter.model_validate({"state": state, "deployment_id": {"is_null_": False}} | also),
        sort=FlowRunSort.EXPECTED_START_TIME_DESC,
    )


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


def _all(read: Callable[..., list[T]], **query: Any) -> list[T]:
    """What there is, of which the server gives a page at a time."""
    found: list[T] = []
    while page := read(**query, offset=len(found)):
        found += page
    return found
