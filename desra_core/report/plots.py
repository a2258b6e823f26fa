"""The plots of the report as inline SVG: no colours or fonts of their own, the page's style gives them."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from desra_core.report.measure import Measure
from desra_core.report.summary import StageTime
from desra_core.report.wording import stage_name

_BINS = 36
# What print shows, and stand-ins that no plot needs otherwise: in the page they follow its light or dark scheme.
INK, BAR, SOFT, ALERT, PAPER = "#010203", "#2f6db4", "#a9c6e7", "#a8480c", "#fffffe"
_PAGE_COLOURS = {INK: "currentColor", BAR: "var(--accent)", SOFT: "var(--soft)", ALERT: "var(--alert)",
                 PAPER: "var(--paper)"}  # fmt: skip
# Told apart without colour too. Dashes are drawn over a solid line that they may lie on.
_LINES: tuple[tuple[str, Any], ...] = ((BAR, "-"), (ALERT, (0, (5, 2))), (INK, (0, (1.2, 1.6))))
_POINTS = 500
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "desra",
    "svg.fonttype": "none",
    "font.size": 9,
    "text.parse_math": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
}
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
# An SVG inside a page needs no prologue, no namespaces, of which each is an address, and no font but the page's.
_NOT_INLINE = re.compile(r'^.*?(?=<svg)| xmlns(:\w+)?="[^"]*"| font-family: [^;"]*;', re.DOTALL)

Values = npt.NDArray[np.float64]


def severity_histogram(severity: Values) -> Markup:
    """Severities, which spread over decades on both sides of zero."""
    scale = 10.0
    low, high = np.arcsinh(severity.min() / scale), np.arcsinh(severity.max() / scale)
    edges = scale * np.sinh(np.linspace(*_apart(low, high), _BINS + 1))
    decades = [0.0] + [sign * 10.0**power for power in range(1, 12) for sign in (-1, 1)]
    with matplotlib.rc_context(STYLE):
        figure, axes = new_axes()
        axes.set_xscale("asinh", linear_width=scale)
        _histogram(axes, severity, edges, decades)
        axes.set_xlabel("severity")
        axes.set_ylabel("regions")
        return inline(figure, "Histogram of the severity of the regions")


def area_histogram(area: Values) -> Markup:
    """Areas of regions in pixels, on a logarithmic axis."""
    return _log_histogram(area, "area of a region in pixels", "regions", "Histogram of the area of the regions")


def share_histogram(shares: Values) -> Markup:
    """Masked shares of images with artifacts, 0..1, on a logarithmic axis in percent."""
    title = "Histogram of the masked share of the images with artifacts"
    return _log_histogram(100 * shares, "masked share of an image in %", "images", title)


def similarity_histogram(values: Values, measure: Measure) -> Markup:
    """Mean similarities of regions, 0..1, or mean scores, from 0 to the highest."""
    top = max(float(values.max()), 1e-12) if measure.is_score else 1.0
    with matplotlib.rc_context(STYLE):
        figure, axes = new_axes()
        _histogram(axes, values, np.linspace(0, top, _BINS + 1), [0, 0.25, 0.5, 0.75, 1])
        axes.set_xlabel(f"mean {measure.word} of a region")
        axes.set_ylabel("regions")
        return inline(figure, f"Histogram of the mean {measure.word} of the regions")


def stage_bars(times: Sequence[StageTime]) -> Markup:
    """Mean (bar) and median (line) seconds per image by stage."""
    with matplotlib.rc_context(STYLE):
        figure, axes = new_axes(width=4.4, height=0.55 + 0.3 * len(times))
        rows = np.arange(len(times))[::-1]
        colours = [SOFT if time.part else BAR for time in times]
        axes.barh(rows, [time.mean for time in times], height=0.62, color=colours)
        for row, time in zip(rows, times, strict=True):
            axes.plot([time.median] * 2, [row - 0.42, row + 0.42], color=INK, linewidth=1.4)
        axes.set_yticks(rows, [stage_name(time.stage) for time in times])
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(left=0)
        axes.set_xlabel("seconds per image: mean (bar), median (line)")
        return inline(figure, "Seconds per image by stage")


def loss_curves(title: str, curves: Mapping[str, Sequence[tuple[float, float]]], best: int | None) -> Markup | None:
    """Losses by iteration, three curves at most; None where there is nothing to draw.

    Parameters
    ----------
    title
        Of the axis.
    curves
        Iterations and values, by what the legend calls them. Of many, means of neighbours are drawn.
    best
        The iteration to mark.
    """
    drawn = {label: thinned(points) for label, points in curves.items()}
    drawn = {label: points for label, points in drawn.items() if len(points)}
    if not drawn:
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = new_axes(width=4.4, height=2.2)
        for (label, points), (colour, dashes) in zip(drawn.items(), _LINES, strict=False):
            axes.plot(*points.T, color=colour, linestyle=dashes, linewidth=1.3, label=label,
                      marker="o" if len(points) == 1 else None)  # fmt: skip
        axes.set_xlim(0, max(1.0, *(points[-1, 0] for points in drawn.values())))
        if best is not None and best <= axes.get_xlim()[1]:
            axes.axvline(best, color=INK, linewidth=0.6)
            axes.text(best, 1, "best", transform=axes.get_xaxis_transform(), ha="center", va="bottom")
        if len(drawn) > 1:
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1.06), ncols=3, frameon=False, borderpad=0)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: short(value))
        axes.set_xlabel("iteration")
        axes.set_ylabel(title)
        return inline(figure, f"The {title} by iteration")


def thinned(points: Sequence[tuple[float, float]]) -> Values:
    """Points ``(N, 2)`` that are finite; of many the means of neighbours, so that no page becomes large by them."""
    values = np.array(points, np.float64).reshape(-1, 2)
    values = values[np.isfinite(values).all(axis=1)]
    parts = np.array_split(values, min(len(values), _POINTS)) if len(values) else []
    return np.array([part.mean(axis=0) for part in parts]).reshape(-1, 2)


def new_axes(width: float = 6.0, height: float = 2.0) -> tuple[Figure, Axes]:
    """A clear figure of a size in inches, with one axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    return figure, axes


