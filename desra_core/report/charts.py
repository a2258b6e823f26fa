"""Charts for pages and for print: told apart without colour, and with the colours of Okabe and Ito.

Each function returns a figure, which `desra_core.report.plots.inline` puts into a page and `save` into a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from desra_core.errors import UsageError
from desra_core.files.atomic import replace_file
from desra_core.report.plots import BAR, INK, NO_METADATA, PAPER, STYLE, Values, new_axes, short
from desra_core.report.wording import shortened

Numbers = Sequence[float] | npt.NDArray[Any]

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
_MARKERS = 9
_WIDTH = 6.0
_CHARACTERS = 92  # of a line of text as wide as a figure
_LABEL = 40
_CELLS = "cividis"
# Behind text that may lie on curves and bars.
_BACKING = {"facecolor": PAPER, "alpha": 0.75, "linewidth": 0, "pad": 0.8}


def line_chart(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    *,
    xlabel: str,
    ylabel: str,
    marks: Mapping[str, tuple[float, float]] = {},
    log_x: bool = False,
) -> Figure:
    """Draw curves.

    Parameters
    ----------
    curves
        Up to eight, each by its name: points ``(x, y)`` in the order in which they are joined. Points that are not
        finite are left out.
    xlabel, ylabel
        Of the axes.
    marks
        Single points by their names, which are written beside them.
    log_x
        Whether the x axis is logarithmic; points at 0 and below are then left out.

    Raises
    ------
    ValueError
        There are more than eight curves.
    """
    if len(curves) > len(_LINES):
        raise ValueError(f"{len(curves)} curves cannot be told apart; {len(_LINES)} can")
    with matplotlib.rc_context(STYLE):
        figure, axes = new_axes(_WIDTH, 3.2)
        if log_x:
            axes.set_xscale("log")
        for (name, curve), (colour, dashes, marker) in zip(curves.items(), _LINES, strict=False):
            points = _finite(curve, log_x=log_x)
            axes.plot(*points.T, color=colour, linestyle=dashes, linewidth=1.5, marker=marker, markersize=4.5,
                      markevery=max(1, len(points) // _MARKERS), label=shortened(name, _LABEL))  # fmt: skip
        for name, point in marks.items():
            _mark(axes, shortened(name, _LABEL), *point)
        if len(curves) > 1:
            _legend(figure, list(curves))
        _number_axes(axes)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        return figure


def bar_chart(
    values: Mapping[str, float], *, xlabel: str, intervals: Mapping[str, tuple[float, float]] | None = None
) -> Figure:
    """Draw horizontal bars from the first at the top to the last, each with its value.

    Parameters
    ----------
    values
        By name. One that is not finite has no bar and a dash for its value.
    xlabel
        Of the axis.
    intervals
        Lower and upper end of an interval around some of the values.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = new_axes(_WIDTH, 0.6 + 0.26 * max(1, len(values)))
        rows = np.arange(len(values))
        lengths = np.nan_to_num(np.array(list(values.values()), np.float64), posinf=0, neginf=0)
        axes.barh(rows, lengths, height=0.66, color=BAR)
        for row, (name, value) in enumerate(values.items()):
            low, high = (intervals or {}).get(name, (value, value))
            if high > low:
                axes.plot([low, high], [row, row], color=INK, linewidth=1.1, marker="|", markersize=6)
            told = _number(value) if np.isfinite(value) else "–"
            axes.annotate(told, (np.nanmax([lengths[row], high, 0]), row), (4, 0), textcoords="offset points",
                          va="center")  # fmt: skip
        _name_rows(axes, list(values))
        _number_axes(axes, y=False)
        axes.margins(x=0.12)
        if (lengths >= 0).all():
            axes.set_xlim(left=0)
        axes.set_xlabel(xlabel)
        return figure


