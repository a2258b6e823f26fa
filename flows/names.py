"""What a flow run is called in the UI: what it does, to which corpus, and when."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefect.context import FlowRunContext
from prefect.runtime import flow_run


def run_name() -> str:
    """For instance ``mine holidays 2026-11-20 02:00``; for ``flow_run_name`` of a flow with one settings model."""
    settings = next(iter(flow_run.parameters.values()), None)
    return f"{flow_run.flow_name} {corpus_name(settings)} {_start().astimezone():%Y-%m-%d %H:%M}"


def _start() -> datetime:
    """When the run has started or will: Prefect asks some seconds before, and again when it goes on after a cut."""
    context = FlowRunContext.get()
    run = context.flow_run if context else None
    now = datetime.now(UTC)
    return (run and (run.start_time or max(now, run.expected_start_time or now))) or now


def corpus_name(settings: Any) -> str:
    """The folder of photos or of results, or the workspace where none is given."""
    for field in ("photos", "gan_sr", "workspace"):
        value = getattr(settings, field, None) if not isinstance(settings, dict) else settings.get(field)
        if value:
            return Path(value).name
    return "corpus"
