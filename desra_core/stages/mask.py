"""Mask: the artifact mask and its regions, and for mined photos the dataset that finetuning reads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from desra_core.detection.mask import assemble_pseudo_gt, score_mask
from desra_core.detection.regions import find_regions
from desra_core.errors import ImageError
from desra_core.images.codec import Mask, Pixels, encode_mask, encode_png
from desra_core.networks.super_resolution import resize_alpha
from desra_core.settings import detector_of, min_area_pixels
from desra_core.stages.run import StageJob
from desra_core.stages.sources import read_labels, read_photo
from desra_core.workspace import Workspace
from desra_core.workspace.arrays import drop_array, read_array
from desra_core.workspace.human_masks import HumanMask, find_human_mask
from desra_core.workspace.manifest import ImageRef
from desra_core.workspace.pictures import publish_pseudo_gt
from desra_core.workspace.products import kept_whole
from desra_core.workspace.records import Record, write_journal


@dataclass(frozen=True)
class MaskSettings:
    """Settings of the mask stage.

    ``threshold`` is minus the score above which a pixel is suspect, as in the records. ``weights`` is ``(150,)``
    float64, or None where none apply; ``mse_sr_key`` and ``gan_sr_key`` are set where the results were inferred.
    """

    key: str
    segmentation_key: str
    weighting_key: str
    weights: npt.NDArray[np.float64] | None
    threshold: float
    min_area: str
    keep: Literal["artifacts", "maps", "all"]
    max_pixels: int
    mse_sr_key: str | None = None
    gan_sr_key: str | None = None
    keep_mse: bool = False


def settings_of(job: StageJob) -> MaskSettings:
    """Choose the settings of the stage for a run."""
    target, weighted = job.target, detector_of(job.settings).weighs_classes
    return MaskSettings(
        key=target.mask_key,
        segmentation_key=target.segmentation_key,
        weighting_key=target.weighting_key,
        weights=job.weights.values if target.segmentation_key != "none" and weighted else None,
        threshold=target.threshold,
        min_area=target.min_area,
        keep=job.settings.keep,
        max_pixels=job.max_pixels,
        mse_sr_key=target.mse_sr_key,
        gan_sr_key=target.gan_sr_key,
        keep_mse=target.keep_mse,
    )


def mask_stage(image: ImageRef, record: Record, workspace: Workspace, settings: MaskSettings) -> Record:
    """Publish the mask at every name of the image and measure its regions (raises `ImageError`).

    An image without a stored map is one whose mask is known to be empty. Photos with artifacts go into the dataset, by
    the detector's word or by a person's; the dataset prefers a person's mask.
    """
    assert record.height is not None
    assert record.width is not None
    shape = (record.height, record.width)
    min_area = min_area_pixels(settings.min_area, *shape)
    labels = read_labels(image, record, workspace, settings.segmentation_key, settings.max_pixels)
    regions: list[dict[str, Any]] = []
    mask = np.zeros(shape, np.bool_)
    if record.similarity_kept:
        similarity = read_array(workspace, image.id, "similarity", key=record.similarity_key)
        weighting: dict[str, Any] = {"labels": labels, "weights": settings.weights}
        scores = np.negative(similarity, out=similarity)
        mask = score_mask(scores, shape, threshold=-np.float64(settings.threshold), min_area=min_area, **weighting)
        if mask.any():
            similarity = np.negative(scores, out=scores)
            found = find_regions(mask, similarity, threshold=settings.threshold, **weighting)
            regions = [region._asdict() for region in found]
        del similarity, scores, weighting
    del labels
    if record.mask_key is not None:
        # From here on, files are not what the record says: a run that is killed now must not be believed.
        write_journal(workspace, image.shard, replace(record, mask_key=None))
    human = _human_mask(image, workspace, settings)
    whole = kept_whole(settings.keep, bool(regions), human is not None and human.pixels > 0)
    _publish(image, mask, human, workspace, settings, whole)
    kept = whole or settings.keep != "artifacts"
    return replace(
        record,
        similarity_kept=kept and record.similarity_kept,
        labels_kept=kept and record.labels_kept,
        labels_hash=image.labels.hash if image.labels else None,
        weighting_key=settings.weighting_key,
        proven_weight=_proven_weight(record, regions, settings),
        threshold=settings.threshold,
        min_area=min_area,
        mask_key=settings.key,
        artifact_pixels=int(mask.sum()),
        regions=regions,
    )


def _publish(
    image: ImageRef, mask: Mask, human: HumanMask | None, workspace: Workspace, settings: MaskSettings, whole: bool
) -> None:
    """Write the mask, and the dataset where results were inferred; what is not wanted any more of it goes."""
    encoded = encode_mask(mask)
    for name in image.names:
        workspace.publish(workspace.mask(name), encoded)
    if settings.gan_sr_key is None:
        return
    if whole:
        _export(image, mask if human is None else _read_human(human, mask.shape), workspace, settings)
        return
    for name in image.names:
        workspace.withdraw_dataset(name)
    if settings.keep == "maps":
        for role in ("gan_sr",) if settings.keep_mse else ("mse_sr", "gan_sr"):
            drop_array(workspace, image.id, role)


def _export(image: ImageRef, mask: Mask, workspace: Workspace, settings: MaskSettings) -> None:
    """Write the dataset pictures, one after the other: each holds several copies of itself while it is encoded."""
    assert image.lr is not None
    lr, alpha, *_ = read_photo(image.lr, settings.max_pixels)
    sr_alpha = None if alpha is None else resize_alpha(alpha, mask.shape[0] // alpha.shape[0])

    def publish(kind: str, data: bytes) -> None:
        for name in image.names:
            workspace.publish(workspace.dataset(kind, name), data)

    def mse_sr() -> Pixels:
        return read_array(workspace, image.id, "mse_sr", key=settings.mse_sr_key)

    def gan_sr() -> Pixels:
        return read_array(workspace, image.id, "gan_sr", key=settings.gan_sr_key)

    publish("lr", encode_png(lr, alpha))
    publish("mse_sr", encode_png(mse_sr(), sr_alpha))
    publish("gan_sr", encode_png(gan_sr(), sr_alpha))
    publish_pseudo_gt(workspace, image.names, mask, assemble_pseudo_gt(mse_sr(), gan_sr(), mask), sr_alpha)


def _human_mask(image: ImageRef, workspace: Workspace, settings: MaskSettings) -> HumanMask | None:
    """The mask by a person that the dataset prefers; where the results are files there is no dataset."""
    if settings.gan_sr_key is None:
        return None
    return find_human_mask(workspace, image.id, image.names, settings.gan_sr_key)


def _read_human(human: HumanMask, shape: tuple[int, ...]) -> Mask:
    mask = human.read()
    if mask.shape != shape:
        sizes = f"is {mask.shape[1]}x{mask.shape[0]} but its image is {shape[1]}x{shape[0]}"
        raise ImageError(human.path, sizes, "import it again, or delete it")
    return mask


def _proven_weight(record: Record, regions: list[dict[str, Any]], settings: MaskSettings) -> float | None:
    if regions:
        return None
    if record.similarity_kept:
        return 1.0 if settings.weights is None else None
    return record.proven_weight
