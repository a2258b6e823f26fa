"""The command line: a verb per flow. A command plans from the workspace before it imports Prefect, Dask or torch."""

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from deployments.commands.config import config
from deployments.commands.demo import demo
from deployments.commands.doctor import doctor
from deployments.commands.evaluate import evaluate
from deployments.commands.flags import paths_at_home, with_flags
from deployments.commands.help import CONTEXT, PlainCommand, Verbs
from deployments.commands.learn import calibrate_severity, train_detector
from deployments.commands.review import review
from deployments.commands.workspace import export_masks, gc, import_masks, report, roll_back, status
from deployments.serving.connection import AGAIN
from deployments.serving.server import ServerLostError
from desra_core import __version__
from desra_core.errors import DesraError, TransientError, UsageError, printable
from desra_core.settings import Frozen, Machine
from desra_core.settings.models import SETTINGS
from tasks.logs import say

# Headings of the commands.
FIND, DELETE, JUDGE, RUN = "Find artifacts", "Delete them", "Judge", "Run and keep"

# What desra alone prints.
_START = """\
desra finds the artifacts that GAN super-resolution models invent, and trains them away.
Two folders of results:  desra detect --mse-sr MSE --gan-sr GAN --workspace ws
One GAN checkpoint:      desra twin SHARP --gan-model gan.pth --output ws/twin/twin.pth (no GPU: --preset cpu)
                   then  desra mine PHOTOS --gan-model gan.pth --workspace ws
Then look at ws/report.html. All commands: desra --help; the flags of one: desra COMMAND --help"""

app = typer.Typer(
    name="desra",
    help="Find and delete the artifacts of GAN super-resolution models.",
    cls=Verbs,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings=CONTEXT,
)


def main() -> None:
    """Run the command line.

    Exit codes: 0 done, 1 some images failed, 2 bad usage or input, 3 no model passes the gate (or only one that was
    rolled back, or the gate is undecided for lack of held-out images) or a twin is no better than the GAN model, 130
    interrupted, 143 terminated.
    """
    signal.signal(signal.SIGTERM, _terminate)
    _name_a_home()
    try:
        try:
            os.getcwd()  # paths are relative to it, and workers start in it
        except OSError as error:
            raise UsageError("the working folder", f"is gone ({error.strerror})", "change to another one") from None
        app()
    except DesraError as error:
        say(f"error: {printable(error)}")
        sys.exit(1 if isinstance(error, TransientError) else 2)


def _name_a_home() -> None:
    """Set the home folder of a user without one, such as a number in a container, to one that does not exist.

    Prefect cannot be imported without the name of a home, and numba would make a folder with the name ``~``.
    """
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = "/nonexistent"  # as Debian writes it


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"desra {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(_START)


def _command(
    heading: str, run: str, *, name: str | None = None, **options: Any
) -> Callable[[Callable[[], None]], None]:
    """Add a command with a flag for each field of its settings in `SETTINGS`, under a heading of the help.

    ``run`` is the module and the function that carries it out, imported only when it is called, since that may take
    seconds; ``options`` are those of `with_flags`. The decorated function gives the help, and the name where none is
    given.
    """

    def add(described: Callable[[], None]) -> None:
        def command(settings: Frozen, machine: Machine, **form: bool) -> None:
            module, _, function_name = run.partition(":")
            function = getattr(import_module(f"deployments.{module}"), function_name)
            run_and_exit(lambda: function(settings, machine, **form))

        command.__name__, command.__doc__ = described.__name__, described.__doc__
        with_its_flags = with_flags(command, SETTINGS[name or described.__name__], **options)
        # An argument too many is a glob that the shell has filled in, for which there is a better message than Click's.
        allowed = {"allow_extra_args": "argument" in options}
        app.command(name, cls=PlainCommand, context_settings=allowed, rich_help_panel=heading)(with_its_flags)

    return add


def _own_flags(heading: str, run: Callable[..., None], name: str | None = None, **options: str) -> None:
    """Add a command that declares its own flags; ``options`` are those of `paths_at_home`."""
    app.command(name, cls=PlainCommand, rich_help_panel=heading)(paths_at_home(run, **options))


@_command(FIND, "commands.runs:run_corpus", argument="photos")
def mine() -> None:
    """Upscale photos with two models, mark the GAN model's artifacts and gather them as a dataset.

    Writes a mask per photo to WORKSPACE/masks, photos with artifacts with their results and pseudo-GT to
    WORKSPACE/dataset, a table of regions to WORKSPACE/regions.parquet and a page to look at, WORKSPACE/report.html.
    The same command again goes on where it was cut off, takes in new photos, and does nothing where nothing has
    changed.
    """


