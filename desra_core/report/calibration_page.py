"""Show calibrated weights: D by class, the comparison with the published table, thresholds; a page and Markdown."""

import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from desra_core.calibration.weights import (
    CalibratedWeights,
    ClassWeight,
    Suggestion,
    largest_differences,
    write_weights,
)
from desra_core.detection.mask import THRESHOLD
from desra_core.evaluation.table import as_markdown, counted
from desra_core.files import replace_file
from desra_core.report import charts
from desra_core.report.charts import inline
from desra_core.report.document import render_page

# The figure shows so many classes, those with most pixels.
_DRAWN = 24
_DIFFERENCES = 12
# Two bins of the figure are one interval.
_FIGURE_BINS = 40


def write_calibration(calibrated: CalibratedWeights, output: Path) -> list[Path]:
    """Write the weights file, and beside it a page and the figure of D by class; return these files.

    The same weights give the same bytes.

    Raises:
        TransientError: The disk is full or failed.
    """
    page, picture = output.with_suffix(".html"), output.with_suffix(".svg")
    write_weights(calibrated, output)
    charts.save(class_distributions(calibrated), picture)
    replace_file(page, render(calibrated, output).encode())
    return [output, page, picture]


def render(calibrated: CalibratedWeights, output: Path) -> str:
    """Render the page about the weights in the file ``output``."""
    rows = calibrated.rows
    seen = [row for row in rows if row.pixels]
    changed = largest_differences(rows, _DIFFERENCES)
    ratios = {row.name: row.weight / row.published_weight for row in changed}
    differences = charts.bar_chart(ratios, xlabel="weight as a multiple of the published one") if ratios else None
    return render_page(
        "calibration.html.j2",
        name=output.name,
        calibrated=calibrated,
        states={state: [row for row in rows if row.state == state] for state in ("calibrated", "thin", "unseen")},
        distributions=inline(class_distributions(calibrated), "Distribution of the similarity in each class"),
        drawn=min(len(seen), _DRAWN),
        differences=differences and inline(differences, "Largest differences to the published weights"),
        classes=class_rows(seen),
        unseen=class_rows([row for row in rows if not row.pixels]),
        suggestions=suggestion_rows(calibrated.suggestions),
        threshold=_threshold(calibrated.suggested.threshold),
        default_threshold=THRESHOLD,
        origin={name.replace("_", " "): value for name, value in calibrated.origin.items() if value is not None},
    )


def class_distributions(calibrated: CalibratedWeights) -> Figure:
    """Draw D in each class, like figure 10 of the paper; a line marks the D that the weight lifts to 1."""
    seen = [row for row in _by_pixels(calibrated.rows) if row.pixels]
    rows = {row.name + (", thin" if row.state == "thin" else ""): row for row in seen[:_DRAWN]}
    counts = calibrated.histogram.counts.reshape(len(calibrated.rows), _FIGURE_BINS, -1).sum(axis=2)
    return charts.distributions(
        {name: counts[row.class_index] for name, row in rows.items()},
        edges=np.linspace(0, 1, _FIGURE_BINS + 1),
        xlabel="similarity D; a line where the class's weight lifts it to 1",
        marks={name: 1 / row.weight for name, row in rows.items()},
    )


def class_rows(rows: list[ClassWeight]) -> list[dict[str, str]]:
    """Write classes as rows of a table, the classes with most pixels first."""
    cells = []
    for row in _by_pixels(rows):
        ratio = row.weight / row.published_weight
        note = "as published" if math.isclose(ratio, 1, rel_tol=5e-4) else f"{ratio:.2f} x published"
        cells.append({
            "class": f"{row.class_index} {row.name}",
            "pixels": f"{row.pixels:,}",
            "images": f"{row.images:,}",
            "interval": "–" if row.interval is None else str(row.interval),
            "published interval": str(row.published_interval),
            "weight": f"{row.weight:.3f}",
            "published weight": f"{row.published_weight:.3f}",
            "note": note if row.state == "calibrated" else f"{row.state}: fallback",
        })  # fmt: skip
    return cells


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


def calibration_markdown(calibrated: CalibratedWeights) -> str:
    """Write the weights of all classes that were seen, and the thresholds, in Markdown."""
    histogram = calibrated.histogram
    seen = [row for row in calibrated.rows if row.pixels]
    unseen = counted(len(calibrated.rows) - len(seen), "class is", "classes are")
    pixels = int(histogram.pixels.sum())
    parts = [
        f"{counted(pixels, 'pixel')} of {counted(histogram.seen, 'image')}; {unseen} unseen.",
        as_markdown(suggestion_rows(calibrated.suggestions)),
        "Shares of pixels before erosion, dilation, hole filling and the area filter.",
        as_markdown(class_rows(seen)),
    ]
    return "\n\n".join(parts) + "\n"


def _by_pixels(rows: list[ClassWeight]) -> list[ClassWeight]:
    return sorted(rows, key=lambda row: (-row.pixels, row.class_index))


def _threshold(value: float | None) -> str:
    """Write a threshold as it is given to ``--threshold``."""
    return "none" if value is None else f"{value:.4g}"
