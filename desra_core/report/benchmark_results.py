"""What comes of a benchmark of either kind: tables and a page in its folder, and what to tell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from desra_core.benchmarking import benchmark_files, synthetic_files
from desra_core.benchmarking.benchmark import Benchmark, plan_benchmark
from desra_core.benchmarking.markdown_blocks import for_terminal
from desra_core.benchmarking.synthetic_benchmark import SyntheticBenchmark, plan_synthetic
from desra_core.benchmarking.synthetic_table import summarise
from desra_core.errors import ImageError
from desra_core.settings.benchmark import Benchmarking
from desra_core.workspace import Workspace

AnyBenchmark = Benchmark | SyntheticBenchmark


class Published(NamedTuple):
    """What was made of a benchmark: its files, its tables to be told (``text`` in a terminal), and how many images.

    ``failures`` say why others could not be judged.
    """

    files: list[Path]
    markdown: str
    text: str
    judged: int
    failures: list[ImageError]


def plan(settings: Benchmarking) -> AnyBenchmark:
    """Find out what there is to do (raises `desra_core.errors.UsageError`). Writes nothing."""
    return plan_synthetic(settings) if settings.synthetic else plan_benchmark(settings)


def publish_results(benchmark: AnyBenchmark) -> Published:
    """Add up what is there; write tables and page (raises `desra_core.errors.TransientError`)."""
    if isinstance(benchmark, SyntheticBenchmark):
        return _publish_synthetic(benchmark)
    results = benchmark_files.results_of(benchmark)

    def render() -> str:
        from desra_core.report.benchmark_page import render

        return render(benchmark, results)

    tables = benchmark_files.as_files(benchmark, results)
    return Published(
        files=_publish(benchmark.workspace, tables, f"{benchmark_files.STEM}.html", render),
        markdown=benchmark_files.as_markdown(benchmark, results),
        text=benchmark_files.as_console_text(results),
        judged=len(results.records),
        failures=results.failures,
    )


def _publish_synthetic(benchmark: SyntheticBenchmark) -> Published:
    trials, failures = benchmark.trials(), benchmark.failed()
    summary = summarise(trials)

    def render() -> str:
        from desra_core.report.synthetic_page import render

        return render(benchmark, summary, failures)

    tables = synthetic_files.as_files(benchmark, summary, failures)
    told = synthetic_files.told_summary(benchmark, summary)
    return Published(
        files=_publish(benchmark.workspace, tables, f"{synthetic_files.STEM}.html", render),
        markdown=told,
        text=for_terminal(told),
        judged=len(trials),
        failures=failures,
    )


def _publish(workspace: Workspace, tables: dict[str, str], page: str, render: Callable[[], str]) -> list[Path]:
    """Write the page and then the tables; where those are there already, so is the page that goes with them."""
    contents = {workspace.root / name: text.encode() for name, text in tables.items()}
    place = workspace.root / page
    if not (place.exists() and all(path.exists() and path.read_bytes() == data for path, data in contents.items())):
        workspace.publish(place, render().encode())
        for path, data in contents.items():
            workspace.publish(path, data)
    return [*contents, place]
