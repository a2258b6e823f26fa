"""The stages of detection, with the settings of each."""

from __future__ import annotations

from desra_core.detection.segmenters import load_segmenter
from desra_core.detection.semantics import Weights
from desra_core.errors import UsageError
from desra_core.settings import Detection, Machine
from desra_core.stages import (
    MaskSettings,
    SegmentationSettings,
    SimilaritySettings,
    mask_stage,
    segmentation_stage,
    similarity_stage,
)
from desra_core.target import Target
from tasks.fanout import Dask
from tasks.shards import StageSpec


def gpus_wanted(target: Target, machine: Machine) -> int:
    """How many GPUs of this machine a run uses: all there are, if it computes labels and may use them.

    Raises
    ------
    UsageError
        ``--device cuda`` on a machine where PyTorch sees no GPU.
    """
    if not target.segments or machine.device == "cpu" or machine.scheduler:
        return 0
    import torch

    count = torch.cuda.device_count()
    if machine.device == "cuda" and not count:
        raise UsageError("--device", "cuda, but PyTorch sees no GPU here", "use --device auto or cpu")
    return count


def detection_stages(
    detection: Detection, target: Target, weights: Weights, machine: Machine, dask: Dask
) -> list[StageSpec]:
    """Similarity, labels where they are to be computed, then mask and regions.

    Raises
    ------
    UsageError
        The segmenter cannot be loaded; better told once and now than by every image.
    """
    keep_all = target.keep != "artifacts"
    similarity = SimilaritySettings(
        key=target.similarity_key,
        window=detection.window,
        threshold=target.threshold,
        min_area=target.min_area,
        min_weight=target.min_weight,
        keep_all=keep_all,
        tile=machine.tile,
        threads=dask.threads,
        max_pixels=dask.max_pixels,
    )
    segmentation = SegmentationSettings(
        key=target.segmentation_key,
        segmenter=detection.segmenter,
        device="cuda" if dask.gpus else "cpu",
        max_pixels=dask.max_pixels,
    )
    mask = MaskSettings(
        key=target.mask_key,
        segmentation_key=target.segmentation_key,
        weighting_key=target.weighting_key,
        weights=None if target.segmentation_key == "none" else weights.values,
        threshold=target.threshold,
        min_area=target.min_area,
        keep_all=keep_all,
        max_pixels=dask.max_pixels,
    )
    stages = [StageSpec("similarity", similarity_stage, similarity, target.similarity_key, {})]
    if target.segments:
        gpu: dict[str, float] = {"GPU": 1} if dask.gpus else {}
        dask.call(load_segmenter, segmentation.segmenter, segmentation.device, resources=gpu)
        stages.append(StageSpec("segmentation", segmentation_stage, segmentation, target.segmentation_key, gpu))
    stages.append(StageSpec("mask", mask_stage, mask, target.mask_key, {}))
    return stages
