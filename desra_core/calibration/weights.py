"""Derive class weights from the distribution of D in each class over artifact-free pairs, and write them to files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from decimal import ROUND_FLOOR, Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from desra_core.detection import class_weights
from desra_core.detection.mask import Similarity
from desra_core.errors import UsageError, printable
from desra_core.evaluation.table import as_csv, as_toml
from desra_core.files import replace_file
from desra_core.images.codec import CLASS_COUNT, Labels, Mask
from desra_core.images.parts import row_strips
from desra_core.settings.models import MIN_IMAGES, MIN_PIXELS, PERCENTILE, RATE, Fallback, Rule

# The published rule has 20 bins; each of them is 500 of these.
BINS = 10_000

HISTOGRAM = pa.schema([("class", pa.int16()), ("bin", pa.int16()), ("count", pa.int64())])

_ABOUT = b"desra.histogram"
_BITS_OF_FLOAT32 = 24


class ClassHistogram(NamedTuple):
    """Counts of the pixels of each class by their D, in 10,000 equal bins of 0..1; D = 1 belongs to the last bin.

    Histograms of parts of a corpus add up to that of the whole (`merged`).
    """

    counts: npt.NDArray[np.int64]  # (K, 10000), where K is 150, or 1 for all classes together
    images: npt.NDArray[np.int64]  # (K,) images with a pixel of the class
    seen: int  # number of images that were counted
    excluded: int  # number of pixels that were left out

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


def merged(tables: Iterable[pa.Table], source: object = "histogram") -> ClassHistogram:
    """Add up tables of `ClassHistogram.to_table` (raises `UsageError` about ``source`` for any other table)."""
    counts, images = np.zeros((CLASS_COUNT, BINS), np.int64), np.zeros(CLASS_COUNT, np.int64)
    seen = excluded = 0
    for table in tables:
        classes, bins, count = (table[name].to_numpy() for name in HISTOGRAM.names)
        try:
            about = json.loads(table.schema.metadata[_ABOUT])
            counts[classes, bins] += count  # a bin has one row
            images += np.array(about["images"])
            seen, excluded = seen + about["seen"], excluded + about["excluded"]
        except (LookupError, TypeError, ValueError) as error:
            reason = f"is no histogram of similarity by class: {error}"
            raise UsageError(source, reason, "delete it: the next run makes it anew") from None
    return ClassHistogram(counts, images, seen, excluded)


def count_image(similarity: Similarity, labels: Labels, exclude: Mask | None = None) -> ClassHistogram:
    """Count the pixels of an image by class and bin of D.

    ``floor(10000 * D)`` in float64 is exact for every float32 D. Divided by 500 and rounded down, it is exactly the
    ``floor(20 * D)`` of the published rule.

    Args:
        similarity: ``(h, w)`` float32, D in 0..1.
        labels: ``(h, w)`` uint8, the class index 0..149.
        exclude: ``(h, w)`` bool, True where not to count.

    Raises:
        ValueError: D has more bits than float32, or is not finite.
    """
    if np.finfo(similarity.dtype).nmant + 1 > _BITS_OF_FLOAT32:
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
    """Derive the ``interval_k`` of Eq. 9 by the rule in the authors' comment; -1 for classes without pixels.

    D is cut into 20 bins. Bins are counted from the top until they hold strictly more than ``percentile`` % of the
    pixels of the class. The interval is that count minus one.
    """
    counts = histogram.counts.reshape(len(histogram.counts), class_weights.INTERVAL_BINS, -1).sum(axis=2)
    return np.where(histogram.pixels > 0, _bins_held(counts, percentile) - 1, -1)


def quantile_weights(histogram: ClassHistogram, percentile: float = PERCENTILE) -> npt.NDArray[np.float64]:
    """Derive ``1 / q``, the weight that lifts the quantile q of D to 1; NaN for classes without pixels.

    From the top, q is the lower edge of the first bin with which the bins hold more than ``percentile`` % of the pixels
    of the class. So more than that share is lifted to 1, and q lies at most 0.0001 below the exact quantile.
    """
    # The first bin would give an infinite weight. D of images is above 0.003, beyond that bin.
    lower = np.maximum(BINS - _bins_held(histogram.counts, percentile), 1)
    return np.where(histogram.pixels > 0, BINS / lower, np.nan)


def false_alarm_threshold(
    histogram: ClassHistogram, weights: npt.NDArray[np.float64], rate: float = RATE
) -> float | None:
    """Find the highest threshold below which at most a given share of artifact-free pixels lies, before morphology.

    Args:
        histogram: Over artifact-free pairs.
        weights: ``(K,)`` by class.
        rate: The share of all pixels, 0..1, whose adjusted similarity ``clip(w_k D, 0, 1)`` may be below.

    Returns:
        The threshold, 0..1, rounded down to four decimals; None without pixels, or where it is rounded down to 0. All
        pixels of a bin count as at its lower edge, so the threshold may be too low by a bin's width times the weight.
    """
    if not histogram.pixels.any():
        return None
    classes, bins = np.nonzero(histogram.counts)
    adjusted = _lower_edges(weights)[classes, bins]
    order = np.argsort(adjusted, kind="stable")  # from the lowest bin of any class to the highest
    pixels_up_to = np.cumsum(histogram.counts[classes, bins][order])
    allowed = int(Fraction(str(rate)) * int(pixels_up_to[-1]))
    # The threshold is the edge of the first bin whose pixels are too many to lie below.
    too_many = int(np.searchsorted(pixels_up_to, allowed, side="right"))
    exact = 1.0 if too_many == len(order) else float(adjusted[order[too_many]])
    return float(Decimal(repr(exact)).quantize(Decimal("0.0001"), ROUND_FLOOR)) or None


def false_alarm_rate(histogram: ClassHistogram, weights: npt.NDArray[np.float64], threshold: float) -> float | None:
    """Bound the share of artifact-free pixels whose adjusted similarity is below a threshold, before any morphology.

    The bound exceeds the exact share by at most the pixels of the bins around the threshold. None without pixels.
    """
    pixels = int(histogram.pixels.sum())
    below = int(histogram.counts[_lower_edges(weights) < threshold].sum())
    return below / pixels if pixels else None


class ClassWeight(NamedTuple):
    """The weight of a class."""

    class_index: int
    name: str
    interval: int | None  # of Eq. 9; None where the weight does not follow from an interval
    weight: float  # the fallback's for a thin class (too few pixels or images) and for an unseen class (no pixel)
    pixels: int
    images: int
    state: Literal["calibrated", "thin", "unseen"]
    published_interval: int
    published_weight: float


class Suggestion(NamedTuple):
    """Thresholds below which the rate of artifact-free pixels lies: with the derived and with the published weights."""

    rate: float
    threshold: float | None
    published_threshold: float | None


class CalibratedWeights(NamedTuple):
    """The weight of each class, with the counts and settings that it follows from."""

    rows: list[ClassWeight]
    histogram: ClassHistogram
    suggested: Suggestion
    below: tuple[float, float]  # share of the pixels below the default threshold, with these and with published weights
    origin: dict[str, Any]  # facts about the calibration, for people to read


def derive_weights(
    histogram: ClassHistogram,
    *,
    rule: Rule = "published",
    percentile: float = PERCENTILE,
    min_pixels: int = MIN_PIXELS,
    min_images: int = MIN_IMAGES,
    fallback: Fallback = "published",
) -> list[ClassWeight]:
    """Derive the weight of each class from the distribution of its similarity.

    Args:
        histogram: Of 150 classes, over artifact-free pairs.
        rule: 20 bins as published (`published_intervals`), or the continuous quantile (`quantile_weights`).
        percentile: Share of a class's pixels that its weight is to lift to 1, in percent.
        min_pixels, min_images: A class with fewer is thin.
        fallback: The weight of thin and unseen classes: ``published``; ``one`` (interval 0); or ``pooled``, by the rule
            from all classes taken together, and published where there is no pixel at all.
    """
    published = class_weights.published_table()
    published_weights = class_weights.interval_weights(published)
    intervals, weights = _by_rule(histogram, rule, percentile)
    spare_intervals, spare_weights = published, published_weights
    if fallback == "one":
        spare_intervals, spare_weights = np.zeros_like(published), np.ones(len(published))
    elif fallback == "pooled" and histogram.pixels.any():
        pooled = _by_rule(histogram.pooled(), rule, percentile)
        spare_intervals, spare_weights = (np.full(len(published), values[0]) for values in pooled)
    enough = (histogram.pixels >= max(1, min_pixels)) & (histogram.images >= min_images)
    intervals, weights = np.where(enough, intervals, spare_intervals), np.where(enough, weights, spare_weights)
    states = np.where(enough, "calibrated", np.where(histogram.pixels > 0, "thin", "unseen"))
    columns = (weights, histogram.pixels, histogram.images, states, published, published_weights)
    rows = zip(class_weights.class_names(), intervals.tolist(), *(column.tolist() for column in columns), strict=True)
    return [
        ClassWeight(index, name, interval if interval >= 0 else None, *rest)
        for index, (name, interval, *rest) in enumerate(rows)
    ]


def suggest(
    histogram: ClassHistogram, ours: npt.NDArray[np.float64], published: npt.NDArray[np.float64], rate: float
) -> Suggestion:
    """Find the thresholds for a false-alarm rate in 0..1, with each of two sets of weights, ``(150,)``."""
    return Suggestion(rate, *(false_alarm_threshold(histogram, weights, rate) for weights in (ours, published)))


def weight_values(rows: Iterable[ClassWeight]) -> npt.NDArray[np.float64]:
    """Collect the weights, ``(150,)``, as `load_weights` reads them from the file."""
    return np.array([row.weight for row in rows])


def largest_differences(rows: Iterable[ClassWeight], count: int) -> list[ClassWeight]:
    """Choose the calibrated classes whose weights differ most, by ratio, from the published ones."""
    changed = [row for row in rows if row.state == "calibrated" and row.weight != row.published_weight]
    return sorted(changed, key=lambda row: (-abs(np.log(row.weight / row.published_weight)), row.class_index))[:count]


def write_weights(calibrated: CalibratedWeights, path: Path) -> None:
    """Write the weights as TOML with their origin, or as CSV, by the suffix (raises `TransientError`)."""
    about = {"origin": calibrated.origin, "suggestion": calibrated.suggested._asdict()}
    csv_file = path.suffix.lower() == ".csv"
    replace_file(path, to_csv(calibrated.rows) if csv_file else to_toml(calibrated.rows, about))


def to_toml(rows: Sequence[ClassWeight], about: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Encode a weights file with its origin: the tables of ``about`` (texts and numbers) come first."""
    lines = ["# Class weights of desra calibrate, for --weights of desra detect and desra mine.",
             f"version = {class_weights.WEIGHTS_VERSION}"]  # fmt: skip
    for name, content in about.items():
        lines += ["", f"[{name}]", *_assignments(content)]
    for row in rows:
        value = {"weight": row.weight} if row.interval is None else {"interval": row.interval}
        table = {"index": row.class_index, "name": row.name} | value | {"pixels": row.pixels, "images": row.images}
        table["source"] = "calibrated" if row.state == "calibrated" else "fallback"
        lines += ["", "[[class]]", *_assignments(table)]
    return ("\n".join(lines) + "\n").encode()


