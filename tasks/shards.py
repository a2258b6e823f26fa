"""One Prefect task per shard, which calls a cached task per stage."""

import logging
import threading
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.context import TaskRunContext
from prefect.runtime import flow_run

from desra_core.detection.class_weights import Weights
from desra_core.errors import ImageError, UsageError, printable
from desra_core.evaluation.table import counted
from desra_core.files import fingerprint
from desra_core.planning.doubts import FirstPairs
from desra_core.planning.plan import Plan, assess
from desra_core.settings import CorpusSettings, Machine
from desra_core.stages import CleanFunction, Stage, StageJob, failure, run_stage
from desra_core.workspace import Workspace
from desra_core.workspace.manifest import ImageRef
from desra_core.workspace.products import PRODUCTS, Record, Target, gather_shard, read_shard, stages_for, to_table
from tasks.dask_map import Dask, Resources, device_of
from tasks.logs import record
from tasks.metrics import RunMetrics
from tasks.progress import RunProgress

Counts = dict[str, int]


class StageSpec(NamedTuple):
    """A stage of a run, as `desra_core.stages.run_stage` takes it, and the resources that each call needs."""

    name: str  # of its product
    function: Stage
    job: StageJob
    resources: Resources


class Run:
    """The parts that the shards of a run share, in the driver.

    A plain class, like `Shard`: Prefect looks into every dataclass and list that a task gets.
    """

    def __init__(
        self,
        workspace: Workspace,
        plan: Plan,
        stages: list[StageSpec],
        dask: Dask,
        progress: RunProgress,
        metrics: RunMetrics,
    ) -> None:
        self.workspace = workspace
        self.plan = plan
        self.stages = stages
        self.dask = dask
        self.progress = progress
        self.metrics = metrics
        self.refusal: UsageError | None = None  # why no more images are computed
        self._pairs = FirstPairs(workspace, stages[0].job.settings, plan.target, plan.ids)
        self._lock = threading.Lock()

    def judge(self, records: Sequence[Record] = ()) -> None:
        """Add compared images to the first pairs of the run; once there are enough, judge these, and warn of doubts.

        Where to go on would be in vain, ``refusal`` says why.

        Args:
            records: Records of images that have been through the stage that compares the results.
        """
        with self._lock:
            try:
                doubts = self._pairs.add(records)
            except UsageError as error:
                self.refusal = error
                return
        for line in map(printable, doubts):
            get_run_logger().warning("%s", line)
            self.progress.warn(line)


class Shard:
    """The images of a shard that lack products, and their records so far.

    The plan and the records that workers return say which products exist. The workspace is not read again, since its
    lock keeps other runs out. ``content`` lists the ids of all images of the shard, finished images too. ``work``
    lists the images for the current stage, each with its record.
    """

    def __init__(self, run: Run, number: int) -> None:
        self.number = number
        self._target = run.plan.target
        self._rows, self._held = run.plan.pending_rows(number)
        self._ids = self._rows["id"].to_pylist()
        self._indices: dict[str, list[int]] = {}
        for index, image_id in enumerate(self._ids):
            self._indices.setdefault(image_id, []).append(index)
        self.images = {image.id: image for image in run.plan.image_refs(number)}
        self.records = {key: record for key, record in read_shard(run.workspace, number).items() if key in self.images}
        self.work: list[tuple[ImageRef, Record]] = []
        self.failed: set[str] = set()
        self.content = sorted(set(run.plan.rows(number)["id"].to_pylist()))

    def pending(self, product: str) -> list[tuple[ImageRef, Record]]:
        """List the images that still lack a product, each with its record."""
        work = assess(self._rows, to_table(self.records.values()), self._target, self._held)
        ids = dict.fromkeys(self._ids[index] for index in np.flatnonzero(work.lacking[product]))
        return [(self.images[key], self.record_of(key)) for key in ids if key not in self.failed]

    def record_of(self, image_id: str) -> Record:
        """Return the record of an image, or an empty one."""
        return self.records.get(image_id, Record(image_id))

    def update(self, record: Record, stage: str) -> None:
        """Replace the record of an image that has been through a stage, in which it may have failed."""
        self.records[record.id] = record
        if record.failed:
            self.failed.add(record.id)
        arrays = next((product.arrays for product in PRODUCTS if product.name == stage), ())
        for array in arrays:
            self._held.arrays[array][self._indices[record.id]] = True


