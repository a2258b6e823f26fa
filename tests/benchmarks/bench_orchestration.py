"""What an image costs beside its computation: Prefect, Dask and planning, and apart from them the commits.

Everything is real (server, cluster, tasks, workspace) but the stages, which do nothing.
Run it with ``python tests/benchmarks/run.py orchestration``; IMAGES in the environment for another number than 2000.
"""

import contextlib
import io
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import psutil
from markdown import print_table
from pairs import write_tiny_pairs

from deployments.serving.connection import wait_for_task_runs
from deployments.serving.server import prefect_server
from desra_core.detection.class_weights import load_weights
from desra_core.images.codec import encode_mask
from desra_core.planning.plan import Plan, make_plan, prepare
from desra_core.settings import CorpusSettings, Detection, Machine
from desra_core.stages import Stage, StageJob
from desra_core.workspace import Workspace
from desra_core.workspace.manifest import ImageRef, image_refs, read_manifest
from desra_core.workspace.products import Record, Target, gather_shard, write_journal

IMAGES = int(os.environ.get("IMAGES", "2000"))
SHARD = 1000
SIDE = 16
WORKERS = 2
STAGES = 2


@dataclass(frozen=True)
class NoOp(StageJob):
    """A job for stages that compute nothing: they publish this mask, if it has bytes."""

    mask: bytes = b""


def no_op_job(settings: CorpusSettings, target: Target, key: str, mask: bytes) -> NoOp:
    return NoOp(settings, target, load_weights("none"), key, "cpu", tile=256, threads=1, max_pixels=2**26, mask=mask)


def similarity_stage(image: ImageRef, record: Record, workspace: Workspace, job: NoOp) -> Record:
    """Nothing, but the record says that the map was made."""
    return replace(record, height=SIDE, width=SIDE, similarity_key=job.target.similarity_key)


def mask_stage(image: ImageRef, record: Record, workspace: Workspace, job: NoOp) -> Record:
    """Publish the mask if there is one, and say so in the record."""
    for name in image.names if job.mask else ():
        workspace.publish(workspace.mask(name), job.mask)
    return replace(record, mask_key=job.target.mask_key, artifact_pixels=0, threshold=0.7, min_area=4000)


def uncommitted(stage: Stage, image: ImageRef, record: Record, workspace: Workspace, job: NoOp) -> Record:
    """Stand in for `desra_core.stages.run_stage`: the stage alone, without a journal."""
    return stage(image, record, workspace, job)


def no_op(image: ImageRef, record: Record) -> Record:
    """What the smallest Dask task could be."""
    return record


