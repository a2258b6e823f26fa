"""Take the shards of a corpus through the stages of a run: the body of the flows detect and mine."""

from functools import partial
from pathlib import Path
from typing import Any

from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from desra_core.errors import UsageError
from desra_core.networks.checkpoints import load_pair
from desra_core.planning.plan import Plan, Prepared, prepare
from desra_core.settings import CorpusSettings, Machine, Mining
from desra_core.workspace import Workspace
from flows import handed_over
from flows.corpus_flow import runs_by_itself
from tasks.dask_cluster import USUAL_PIXELS, gpus_wanted
from tasks.dask_connection import open_dask
from tasks.progress import ReadingProgress, RunProgress
from tasks.run_end import Summary, publish_results, show_corpus
from tasks.shards import Run, process_shard, stages_of

# The largest factor by which a network enlarges.
_LARGEST_SCALE = 16
# While the last images of one shard finish, the next one keeps the workers busy.
_SHARDS_IN_FLIGHT = 3


def shard_runner() -> TaskRunner[Any]:
    """Run a few shards at a time."""
    return ThreadPoolTaskRunner(max_workers=_SHARDS_IN_FLIGHT)


def opened_workspace(root: Path) -> Workspace:
    """Open the workspace of a run; create a missing workspace, except for a run of a deployment.

    Raises:
        UsageError: The workspace of a run of a deployment has vanished, perhaps with its disk.
    """
    workspace = Workspace(root)
    if runs_by_itself() and not workspace.exists():
        remedy = f"bring it back, or make a new one: desra serve does when it starts, or touch {workspace.lock}"
        raise UsageError(root, "is no workspace: all earlier results are gone with it", remedy)
    workspace.create()
    return workspace


def process_corpus(settings: CorpusSettings, machine: Machine, *, rescan: bool) -> Summary:
    """Plan a run, take its shards through the stages and publish the results: the body of a flow.

    Args:
        settings: Settings of the run.
        machine: Where and how wide to compute.
        rescan: Look for new and changed files first.
    """
    workspace = opened_workspace(settings.workspace)
    with workspace.locked():
        prepared = None if rescan else handed_over(settings, Prepared)
        prepared = prepared or prepare(settings, rescan=rescan, on_hashed=ReadingProgress())
        plan = prepared.plan
        if not plan.pending:
            show_corpus(settings, prepared)
            return publish_results(workspace, plan, 1)
        networks = plan.target.runs_networks
        gpus, largest = gpus_wanted(networks, machine), partial(_most_pixels, settings, plan)
        with open_dask(machine, folder=workspace.root, networks=networks, gpus=gpus, most_pixels=largest) as dask:
            show_corpus(settings, prepared, dask)
            stages = stages_of(settings, plan.target, prepared.weights, machine, dask)
            with RunProgress(settings.verb, plan.pending, len(stages)) as progress:
                run = Run(workspace, plan, stages, dask, progress)
                broken = progress.follow([process_shard.submit(shard, run) for shard in plan.shards])
        task_runs = len(plan.shards) * (1 + len(stages)) + 1
        return publish_results(workspace, plan, task_runs, broken, *progress.failures)


def _most_pixels(settings: CorpusSettings, plan: Plan) -> int:
    """Return the pixels of the largest result to come."""
    pixels = plan.most_pixels()
    if not isinstance(settings, Mining) or pixels * _LARGEST_SCALE**2 <= USUAL_PIXELS:
        return pixels  # fits at any scale; to read the scale would import PyTorch
    _, model = load_pair(settings.mse_model, settings.gan_model, precision=settings.precision)
    return pixels * model.scale**2
