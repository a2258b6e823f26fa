"""From a similarity map to an artifact mask: threshold, morphology, holes, area (Section 3.3 of the paper).

Everything runs on the valid map; pixels outside it do not exist. Only at the end the mask is padded to the image.
Time and memory are linear in the pixels, however many components there are.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from desra_core.images.codec import Labels, Mask
from desra_core.images.tiling import row_strips

THRESHOLD = 0.7
MIN_AREA = 4000

_KERNEL = np.ones((5, 5), np.uint8)
_DILATIONS = 3

# Of the usual window of 11.
_FRAME = 5

Similarity = npt.NDArray[np.float32]


class SimilarityMap(np.ndarray[Any, np.dtype[np.float32]]):
    """Similarity that knows how wide the border of the image is in which it is undefined, as do its slices.

    Attributes
    ----------
    frame
        Width of that border, in pixels.
    """

    frame: int = _FRAME

    def __array_finalize__(self, source: object) -> None:
        """Called by NumPy for whatever is made from a map."""
        self.frame = getattr(source, "frame", _FRAME)

    def __reduce__(self) -> tuple[Any, ...]:
        """Called to copy a map to another process."""
        return framed, (np.asarray(self), self.frame)


def framed(similarity: Similarity, frame: int) -> SimilarityMap:
    """The same values as a map that knows its frame, in pixels."""
    known = similarity.view(SimilarityMap)
    known.frame = frame
    return known


def artifact_mask(
    similarity: Similarity,
    *,
    threshold: float = THRESHOLD,
    min_area: int = MIN_AREA,
    labels: Labels | None = None,
    weights: npt.NDArray[np.float64] | None = None,
    frame: int | None = None,
) -> Mask:
    """Mark the artifacts of an image.

    Parameters
    ----------
    similarity
        ``(H - 2 frame, W - 2 frame)`` float32, the paper's D.
    threshold
        A pixel is suspect where its adjusted similarity ``clip(w_k D, 0, 1)`` is below this; 0 < threshold <= 1.
    min_area
        Components of at most this many pixels are dropped.
    labels
        ``(H, W)`` uint8 ADE20K class of each pixel. Without labels every weight is 1.
    weights
        ``(150,)`` float64, ``w_k`` by class.
    frame
        Width of the border in which the similarity is undefined, in pixels. What `variance_similarity` returns knows
        its own, labels tell it too, and for other arrays it is that of the usual window.

    Returns
    -------
    ``(H, W)`` bool. The frame is never marked.

    Raises
    ------
    ValueError
        The labels are not of the image's size.

    Notes
    -----
    The mask never grows when ``threshold`` falls or ``min_area`` or a weight rises: each step is monotone.
    """
    frame = _frame(similarity, labels) if frame is None else frame
    shape = similarity.shape[0] + 2 * frame, similarity.shape[1] + 2 * frame
    if labels is not None and labels.shape != shape:
        raise ValueError(f"labels are of shape {labels.shape}, but the image of {shape}")
    similarity = np.asarray(similarity)
    suspect: npt.NDArray[Any] = np.empty(similarity.shape, np.uint8)
    for rows in row_strips(similarity.shape):
        classes = None if labels is None else valid(labels, frame)[rows]
        suspect[rows] = adjusted_similarity(similarity[rows], classes, weights) < threshold
    return _shaped(suspect, min_area, frame)


def _frame(similarity: Similarity, labels: Labels | None) -> int:
    if isinstance(similarity, SimilarityMap):
        return similarity.frame
    return _FRAME if labels is None else (int(labels.shape[0]) - int(similarity.shape[0])) // 2


def score_mask(
    scores: npt.NDArray[np.floating[Any]], shape: tuple[int, int], *, threshold: float, min_area: int = MIN_AREA
) -> Mask:
    """Mark the artifacts of an image by the scores of a `desra_core.detection.detectors.Detector`.

    Parameters
    ----------
    scores
        ``(H - 2 f, W - 2 f)``, larger where a pixel looks more like an artifact.
    shape
        ``(H, W)`` of the image.
    threshold
        A pixel is suspect where its score is above this.
    min_area
        As for `artifact_mask`.

    Returns
    -------
    ``(H, W)`` bool. The frame of width f is never marked.
    """
    return _shaped((scores > threshold).astype(np.uint8), min_area, (shape[0] - scores.shape[0]) // 2)


def _shaped(suspect: npt.NDArray[Any], min_area: int, frame: int) -> Mask:
    """Morphology, holes, area and frame."""
    # OpenCV's default border ignores the outside when eroding and adds nothing when dilating.
    suspect = cv2.erode(suspect, _KERNEL)
    if not suspect.any():
        return np.zeros((suspect.shape[0] + 2 * frame, suspect.shape[1] + 2 * frame), np.bool_)
    suspect = cv2.dilate(suspect, _KERNEL, iterations=_DILATIONS)
    return np.pad(_without_small_components(_filled(suspect), min_area), frame)


def adjusted_similarity(
    similarity: Similarity, classes: Labels | None, weights: npt.NDArray[np.float64] | None
) -> npt.NDArray[np.float64]:
    """``clip(w_k D, 0, 1)`` (Eq. 9) in float64, for arrays of any one shape; D itself without weights."""
    adjusted = similarity.astype(np.float64)
    if classes is None or weights is None:
        return adjusted
    adjusted *= weights[classes]
    return np.clip(adjusted, 0, 1, out=adjusted)


def valid(image: npt.NDArray[Any], frame: int) -> npt.NDArray[Any]:
    """The pixels of an ``(H, W)`` image that have a similarity: all but a frame of the given width."""
    return image[frame : image.shape[0] - frame, frame : image.shape[1] - frame]


def _filled(binary: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Fill what an 8-connected path of zeros does not join to the border (``binary_fill_holes`` with 3x3 ones)."""
    _, components, stats, _ = cv2.connectedComponentsWithStats(1 - binary, connectivity=8)
    height, width = binary.shape
    left, top = stats[:, cv2.CC_STAT_LEFT], stats[:, cv2.CC_STAT_TOP]
    right, bottom = left + stats[:, cv2.CC_STAT_WIDTH], top + stats[:, cv2.CC_STAT_HEIGHT]
    filled = (left > 0) & (top > 0) & (right < width) & (bottom < height)
    filled[0] = True
    return np.asarray(filled.astype(np.uint8)[components])


def _without_small_components(binary: npt.NDArray[Any], min_area: int) -> Mask:
    _, components, stats, _ = cv2.connectedComponentsWithStats(binary, connectivity=8)
    kept = stats[:, cv2.CC_STAT_AREA] > min_area
    kept[0] = False
    return np.asarray(kept[components])
