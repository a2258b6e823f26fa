"""Judge score maps without a threshold: the precision/recall curve over pixels, and the order of regions.

A pixel counts in the bin of its score. A bin holds the float32 numbers that share their sign, their exponent and the
first 11 bits of their fraction, so that the scores in it differ by less than 0.05 %. So the pixels of any number of
images take 40 MB, and the error that the bins can make is known: none where all scores of a bin are equal.
"""

import io
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from desra_core.detection.mask import Components
from desra_core.errors import UsageError
from desra_core.files import read_bytes
from desra_core.images.codec import Mask

# The lowest bits of a float32, by which the scores in a bin differ.
_DROPPED = 12
_BINS = 2 ** (32 - _DROPPED)

Counts = npt.NDArray[np.int64]


class AveragePrecision(NamedTuple):
    """The area under a precision/recall curve, summed in steps, and how far the exact area may be from it."""

    value: float
    error: float


class ScoreHistogram(NamedTuple):
    """Pixels by bin of their score: ``(2 ** 20,)`` each, ascending."""

    marked: Counts  # in regions of the ground truth that count
    ignored: Counts  # in its other regions
    others: Counts  # outside of the ground truth
    lowest: Counts  # the lowest score of the bin, as its place in the bin
    highest: Counts

    def average_precision(self, *, prominent: bool = False) -> AveragePrecision | None:
        """Compute the average precision over all pixels; None where no pixel is marked.

        With ``prominent``, ignored pixels are left out; else they are marked as well.
        """
        marked = (self.marked if prominent else self.marked + self.ignored)[::-1]
        used = np.flatnonzero(marked)  # only at these does recall rise
        if not used.size:
            return None
        found, false = (np.cumsum(pixels)[used].astype(np.float64) for pixels in (marked, self.others[::-1]))
        here, wrong_here = marked[used], self.others[::-1][used]
        steps, precision = here / found[-1], found / (found + false)
        # In a bin, precision lies between those of all its other pixels first, and of all its marked pixels first.
        several = (self.lowest < self.highest)[::-1][used]
        least, most = (found - here + 1) / (found - here + 1 + false), found / (found + false - wrong_here)
        errors = (float(np.sum((steps * away)[several])) for away in (precision - least, most - precision))
        return AveragePrecision(float(np.sum(steps * precision)), max(errors))

    def encoded(self) -> bytes:
        """Encode the bins that hold a pixel as the content of an ``.npz`` file."""
        used = np.flatnonzero(self.marked + self.ignored + self.others)
        content = io.BytesIO()
        np.savez_compressed(content, bins=used, columns=np.stack(self)[:, used])
        return content.getvalue()


def count_scores(scores: npt.NDArray[np.floating[Any]], ground_truth: Mask, ignored: Mask | None) -> ScoreHistogram:
    """Count pixels by their score.

    Args:
        scores: ``(H, W)``, larger where a pixel is worse; minus infinity where there is no score.
        ground_truth: ``(H, W)`` bool.
        ignored: ``(H, W)`` bool, the part of the ground truth that is ignored, or None.
    """
    bits = (scores + 0.0).astype(np.float32).view(np.uint32)  # the sum turns -0 into 0
    # As whole numbers, these have the order of the scores.
    bins, places = np.divmod(np.where(bits >> 31, ~bits, bits | 2**31), 2**_DROPPED)
    left = ground_truth if ignored is None else ground_truth & ~ignored
    marked, ignored_pixels, others = (
        np.bincount(bins[part], minlength=_BINS) for part in (left, ground_truth & ~left, ~ground_truth)
    )
    lowest, highest = np.full(_BINS, 2**_DROPPED), np.full(_BINS, -1)
    np.minimum.at(lowest, bins, places)
    np.maximum.at(highest, bins, places)
    return ScoreHistogram(marked, ignored_pixels, others, lowest, highest)


def pooled_histogram(paths: Iterable[Path]) -> ScoreHistogram:
    """Add up the histograms of files (raises `UsageError`: a file is damaged)."""
    counts, lowest, highest = np.zeros((3, _BINS), np.int64), np.full(_BINS, 2**_DROPPED), np.full(_BINS, -1)
    for path in paths:
        try:
            with np.load(io.BytesIO(read_bytes(path)), allow_pickle=False) as content:
                bins, columns = content["bins"], content["columns"]
                counts[:, bins] += columns[:3]
                lowest[bins] = np.minimum(lowest[bins], columns[3])
                highest[bins] = np.maximum(highest[bins], columns[4])
        except (ValueError, LookupError, TypeError, OSError, EOFError, zipfile.BadZipFile):
            raise UsageError(path, "is damaged", "delete it, and run desra benchmark again") from None
    return ScoreHistogram(counts[0], counts[1], counts[2], lowest, highest)


def region_means(scores: npt.NDArray[np.floating[Any]], regions: Components) -> list[float | None]:
    """Average the ``(H, W)`` scores in each region, without minus infinity; None where a region has no score."""
    total, pixels = np.zeros(len(regions)), np.zeros(len(regions))
    for rows, inside, numbers in regions.strips():
        values = scores[rows][inside]
        known = np.isfinite(values)
        total += np.bincount(numbers[known], values[known], len(regions))
        pixels += np.bincount(numbers[known], minlength=len(regions))
    return [float(each / of) if of else None for each, of in zip(total, pixels, strict=True)]


def ranks(values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Rank ``(N,)`` values from 1, the smallest, to N; equal values share the mean of their ranks."""
    _, places, counts = np.unique(np.asarray(values, np.float64), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[places])


def rank_correlation(one: npt.ArrayLike, other: npt.ArrayLike) -> float | None:
    """Correlate the ranks of two lists of values (Spearman 1904); None where one of them has fewer than two values."""
    first, second = (ranks(values) - (np.size(values) + 1) / 2 for values in (one, other))
    scale = float(np.sqrt(np.sum(first**2) * np.sum(second**2)))
    return float(np.sum(first * second)) / scale if scale else None