@_command(FIND, "commands.inspect:run_inspect", argument="photos", json_flag=True)
def inspect() -> None:
    """Count the photos of a place, and estimate what a mine of them takes, before anything is computed.

    Reads headers only, where the format allows it, and writes nothing. Shows formats, sizes, depths and colour
    profiles, what is left out and why, and from a sample of photos the time and the disk of desra mine and desra
    deliver: with both models the whole of it, without them the decoding alone. Exit code 1 where some files cannot be
    read.

    --json prints one object: place, photos, bytes, megapixels, formats, sizes, depths and profiles (rows with photos,
    bytes and megapixels, by format, size, depth, or profile and treatment), smallest and largest (path, width, height),
    copies (photos whose content another one has: photos, bytes, example), left_out (what, reason, files, example),
    unreadable (reason, remedy, files, example), sample and estimate. The sample has photos, megapixels and decoding
    (seconds), and of its crops crops, crop_megapixels, inferred_megapixels and inference (of either model), comparison
    and keeping (seconds), mask, kept, png and jpeg (bytes). The estimate has workers, gpus, decoding, inference,
    comparison and keeping (seconds of one worker), seconds (of all workers) and mine (bytes), both from no photo with
    artifacts to all of them, png and jpeg (bytes of the pictures of desra deliver). What was not measured is null.
    """


@_command(FIND, "commands.runs:run_corpus")
def detect() -> None:
    """Compare two folders of super-resolution results and mark the artifacts.

    Writes a mask per image to WORKSPACE/masks, a table of regions to WORKSPACE/regions.parquet and a page to look
    at, WORKSPACE/report.html. The same command again goes on where it was cut off, takes in new files, and does
    nothing where nothing has changed.
    """


@_command(DELETE, "commands.models:run_twin", argument="photos")
def twin() -> None:
    """Train the MSE twin of a GAN model, which DeSRA compares with: on sharp photos that are degraded on the fly.

    Writes OUTPUT, which the usual tools load, a JSON file of its origin and scores, and the folder of the training.
    The same command again goes on where it was cut off. Exit code 3 where the twin is no better than the GAN model.
    """


@_command(DELETE, "commands.models:run_finetune")
def finetune() -> None:
    """Finetune the GAN model on the pseudo ground truths of its worst images.

    Writes checkpoints that the usual tools load to OUTPUT/models, and losses and pictures for TensorBoard. The same
    command again goes on where it was cut off.
    """


@_command(DELETE, "commands.models:run_compare", json_flag=True)
def compare() -> None:
    """Judge finetuned models on held-out images: the gate alone.

    Counts the artifact regions that are gone and the new ones, and measures all other changes. Exit code 3
    where no model passes, or where held-out images are missing by which to decide.

    --json prints one object: workspace, before, after, outcome (passed, failed or undecided), passed, undecided, best
    (name of the best candidate), reasons (why it does not pass), thresholds, scores (of each candidate), control (the
    score of invisible noise), dropped (candidates that were not judged on all images), human_masks (images that have
    one), failures (images that could not be judged) and promoted (folder of the promoted model, or null). A score has
    candidate, images, clean_images, regions, gone, removal, images_added, addition, regions_added, area_before,
    area_after, psnr, ssim, gradient_similarity, lpips, detail_loss, classes, human_images, iou_before, iou_after,
    delta_iou (in points), and 95 % intervals; shares are in 0..1.
    """


@_command(DELETE, "commands.models:run_cycle", argument="photos")
def cycle() -> None:
    """Mine artifacts, finetune the GAN model on them, judge it on held-out images and promote it if it passes.

    Starts from the workspace's current model where there is one, else from --gan-model. The same command again goes
    on where it was cut off; after a promotion it starts the next turn. Exit code 3 where no model passes, or
    where held-out images are missing by which to decide.
    """


@_command(DELETE, "commands.runs:run_deliver", argument="photos")
def deliver() -> None:
    """Upscale photos and write the pictures, with what is still an artifact replaced by the MSE model's result.

    Writes a picture per photo to OUTPUT, in its colour profile and with its metadata, and the table
    OUTPUT/delivered.parquet. Mines photos that have no mask first, as desra mine with the settings of WORKSPACE's
    latest run and its current model. The same command again goes on where it was cut off, and writes only what has
    changed.
    """


_own_flags(DELETE, roll_back, "rollback")
_own_flags(JUDGE, evaluate)


