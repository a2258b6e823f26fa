"""The results of a benchmark of either kind: tables and a page in its folder, and a text for people."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from desra_core.benchmarking import labelled_tables, synthetic_tables
from desra_core.benchmarking.benchmark import Benchmark
from desra_core.benchmarking.labelled import plan_labelled
from desra_core.benchmarking.synthetic import SyntheticJob, plan_synthetic, read_trials
from desra_core.benchmarking.synthetic_summary import summarise
from desra_core.errors import ImageError
from desra_core.settings.benchmark import Benchmarking
from desra_core.workspace import Workspace

AnyBenchmark = Benchmark[Any]


class Published(NamedTuple):
    """The files of a benchmark, its tables as Markdown and as ``text`` for a terminal, and the number of images judged.

    ``failures`` say why others could not be judged.
    """

    files: list[Path]
    markdown: str
    text: str
    judged: int
    failures: list[ImageError]


def plan(settings: Benchmarking) -> AnyBenchmark:
    """List the images that are to be judged (raises `desra_core.errors.UsageError`). Writes nothing."""
    return plan_synthetic(settings) if settings.synthetic else plan_labelled(settings)


def publish_results(benchmark: AnyBenchmark) -> Published:
    """Add up the records that are there; write tables and page (raises `desra_core.errors.TransientError`)."""
    if benchmark.settings.synthetic:
        return _publish_synthetic(benchmark)
    results = labelled_tables.results_of(benchmark)

    def render() -> str:
        from desra_core.report.benchmark_page import render

        return render(benchmark, results)

    tables = labelled_tables.as_files(benchmark, results)
    return Published(
        files=_publish(benchmark.workspace, tables, f"{labelled_tables.STEM}.html", render),
        markdown=tables[f"{labelled_tables.STEM}.md"],
        text=labelled_tables.as_console_text(results),
        judged=len(results.records),
        failures=results.failures,
    )


def _publish_synthetic(benchmark: Benchmark[SyntheticJob]) -> Published:
    trials, failures = read_trials(benchmark), benchmark.failed()
    summary = summarise(trials)

    def render() -> str:
        from desra_core.report.synthetic_page import render

        return render(benchmark, summary, failures)

    tables = synthetic_tables.as_files(benchmark, summary, failures)
    text = synthetic_tables.as_console_text(synthetic_tables.title_of(benchmark), synthetic_tables.sections_of(summary))
    return Published(
        files=_publish(benchmark.workspace, tables, f"{synthetic_tables.STEM}.html", render),
        markdown=tables[f"{synthetic_tables.STEM}.md"],
        text=text,
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
