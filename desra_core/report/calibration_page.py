"""Show calibrated weights: D by class, the comparison with the published table, thresholds; a page and Markdown."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from desra_core.calibration.results import (
    CalibratedWeights,
    ClassWeight,
    Suggestion,
    largest_differences,
    write_weights,
)
from desra_core.detection.mask import THRESHOLD
from desra_core.evaluation.table import as_markdown
from desra_core.files.atomic import replace_file
from desra_core.report import charts
from desra_core.report.charts import inline
from desra_core.report.document import render_page

# Classes in the figure, those with most pixels.
_DRAWN = 24
_DIFFERENCES = 12
# Two to an interval.
_FIGURE_BINS = 40


def write_calibration(calibrated: CalibratedWeights, output: Path) -> list[Path]:
    """Write the weights file, and beside it a page and the figure of D by class; return these files.

    The same weights give the same bytes. Raises a `TransientError` where the disk is full or failed.
    """
    page, picture = output.with_suffix(".html"), output.with_suffix(".svg")
    write_weights(calibrated, output)
    charts.save(class_distributions(calibrated), picture)
    replace_file(page, render(calibrated, output).encode())
    return [output, page, picture]


def render(calibrated: CalibratedWeights, output: Path) -> str:
    """Render the page."""
    rows = _by_pixels(calibrated.rows)
    seen = [row for row in rows if row.pixels]
    changed = largest_differences(calibrated.rows, _DIFFERENCES)
    ratios = {row.name: row.weight / row.published_weight for row in changed}
    differences = charts.bar_chart(ratios, xlabel="weight as a multiple of the published one") if ratios else None
    return render_page(
        "calibration.html.j2",
        name=output.name,
        histogram=calibrated.histogram,
        pixels=int(calibrated.histogram.pixels.sum()),
        states={state: [row for row in rows if row.state == state] for state in ("calibrated", "thin", "unseen")},
        distributions=inline(class_distributions(calibrated), "Distribution of the similarity in each class"),
        drawn=min(len(seen), _DRAWN),
        differences=differences and inline(differences, "Largest differences to the published weights"),
        classes=class_rows(seen),
        unseen=class_rows([row for row in rows if not row.pixels]),
        suggestions=suggestion_rows(calibrated.suggestions),
        suggested=calibrated.suggested,
        threshold=_threshold(calibrated.suggested.threshold),
        default_threshold=THRESHOLD,
        below=calibrated.below,
        origin={name.replace("_", " "): value for name, value in calibrated.origin.items() if value is not None},
    )


def class_distributions(calibrated: CalibratedWeights) -> Figure:
    """Draw D in each class, like figure 10 of the paper; a line where the weight lifts D to 1."""
    seen = [row for row in _by_pixels(calibrated.rows) if row.pixels]
    rows = {row.name + (", thin" if row.state == "thin" else ""): row for row in seen[:_DRAWN]}
    counts = calibrated.histogram.counts.reshape(len(calibrated.rows), _FIGURE_BINS, -1).sum(axis=2)
    return charts.distributions(
        {name: counts[row.class_index].tolist() for name, row in rows.items()},
        edges=np.linspace(0, 1, _FIGURE_BINS + 1).tolist(),
        xlabel="similarity D; a line where the class's weight lifts it to 1",
        marks={name: 1 / row.weight for name, row in rows.items()},
    )


def _by_pixels(rows: list[ClassWeight]) -> list[ClassWeight]:
    return sorted(rows, key=lambda row: (-row.pixels, row.class_index))


def class_rows(rows: list[ClassWeight]) -> list[dict[str, str]]:
    """Write classes as rows of a table, those with most pixels first."""
    return [
        {
            "class": f"{row.class_index} {row.name}",
            "pixels": f"{row.pixels:,}",
            "images": f"{row.images:,}",
            "interval": "–" if row.interval is None else str(row.interval),
            "published interval": str(row.published_interval),
            "weight": f"{row.weight:.3f}",
            "published weight": f"{row.published_weight:.3f}",
            "note": _note(row),
        }
        for row in _by_pixels(rows)
    ]


def _note(row: ClassWeight) -> str:
    """Say of a class that it has the fallback, or the ratio to the published weight."""
    if row.state != "calibrated":
        return f"{row.state}: fallback"
    ratio = row.weight / row.published_weight
    return "as published" if math.isclose(ratio, 1, rel_tol=5e-4) else f"{ratio:.2f} x published"


def suggestion_rows(suggestions: list[Suggestion]) -> list[dict[str, str]]:
    """Write thresholds by rate as rows of a table."""
    return [
        {
            "of artifact-free pixels below": f"{100 * suggestion.rate:.12g} %",
            "threshold": _threshold(suggestion.threshold),
            "threshold with published weights": _threshold(suggestion.published_threshold),
        }
        for suggestion in suggestions
    ]


def _threshold(value: float | None) -> str:
    """Write a threshold as it is given to ``--threshold``."""
    return "none" if value is None else f"{value:.4g}"


def calibration_markdown(calibrated: CalibratedWeights) -> str:
    """Write the weights of all classes that were seen, and the thresholds, in Markdown."""
    seen = [row for row in calibrated.rows if row.pixels]
    unseen = len(calibrated.rows) - len(seen)
    histogram = calibrated.histogram
    counted = f"{int(histogram.pixels.sum()):,} pixels of {histogram.seen:,} images; {unseen} classes are unseen."
    meaning = "Shares of pixels before erosion, dilation, hole filling and the area filter."
    parts = [counted, as_markdown(suggestion_rows(calibrated.suggestions)), meaning, as_markdown(class_rows(seen))]
    return "\n\n".join(parts) + "\n"
