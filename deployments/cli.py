"""``desra``: a verb per flow. Plans from the workspace before it imports Prefect, Dask or torch."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import pyarrow as pa
import pyarrow.compute as pc
import typer

from deployments.commands.annotations import export_masks, import_masks
from deployments.commands.evaluate import evaluate
from deployments.commands.flags import paths_at_home, with_flags
from deployments.commands.housekeeping import gc, size_line
from deployments.commands.runs import run_corpus, show_failures
from deployments.serving.server import AGAIN, ServerLostError
from desra_core import __version__
from desra_core.errors import DesraError, ImageError, TransientError, UsageError, printable
from desra_core.gate.model_registry import current_model, history
from desra_core.images.scanning import kinds_in_words
from desra_core.planning.keys import load_settings
from desra_core.planning.plan import make_plan
from desra_core.settings import Detection, Machine, Mining
from desra_core.settings.benchmark import Benchmarking
from desra_core.settings.models import Calibrating, Comparing, Cycling, Finetuning
from desra_core.settings.serving import Serving
from desra_core.workspace import Workspace, read_table
from desra_core.workspace.manifest import read_manifest, read_passed_over
from desra_core.workspace.matching import FAILURES
from tasks.logs import SHOWN_FAILURES, say

app = typer.Typer(
    name="desra",
    help="Find and delete the artifacts of GAN super-resolution models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line.

    Exit codes: 0 done, 1 some images failed, 2 bad usage or input, 3 no model passes the gate, none but one that
    was rolled back, or the gate is undecided for lack of held-out images, 130 interrupted, 143 terminated.
    """
    signal.signal(signal.SIGTERM, _terminate)
    try:
        _check_folder()
        app()
    except DesraError as error:
        say(f"error: {printable(error)}")
        sys.exit(1 if isinstance(error, TransientError) else 2)


def _check_folder() -> None:
    """See that there is a working folder: paths are told by it, and workers start in it."""
    try:
        os.getcwd()
    except OSError as error:
        raise UsageError("the working folder", f"is gone ({error.strerror})", "change to another one") from None


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"desra {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(context_settings={"allow_extra_args": True})
@with_flags(Mining, argument="photos")
def mine(settings: Mining, machine: Machine) -> None:
    """Upscale photos with two models, mark the GAN model's artifacts and gather them as a dataset.

    Writes a mask per photo to WORKSPACE/masks, photos with artifacts with their results and pseudo-GT to
    WORKSPACE/dataset, a table of regions to WORKSPACE/regions.parquet and a page to look at, WORKSPACE/report.html.
    The same command again goes on where it was cut off, takes in new photos, and does nothing where nothing has
    changed.
    """
    _exit(lambda: run_corpus(settings, machine))


@app.command()
@with_flags(Detection)
def detect(settings: Detection, machine: Machine) -> None:
    """Compare two folders of super-resolution results and mark the artifacts.

    Writes a mask per image to WORKSPACE/masks, a table of regions to WORKSPACE/regions.parquet and a page to look
    at, WORKSPACE/report.html. The same command again goes on where it was cut off, takes in new files, and does
    nothing where nothing has changed.
    """
    _exit(lambda: run_corpus(settings, machine))


@app.command()
@with_flags(Finetuning)
def finetune(settings: Finetuning, machine: Machine) -> None:
    """Finetune the GAN model on the pseudo ground truths of its worst images.

    Writes checkpoints that the usual tools load to OUTPUT/models, and losses and pictures for TensorBoard. The same
    command again goes on where it was cut off.
    """
    from deployments.commands.models import run_finetune

    _exit(lambda: run_finetune(settings, machine))


@app.command()
@with_flags(Comparing)
def compare(settings: Comparing, machine: Machine) -> None:
    """Judge finetuned models on held-out images: the gate alone.

    Counts the artifact regions that are gone and those that are new, and measures what else has changed. Exit code 3
    where no model passes, or where held-out images are missing by which to decide.
    """
    from deployments.commands.models import run_compare

    _exit(lambda: run_compare(settings, machine))


