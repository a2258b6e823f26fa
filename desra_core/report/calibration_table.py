"""Calibrated weights as rows that a person reads: on the page, on the command line and in the Prefect UI."""

from __future__ import annotations

import math

from desra_core.calibration.results import CalibratedWeights, ClassWeight, Suggestion
from desra_core.evaluation.table import as_markdown


def class_rows(rows: list[ClassWeight]) -> list[dict[str, str]]:
    """The classes, those with most pixels first."""
    return [
        {
            "class": f"{row.class_index} {row.name}",
            "pixels": f"{row.pixels:,}",
            "images": f"{row.images:,}",
            "interval": "–" if row.interval is None else str(row.interval),
            "published interval": str(row.published_interval),
            "weight": f"{row.weight:.3f}",
            "published weight": f"{row.published_weight:.3f}",
            "note": note(row),
        }
        for row in sorted(rows, key=lambda row: (-row.pixels, row.class_index))
    ]


def note(row: ClassWeight) -> str:
    """What a reader has to know of a class: fallback, or the ratio to the published weight."""
    if row.state != "calibrated":
        return f"{row.state}: fallback"
    ratio = row.weight / row.published_weight
    return "as published" if math.isclose(ratio, 1, rel_tol=5e-4) else f"{ratio:.2f} x published"


def suggestion_rows(suggestions: list[Suggestion]) -> list[dict[str, str]]:
    """Thresholds by rate."""
    return [
        {
            "of artifact-free pixels below": f"{100 * suggestion.rate:.12g} %",
            "threshold": threshold(suggestion.threshold),
            "threshold with published weights": threshold(suggestion.published_threshold),
        }
        for suggestion in suggestions
    ]


def threshold(value: float | None) -> str:
    """A threshold as it is given to ``--threshold``."""
    return "none" if value is None else f"{value:.4g}"


def calibration_markdown(calibrated: CalibratedWeights) -> str:
    """The weights of all classes that were seen, and the thresholds, in Markdown."""
    seen = [row for row in calibrated.rows if row.pixels]
    unseen = len(calibrated.rows) - len(seen)
    histogram = calibrated.histogram
    counted = f"{int(histogram.pixels.sum()):,} pixels of {histogram.seen:,} images; {unseen} classes are unseen."
    meaning = "Shares of pixels before erosion, dilation, hole filling and the area filter."
    parts = [counted, as_markdown(suggestion_rows(calibrated.suggestions)), meaning, as_markdown(class_rows(seen))]
    return "\n\n".join(parts) + "\n"
