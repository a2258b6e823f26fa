"""``desra mine``, ``detect`` and ``deliver``, and the steps that other commands share: plan, serve, run, report."""

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import typer
from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from deployments.serving.connection import CONSOLE, UNREACHED, wait_for_task_runs, watch_at
from deployments.serving.server import ServerLostError, check_temporary, end_leftover_server, prefect_server
from desra_core.annotations.export import count_human_masks
from desra_core.delivery.plan import corpus_of, plan_deliveries, table_path
from desra_core.detection.mask import severity_text
from desra_core.errors import DesraError, UsageError, printable
from desra_core.evaluation.table import counted
from desra_core.images.scanning import kinds_in_words
from desra_core.planning.doubts import stored_doubts
from desra_core.planning.plan import (
    Prepared,
    images_to_mention,
    prepare,
    publish_tables,
    settings_document,
    worst_regions,
)
from desra_core.settings import CorpusSettings, Machine, detector_of
from desra_core.settings.models import Delivering
from desra_core.workspace import Workspace
from desra_core.workspace.matching import with_twins_summed_up
from flows import handing_over
from tasks.logs import SHOWN_FAILURES, NowAndThen, say, say_each

_SHOWN_REGIONS = 10
_SHOWN_NAMES = 5
# HTTP status codes: those for a refused key, and the lowest for a broken server.
_REFUSED, _BROKEN = (401, 403), 500


def run_corpus(settings: CorpusSettings, machine: Machine) -> int:
    """Mine or detect, if there is anything to do, and print how it went; return the exit code."""
    workspace = Workspace(settings.workspace)
    with workspace.opened() as workspace:
        end_leftover_server(workspace)
        prepared = prepare_corpus(settings)
        broken: tuple[str, ...] = ()
        if prepared.plan.pending:
            with contextlib.ExitStack() as stack:
                start_workers = partial(_start_workers, stack, settings, machine, prepared)
                plan = settings, prepared
                ended = run_flow(workspace, settings, machine, plan, meanwhile=start_workers, rescan=False)
                broken = ended.broken_shards
        else:
            renew_results(prepared)
        return sum_up(prepared, settings, broken)


def run_deliver(delivering: Delivering, machine: Machine) -> int:
    """Deliver what is lacking, print how it went, and return the exit code."""
    corpus = corpus_of(delivering)
    with Workspace(corpus.workspace).opened() as workspace:
        end_leftover_server(workspace)
        prepared = prepare_corpus(corpus)
        pending, failed, broken = prepared.plan.pending, 0, ()
        deliveries = plan_deliveries(delivering, corpus)  # refuses what is in the way before photos are mined
        if pending or deliveries.missing().images:
            with contextlib.ExitStack() as stack:
                plan = corpus, prepared
                start_workers = partial(_start_workers, stack, corpus, machine, prepared) if pending else lambda: None
                ended = run_flow(workspace, delivering, machine, plan, meanwhile=start_workers, rescan=False)
                pictures, failed, broken = ended.pictures, ended.failures, ended.found.broken_shards
        else:
            renew_results(prepared)
            pictures = deliveries.publish()
        code = sum_up(prepared, corpus, broken)
    typer.echo(f"pictures {delivering.output} ({pictures})\ntable    {table_path(delivering)}")
    return max(code, int(failed > 0))


def _start_workers(stack: contextlib.ExitStack, settings: CorpusSettings, machine: Machine, prepared: Prepared) -> None:
    """Start the workers of a run over a corpus while the Prefect server starts; the stack stops them."""
    from flows.desra_flow import opened_dask
    from tasks.dask_cluster import Opening

    opening = Opening(lambda: opened_dask(settings, machine, prepared.plan))
    stack.push(opening)
    stack.enter_context(handing_over((settings, opening)))


def existing_workspace(root: Path) -> Workspace:
    """Open the workspace of an earlier run.

    Raises:
        UsageError: There is none.
    """
    workspace = Workspace(root)
    if not workspace.exists():
        reason = "is no workspace" if root.is_dir() else "does not exist"
        raise UsageError(root, reason, "name the workspace of desra mine, detect or cycle")
    workspace.create()
    return workspace


