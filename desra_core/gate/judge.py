"""Judge how a candidate model changes the result of a held-out image: its artifacts, and everything else.

Each candidate is compared with the old model's result. A candidate is a finetuned model, or the control: the old
model's result with noise of 2 grey levels, which shows how many regions the measure itself adds.

A region of the old model's mask is *gone* when less than half of its pixels lie in the candidate's mask. A region of
the candidate's mask was *added* when less than half of its pixels lie in the old model's mask. The mask that a region
is compared with keeps regions from a quarter of the minimal area on: with the whole minimal area, noise would delete
and add regions near the minimal area or the threshold.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter

from desra_core.detection import Region, artifact_mask, find_regions, variance_similarity
from desra_core.detection.class_weights import class_name
from desra_core.detection.mask import MIN_AREA, THRESHOLD, WINDOW, Components
from desra_core.detection.similarity import TILE
from desra_core.errors import ImageError, UsageError
from desra_core.evaluation import fidelity
from desra_core.evaluation.fidelity import load_lpips, lpips_distance
from desra_core.gate.criteria import Judgement, NewRegion, OldRegion
from desra_core.images.codec import Labels, Mask, Pixels, bgr8
from desra_core.images.parts import encode_webp, fitted, row_strips, window_around
from desra_core.networks.checkpoints import Model, Precision, load_model, load_reference
from desra_core.networks.segmentation import load_segmenter, segment
from desra_core.networks.super_resolution import super_resolve
from desra_core.settings import min_area_pixels
from desra_core.stages import StageJob, read_label_file, read_photo
from desra_core.workspace import Workspace
from desra_core.workspace.arrays import find_array
from desra_core.workspace.manifest import ImageRef

if TYPE_CHECKING:
    from torch import nn

CONTROL = "control"

_PICTURED_REGIONS = 2  # regions of an image that the report shows
_NOISE = 2  # grey levels of 255
_LOOSENESS = 4  # the low-area mask has the minimal area divided by this

_CODEC = TypeAdapter(Judgement)
_kept_lpips = lru_cache(maxsize=1)(load_lpips)


class Candidate(NamedTuple):
    """A model to be judged: one kind of weights of a checkpoint. The control has no model."""

    name: str
    model: Path | None  # a file with these weights alone
    key: str  # of its judgements: they hold for one old model and one set of detection settings
    source: Path | None = None  # the checkpoint
    weights: str = ""  # the kind


@dataclass(frozen=True)
class ComparedModels:
    """The models of a comparison."""

    candidates: tuple[Candidate, ...]
    before: Path  # the old model
    before_key: str | None  # the cache key of its stored results; None where stored results are of another model
    mse_model: str | None  # a checkpoint or the word bicubic; None where MSE results are files
    mse_sr_key: str | None  # as ``before_key``, of the MSE model
    precision: Precision
    lpips: Path | None  # a file of weights


class Artifacts(NamedTuple):
    """The artifacts of a result ``(H, W, C)``; ``low_area_mask`` is the mask at a quarter of the minimal area."""

    pixels: Pixels
    mask: Mask
    low_area_mask: Mask
    regions: list[Region]


def judge_stage(
    image: ImageRef, missing: tuple[str, ...], workspace: Workspace, models: ComparedModels, job: StageJob
) -> None:
    """Judge the candidates that ``missing`` names on an image, and publish each judgement.

    Results of the MSE and the old model are read from the workspace where they are stored, else inferred.

    Raises:
        ImageError: The photo cannot be read, upscaled or judged.
    """
    assert image.lr is not None
    scale = load_model(models.before, job.device, models.precision).scale
    lr = read_photo(image.lr, job.max_pixels // scale**2).pixels

    def result_of(load: Callable[[str, Precision], Model], role: str = "", key: str | None = None) -> Pixels:
        stored: Pixels | None = find_array(workspace, image.id, role, key=key) if key else None
        if stored is not None:
            return stored
        model = load(job.device, models.precision)
        try:
            return super_resolve(model, lr).pixels
        except UsageError as error:
            reason = f"cannot be upscaled: {error.subject} {error.reason}"
            raise ImageError(image.path, reason, error.remedy) from None

    if image.mse_sr is not None:
        mse_sr = read_photo(image.mse_sr, job.max_pixels).pixels
    else:
        assert models.mse_model is not None
        mse_sr = result_of(partial(load_reference, models.mse_model, scale), "mse_sr", models.mse_sr_key)
    old = result_of(partial(load_model, models.before), "gan_sr", models.before_key)
    try:
        before = _artifacts(image, mse_sr, old, job)
        for candidate in models.candidates:
            if candidate.name not in missing:
                continue
            if candidate.model is None:
                after = noisy(before.pixels, image.id)
                pictures = {"lr": lr, "mse_sr": mse_sr, "before": before.pixels}
            else:
                after = result_of(partial(load_model, candidate.model))
                pictures = {"after": after}
            lpips = _kept_lpips(models.lpips) if models.lpips else None
            judgement = judge(image.names[0], image.id, candidate.name, before,
                              _artifacts(image, mse_sr, after, job), lpips=lpips)  # fmt: skip
            for kind, rank, crop in _crops(judgement, pictures, before.mask.shape):
                workspace.publish(workspace.judged_crop(candidate.key, image.id, kind, rank), crop)
            document = _CODEC.dump_python(judgement) | {"labels": image.labels and image.labels.hash}
            workspace.publish(workspace.judgement(candidate.key, image.id), json.dumps(document).encode())
    except ValueError as error:
        raise ImageError(image.path, f"cannot be judged: {error}", "remove it, or mine again") from None


def read_judgement(workspace: Workspace, candidate: Candidate, image: ImageRef) -> Judgement | None:
    """Read the judgement of a candidate on an image; None where it is missing or was made with other labels."""
    try:
        document = json.loads(workspace.judgement(candidate.key, image.id).read_bytes())
        if document.pop("labels") != (image.labels and image.labels.hash):
            return None
        return _CODEC.validate_python(document | {"candidate": candidate.name, "image": image.names[0]})
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def worst_regions(judgement: Judgement) -> list[OldRegion]:
    """List the old model's regions that the report shows, the most severe first, without severities below 0."""
    severe = [region for region in judgement.regions if region.severity >= 0]
    return sorted(severe, key=lambda region: -region.severity)[:_PICTURED_REGIONS]


