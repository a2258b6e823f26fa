"""How well masks agree with a person's: the measures of the DeSRA paper, counted per image and pooled over a set.

A region of one mask is *covered* by the other where at least half of its pixels lie in it. Detected regions that the
ground truth covers are right (precision); ground-truth regions that the mask covers are found (recall).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from operator import add

from desra_core.detection.regions import Components
from desra_core.images.codec import Mask


@dataclass(frozen=True)
class Agreement:
    """What two masks of one image have in common, or the sums over several images.

    Attributes
    ----------
    intersection, union
        Pixels.
    detected, right
        Regions of the mask; those of them that the ground truth covers.
    marked, found
        Regions of the ground truth; those of them that the mask covers.
    mask_pixels, ground_truth_pixels
        Marked pixels of each.
    """

    intersection: int = 0
    union: int = 0
    detected: int = 0
    right: int = 0
    marked: int = 0
    found: int = 0
    mask_pixels: int = 0
    ground_truth_pixels: int = 0

    @property
    def empty(self) -> bool:
        """Whether neither mask has a pixel: agreement, for which the published IoU is undefined."""
        return self.union == 0

    @property
    def iou(self) -> float | None:
        """Intersection over union; None where both are empty."""
        return _ratio(self.intersection, self.union)

    @property
    def precision(self) -> float | None:
        """Share of the detected regions that are right; None without any."""
        return _ratio(self.right, self.detected)

    @property
    def recall(self) -> float | None:
        """Share of the ground-truth regions that were found; None without any."""
        return _ratio(self.found, self.marked)

    @property
    def pixel_precision(self) -> float | None:
        """Share of the mask's pixels that lie in the ground truth; None without any."""
        return _ratio(self.intersection, self.mask_pixels)

    @property
    def pixel_recall(self) -> float | None:
        """Share of the ground truth's pixels that lie in the mask; None without any."""
        return _ratio(self.intersection, self.ground_truth_pixels)

    @property
    def f1(self) -> float | None:
        """Harmonic mean of precision and recall; None where one is undefined, 0 where both are 0."""
        return harmonic_mean(self.precision, self.recall)


def compare_masks(mask: Mask, ground_truth: Mask) -> Agreement:
    """Count what a mask and a ground truth have in common.

    Parameters
    ----------
    mask, ground_truth
        ``(H, W)`` bool, of one shape; 8-connected components are the regions. The published scripts take the valid
        region only: crop both by 5 px.

    Raises
    ------
    ValueError
        The shapes differ.
    """
    detected, marked = Components(mask).covered(ground_truth), Components(ground_truth).covered(mask)
    return Agreement(
        intersection=int((mask & ground_truth).sum()),
        union=int((mask | ground_truth).sum()),
        detected=len(detected),
        right=int(detected.sum()),
        marked=len(marked),
        found=int(marked.sum()),
        mask_pixels=int(mask.sum()),
        ground_truth_pixels=int(ground_truth.sum()),
    )


def pooled(agreements: Iterable[Agreement]) -> Agreement:
    """The sums over several images, whose precision and recall are the published ones of a set."""
    rows = [tuple(agreement.__dict__.values()) for agreement in agreements]
    return Agreement(*(sum(column) for column in zip(*rows, strict=True)))


def mean_iou(agreements: Iterable[Agreement], *, empty: float | None = None) -> float | None:
    """The mean IoU over images; None without any.

    Parameters
    ----------
    agreements
        One per image.
    empty
        What counts for an image in which both masks are empty. The published mean is undefined with such images, so
        by default they are left out; 1 counts them as agreement.
    """
    values = [empty if agreement.iou is None else agreement.iou for agreement in agreements]
    defined = [value for value in values if value is not None]
    # Added one after the other, as the published script does: sum() rounds otherwise from Python 3.12 on.
    return reduce(add, defined) / len(defined) if defined else None


def harmonic_mean(precision: float | None, recall: float | None) -> float | None:
    """F1 of a precision and a recall; None where one is undefined, 0 where both are 0."""
    if precision is None or recall is None:
        return None
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
