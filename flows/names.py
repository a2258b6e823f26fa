"""Name a flow run in the UI: the flow, the corpus and the time."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefect.context import FlowRunContext
from prefect.runtime import flow_run


def run_name() -> str:
    """Return, for instance, ``mine holidays 2026-11-20 02:00``; Prefect calls this as ``flow_run_name`` of a flow."""
    settings = next(iter(flow_run.parameters.values()), None)
    return f"{flow_run.flow_name} {corpus_name(settings)} {_start().astimezone():%Y-%m-%d %H:%M}"


def _start() -> datetime:
    """Return the time the run starts: Prefect names a run seconds before, and again when it resumes."""
    context = FlowRunContext.get()
    run = context.flow_run if context else None
    now = datetime.now(UTC)
    return (run and (run.start_time or max(now, run.expected_start_time or now))) or now


def corpus_name(settings: Any) -> str:
    """Return the name of the folder of photos or of results, or of the workspace where none is given."""
    for field in ("photos", "gan_sr", "workspace"):
        value = getattr(settings, field, None) if not isinstance(settings, dict) else settings.get(field)
        if value:
            return Path(value).name
    return "corpus"
