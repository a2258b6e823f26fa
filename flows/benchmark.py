"""Benchmark: pairs and detectors in, tables and a page out."""

from __future__ import annotations

from prefect.runtime import flow_run

from desra_core.report.benchmark_page import plan
from desra_core.settings import Machine
from desra_core.settings.models import Benchmarking
from desra_core.workspace import Workspace
from flows.corpus_flow import corpus_flow
from tasks.artifacts import tag_run
from tasks.benchmark import Benchmarked, publish_tables, run_detectors


@corpus_flow("benchmark")
def benchmark(benchmarking: Benchmarking, machine: Machine = Machine()) -> Benchmarked:  # noqa: B008
    """Run detectors on a data set with a ground truth, or on clean pairs with injected artifacts, and publish tables.

    Args:
        benchmarking: The data set and the detectors.
        machine: Where and how wide to compute.
    """
    workspace = Workspace(benchmarking.output)
    tag_run("benchmark")
    planned = plan(benchmarking)
    workspace.create()
    with workspace.locked():
        missing = bool(planned.missing())
        failures = run_detectors(planned, machine) if missing else 0
        published = publish_tables(planned)
    return Benchmarked(str(flow_run.id), 1 + missing, failures, published)
