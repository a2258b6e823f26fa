"""Histogram: how the similarity of an image is distributed in each class."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq

from desra_core.calibration.histogram import count_image
from desra_core.detection.mask import valid
from desra_core.errors import ImageError
from desra_core.evaluation.mask_files import decode_mask
from desra_core.images.codec import Mask
from desra_core.stages.sources import read_content, read_labels
from desra_core.workspace import Workspace
from desra_core.workspace.arrays import read_array
from desra_core.workspace.manifest import File, ImageRef
from desra_core.workspace.records import Record


@dataclass(frozen=True)
class HistogramSettings:
    """What the histogram stage needs: the keys of stored maps and labels, and the largest image."""

    similarity_key: str
    segmentation_key: str
    max_pixels: int


class Uncounted(NamedTuple):
    """What goes with an image: its record, the masks of what not to count, and the Parquet file to be written."""

    record: Record
    masks: tuple[File, ...]
    path: Path


def histogram_stage(image: ImageRef, about: Uncounted, workspace: Workspace, settings: HistogramSettings) -> None:
    """Count the pixels of an image and publish the histogram.

    Raises
    ------
    ImageError
        A mask has another size or is none.
    TransientError
        A map, the labels or a mask have gone or changed.
    """
    record = about.record
    assert record.height is not None
    assert record.width is not None
    similarity = read_array(workspace, image.id, "similarity", key=settings.similarity_key)
    labels = read_labels(image, record, workspace, settings.segmentation_key, settings.max_pixels)
    if labels is None:
        raise ImageError(image.path, "has no class labels", "run again with --labels or --segmenter")
    frame = (record.height - similarity.shape[0]) // 2
    exclude: Mask | None = None
    for file in about.masks:
        mask = _read_exclusion(file, (record.height, record.width), frame)
        exclude = mask if exclude is None else exclude | mask
    table = count_image(similarity, valid(labels, frame), exclude).to_table()
    sink = io.BytesIO()
    pq.write_table(table, sink)
    workspace.publish(about.path, sink.getvalue())


def _read_exclusion(file: File, shape: tuple[int, int], frame: int) -> Mask:
    """A mask of the image's size or of its valid region's, as the latter."""
    mask = decode_mask(read_content(file), file.path)
    if mask.shape == shape:
        return np.asarray(valid(mask, frame))
    if mask.shape == (shape[0] - 2 * frame, shape[1] - 2 * frame):
        return mask
    reason = f"is {mask.shape[1]}x{mask.shape[0]} but its image is {shape[1]}x{shape[0]}"
    raise ImageError(file.path, reason, f"masks have the size of the image, or lack a frame of {frame} px")
