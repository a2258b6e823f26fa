"""The runs of a workspace's deployments on a server: runs that were cut off or missed, and the ends of the others."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import psutil

from deployments.serving.connection import connected
from desra_core.errors import UsageError, printable
from desra_core.settings.serving import workspace_of
from tasks.logs import say

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

T = TypeVar("T")

INTERRUPTED = "Interrupted"

_UNFINISHED = {"type": {"any_": ["RUNNING", "PENDING", "CANCELLING"]}}
_FINAL = {"type": {"any_": ["COMPLETED", "FAILED", "CRASHED", "CANCELLED"]}}
# The message of an interrupted run begins so once another run has gone on in its place.
_CUT_OFF = "was cut off"
_ERROR_LENGTH = 300
# The server's answers where it does not take the parameters, or where the deployment has gone.
_REFUSALS = (404, 409, 422)


def mark_interrupted(pool: str, client: SyncPrefectClient, why: str, *, settled: timedelta | None = None) -> list[str]:
    """Mark the dead runs of a work pool on the server, with the runs and tasks that they have called.

    A run that has a process on this machine goes on, even if it holds no workspace while it waits to try again.

    Args:
        pool: Name of the work pool.
        client: Of the server.
        why: The reason for the message of the runs.
        settled: Leave out runs whose state is newer than this: their process may be about to start.

    Returns:
        The names of the marked runs.
    """
    going_on = set()  # looked up before the runs: a run that ends in between reports its end itself
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            going_on.add(process.environ().get("PREFECT__FLOW_RUN_ID"))
    runs = [run for run in _runs(pool, client, _UNFINISHED) if str(run.id) not in going_on]
    return _mark(runs, client, why, settled)


def mark_killed(workspace: Path, client: SyncPrefectClient, *, settled: timedelta | None = None) -> list[str]:
    """Mark dead runs by hand on the workspace's own server, as `mark_interrupted` does.

    The caller must hold the lock of the workspace, so that no live run does.
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


def drop_missed(pool: str, client: SyncPrefectClient, *, settled: timedelta) -> int:
    """Delete the overdue runs of each deployment, except the latest one, which takes in all new images.

    Runs pile up in a week without desra serve, or during a long cycle. Those that have waited for less than ``settled``
    are left alone. Returns how many were deleted.
    """
    from prefect.exceptions import ObjectNotFound

    latest = datetime.now(UTC) - settled
    kept: set[UUID | None] = set()
    dropped = 0
    for run in _runs(pool, client, {"type": {"any_": ["SCHEDULED"]}}):
        if run.auto_scheduled and run.expected_start_time and run.expected_start_time < latest:
            if run.deployment_id in kept:
                with contextlib.suppress(ObjectNotFound):  # it was deleted meanwhile
                    client.delete_flow_run(run.id)
                dropped += 1
            kept.add(run.deployment_id)
    return dropped


class Endings:
    """Print how each run of a pool has ended, as the server knows it: a killed run prints nothing itself."""

    def __init__(self, pool: str) -> None:
        self.pool = pool
        self._latest = datetime.now(UTC)
        self._said: set[tuple[UUID, datetime | None]] = set()  # a run that is tried again ends twice

    def say_new(self) -> None:
        """Print a line for each run that has ended since the last call, except interrupted runs."""
        with contextlib.suppress(UsageError), connected() as client:  # a silent server is reported elsewhere
            ended = _runs(self.pool, client, _FINAL, end_time={"after_": self._latest})
            for run in sorted(ended, key=lambda run: run.end_time or self._latest):
                end, state = (run.id, run.end_time), run.state
                if end in self._said or state is None or state.name == INTERRUPTED:
                    continue
                message = state.message or "no reason is known"
                if message.startswith(_CUT_OFF):
                    continue
                self._said.add(end)
                self._latest = run.end_time or self._latest
                level = "" if state.is_completed() else "warning: " if state.is_cancelled() else "error: "
                name = (state.name or state.type.value).lower()
                say(f"{level}{printable(run.name)} {name}: {printable(message)}", run=run.name)


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
