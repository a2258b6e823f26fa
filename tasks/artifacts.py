"""Show a run in the Prefect UI: what it has to do, where to watch it, its results, and how it ended."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import pyarrow.parquet as pq
from prefect import task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.runtime import flow_run

from desra_core.annotations.selection import count_resting
from desra_core.errors import TransientError
from desra_core.evaluation.table import counted
from desra_core.images.scanning import kinds_in_words
from desra_core.planning.keys import load_settings
from desra_core.planning.plan import Plan, Prepared
from desra_core.planning.tables import publish_tables, worst_regions
from desra_core.report import write_report
from desra_core.report.results import read_results, stage_times
from desra_core.report.wording import stage_name
from desra_core.settings import CorpusSettings
from desra_core.workspace import Workspace
from tasks.dask_map import Dask

# The environment variable with the address of the workspace's report for browsers.
REPORT = "DESRA_REPORT"

_WORST = 20
_FAILURES = 50


def tag_run(*tags: str) -> None:
    """Add tags to the flow run that calls this."""
    with get_client(sync_client=True) as client:
        client.update_flow_run(flow_run.id, tags=sorted({*flow_run.tags, *tags}))


def show_overview(title: str, facts: Sequence[str], dask: Dask | None = None) -> None:
    """Publish what a run is about to do as an artifact.

    Args:
        title: Command, input and output, as Markdown.
        facts: The amount of work, a line each, as Markdown.
        dask: The cluster, if the run needs one.
    """
    who = []
    if dask:
        who = [
            f"workers: {dask.workers - dask.gpus} on CPUs, {dask.gpus} on GPUs",
            f"[Dask dashboard]({dask.dashboard}), while the run lasts",
        ]
    create_markdown_artifact(_listed(title, [*facts, *who]), key="overview", description="Work of this run.")


def show_outcome(workspace: Workspace, line: str, facts: Sequence[str] = ()) -> None:
    """Publish how a run ended as an artifact, with a link to the report.

    Args:
        workspace: The workspace, whose report is written.
        line: How it ended.
        facts: More lines, as Markdown.
    """
    report = f"[Report]({os.environ.get(REPORT) or workspace.report.as_uri()}): `{workspace.report}`"
    people = counted(count_resting(workspace, load_settings(workspace)[1].gan_sr_key), "image")
    create_markdown_artifact(
        _listed(f"**{line}**", [*facts, f"{people} with a human mask", report]),
        key="outcome",
        description="End of this run.",
    )


def show_corpus(settings: CorpusSettings, prepared: Prepared, dask: Dask | None = None) -> None:
    """Publish what a run over a corpus is about to do as an artifact.

    Args:
        settings: Settings of the run.
        prepared: Its plan.
        dask: As for `show_overview`.
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

    Examples:
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


class Summary(NamedTuple):
    """The end of a run: its Prefect ids, regions and failures in the workspace, and errors of unfinished shards.

    Of ``images`` names in the corpus this run computed ``computed`` and failed at ``failed``; the others were done
    before. ``passing`` of the failures are worth a retry, and ``trouble`` is the first of these.
    """

    flow_run: str
    task_runs: int
    regions: int
    failures: int
    broken_shards: tuple[str, ...]
    images: int
    computed: int
    failed: int
    passing: int
    trouble: TransientError | None

    @property
    def in_one_line(self) -> str:
        """Say in a line how it ended."""
        anything = self.computed or self.failed
        done = f"{self.computed} of {self.images} images computed" if anything else "nothing new"
        return f"{done}: {self.regions} artifact regions in all, {_counted(self.failures)} failed"

    @property
    def lacking(self) -> bool:
        """Say whether a person should look at how it ended."""
        return bool(self.failed or self.broken_shards)

    @property
    def problem(self) -> TransientError | None:
        """Give the reason why a run that ended is not complete, or None."""
        if self.broken_shards:
            count = f"{len(self.broken_shards)} shards could not finish"
            return TransientError(count, self.broken_shards[0], "run again")
        if self.trouble:
            reason = f"failed for a reason that may pass, the first: {self.trouble.subject}: {self.trouble.reason}"
            return TransientError(_counted(self.passing), reason, self.trouble.remedy)
        return None


def _show_worst(workspace: Workspace) -> None:
    """Show the 20 worst regions of the corpus."""
    rows = [_shown(region) for region in worst_regions(workspace, _WORST).to_pylist()]
    if not any(row["class"] for row in rows):
        rows = [{name: value for name, value in row.items() if name != "class"} for row in rows]
    create_table_artifact(rows, key="worst-regions", description=f"The {len(rows)} most severe regions of the corpus.")


def _shown(region: dict[str, Any]) -> dict[str, Any]:
    return {
        "image": region["image"],
        "severity": round(region["severity"]),
        "area px": region["area"],
        "mean similarity": round(region["mean_similarity"], 3),
        "class": region["class_name"] or "",
        "x": region["x"],
        "y": region["y"],
        "width": region["width"],
        "height": region["height"],
    }


def _show_failures(workspace: Workspace) -> None:
    """Show the failed images with reason and remedy; stage and file come last, where a narrow screen cuts off."""
    failures = pq.read_table(workspace.failures)
    title = f"{_counted(failures.num_rows)} could not be processed" + (
        f"; the first {_FAILURES} of them. desra status --failures lists all." if failures.num_rows > _FAILURES else "."
    )
    rows = [
        {
            "image": row["name"],
            "reason": row["reason"],
            "remedy": row["remedy"],
            "stage": row["stage"],
            "file": row["subject"],
        }
        for row in failures.slice(0, _FAILURES).to_pylist()
    ]
    create_table_artifact(rows, key="failures", description=title)


def _counted(images: int) -> str:
    return "1 image" if images == 1 else f"{images} images"


def _show_throughput(workspace: Workspace) -> None:
    """Show the computing time of one worker by stage."""
    rows = [
        {
            "stage": stage_name(time.stage),
            "images": time.images,
            "seconds": round(time.total, 1),
            "median s": round(time.median, 3),
            "mean s": round(time.mean, 3),
            "images/s per worker": round(time.rate or 0, 2),
        }
        for time in stage_times(read_results(workspace).seconds)
    ]
    create_table_artifact(rows, key="throughput", description="Computing time by stage, over all runs.")


@task(task_run_name="results", cache_policy=NO_CACHE)
def publish_results(
    workspace: Workspace,
    plan: Plan,
    task_runs: int,
    broken_shards: tuple[str, ...] = (),
    failed: int = 0,
    passing: Sequence[TransientError] = (),
) -> Summary:
    """Write the tables and the report; show the worst regions, the throughput and the failures in the UI."""
    publish_tables(workspace, plan.target)
    write_report(workspace)
    _show_worst(workspace)
    _show_throughput(workspace)
    _show_failures(workspace)
    summary = Summary(
        flow_run=str(flow_run.id),
        task_runs=task_runs,
        regions=pq.read_metadata(workspace.regions).num_rows,
        failures=pq.read_metadata(workspace.failures).num_rows,
        broken_shards=broken_shards,
        images=plan.images,
        computed=plan.pending - failed,
        failed=failed,
        passing=len(passing),
        trouble=passing[0] if passing else None,
    )
    broken = [f"{len(broken_shards)} shards could not finish: the next run goes on with them"] if broken_shards else []
    show_outcome(workspace, summary.in_one_line, broken)
    return summary
