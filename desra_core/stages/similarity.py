"""Similarity: compare a pair of results, and prove most images clean before anything else is computed."""

import contextlib
from dataclasses import replace

import numpy as np

from desra_core.detection.agreement import measure_agreement
from desra_core.detection.detectors import DetectorInputs, Scores
from desra_core.errors import ImageError
from desra_core.images.codec import Pixels
from desra_core.stages import StageJob, read_labels, read_photo, read_result, told_by
from desra_core.workspace import Workspace
from desra_core.workspace.arrays import write_array
from desra_core.workspace.manifest import ImageRef
from desra_core.workspace.products import Record


def similarity_stage(image: ImageRef, record: Record, workspace: Workspace, job: StageJob) -> Record:
    """Read the pair of results and compare it; store the similarity where it is needed later (raises `ImageError`)."""
    assert image.mse_sr is not None
    assert image.gan_sr is not None
    mse_sr = read_result(image.mse_sr, job.max_pixels).pixels
    result = read_result(image.gan_sr, job.max_pixels)
    gan_sr = result.pixels
    if mse_sr.shape[:2] != gan_sr.shape[:2]:
        height, width = gan_sr.shape[:2]
        reason = f"is {width}x{height} but {image.mse_sr.path} is {mse_sr.shape[1]}x{mse_sr.shape[0]}"
        raise ImageError(image.gan_sr.path, reason, "both results of one photo must have the same size")
    record = told_by(result, record)
    return compare(image, mse_sr, gan_sr, record, workspace, job)


def compare(
    image: ImageRef,
    mse_sr: Pixels,
    gan_sr: Pixels,
    record: Record,
    workspace: Workspace,
    job: StageJob,
    photo: Pixels | None = None,
) -> Record:
    """Score a pair ``(H, W, C)``, check whether it is clean, and store the similarity (minus the scores) where needed.

    The photo, ``(h, w, C)``, is read again where it is needed and not given.

    Raises:
        ImageError: The image is too small, lacks an input of the detector, or makes the detector fail.
    """
    height, width = gan_sr.shape[:2]
    detector, target = job.detector, job.target
    lr, labels = photo, None
    if lr is None and image.lr:
        # Beside results in files, the photo only makes the agreement clearer, unless the detector needs it.
        is_needed = "lr" in detector.inputs or target.super_resolves
        with contextlib.nullcontext() if is_needed else contextlib.suppress(ImageError):
            lr = read_photo(image.lr, job.max_pixels).pixels
    agreement = measure_agreement(mse_sr, gan_sr, lr)
    if "labels" in detector.inputs:
        sized = replace(record, height=height, width=width)
        labels = read_labels(image, sized, workspace, target.segmentation_key, job.max_pixels)
    inputs = DetectorInputs(mse_sr, gan_sr, lr if "lr" in detector.inputs else None, labels)
    scores = detector.score(image.path, inputs, job.settings.window, job.tile, job.threads)
    suspect = is_suspect(scores, job, (height, width))
    kept = suspect or target.keep != "artifacts"
    if kept:
        write_array(workspace, image.id, "similarity", np.negative(scores, out=scores), key=target.similarity_key)
    made = Record(
        id=image.id,
        height=height,
        width=width,
        icc_profile=record.icc_profile,
        colour_profile=record.colour_profile,
        further_pages=record.further_pages,
        tile=record.tile,
        similarity_key=target.similarity_key,
        similarity_kept=kept,
        segmentation_key=record.segmentation_key,
        labels_kept=record.labels_kept,
        seconds=record.seconds,
        agreement=agreement and agreement._asdict(),
        further=record.further,
    )
    return made if suspect else proven_clean(made, job)


def is_suspect(scores: Scores, job: StageJob, shape: tuple[int, int]) -> bool:
    """Check whether the mask of an image of ``(H, W)`` could have pixels under any labels."""
    # Compute the largest possible mask: every pixel has class 0 of a table with one class, which has the smallest
    # weight. Weight 1 needs no labels.
    one_class = None if job.target.min_weight == 1 else np.zeros(shape, np.uint8)
    return bool(job.score_mask(scores, shape, one_class, np.full(1, job.target.min_weight)).any())


def proven_clean(record: Record, job: StageJob) -> Record:
    """Return the record of an image that is not suspect."""
    return replace(
        record,
        proven_weight=job.target.min_weight,
        threshold=job.target.threshold,
        min_area=job.min_area(record.shape),
        mask_key=None,
        artifact_pixels=0,
        regions=[],
    )
