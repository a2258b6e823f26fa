"""Similarity: compare a pair of results, and prove most images clean before anything else is computed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from desra_core.detection.detectors import AppliedDetector, DetectorInputs, Scores
from desra_core.detection.mask import score_mask
from desra_core.errors import ImageError
from desra_core.images.codec import Pixels
from desra_core.settings import detector_of, min_area_pixels
from desra_core.stages.run import StageJob
from desra_core.stages.sources import read_labels, read_photo
from desra_core.workspace import Workspace
from desra_core.workspace.arrays import write_array
from desra_core.workspace.manifest import ImageRef
from desra_core.workspace.records import Record


@dataclass(frozen=True)
class SimilaritySettings:
    """Settings of the similarity stage.

    The threshold of the ``detector``, ``min_area`` and ``min_weight`` (the smallest class weight) bound the mask from
    above: where even that bound is empty the map is not stored, unless ``keep_all``, and the image is never segmented.
    ``segmentation_key`` is that of the labels, if the detector needs them.
    """

    key: str
    detector: AppliedDetector
    window: int
    min_area: str
    min_weight: float
    keep_all: bool
    tile: int
    threads: int
    max_pixels: int
    segmentation_key: str | None = None


def settings_of(job: StageJob) -> SimilaritySettings:
    """Choose the settings of the stage for a run."""
    target = job.target
    return SimilaritySettings(
        key=target.similarity_key,
        detector=detector_of(job.settings),
        window=job.settings.window,
        min_area=target.min_area,
        min_weight=target.min_weight,
        keep_all=target.keep != "artifacts",
        tile=job.tile,
        threads=job.threads,
        max_pixels=job.max_pixels,
        segmentation_key=target.segmentation_key if target.labels_first else None,
    )


def similarity_stage(image: ImageRef, record: Record, workspace: Workspace, settings: SimilaritySettings) -> Record:
    """Compare the pair; store the map where it is needed later (raises `ImageError`)."""
    assert image.mse_sr is not None
    assert image.gan_sr is not None
    mse_sr = read_photo(image.mse_sr, settings.max_pixels).pixels
    photo = read_photo(image.gan_sr, settings.max_pixels)
    gan_sr = photo.pixels
    if mse_sr.shape[:2] != gan_sr.shape[:2]:
        height, width = gan_sr.shape[:2]
        reason = f"is {width}x{height} but {image.mse_sr.path} is {mse_sr.shape[1]}x{mse_sr.shape[0]}"
        raise ImageError(image.gan_sr.path, reason, "both results of one photo must have the same size")
    record = replace(record, icc_profile=photo.has_icc_profile, further_pages=photo.further_pages)
    return compare(image, mse_sr, gan_sr, record, workspace, settings)


def compare(
    image: ImageRef,
    mse_sr: Pixels,
    gan_sr: Pixels,
    record: Record,
    workspace: Workspace,
    settings: SimilaritySettings,
) -> Record:
    """Score a pair of results ``(H, W, C)``, see whether it can be clean, and store minus the scores where needed.

    Raises:
        ImageError: It is too small, lacks an input of the detector, or makes it fail.
    """
    height, width = gan_sr.shape[:2]
    lr = labels = None
    if "lr" in settings.detector.inputs and image.lr:
        lr = read_photo(image.lr, settings.max_pixels).pixels
    if "labels" in settings.detector.inputs:
        sized = replace(record, height=height, width=width)
        labels = read_labels(image, sized, workspace, settings.segmentation_key, settings.max_pixels)
    inputs = DetectorInputs(mse_sr, gan_sr, lr, labels)
    scores = settings.detector.score(image.path, inputs, settings.window, settings.tile, settings.threads)
    suspect = is_suspect(scores, settings, height, width)
    kept = suspect or settings.keep_all
    if kept:
        write_array(workspace, image.id, "similarity", np.negative(scores, out=scores), key=settings.key)
    made = Record(
        id=image.id,
        height=height,
        width=width,
        icc_profile=record.icc_profile,
        further_pages=record.further_pages,
        tile=record.tile,
        similarity_key=settings.key,
        similarity_kept=kept,
        segmentation_key=record.segmentation_key,
        labels_kept=record.labels_kept,
        seconds=record.seconds,
        further=record.further,
    )
    return made if suspect else proven_clean(made, settings)


def is_suspect(scores: Scores, settings: SimilaritySettings, height: int, width: int) -> bool:
    """Check whether the mask of an image may have pixels, whatever its labels."""
    # One class of the smallest weight everywhere; at weight 1 there is nothing to weight.
    one_class = None if settings.min_weight == 1 else np.zeros((height, width), np.uint8)
    bound = score_mask(
        scores,
        (height, width),
        threshold=np.float64(settings.detector.score_threshold),
        min_area=min_area_pixels(settings.min_area, height, width),
        labels=one_class,
        weights=np.full(1, settings.min_weight),
    )
    return bool(bound.any())


def proven_clean(record: Record, settings: SimilaritySettings) -> Record:
    """Return the record of an image that is not suspect."""
    assert record.height is not None
    assert record.width is not None
    return replace(
        record,
        proven_weight=settings.min_weight,
        threshold=-settings.detector.score_threshold,
        min_area=min_area_pixels(settings.min_area, record.height, record.width),
        mask_key=None,
        artifact_pixels=0,
        regions=[],
    )
