"""Find the artifacts of one pair of results: all steps of the method, on arrays."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from desra_core.detection.class_weights import load_weights
from desra_core.detection.mask import (
    MIN_AREA,
    THRESHOLD,
    WINDOW,
    Region,
    SimilarityMap,
    artifact_mask,
    assemble_pseudo_gt,
    find_regions,
)
from desra_core.errors import ArgumentError
from desra_core.images.codec import CLASS_COUNT, Labels, Mask, Pixels, check_picture


class Result(NamedTuple):
    """The artifacts of a pair.

    Attributes:
        similarity: The paper's D, ``(H - window + 1, W - window + 1)`` float32 in (0, 1].
        mask: ``(H, W)`` bool, true where there is an artifact.
        regions: The regions of the mask, from top to bottom.
        pseudo_gt: The GAN result with the MSE result in place of the artifacts, of the GAN result's dtype.
    """

    similarity: SimilarityMap
    mask: Mask
    regions: list[Region]
    pseudo_gt: Pixels


def detect_artifacts(
    mse_sr: Pixels,
    gan_sr: Pixels,
    labels: Labels | None = None,
    *,
    weights: npt.NDArray[np.float64] | None = None,
    threshold: float = THRESHOLD,
    min_area: int = MIN_AREA,
    window: int = WINDOW,
) -> Result:
    """Find the artifacts of a GAN result by the paper's method (Sections 3.2 and 3.3), as ``desra detect`` does.

    Args:
        mse_sr, gan_sr: ``(H, W)`` or ``(H, W, 1 or 3)`` RGB, uint8 or uint16: the results of the MSE model and of the
            GAN model for one photo.
        labels: ``(H, W)`` uint8, the ADE20K class of each pixel, 0..149. Without labels every weight is 1, and more is
            marked.
        weights: ``(150,)``, the weight of each class, which need labels; by default the authors' (Eq. 9).
        threshold: A pixel is suspect where its weighted similarity is below this, 0..1.
        min_area: Regions of at most this many pixels are dropped.
        window: Side of the window of the similarity, in pixels.

    Returns:
        The similarity, the mask, its regions and the pseudo ground truth.

    Raises:
        ArgumentError: The arrays are not of one image, or a value is out of range.

    Examples:
        >>> noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
        >>> smooth = np.full_like(noise, 128)
        >>> detect_artifacts(smooth, noise).regions[0].area
        13924
        >>> detect_artifacts(smooth, smooth).regions
        []
    """
    from desra_core.detection.similarity import variance_similarity

    for name, picture in (("mse_sr", mse_sr), ("gan_sr", gan_sr)):
        check_picture(name, picture)
    if not 0 < threshold <= 1:
        raise ArgumentError("threshold", f"is {threshold}, no similarity", "give one above 0 and up to 1, such as 0.7")
    if labels is not None and labels.size and labels.max() >= CLASS_COUNT:
        raise ArgumentError("labels", f"hold the class {labels.max()}", "give ADE20K's classes, 0..149")
    if weights is not None and (labels is None or weights.shape != (CLASS_COUNT,)):
        raise ArgumentError("weights", f"are of shape {weights.shape}", f"give ({CLASS_COUNT},), and labels")
    if labels is not None and labels.dtype != np.uint8:
        raise ArgumentError("labels", f"are of dtype {labels.dtype}", "give uint8")
    if weights is None and labels is not None:
        weights = load_weights("published").values
    similarity = variance_similarity(mse_sr, gan_sr, window=window)
    mask = artifact_mask(similarity, threshold=threshold, min_area=min_area, labels=labels, weights=weights)
    regions = find_regions(mask, similarity, threshold=threshold, labels=labels, weights=weights)
    return Result(similarity, mask, regions, assemble_pseudo_gt(mse_sr, gan_sr, mask))
