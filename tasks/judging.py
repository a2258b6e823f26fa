"""The tasks of a benchmark, of the gate and of a calibration: judge or count image by image, publish, promote."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from desra_core.benchmarking import AnyBenchmark
from desra_core.benchmarking.benchmark import judge_image
from desra_core.calibration.counting import Counting, count_stored
from desra_core.calibration.weights import CalibratedWeights
from desra_core.errors import ImageError
from desra_core.evaluation.table import counted
from desra_core.files import read_document
from desra_core.gate.comparison import Comparison, decide_and_publish
from desra_core.gate.criteria import Verdict
from desra_core.gate.judge import judge_stage
from desra_core.gate.model_registry import promote
from desra_core.images.codec import most_pixels
from desra_core.networks.checkpoints import load_model
from desra_core.networks.segmentation import load_segmenter
from desra_core.planning.plan import target_of
from desra_core.report import write_report
from desra_core.report.finetuning import verdict_markdown
from desra_core.report.pages import PublishedBenchmark, calibration_markdown, publish_results, write_calibration
from desra_core.settings import Machine
from desra_core.stages import StageJob
from desra_core.workspace import Workspace
from desra_core.workspace.manifest import ImageRef
from tasks.dask_cluster import gpus_wanted, open_dask
from tasks.dask_map import Dask, ImageFunction, Resources, device_of
from tasks.progress import RunProgress
from tasks.run_end import show_outcome, show_overview
from tasks.shards import explicit_key

# The histograms of this many images are written together: a killed run loses at most these and those on workers.
_AT_A_TIME = 50


def each_image(
    name: str,
    prepare: Callable[[Dask, str], ImageFunction],
    work: Sequence[tuple[ImageRef, Any]],
    machine: Machine,
    *,
    networks: bool,
    scale: int = 1,
    folder: Path,
) -> Iterator[tuple[ImageRef, Any]]:
    """Run a function on every image, on all workers, and show the progress.

    Args:
        name: The work in a word, shown to people.
        prepare: Gets the cluster and the device of networks, ``cpu`` or ``cuda``; returns the function that workers
            call with the two parts of an entry of ``work``. Function and result must be small and picklable.
        work: The images, each with something small for the function; an image may come several times.
        machine: Where and how wide to compute.
        networks: Whether the function runs networks.
        scale: The factor by which networks enlarge photos.
        folder: The folder that the function writes to.

    Yields:
        Each image with its result or its `ImageError`, in the order of completion.
    """
    gpus = gpus_wanted(networks, machine)
    calls = Counter(image.id for image, _ in work)
    most_calls = max(calls.values(), default=1)
    calls_left, failed = calls.copy(), set[str]()
    files = {image.lr.path if scale > 1 and image.lr else image.path for image, _ in work}
    with (
        open_dask(
            machine, folder=folder, networks=networks, gpus=gpus, most_pixels=lambda: most_pixels(files) * scale**2
        ) as dask,
        RunProgress(name, len(calls), stages=most_calls) as progress,
    ):
        device = device_of(machine, dask) if networks else "cpu"
        gpu: Resources = {"GPU": 1} if device == "cuda" else {}
        function = prepare(dask, device)
        for image, result in dask.map(name, function, gpu, work):
            calls_left[image.id] -= 1
            is_last = not calls_left[image.id]
            if isinstance(result, ImageError) and image.id not in failed:
                failed.add(image.id)
                progress.failed(result, 1, 0)
            # A call counts as a stage. An image with fewer calls than others passes several stages with its last call.
            steps = 1 + most_calls - calls[image.id] if is_last else 1
            progress.passed(steps, finished=int(is_last and image.id not in failed))
            progress.show()
            yield image, result


@task(task_run_name="detectors", cache_policy=NO_CACHE)
def run_detectors(benchmark: AnyBenchmark, machine: Machine) -> None:
    """Run the detectors on the images that lack results, if there are any."""
    if not (work := benchmark.missing()):
        return

    def judging(dask: Dask, device: str) -> ImageFunction:
        if benchmark.runs_networks:
            gpu: Resources = {"GPU": 1} if device == "cuda" else {}
            dask.call(load_segmenter, benchmark.settings.segmenter, device, resources=gpu)
        shared = replace(benchmark, work=[], failures=[], unjudged=[], lossy=[])  # workers need only the methods
        return partial(judge_image, benchmark=shared, device=device, max_pixels=dask.max_pixels)

    folder, networks = benchmark.workspace.root, benchmark.runs_networks
    for _ in each_image("benchmark", judging, work, machine, networks=networks, folder=folder):
        pass  # workers store the results


@task(task_run_name="tables", cache_policy=NO_CACHE)
def publish_benchmark(benchmark: AnyBenchmark) -> PublishedBenchmark:
    """Write the tables and the page; show the tables in the UI."""
    published = publish_results(benchmark)
    create_markdown_artifact(published.markdown, key="benchmark", description="Scores of the detectors.")
    return published


@task(task_run_name="judge", cache_key_fn=explicit_key, persist_result=True, result_serializer="json")
def judge_images(cache_key: str, comparison: Comparison, machine: Machine) -> int:  # noqa: ARG001
    """Judge every candidate on every held-out image that lacks its result.

    The caller refreshes Prefect's cache if the workspace lacks a result, as `process_shard` does for its stages.

    Returns:
        The number of images that could not be judged.
    """
    workspace = Workspace(comparison.settings.workspace)
    _, weights = target_of(comparison.corpus)
    missing = counted(len(comparison.missing()), "image")

    def judging(dask: Dask, device: str) -> ImageFunction:
        candidates = counted(len(comparison.candidates) - 1, "candidate")  # and the control
        facts = [
            f"{candidates}, judged on {counted(len(comparison.images), 'held-out image')}",
            f"{missing} to judge; the others are judged already",
        ]
        title = f"**desra compare** of `{comparison.before}` and its finetuned models"
        show_overview(title, facts, dask)
        models = replace(comparison, images=[])  # workers need only the models
        job = StageJob(
            settings=comparison.corpus,
            target=comparison.target,
            weights=weights,
            key=comparison.key,
            device=device,
            tile=machine.tile,
            threads=dask.threads,
            max_pixels=dask.max_pixels,
        )
        return partial(judge_stage, workspace=workspace, models=models, job=job)

    scale = load_model(comparison.before).scale
    work = comparison.work()
    results = each_image("judge", judging, work, machine, networks=True, scale=scale, folder=workspace.root)
    return len({image.id for image, result in results if isinstance(result, ImageError)})


@task(task_run_name="verdict", cache_policy=NO_CACHE)
def decide_verdict(comparison: Comparison) -> Verdict:
    """Decide by the scores whether a candidate passes the gate; publish the verdict in the workspace and in the UI."""
    verdict = decide_and_publish(comparison)
    text = verdict_markdown(Workspace(comparison.settings.workspace))
    create_markdown_artifact(text, key="verdict", description="Verdict of the gate.")
    return verdict


@task(task_run_name="promote", cache_policy=NO_CACHE)
def promote_best(comparison: Comparison, verdict: Verdict) -> Path:
    """Make the best candidate the workspace's current model, by one rename; return its entry in the registry."""
    best = comparison.best(verdict)
    assert best is not None
    assert best.model is not None
    assert best.source is not None
    record = read_document(best.source.with_suffix(".json")) | {"source": str(best.source), "weights": best.weights}
    scores = [asdict(score) for score in verdict.scores if score.candidate == verdict.best]
    summary = {"best": verdict.best, "scores": scores}
    workspace = Workspace(comparison.settings.workspace)
    return promote(workspace, best.model, parent=comparison.before, record=record, verdict=summary)


@task(task_run_name="report", cache_policy=NO_CACHE)
def publish_report(workspace: Workspace, line: str) -> None:
    """Write the report of the workspace, with the latest verdict, and show in the UI how the run ended."""
    write_report(workspace)
    show_outcome(workspace, line)


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
        for image, result in dask.map("histogram", function, {}, list(work.values())):
            results[tokens[image.id]] = result
            if isinstance(result, ImageError):
                failures += 1
                progress.failed(result, 1, 1)
            else:
                progress.passed(1, finished=1)
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
