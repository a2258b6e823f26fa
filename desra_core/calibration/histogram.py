"""The distribution of the similarity D in each class over artifact-free pairs, and the weights that follow from it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from decimal import ROUND_FLOOR, Decimal
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from desra_core.detection.class_weights import INTERVAL_BINS
from desra_core.detection.mask import Similarity
from desra_core.images.codec import CLASS_COUNT, Labels, Mask
from desra_core.images.parts import row_strips
from desra_core.settings.models import PERCENTILE, RATE

# Each of the 20 bins of the published rule is 500 of these.
BINS = 10_000

HISTOGRAM = pa.schema([("class", pa.int16()), ("bin", pa.int16()), ("count", pa.int64())])

_ABOUT = b"desra.histogram"
_BITS_OF_FLOAT32 = 24


class ClassHistogram(NamedTuple):
    """Counts of the pixels of each class by their D, in 10,000 equal bins of 0..1; D = 1 counts to the last bin.

    Histograms of parts of a corpus add up to that of the whole (`merged`).
    """

    counts: npt.NDArray[np.int64]  # (K, 10000), where K is 150, or 1 for all classes together
    images: npt.NDArray[np.int64]  # (K,) images with a pixel of the class
    seen: int  # images
    excluded: int  # pixels that were left out

    @property
    def pixels(self) -> npt.NDArray[np.int64]:
        """``(K,)`` pixels of each class."""
        return np.asarray(self.counts.sum(axis=1))

    def pooled(self) -> ClassHistogram:
        """Add up all classes to one."""
        return ClassHistogram(self.counts.sum(axis=0, keepdims=True), np.array([self.seen]), self.seen, self.excluded)

    def to_table(self) -> pa.Table:
        """Return the bins that are not empty, as rows of the schema `HISTOGRAM`."""
        classes, bins = np.nonzero(self.counts)
        about = {"images": self.images.tolist(), "seen": self.seen, "excluded": self.excluded}
        schema = HISTOGRAM.with_metadata({_ABOUT: json.dumps(about)})
        return pa.table([classes, bins, self.counts[classes, bins]], schema=schema)


def merged(tables: Iterable[pa.Table]) -> ClassHistogram:
    """Add up histograms that were made into tables (raises `ValueError` for other tables)."""
    counts, images = np.zeros((CLASS_COUNT, BINS), np.int64), np.zeros(CLASS_COUNT, np.int64)
    seen = excluded = 0
    for table in tables:
        classes, bins, count = (table[name].to_numpy() for name in HISTOGRAM.names)
        try:
            about = json.loads(table.schema.metadata[_ABOUT])
            counts[classes, bins] += count  # a bin has one row
            images += np.array(about["images"])
            seen, excluded = seen + about["seen"], excluded + about["excluded"]
        except (LookupError, TypeError) as error:
            raise ValueError(f"is no histogram of similarity by class: {error}") from error
    return ClassHistogram(counts, images, seen, excluded)


def count_image(similarity: Similarity, labels: Labels, exclude: Mask | None = None) -> ClassHistogram:
    """Count the pixels of an image.

    ``floor(10000 * D)`` in float64 is exact for every float32 D. Divided by 500 and rounded down, it is exactly the
    ``floor(20 * D)`` of the published rule.

    Args:
        similarity: ``(h, w)`` float32, D in 0..1.
        labels: ``(h, w)`` uint8, the class index 0..149.
        exclude: ``(h, w)`` bool, True where not to count.

    Raises:
        ValueError: D is no float32 or not finite.
    """
    if np.finfo(similarity.dtype).nmant >= _BITS_OF_FLOAT32:
        raise ValueError(f"similarity of dtype {similarity.dtype} has more bits than the bins separate; give float32")
    flat = np.zeros(CLASS_COUNT * BINS, np.int64)
    for rows in row_strips(similarity.shape):
        values = similarity[rows].astype(np.float64)
        if not np.isfinite(values).all():
            raise ValueError("similarity is not finite")
        bins = np.clip(np.floor(BINS * values), 0, BINS - 1).astype(np.int64)
        bins += BINS * labels[rows].astype(np.int64)
        kept = bins.ravel() if exclude is None else bins[~exclude[rows]]
        flat += np.bincount(kept, minlength=flat.size)
    counts = flat.reshape(CLASS_COUNT, BINS)
    excluded = 0 if exclude is None else int(np.count_nonzero(exclude))
    return ClassHistogram(counts, np.asarray(counts.any(axis=1), np.int64), 1, excluded)


def published_intervals(histogram: ClassHistogram, percentile: float = PERCENTILE) -> npt.NDArray[np.int64]:
    """Derive the ``interval_k`` of Eq. 9 by the authors' comment; -1 for classes without pixels.

    D is cut into 20 bins; from the top, bins are counted until they hold strictly more than ``percentile`` % of the
    pixels of the class. The interval is that count less one.
    """
    counts = histogram.counts.reshape(len(histogram.counts), INTERVAL_BINS, -1).sum(axis=2)
    return np.where(histogram.pixels > 0, _bins_held(counts, percentile) - 1, -1)


def quantile_weights(histogram: ClassHistogram, percentile: float = PERCENTILE) -> npt.NDArray[np.float64]:
    """Derive ``1 / q``, the weight that lifts the quantile q of D to 1; NaN for classes without pixels.

    q is the lower edge of the bin at which the bins from the top hold more than ``percentile`` % of the pixels of the
    class. So more than that share is lifted to 1, and q lies at most 0.0001 below the exact quantile.
    """
    # D of 8 or 16 bits is above 0.003; the first bin would have no finite weight.
    lower = np.maximum(BINS - _bins_held(histogram.counts, percentile), 1)
    return np.where(histogram.pixels > 0, BINS / lower, np.nan)


def false_alarm_threshold(
    histogram: ClassHistogram, weights: npt.NDArray[np.float64], rate: float = RATE
) -> float | None:
    """Find the highest threshold with at most a given share of artifact-free pixels below it, before any morphology.

    Args:
        histogram: Over artifact-free pairs.
        weights: ``(K,)`` by class.
        rate: The share of all pixels, 0..1, whose adjusted similarity ``clip(w_k D, 0, 1)`` may be below.

    Returns:
        The threshold, 0..1, rounded down to four decimals. A bin counts as below as soon as its lower edge is, so the
        result is below the exact threshold by at most a bin's width times the weight, before rounding. None without
        pixels, or where no threshold above 0 exists.
    """
    if not histogram.pixels.any():
        return None
    classes, bins = np.nonzero(histogram.counts)
    adjusted = _lower_edges(weights)[classes, bins]
    order = np.argsort(adjusted, kind="stable")
    reached = np.cumsum(histogram.counts[classes, bins][order])
    allowed = _share_of(rate, int(reached[-1]))
    first_above = int(np.searchsorted(reached, allowed, side="right"))
    exact = 1.0 if first_above == len(order) else float(adjusted[order[first_above]])
    return float(Decimal(repr(exact)).quantize(Decimal("0.0001"), ROUND_FLOOR)) or None


def false_alarm_rate(histogram: ClassHistogram, weights: npt.NDArray[np.float64], threshold: float) -> float | None:
    """Bound the share of artifact-free pixels whose adjusted similarity is below a threshold, before any morphology.

    The bound exceeds the exact share by at most the pixels of the bins around the threshold. None without pixels.
    """
    pixels = int(histogram.pixels.sum())
    below = int(histogram.counts[_lower_edges(weights) < threshold].sum())
    return below / pixels if pixels else None


def _bins_held(counts: npt.NDArray[np.int64], percentile: float) -> npt.NDArray[np.int64]:
    """Count the bins, from the top, that hold more than a percentile of each row of ``(K, bins)``."""
    from_top = np.cumsum(counts[:, ::-1], axis=1)
    most = [_share_of(percentile / 100, int(total)) for total in from_top[:, -1]]
    return np.asarray((from_top <= np.array(most)[:, np.newaxis]).sum(axis=1) + 1)


def _share_of(share: float, total: int) -> int:
    """Round a share of a total down, exactly by the decimals of the share."""
    return int(Fraction(f"{share:.12g}") * total)


def _lower_edges(weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Compute the least adjusted similarity of a pixel in each bin, ``(K, 10000)``."""
    return np.clip(weights[:, np.newaxis] * (np.arange(BINS) / BINS), 0, 1)
