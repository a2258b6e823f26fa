"""Class weights derived from a corpus, and the file of them that ``--weights`` reads."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from desra_core.calibration.histogram import ClassHistogram, published_intervals, quantile_weights
from desra_core.detection.class_weights import WEIGHTS_VERSION, class_names, interval_weights, published_table
from desra_core.errors import printable
from desra_core.settings.models import MIN_IMAGES, MIN_PIXELS, PERCENTILE, Fallback, Rule


class ClassWeight(NamedTuple):
    """The weight of a class; ``interval`` where it follows from one (Eq. 9).

    ``state`` is ``calibrated``, or for a class that has too few pixels or images ``thin`` or none at all ``unseen``:
    then the weight is the fallback's.
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


def derive_weights(
    histogram: ClassHistogram,
    *,
    rule: Rule = "published",
    percentile: float = PERCENTILE,
    min_pixels: int = MIN_PIXELS,
    min_images: int = MIN_IMAGES,
    fallback: Fallback = "published",
) -> list[ClassWeight]:
    """Derive the weight of each class from how its similarity is distributed.

    Parameters
    ----------
    histogram
        Of 150 classes, over artifact-free pairs.
    rule
        20 bins as published (`published_intervals`), or the continuous quantile (`quantile_weights`).
    percentile
        Share of a class's pixels that its weight is to lift to 1, in percent.
    min_pixels, min_images
        A class with fewer is thin.
    fallback
        What thin and unseen classes get: the published interval, weight 1 (interval 0), or what the rule gives for
        all classes taken together, published where there is no pixel at all.
    """
    published = published_table()
    intervals, weights = _by_rule(histogram, rule, percentile)
    spare_intervals, spare_weights = published, interval_weights(published)
    if fallback == "one":
        spare_intervals, spare_weights = np.zeros_like(published), np.ones(len(published))
    elif fallback == "pooled" and histogram.pixels.any():
        pooled_intervals, pooled_weights = _by_rule(histogram.pooled(), rule, percentile)
        spare_intervals = np.full(len(published), pooled_intervals[0])
        spare_weights = np.full(len(published), pooled_weights[0])
    rows = []
    pixels, published_weights = histogram.pixels, interval_weights(published)
    for index, name in enumerate(class_names()):
        enough = pixels[index] >= max(1, min_pixels) and histogram.images[index] >= min_images
        state: Any = "calibrated" if enough else "thin" if pixels[index] else "unseen"
        interval = int((intervals if enough else spare_intervals)[index])
        rows.append(
            ClassWeight(
                class_index=index,
                name=name,
                interval=None if interval < 0 else interval,
                weight=float((weights if enough else spare_weights)[index]),
                pixels=int(pixels[index]),
                images=int(histogram.images[index]),
                state=state,
                published_interval=int(published[index]),
                published_weight=float(published_weights[index]),
            )
        )
    return rows


def to_toml(rows: Sequence[ClassWeight], about: Mapping[str, Any]) -> bytes:
    """A weights file with its origin: tables of ``about`` first, which hold texts, numbers and lists of tables."""
    lines = ["# Class weights of desra calibrate, for --weights of desra detect and desra mine.",
             f"version = {WEIGHTS_VERSION}"]  # fmt: skip
    for name, content in about.items():
        tables = content if isinstance(content, list) else [content]
        for table in tables:
            lines += ["", f"[[{name}]]" if isinstance(content, list) else f"[{name}]", *_assignments(table)]
    for row in rows:
        value = {"weight": row.weight} if row.interval is None else {"interval": row.interval}
        source = "calibrated" if row.state == "calibrated" else "fallback"
        table = {"index": row.class_index, "name": row.name} | value
        lines += ["", "[[class]]", *_assignments(table | {"pixels": row.pixels, "images": row.images,
                                                          "source": source})]  # fmt: skip
    return ("\n".join(lines) + "\n").encode()


def to_csv(rows: Iterable[ClassWeight]) -> bytes:
    """The table that ``--weights`` reads too: intervals where all classes have one, else weights."""
    rows = list(rows)
    column = "weight" if any(row.interval is None for row in rows) else "interval"
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(["ade20k_index", "name", column])
    writer.writerows([row.class_index, row.name, getattr(row, column)] for row in rows)
    return sink.getvalue().encode()


def largest_differences(rows: Iterable[ClassWeight], count: int) -> list[ClassWeight]:
    """The calibrated classes whose weights are the most, by ratio, above or below the published ones."""
    changed = [row for row in rows if row.state == "calibrated" and row.weight != row.published_weight]
    return sorted(changed, key=lambda row: (-abs(np.log(row.weight / row.published_weight)), row.class_index))[:count]


def weight_values(rows: Iterable[ClassWeight]) -> npt.NDArray[np.float64]:
    """``(150,)``, as `desra_core.detection.class_weights.load_weights` reads them from the file."""
    return np.array([row.weight for row in rows])


def _by_rule(
    histogram: ClassHistogram, rule: Rule, percentile: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Intervals and weights; the interval is -1 where the weight does not follow from one."""
    if rule == "quantile":
        return np.full(len(histogram.counts), -1), quantile_weights(histogram, percentile)
    intervals = published_intervals(histogram, percentile)
    return intervals, interval_weights(intervals)


def _assignments(table: Mapping[str, Any]) -> list[str]:
    return [f"{name} = {_value(value)}" for name, value in table.items() if value is not None]


def _value(value: Any) -> str:
    # What JSON writes for numbers and printable texts is TOML too.
    return json.dumps(printable(value) if isinstance(value, str) else value, ensure_ascii=False)
