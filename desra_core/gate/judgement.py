"""What a candidate model does to one held-out image: its artifacts and everything else, against the old model's result.

A candidate is a finetuned model, or the control: the old model's result with noise that nobody sees, which shows
what the measures make of nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from desra_core.detection import Region, artifact_mask, find_regions, variance_similarity
from desra_core.detection.class_weights import class_names
from desra_core.detection.mask import MIN_AREA, THRESHOLD, WINDOW
from desra_core.detection.similarity import TILE
from desra_core.evaluation.fidelity import gradient_similarity, sharpness, squared_error, structural_similarity
from desra_core.evaluation.perceptual import lpips_distance
from desra_core.evaluation.removal import LOOSENESS, uncovered
from desra_core.images.codec import Labels, Mask, Pixels
from desra_core.images.tiling import row_strips

if TYPE_CHECKING:
    from torch import nn


class RegionFate(NamedTuple):
    """A region of the mask before finetuning, and whether it is gone after. Lengths and areas are in pixels."""

    x: int
    y: int
    width: int
    height: int
    area: int
    class_name: str | None
    severity: float
    gone: bool


class Added(NamedTuple):
    """A region of the mask after finetuning that was not there before."""

    x: int
    y: int
    width: int
    height: int
    area: int
    class_name: str | None
    severity: float


@dataclass(frozen=True)
class Judgement:
    """One held-out image under one candidate, against the old model's result.

    Attributes
    ----------
    image, id
        Its name and the hash of its content.
    candidate
        The candidate's name.
    pixels, outside_pixels
        All of the result's, and those outside of the mask before.
    squared_error, ssim, gradient_similarity
        Outside of the mask before, see `desra_core.evaluation.fidelity`; the first is a sum.
    lpips
        Distance of the whole images, where it was asked for.
    sharpness_before, sharpness_after
        Of the whole images, in grey levels of 255 per pixel.
    """

    image: str
    id: str
    candidate: str
    pixels: int
    regions: list[RegionFate]
    added: list[Added]
    artifact_pixels_before: int
    artifact_pixels_after: int
    outside_pixels: int
    squared_error: float
    ssim: float
    gradient_similarity: float
    lpips: float | None
    sharpness_before: float
    sharpness_after: float

    @property
    def clean(self) -> bool:
        """Whether the old model's result has no artifact."""
        return not self.regions

    def to_json(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        regions = {name: [region._asdict() for region in getattr(self, name)] for name in ("regions", "added")}
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)} | regions

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Judgement:
        """Read what `to_json` gave."""
        regions = [RegionFate(**region) for region in document["regions"]]
        added = [Added(**region) for region in document["added"]]
        return cls(**(document | {"regions": regions, "added": added}))


@dataclass(frozen=True, eq=False)
class DetectionSettings:
    """How artifacts are found in one image: ``min_area`` and ``window`` in pixels, ``weights`` ``(150,)`` by class."""

    threshold: float = THRESHOLD
    min_area: int = MIN_AREA
    window: int = WINDOW
    weights: npt.NDArray[np.float64] | None = None


class Found(NamedTuple):
    """The artifacts of a result ``(H, W, C)``; ``loose`` is the mask at a quarter of the minimal area."""

    pixels: Pixels
    mask: Mask
    loose: Mask
    regions: list[Region]


def detect(
    mse_sr: Pixels,
    result: Pixels,
    labels: Labels | None,
    settings: DetectionSettings,
    *,
    tile: int = TILE,
    threads: int = 1,
) -> Found:
    """Find the artifacts of a GAN model's result, as `desra detect` does.

    Parameters
    ----------
    mse_sr, result
        ``(H, W, 1 or 3)`` uint8 or uint16, of one size.
    labels
        ``(H, W)`` uint8 ADE20K class of each pixel, or None.
    tile, threads
        As for `desra_core.detection.variance_similarity`.

    Raises
    ------
    ValueError
        The images differ in size, or are smaller than the window.
    """
    similarity = variance_similarity(mse_sr, result, window=settings.window, tile=tile, threads=threads)

    def mask(min_area: int) -> Mask:
        return artifact_mask(
            similarity,
            threshold=settings.threshold,
            min_area=min_area,
            labels=labels,
            weights=settings.weights,
            frame=settings.window // 2,
        )

    strict = mask(settings.min_area)
    regions = find_regions(strict, similarity, threshold=settings.threshold, labels=labels, weights=settings.weights)
    return Found(result, strict, mask(settings.min_area // LOOSENESS), regions)


def judge(
    image: str, image_id: str, candidate: str, before: Found, after: Found, *, lpips: nn.Module | None = None
) -> Judgement:
    """Compare a candidate's result of an image with the old model's.

    Parameters
    ----------
    image, image_id, candidate
        Names for the judgement.
    before, after
        What `detect` found in the old model's and in the candidate's result, with the same settings.
    lpips
        What `desra_core.evaluation.perceptual.load_lpips` returns, to measure that distance too.

    Raises
    ------
    ValueError
        The results differ in shape, or are smaller than 11 px a side.
    """
    outside = ~before.mask
    names = class_names()
    gone = uncovered(before.mask, after.loose)
    added = uncovered(after.mask, before.loose)
    return Judgement(
        image=image,
        id=image_id,
        candidate=candidate,
        pixels=outside.size,
        regions=[
            RegionFate(*_told(region, names), gone=fate) for region, fate in zip(before.regions, gone, strict=True)
        ],
        added=[Added(*_told(region, names)) for region, new in zip(after.regions, added, strict=True) if new],
        artifact_pixels_before=int(np.count_nonzero(before.mask)),
        artifact_pixels_after=int(np.count_nonzero(after.mask)),
        outside_pixels=int(np.count_nonzero(outside)),
        squared_error=squared_error(before.pixels, after.pixels, outside),
        ssim=structural_similarity(before.pixels, after.pixels, outside),
        gradient_similarity=gradient_similarity(before.pixels, after.pixels, outside),
        lpips=None if lpips is None else lpips_distance(lpips, before.pixels, after.pixels),
        sharpness_before=sharpness(before.pixels),
        sharpness_after=sharpness(after.pixels),
    )


def noisy(pixels: Pixels, seed_text: str, levels: int = 2) -> Pixels:
    """Add noise that nobody sees: the control, in which nothing was finetuned.

    Parameters
    ----------
    pixels
        ``(H, W, C)`` uint8 or uint16.
    seed_text
        The same text gives the same noise.
    levels
        Every sample changes by a whole number of grey levels of 255, each from -levels to levels being as likely, and
        is clipped.
    """
    seed = int.from_bytes(hashlib.blake2b(seed_text.encode(), digest_size=16).digest())
    noise = np.random.default_rng(seed).integers(-levels, levels, pixels.shape, np.int8, endpoint=True)
    white = np.iinfo(pixels.dtype).max
    changed = np.empty_like(pixels)
    for rows in row_strips(pixels.shape):
        samples = pixels[rows].astype(np.int32) + noise[rows].astype(np.int32) * (white // 255)
        changed[rows] = np.clip(samples, 0, white)
    return changed


def _told(region: Region, names: list[str]) -> tuple[int, int, int, int, int, str | None, float]:
    class_name = None if region.dominant_class is None else names[region.dominant_class]
    return region.x, region.y, region.width, region.height, region.area, class_name, region.severity
