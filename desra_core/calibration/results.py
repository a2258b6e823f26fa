"""Calibrated class weights: derived from a histogram, compared with the published ones, and written as a file."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from desra_core import __version__
from desra_core.calibration.counting import Counting
from desra_core.calibration.histogram import (
    ClassHistogram,
    false_alarm_rate,
    false_alarm_threshold,
    published_intervals,
    quantile_weights,
)
from desra_core.detection import class_weights
from desra_core.detection.mask import THRESHOLD
from desra_core.errors import UsageError, printable
from desra_core.evaluation.table import as_csv
from desra_core.files.content import content_key, replace_file
from desra_core.settings import CorpusSettings, Mining
from desra_core.settings.models import MIN_IMAGES, MIN_PIXELS, PERCENTILE, Calibrating, Fallback, Rule

_RULE = {"rule", "percentile", "min_pixels", "min_images", "fallback"}
RATES = (0.1, 0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001)


class ClassWeight(NamedTuple):
    """The weight of a class; ``interval`` is that of Eq. 9, or None where the weight does not follow from one.

    A class with too few pixels or images is ``thin``, and a class without any is ``unseen``: both have the fallback's
    weight.
    """

    class_index: int
    name: str
    interval: int | None
    weight: float
    pixels: int
    images: int
    state: Literal["calibrated", "thin", "unseen"]
    published_interval: int
    published_weight: float


class Suggestion(NamedTuple):
    """Thresholds below which a share of artifact-free pixels lies: with the derived and with the published weights."""

    rate: float
    threshold: float | None
    published_threshold: float | None


class CalibratedWeights(NamedTuple):
    """The weight of each class, with the counts and settings that it follows from."""

    rows: list[ClassWeight]
    histogram: ClassHistogram
    suggested: Suggestion  # for the rate of the settings
    suggestions: list[Suggestion]  # for several rates
    below: tuple[float, float]  # share of the pixels below the default threshold, with these and with published weights
    origin: dict[str, Any]  # for people


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


def derive_calibration(calibrating: Calibrating, corpus: CorpusSettings, counting: Counting) -> CalibratedWeights:
    """Derive weights and thresholds from the counted histograms.

    Raises:
        UsageError: No pixel was counted, or a file is damaged.
    """
    histogram = counting.histogram()
    if not histogram.pixels.any():
        reason = "holds no pixel to be counted"
        raise UsageError(corpus.workspace, reason, "see desra status for what failed, and the masks of --exclude")
    rows = derive_weights(histogram, **calibrating.model_dump(include=_RULE))
    ours, published = weight_values(rows), class_weights.load_weights("published").values
    rates = sorted({*RATES, calibrating.false_alarm_rate}, reverse=True)
    suggestions = [suggest(histogram, ours, published, rate) for rate in rates]
    suggested = suggestions[rates.index(calibrating.false_alarm_rate)]
    below = tuple(false_alarm_rate(histogram, weights, THRESHOLD) or 0.0 for weights in (ours, published))
    origin = _origin(calibrating, corpus, counting, histogram)
    return CalibratedWeights(rows, histogram, suggested, suggestions, (below[0], below[1]), origin)


def suggest(
    histogram: ClassHistogram, ours: npt.NDArray[np.float64], published: npt.NDArray[np.float64], rate: float
) -> Suggestion:
    """Find the thresholds for a rate; weights are ``(150,)``."""
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
    about = {
        "origin": calibrated.origin,
        "suggestion": calibrated.suggested._asdict(),
        "false_alarms": [suggestion._asdict() for suggestion in calibrated.suggestions],
    }
    csv_file = path.suffix.lower() == ".csv"
    replace_file(path, to_csv(calibrated.rows) if csv_file else to_toml(calibrated.rows, about))


def to_toml(rows: Sequence[ClassWeight], about: Mapping[str, Any]) -> bytes:
    """Encode a weights file with its origin: the tables of ``about`` (texts, numbers, lists of tables) come first."""
    lines = ["# Class weights of desra calibrate, for --weights of desra detect and desra mine.",
             f"version = {class_weights.WEIGHTS_VERSION}"]  # fmt: skip
    for name, content in about.items():
        tables = content if isinstance(content, list) else [content]
        for table in tables:
            lines += ["", f"[[{name}]]" if isinstance(content, list) else f"[{name}]", *_assignments(table)]
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


def _by_rule(
    histogram: ClassHistogram, rule: Rule, percentile: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Derive intervals and weights; the interval is -1 where the weight does not follow from one."""
    if rule == "quantile":
        return np.full(len(histogram.counts), -1), quantile_weights(histogram, percentile)
    intervals = published_intervals(histogram, percentile)
    return intervals, class_weights.interval_weights(intervals)


def _origin(
    calibrating: Calibrating, corpus: CorpusSettings, counting: Counting, histogram: ClassHistogram
) -> dict[str, Any]:
    if isinstance(corpus, Mining):
        models = {
            "mse_model": str(corpus.mse_model),
            "mse_model_key": content_key(corpus.mse_model),
            "gan_model": str(corpus.gan_model),
            "gan_model_key": content_key(corpus.gan_model),
            "photos": str(corpus.photos),
            "precision": corpus.precision,
        }
    else:
        models = {role: str(getattr(corpus, role)) for role in ("mse_sr", "gan_sr")}
    return {
        "desra": __version__,
        "counted": max(shard.time for shard in counting.counted() if shard.time),
        "run": f"desra {corpus.verb}",
        "workspace": str(corpus.workspace),
        **models,
        "segmenter": corpus.segmenter,
        "window": corpus.window,
        "exclude": str(calibrating.exclude) if calibrating.exclude else None,
        **{name: getattr(calibrating, name) for name in ("rule", "percentile", "fallback", "min_pixels", "min_images")},
        "images": histogram.seen,
        "pixels": int(histogram.pixels.sum()),
        "excluded_pixels": histogram.excluded,
    }


def _assignments(table: Mapping[str, Any]) -> list[str]:
    # TOML spells numbers and printable texts as JSON does.
    values = {name: printable(value) if isinstance(value, str) else value for name, value in table.items()}
    return [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in values.items() if value is not None]
