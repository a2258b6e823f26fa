"""From a score map to an artifact mask: threshold, morphology, holes, area filter (Section 3.3 of the paper).

All steps run on the valid map alone, as if it were the whole image. At the end the mask is padded to the image's size.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from desra_core.detection.class_weights import weighted_scores
from desra_core.images.codec import Labels, Mask, Pixels
from desra_core.images.parts import row_strips

# The paper's threshold of the adjusted similarity, its least area in pixels of the image, and the side of the Gaussian
# window of D.
THRESHOLD = 0.7
MIN_AREA = 4000
WINDOW = 11

_KERNEL = np.ones((5, 5), np.uint8)
_DILATIONS = 3
_FRAME = WINDOW // 2

Similarity = npt.NDArray[np.float32]


class SimilarityMap(np.ndarray[Any, np.dtype[np.float32]]):
    """A map of the similarity. Its ``frame`` is the width in pixels of the image's border, which has no similarity."""

    frame: int = _FRAME

    def __new__(cls, similarity: Similarity, frame: int) -> SimilarityMap:
        """View values as a map."""
        known = np.asarray(similarity).view(cls)
        known.frame = frame
        return known

    def __array_finalize__(self, source: object) -> None:
        self.frame = getattr(source, "frame", _FRAME)

    def __reduce__(self) -> tuple[Any, ...]:
        return SimilarityMap, (np.asarray(self), self.frame)


def artifact_mask(
    similarity: Similarity,
    *,
    threshold: float = THRESHOLD,
    min_area: int = MIN_AREA,
    labels: Labels | None = None,
    weights: npt.NDArray[np.float64] | None = None,
    frame: int | None = None,
) -> Mask:
    """Mark the artifacts of an image by the paper's D.

    Args:
        similarity: ``(H - 2 frame, W - 2 frame)`` float32, from `variance_similarity`.
        threshold: A pixel is suspect where its adjusted similarity ``clip(w_k D, 0, 1)`` is below this; 0 < threshold
            <= 1.
        min_area: Components of at most this many pixels are dropped.
        labels: ``(H, W)`` uint8 ADE20K class of each pixel. Without labels every weight is 1.
        weights: ``(150,)`` float64, ``w_k`` by class.
        frame: Width in pixels of the border in which the similarity is undefined. By default the frame of a
            `SimilarityMap`, else that by which the labels are larger, else 5, the frame of the usual window.

    Returns:
        ``(H, W)`` bool. The frame is never marked. Each step is monotone: the mask never grows when ``threshold`` falls
        or when ``min_area`` or a weight rises.

    Raises:
        ValueError: The labels are not of the image's size.
    """
    if frame is None:
        frame = getattr(similarity, "frame", None)
    if frame is None:
        frame = _FRAME if labels is None else (int(labels.shape[0]) - int(similarity.shape[0])) // 2
    shape = similarity.shape[0] + 2 * frame, similarity.shape[1] + 2 * frame
    # A Python float would be rounded to the map's float32 before it is compared.
    limit = -np.float64(threshold)
    scores = -np.asarray(similarity)
    return score_mask(scores, shape, threshold=limit, min_area=min_area, labels=labels, weights=weights)


def score_mask(
    scores: npt.NDArray[np.floating[Any]],
    shape: tuple[int, int],
    *,
    threshold: float,
    min_area: int = MIN_AREA,
    labels: Labels | None = None,
    weights: npt.NDArray[np.float64] | None = None,
) -> Mask:
    """Mark the artifacts of an image by the scores of a `desra_core.detection.detectors.Detector`.

    Args:
        scores: ``(H - 2 f, W - 2 f)``, larger where a pixel looks more like an artifact.
        shape: ``(H, W)`` of the image.
        threshold: A pixel is suspect where its score is above this.
        min_area: Components of at most this many pixels are dropped.
        labels, weights: As for `artifact_mask`, for scores that are minus a similarity.

    Returns:
        ``(H, W)`` bool. The frame of width f is never marked.

    Raises:
        ValueError: The labels are not of the image's size.
    """
    if labels is not None and labels.shape != shape:
        raise ValueError(f"labels are of shape {labels.shape}, but the image of {shape}")
    frame = (shape[0] - scores.shape[0]) // 2
    suspect: npt.NDArray[Any] = np.empty(scores.shape, np.uint8)
    for rows in row_strips(scores.shape):
        classes = None if labels is None else valid(labels, frame)[rows]
        suspect[rows] = weighted_scores(scores[rows], classes, weights) > threshold
    # OpenCV's default border ignores the outside when eroding and adds nothing when dilating.
    suspect = cv2.erode(suspect, _KERNEL)
    if not suspect.any():
        return np.zeros(shape, np.bool_)
    suspect = cv2.dilate(suspect, _KERNEL, iterations=_DILATIONS)
    return np.pad(_area_filtered(_filled(suspect), min_area), frame)


def valid(image: npt.NDArray[Any], frame: int) -> npt.NDArray[Any]:
    """Cut a frame of a given width off an ``(H, W)`` image; the pixels that have a score remain."""
    return image[frame : image.shape[0] - frame, frame : image.shape[1] - frame]


def assemble_pseudo_gt(mse_sr: Pixels, gan_sr: Pixels, mask: Mask) -> Pixels:
    """Compute the pseudo ground truth ``mask * mse_sr + (1 - mask) * gan_sr``.

    Args:
        mse_sr, gan_sr: ``(H, W, C)`` of one dtype.
        mask: ``(H, W)``, true where there is an artifact.

    Examples:
        >>> mse_sr, gan_sr = np.full((1, 2, 1), 7, np.uint8), np.full((1, 2, 1), 9, np.uint8)
        >>> assemble_pseudo_gt(mse_sr, gan_sr, np.array([[True, False]])).ravel().tolist()
        [7, 9]
    """
    return np.where(mask[:, :, np.newaxis], mse_sr, gan_sr)


def _filled(binary: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Fill the zeros without an 8-connected path to the border (``binary_fill_holes`` with a 3x3 structure)."""
    _, components, stats, _ = cv2.connectedComponentsWithStats(1 - binary, connectivity=8)
    height, width = binary.shape
    left, top = stats[:, cv2.CC_STAT_LEFT], stats[:, cv2.CC_STAT_TOP]
    right, bottom = left + stats[:, cv2.CC_STAT_WIDTH], top + stats[:, cv2.CC_STAT_HEIGHT]
    filled = (left > 0) & (top > 0) & (right < width) & (bottom < height)
    filled[0] = True
    return np.asarray(filled.astype(np.uint8)[components])


def _area_filtered(binary: npt.NDArray[Any], min_area: int) -> Mask:
    """Drop the 8-connected components of at most ``min_area`` pixels."""
    _, components, stats, _ = cv2.connectedComponentsWithStats(binary, connectivity=8)
    kept = stats[:, cv2.CC_STAT_AREA] > min_area
    kept[0] = False
    return np.asarray(kept[components])
