"""Publish the results of a run: the tables of the workspace and their artifacts in the Prefect UI."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pyarrow.parquet as pq
from prefect import task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run

from desra_core.errors import TransientError
from desra_core.planning.plan import Plan
from desra_core.planning.tables import publish_tables, worst_regions
from desra_core.report import write_report
from desra_core.report.results import read_results, stage_times
from desra_core.report.wording import stage_name
from desra_core.workspace import Workspace
from tasks.overview import show_outcome

_WORST = 20
_FAILURES = 50


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
            reason = f"failed for what may pass, the first: {self.trouble.subject}: {self.trouble.reason}"
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
