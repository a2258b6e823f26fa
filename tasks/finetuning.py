"""The tasks of a finetune: start it, freeze its images, train on one worker, show the losses."""

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import cast

from prefect import get_run_logger, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.runtime import deployment

from desra_core.errors import LockedError, may_pass
from desra_core.evaluation.table import counted
from desra_core.files import locked, read_document, read_json
from desra_core.settings import Machine
from desra_core.settings.models import FinetuneTrigger
from desra_core.training.plan import (
    FinetunePlan,
    begin,
    check_networks,
    most_samples,
    settle_precision,
    usual_precision,
)
from desra_core.training.pools import count_new
from desra_core.training.twin import TwinPlan, TwinVerdict, freeze_photos, publish_twin
from desra_core.workspace import Workspace
from tasks.dask_cluster import gpus_wanted, open_dask, release_served, visible_gpus
from tasks.dask_map import Dask, device_of
from tasks.logs import say, say_each
from tasks.progress import RunProgress
from tasks.run_end import show_outcome, show_overview

_RETRY_SECONDS = [10.0, 60.0]
_SHOWN_LOSSES = 20
_POLL_SECONDS = 1.0
_PHOTOS_PER_LINE = 50


@task(task_run_name="images", cache_policy=NO_CACHE)
def freeze_images(plan: FinetunePlan) -> int:
    """Check the networks, and write the images of a new run to its folder; return the number of images of the run.

    Print a warning before any training if no held-out image can judge the result.
    """
    if plan.warning:
        _announce(f"warning: {plan.warning}")
    scale = check_networks(plan.gan_model, plan.training)
    if plan.begun:
        return len(read_json(plan.run.document)["images"])
    images, errors = begin(plan, scale)
    say_each("left out", errors)
    if images < plan.training.images:
        why = "all there are" if len(plan.samples) < most_samples(plan.training) else "the others cannot be used"
        say(f"{counted(images, 'image')} to train on, fewer than the {plan.training.images} asked for: {why}")
    return images


@task(task_run_name="photos", cache_policy=NO_CACHE)
def freeze_sharp_photos(plan: TwinPlan) -> None:
    """Check the GAN model, and write crops of the photos to the folder of a new run."""
    scale = check_networks(plan.gan_model, plan.training)
    if plan.run.document.exists() and (plan.run.data / "held_out.npy").exists():
        return

    def show(read: int, of: int) -> None:
        if read and read % _PHOTOS_PER_LINE == 0:
            say(f"{read} of {of} photos read")

    photos, errors = freeze_photos(plan, scale, show)
    say_each("left out", errors)
    held_out = sum(photo["pool"] == "held_out" for photo in read_json(plan.run.document)["photos"])
    say(f"{counted(photos, 'photo')} to train on, {held_out} held out")


@task(task_run_name="twin", cache_policy=NO_CACHE)
def judge_and_publish_twin(plan: TwinPlan) -> TwinVerdict:
    """Judge the twin on held-out photos, write it, and show the scores in the UI."""
    verdict = publish_twin(plan)
    rows = [
        {"model": model, "PSNR": round(verdict.psnr[model], 2), "SSIM": round(verdict.ssim[model], 4)}
        for model in verdict.psnr
    ]
    create_table_artifact(rows, key="twin", description=f"On held-out photos; mean D {verdict.similarity:.3f}.")
    return verdict


@task(
    task_run_name="train",
    cache_policy=NO_CACHE,
    retries=len(_RETRY_SECONDS),
    retry_delay_seconds=_RETRY_SECONDS,
    # Retry after a lost worker or a full disk, but not for a model that cannot be used or a loss that is no number.
    retry_condition_fn=lambda _, __, state: may_pass(state.result(raise_on_failure=False)),
)
def train(plan: FinetunePlan | TwinPlan, machine: Machine) -> int:
    """Train on one worker, which has all cores or a GPU; return the number of iterations done, of all attempts.

    A retry goes on from the last saved state.
    """
    from desra_core.training.loop import finetune  # late, because it loads PyTorch

    with _open_worker(machine, plan) as dask:
        device = device_of(machine, dask)
        where = "a GPU" if device == "cuda" else "the CPU"
        precision = settle_precision(plan.run, plan.training, device)
        if plan.training.amp == "auto" and precision != usual_precision(device):
            _announce(f"this training was begun in {precision} and goes on in it, on {where} too")
        if device == "cpu" and plan.training.preset != "cpu":
            _announce("on the CPU this may take hours; a training with --preset cpu takes minutes")
        facts = [f"{plan.training.iterations} iterations on {where}, in {precision}"]
        verb = "twin" if isinstance(plan, TwinPlan) else "finetune"
        show_overview(f"**desra {verb}** of `{plan.gan_model}` into `{plan.run.root}`", facts, dask)
        with RunProgress("train", plan.training.iterations, 1, unit="iterations") as progress:
            iterations: int = dask.follow(
                finetune, plan.run, plan.gan_model, plan.training, device, dask.threads,
                plan.twinning if isinstance(plan, TwinPlan) else None,
                resources={"GPU": dask.gpu_slots} if device == "cuda" else {},
                on_second=partial(_show_progress, progress, plan),
            )  # fmt: skip
            _show_progress(progress, plan)
    return iterations


