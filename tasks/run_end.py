"""Show a run in the Prefect UI: its work, the page to watch it on, its results, and how it ended."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from prefect import task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run

from desra_core.annotations.export import count_human_masks
from desra_core.errors import DesraError, TransientError, printable
from desra_core.evaluation.table import counted
from desra_core.images.scanning import kinds_in_words
from desra_core.planning.doubts import stored_doubts
from desra_core.planning.plan import Plan, Prepared, load_settings, publish_tables, settings_document, worst_regions
from desra_core.report import write_report
from desra_core.report.document import stage_name
from desra_core.report.results import read_results, stage_times
from desra_core.settings import CorpusSettings, Mining
from desra_core.workspace import Workspace
from tasks.dask_map import Dask
from tasks.metrics import update

# The environment variable with the address of the workspace's report for browsers.
REPORT = "DESRA_REPORT"

_WORST = 20
_FAILURES = 50


def show_overview(title: str, facts: Sequence[str], dask: Dask | None = None) -> None:
    """Show the work of a run in the UI.

    Args:
        title: Command, input and output, as Markdown.
        facts: The amount of work, a line each, as Markdown.
        dask: The cluster, if the run needs one.
    """
    if dask:
        workers = f"workers: {dask.workers - dask.gpus} on CPUs, {dask.gpus} on GPUs"
        facts = [*facts, workers, f"[Dask dashboard]({dask.dashboard}), while the run lasts"]
    create_markdown_artifact(_listed(title, facts), key="overview", description="Work of this run.")


def show_outcome(workspace: Workspace, line: str, facts: Sequence[str] = ()) -> None:
    """Show in the UI how a run ended, with a link to the report.

    Args:
        workspace: The workspace; its report is up to date.
        line: How the run ended.
        facts: More lines, as Markdown.
    """
    report = f"[Report]({os.environ.get(REPORT) or workspace.report.as_uri()}): `{workspace.report}`"
    count = count_human_masks(workspace, load_settings(workspace)[1].gan_sr_key)
    human_masks = [f"{counted(count, 'image')} with a human mask"] if count else []
    text = _listed(f"**{line}**", [*facts, *human_masks, report])
    create_markdown_artifact(text, key="outcome", description="End of this run.")


def show_damage(line: str, damaged: Sequence[DesraError]) -> None:
    """Show in the UI how a verification ended, with the first damaged files."""
    text = _listed(f"**{line}**", [f"`{printable(error)}`" for error in damaged[:_FAILURES]])
    create_markdown_artifact(text, key="outcome", description="End of this run.")


def show_corpus(settings: CorpusSettings, prepared: Prepared, dask: Dask | None = None) -> None:
    """Show the work of a run over a corpus in the UI.

    Args:
        settings: Settings of the run.
        prepared: Its plan.
        dask: As for `show_overview`.
    """
    plan, scanned = prepared.plan, prepared.scanned
    images = counted(plan.images, "image")
    facts = [
        f"{images}: {plan.done} done before, {plan.failed} failed for good, {plan.pending} to do",
        f"shards to do: {ranges(list(plan.shards))}",
        f"shards with nothing to do, which are not submitted: {ranges(plan.idle_shards)}",
    ]
    if scanned:
        new, changed = counted(scanned.added, "new image"), counted(scanned.replaced, "changed image")
        vanished = counted(scanned.vanished, "image")
        facts.insert(0, f"since the last scan: {new}, {changed}; vanished so far: {vanished}, whose outputs stay")
        if others := kinds_in_words(scanned.passed_over):
            facts.append(f"passed over: {others}")
    if reference := settings_document(prepared.workspace).get("reference"):
        facts.append(f"masks rest on {reference}")
    if isinstance(settings, Mining):
        facts.append(f"networks compute in {settings.precision}, on a CPU by {settings.backend}")
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


@dataclass(frozen=True, kw_only=True)
class RunEnd:
    """How a run ended."""

    in_one_line: str  # how it ended, for people
    task_runs: int  # number of task runs of the run, which the server has to record
    to_look_at: bool = False  # whether a person should look: images failed, or no model passed
    problem: TransientError | None = None  # the reason why the run is not complete, or None
    flow_run: str = field(default_factory=lambda: str(flow_run.id))  # Prefect's id of the run


@dataclass(frozen=True, kw_only=True)
class Summary(RunEnd):
    """How a run over a corpus ended; ``broken_shards`` are the errors of shards that could not finish."""

    broken_shards: tuple[str, ...]


def line_of(*, images: int, pending: int, failed: int, regions: int, failures: int) -> str:
    """Describe the end of a run over a corpus in a line.

    Args:
        images: Number of images in the run, each name counted.
        pending: Number of these images that the run had to compute.
        failed: Number of pending images that failed.
        regions, failures: Numbers of artifact regions and of failed images in the workspace.
    """
    done = f"{pending - failed} of {counted(images, 'image')} computed" if pending else "nothing new"
    return f"{done}: {counted(regions, 'artifact region')} in all, {counted(failures, 'image')} failed"


def problem_of(broken_shards: Sequence[str], worth_a_retry: Sequence[TransientError]) -> TransientError | None:
    """Make the error of a run whose shards could not finish or whose failures are worth a retry; None without these."""
    if broken_shards:
        count = f"{counted(len(broken_shards), 'shard')} could not finish"
        return TransientError(count, broken_shards[0], "run again")
    if worth_a_retry:
        first = worth_a_retry[0]
        reason = f"failed for a reason that may pass, the first: {first.subject}: {first.reason}"
        return TransientError(counted(len(worth_a_retry), "image"), reason, first.remedy)
    return None


@task(task_run_name="results", cache_policy=NO_CACHE)
def end_corpus_run(
    workspace: Workspace,
    plan: Plan,
    task_runs: int,
    broken_shards: tuple[str, ...] = (),
    failed: int = 0,
    worth_a_retry: Sequence[TransientError] = (),
) -> Summary:
    """Write the tables and the report; show the worst regions, the throughput and the failures in the UI."""
    publish_tables(workspace, plan.target)
    write_report(workspace)
    _show_worst(workspace)
    throughput = [
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
    create_table_artifact(throughput, key="throughput", description="Computing time by stage, over all runs.")
    failures = pq.read_table(workspace.failures)
    _show_failures(failures)
    marked = pq.read_table(workspace.regions, columns=["image"])["image"]
    regions = len(marked)
    counts = {"regions": regions, "images": len(marked.unique())}
    update(workspace, {(f"desra_artifact_{what}", ()): count for what, count in counts.items()})
    line = line_of(images=plan.images, pending=plan.pending, failed=failed, regions=regions, failures=failures.num_rows)
    broken = f"{counted(len(broken_shards), 'shard')} could not finish: the next run goes on there"
    doubts = [printable(doubt) for doubt in stored_doubts(workspace, *load_settings(workspace))]
    show_outcome(workspace, line, [*([broken] if broken_shards else []), *doubts])
    return Summary(
        in_one_line=line,
        task_runs=task_runs,
        to_look_at=bool(failed or broken_shards or doubts),
        problem=problem_of(broken_shards, worth_a_retry),
        broken_shards=broken_shards,
    )


def _show_worst(workspace: Workspace) -> None:
    regions = worst_regions(workspace, _WORST).to_pylist()
    rows: list[dict[str, Any]] = [
        {
            "image": region["image"],
            "severity": round(region["severity"]),
            "area px": region["area"],
            "mean similarity": round(region["mean_similarity"], 3),
            "class": region["class_name"] or "",
            **{name: region[name] for name in ("x", "y", "width", "height")},
        }
        for region in regions
    ]
    if not any(row["class"] for row in rows):
        rows = [{name: value for name, value in row.items() if name != "class"} for row in rows]
    create_table_artifact(rows, key="worst-regions", description=f"The {len(rows)} most severe regions of the corpus.")


def _show_failures(failures: pa.Table) -> None:
    """Show the failed images; stage and file come last, where a narrow screen cuts off."""
    more = f"; the first {_FAILURES} of them. desra status --failures lists all."
    title = counted(failures.num_rows, "image") + " could not be processed"
    title += more if failures.num_rows > _FAILURES else "."
    columns = {"image": "name", "reason": "reason", "remedy": "remedy", "stage": "stage", "file": "subject"}
    shown = failures.slice(0, _FAILURES).select(columns.values()).rename_columns(list(columns))
    create_table_artifact(shown.to_pylist(), key="failures", description=title)
