"""One Prefect task per shard, which calls a cached task per stage."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.context import TaskRunContext
from prefect.runtime import flow_run

from desra_core.errors import ImageError
from desra_core.files.hashing import fingerprint
from desra_core.planning.keys import Target
from desra_core.planning.plan import Plan, Work, assess
from desra_core.stages import Stage, failure, run_stage
from desra_core.workspace import Workspace
from desra_core.workspace.inventory import OnDisk
from desra_core.workspace.manifest import ImageRef
from desra_core.workspace.records import Record, gather_shard, read_shard, to_table
from tasks.dask_map import Dask, Job
from tasks.logs import record
from tasks.progress import RunProgress

Counts = dict[str, int]


class StageSpec(NamedTuple):
    """A stage of a flow.

    ``name`` is what people see; ``product`` is the field of `planning.plan.Work` that tells which images need it;
    ``function`` and its ``settings`` come from `desra_core.stages`; ``key`` identifies everything but the images
    that determines the product; ``resources`` are Dask's, like ``{"GPU": 1}``.
    """

    name: str
    product: str
    function: Stage
    settings: Any
    key: str
    resources: dict[str, float]


class Run:
    """What the shards of one run share. Lives in the driver; never leaves it."""

    def __init__(
        self, workspace: Workspace, plan: Plan, stages: list[StageSpec], dask: Dask, progress: RunProgress
    ) -> None:
        self.workspace = workspace
        self.plan = plan
        self.stages = stages
        self.dask = dask
        self.progress = progress


class Shard:
    """The images of a shard that have something to do, and their records so far.

    ``content`` are the ids of all its images, those included that are done.
    """

    def __init__(self, run: Run, number: int) -> None:
        self.number = number
        self._run = run
        self._rows = run.plan.rows(number)
        self.records = read_shard(run.workspace, number)
        pending = set(self._rows.filter(pa.array(self._work().pending))["id"].to_pylist())
        self.images = {image.id: image for image in run.plan.image_refs(number) if image.id in pending}
        self.failed: set[str] = set()
        self.content = sorted(set(self._rows["id"].to_pylist()))

    def pending(self, product: str) -> list[tuple[ImageRef, Record]]:
        """The images that lack a product, by what the workspace says now."""
        flags: np.ndarray[Any, Any] = getattr(self._work(), product)
        ids = dict.fromkeys(self._rows.filter(pa.array(flags))["id"].to_pylist())
        return [(self.images[key], self.record_of(key)) for key in ids if key in self.images and key not in self.failed]

    def names(self) -> int:
        """How many names the images have that have not failed."""
        return sum(len(image.names) for key, image in self.images.items() if key not in self.failed)

    def record_of(self, image_id: str) -> Record:
        """Return the record of an image, or an empty one."""
        return self.records.get(image_id, Record(image_id))

    def update(self, record: Record) -> None:
        """Replace the record of an image."""
        self.records[record.id] = record
        if record.failed:
            self.failed.add(record.id)

    def _work(self) -> Work:
        on_disk = OnDisk.of_rows(self._run.workspace, self._rows)
        return assess(self._rows, to_table(self.records.values()), self._run.plan.target, on_disk)


def spared_arrays(target: Target) -> tuple[str, ...]:
    """The arrays that stay of an image that is done and clean."""
    return ("mse_sr",) if target.keep_mse else ()


def explicit_key(_: TaskRunContext, parameters: dict[str, Any]) -> str:
    """The cache key of a task that names it itself."""
    return str(parameters["cache_key"])


@task(cache_key_fn=explicit_key, persist_result=True, result_serializer="json")
def stage_of_shard(cache_key: str, stage: int, shard: Shard, run: Run) -> Counts:  # noqa: ARG001
    """Run one stage on the images of a shard that need it.

    The cache key names the stage, its settings and the content of the images. Whether a cached state counts is for
    the workspace to say: with anything left to do the cache is refreshed, not read.
    """
    spec = run.stages[stage]
    target = run.plan.target
    function = partial(
        run_stage,
        spec.function,
        workspace=run.workspace,
        settings=spec.settings,
        mask_key=target.mask_key,
        spared=spared_arrays(target),
    )
    work = shard.pending(spec.product)
    failed_before = len(shard.failed)
    stages_left = len(run.stages) - stage
    logger = get_run_logger()
    for image, result in run.dask.map(Job(spec.name, function, spec.resources), work):
        error: ImageError | None
        if isinstance(result, ImageError):  # raised, for another try may succeed
            record, error = failure(image, shard.record_of(image.id), spec.name, target.mask_key, result), result
        else:
            record, error = result, result.error if result.failed else None
        shard.update(record)
        logger.debug("shard %05d, image %s: %s", shard.number, image.id, error or "done")
        if error:
            run.progress.failed(error, len(image.names), stages_left)
        else:
            run.progress.passed(len(image.names), last=stages_left == 1)
    return {"images": len(work), "failed": len(shard.failed) - failed_before}


@task(task_run_name="shard-{number:05d}", cache_policy=NO_CACHE)
def process_shard(number: int, run: Run) -> Counts:
    """Take a shard through all stages, then gather its records. What is done already is left alone."""
    shard = Shard(run, number)
    for index, spec in enumerate(run.stages):
        pending = shard.pending(spec.product)
        run.progress.passed(shard.names() - sum(len(image.names) for image, _ in pending))
        stage_of_shard.with_options(
            name=spec.name,
            task_run_name=f"{spec.name}-{number:05d}",
            refresh_cache=bool(pending),
        )(fingerprint(spec.name, spec.key, shard.content), index, shard, run)
    gather_shard(run.workspace, number, [shard.records[key] for key in sorted(shard.failed)])
    counts = {"images": len(shard.images), "failed": len(shard.failed)}
    told = f"{counts['images']} images, {counts['failed']} failed"
    get_run_logger().info("shard %05d: %s", number, told)
    record(logging.INFO, told, run=flow_run.name, shard=f"{number:05d}")
    return counts
