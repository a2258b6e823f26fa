"""What a run leaves for people: the tables of the workspace and their artifacts in the Prefect UI."""

from __future__ import annotations

from typing import NamedTuple

import pyarrow.parquet as pq
from prefect import task
from prefect.artifacts import create_table_artifact
from prefect.runtime import flow_run

from desra_core.report import write_report
from desra_core.tables import publish_tables, worst_regions
from desra_core.target import Target
from desra_core.workspace import Workspace

_WORST = 20


class Summary(NamedTuple):
    """How a run ended: its Prefect ids, regions and failures in the workspace, and why shards could not finish."""

    flow_run: str
    task_runs: int
    regions: int
    failures: int
    broken_shards: tuple[str, ...]


@task
def publish_results(workspace: Workspace, target: Target, task_runs: int, broken_shards: tuple[str, ...]) -> Summary:
    """Write the tables and the report, and show the worst regions in the UI."""
    publish_tables(workspace, target)
    write_report(workspace)
    worst = worst_regions(workspace, _WORST).drop_columns(["id"]).to_pylist()
    create_table_artifact(worst, key="worst-regions", description=f"The {len(worst)} most severe regions.")
    return Summary(
        flow_run=str(flow_run.id),
        task_runs=task_runs,
        regions=pq.read_metadata(workspace.regions).num_rows,
        failures=pq.read_metadata(workspace.failures).num_rows,
        broken_shards=broken_shards,
    )