def explicit_key(_: TaskRunContext, parameters: dict[str, Any]) -> str:
    """Return the cache key that is an argument of the task."""
    return str(parameters["cache_key"])


@task(cache_key_fn=explicit_key, persist_result=True, result_serializer="json")
def stage_of_shard(cache_key: str, stage: int, shard: Shard, run: Run) -> Counts:  # noqa: ARG001
    """Run one stage on the images of a shard that need it, ``shard.work``.

    The cache key hashes the stage, its settings and the content of the images. `process_shard` refreshes Prefect's
    cache if the workspace lacks the product of any image.
    """
    spec = run.stages[stage]
    work, failed_before = shard.work, len(shard.failed)
    stages_left = len(run.stages) - stage
    logger = get_run_logger()
    # A worker that was lost may still be at an image that another has taken through this stage and later ones.
    with run.workspace.fenced() as workspace:
        function = partial(run_stage, spec.function, workspace=workspace, job=spec.job)
        for image, result in run.dask.map(spec.name, function, spec.resources, work):
            error: ImageError | None
            if isinstance(result, ImageError):  # a transient error, after Dask's retries
                record, error = failure(image, shard.record_of(image.id), spec.name, run.plan.target, result), result
                seconds = 0.0
            else:
                record, error = result, result.error if result.failed else None
                seconds = record.seconds[spec.name]
            shard.update(record, spec.name)
            if spec.job.key == run.plan.target.similarity_key:  # the stage that compares the results
                run.judge([record])
            if run.refusal:
                break
            run.metrics.count(
                spec.name, seconds, names=len(image.names), failed=error is not None, last=stages_left == 1
            )
            logger.debug("shard %05d, image %s: %s", shard.number, image.id, error or "done")
            if error:
                run.progress.failed(error, len(image.names), stages_left)
            else:
                run.progress.passed(len(image.names), finished=len(image.names) if stages_left == 1 else 0)
    return {"images": len(work), "failed": len(shard.failed) - failed_before}


@task(task_run_name="shard-{number:05d}", cache_policy=NO_CACHE)
def process_shard(number: int, run: Run) -> Counts:
    """Take a shard through all stages, then gather its records; keep the products that exist."""
    shard = Shard(run, number)
    for index, spec in enumerate(run.stages):
        if run.refusal:
            break
        shard.work = shard.pending(spec.name)
        passed = shard.images.keys() - shard.failed - {image.id for image, _ in shard.work}
        run.progress.passed(sum(len(shard.images[key].names) for key in passed))
        stage_of_shard.with_options(
            name=spec.name, task_run_name=f"{spec.name}-{number:05d}", refresh_cache=bool(shard.work)
        )(fingerprint(spec.name, spec.job.key, shard.content), index, shard, run)
    gather_shard(run.workspace, number, shard.records.values())  # a lost worker may have journaled an older record
    counts = {"images": len(shard.images), "failed": len(shard.failed)}
    line = f"{counted(counts['images'], 'image')}, {counts['failed']} failed"
    get_run_logger().info("shard %05d: %s", number, line)
    record(logging.INFO, line, run=flow_run.name, shard=f"{number:05d}")
    return counts


def stages_of(
    settings: CorpusSettings,
    target: Target,
    weights: Weights,
    machine: Machine,
    dask: Dask,
    on_clean: CleanFunction | None = None,
) -> list[StageSpec]:
    """Make the stages that compute the products of a run, and load their networks on a worker to try them.

    ``on_clean`` is as of `StageJob`.

    Raises:
        UsageError: A model or the segmenter cannot be loaded, or there is no GPU for ``--device cuda``
            (`AbsentError`). Raised here once, instead of as a failure of every image.
    """
    device = device_of(machine, dask) if target.runs_networks else "cpu"
    stages = []
    for product in stages_for(target):
        module = import_module(f"desra_core.stages.{product.name}")
        key = product.key(target) or ""
        job = StageJob(settings, target, weights, key, device, machine.tile, dask.threads, dask.max_pixels, on_clean)
        resources: Resources = {"GPU": 1} if product.gpu and device == "cuda" else {}
        if product.gpu:
            function, *arguments = module.network(job)
            dask.call(function, *arguments, resources=resources)
        stages.append(StageSpec(product.name, getattr(module, f"{product.name}_stage"), job, resources))
    return stages
