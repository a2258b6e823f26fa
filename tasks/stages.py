"""The stages of a run, with the settings of each and where they are computed."""

from __future__ import annotations

from importlib import import_module

from desra_core.detection.class_weights import Weights
from desra_core.errors import AbsentError, UsageError
from desra_core.settings import CorpusSettings, Machine
from desra_core.stages import StageJob
from desra_core.workspace.products import Target, stages_for
from tasks.dask_map import Dask
from tasks.shards import StageSpec


def gpus_wanted(networks: bool, machine: Machine) -> int:
    """Return the number of GPUs that a run uses: all of this machine, if it runs networks and may use them.

    Raises:
        UsageError: ``--device cuda`` on a machine where PyTorch sees no GPU.
    """
    if not networks or machine.device == "cpu" or machine.scheduler:
        return 0
    import torch

    count = torch.cuda.device_count()
    if machine.device == "cuda" and not count:
        raise UsageError("--device", "cuda, but PyTorch sees no GPU here", "use --device auto or cpu")
    return count


def stages_of(
    settings: CorpusSettings, target: Target, weights: Weights, machine: Machine, dask: Dask
) -> list[StageSpec]:
    """Make the stages of a run from the declarations of its products, and try their networks on a worker.

    Raises:
        UsageError: A model or the segmenter cannot be loaded, or there is no GPU where one was asked for
            (`AbsentError`). Raised here once, instead of as a failure of every image.
    """
    if machine.device == "cuda" and not dask.gpus and target.runs_networks:
        raise AbsentError("--device", "cuda, but no worker declares a GPU", "start one with --resources GPU=1")
    device = "cuda" if dask.gpus and machine.device != "cpu" else "cpu"
    stages = []
    for product in stages_for(target):
        module = import_module(f"desra_core.stages.{product.name}")
        key = product.key(target) or ""
        job = StageJob(settings, target, weights, key, device, machine.tile, dask.threads, dask.max_pixels)
        resources: dict[str, float] = {"GPU": 1} if product.gpu and device == "cuda" else {}
        if product.gpu:
            function, *arguments = module.network(job)
            dask.call(function, *arguments, resources=resources)
        stages.append(StageSpec(product.name, getattr(module, f"{product.name}_stage"), job, resources))
    return stages
