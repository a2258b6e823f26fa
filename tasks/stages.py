"""The stages of a run, with the settings of each and where they are computed."""

from __future__ import annotations

from desra_core.detection.class_weights import Weights
from desra_core.errors import AbsentError, UsageError
from desra_core.networks.checkpoints import load_pair
from desra_core.networks.segmentation import load_segmenter
from desra_core.planning.keys import Target
from desra_core.settings import CorpusSettings, Machine, Mining, detector_of
from desra_core.stages import (
    MaskSettings,
    SegmentationSettings,
    SimilaritySettings,
    SuperResolutionSettings,
    mask_stage,
    segmentation_stage,
    similarity_stage,
    super_resolution_stage,
)
from tasks.dask_map import Dask
from tasks.shards import StageSpec


def gpus_wanted(networks: bool, machine: Machine) -> int:
    """How many GPUs of this machine a run uses: all there are, if it runs networks and may use them.

    Raises
    ------
    UsageError
        ``--device cuda`` on a machine where PyTorch sees no GPU.
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
    """Results where they are to be inferred, similarity, labels where they are to be computed, mask and regions.

    Raises
    ------
    UsageError
        A model or the segmenter cannot be loaded, or there is no GPU where one was asked for (`AbsentError`); better
        told once and now than by every image.
    """
    if machine.device == "cuda" and not dask.gpus and target.runs_networks:
        raise AbsentError("--device", "cuda, but no worker declares a GPU", "start one with --resources GPU=1")
    device = "cuda" if dask.gpus and machine.device != "cpu" else "cpu"
    gpu: dict[str, float] = {"GPU": 1} if device == "cuda" else {}
    detector = detector_of(settings)
    similarity = SimilaritySettings(
        key=target.similarity_key,
        window=settings.window,
        detector=detector,
        min_area=target.min_area,
        min_weight=target.min_weight,
        keep_all=target.keep != "artifacts",
        tile=machine.tile,
        threads=dask.threads,
        max_pixels=dask.max_pixels,
        segmentation_key=target.segmentation_key if target.labels_first else None,
    )
    stages = [StageSpec("similarity", "similarity", similarity_stage, similarity, target.similarity_key, {})]
    if isinstance(settings, Mining):
        super_resolution = _super_resolution(settings, target, similarity, device)
        models = (super_resolution.mse_model, super_resolution.gan_model)
        dask.call(load_pair, *models, device, super_resolution.precision, resources=gpu)
        stages = [
            StageSpec(
                "super_resolution", "similarity", super_resolution_stage, super_resolution, target.similarity_key, gpu
            )
        ]
    if target.segments:
        segmentation = SegmentationSettings(
            key=target.segmentation_key,
            gan_sr_key=target.gan_sr_key,
            segmenter=settings.segmenter,
            device=device,
            max_pixels=dask.max_pixels,
        )
        dask.call(load_segmenter, segmentation.segmenter, device, resources=gpu)
        spec = StageSpec("segmentation", "segmentation", segmentation_stage, segmentation, target.segmentation_key, gpu)
        stages.insert(0 if target.labels_first else 1, spec)
    mask = MaskSettings(
        key=target.mask_key,
        segmentation_key=target.segmentation_key,
        weighting_key=target.weighting_key,
        weights=weights.values if target.segmentation_key != "none" and detector.weighs_classes else None,
        threshold=target.threshold,
        min_area=target.min_area,
        keep=settings.keep,
        max_pixels=dask.max_pixels,
        mse_sr_key=target.mse_sr_key,
        gan_sr_key=target.gan_sr_key,
        keep_mse=target.keep_mse,
    )
    return [*stages, StageSpec("mask", "mask", mask_stage, mask, target.mask_key, {})]


def _super_resolution(
    mining: Mining, target: Target, similarity: SimilaritySettings, device: str
) -> SuperResolutionSettings:
    assert target.mse_sr_key is not None
    assert target.gan_sr_key is not None
    return SuperResolutionSettings(
        mse_sr_key=target.mse_sr_key,
        gan_sr_key=target.gan_sr_key,
        mse_model=mining.mse_model,
        gan_model=mining.gan_model,
        precision=mining.precision,
        device=device,
        segmentation_key=target.segmentation_key if target.segments and target.keep != "artifacts" else None,
        keep_mse=target.keep_mse,
        keep_pair=target.keep == "all",
        similarity=similarity,
    )
