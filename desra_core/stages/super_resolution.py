"""Super-resolution: infer both results of a photo, as far as they are not there yet, and compare them in memory."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from desra_core.errors import ImageError, TransientError, UsageError
from desra_core.images.codec import Photo, Pixels
from desra_core.networks.checkpoints import Model, Precision, load_pair
from desra_core.networks.super_resolution import super_resolve
from desra_core.planning.keys import result_key
from desra_core.settings import Mining
from desra_core.stages import similarity
from desra_core.stages.run import StageJob
from desra_core.stages.similarity import SimilaritySettings, compare, is_suspect, proven_clean
from desra_core.stages.sources import read_photo
from desra_core.workspace import Workspace
from desra_core.workspace.arrays import find_array, write_array
from desra_core.workspace.human_masks import find_human_mask
from desra_core.workspace.manifest import ImageRef
from desra_core.workspace.products import FURTHER
from desra_core.workspace.records import Record


@dataclass(frozen=True)
class SuperResolutionSettings:
    """Settings of the super-resolution stage; the keys identify a result by its model and precision.

    ``segmentation_key`` and ``further`` (keys by product) are set where even clean images get labels and further
    products; ``keep_mse`` and ``keep_pair`` where the MSE result or both are to stay.
    """

    mse_sr_key: str
    gan_sr_key: str
    mse_model: Path
    gan_model: Path
    precision: Precision
    device: str
    segmentation_key: str | None
    keep_mse: bool
    keep_pair: bool
    similarity: SimilaritySettings
    further: tuple[tuple[str, str], ...] = ()


def settings_of(job: StageJob) -> SuperResolutionSettings:
    """Choose the settings of the stage for a run."""
    target, mining = job.target, job.settings
    assert isinstance(mining, Mining)
    assert target.mse_sr_key is not None
    assert target.gan_sr_key is not None
    every = target.keep != "artifacts"
    further = ((product.name, product.key(target)) for product in FURTHER if every)
    return SuperResolutionSettings(
        mse_sr_key=target.mse_sr_key,
        gan_sr_key=target.gan_sr_key,
        mse_model=mining.mse_model,
        gan_model=mining.gan_model,
        precision=mining.precision,
        device=job.device,
        segmentation_key=target.segmentation_key if target.segments and every else None,
        keep_mse=target.keep_mse,
        keep_pair=target.keep == "all",
        similarity=similarity.settings_of(job),
        further=tuple((name, key) for name, key in further if key),
    )


def network(settings: SuperResolutionSettings) -> tuple[Any, ...]:
    """Name the call that loads the networks: a function and its arguments."""
    return load_pair, settings.mse_model, settings.gan_model, settings.device, settings.precision


def super_resolution_stage(
    image: ImageRef, record: Record, workspace: Workspace, settings: SuperResolutionSettings
) -> Record:
    """Infer the pair and compare it; store what is needed later (raises `ImageError`)."""
    human = find_human_mask(workspace, image.id, image.names, settings.gan_sr_key)
    if human is not None and human.pixels:  # an artifact, whatever the detector says
        settings = replace(settings, keep_pair=True, similarity=replace(settings.similarity, keep_all=True))
    known = _known_clean(image, record, workspace, settings)
    if known is not None:
        return known
    pair = _Pair(image, record, workspace, settings)
    mse_sr, gan_sr = pair.result("mse_sr", settings.mse_sr_key), pair.result("gan_sr", settings.gan_sr_key)
    made = compare(image, mse_sr, gan_sr, pair.record, workspace, settings.similarity)
    needed = made.artifact_pixels is None or settings.keep_pair
    if needed or settings.keep_mse:
        pair.store("mse_sr", settings.mse_sr_key)
    if needed or settings.segmentation_key or settings.further:
        pair.store("gan_sr", settings.gan_sr_key)
    return made


class _Pair:
    """Both results of a photo, which is read once and only when one of them has to be inferred."""

    def __init__(
        self, image: ImageRef, record: Record, workspace: Workspace, settings: SuperResolutionSettings
    ) -> None:
        self.record = replace(record, tile=None, seconds=record.seconds | {"inference": 0.0})
        self._stored_tile = record.tile
        self._image = image
        self._workspace = workspace
        self._settings = settings
        self._photo: Photo | None = None
        self._inferred: dict[str, Pixels] = {}

    def result(self, role: Literal["mse_sr", "gan_sr"], key: str) -> Pixels:
        """Return the stored result, or a new one."""
        stored: Pixels | None = find_array(self._workspace, self._image.id, role, key=key)
        if stored is not None:
            self._note_tile(self._stored_tile)
            return stored
        settings = self._settings
        pair = load_pair(settings.mse_model, settings.gan_model, settings.device, settings.precision)
        model = pair[role == "gan_sr"]
        if result_key(model.path, settings.precision) != key:
            raise TransientError(model.path, "changed after the run had started", "run again")
        self._inferred[role] = self._infer(model)
        return self._inferred[role]

    def store(self, role: str, key: str) -> None:
        """Store a result, unless it is there."""
        if role in self._inferred:
            write_array(self._workspace, self._image.id, role, self._inferred[role], key=key)

    def _infer(self, model: Model) -> Pixels:
        if self._photo is None:
            assert self._image.lr is not None
            self._photo = read_photo(self._image.lr, self._settings.similarity.max_pixels // model.scale**2)
            self.record = replace(
                self.record, icc_profile=self._photo.has_icc_profile, further_pages=self._photo.further_pages
            )
        started = time.perf_counter()
        try:
            pixels, tile = super_resolve(model, self._photo.pixels)
        except UsageError as error:  # weights that overflow on this photo, maybe on no other
            raise ImageError(self._image.path, f"cannot be upscaled: {error.subject} {error.reason}",
                             error.remedy) from None  # fmt: skip
        inference = self.record.seconds["inference"] + time.perf_counter() - started
        self._note_tile(tile)
        self.record = replace(self.record, seconds=self.record.seconds | {"inference": round(inference, 4)})
        return pixels

    def _note_tile(self, tile: int | None) -> None:
        """Keep the smallest window that one of the results was made with."""
        self.record = replace(self.record, tile=min((t for t in (self.record.tile, tile) if t), default=None))


def _known_clean(
    image: ImageRef, record: Record, workspace: Workspace, settings: SuperResolutionSettings
) -> Record | None:
    """The record of an image that its stored map proves clean and whose results are not needed; None otherwise."""
    labelled = settings.segmentation_key is None or (
        record.labels_kept and record.segmentation_key == settings.segmentation_key
    )
    whole = labelled and all(record.further.get(name) == key for name, key in settings.further)
    if settings.keep_pair or not whole or not record.similarity_kept:
        return None
    if record.similarity_key != settings.similarity.key:
        return None
    stored = find_array(workspace, image.id, "similarity", key=settings.similarity.key)
    assert record.height is not None
    assert record.width is not None
    if stored is None or is_suspect(-stored, settings.similarity, record.height, record.width):
        return None
    return proven_clean(record, settings.similarity)