@app.command(context_settings={"allow_extra_args": True})
@with_flags(Cycling, argument="photos")
def cycle(settings: Cycling, machine: Machine) -> None:
    """Mine artifacts, finetune the GAN model on them, judge it on held-out images and promote it if it passes.

    Starts from the workspace's current model where there is one, else from --gan-model. The same command again goes
    on where it was cut off; after a promotion it starts the next turn. Exit code 3 where no model passes, or
    where held-out images are missing by which to decide.
    """
    from deployments.commands.models import run_cycle

    _exit(lambda: run_cycle(settings, machine))


@app.command()
@with_flags(Calibrating)
def calibrate(settings: Calibrating, machine: Machine) -> None:
    """Derive class weights from artifact-free pairs of your own models, and suggest a threshold.

    Runs desra detect or mine as WORKSPACE's latest run, keeping all maps, then counts how similar the pairs are in
    each class. Writes OUTPUT for --weights, and beside it a page and a figure. The same command again goes on where it
    was cut off, takes in new images, and counts nothing twice.
    """
    from deployments.commands.calibrate import run_calibrate

    _exit(lambda: run_calibrate(settings, machine))


@app.command()
@with_flags(Benchmarking, argument="dataset")
def benchmark(settings: Benchmarking, machine: Machine) -> None:
    """Measure detectors on pairs whose artifacts people have marked, or on clean pairs that are spoilt (synthetic).

    Writes masks, tables (Markdown, CSV, JSON) and a page to OUTPUT, and prints the tables: IoU, precision and recall as
    in the paper, and seconds per megapixel. The same command again goes on where it was cut off, and computes only what
    is new. Exit code 1 where some images cannot be judged.
    """
    from deployments.commands.benchmark import run_benchmark

    _exit(lambda: run_benchmark(settings, machine))


app.command("export")(paths_at_home(export_masks))
app.command("import")(paths_at_home(import_masks))


@app.command()
@with_flags(Serving, config_argument=True)
def serve(settings: Serving, machine: Machine) -> None:
    """Mine new photos by the clock, finetune when enough artifacts have gathered, and turn the cycle every week.

    Starts a Prefect server (unless PREFECT_API_URL is set), workers, and what takes runs as their time comes, and says
    where to watch. Ctrl-C or SIGTERM stops all of it within seconds; the next start goes on with what was cut off.
    """
    from deployments.serving.serve import serve

    _exit(lambda: serve(settings, machine))


@app.command("rollback")
@paths_at_home
def roll_back(workspace: Annotated[Path, typer.Option(help="The workspace whose current model is to go.")]) -> None:
    """Undo the latest promotion: the model before becomes current again."""
    from deployments.commands.models import run_rollback

    _exit(lambda: run_rollback(workspace.absolute()))


