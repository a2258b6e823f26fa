"""The measures of a set of masks, with their intervals, and why one of them is undefined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from desra_core.evaluation.bootstrap import Interval, bootstrap_intervals
from desra_core.evaluation.metrics import Agreement, mean_iou, pooled


@dataclass(frozen=True)
class MaskScores:
    """How well a set of masks agrees with its ground truth.

    Attributes
    ----------
    images, empty_pairs
        How many there are, and in how many of them neither mask has a pixel.
    iou
        The published mean over images; those whose masks are both empty, where it is undefined, are left out. None
        without others.
    iou_with_empty
        The mean over all images, in which two empty masks count as agreement: 1.
    total
        The sums over the images, whose precision, recall and F1 are those of the set.
    intervals
        95 % by measure (`desra_core.evaluation.bootstrap.MEASURES`); None where there is none.
    """

    images: int
    empty_pairs: int
    iou: float | None
    iou_with_empty: float | None
    total: Agreement
    intervals: dict[str, Interval | None]

    @property
    def precision(self) -> float | None:
        """Share of the detected regions that are right."""
        return self.total.precision

    @property
    def recall(self) -> float | None:
        """Share of the ground-truth regions that were found."""
        return self.total.recall

    @property
    def f1(self) -> float | None:
        """Harmonic mean of the two."""
        return self.total.f1

    @property
    def values(self) -> dict[str, float | None]:
        """The measures by name."""
        return {"iou": self.iou, "iou_with_empty": self.iou_with_empty, "precision": self.precision,
                "recall": self.recall, "f1": self.f1}  # fmt: skip

    @property
    def undefined(self) -> dict[str, str]:
        """Why a measure has no value, by its name."""
        reasons = {
            "iou": "no mask and no ground truth marks anything",
            "iou_with_empty": "there is no image",
            "precision": "no region was detected",
            "recall": "the ground truth marks no region",
            "f1": "precision or recall is undefined",
        }
        return {measure: reasons[measure] for measure, value in self.values.items() if value is None}


def score_masks(agreements: Sequence[Agreement]) -> MaskScores:
    """Add up the agreements of some images, in the order in which the mean is to be taken."""
    return MaskScores(
        images=len(agreements),
        empty_pairs=sum(agreement.empty for agreement in agreements),
        iou=mean_iou(agreements),
        iou_with_empty=mean_iou(agreements, empty=1.0),
        total=pooled(agreements) if agreements else Agreement(),
        intervals=bootstrap_intervals(agreements),
    )
