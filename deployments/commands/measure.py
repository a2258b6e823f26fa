"""`desra benchmark` and `calibrate`: plan first, start servers only where something is to be computed."""

import shlex
from typing import TYPE_CHECKING

import typer

from deployments.commands.runs import prepare_corpus, renew_results, run_flow, show_people
from deployments.serving.server import end_leftover_server
from desra_core.calibration.counting import corpus_of, derive_calibration, plan_counting, read_exclusion, unused_masks
from desra_core.calibration.summary import thin_classes, weight_sections
from desra_core.calibration.weights import CalibratedWeights
from desra_core.errors import UsageError, printable
from desra_core.evaluation.table import counted, document_as_text
from desra_core.images.scanning import image_files
from desra_core.networks.segmentation import try_segmenter
from desra_core.settings import CorpusSettings, Machine, given_values
from desra_core.settings.models import Benchmarking, Calibrating, SyntheticBenchmarking
from desra_core.workspace import Workspace
from tasks.logs import say, say_each

if TYPE_CHECKING:
    from desra_core.benchmarking import AnyBenchmark


def run_benchmark(settings: Benchmarking | SyntheticBenchmarking, machine: Machine) -> int:
    """Benchmark, if there is anything to do, and print the tables; return the exit code."""
    from desra_core.benchmarking import plan
    from desra_core.report.pages import publish_results

    workspace = Workspace(settings.output)
    if workspace.manifest.exists():
        raise UsageError(workspace.root, "is a workspace of images", "name another folder with --output")
    planned = plan(settings)
    with workspace.opened():
        end_leftover_server(workspace)
        _warn(planned)
        # Failures that are known before anything is computed; the progress shows the others.
        say_each("failed", planned.failed(), ": the JSON file lists them")
        if planned.missing():
            if planned.runs_networks:
                try_segmenter(settings.segmenter)
            published = run_flow(workspace, settings, machine).published
        else:
            typer.echo("nothing to do: all was judged before")
            published = publish_results(planned)
        failed = len(published.failures) + len(planned.missing())
    typer.echo(f"{published.judged} of {counted(published.judged + failed, 'image')} judged, {failed} failed")
    typer.echo(published.text)
    *tables, page = published.files
    typer.echo("\n".join([*(f"table    {path}" for path in tables), f"page     {page}"]))
    return int(failed > 0)


def run_calibrate(settings: Calibrating, machine: Machine) -> int:
    """Calibrate, if there is anything to do, and print the weights; return the exit code."""
    corpus = corpus_of(settings)
    workspace = Workspace(corpus.workspace)
    exclusion = read_exclusion(settings.exclude)
    if settings.exclude:
        files = image_files(corpus.sources.main, corpus.workspace).files
        # A mask is named after the image's name, which usually has no suffix, or after the image's file: try both.
        if unused := unused_masks(settings.exclude, exclusion, files["name"].to_pylist() + files["path"].to_pylist()):
            belong = "mask of --exclude belongs" if len(unused) == 1 else "masks of --exclude belong"
            say(f"warning: {len(unused)} {belong} to no image, the first is {printable(unused[0])}")
    with workspace.opened():
        end_leftover_server(workspace)
        prepared = prepare_corpus(corpus)
        counting = plan_counting(corpus, exclusion)
        say_each("failed", [error for shard in counting.counted() for error in shard.failures])
        if prepared.plan.pending or counting.missing():
            ended = run_flow(workspace, settings, machine, (corpus, prepared), rescan=False)
            for line in ended.found.broken_shards:
                say(f"error: {line}")
            counting, calibrated = plan_counting(corpus, exclusion), ended.weights
        else:
            typer.echo("nothing to do: all was counted before")
            renew_results(prepared)
            calibrated = derive_calibration(settings, corpus, counting)
            from desra_core.report.pages import write_calibration

            write_calibration(calibrated, settings.output)
        images, pixels = counting.suspect()
        if images:  # such weights would count artifacts as normal, and hide artifacts like these
            say(
                f"warning: the detector finds artifacts in {images} of {counted(counting.images, 'image')}, "
                f"{counted(pixels, 'pixel')}, which count as normal: calibrate on pairs without any, or leave them out "
                "with --exclude MASKS"
            )
        for doubt in calibrated.origin["doubts"]:
            say(f"warning: these weights may be of no real pair: {doubt}")
        _show(calibrated, settings)
        show_people(counting.human_masks)
        assert prepared.scanned is not None
        after = prepared.plan.after(workspace)
        left_out = prepared.scanned.failures.num_rows + after.failed + after.pending
        left_out += sum(len(shard.failures) for shard in counting.counted()) + sum(counting.missing().values())
        if left_out:
            typer.echo(f"left out {counted(left_out, 'image')} that failed")
        typer.echo(f"next     {_next_command(corpus, settings)}")
    return int(left_out > 0)


def _warn(planned: "AnyBenchmark") -> None:
    """Warn of missing class weights, lossy masks and images without a ground truth, before anything is computed."""
    weighing = [method for method in planned.methods if method.weighs_classes]
    if weighing and planned.settings.weights != "none" and not any(method.weighted for method in weighing):
        say("warning: every class has weight 1; give --labels or --segmenter to have desra with class weights, too")
    for note in planned.notes:
        say(f"warning: {note}")


def _show(calibrated: CalibratedWeights, settings: Calibrating) -> None:
    if thin := thin_classes(calibrated):
        say(f"warning: {thin}")
    typer.echo(document_as_text("", weight_sections(calibrated)[:1]))  # the page has the weights of all classes
    page, figure = settings.output.with_suffix(".html"), settings.output.with_suffix(".svg")
    typer.echo(f"weights  {settings.output}\npage     {page}\nfigure   {figure}")


def _next_command(corpus: CorpusSettings, settings: Calibrating) -> str:
    """Return the command of the latest run, with the new weights."""
    given = given_values(corpus) | {"weights": str(settings.output)}
    photos = [shlex.quote(given.pop("photos"))] if "photos" in given else []
    flags = [
        f"--{name.replace('_', '-')}" + ("" if one is True else f" {shlex.quote(str(one))}")
        for name, value in given.items()
        for one in (value if isinstance(value, list) else [value])
    ]
    return " ".join([f"desra {corpus.verb}", *photos, *flags])