@_command(JUDGE, "commands.measure:run_benchmark", argument="dataset")
def benchmark() -> None:
    """Measure detectors on pairs with human masks.

    Writes masks, tables (Markdown, CSV, JSON) and a page to OUTPUT, and prints the tables: IoU, precision and recall as
    in the paper, and seconds per megapixel. The same command again goes on where it was cut off, and computes new
    images only. Exit code 1 where some images cannot be judged. Without masks, there is desra benchmark synthetic.
    """


@_command(JUDGE, "commands.measure:run_benchmark", name="benchmark synthetic")
def benchmark_synthetic() -> None:
    """Measure detectors on clean pairs without masks: inject artifacts of known place, kind and strength.

    Writes tables (Markdown, CSV, JSON) and a page to OUTPUT, and prints a summary. The same command again goes on where
    it was cut off, and computes new images only. Exit code 1 where some images cannot be judged.
    """


@_command(JUDGE, "commands.measure:run_calibrate")
def calibrate() -> None:
    """Derive class weights from artifact-free pairs of your own models, and suggest a threshold.

    Runs desra detect or mine with the settings of WORKSPACE's latest run, but keeps all maps, and counts how similar
    the pairs are in each class. Writes OUTPUT for --weights, and beside it a page and a figure. The same command again
    goes on where it was cut off, takes in new images, and counts nothing twice.
    """


_own_flags(JUDGE, calibrate_severity, "calibrate severity")
_own_flags(JUDGE, train_detector, "train-detector")
_own_flags(JUDGE, review, interrupted="every answer is kept")
_own_flags(JUDGE, export_masks, "export", interrupted="nothing was exported")
_own_flags(JUDGE, import_masks, "import", interrupted="import again")


@_command(RUN, "serving.serve:serve", config_argument=True)
def serve() -> None:
    """Mine new photos by the clock, finetune when enough artifacts have gathered, and turn the cycle every week.

    Starts a Prefect server (unless PREFECT_API_URL is set), workers, and a process that takes runs as their time comes,
    and prints where to watch. Ctrl-C or SIGTERM stops all of it within seconds; the next start goes on with the
    runs that were cut off.
    """


@_command(RUN, "commands.workspace:run_verify", json_flag=True)
def verify() -> None:
    """Check every file of a workspace against the checksum that it was written with.

    Names what is damaged or missing, and files that no run has made. Exit code 1 where something is damaged; with
    --repair, where something stays that no run can make again.

    --json prints one object: workspace, files and bytes (checked), damaged (path, reason, remedy and whether it is
    marked for the next run), missing (paths that the next run makes), unknown (paths that no run has made), untold
    (images whose pictures have no checksum, since an older desra wrote them) and unchecked (images whose records are
    damaged).
    """


_own_flags(RUN, status)
_own_flags(RUN, report)
_own_flags(RUN, gc)
_own_flags(RUN, config)
_own_flags(RUN, doctor)
_own_flags(RUN, demo)


def run_and_exit(run: Callable[[], int]) -> NoReturn:
    """End the process with the exit code of a run, or of the signal that has stopped the run."""
    try:
        code = run()
    except BaseException as error:
        # An error that is raised while an interrupt or an exit ends the run is not a failure of the run.
        stopped: BaseException | None = error
        while stopped and not isinstance(stopped, KeyboardInterrupt | SystemExit) and not _is_termination(stopped):
            stopped = stopped.__context__
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
    """Start this command anew, once, to go on with another server; end it if nothing is left to do.

    The process does not end as usual, because Prefect would wait minutes for the lost server.
    """
    sys.stdout.flush()
    warning = f"warning: {printable(lost.subject)} {lost.reason}, but the history of this run is incomplete"
    if lost.code is not None:
        say(warning)
        os._exit(lost.code)
    if AGAIN in os.environ:
        say(f"error: {printable(lost)}")
        os._exit(1)
    say(f"{warning}; going on")
    os.environ[AGAIN] = "1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - our own command line


def _is_termination(error: BaseException) -> bool:
    """Check whether an error is the one that Prefect raises on a SIGTERM."""
    return type(error).__name__ == "TerminationSignal"


def _terminate(number: int, _: FrameType | None) -> NoReturn:
    say("terminated: the same command goes on where it stopped")
    sys.exit(128 + number)


def run_as_process() -> NoReturn:
    """Run the command line and end the process."""
    try:
        main()
    except SystemExit as error:
        if isinstance(error.code, str):
            say(error.code)
        end_process(error.code if isinstance(error.code, int) else int(error.code is not None))
    end_process(0)


def end_process(code: int) -> NoReturn:
    """End the process as Python does, but without taking its modules apart, which takes half a second."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:  # as where it was closed before
                stream.flush()
        except (OSError, ValueError):  # its reader has gone
            code = code or 1
    os._exit(code)


if __name__ == "__main__":
    run_as_process()
