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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter

from desra_core.detection.class_weights import class_name
from desra_core.detection.mask import (
    MIN_AREA,
    THRESHOLD,
    WINDOW,
    Components,
    Region,
    artifact_mask,
    find_regions,
    valid,
)
from desra_core.detection.similarity import TILE, variance_similarity
from desra_core.errors import ImageError, UsageError
from desra_core.evaluation.fidelity import measure_fidelity
from desra_core.evaluation.mask_files import FRAME
from desra_core.evaluation.metrics import compare_masks
from desra_core.files import as_json, parse_json
from desra_core.gate.criteria import Judgement, NewRegion, OldRegion
from desra_core.images.codec import Labels, Mask, Pixels, bgr8
from desra_core.images.parts import encode_webp, fitted, row_strips, window_around
from desra_core.networks.checkpoints import Engine, Model, load_model, load_reference
from desra_core.networks.perceptual import load_lpips, lpips_distance
from desra_core.networks.segmentation import load_segmenter, segment
from desra_core.networks.super_resolution import super_resolve
from desra_core.planning.plan import result_key, result_keys
from desra_core.settings import min_area_pixels
from desra_core.stages import StageJob, read_label_file, read_photo, read_result
from desra_core.workspace import Workspace
from desra_core.workspace.arrays import drop_array, find_array, write_array
from desra_core.workspace.human_masks import HumanMask
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
    mse_model: str | None  # a checkpoint or the word bicubic; None where MSE results are files
    scale: int  # by how much all of them enlarge
    engine: Engine
    lpips: Path | None  # a file of weights
    human: Mapping[str, HumanMask]  # by image id, the masks that people drew on the old model's results


class Artifacts(NamedTuple):
    """The artifacts of a result ``(H, W, C)``; ``low_area_mask`` is the mask at a quarter of the minimal area."""

    pixels: Pixels
    mask: Mask
    low_area_mask: Mask
    regions: list[Region]