def short(number: float) -> str:
    """10 k, 3 M, −0.5: a tick label."""
    for factor, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(number) >= factor:
            return f"{number / factor:g}{unit}".replace("-", "−")
    return f"{number:g}".replace("-", "−")


def inline(figure: Figure, title: str) -> Markup:
    """A figure as an ``svg`` element for a page, whose font and light or dark scheme it takes on."""
    sink = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(sink, format="svg", metadata=NO_METADATA)
    svg = _NOT_INLINE.sub("", sink.getvalue())
    for stand_in, colour in _PAGE_COLOURS.items():
        svg = svg.replace(stand_in, colour)
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1))  # noqa: S704


def _log_histogram(values: Values, xlabel: str, ylabel: str, title: str) -> Markup:
    low, high = np.log10(values.min()), np.log10(values.max())
    edges = np.logspace(*_apart(low, high), _BINS + 1)
    steps = (1, 2, 5) if high - low < 1.5 else (1, 3) if high - low < 3 else (1,)
    ticks = [step * 10.0**power for power in range(-6, 12) for step in steps]
    with matplotlib.rc_context(STYLE):
        figure, axes = new_axes()
        axes.set_xscale("log")
        _histogram(axes, values, edges, ticks)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        return inline(figure, title)


def _apart(low: float, high: float) -> tuple[float, float]:
    """A range that is not empty, where all values are alike."""
    return (low, high) if high - low > 0.1 else (low - 0.05, high + 0.05)


def _histogram(axes: Axes, values: Values, edges: Values, ticks: Sequence[float]) -> None:
    # Rounding in the edges must not lose the smallest or the largest value.
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    axes.stairs(counts, edges, fill=True, color=BAR)
    axes.set_xlim(edges[0], edges[-1])
    shown = [tick for tick in ticks if edges[0] <= tick <= edges[-1]]
    if len(shown) < 3:  # values that are nearly alike
        even = MaxNLocator(nbins=5).tick_values(edges[0], edges[-1])
        shown = [tick for tick in even if edges[0] <= tick <= edges[-1]]
    axes.set_xticks(shown, [short(tick) for tick in shown])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    axes.yaxis.set_major_formatter(lambda value, _: short(value))
