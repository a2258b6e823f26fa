"""The tasks of a calibration: count the images of a shard, publish the weights."""

from functools import partial
from pathlib import Path

import pyarrow as pa
from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from desra_core.calibration.counting import Counting, count_stored
from desra_core.calibration.weights import CalibratedWeights
from desra_core.errors import ImageError
from desra_core.report.calibration_page import calibration_markdown, write_calibration
from tasks.dask_map import Dask, ImageJob
from tasks.progress import RunProgress

# Histograms of so many images are written at a time: a killed run loses at most these and those on the workers.
_AT_A_TIME = 50


@task(task_run_name="histogram-{number:05d}", cache_policy=NO_CACHE)
def count_shard(number: int, counting: Counting, dask: Dask, progress: RunProgress) -> int:
    """Count the images of a shard that lack a histogram, and add the histograms to the file of the shard.

    Returns:
        The number of images that could not be counted.
    """
    work = counting.work(counting.shard(number))
    tokens = {image.id: token for token, (image, _) in work.items()}
    function = partial(count_stored, workspace=counting.workspace, target=counting.target, max_pixels=dask.max_pixels)
    results: dict[str, pa.Table | ImageError] = {}
    failures = 0
    try:
        for image, result in dask.map(ImageJob("histogram", function, {}), list(work.values())):
            results[tokens[image.id]] = result
            if isinstance(result, ImageError):
                failures += 1
                progress.failed(result, 1, 1)
            else:
                progress.passed(1, last=True)
            progress.show()
            if len(results) == _AT_A_TIME:
                counting.add(number, results)
                results = {}
    finally:
        counting.add(number, results)
    return failures


@task(task_run_name="weights", cache_policy=NO_CACHE)
def publish_weights(calibrated: CalibratedWeights, output: Path) -> None:
    """Write the weights, their page and their figure, and show them in the UI."""
    write_calibration(calibrated, output)
    text = calibration_markdown(calibrated)
    create_markdown_artifact(text, key="class-weights", description="Class weights, and thresholds to go with them.")
