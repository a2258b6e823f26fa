"""The tasks of a benchmark: run all detectors on every image, publish the tables and the page."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from desra_core.benchmarking.benchmark import StageSettings, judge_image
from desra_core.errors import AbsentError
from desra_core.networks.segmentation import load_segmenter
from desra_core.report.benchmark_page import AnyBenchmark, PublishedBenchmark, publish_results
from desra_core.settings import Machine
from desra_core.workspace.manifest import ImageRef
from tasks.dask_map import Dask
from tasks.images import each_image


@task(task_run_name="detectors", cache_policy=NO_CACHE)
def run_detectors(benchmark: AnyBenchmark, machine: Machine) -> None:
    """Run the detectors on the images that lack results."""

    def judging(dask: Dask, device: str) -> Callable[[ImageRef, Any], Any]:
        if benchmark.runs_networks:
            if machine.device == "cuda" and device == "cpu":
                raise AbsentError("--device", "cuda, but no worker declares a GPU", "start one with --resources GPU=1")
            gpu: dict[str, float] = {"GPU": 1} if device == "cuda" else {}
            dask.call(load_segmenter, benchmark.settings.segmenter, device, resources=gpu)
        settings = StageSettings(benchmark.methods, benchmark.weights, benchmark.settings, device, dask.max_pixels)
        return partial(judge_image, workspace=benchmark.workspace, settings=settings)

    folder, networks = benchmark.workspace.root, benchmark.runs_networks
    for _ in each_image("benchmark", judging, benchmark.missing(), machine, networks=networks, folder=folder):
        pass  # workers store the results


@task(task_run_name="tables", cache_policy=NO_CACHE)
def publish_tables(benchmark: AnyBenchmark) -> PublishedBenchmark:
    """Write the tables and the page; show the tables in the UI."""
    published = publish_results(benchmark)
    create_markdown_artifact(published.markdown, key="benchmark", description="Scores of the detectors.")
    return published