class _Results:
    """The results of one photo by the models of a comparison.

    A result is read where a mining run or this comparison has stored it, else inferred. The results of the old and of
    the MSE model are stored when they were inferred, because the photo may come again in a later round.

    Args:
        image, workspace, models, job: As for `judge_stage`.
        store_all: Store the candidates' results and all labels too, for another worker.
    """

    def __init__(
        self, image: ImageRef, workspace: Workspace, models: ComparedModels, job: StageJob, *, store_all: bool = False
    ) -> None:
        assert image.lr is not None
        self._image, self._workspace, self._models, self._job = image, workspace, models, job
        self._store_all = store_all
        self._place = Workspace(workspace.gate_results)
        self.lr = read_photo(image.lr, job.max_pixels // models.scale**2).pixels

    def mse_sr(self) -> Pixels:
        """Return the result of the MSE model, of a file where MSE results are files."""
        if self._image.mse_sr is not None:
            return read_result(self._image.mse_sr, self._job.max_pixels).pixels
        models = self._models
        assert models.mse_model is not None
        key, _ = result_keys(models.mse_model, models.before, models.engine)
        assert key is not None
        return self._of(key, partial(load_reference, models.mse_model, models.scale), "mse_sr")

    def old(self) -> Pixels:
        """Return the result of the old model."""
        return self._of_checkpoint(self._models.before, "gan_sr")

    def of(self, candidate: Candidate, old: Pixels) -> Pixels:
        """Return the result of a candidate; ``old`` is that of the old model."""
        if candidate.model is None:
            return noisy(old, self._image.id)
        return self._of_checkpoint(candidate.model)

    def labels(self, result: Pixels, candidate: Candidate | None = None) -> Labels | None:
        """Return the ADE20K classes of the pixels of a candidate's or the old model's result; None if none are used."""
        image, job = self._image, self._job
        if job.class_weights is None:
            return None
        if image.labels is not None:
            return read_label_file(image.labels, result.shape[:2], job.max_pixels)
        segmenter = job.settings.segmenter
        if not segmenter.startswith("mmseg:"):
            return None
        # The key of the judgements names the old model and the segmenter; the control's stands for the old model here.
        name, key = ("old", self._models.candidates[-1].key) if candidate is None else ("new", candidate.key)
        labels: Labels = self._kept(
            f"{name}-{key}",
            lambda: segment(load_segmenter(segmenter, job.device), result, image.path),
            store=self._store_all or candidate is None,
        )
        return labels

    def drop(self, candidate: Candidate) -> None:
        """Delete what is stored of a candidate."""
        drop_array(self._place, self._image.id, f"new-{candidate.key}")
        if candidate.model is not None:
            drop_array(self._place, self._image.id, result_key(candidate.model, self._models.engine))

    def _of_checkpoint(self, path: Path, role: str | None = None) -> Pixels:
        return self._of(result_key(path, self._models.engine), partial(load_model, path), role)

    def _of(self, key: str, load: Callable[[str, Engine], Model], role: str | None) -> Pixels:
        """Return the result of a model; mining stores the results of the old and of the MSE model by their role."""
        stored: Pixels | None = find_array(self._workspace, self._image.id, role, key=key) if role else None
        if stored is not None:
            return stored

        def inferred() -> Pixels:
            model = load(self._job.device, self._models.engine)
            try:
                return super_resolve(model, self.lr).pixels
            except UsageError as error:
                reason = f"cannot be upscaled: {error.subject} {error.reason}"
                raise ImageError(self._image.path, reason, error.remedy) from None

        pixels: Pixels = self._kept(key, inferred, store=self._store_all or role is not None)
        return pixels

    def _kept(self, name: str, make: Callable[[], Any], *, store: bool) -> Any:
        """Read an array of the comparison, or make it, and store it where ``store`` is set."""
        array = find_array(self._place, self._image.id, name, key=name)
        if array is None:
            array = make()
            if store:
                write_array(self._place, self._image.id, name, array, key=name)
        return array


def enlarge_stage(
    image: ImageRef, missing: tuple[str, ...], workspace: Workspace, models: ComparedModels, job: StageJob
) -> None:
    """Store all that `judge_stage` would infer for the same arguments, so that it needs no GPU.

    Raises:
        ImageError: The photo cannot be read or upscaled.
        TransientError: The disk is full or failed.
    """
    results = _Results(image, workspace, models, job, store_all=True)
    if image.mse_sr is None:
        results.mse_sr()
    old = results.old()
    results.labels(old)
    for candidate in _unjudged(image, missing, workspace, models):
        if candidate.model or job.class_weights is not None:  # only labels of the control need its result here
            results.labels(results.of(candidate, old), candidate)


def judge_stage(
    image: ImageRef, missing: tuple[str, ...], workspace: Workspace, models: ComparedModels, job: StageJob
) -> None:
    """Judge the candidates that ``missing`` names on an image, and publish each judgement.

    Results are read from the workspace where they are stored, else inferred.

    Raises:
        ImageError: The photo cannot be read, upscaled or judged.
        TransientError: The disk is full or failed.
    """
    results = _Results(image, workspace, models, job)
    mse_sr, old = results.mse_sr(), results.old()
    try:
        before = _artifacts(image, mse_sr, old, results.labels(old), job)
        drawn = models.human[image.id].read() if image.id in models.human else None
        for candidate in _unjudged(image, missing, workspace, models):
            after = results.of(candidate, before.pixels)
            pictures = {"after": after}
            if candidate.model is None:
                pictures = {"lr": results.lr, "mse_sr": mse_sr, "before": before.pixels}
            labels = results.labels(after, candidate)
            lpips = _kept_lpips(models.lpips) if models.lpips else None
            judgement = judge(image.names[0], image.id, candidate.name, before,
                              _artifacts(image, mse_sr, after, labels, job), lpips=lpips, human=drawn)  # fmt: skip
            for kind, rank, crop in _crops(judgement, pictures, before.mask.shape):
                workspace.publish(workspace.judged_crop(candidate.key, image.id, kind, rank), crop)
            document = _CODEC.dump_python(judgement) | _origin(image, models.human)
            workspace.publish(workspace.judgement(candidate.key, image.id), as_json(document))
            results.drop(candidate)
    except ValueError as error:
        raise ImageError(image.path, f"cannot be judged: {error}", "remove it, or mine again") from None


def _unjudged(
    image: ImageRef, missing: tuple[str, ...], workspace: Workspace, models: ComparedModels
) -> Iterator[Candidate]:
    """Yield the candidates that are to be judged; an image that is tried again may have judgements already."""
    for candidate in models.candidates:
        if candidate.name in missing and read_judgement(workspace, candidate, image, models.human) is None:
            yield candidate


def read_judgement(
    workspace: Workspace, candidate: Candidate, image: ImageRef, human: Mapping[str, HumanMask] = MappingProxyType({})
) -> Judgement | None:
    """Read the judgement of a candidate on an image; None where it is missing or was made with other labels or masks.

    ``human`` has the people's masks by image id.
    """
    try:
        document = parse_json(workspace.judgement(candidate.key, image.id).read_bytes())
        if {"labels": document.pop("labels"), "human": document.pop("human", None)} != _origin(image, human):
            return None
        return _CODEC.validate_python(document | {"candidate": candidate.name, "image": image.names[0]})
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _origin(image: ImageRef, human: Mapping[str, HumanMask]) -> dict[str, str | None]:
    """Return the hashes of the labels and of the people's mask with which an image is judged."""
    drawn = human.get(image.id)
    return {"labels": image.labels and image.labels.hash, "human": drawn and (drawn.checksum or "unknown")}


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


def _artifacts(image: ImageRef, mse_sr: Pixels, result: Pixels, labels: Labels | None, job: StageJob) -> Artifacts:
    """Find the artifacts of a result of a photo with the settings of the workspace (raises `ImageError`)."""
    if result.shape != mse_sr.shape:
        sizes = " and ".join(f"{pixels.shape[1]}x{pixels.shape[0]}" for pixels in (result, mse_sr))
        remedy = "give models of one scale, and the photos that the results were made from"
        raise ImageError(image.path, f"becomes {sizes} px by the models that are compared", remedy)
    corpus = job.settings
    return detect(
        mse_sr,
        result,
        labels,
        threshold=corpus.threshold,
        min_area=min_area_pixels(corpus.min_area, *result.shape[:2]),
        window=corpus.window,
        weights=job.class_weights,
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
    image: str,
    image_id: str,
    candidate: str,
    before: Artifacts,
    after: Artifacts,
    *,
    lpips: nn.Module | None = None,
    human: Mask | None = None,
) -> Judgement:
    """Compare a candidate's result of an image with the old model's result.

    Args:
        image, image_id, candidate: Names for the judgement.
        before, after: The artifacts of the old model's and of the candidate's result, found with the same settings.
        lpips: The network of `desra_core.networks.perceptual.load_lpips`; without it LPIPS is not measured.
        human: ``(H, W)`` bool, the mask that people drew on the old model's result, or None.

    Raises:
        ValueError: The results or masks differ in shape, or are smaller than 11 px a side.
    """
    outside = ~before.mask

    def described(region: Region) -> NewRegion:
        return NewRegion(*region[:5], class_name(region.dominant_class), region.severity)

    ious: list[float | None] = [None, None]
    if human is not None and valid(human, FRAME).any():
        truth = valid(human, FRAME)
        ious = [compare_masks(valid(found.mask, FRAME), truth).iou for found in (before, after)]
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
        lpips=None if lpips is None else lpips_distance(lpips, before.pixels, after.pixels),
        iou_before=ious[0],
        iou_after=ious[1],
        **measure_fidelity(before.pixels, after.pixels, outside)._asdict(),
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
