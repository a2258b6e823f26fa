"""How sure the measures of a set of images are: percentile intervals by the bootstrap over images (Efron 1979)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from desra_core.evaluation.metrics import Agreement

MEASURES = ("iou", "iou_with_empty", "precision", "recall", "f1")
CONFIDENCE = 0.95
RESAMPLES = 2000
SEED = 0

# Draws at a time, so that memory stays small for any number of images.
_DRAWS = 2**22

Interval = tuple[float, float]


def bootstrap_intervals(
    agreements: Sequence[Agreement],
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = SEED,
) -> dict[str, Interval | None]:
    """Bound the measures of a set of images, of which others might have been chosen.

    So many sets of as many images are drawn with replacement, and all measures taken of each: IoU as the mean over the
    images where it is defined, and with 1 for those where both masks are empty, precision and recall pooled.

    Parameters
    ----------
    agreements
        One per image.
    resamples
        How many sets.
    confidence
        The share of them between the bounds, in 0..1.
    seed
        Equal ones give equal bounds.

    Returns
    -------
    Lower and upper bound by measure, within 0..1. None where the measure is undefined or rests on one image alone: then
    nothing is known of others. Sets in which a measure is undefined are left out.
    """
    images = len(agreements)
    if images < 2:
        return dict.fromkeys(MEASURES)
    columns = np.array([_columns(agreement) for agreement in agreements], np.float64)
    draws = np.random.default_rng(seed)
    found = [
        _measures(_sums(_times_drawn(draws, images, count), columns))
        for count in _batches(resamples, max(1, _DRAWS // images))
    ]
    values = np.concatenate(found, axis=1)
    tail = (1 - confidence) / 2
    defined, detected, marked = np.count_nonzero(columns[:, [1, 4, 6]], axis=0)
    rests_on = (defined, images, detected, marked, min(detected, marked))
    return {
        measure: _bounds(row[np.isfinite(row)], tail) if support > 1 else None
        for measure, row, support in zip(MEASURES, values, rests_on, strict=True)
    }


def _columns(agreement: Agreement) -> tuple[float, ...]:
    return (agreement.iou or 0, not agreement.empty, agreement.empty, agreement.right, agreement.detected,
            agreement.found, agreement.marked)  # fmt: skip


def _batches(total: int, size: int) -> list[int]:
    return [min(size, total - start) for start in range(0, total, size)]


def _times_drawn(draws: np.random.Generator, images: int, count: int) -> npt.NDArray[np.float64]:
    """``(count, images)``, how often each image is in each set."""
    chosen = draws.integers(images, size=(count, images)) + images * np.arange(count)[:, np.newaxis]
    return np.bincount(chosen.ravel(), minlength=count * images).reshape(count, images).astype(np.float64)


def _sums(times: npt.NDArray[np.float64], columns: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """``(count, 7)``, the sums over each set."""
    sums = times @ columns
    # All others are whole numbers; this one a matrix product would round by the size of the batch.
    sums[:, 0] = (times * columns[:, 0]).sum(axis=1)
    return np.asarray(sums)


def _measures(sums: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """``(5, count)``, in the order of `MEASURES`, from the sums over each set; NaN where undefined."""
    iou, defined, empty, right, detected, found, marked = sums.T
    with np.errstate(divide="ignore", invalid="ignore"):
        precision, recall = right / detected, found / marked
        # 2 / (1/p + 1/r) is 0 where one of them is 0; so is F1 where both are.
        f1 = 2 / (1 / precision + 1 / recall)
        return np.stack([iou / defined, (iou + empty) / (defined + empty), precision, recall, f1])


def _bounds(values: npt.NDArray[np.float64], tail: float) -> Interval | None:
    if not values.size:
        return None
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)
