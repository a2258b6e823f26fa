"""Mask: the artifact mask and its regions, and for mined photos the dataset that finetuning reads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from desra_core.arrays import drop_array, read_array
from desra_core.corpus import ImageRef
from desra_core.detection import artifact_mask, find_regions
from desra_core.detection.semantics import CLASS_COUNT
from desra_core.errors import ImageError
from desra_core.imageio import Labels, Mask, Pixels, decode_labels, encode_mask, encode_png, with_alpha
from desra_core.outcomes import Outcome
from desra_core.pseudo_gt import assemble_pseudo_gt
from desra_core.settings import min_area_pixels
from desra_core.sr.inference import resize_alpha
from desra_core.stages.sources import read_content, read_photo
from desra_core.workspace import Workspace


@dataclass(frozen=True)
class MaskSettings:
    """What the mask stage needs.

    ``weights`` is ``(150,)`` float64, or None where there are no labels; ``mse_sr_key`` and ``gan_sr_key`` are set
    where the results were inferred.
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


def mask_stage(image: ImageRef, outcome: Outcome, workspace: Workspace, settings: MaskSettings) -> Outcome:
    """Publish the mask at every name of the image and measure its regions (raises `ImageError`).

    An image without a stored map is one whose mask is known to be empty. Photos with artifacts go into the dataset.
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
    _publish(image, mask, workspace, settings)
    kept = settings.keep != "artifacts" or bool(regions)
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


def _publish(image: ImageRef, mask: Mask, workspace: Workspace, settings: MaskSettings) -> None:
    """Write the mask, and the dataset where results were inferred; what is not wanted any more of it goes."""
    encoded = encode_mask(mask)
    for name in image.names:
        workspace.publish(workspace.mask(name), encoded)
    if settings.gan_sr_key is None:
        return
    if mask.any() or settings.keep == "all":
        pictures = _pictures(image, mask, workspace, settings) | {"mask": encoded}
        for name in image.names:
            for kind, data in pictures.items():
                workspace.publish(workspace.dataset(kind, name), data)
        return
    for name in image.names:
        workspace.withdraw_dataset(name)
    if settings.keep == "maps":
        for role in ("mse_sr", "gan_sr"):
            drop_array(workspace, image.id, role)


def _pictures(image: ImageRef, mask: Mask, workspace: Workspace, settings: MaskSettings) -> dict[str, bytes]:
    """The photo, its results and the pseudo-GT as PNG; alpha is resized beside them."""
    assert image.lr is not None
    photo = read_photo(image.lr, settings.max_pixels)
    mse_sr: Pixels = read_array(workspace, image.id, "mse_sr", key=settings.mse_sr_key)
    gan_sr: Pixels = read_array(workspace, image.id, "gan_sr", key=settings.gan_sr_key)
    results = {"mse_sr": mse_sr, "gan_sr": gan_sr, "pseudo_gt": assemble_pseudo_gt(mse_sr, gan_sr, mask)}
    if photo.alpha is None:
        return {kind: encode_png(pixels) for kind, pixels in ({"lr": photo.pixels} | results).items()}
    alpha = resize_alpha(photo.alpha, gan_sr.shape[0] // photo.alpha.shape[0])
    encoded = {kind: encode_png(with_alpha(pixels, alpha)) for kind, pixels in results.items()}
    return encoded | {"lr": encode_png(with_alpha(photo.pixels, photo.alpha))}


def _labels(image: ImageRef, outcome: Outcome, workspace: Workspace, settings: MaskSettings) -> Labels | None:
    """Labels of the image's size with values below 150; None where none were asked for or none are needed."""
    if settings.segmentation_key != "labels" or image.labels is None:
        if outcome.labels_kept and outcome.segmentation_key == settings.segmentation_key:
            stored: Labels = read_array(workspace, image.id, "labels", key=outcome.segmentation_key)
            return stored
        return None
    path = image.labels.path
    labels = decode_labels(read_content(image.labels), path, max_pixels=settings.max_pixels)
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