def _announce(line: str) -> None:
    say(line)
    get_run_logger().info(line)


@contextlib.contextmanager
def _open_worker(machine: Machine, plan: FinetunePlan | TwinPlan) -> Iterator[Dask]:
    """Start a worker with a GPU, or with all cores, that no other finetune uses; or connect to a scheduler."""
    if machine.elsewhere:
        perceptual = plan.training.perceptual
        weights = None if perceptual in ("vgg19", "off") else Path(perceptual)
        files = [file for file in (plan.gan_model, plan.training.discriminator, weights) if file]
        with open_dask(machine, folder=plan.run.root, networks=True, files=lambda: files) as dask:
            yield dask
        return
    gpus = visible_gpus()[: gpus_wanted(True, machine)]
    with training_slot(gpus or ["cpu"], _announce) as device:
        release_served()
        one = machine.model_copy(update={"workers": 1})
        with open_dask(one, networks=True, gpus=len(gpus[:1]), device=device if gpus else None, alone=True) as dask:
            yield dask


@contextlib.contextmanager
def training_slot(devices: Sequence[str], on_wait: Callable[[str], None]) -> Iterator[str]:
    """Hold one of several devices for a finetune; wait while other finetunes, of any user, are on all of them.

    The system frees the device of a process that dies.

    Args:
        devices: Names of GPUs, or ``cpu``.
        on_wait: Called once, with a line for people, when all devices are taken.

    Yields:
        The device.
    """
    announced = False
    while True:
        for device in devices:
            # All users share this file. It is never deleted, or one process might lock the old file, another a new one.
            path = Path(tempfile.gettempdir()) / f"desra-finetune-{device.replace('/', '-')}.lock"
            with contextlib.suppress(FileExistsError):
                path.touch(exist_ok=False)
                path.chmod(0o644)  # independent of the umask
            with locked(path, read_only=True) as other:
                if other is None:
                    yield device
                    return
        if not announced:
            taken = ", ".join(devices)
            on_wait(f"another training is on {taken}, whose process holds {path}: waiting until it has ended")
            announced = True
        time.sleep(_POLL_SECONDS)


@task(task_run_name="losses", cache_policy=NO_CACHE)
def show_losses(plan: FinetunePlan, images: int, iterations: int, workspace: Workspace) -> str:
    """Show in the UI the losses and how the run ended; return a line about the end."""
    rows = plan.run.read_losses()
    step = max(1, len(rows) // _SHOWN_LOSSES)
    shown = [{name: round(value, 5) for name, value in row.items()} for row in rows[::step]]
    line = f"{counted(iterations, 'iteration')} on {counted(images, 'image')}"
    create_table_artifact(shown, key="losses", description=f"Mean losses of {line}.")
    line += ", stopped early" if iterations < plan.training.iterations else ""
    show_outcome(workspace, line, [f"models: `{plan.run.root / 'models'}`"])
    return line


def _show_progress(progress: RunProgress, plan: FinetunePlan | TwinPlan) -> None:
    """Show the iterations, or the warm-up steps before them, from the progress file of the run."""
    state = read_document(plan.run.progress)
    if state.get("warmed", 0) < state.get("warmup", 0):
        progress.preparing("discriminator warmed up", state["warmed"], state["warmup"])
    else:
        losses = state.get("losses", {})
        progress.reached(state.get("iteration", 0), f"pixel loss {losses['pixel']:.4f}" if "pixel" in losses else "")
    progress.show()


@task(task_run_name="start-finetune", cache_policy=NO_CACHE)
def start_finetune(workspace: Workspace, trigger: FinetuneTrigger) -> int:
    """Start the finetune deployment of the same name as this run's, if enough images have gathered and none waits.

    Returns:
        The number of images with artifacts that have gathered since the last finetune; 0 if another process has locked
        the workspace meanwhile.
    """
    logger = get_run_logger()
    try:
        with workspace.locked() as workspace:
            gathered = count_new(workspace, trigger.group_by)
    except LockedError as error:  # by a command that began after the mining
        logger.info("%s; the next run counts the images that have gathered", error)
        return 0
    have = "has" if gathered == 1 else "have"
    since = f"{counted(gathered, 'image')} with artifacts {have} gathered since the last finetune"
    if gathered < trigger.artifacts:
        logger.info("%s; the next begins at %d", since, trigger.artifacts)
    elif not deployment.id:
        logger.info("%s, but this run has no deployment whose finetune could be started", since)
    elif _is_waiting(deployment.name):
        logger.info("%s; a finetune is waiting already", since)
    else:
        # This run ends now, so the finetune is not a run within this run.
        name = f"finetune/{deployment.name}"
        run = cast(FlowRun, run_deployment(name, timeout=0, as_subflow=False, tags=["gathered"]))
        logger.info("%s: started %s", since, run.name)
    return gathered


def _is_waiting(name: str) -> bool:
    """Check whether a run of the finetune deployment of that name is scheduled."""
    query = {
        "flows": {"name": {"any_": ["finetune"]}},
        "deployments": {"name": {"any_": [name]}},
        "flow_runs": {"state": {"type": {"any_": ["SCHEDULED", "PENDING"]}}},
    }
    with get_client(sync_client=True) as client:
        return bool(client.request("POST", "/flow_runs/count", json=query).json())
