"""The tasks of a benchmark, the gate, a calibration, a delivery and a verification: image by image, then publish."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import asdict, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from desra_core.benchmarking import AnyBenchmark
from desra_core.benchmarking.benchmark import judge_image
from desra_core.calibration.counting import Counting, count_stored
from desra_core.calibration.summary import weight_sections
from desra_core.calibration.weights import CalibratedWeights
from desra_core.delivery.picture import deliver_image
from desra_core.delivery.plan import Deliveries, Pictures
from desra_core.detection.detectors import detector_files
from desra_core.errors import ImageError
from desra_core.evaluation.table import counted, document_as_markdown
from desra_core.files import read_document
from desra_core.gate.comparison import Comparison, decide_and_publish
from desra_core.gate.criteria import Verdict
from desra_core.gate.judge import enlarge_stage, judge_stage
from desra_core.gate.model_registry import promote
from desra_core.housekeeping.verify import Checked, Damage, Verification, verify_image
from desra_core.images.codec import most_pixels
from desra_core.networks.checkpoints import BICUBIC
from desra_core.networks.segmentation import load_segmenter, segmenter_files
from desra_core.planning.plan import target_of
from desra_core.report import write_report
from desra_core.report.finetuning import verdict_markdown
from desra_core.report.pages import PublishedBenchmark, publish_results, write_calibration
from desra_core.settings import Machine
from desra_core.stages import StageJob
from desra_core.workspace import Workspace
from desra_core.workspace.manifest import ImageRef
from tasks.dask_cluster import gpus_wanted, open_dask
from tasks.dask_map import Dask, ImageFunction, Resources, device_of
from tasks.logs import say
from tasks.progress import RunProgress
from tasks.run_end import show_outcome, show_overview
from tasks.shards import explicit_key

# The histograms of this many images are written together: a killed run loses at most these and those on workers.
_AT_A_TIME = 50


class Steps(NamedTuple):
    """What workers call with the two parts of an entry of the work. Functions and results must be small and picklable.

    With networks on a GPU, ``on_gpu`` is called first, with a share of a GPU, and then ``function`` without one, so
    that the GPU goes on to other images while CPUs are busy with this one. Else ``function`` alone is called.
    """

    function: ImageFunction
    on_gpu: ImageFunction | None = None


def each_image(
    name: str,
    prepare: Callable[[Dask, str], Steps],
    rounds: Iterable[tuple[str, Sequence[tuple[ImageRef, Any]]]],
    images: Sequence[ImageRef],
    machine: Machine,
    *,
    networks: bool,
    openvino: bool = False,
    scale: int = 1,
    folder: Path,
    models: Sequence[Path] = (),
) -> Iterator[tuple[ImageRef, Any]]:
    """Run a function on images, on all workers, round by round, and show the progress.

    Args:
        name: The work in a word, shown to people.
        prepare: Gets the cluster and the device of networks, ``cpu`` or ``cuda``; returns what workers do.
        rounds: For each round a line about it, or nothing, and the images, each with something small for the function;
            an image may come several times. A round is asked for when the one before has ended.
        images: The images of all rounds.
        machine: Where and how wide to compute.
        networks: Whether the function runs networks.
        openvino: Whether these run by OpenVINO.
        scale: The factor by which networks enlarge photos.
        folder: The folder that the function writes to.
        models: The files of networks and detectors that the function reads.

    Yields:
        Each image with its result or its `ImageError`, in the order of completion.
    """
    gpus = gpus_wanted(networks, machine)
    files = {image.lr.path if scale > 1 and image.lr else image.path for image in images}
    with open_dask(
        machine,
        folder=folder,
        networks=networks,
        openvino=openvino,
        gpus=gpus,
        most_pixels=lambda: most_pixels(files) * scale**2,
        files=lambda: [*models, *(file for image in (*images[:1], *images[-1:]) for file in image.files)],
    ) as dask:
        device = device_of(machine, dask) if networks else "cpu"
        steps = prepare(dask, device)
        for line, work in rounds:
            if line:
                say(line)
            yield from _one_round(name, steps, work, dask, device)


def _one_round(
    name: str, steps: Steps, work: Sequence[tuple[ImageRef, Any]], dask: Dask, device: str
) -> Iterator[tuple[ImageRef, Any]]:
    calls = Counter(image.id for image, _ in work)
    most_calls = max(calls.values(), default=1)
    calls_left, failed = calls.copy(), set[str]()
    gpu: Resources = {"GPU": 1} if device == "cuda" else {}
    if gpu and steps.on_gpu:
        results = _in_two_steps(name, steps.on_gpu, steps.function, gpu, work, dask)
    else:
        results = dask.map(name, steps.function, gpu, work)
    with RunProgress(name, len(calls), stages=most_calls) as progress:
        for image, result in results:
            calls_left[image.id] -= 1
            is_last = not calls_left[image.id]
            if isinstance(result, ImageError) and image.id not in failed:
                failed.add(image.id)
                progress.failed(result, 1, 0)
            # A call counts as a stage. An image with fewer calls than others passes several stages with its last call.
            count = 1 + most_calls - calls[image.id] if is_last else 1
            progress.passed(count, finished=int(is_last and image.id not in failed))
            progress.show()
            yield image, result


def _in_two_steps(
    name: str,
    on_gpu: ImageFunction,
    function: ImageFunction,
    gpu: Resources,
    work: Sequence[tuple[ImageRef, Any]],
    dask: Dask,
) -> Iterator[tuple[ImageRef, Any]]:
    """Call ``on_gpu`` and then ``function`` on every image; yield as `Dask.map`.

    While one batch of images is at the second step, the next batch is at the first. What the first step stores for the
    second takes no more space than two batches need.
    """
    batches = [work[start : start + 2 * dask.workers] for start in range(0, len(work), 2 * dask.workers)]
    context = copy_context()
    pool = ThreadPoolExecutor(1)

    def begin(batch: Sequence[tuple[ImageRef, Any]]) -> Future[list[tuple[ImageRef, Any]]]:
        return pool.submit(context.run, lambda: list(dask.map(f"{name}-networks", on_gpu, gpu, batch)))

    try:
        coming = [begin(batch) for batch in batches[:1]]
        for batch, following in zip_longest(batches, batches[1:]):
            failures = {image.id: result for image, result in coming.pop().result() if isinstance(result, ImageError)}
            coming += [begin(following)] if following else []
            yield from ((image, failures[image.id]) for image, _ in batch if image.id in failures)
            yield from dask.map(name, function, {}, [entry for entry in batch if entry[0].id not in failures])
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@task(task_run_name="detectors", cache_policy=NO_CACHE)
def run_detectors(benchmark: AnyBenchmark, machine: Machine) -> None:
    """Run the detectors on the images that lack results, if there are any."""
    if not (work := benchmark.missing()):
        return

    def judging(dask: Dask, device: str) -> Steps:
        if benchmark.runs_networks:
            gpu: Resources = {"GPU": 1} if device == "cuda" else {}
            dask.call(load_segmenter, benchmark.settings.segmenter, device, resources=gpu)
        shared = replace(benchmark, work=[], failures=[], unjudged=[], lossy=[])  # workers need only the methods
        return Steps(partial(judge_image, benchmark=shared, device=device, max_pixels=dask.max_pixels))

    folder, networks = benchmark.workspace.root, benchmark.runs_networks
    models = segmenter_files(benchmark.settings.segmenter)
    models += [path for method in benchmark.methods if not method.is_stored
               for path in detector_files(method.spec)]  # fmt: skip
    results = each_image(
        "benchmark",
        judging,
        [("", work)],
        [image for image, _ in work],
        machine,
        networks=networks,
        folder=folder,
        models=models,
    )
    for _ in results:
        pass  # workers store the results


@task(task_run_name="tables", cache_policy=NO_CACHE)
def publish_benchmark(benchmark: AnyBenchmark) -> PublishedBenchmark:
    """Write the tables and the page; show the tables in the UI."""
    published = publish_results(benchmark)
    create_markdown_artifact(published.markdown, key="benchmark", description="Scores of the detectors.")
    return published


@task(task_run_name="judge", cache_key_fn=explicit_key, persist_result=True, result_serializer="json")
def judge_images(cache_key: str, comparison: Comparison, machine: Machine) -> int:  # noqa: ARG001
    """Judge the candidates on held-out images in rounds, as `desra_core.gate.rounds` says, as far as it is not done.

    The caller refreshes Prefect's cache if the workspace lacks a result, as `process_shard` does for its stages.

    Returns:
        The number of images that could not be judged.
    """
    workspace = Workspace(comparison.settings.workspace)
    _, weights = target_of(comparison.corpus)

    def judging(dask: Dask, device: str) -> Steps:
        candidates = counted(len(comparison.candidates) - 1, "candidate")  # and the control
        facts = [f"{candidates}, judged on {counted(len(comparison.images), 'held-out image')}"]
        title = f"**desra compare** of `{comparison.before}` and its finetuned models"
        show_overview(title, facts, dask)
        compared = replace(comparison, marked=[], clean=[])  # workers need only the models
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
        return Steps(
            partial(judge_stage, workspace=workspace, models=compared, job=replace(job, device="cpu")),
            on_gpu=partial(enlarge_stage, workspace=workspace, models=compared, job=job),
        )

    given = [comparison.before, comparison.mse_model, comparison.lpips, *(each.model for each in comparison.candidates)]
    models = [Path(model) for model in given if model and model != BICUBIC]
    rounds = ((f"judging {each.title}", comparison.by_networks(each.missing)) for each in comparison.rounds())
    results = each_image(
        "judge",
        judging,
        rounds,
        comparison.images,
        machine,
        networks=True,
        openvino=comparison.engine.startswith("openvino"),
        scale=comparison.scale,
        folder=workspace.root,
        models=models + segmenter_files(comparison.corpus.segmenter),
    )
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
            failures += progress.ended(result)
            if len(results) == _AT_A_TIME:
                counting.add(number, results)
                results = {}
    finally:
        counting.add(number, results)
    return failures


@task(task_run_name="deliver-{number:05d}", cache_policy=NO_CACHE)
def deliver_shard(number: int, deliveries: Deliveries, job: StageJob, dask: Dask, progress: RunProgress) -> int:
    """Write the pictures that a shard lacks; return the number of images that could not be delivered."""
    failures = 0
    gpu: Resources = {"GPU": 1} if job.device == "cuda" else {}
    with deliveries.workspace.fenced() as workspace:
        function = partial(deliver_image, workspace=workspace, job=job, delivering=deliveries.settings)
        for _, result in dask.map("deliver", function, gpu, deliveries.work(number)):
            failures += progress.ended(result)
    deliveries.gather(number)
    return failures


@task(task_run_name="pictures", cache_policy=NO_CACHE)
def publish_deliveries(deliveries: Deliveries) -> Pictures:
    """Write the table of the pictures to the output folder, and count them."""
    return deliveries.publish()


@task(task_run_name="verify-{number:05d}", cache_policy=NO_CACHE)
def verify_shard(
    number: int, verification: Verification, dask: Dask, progress: RunProgress
) -> tuple[Checked, dict[str, dict[str, str]]]:
    """Check the pictures and arrays of the images of a shard.

    Returns:
        What was found; and by name of an image, the checksums of pictures that an older desra wrote.
    """
    found, untold = Checked(0, 0), {}
    function = partial(verify_image, workspace=verification.workspace)
    for image, result in dask.map("verify", function, {}, verification.work(number)):
        if isinstance(result, ImageError):
            found += Checked(0, 0, (Damage(Path(result.subject), result.reason, result.remedy),))
        else:
            found += result
            if result.untold:
                untold[image.names[0]] = dict(result.untold)
        progress.passed(1, finished=1)
        progress.show()
    return found, untold


@task(task_run_name="weights", cache_policy=NO_CACHE)
def publish_weights(calibrated: CalibratedWeights, output: Path) -> None:
    """Write the weights, their page and their figure, and show them in the UI."""
    write_calibration(calibrated, output)
    text = document_as_markdown(f"Class weights in {output.name}", weight_sections(calibrated))
    create_markdown_artifact(text, key="class-weights", description="Class weights, and thresholds to go with them.")
