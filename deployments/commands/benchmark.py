"""`desra benchmark`: plan first, start servers only where there is something to do."""

import typer

from deployments.commands.runs import run_flow
from deployments.serving.server import end_leftover_server
from desra_core.benchmarking import AnyBenchmark, plan
from desra_core.errors import UsageError, printable
from desra_core.evaluation.table import counted
from desra_core.report.agreement_pages import publish_results
from desra_core.settings import Machine
from desra_core.settings.models import Benchmarking
from desra_core.workspace import Workspace
from tasks.logs import say, say_each


def run_benchmark(settings: Benchmarking, machine: Machine) -> int:
    """Benchmark, or find that there is nothing to do, and print the tables; returns the exit code."""
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


def _warn(planned: AnyBenchmark) -> None:
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
