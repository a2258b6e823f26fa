"""What a flow run is called."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime, timedelta

from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext

from flows.finetune import finetune
from flows.names import run_name


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