def distributions(
    histograms: Mapping[str, Numbers],
    *,
    edges: Numbers,
    xlabel: str,
    marks: Mapping[str, float] = {},
) -> Figure:
    """Draw a histogram for each name, one below the other on one axis, like figure 10 of the DeSRA paper.

    Histograms of much and of little can be compared: each shows shares. Its highest bin is as high as its row, and the
    share that lies in it is written beside.

    Parameters
    ----------
    histograms
        Counts by name, one per bin. Without any count the row is empty.
    edges
        Of the bins: one more than there are counts.
    xlabel
        Of the axis.
    marks
        Where to draw a line, such as a percentile, with its value beside it.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = new_axes(_WIDTH, 0.7 + 0.34 * max(1, len(histograms)))
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
                _mark_row(axes, row, marks[name], inside=marks[name] < edges[0] + 0.2 * (edges[-1] - edges[0]))
        axes.annotate("highest bin", (1, 1), (6, 0), xycoords="axes fraction", textcoords="offset points",
                      va="bottom", fontsize=8)  # fmt: skip
        _name_rows(axes, list(histograms), top=1.0, bottom=0.15)
        axes.spines["left"].set_visible(False)
        _number_axes(axes, y=False)
        axes.set_xlim(edges[0], edges[-1])
        axes.set_xlabel(xlabel)
        return figure


def heat_table(rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float]]) -> Figure:
    """Draw a table of which each cell is coloured by its value, brighter where that is larger.

    Parameters
    ----------
    rows, columns
        Names.
    values
        A row of numbers for each row; NaN leaves a cell blank. Colours go from 0 to 1 where all lie there, else from
        the smallest to the largest.
    """
    table = np.array(values, np.float64).reshape(len(rows), len(columns))
    finite = table[np.isfinite(table)]
    low, high = float(finite.min(initial=0)), float(finite.max(initial=1))
    if low < 0 or high > 1:
        low, high = float(finite.min()), float(finite.max())
    with matplotlib.rc_context(STYLE):
        figure, axes = new_axes(_WIDTH, 0.5 + 0.3 * max(1, len(rows)))
        shades = (np.where(np.isfinite(table), table, low) - low) / (high - low or 1)
        colours = matplotlib.colormaps[_CELLS](shades)
        for (row, column), value in np.ndenumerate(table):
            if np.isfinite(value):
                axes.add_patch(matplotlib.patches.Rectangle((column - 0.5, row - 0.5), 1, 1, linewidth=0,
                                                            facecolor=colours[row, column]))  # fmt: skip
                ink = "#000000" if shades[row, column] > 0.5 else "#ffffff"
                axes.text(column, row, _number(value), ha="center", va="center", color=ink)
        axes.set_xlim(-0.5, len(columns) - 0.5)
        axes.xaxis.tick_top()
        axes.set_xticks(range(len(columns)), [shortened(name, _LABEL) for name in columns])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        _name_rows(axes, list(rows), top=0.5, bottom=0.5)
        return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure for print: black on white, PNG of 200 dpi or SVG whose letters are outlines.

    Raises
    ------
    UsageError
        The file has another suffix.
    TransientError
        The disk is full or failed.
    """
    kind = path.suffix.lower().removeprefix(".")
    if kind not in ("png", "svg"):
        raise UsageError(path, "is neither a PNG nor an SVG file", "name one with the suffix .png or .svg")
    metadata = {"Software": None} if kind == "png" else NO_METADATA
    figure.patch.set_alpha(1)
    try:
        with matplotlib.rc_context(STYLE | {"svg.fonttype": "path"}):
            replace_file(path, lambda file: figure.savefig(file, format=kind, dpi=200, facecolor="white",
                                                           metadata=metadata))  # fmt: skip
    finally:
        figure.patch.set_alpha(0)


def _finite(curve: Sequence[tuple[float, float]], *, log_x: bool) -> Values:
    points = np.array(curve, np.float64).reshape(-1, 2)
    points = points[np.isfinite(points).all(axis=1)]
    return points[points[:, 0] > 0] if log_x else points


def _mark(axes: Axes, name: str, x: float, y: float) -> None:
    """A ring with a name on the side where there is room, which only drawing tells: towards the middle."""
    axes.plot([x], [y], color=INK, marker="o", markersize=8, fillstyle="none", linestyle="none")
    axes.update_datalim([(x, y)])
    axes.autoscale_view()
    right = axes.transLimits.transform(axes.transScale.transform((x, y)))[0] > 0.5
    axes.annotate(name, (x, y), (-8 if right else 8, 5), textcoords="offset points", ha="right" if right else "left",
                  bbox=_BACKING)  # fmt: skip


def _mark_row(axes: Axes, row: int, x: float, *, inside: bool) -> None:
    """A line through a row with its value on the left, or ``inside`` on the right where that is at the border."""
    axes.plot([x] * 2, [row, row - 0.88], color=INK, linewidth=1.3)
    axes.annotate(short(float(f"{x:.3g}")), (x, row - 0.84), (4 if inside else -4, 0), textcoords="offset points",
                  ha="left" if inside else "right", va="top", fontsize=8, bbox=_BACKING)  # fmt: skip


def _legend(figure: Figure, names: list[str]) -> None:
    """Above the axes, in as many columns as fit."""
    longest = max(min(len(name), _LABEL) for name in names)
    columns = max(1, min(len(names), _CHARACTERS // (longest + 9)))
    figure.legend(loc="outside upper left", ncols=columns, frameon=False, handlelength=3.2)


def _name_rows(axes: Axes, names: list[str], *, top: float = 0.6, bottom: float = 0.6) -> None:
    """Rows from the top down."""
    axes.set_yticks(range(len(names)), [shortened(name, _LABEL) for name in names])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(names) - 1 + bottom, -top)


def _number_axes(axes: Axes, *, y: bool = True) -> None:
    """Few ticks, which read 10 k or 0.001."""
    for axis in (axes.xaxis, axes.yaxis) if y else (axes.xaxis,):
        if axis.get_scale() == "linear":
            axis.set_major_locator(MaxNLocator(nbins=6))
        axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        axis.set_minor_formatter(NullFormatter())


def _number(value: float) -> str:
    """A value as a label: counts in full, others with three significant digits."""
    told = f"{value:,.0f}" if value == round(value) else f"{value:.3g}"
    return told.replace("-", "−")
