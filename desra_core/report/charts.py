"""Draw charts for pages and for print, in the colours of Okabe and Ito; lines differ without colour, too.

Each function returns a figure, which `inline` puts into a page and `save` writes to a file.
"""

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from desra_core.files import replace_file
from desra_core.report.document import number_label, shortened, tick

Numbers = Sequence[float] | npt.NDArray[Any]
Values = npt.NDArray[np.float64]
Points = Sequence[tuple[float, float]] | Values

# Print shows these colours. In a page, `inline` replaces them by colours of the page's light or dark scheme, so nothing
# else in a figure may have them.
INK, BAR, PAPER = "#010203", "#2f6db4", "#fffffe"
_PAGE_COLOURS = {INK: "currentColor", BAR: "var(--accent)", PAPER: "var(--paper)"}
# Colour, dashes and marker: eight lines that differ in print without colour too.
_LINES: tuple[tuple[str, Any, str], ...] = (
    ("#0072b2", "-", "o"),
    ("#d55e00", (0, (5, 2)), "s"),
    (INK, (0, (1.2, 1.6)), "^"),
    ("#009e73", (0, (6, 2, 1.2, 2)), "D"),
    ("#cc79a7", (0, (8, 2.5)), "v"),
    ("#56b4e9", (0, (3, 1.5)), "P"),
    ("#e69f00", (0, (6, 2, 1.2, 2, 1.2, 2)), "X"),
    ("#8c8c8c", (0, (10, 2, 3, 2)), "*"),
)
MOST_CURVES = len(_LINES)
_MARKERS = 9
_BINS = 36
_LINEAR = 10.0  # up to about this value, the axis of a histogram is linear
_MOST_POINTS = 500
_WIDTH = 6.0  # inches
_CHARACTERS = 92  # of text that fit into the width of a figure
_LABEL = 40
# The background of text that may lie on curves and bars.
_BACKING = {"facecolor": PAPER, "alpha": 0.75, "linewidth": 0, "pad": 0.8}
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "desra",
    "svg.fonttype": "none",
    "font.size": 9,
    "text.parse_math": False,
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "text.color"), INK),
    **dict.fromkeys(("axes.linewidth", "xtick.major.width", "ytick.major.width"), 0.6),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
}
_in_style = matplotlib.rc_context(_STYLE)
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
# An SVG inside a page needs no prologue, no namespaces (which look like addresses), and only the page's font.
_NOT_INLINE = re.compile(r'^.*?(?=<svg)| xmlns(:\w+)?="[^"]*"| font-family: [^;"]*;', re.DOTALL)


@_in_style
def line_chart(
    curves: Mapping[str, Points],
    *,
    xlabel: str,
    ylabel: str,
    marks: Mapping[str, tuple[float, float]] = {},
    log_x: bool = False,
) -> Figure:
    """Draw curves by name: the first eight, as many as differ without colour.

    Args:
        curves: Points ``(x, y)`` in the order in which they are joined; points that are not finite are left out.
        marks: Single points by their names, which are written beside them.
        log_x: Draw a logarithmic x axis, and leave out points at 0 and below.
    """
    figure, axes = _new_axes(3.2, xlabel, ylabel)
    names = _draw_curves(axes, curves, log_x=log_x)
    for name, (x, y) in marks.items():
        axes.plot([x], [y], color=INK, marker="o", markersize=8, fillstyle="none", linestyle="none")
        axes.autoscale_view()
        # The name of a point in the right half of the axes stands left of it: there is room.
        share_of_width = axes.transLimits.transform(axes.transScale.transform((x, y)))[0]
        offset, side = (-8, "right") if share_of_width > 0.5 else (8, "left")
        axes.annotate(shortened(name, _LABEL), (x, y), (offset, 5), textcoords="offset points", ha=side, bbox=_BACKING)
    _add_legend(figure, axes, names)
    _number_axes(axes)
    return figure


@_in_style
def small_charts(charts: Mapping[str, Mapping[str, Points]], *, ylabel: str, log_x: Sequence[str] = ()) -> Figure:
    """Draw several small charts side by side, with one y axis and one legend.

    Args:
        charts: Curves as for `line_chart`, by the label of the x axis. A name has one colour in all charts.
        log_x: The charts with a logarithmic x axis.
    """
    figure = Figure(figsize=(_WIDTH, 2.4), layout="constrained")
    every = figure.subplots(1, len(charts), sharey=True, squeeze=False)[0]
    names = list(dict.fromkeys(name for curves in charts.values() for name in curves))
    for axes, (xlabel, curves) in zip(every, charts.items(), strict=True):
        axes.set_xlabel(xlabel)
        _draw_curves(axes, {name: curves.get(name, ()) for name in names}, log_x=xlabel in log_x)
        _number_axes(axes)
        if xlabel in log_x:  # they span a decade or two
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    every[0].set_ylabel(ylabel)
    _add_legend(figure, every[0], names[:MOST_CURVES])
    return figure


