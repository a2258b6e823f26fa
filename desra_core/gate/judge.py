"""Judge: what candidate models do to a held-out image, each against the old model's result."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from desra_core.errors import ImageError, UsageError
from desra_core.gate.judgement import DetectionSettings, Found, Judgement, RegionFate, detect, judge, noisy
from desra_core.images.codec import Labels, Pixels, bgr8, decode_labels
from desra_core.networks.checkpoints import Precision, load_model
from desra_core.networks.segmentation import load_segmenter
from desra_core.networks.super_resolution import super_resolve
from desra_core.settings import min_area_pixels
from desra_core.stages.sources import read_content, read_photo
from desra_core.workspace import Workspace
from desra_core.workspace.arrays import find_array
from desra_core.workspace.manifest import ImageRef

if TYPE_CHECKING:
    from torch import nn

CONTROL = "control"

# Of an image, for the report.
_PICTURED_REGIONS = 2


class Candidate(NamedTuple):
    """A model to be judged; ``key`` names its judgements, which hold for one old model and one way of detection.

    Without a model it is the control: the old model's result with noise that nobody sees.
    """

    name: str
    model: Path | None
    key: str


@dataclass(frozen=True)
class JudgeSettings:
    """What the judge stage needs.

    ``mse_model`` is None where MSE results are files. ``mse_sr_key`` and ``before_key`` name results in the workspace
    that serve again; ``weights`` is ``(150,)`` float64, or None where there are no labels; ``lpips`` is a file of
    weights.
    """

    candidates: tuple[Candidate, ...]
    mse_model: Path | None
    before: Path
    mse_sr_key: str | None
    before_key: str | None
    precision: Precision
    device: str
    segmenter: str
    weights: npt.NDArray[np.float64] | None
    threshold: float
    min_area: str
    window: int
    lpips: Path | None
    tile: int
    threads: int
    max_pixels: int


def judge_stage(image: ImageRef, missing: tuple[str, ...], workspace: Workspace, settings: JudgeSettings) -> None:
    """Judge the candidates of some names on an image, and publish each judgement (raises `ImageError`)."""
    results = Results(image, workspace, settings)
    try:
        before = results.found(results.before)
        for candidate in settings.candidates:
            if candidate.name not in missing:
                continue
            after = before.pixels if candidate.model is None else results.of_model(candidate.model)
            if candidate.model is None:
                after = noisy(after, image.id)
            judgement = judge(
                image.names[0], image.id, candidate.name, before, results.found(after), lpips=_lpips(settings.lpips)
            )
            pictures = {"after": after}
            if candidate.model is None:
                pictures = {"lr": results.lr, "mse_sr": results.mse_sr, "before": before.pixels}
            _publish_crops(judgement, candidate.key, pictures, before.mask.shape, image, workspace)
            document = judgement.to_json() | {"labels": _labels_hash(image)}
            workspace.publish(workspace.judgement(candidate.key, image.id), json.dumps(document).encode())
    except ValueError as error:
        raise ImageError(image.path, f"cannot be judged: {error}", "remove it, or mine again") from None


def read_judgement(workspace: Workspace, candidate: Candidate, image: ImageRef) -> Judgement | None:
    """What was found of a candidate on an image; None where it has not been judged, or with other labels."""
    try:
        document = json.loads(workspace.judgement(candidate.key, image.id).read_bytes())
        if document.pop("labels") != _labels_hash(image):
            return None
        return Judgement.from_json(document | {"candidate": candidate.name, "image": image.names[0]})
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _labels_hash(image: ImageRef) -> str | None:
    """The content of the file of labels, where there is one."""
    return image.labels.hash if image.labels else None


def _publish_crops(
    judgement: Judgement,
    key: str,
    pictures: dict[str, Pixels],
    shape: tuple[int, int],
    image: ImageRef,
    workspace: Workspace,
) -> None:
    """Publish the worst regions of an image, cut out of pictures of its results' size, or of the photo itself."""
    from desra_core.images.crops import encode_webp, fitted, window_around

    for rank, region in enumerate(worst_regions(judgement)):
        window = window_around(region.x, region.y, region.width, region.height, shape)
        for kind, pixels in pictures.items():
            scale = shape[0] // pixels.shape[0]
            rows, columns = (np.arange(part.start, part.stop) // scale for part in (window.rows, window.columns))
            crop = fitted(bgr8(pixels[rows[:, np.newaxis], columns])[:, :, ::-1])
            workspace.publish(workspace.judged_crop(key, image.id, kind, rank), encode_webp(crop))


def worst_regions(judgement: Judgement) -> list[RegionFate]:
    """The regions before of which there are pictures, the most severe first; none with a severity below zero."""
    severe = [region for region in judgement.regions if region.severity >= 0]
    return sorted(severe, key=lambda region: -region.severity)[:_PICTURED_REGIONS]


class Results:
    """The results of one photo by the models in question: from the workspace where they are there, else inferred."""

    def __init__(self, image: ImageRef, workspace: Workspace, settings: JudgeSettings) -> None:
        assert image.lr is not None
        self._image = image
        self._workspace = workspace
        self._settings = settings
        scale = load_model(settings.before, settings.device, settings.precision).scale
        self.lr = read_photo(image.lr, settings.max_pixels // scale**2).pixels
        self.mse_sr = self._mse_sr()
        self.before = self._stored("gan_sr", settings.before_key, settings.before)

    def of_model(self, path: Path) -> Pixels:
        """Infer the result of a model."""
        model = load_model(path, self._settings.device, self._settings.precision)
        try:
            return super_resolve(model, self.lr).pixels
        except UsageError as error:
            raise ImageError(
                self._image.path, f"cannot be upscaled: {error.subject} {error.reason}", error.remedy
            ) from None

    def found(self, result: Pixels) -> Found:
        """The artifacts of a result, found as the workspace's own are."""
        settings = self._settings
        if result.shape != self.mse_sr.shape:
            sizes = " and ".join(f"{pixels.shape[1]}x{pixels.shape[0]}" for pixels in (result, self.mse_sr))
            raise ImageError(
                self._image.path,
                f"becomes {sizes} px by the models that are compared",
                "give models of one scale, and the photos that the results were made from",
            )
        detection = DetectionSettings(
            threshold=settings.threshold,
            min_area=min_area_pixels(settings.min_area, *result.shape[:2]),
            window=settings.window,
            weights=settings.weights,
        )
        labels = None if settings.weights is None else self._labels(result)
        return detect(self.mse_sr, result, labels, detection, tile=settings.tile, threads=settings.threads)

    def _mse_sr(self) -> Pixels:
        if self._image.mse_sr is not None:
            return read_photo(self._image.mse_sr, self._settings.max_pixels).pixels
        assert self._settings.mse_model is not None
        return self._stored("mse_sr", self._settings.mse_sr_key, self._settings.mse_model)

    def _stored(self, role: str, key: str | None, model: Path) -> Pixels:
        stored: Pixels | None = find_array(self._workspace, self._image.id, role, key=key) if key else None
        return self.of_model(model) if stored is None else stored

    def _labels(self, result: Pixels) -> Labels | None:
        if self._image.labels is not None:
            path = self._image.labels.path
            return decode_labels(read_content(self._image.labels), path, max_pixels=self._settings.max_pixels)
        if self._settings.segmenter.startswith("mmseg:"):
            return load_segmenter(self._settings.segmenter, self._settings.device)(result)
        return None


@lru_cache(maxsize=1)
def _lpips(path: Path | None) -> nn.Module | None:
    from desra_core.evaluation.perceptual import load_lpips

    return None if path is None else load_lpips(path)
