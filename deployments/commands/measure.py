"""`desra benchmark` and `calibrate`: plan first, start servers only where something is to be computed."""

import shlex
from typing import TYPE_CHECKING

import typer

from deployments.commands.runs import prepare_corpus, renew_results, run_flow, show_people
from deployments.serving.server import end_leftover_server
from desra_core.calibration.counting import corpus_of, derive_calibration, plan_counting, read_exclusion, unused_masks
from desra_core.calibration.weights import CalibratedWeights, largest_differences
from desra_core.detection.mask import THRESHOLD
from desra_core.errors import UsageError, printable
from desra_core.evaluation.table import counted
from desra_core.images.scanning import image_files
from desra_core.settings import CorpusSettings, Machine
from desra_core.settings.models import Benchmarking, Calibrating
from desra_core.workspace import Workspace
from tasks.logs import say, say_each

if TYPE_CHECKING:
    from desra_core.benchmarking import AnyBenchmark

_DIFFERENCES = 5
_NAMED_CLASSES = 8


def run_benchmark(settings: Benchmarking, machine: Machine) -> int:
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
    if planned.lossy:
        masks = counted(len(planned.lossy), "mask is", "masks are")
        say(f"warning: {masks} JPEG or lossy WebP, thresholded at half: save masks as PNG")
    if planned.unjudged:
        results = counted(len(planned.unjudged), "GAN result has", "GAN results have")
        say(f"left out: {results} no ground truth, the first is {printable(planned.unjudged[0])}")


def _show(calibrated: CalibratedWeights, settings: Calibrating) -> None:
    rows, histogram = calibrated.rows, calibrated.histogram
    by_state = {state: [row for row in rows if row.state == state] for state in ("calibrated", "thin", "unseen")}
    excluded = f", {counted(histogram.excluded, 'pixel')} excluded" if histogram.excluded else ""
    seen = counted(histogram.seen, "image")
    typer.echo(f"{counted(int(histogram.pixels.sum()), 'pixel')} of {seen} counted{excluded}")
    counts = ", ".join(f"{len(group)} {state}" for state, group in by_state.items())
    typer.echo(f"classes: {counts}; thin and unseen ones get the fallback, {settings.fallback}")
    if thin := sorted(by_state["thin"], key=lambda row: -row.pixels):
        named = ", ".join(f"{row.name} ({row.pixels:,} px in {row.images})" for row in thin[:_NAMED_CLASSES])
        more = ", …" if len(thin) > _NAMED_CLASSES else ""
        say(f"warning: fewer than {settings.min_pixels:,} pixels or {settings.min_images} images: {named}{more}")
    for row in largest_differences(rows, _DIFFERENCES):
        typer.echo(f"  {row.name}: weight {row.weight:.3f}, published {row.published_weight:.3f}")
    ours, published = calibrated.below
    typer.echo(
        f"at threshold {THRESHOLD}, {100 * ours:.3g} % of the counted pixels are below "
        f"({100 * published:.3g} % with the published weights), before morphology"
    )
    suggested = calibrated.suggested
    if suggested.threshold is not None:
        other = suggested.published_threshold
        also = f"; with the published weights {other:.4g}" if other is not None else ""
        typer.echo(f"--threshold {suggested.threshold:.4g} puts at most {100 * suggested.rate:.12g} % below{also}")
    page, figure = settings.output.with_suffix(".html"), settings.output.with_suffix(".svg")
    typer.echo(f"weights  {settings.output}\npage     {page}\nfigure   {figure}")


def _next_command(corpus: CorpusSettings, settings: Calibrating) -> str:
    """Return the command of the latest run, with the new weights."""
    given = corpus.model_dump(mode="json", exclude_defaults=True) | {"weights": str(settings.output)}
    photos = [shlex.quote(given.pop("photos"))] if "photos" in given else []
    flags = [
        f"--{name.replace('_', '-')}" + ("" if one is True else f" {shlex.quote(str(one))}")
        for name, value in given.items()
        for one in (value if isinstance(value, list) else [value])
    ]
    return " ".join([f"desra {corpus.verb}", *photos, *flags])
