"""Benchmark: pairs and detectors in, tables and a page out."""

from dataclasses import dataclass

from desra_core.benchmarking import plan
from desra_core.evaluation.table import counted
from desra_core.report.pages import PublishedBenchmark
from desra_core.settings import Machine
from desra_core.settings.models import Benchmarking, SyntheticBenchmarking
from desra_core.workspace import Workspace
from flows.desra_flow import desra_flow
from tasks.judging import publish_benchmark, run_detectors
from tasks.run_end import RunEnd


@dataclass(frozen=True, kw_only=True)
class Benchmarked(RunEnd):
    """How a benchmark ended."""

    published: PublishedBenchmark


@desra_flow
def benchmark(
    benchmarking: Benchmarking | SyntheticBenchmarking,
    machine: Machine = Machine(),  # noqa: B008
) -> Benchmarked:
    """Run detectors on a data set with a ground truth, or on clean pairs with injected artifacts, and publish tables.

    Args:
        benchmarking: The data set and the detectors.
        machine: Where and how wide to compute.
    """
    workspace = Workspace(benchmarking.output)
    planned = plan(benchmarking)
    workspace.create()
    with workspace.locked():
        run_detectors(planned, machine)
        published = publish_benchmark(planned)
    line = f"{counted(published.judged, 'image')} judged"
    return Benchmarked(in_one_line=line, task_runs=2, to_look_at=bool(published.failures), published=published)
