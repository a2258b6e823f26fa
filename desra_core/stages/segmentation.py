"""Segmentation: the class of every pixel of the GAN result."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from desra_core.errors import ImageError
from desra_core.networks.segmentation import load_segmenter
from desra_core.stages.run import StageJob
from desra_core.stages.sources import read_gan_sr
from desra_core.workspace import Workspace
from desra_core.workspace.arrays import write_array
from desra_core.workspace.manifest import ImageRef
from desra_core.workspace.records import Record


@dataclass(frozen=True)
class SegmentationSettings:
    """Settings of the segmentation stage; ``gan_sr_key`` where the GAN result is no file."""

    key: str
    gan_sr_key: str | None
    segmenter: str
    device: str
    max_pixels: int


def settings_of(job: StageJob) -> SegmentationSettings:
    """Choose the settings of the stage for a run."""
    return SegmentationSettings(
        key=job.key,
        gan_sr_key=job.target.gan_sr_key,
        segmenter=job.settings.segmenter,
        device=job.device,
        max_pixels=job.max_pixels,
    )


def network(settings: SegmentationSettings) -> tuple[Any, ...]:
    """Name the call that loads the network: a function and its arguments."""
    return load_segmenter, settings.segmenter, settings.device


def segmentation_stage(image: ImageRef, record: Record, workspace: Workspace, settings: SegmentationSettings) -> Record:
    """Label ``gan_sr`` and store the labels (raises `ImageError`)."""
    segmenter = load_segmenter(settings.segmenter, settings.device)
    gan_sr = read_gan_sr(image, workspace, settings.gan_sr_key, settings.max_pixels)
    try:
        labels = segmenter(gan_sr)
    except ImageError as error:
        raise type(error)(image.path, error.reason, error.remedy) from None
    write_array(workspace, image.id, "labels", labels, key=settings.key)
    return replace(record, segmentation_key=settings.key, labels_kept=True)