def run() -> None:
    with tempfile.TemporaryDirectory(prefix="desra-bench-") as name, patch.dict(os.environ):
        os.environ.pop("PREFECT_API_URL", None)
        os.environ["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] = "CRITICAL"
        folder = Path(name)
        write_tiny_pairs(folder, IMAGES, SIDE)
        detection = Detection(
            mse_sr=folder / "mse_sr", gan_sr=folder / "gan_sr", workspace=folder / "workspace", shard_size=SHARD
        )
        workspace = Workspace(detection.workspace)
        workspace.create()
        with workspace.locked():
            _, plan, _, _ = prepare(detection)
            started = time.perf_counter()
            with prefect_server(workspace):
                server = time.perf_counter() - started
                _print_costs(_measured(workspace, detection, plan), server)


def _measured(workspace: Workspace, detection: Detection, plan: Plan) -> dict[str, float]:
    """Seconds by what was done with all images."""
    from tasks.dask_cluster import open_dask
    from tasks.shards import StageSpec

    work = [(image, Record(image.id)) for shard in plan.shards for image in image_refs(plan.rows(shard))]
    manifest = read_manifest(workspace)
    assert manifest is not None
    keys = (plan.target.similarity_key, plan.target.mask_key)

    def jobs(mask: bytes) -> list[NoOp]:
        return [no_op_job(detection, plan.target, key, mask) for key in keys]

    mask = encode_mask(np.zeros((SIDE, SIDE), np.bool_))
    seconds = {"plain loop": _timed(lambda: _call_all(workspace, work, *jobs(b"")))}
    seconds["commits in a plain loop"] = _timed(lambda: _commit_all(workspace, work, *jobs(mask)))
    _forget(workspace)

    def specs(mask: bytes) -> list[Any]:
        functions = (similarity_stage, mask_stage)
        return [
            StageSpec(name, function, job, {})
            for name, function, job in zip(("similarity", "mask"), functions, jobs(mask), strict=True)
        ]

    with ExitStack() as stack:
        started = time.perf_counter()
        dask = stack.enter_context(open_dask(Machine(workers=WORKERS)))
        list(dask.map("no-op", no_op, {}, work[:100]))
        seconds["cluster"] = time.perf_counter() - started
        seconds["Dask.map"] = STAGES * _timed(lambda: list(dask.map("no-op", no_op, {}, work)))
        warm_up = make_plan(workspace, manifest, plan.target, limit=10)
        flow_seconds(workspace, warm_up, specs(b""), dask)
        workspace.shard_records(0).unlink()
        with patch("tasks.shards.run_stage", uncommitted), patch("tasks.shards.gather_shard"):
            seconds["orchestration"] = flow_seconds(workspace, plan, specs(b""), dask)
        before = psutil.Process().memory_info().rss
        seconds["with commits"] = flow_seconds(workspace, plan, specs(mask), dask)
        growth = psutil.Process().memory_info().rss - before
        print(f"The driver grew by {growth / IMAGES:.0f} bytes an image in the run with commits.")
    assert sum(1 for _ in workspace.masks.rglob("*.png")) == IMAGES
    return seconds


def flow_seconds(workspace: Workspace, plan: Plan, stages: list[Any], dask: Any) -> float:
    """Time the shards of a flow run, from the first submission to the last result, as `flows.detect` runs them."""
    from prefect import flow
    from prefect.runtime import flow_run
    from prefect.task_runners import ThreadPoolTaskRunner

    from tasks.metrics import RunMetrics
    from tasks.progress import RunProgress
    from tasks.shards import Run, process_shard

    @flow(name="no-ops", task_runner=ThreadPoolTaskRunner(max_workers=3))  # type: ignore[arg-type]
    def no_ops() -> tuple[float, str]:
        with RunProgress("no-ops", plan.pending, len(stages)) as progress:
            run = Run(workspace, plan, stages, dask, progress, RunMetrics(workspace, plan))
            started = time.perf_counter()
            broken = progress.follow([process_shard.submit(shard, run) for shard in plan.shards])
            elapsed = time.perf_counter() - started
        assert not broken, broken
        return elapsed, str(flow_run.id)

    with contextlib.redirect_stderr(io.StringIO()):  # its progress lines
        elapsed, flow_run_id = no_ops()
    assert wait_for_task_runs(flow_run_id, len(plan.shards) * (1 + len(stages)))
    return elapsed


def _call_all(workspace: Workspace, work: list[tuple[ImageRef, Record]], similarity: NoOp, mask: NoOp) -> None:
    """The no-ops of all images, one after the other in this process."""
    for image, empty in work:
        record = similarity_stage(image, empty, workspace, similarity)
        mask_stage(image, record, workspace, mask)


def _commit_all(workspace: Workspace, work: list[tuple[ImageRef, Record]], similarity: NoOp, mask: NoOp) -> None:
    """The commits of all images, one after the other in this process: two journal entries and a mask, then gather."""
    for image, empty in work:
        record = similarity_stage(image, empty, workspace, similarity)
        write_journal(workspace, image.shard, record)
        write_journal(workspace, image.shard, mask_stage(image, record, workspace, mask))
    for shard in sorted({image.shard for image, _ in work}):
        gather_shard(workspace, shard)


def _forget(workspace: Workspace) -> None:
    for folder in (workspace.records, workspace.masks):
        for path in [path for path in folder.rglob("*") if path.is_file()]:
            path.unlink()


def _timed(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def _print_costs(seconds: dict[str, float], server: float) -> None:
    """Per image, in milliseconds; and as multiples of the plain loop over the same no-op."""
    cost = {what: 1000 * value / IMAGES for what, value in seconds.items()}
    commits = cost["with commits"] - cost["orchestration"]
    print(
        f"{IMAGES} images of {SIDE}x{SIDE} px, {STAGES} stages that do nothing, shards of {SHARD}, {WORKERS} workers."
    )
    print(f"Once per run, not counted: server {server:.1f} s, cluster {seconds['cluster']:.1f} s.\n")

    def row(what: str, milliseconds: float) -> list[str | float]:
        ratio = milliseconds / cost["plain loop"]
        return [what, milliseconds, milliseconds / STAGES, f"{ratio:,.0f}"]

    print_table(
        ["", "ms an image", "ms an image and stage", "x plain loop"],
        [
            row("plain loop over the no-op, one process", cost["plain loop"]),
            row("bare no-op through Dask.map", cost["Dask.map"]),
            row("orchestration: process_shard without commits (aim: 3 a stage)", cost["orchestration"]),
            row("  of it Prefect, planning, progress", cost["orchestration"] - cost["Dask.map"]),
            row("process_shard with commits", cost["with commits"]),
            row("commits: journal, mask, gather (the difference)", commits),
            row("the same commits in a plain loop, one process", cost["commits in a plain loop"]),
        ],
    )
