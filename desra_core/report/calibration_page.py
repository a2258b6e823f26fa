"""The page of calibrated weights: D by class, the comparison with the published table, thresholds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from desra_core.calibration.results import CalibratedWeights, ClassWeight, largest_differences, write_weights
from desra_core.detection.mask import THRESHOLD
from desra_core.files.atomic import replace_file
from desra_core.report import charts, plots
from desra_core.report.calibration_table import class_rows, suggestion_rows, threshold
from desra_core.report.document import render_page

# Classes in the figure, those with most pixels.
_DRAWN = 24
_DIFFERENCES = 12
# Two to an interval.
_FIGURE_BINS = 40


def write_calibration(calibrated: CalibratedWeights, output: Path) -> list[Path]:
    """Write the weights file, and beside it a page and the figure of D by class.

    The same weights give the same bytes.

    Returns
    -------
    The files.

    Raises
    ------
    TransientError
        The disk is full or failed.
    """
    page, picture = output.with_suffix(".html"), output.with_suffix(".svg")
    write_weights(calibrated, output)
    charts.save(class_distributions(calibrated), picture)
    content = render(calibrated, output).encode()
    replace_file(page, content)
    return [output, page, picture]


def render(calibrated: CalibratedWeights, output: Path) -> str:
    """The page as text."""
    rows = calibrated.rows
    drawn = plots.inline(class_distributions(calibrated), "Distribution of the similarity in each class")
    return render_page(
        "calibration.html.j2",
        name=output.name,
        histogram=calibrated.histogram,
        pixels=int(calibrated.histogram.pixels.sum()),
        states={state: [row for row in rows if row.state == state] for state in ("calibrated", "thin", "unseen")},
        distributions=drawn,
        drawn=len(_drawn(calibrated)),
        differences=_difference_chart(rows),
        classes=class_rows([row for row in rows if row.pixels]),
        unseen=class_rows([row for row in rows if not row.pixels]),
        suggestions=suggestion_rows(calibrated.suggestions),
        suggested=calibrated.suggested,
        threshold=threshold(calibrated.suggested.threshold),
        default_threshold=THRESHOLD,
        below=calibrated.below,
        origin={name.replace("_", " "): value for name, value in calibrated.origin.items() if value is not None},
    )


def class_distributions(calibrated: CalibratedWeights) -> Figure:
    """D in each class, like figure 10 of the paper; a line where the weight lifts D to 1."""
    rows = {row.name + (", thin" if row.state == "thin" else ""): row for row in _drawn(calibrated)}
    counts = calibrated.histogram.counts.reshape(len(calibrated.rows), _FIGURE_BINS, -1).sum(axis=2)
    return charts.distributions(
        {name: counts[row.class_index].tolist() for name, row in rows.items()},
        edges=np.linspace(0, 1, _FIGURE_BINS + 1).tolist(),
        xlabel="similarity D; a line where the class's weight lifts it to 1",
        marks={name: 1 / row.weight for name, row in rows.items()},
    )


def _drawn(calibrated: CalibratedWeights) -> list[ClassWeight]:
    seen = sorted((row for row in calibrated.rows if row.pixels), key=lambda row: (-row.pixels, row.class_index))
    return seen[:_DRAWN]


def _difference_chart(rows: list[ClassWeight]) -> Any:
    """The largest differences to the published weights, or None without any."""
    changed = largest_differences(rows, _DIFFERENCES)
    ratios = {row.name: row.weight / row.published_weight for row in changed}
    if not ratios:
        return None
    figure = charts.bar_chart(ratios, xlabel="weight as a multiple of the published one")
    return plots.inline(figure, "Largest differences to the published weights")
