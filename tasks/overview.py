"""Show in the UI what a run has to do and where to watch it, and how it ended."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import groupby

from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.runtime import flow_run

from desra_core.annotations.selection import count_resting
from desra_core.images.scanning import kinds_in_words
from desra_core.planning.keys import load_settings
from desra_core.planning.plan import Prepared
from desra_core.settings import CorpusSettings
from desra_core.workspace import Workspace
from desra_core.workspace.human_masks import resting_in_words
from tasks.dask_map import Dask

# Where browsers find the report of the workspace that a run is for; an environment variable.
REPORT = "DESRA_REPORT"


def tag_run(*tags: str) -> None:
    """Add tags to the flow run that calls this."""
    with get_client(sync_client=True) as client:
        client.update_flow_run(flow_run.id, tags=sorted({*flow_run.tags, *tags}))


def show_overview(title: str, facts: Sequence[str], dask: Dask | None = None) -> None:
    """Publish what a run is about to do as an artifact.

    Parameters
    ----------
    title
        Command, input and output, as Markdown.
    facts
        The amount of work, a line each, as Markdown.
    dask
        The cluster, if the run needs one.
    """
    who = []
    if dask:
        who = [
            f"workers: {dask.workers - dask.gpus} on CPUs, {dask.gpus} on GPUs",
            f"[Dask dashboard]({dask.dashboard}), while the run lasts",
        ]
    create_markdown_artifact(_listed(title, [*facts, *who]), key="overview", description="What this run has to do.")


def show_outcome(workspace: Workspace, line: str, facts: Sequence[str] = ()) -> None:
    """Publish how a run ended as an artifact, with a link to the report.

    Parameters
    ----------
    workspace
        The workspace, whose report is written.
    line
        How it ended.
    facts
        More lines, as Markdown.
    """
    report = f"[Report]({os.environ.get(REPORT) or workspace.report.as_uri()}): `{workspace.report}`"
    people = resting_in_words(count_resting(workspace, load_settings(workspace)[1].gan_sr_key))
    create_markdown_artifact(
        _listed(f"**{line}**", [*facts, people, report]), key="outcome", description="How this run ended."
    )


def show_corpus(settings: CorpusSettings, prepared: Prepared, dask: Dask | None = None) -> None:
    """Publish what a run over a corpus is about to do as an artifact.

    Parameters
    ----------
    settings
        Settings of the run.
    prepared
        Its plan.
    dask
        As for `show_overview`.
    """
    plan, scanned = prepared.plan, prepared.scanned
    facts = [
        f"{plan.images} images: {plan.done} done before, {plan.failed} failed for good, {plan.pending} to do",
        f"shards to do: {ranges(list(plan.shards))}",
        f"shards with nothing to do, which are not submitted: {ranges(plan.idle_shards)}",
    ]
    if scanned:
        found = f"since the last scan: {scanned.added} images are new, {scanned.replaced} have changed"
        facts.insert(0, f"{found}; {scanned.vanished} have vanished so far, whose outputs stay")
        if others := kinds_in_words(scanned.passed_over):
            facts.append(f"passed over: {others}")
    show_overview(f"**desra {settings.verb}** of `{settings.sources.main}` into `{settings.workspace}`", facts, dask)


def ranges(shards: Sequence[int]) -> str:
    """Count and list shards by their sorted numbers.

    Examples
    --------
    >>> ranges([0, 1, 2, 5, 7, 8])
    '6 (00000–00002, 00005, 00007–00008)'
    >>> ranges([])
    'none'
    """
    runs = [[number for _, number in run] for _, run in groupby(enumerate(shards), key=lambda pair: pair[1] - pair[0])]
    listed = ", ".join(f"{run[0]:05d}–{run[-1]:05d}" if len(run) > 1 else f"{run[0]:05d}" for run in runs)
    return f"{len(shards)} ({listed})" if shards else "none"


def _listed(title: str, facts: Sequence[str]) -> str:
    return "\n".join([title, "", *(f"- {fact}" for fact in facts)])
