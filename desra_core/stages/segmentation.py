"""Segmentation: label every pixel of the GAN result with its class."""

from dataclasses import replace
from typing import Any

from desra_core.networks.segmentation import load_segmenter, segment
from desra_core.stages import StageJob, read_sr
from desra_core.workspace import Workspace
from desra_core.workspace.arrays import write_array
from desra_core.workspace.manifest import ImageRef
from desra_core.workspace.products import Record


def network(job: StageJob) -> tuple[Any, ...]:
    """Return the call that loads the network: a function and its arguments."""
    return load_segmenter, job.settings.segmenter, job.device


def segmentation_stage(image: ImageRef, record: Record, workspace: Workspace, job: StageJob) -> Record:
    """Label ``gan_sr`` and store the labels (raises `ImageError`)."""
    segmenter = load_segmenter(job.settings.segmenter, job.device)
    gan_sr = read_sr("gan_sr", image, workspace, job)
    labels = segment(segmenter, gan_sr, image.path)
    write_array(workspace, image.id, "labels", labels, key=job.key)
    return replace(record, segmentation_key=job.key, labels_kept=True)
