"""What an evaluation found, as charts: how IoU spreads over images, and what size and class are hard."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from markupsafe import Markup

from desra_core.detection.class_weights import class_names
from desra_core.evaluation.evaluation import Evaluation
from desra_core.evaluation.mask_regions import MaskRegion
from desra_core.evaluation.metrics import Agreement
from desra_core.evaluation.removal import wilson_interval
from desra_core.report.charts import bar_chart, distributions
from desra_core.report.plots import inline

_BINS = 20
_CLASSES = 12
# Areas of regions, in pixels.
_EDGES = (0, 1000, 4000, 16_000, 64_000, math.inf)
_FOUND, _RIGHT = "share of ground-truth regions that are found", "share of detected regions that are right"


def charts_of(evaluation: Evaluation) -> list[Markup]:
    """The measures of single images, and recall and precision by the area of regions, as far as they are defined."""
    charts = [_spread(evaluation)]
    sides = {_FOUND: [image.marked for image in evaluation.images], _RIGHT: [im.detected for im in evaluation.images]}
    for title, regions in sides.items():
        if any(regions):
            charts.append(_by_area([region for of_image in regions for region in of_image], title))
    return charts


def _spread(evaluation: Evaluation) -> Markup:
    """How the measures of single images spread; the line is that of the set."""
    histograms: dict[str, list[int]] = {}
    marks: dict[str, float] = {}
    for measure, name in {"iou": "IoU", "precision": "precision", "recall": "recall"}.items():
        values = [getattr(image.agreement, measure) for image in evaluation.images]
        counts, edges = np.histogram([value for value in values if value is not None], _BINS, (0, 1))
        histograms[name] = counts.tolist()
        of_set = evaluation.scores.values[measure]
        marks |= {} if of_set is None else {name: of_set}
    figure = distributions(histograms, edges=edges.tolist(), xlabel="of one image; the line: of all", marks=marks)
    return inline(figure, "How the measures of single images spread, and those of all")


def class_chart(classes: Mapping[int, Agreement]) -> Markup | str:
    """Recall of the classes with the most ground-truth regions; empty without any."""
    marked = [(index, agreement) for index, agreement in classes.items() if agreement.marked]
    if not marked:
        return ""
    names = class_names()
    shown = sorted(marked, key=lambda item: (-item[1].marked, item[0]))[:_CLASSES]
    return _shares(
        {names[index]: (agreement.found, agreement.marked) for index, agreement in shown}, _FOUND, "by class"
    )


def _by_area(regions: Sequence[MaskRegion], title: str) -> Markup:
    places = np.searchsorted(_EDGES, [region.area for region in regions], side="right") - 1
    covered = np.array([region.covered for region in regions])
    parts = {}
    for place, (low, high) in enumerate(pairwise(_EDGES)):
        name = f"{low:,.0f} to {high:,.0f} px" if math.isfinite(high) else f"from {low:,.0f} px"
        parts[name] = int(covered[places == place].sum()), int((places == place).sum())
    return _shares(parts, title, "by area")


def _shares(parts: Mapping[str, tuple[int, int]], title: str, of_what: str) -> Markup:
    """Bars of so many out of so many, each with the 95 % interval of it alone."""
    named = {f"{name} ({whole:,})": (part, whole) for name, (part, whole) in parts.items() if whole}
    values = {name: part / whole for name, (part, whole) in named.items()}
    intervals = {name: wilson_interval(part, whole) for name, (part, whole) in named.items()}
    return inline(bar_chart(values, xlabel=title, intervals=intervals), f"The {title}, {of_what}")