@_in_style
def bar_chart(values: Mapping[str, float], *, xlabel: str, intervals: Mapping[str, tuple[float, float]] = {}) -> Figure:
    """Draw horizontal bars from the first at the top to the last, each with its value.

    Args:
        values: Lengths by name, none below 0; a value that is not finite has a dash in place of a bar.
        intervals: The lower and upper end of an interval around some of the values.
    """
    figure, axes = _new_axes(0.6 + 0.26 * max(1, len(values)), xlabel)
    rows = np.arange(len(values))
    lengths = np.nan_to_num(np.array(list(values.values()), np.float64), posinf=0, neginf=0)
    axes.barh(rows, lengths, height=0.66, color=BAR)
    for row, (name, value) in enumerate(values.items()):
        low, high = intervals.get(name, (value, value))
        if high > low:
            axes.plot([low, high], [row, row], color=INK, linewidth=1.1, marker="|", markersize=6)
        label = number_label(value) if np.isfinite(value) else "–"
        axes.annotate(label, (np.nanmax([lengths[row], high, 0]), row), (4, 0), textcoords="offset points",
                      va="center")  # fmt: skip
    _name_rows(axes, list(values))
    _number_axes(axes, y=False)
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    return figure


@_in_style
def distributions(
    histograms: Mapping[str, Numbers], *, edges: Numbers, xlabel: str, marks: Mapping[str, float] = {}
) -> Figure:
    """Draw a histogram for each name, one below the other on one axis, like figure 10 of the DeSRA paper.

    Histograms show shares, so that those of many and of few values can be compared. The highest bin is as high as the
    row, and the share in that bin is written beside it.

    Args:
        histograms: Counts per bin, by name; a histogram without any count has an empty row.
        edges: The edges of the bins: one more than there are counts.
        marks: By name, a value such as a percentile, which is drawn as a line and written beside it.
    """
    figure, axes = _new_axes(0.7 + 0.34 * max(1, len(histograms)), xlabel)
    for row, (name, counts) in enumerate(histograms.items()):
        shares = np.array(counts, np.float64) / max(float(np.sum(counts)), 1e-300)
        peak = float(shares.max(initial=0))
        if peak > 0:
            # Rows are numbered downwards, heights grow upwards.
            axes.stairs(row - 0.8 * shares / peak, edges, baseline=row, fill=True, color=BAR, linewidth=0)
            axes.annotate(f"{100 * peak:.3g} %", (1, row), (6, 0), xycoords=axes.get_yaxis_transform(),
                          textcoords="offset points", va="bottom", fontsize=8)  # fmt: skip
        axes.axhline(row, color=INK, linewidth=0.4)
        if name in marks:
            x = marks[name]
            inside = x < edges[0] + 0.2 * (edges[-1] - edges[0])  # the value stands right of a line near the left end
            axes.plot([x] * 2, [row, row - 0.88], color=INK, linewidth=1.3)
            axes.annotate(tick(float(f"{x:.3g}")), (x, row - 0.84), (4 if inside else -4, 0), bbox=_BACKING,
                          textcoords="offset points", ha="left" if inside else "right", va="top",
                          fontsize=8)  # fmt: skip
    axes.annotate("highest bin", (1, 1), (6, 0), xycoords="axes fraction", textcoords="offset points",
                  va="bottom", fontsize=8)  # fmt: skip
    _name_rows(axes, list(histograms), top=1.0, bottom=0.15)
    axes.spines["left"].set_visible(False)
    _number_axes(axes, y=False)
    axes.set_xlim(edges[0], edges[-1])
    return figure