def prepare_corpus(settings: CorpusSettings) -> Prepared:
    """Scan and plan, and print the new, changed, vanished and failed images."""
    if settings.segmenter == "none" and detector_of(settings).weighs_classes:
        say("warning: without class labels, every class has weight 1 and more is marked; give --labels or --segmenter")
    prepared = prepare(settings, on_hashed=NowAndThen("reading new files: {} of {}"))
    plan, scanned = prepared.plan, prepared.scanned
    assert scanned is not None
    if scanned.added:
        say(counted(scanned.added, "new image"))
    if scanned.replaced:
        say(f"changed, and computed again: {counted(scanned.replaced, 'image')}")
    if scanned.vanished:
        where = "not among those asked for" if settings.sources.selects else "vanished"
        say(f"{where}: {counted(scanned.vanished, 'image')}, whose outputs stay")
    show_failures(pa.concat_tables([scanned.failures, plan.failures]))
    if plan.dropped:
        say(f"computed again, since these settings need maps that were not kept: {counted(plan.dropped, 'image')}")
    return prepared


@contextlib.contextmanager
def server_for_run(workspace: Workspace, meanwhile: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Connect a run to a Prefect server, and print where to watch the run; ``meanwhile`` is as for `prefect_server`.

    Raises:
        UsageError: No server can be started or reached, or it does not take the key of this command.
        ServerLostError: The server is gone.
    """
    check_temporary()
    say("starting Prefect and the workers, which takes some seconds")
    # Else Prefect prints each event that it could not send to a lost server, and logs these lines to the next server.
    os.environ.setdefault("PREFECT_LOGGING_INTERNAL_LEVEL", "CRITICAL")
    # Failures are printed as lines; Prefect's tracebacks are in the run's logs on the server.
    os.environ.setdefault(CONSOLE, "CRITICAL")
    with prefect_server(workspace, meanwhile) as url:
        say(f"watch at {watch_at(workspace, url)}")
        logging.raiseExceptions = False  # else each log line that a server refuses prints two lines on stderr
        try:
            yield
        except Exception as error:
            if isinstance(error, DesraError) or (reported := _server_error(error)) is None:
                raise
            raise reported from error


def _server_error(error: BaseException | None) -> DesraError | None:
    """Make the error to report for an exception due to Prefect's server; return None for other exceptions."""
    import httpx

    lost = False
    while error is not None:
        status = error.response.status_code if isinstance(error, httpx.HTTPStatusError) else 0
        if status in _REFUSED:
            reason = f"the Prefect server does not take the key of this command (HTTP {status})"
            return UsageError("PREFECT_API_AUTH_STRING", reason, "set it to the one of that server")
        # Prefect raises a bare RuntimeError where it cannot reach a server.
        lost |= isinstance(error, httpx.TransportError) or status >= _BROKEN or UNREACHED in str(error)
        error = error.__cause__ or error.__context__
    reason = "does not answer any more; what was done is not lost"
    return ServerLostError("the Prefect server", reason, "run again") if lost else None


def run_flow(
    workspace: Workspace,
    settings: Any,
    machine: Machine,
    *plans: tuple[BaseModel, object],
    meanwhile: Callable[[], object] = lambda: None,
    **options: bool,
) -> Any:
    """Run the flow that is named like the verb of its settings, and wait until the server has recorded the run.

    Args:
        workspace: The workspace, which must be locked.
        settings, machine, options: Parameters of the flow.
        plans: Settings and plans to hand over to the flow and to the flows that it calls.
        meanwhile: Called while the server starts, when the flow has been imported.

    Returns:
        The `tasks.run_end.RunEnd` of the flow.

    Raises:
        DesraError: As `server_for_run`, and the errors of the flow.
    """
    module = f"flows.{settings.verb}"

    def import_flow() -> None:
        import_module(module)
        meanwhile()

    with server_for_run(workspace, import_flow), handing_over(*plans):
        ended = getattr(import_module(module), settings.verb)(settings, machine, **options)
        for run in (*vars(ended).values(), ended):
            if hasattr(run, "task_runs") and not wait_for_task_runs(run.flow_run, run.task_runs):
                say("warning: the Prefect server has not recorded all task runs; the workspace is complete")
    return ended


def show_failures(failures: pa.Table, *, all_of_them: bool = False) -> None:
    """Print rows of `desra_core.workspace.matching.FAILURES`: all, or up to 20 with all missing twins in one row."""
    rows = (failures if all_of_them else with_twins_summed_up(failures)).to_pylist()
    errors = [DesraError(row["subject"], row["reason"], row["remedy"]) for row in rows]
    say_each("failed", errors, ": desra status --failures lists them", most=None if all_of_them else SHOWN_FAILURES)


def renew_results(prepared: Prepared) -> None:
    """Write the tables and the report again where their sources have changed without a run."""
    publish_tables(prepared.workspace, prepared.plan.target)
    renew_report(prepared.workspace)


def renew_report(workspace: Workspace) -> None:
    """Write the report again if one of its sources has changed; else leave the file as it is."""
    sources = (
        workspace.settings, workspace.manifest, workspace.regions, workspace.failures, workspace.verdict,
        workspace.human_manifest,
    )  # fmt: skip
    latest = max(path.stat().st_mtime_ns for path in sources if path.exists())
    if workspace.report.exists() and workspace.report.stat().st_mtime_ns >= latest:
        return
    from desra_core.report import write_report

    write_report(workspace)


def show_people(count: int) -> None:
    """Print how many images have a human mask, where any has."""
    if count:
        typer.echo(f"people   {counted(count, 'image')} with a human mask")


def show_json(document: object) -> None:
    """Print paths, dataclasses and plain values as one JSON document in ASCII; what is no finite number is null."""
    typer.echo(json.dumps(to_jsonable_python(document, inf_nan_mode="null"), indent=1))


def sum_up(prepared: Prepared, settings: CorpusSettings, broken: tuple[str, ...]) -> int:
    """Print how the run ended, with a line for each shard that could not finish; return the exit code."""
    workspace, before, scanned = prepared.workspace, prepared.plan, prepared.scanned
    for line in broken:
        say(f"error: {line}")
    assert scanned is not None
    after = before.after(workspace)
    failures = scanned.failures.num_rows + after.failed + after.retries.num_rows
    done = f"{after.done} of {counted(after.images, 'image')} done"
    if before.pending:
        typer.echo(f"{done}, {failures} failed")
    else:
        typer.echo(f"nothing to do: {done}, {failures} failed before")
    if others := kinds_in_words(scanned.passed_over):
        typer.echo(f"passed over {others}")
    for said, names in images_to_mention(workspace).items():
        named = ", ".join(map(printable, names[:_SHOWN_NAMES]))
        more = f" and {len(names) - _SHOWN_NAMES:,} more" if len(names) > _SHOWN_NAMES else ""
        typer.echo(f"note     {said} {named}{more}")
    _show_regions(workspace, settings)
    show_people(count_human_masks(workspace, before.target.gan_sr_key))
    if reference := settings_document(workspace).get("reference"):
        typer.echo(f"against  {printable(reference)}")
    for doubt in stored_doubts(workspace, settings, before.target):
        typer.echo(f"doubt    {printable(doubt)}")
    typer.echo(f"masks    {workspace.masks}\nregions  {workspace.regions}")
    if before.target.super_resolves:
        typer.echo(f"dataset  {workspace.dataset_manifest.parent}")
    if workspace.report.exists():
        typer.echo(f"report   {workspace.report}")
    if failures:
        typer.echo(f"failures {workspace.failures}")
    return int(failures > 0 or after.pending > 0 or bool(broken))


def _show_regions(workspace: Workspace, settings: CorpusSettings) -> None:
    """Print the number of regions, the way in which they were found, and the worst regions."""
    unweighted = settings.segmenter == "none" or settings.weights == "none"
    weighting = "weight 1 for every class" if unweighted else "semantic weights"
    if not (detector := detector_of(settings)).weighs_classes:
        weighting = f"{detector.title}, threshold {settings.threshold:g}"
    whole = " of the whole workspace" if settings.limit or settings.sources.selects else ""
    regions = pq.read_table(workspace.regions, columns=["image"])
    images = counted(len(regions["image"].unique()), "image")
    typer.echo(f"{counted(regions.num_rows, 'artifact region')} in {images}{whole}, found with {weighting}")
    for region in worst_regions(workspace, _SHOWN_REGIONS).to_pylist():
        place = f"{region['width']}x{region['height']} px at ({region['x']}, {region['y']})"
        by_viewers = settings.severity_model is not None
        worth = severity_text(region["severity"], by_viewers=by_viewers, width=3 if by_viewers else 8)
        line = f"  {worth}  {printable(region['image'])}  {place}"
        typer.echo(line + (f"  {region['class_name']}" if region["class_name"] else ""))
