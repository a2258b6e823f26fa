"""The tasks of a calibration: count the images of a shard, tell what comes of it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from desra_core.calibration.calibrated_weights import CalibratedWeights
from desra_core.calibration.counting import Counting
from desra_core.calibration.stage import histogram_stage
from desra_core.errors import ImageError
from desra_core.report.calibration_page import calibration_markdown, write_calibration
from tasks.dask_map import Dask, Job
from tasks.progress import RunProgress


class CountingRun:
    """What the shards of a count share. Lives in the driver; never leaves it."""

    def __init__(self, counting: Counting, dask: Dask, progress: RunProgress) -> None:
        self.counting = counting
        self.dask = dask
        self.progress = progress


@task(task_run_name="histogram-{number:05d}", cache_policy=NO_CACHE)
def count_shard(number: int, run: CountingRun) -> int:
    """Count the images of a shard that are not counted, and gather them.

    Returns
    -------
    The number of images that could not be counted.
    """
    shard = run.counting.shard(number)
    work = run.counting.work(shard)
    tokens = {image.id: token for token, (image, _) in work.items()}
    function = partial(
        histogram_stage, workspace=run.counting.workspace, settings=run.counting.stage_settings(run.dask.max_pixels)
    )
    failures: list[tuple[str, ImageError]] = []
    for image, result in run.dask.map(Job("histogram", function, {}), list(work.values())):
        if isinstance(result, ImageError):
            failures.append((tokens[image.id], result))
            run.progress.failed(result, 1, 1)
        else:
            run.progress.passed(1, last=True)
        run.progress.show()
    run.counting.gather(shard, failures)
    return len(failures)


@task(task_run_name="weights", cache_policy=NO_CACHE)
def publish_weights(calibrated: CalibratedWeights, output: Path) -> None:
    """Write the weights, their page and their figure, and show them in the UI."""
    write_calibration(calibrated, output)
    told = calibration_markdown(calibrated)
    create_markdown_artifact(told, key="class-weights", description="Class weights, and thresholds to go with them.")
