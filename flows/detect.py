"""Detect: two folders of super-resolution results in, artifact masks out."""

from __future__ import annotations

from prefect import flow
from prefect.task_runners import ThreadPoolTaskRunner

from desra_core.plan import prepare
from desra_core.settings import Detection, Machine
from desra_core.workspace import Workspace
from tasks.detection import detection_stages, gpus_wanted
from tasks.fanout import open_dask
from tasks.progress import RunProgress
from tasks.shards import Run, process_shard
from tasks.summary import Summary, publish_results

# While the last images of one shard finish, the next one keeps the workers busy.
_SHARDS_IN_FLIGHT = 3


@flow(name="detect", task_runner=ThreadPoolTaskRunner(max_workers=_SHARDS_IN_FLIGHT))  # type: ignore[arg-type]
def detect(detection: Detection, machine: Machine = Machine(), rescan: bool = True) -> Summary:  # noqa: B008
    """Find the artifacts in every pair of two folders.

    Parameters
    ----------
    detection
        What to compare and how.
    machine
        Where and how wide to compute.
    rescan
        Look for new and changed files first.
    """
    workspace = Workspace(detection.workspace)
    workspace.create()
    with workspace.locked():
        _, plan, weights, _ = prepare(detection, rescan=rescan)
        with open_dask(machine, gpus=gpus_wanted(plan.target, machine)) as dask:
            stages = detection_stages(detection, plan.target, weights, machine, dask)
            with RunProgress(plan.pending, len(stages)) as progress:
                run = Run(workspace, plan, stages, dask, progress)
                broken = progress.follow([process_shard.submit(shard, run) for shard in plan.shards])
        task_runs = len(plan.shards) * (1 + len(stages)) + 1
        return publish_results(workspace, task_runs, broken)