@app.command()
@paths_at_home
def status(
    workspace: Annotated[Path, typer.Option(help="The workspace to look at.")],
    failures: Annotated[bool, typer.Option("--failures", help="List every failure.")] = False,
    sized: Annotated[
        bool, typer.Option("--sizes/--no-sizes", help="Measure what it takes of the disk: seconds for a million files.")
    ] = True,
) -> None:
    """Say what is done, pending and failed, from the workspace alone."""
    place = Workspace(workspace.absolute())
    settings, target = load_settings(place)
    manifest = read_manifest(place)
    if manifest is None:
        raise UsageError(place.root, "has no manifest", f"run desra {settings.verb}")
    plan = make_plan(place, manifest, target, limit=settings.limit)
    unscanned = read_table(place.scan_failures, FAILURES)
    failed = pa.concat_tables([unscanned, plan.failures])
    vanished = manifest.num_rows - int(pc.sum(manifest["present"]).as_py() or 0)
    owner = place.owner()
    images = plan.images + unscanned.num_rows
    retried = f", {plan.retries.num_rows} of them failed and will be tried again" if plan.retries.num_rows else ""
    typer.echo(f"workspace  {place.root}")
    typer.echo(f"run        {f'going on: {owner}' if owner else 'none at present'}")
    if model := current_model(place):
        typer.echo(f"model      {model}, current by {history(place)[-1]['kind']} {history(place)[-1]['time']}")
    typer.echo(f"images     {images}" + (f", and {vanished} vanished ones, whose outputs stay" if vanished else ""))
    typer.echo(f"done       {plan.done}")
    typer.echo(f"pending    {plan.pending}{retried}")
    typer.echo(f"failed     {failed.num_rows}")
    if others := kinds_in_words(read_passed_over(place)):
        typer.echo(f"passed over {others}")
    if sized:
        typer.echo(f"size       {size_line(place)}")
    show_failures(pa.concat_tables([failed, plan.retries]), limit=None if failures else SHOWN_FAILURES)


@app.command()
@paths_at_home
def report(
    workspace: Annotated[Path, typer.Option(help="The workspace to report on.")],
    output: Annotated[Path | None, typer.Option(help="File to write; WORKSPACE/report.html by default.")] = None,
    worst: Annotated[int, typer.Option(min=0, max=500, help="How many of the worst regions to show.")] = 24,
    pages: Annotated[
        int, typer.Option(min=0, max=500, help="How many of the worst images get a page of their own in pages/.")
    ] = 0,
) -> None:
    """Write one self-contained HTML page about a workspace: summary, settings, speed, failures, worst regions."""
    place = Workspace(workspace.absolute())
    load_settings(place)
    from desra_core.report import write_report

    def left_out(error: ImageError) -> None:
        say(f"failed: {printable(error)}")

    typer.echo(f"report   {write_report(place, worst=worst, pages=pages, output=output, on_left_out=left_out)}")


app.command()(paths_at_home(evaluate))
app.command()(paths_at_home(gc))


def _exit(run: Callable[[], int]) -> NoReturn:
    try:
        code = run()
    except BaseException as error:
        # What fails while a run is being stopped is no failure of its own.
        stopped = _stop_before(error)
        if isinstance(stopped, SystemExit):
            raise stopped from None
        if isinstance(error, ServerLostError) and stopped is None:
            _begin_again(error)
        if stopped is None:
            raise
        if _is_termination(stopped):
            _terminate(signal.SIGTERM, None)
        say("interrupted: the same command goes on where it stopped")
        code = 130
    raise typer.Exit(code)


def _begin_again(lost: ServerLostError) -> NoReturn:
    """Start this very command anew, once: it finds what is done, and does what is left with another server.

    One that has nothing left to do ends instead.

    At the end of this process, Prefect would wait minutes for the server that has gone.
    """
    sys.stdout.flush()
    told = f"warning: {printable(lost.subject)} {lost.reason}, but the history of this run is incomplete"
    if lost.code is not None:
        say(told)
        os._exit(lost.code)
    if AGAIN in os.environ:
        say(f"error: {printable(lost)}")
        os._exit(1)
    say(f"{told}; going on")
    os.environ[AGAIN] = "1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - our own command line


def _stop_before(error: BaseException | None) -> BaseException | None:
    """The signal that an error is, or during whose handling it was raised; None where there was none."""
    while error is not None and not isinstance(error, KeyboardInterrupt | SystemExit) and not _is_termination(error):
        error = error.__context__
    return error


def _is_termination(error: BaseException) -> bool:
    """Whether Prefect has raised it for a SIGTERM, which it then sends once more: perhaps too late to be first here."""
    return type(error).__name__ == "TerminationSignal"


def _terminate(number: int, _: FrameType | None) -> NoReturn:
    say("terminated: the same command goes on where it stopped")
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