@_in_style
def histogram(values: Values, *, xlabel: str, ylabel: str) -> Figure:
    """Draw how many of ``(N,)`` values, at least one, lie in each of 36 bins.

    The axis suits values that lie on both sides of 0 and span decades: it is linear near 0, and logarithmic elsewhere.
    """
    figure, axes = _new_axes(2.0, xlabel, ylabel)
    axes.set_xscale("asinh", linear_width=_LINEAR)
    low, high = np.arcsinh(values.min() / _LINEAR), np.arcsinh(values.max() / _LINEAR)
    if high - low < 0.1:  # values that are nearly alike
        low, high = low - 0.05, high + 0.05
    edges = _LINEAR * np.sinh(np.linspace(low, high, _BINS + 1))
    # Rounding in the edges must not lose the smallest or the largest value.
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    axes.stairs(counts, edges, fill=True, color=BAR)
    axes.set_xlim(edges[0], edges[-1])
    decades = [0.0] + [sign * 10.0**power for power in range(1, 12) for sign in (-1, 1)]
    shown = [place for place in decades if edges[0] <= place <= edges[-1]]
    if len(shown) < 3:  # values that are nearly alike
        places = MaxNLocator(nbins=5).tick_values(edges[0], edges[-1])
        shown = [place for place in places if edges[0] <= place <= edges[-1]]
    axes.set_xticks(shown, [tick(place) for place in shown])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    axes.yaxis.set_major_formatter(lambda value, _: tick(value))
    return figure


def thinned(points: Points) -> Values:
    """Keep finite points, ``(N, 2)``; of more than 500 points, average neighbours, so that a page stays small."""
    values = _finite(points)
    parts = np.array_split(values, min(len(values), _MOST_POINTS)) if len(values) else []
    return np.array([part.mean(axis=0) for part in parts]).reshape(-1, 2)


def inline(figure: Figure, title: str) -> Markup:
    """Turn a figure into an ``svg`` element, which takes on the page's font and its light or dark scheme."""
    sink = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(sink, format="svg", transparent=True, metadata=_NO_METADATA)
    svg = _NOT_INLINE.sub("", sink.getvalue())
    for stand_in, colour in _PAGE_COLOURS.items():
        svg = svg.replace(stand_in, colour)
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1))  # noqa: S704


def save(figure: Figure, path: Path) -> None:
    """Write a figure for print, black on white: an SVG with letters as outlines or a PNG of 200 dpi, by the suffix.

    Raises:
        TransientError: The disk is full or failed.
    """
    kind = path.suffix.removeprefix(".")
    metadata = {"Software": None} if kind == "png" else _NO_METADATA
    with matplotlib.rc_context(_STYLE | {"svg.fonttype": "path"}):
        replace_file(path, lambda file: figure.savefig(file, format=kind, dpi=200, metadata=metadata))


def _draw_curves(axes: Axes, curves: Mapping[str, Points], *, log_x: bool) -> list[str]:
    """Draw the first eight curves; return their names."""
    if log_x:
        axes.set_xscale("log")
    names = list(curves)[:MOST_CURVES]
    for name, (colour, dashes, marker) in zip(names, _LINES, strict=False):
        points = _finite(curves[name])
        points = points[points[:, 0] > 0] if log_x else points
        axes.plot(*points.T, color=colour, linestyle=dashes, linewidth=1.5, marker=marker, markersize=4.5,
                  markevery=max(1, len(points) // _MARKERS), label=shortened(name, _LABEL))  # fmt: skip
    return names


def _add_legend(figure: Figure, axes: Axes, names: Sequence[str]) -> None:
    """Explain the curves of an axes above the figure, in as many columns as fit, if there are several."""
    if len(names) > 1:
        longest = max(min(len(name), _LABEL) for name in names)
        columns = max(1, min(len(names), _CHARACTERS // (longest + 9)))
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=columns, frameon=False,
                      handlelength=3.2)  # fmt: skip


def _new_axes(height: float, xlabel: str, ylabel: str = "") -> tuple[Figure, Axes]:
    """Make a figure of a height in inches, with one axes."""
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.add_subplot(xlabel=xlabel, ylabel=ylabel)


def _finite(curve: Points) -> Values:
    points = np.array(curve, np.float64).reshape(-1, 2)
    return points[np.isfinite(points).all(axis=1)]


def _name_rows(axes: Axes, names: list[str], *, top: float = 0.6, bottom: float = 0.6) -> None:
    """Name the rows 0 to N - 1 of the y axis, from the top down."""
    axes.set_yticks(range(len(names)), [shortened(name, _LABEL) for name in names])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(names) - 1 + bottom, -top)


def _number_axes(axes: Axes, *, y: bool = True) -> None:
    """Set few ticks, with labels like 10 k or 0.001."""
    for axis in (axes.xaxis, axes.yaxis) if y else (axes.xaxis,):
        if axis.get_scale() == "linear":
            axis.set_major_locator(MaxNLocator(nbins=6))
        axis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
        axis.set_minor_formatter(NullFormatter())