def to_csv(rows: Sequence[ClassWeight]) -> bytes:
    """Encode the table that ``--weights`` reads too: intervals if all classes have one, else weights."""
    column = "weight" if any(row.interval is None for row in rows) else "interval"
    table = ({"ade20k_index": row.class_index, "name": row.name, column: getattr(row, column)} for row in rows)
    return as_csv(table, ["ade20k_index", "name", column]).encode()


def _bins_held(counts: npt.NDArray[np.int64], percentile: float) -> npt.NDArray[np.int64]:
    """Count bins from the top of each row of ``(K, bins)`` until they hold more than ``percentile`` % of the row."""
    from_top = np.cumsum(counts[:, ::-1], axis=1)
    share = Fraction(str(percentile)) / 100
    most = [int(share * int(total)) for total in from_top[:, -1]]
    return np.asarray((from_top <= np.array(most)[:, np.newaxis]).sum(axis=1) + 1)


def _lower_edges(weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Compute the least adjusted similarity of a pixel in each bin, ``(K, 10000)``."""
    return np.clip(weights[:, np.newaxis] * (np.arange(BINS) / BINS), 0, 1)


def _by_rule(
    histogram: ClassHistogram, rule: Rule, percentile: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Derive intervals and weights; the interval is -1 where the weight does not follow from one."""
    if rule == "quantile":
        return np.full(len(histogram.counts), -1), quantile_weights(histogram, percentile)
    intervals = published_intervals(histogram, percentile)
    return intervals, class_weights.interval_weights(intervals)


def _assignments(table: Mapping[str, Any]) -> list[str]:
    return as_toml({name: printable(value) if isinstance(value, str) else value for name, value in table.items()})
