"""Runs without servers and clusters: real planning, stages, shards, tables and networks, in the tests' own process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow.parquet as pq

from desra_core.calibration.counting import Counting, count_stored
from desra_core.errors import ImageError
from desra_core.gate.comparison import Comparison
from desra_core.gate.judge import judge_stage
from desra_core.planning.plan import make_plan, prepare, publish_tables, target_of
from desra_core.settings import CorpusSettings, Machine
from desra_core.settings.models import Finetuning
from desra_core.stages import StageJob, failure, run_stage
from desra_core.training.loop import finetune
from desra_core.training.plan import RunFolder, begin, check_networks, plan_finetune
from desra_core.workspace import Workspace
from desra_core.workspace.products import gather_shard
from tasks.shards import Run, Shard, stages_of
from tests.conftest import in_one_thread


class InProcess:
    """Stands where a cluster does."""

    threads, max_pixels, gpus = 1, 2**26, 0

    def call(self, function: Callable[..., Any], *arguments: Any, resources: dict[str, float]) -> None:
        function(*arguments)


def process(settings: CorpusSettings) -> Workspace:
    """Mine or detect; all there is to do is done."""
    workspace = Workspace(settings.workspace)
    workspace.create()
    with workspace.locked() as held, in_one_thread():
        _, plan, weights, _ = prepare(settings)
        stages = stages_of(settings, plan.target, weights, Machine(), InProcess())  # type: ignore[arg-type]
        run = Run(held, plan, stages, None, None, None)  # type: ignore[arg-type]
        for number in plan.shards:
            shard = Shard(run, number)
            for spec in stages:
                for image, record in shard.pending(spec.name):
                    try:
                        made = run_stage(spec.function, image, record, held, spec.job)
                    except ImageError as error:
                        made = failure(image, record, spec.name, plan.target, error)
                    shard.update(made, spec.name)
            gather_shard(held, number, shard.records.values())
        publish_tables(held, plan.target)
        manifest = pq.read_table(workspace.manifest)
        assert make_plan(workspace, manifest, plan.target, limit=settings.limit).pending == 0
    return workspace


def train(settings: Finetuning, *, threads: int = 1) -> RunFolder:
    """Finetune, from the images to the last model."""
    with Workspace(settings.workspace).locked(), in_one_thread():
        plan = plan_finetune(settings)
        scale = check_networks(plan.gan_model, plan.training)
        if not plan.begun:
            begin(plan, scale)
        finetune(plan.run, plan.gan_model, plan.training, "cpu", threads)
    return plan.run


def judge_all(comparison: Comparison) -> int:
    """Judge what lacks judgement, in rounds; returns how many images that were."""
    job, judged = judge_job(comparison), set()
    with in_one_thread():
        for each in comparison.rounds():
            for image, names in comparison.by_networks(each.missing):
                judge_stage(image, names, Workspace(comparison.settings.workspace), comparison, job)
                judged.add(image.id)
    return len(judged)


def judge_job(comparison: Comparison) -> StageJob:
    """Make the inputs of the judge stage that are the same for all images."""
    _, weights = target_of(comparison.corpus)
    return StageJob(comparison.corpus, comparison.target, weights, comparison.key, "cpu", 256, 1, 2**26)


def count_all(counting: Counting) -> list[str]:
    """Count what is not counted; returns the names of the images that were looked at."""
    names: list[str] = []
    for number in counting.missing():
        names += count_shard(counting, number)
    return names


def count_shard(counting: Counting, number: int, limit: int | None = None) -> list[str]:
    """Count the images of a shard, or as many of them as a killed run has come to; returns their names."""
    work = list(counting.work(counting.shard(number)).items())[:limit]
    results = {}
    for token, (image, job) in work:
        try:
            results[token] = count_stored(image, job, counting.workspace, counting.target, 2**26)
        except ImageError as error:
            results[token] = error
    counting.add(number, results)
    return [image.names[0] for _, (image, _) in work]
