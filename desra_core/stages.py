"""One small function per stage and image: what Dask runs.

A stage takes an image, its outcome so far, the workspace and the stage's own settings, commits its files and returns
the new outcome. It may be run again at any time, by another process too, and then leaves the same files.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from desra_core.arrays import drop_arrays, read_array, write_array
from desra_core.corpus import File, ImageRef
from desra_core.detection import artifact_mask, find_regions, variance_similarity
from desra_core.detection.segmenters import load_segmenter
from desra_core.detection.semantics import CLASS_COUNT
from desra_core.errors import ImageError, TransientError
from desra_core.imageio import Labels, Photo, decode, decode_labels, digest, encode_mask, read_bytes
from desra_core.outcomes import Outcome, write_journal
from desra_core.settings import min_area_pixels
from desra_core.workspace import Workspace


@dataclass(frozen=True)
class SimilaritySettings:
    """What the similarity stage needs.

    ``threshold``, ``min_area`` and ``min_weight`` (the smallest class weight) bound the mask from above: where even
    that bound is empty the map is not stored, unless ``keep_all``, and the image is never segmented.
    """

    key: str
    window: int
    threshold: float
    min_area: str
    min_weight: float
    keep_all: bool
    tile: int
    threads: int
    max_pixels: int


@dataclass(frozen=True)
class SegmentationSettings:
    """What the segmentation stage needs."""

    key: str
    segmenter: str
    device: str
    max_pixels: int


@dataclass(frozen=True)
class MaskSettings:
    """What the mask stage needs; ``weights`` is ``(150,)`` float64, or None where there are no labels."""

    key: str
    segmentation_key: str
    weighting_key: str
    weights: npt.NDArray[np.float64] | None
    threshold: float
    min_area: str
    keep_all: bool
    max_pixels: int


Stage = Callable[[ImageRef, Outcome, Workspace, Any], Outcome]


def similarity_stage(image: ImageRef, outcome: Outcome, workspace: Workspace, settings: SimilaritySettings) -> Outcome:
    """Compare the pair; store the map where it is needed later (raises `ImageError`)."""
    mse_sr = _photo(image.mse_sr, settings.max_pixels).pixels
    gan_photo = _photo(image.gan_sr, settings.max_pixels)
    gan_sr = gan_photo.pixels
    height, width = gan_sr.shape[:2]
    if mse_sr.shape[:2] != (height, width):
        reason = f"is {width}x{height} but {image.mse_sr.path} is {mse_sr.shape[1]}x{mse_sr.shape[0]}"
        raise ImageError(image.gan_sr.path, reason, "both results of one photo must have the same size")
    if min(height, width) < settings.window:
        reason = f"is {width}x{height}, smaller than the {settings.window} px window"
        raise ImageError(image.gan_sr.path, reason, "remove it, or give a smaller --window")
    similarity = variance_similarity(
        mse_sr, gan_sr, window=settings.window, tile=settings.tile, threads=settings.threads
    )
    min_area = min_area_pixels(settings.min_area, height, width)
    # One class of the smallest weight everywhere; at weight 1 there is nothing to weight.
    one_class = None if settings.min_weight == 1 else np.zeros((height, width), np.uint8)
    suspect = artifact_mask(
        similarity,
        threshold=settings.threshold,
        min_area=min_area,
        labels=one_class,
        weights=np.full(1, settings.min_weight),
        frame=settings.window // 2,
    ).any()
    kept = bool(suspect) or settings.keep_all
    if kept:
        write_array(workspace, image.id, "similarity", similarity, key=settings.key)
    made = Outcome(
        id=image.id,
        height=height,
        width=width,
        icc_profile=gan_photo.has_icc_profile,
        similarity_key=settings.key,
        similarity_kept=kept,
        segmentation_key=outcome.segmentation_key,
        labels_kept=outcome.labels_kept,
        seconds=outcome.seconds,
    )
    if suspect:
        return made
    return replace(
        made,
        proven_weight=settings.min_weight,
        threshold=settings.threshold,
        min_area=min_area,
        artifact_pixels=0,
    )


def segmentation_stage(
    image: ImageRef, outcome: Outcome, workspace: Workspace, settings: SegmentationSettings
) -> Outcome:
    """Label ``gan_sr`` and store the labels (raises `ImageError`)."""
    segmenter = load_segmenter(settings.segmenter, settings.device)
    try:
        labels = segmenter(_photo(image.gan_sr, settings.max_pixels).pixels)
    except ImageError as error:
        raise type(error)(image.gan_sr.path, error.reason, error.remedy) from None
    write_array(workspace, image.id, "labels", labels, key=settings.key)
    return replace(outcome, segmentation_key=settings.key, labels_kept=True)


def mask_stage(image: ImageRef, outcome: Outcome, workspace: Workspace, settings: MaskSettings) -> Outcome:
    """Publish the mask at every name of the image and measure its regions (raises `ImageError`).

    An image without a stored map is one whose mask is known to be empty.
    """
    assert outcome.height is not None
    assert outcome.width is not None
    shape = (outcome.height, outcome.width)
    min_area = min_area_pixels(settings.min_area, *shape)
    labels = _labels(image, outcome, workspace, settings)
    regions: list[dict[str, Any]] = []
    mask = np.zeros(shape, np.bool_)
    if outcome.similarity_kept:
        similarity = read_array(workspace, image.id, "similarity", key=outcome.similarity_key)
        weighting: dict[str, Any] = {
            "threshold": settings.threshold,
            "labels": labels,
            "weights": settings.weights,
        }
        frame = (shape[0] - similarity.shape[0]) // 2
        mask = artifact_mask(similarity, min_area=min_area, frame=frame, **weighting)
        if mask.any():
            regions = [region._asdict() for region in find_regions(mask, similarity, **weighting)]
    encoded = encode_mask(mask)
    for name in image.names:
        workspace.publish(workspace.mask(name), encoded)
    kept = settings.keep_all or bool(regions)
    return replace(
        outcome,
        similarity_kept=kept and outcome.similarity_kept,
        labels_kept=kept and outcome.labels_kept,
        labels_hash=image.labels.hash if image.labels else None,
        weighting_key=settings.weighting_key,
        proven_weight=_proven_weight(outcome, regions, settings),
        threshold=settings.threshold,
        min_area=min_area,
        mask_key=settings.key,
        artifact_pixels=int(mask.sum()),
        regions=regions,
    )


def run_stage(
    stage: Stage, image: ImageRef, outcome: Outcome, workspace: Workspace, settings: Any, mask_key: str
) -> Outcome:
    """Run a stage on an image and journal what became of it.

    A permanent failure is an outcome too: the image's masks go, the record says why, and ``mask_key`` tells under
    which settings. Transient failures are raised, to be tried again.

    Raises
    ------
    TransientError
        Storage failed, or a file changed since the scan.
    """
    name = stage.__name__.removesuffix("_stage")
    started = time.perf_counter()
    try:
        made = stage(image, cleared(outcome), workspace, settings)
    except TransientError:
        raise
    except MemoryError:
        path = image.gan_sr.path
        raise TransientError(
            path, "needs more memory than there is", "raise --memory, or use fewer --workers"
        ) from None
    except ImageError as error:
        for path in map(workspace.mask, image.names):
            path.unlink(missing_ok=True)
        made = failure(image, outcome, name, mask_key, error)
    seconds = outcome.seconds | {name: round(time.perf_counter() - started, 4)}
    made = replace(made, seconds=seconds)
    write_journal(workspace, image.shard, made)
    if made.mask_key and not made.similarity_kept:
        drop_arrays(workspace, image.id)
    return made


def failure(image: ImageRef, outcome: Outcome, stage: str, mask_key: str, error: ImageError) -> Outcome:
    """The outcome of an image whose stage raised."""
    return dataclasses.replace(
        outcome,
        mask_key=None,
        artifact_pixels=None,
        regions=[],
        labels_hash=image.labels.hash if image.labels else None,
        failed_stage=stage,
        failed_key=mask_key,
        subject=error.subject,
        reason=error.reason,
        remedy=error.remedy,
        transient=isinstance(error, TransientError),
    )


def cleared(outcome: Outcome) -> Outcome:
    """The outcome without an earlier failure."""
    return replace(outcome, failed_stage=None, failed_key=None, subject=None, reason=None, remedy=None, transient=False)


def _content(file: File) -> bytes:
    data = read_bytes(file.path)
    if digest(data) != file.hash:
        raise TransientError(file.path, "changed after the run had started", "run again")
    return data


def _photo(file: File, max_pixels: int) -> Photo:
    return decode(_content(file), file.path, max_pixels=max_pixels)


def _labels(image: ImageRef, outcome: Outcome, workspace: Workspace, settings: MaskSettings) -> Labels | None:
    """Labels of the image's size with values below 150; None where none were asked for or none are needed."""
    if settings.segmentation_key != "labels" or image.labels is None:
        if outcome.labels_kept and outcome.segmentation_key == settings.segmentation_key:
            stored: Labels = read_array(workspace, image.id, "labels", key=outcome.segmentation_key)
            return stored
        return None
    path = image.labels.path
    labels = decode_labels(_content(image.labels), path, max_pixels=settings.max_pixels)
    if labels.shape != (outcome.height, outcome.width):
        reason = f"is {labels.shape[1]}x{labels.shape[0]} but its image is {outcome.width}x{outcome.height}"
        raise ImageError(path, reason, "labels must have the size of the GAN result")
    if labels.max() >= CLASS_COUNT:
        raise ImageError(path, f"holds the label {labels.max()}", "labels are ADE20K indices 0..149")
    return labels


def _proven_weight(outcome: Outcome, regions: list[dict[str, Any]], settings: MaskSettings) -> float | None:
    if regions:
        return None
    if outcome.similarity_kept:
        return 1.0 if settings.weights is None else None
    return outcome.proven_weight