def _crops(
    judgement: Judgement, pictures: dict[str, Pixels], shape: tuple[int, int]
) -> Iterator[tuple[str, int, bytes]]:
    """Yield kind, rank and WebP of the worst regions, cut from results of ``shape`` or from the LR photo."""
    for rank, region in enumerate(worst_regions(judgement)):
        window = window_around(region.x, region.y, region.width, region.height, shape)
        for kind, pixels in pictures.items():
            scale = shape[0] // pixels.shape[0]
            rows, columns = (np.arange(part.start, part.stop) // scale for part in window.slices)
            yield kind, rank, encode_webp(fitted(bgr8(pixels[rows[:, np.newaxis], columns])[:, :, ::-1]))


def _artifacts(image: ImageRef, mse_sr: Pixels, result: Pixels, job: StageJob) -> Artifacts:
    """Find the artifacts of a result of a photo with the settings of the workspace (raises `ImageError`)."""
    if result.shape != mse_sr.shape:
        sizes = " and ".join(f"{pixels.shape[1]}x{pixels.shape[0]}" for pixels in (result, mse_sr))
        remedy = "give models of one scale, and the photos that the results were made from"
        raise ImageError(image.path, f"becomes {sizes} px by the models that are compared", remedy)
    corpus, weights = job.settings, job.class_weights
    labels: Labels | None = None
    if weights is not None and image.labels is not None:
        labels = read_label_file(image.labels, result.shape[:2], job.max_pixels)
    elif weights is not None and corpus.segmenter.startswith("mmseg:"):
        labels = segment(load_segmenter(corpus.segmenter, job.device), result, image.path)
    return detect(
        mse_sr,
        result,
        labels,
        threshold=corpus.threshold,
        min_area=min_area_pixels(corpus.min_area, *result.shape[:2]),
        window=corpus.window,
        weights=weights,
        tile=job.tile,
        threads=job.threads,
    )


def detect(
    mse_sr: Pixels,
    result: Pixels,
    labels: Labels | None = None,
    *,
    threshold: float = THRESHOLD,
    min_area: int = MIN_AREA,
    window: int = WINDOW,
    weights: npt.NDArray[np.float64] | None = None,
    tile: int = TILE,
    threads: int = 1,
) -> Artifacts:
    """Find the artifacts of a GAN model's result, as `desra detect` does.

    Args:
        mse_sr, result: ``(H, W, 1 or 3)`` uint8 or uint16, of one size.
        labels: ``(H, W)`` uint8 ADE20K class of each pixel, or None.
        threshold, min_area, weights: As for `desra_core.detection.artifact_mask`.
        window, tile, threads: As for `desra_core.detection.variance_similarity`.

    Raises:
        ValueError: The images differ in size, or are smaller than the window.
    """
    similarity = variance_similarity(mse_sr, result, window=window, tile=tile, threads=threads)
    weighting: dict[str, Any] = {"threshold": threshold, "labels": labels, "weights": weights}
    strict, low_area = (
        artifact_mask(similarity, min_area=area, frame=window // 2, **weighting)
        for area in (min_area, min_area // _LOOSENESS)
    )
    return Artifacts(result, strict, low_area, find_regions(strict, similarity, **weighting))


def judge(
    image: str, image_id: str, candidate: str, before: Artifacts, after: Artifacts, *, lpips: nn.Module | None = None
) -> Judgement:
    """Compare a candidate's result of an image with the old model's result.

    Args:
        image, image_id, candidate: Names for the judgement.
        before, after: The artifacts of the old model's and of the candidate's result, found with the same settings.
        lpips: The network of `desra_core.evaluation.fidelity.load_lpips`; without it LPIPS is not measured.

    Raises:
        ValueError: The results differ in shape, or are smaller than 11 px a side.
    """
    outside = ~before.mask

    def described(region: Region) -> NewRegion:
        return NewRegion(*region[:5], class_name(region.dominant_class), region.severity)

    kept = Components(before.mask).covered(after.low_area_mask).tolist()
    known = Components(after.mask).covered(before.low_area_mask).tolist()
    return Judgement(
        image=image,
        id=image_id,
        candidate=candidate,
        pixels=outside.size,
        regions=[
            OldRegion(**vars(described(region)), gone=not is_kept)
            for region, is_kept in zip(before.regions, kept, strict=True)
        ],
        added=[described(region) for region, is_known in zip(after.regions, known, strict=True) if not is_known],
        artifact_pixels_before=int(np.count_nonzero(before.mask)),
        artifact_pixels_after=int(np.count_nonzero(after.mask)),
        outside_pixels=int(np.count_nonzero(outside)),
        squared_error=fidelity.squared_error(before.pixels, after.pixels, outside),
        ssim=fidelity.structural_similarity(before.pixels, after.pixels, outside),
        gradient_similarity=fidelity.gradient_similarity(before.pixels, after.pixels, outside),
        lpips=None if lpips is None else lpips_distance(lpips, before.pixels, after.pixels),
        sharpness_before=fidelity.sharpness(before.pixels),
        sharpness_after=fidelity.sharpness(after.pixels),
    )


def noisy(pixels: Pixels, seed_text: str) -> Pixels:
    """Add the noise of the control to the old model's result.

    Every sample changes by -2 to 2 whole grey levels of 255, each as likely, and is clipped.

    Args:
        pixels: ``(H, W, C)`` uint8 or uint16.
        seed_text: The same text gives the same noise.
    """
    seed = int.from_bytes(hashlib.blake2b(seed_text.encode(), digest_size=16).digest())
    noise = np.random.default_rng(seed).integers(-_NOISE, _NOISE, pixels.shape, np.int8, endpoint=True)
    white = np.iinfo(pixels.dtype).max
    changed = np.empty_like(pixels)
    for rows in row_strips(pixels.shape):
        samples = pixels[rows].astype(np.int32) + noise[rows].astype(np.int32) * (white // 255)
        changed[rows] = np.clip(samples, 0, white)
    return changed
