"""What the UI shows of a run from its first second: what there is to do, where to watch, and what is done already."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.runtime import flow_run

from desra_core.plan import Plan
from desra_core.settings import CorpusSettings


def tag_run(*tags: str) -> None:
    """Add tags to the flow run that calls this."""
    with get_client(sync_client=True) as client:
        client.update_flow_run(flow_run.id, tags=sorted({*flow_run.tags, *tags}))


def show_overview(settings: CorpusSettings, plan: Plan, dashboard: str) -> None:
    """Publish what a run is about to do as an artifact.

    Parameters
    ----------
    settings
        What is wanted.
    plan
        What there is to do.
    dashboard
        Address of the cluster's own page.
    """
    idle = plan.idle_shards
    lines = [
        f"**desra {settings.verb}** of `{settings.sources.main}` into `{settings.workspace}`",
        "",
        f"- {plan.images} images: {plan.done} done before, {plan.failed} failed for good, {plan.pending} to do",
        f"- {len(plan.shards)} shards to do; {len(idle)} with nothing to do, which are not submitted: {ranges(idle)}",
        f"- [Dask dashboard]({dashboard}), while the run lasts",
        f"- the report: `{settings.workspace / 'report.html'}`",
    ]
    create_markdown_artifact("\n".join(lines), key="overview", description="What this run has to do.")


def ranges(numbers: Sequence[int]) -> str:
    """Sorted numbers in few words.

    Examples
    --------
    >>> ranges([0, 1, 2, 5, 7, 8])
    '0–2, 5, 7–8'
    >>> ranges([])
    'none'
    """
    runs = [[number for _, number in run] for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) or "none"
