"""Charts show what they are given, without colour too, in a page and in print."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import matplotlib.colors
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

from desra_core.report import charts

CURVES = {f"curve {index}": [(x / 40, (x / 40) ** (index + 1)) for x in range(41)] for index in range(8)}
HOSTILE = "<b>$x^2$ & \"'"


def texts(figure: Figure) -> list[str]:
    figure.draw_without_rendering()
    axes = figure.axes[0]
    labels = [*axes.texts, *axes.get_xticklabels(), *axes.get_yticklabels()]
    labels += [text for legend in figure.legends for text in legend.get_texts()]
    return [label.get_text() for label in labels]


def chart(kind: str, name: str = "name") -> Figure:
    if kind == "lines":
        return charts.line_chart({name: [(0, 1), (1, 2)], "b": [(0, 2), (1, 1)]}, xlabel="x", ylabel="y",
                                 marks={name: (0.5, 1.5)})  # fmt: skip
    if kind == "bars":
        return charts.bar_chart({name: 3, "b": 0.5}, xlabel="x", intervals={name: (2, 4)})
    return charts.distributions({name: [1, 2], "b": [0, 0]}, edges=[0, 0.5, 1], xlabel="D", marks={name: 0.3})


KINDS = ["lines", "bars", "distributions"]


def test_eight_curves_differ_without_their_colours() -> None:
    figure = charts.line_chart(CURVES, xlabel="recall", ylabel="precision")
    lines = figure.axes[0].lines
    assert len({(str(line._dash_pattern), line.get_marker()) for line in lines}) == 8
    assert len({str(line._dash_pattern) for line in lines}) == len({line.get_marker() for line in lines}) == 8
    colours = np.array([matplotlib.colors.to_rgb(line.get_color()) for line in lines])
    assert min(np.abs(a - b).sum() for i, a in enumerate(colours) for b in colours[:i]) > 0.3
    assert set(CURVES) <= set(texts(figure))
    assert len(charts.line_chart(CURVES | {"ninth": []}, xlabel="x", ylabel="y").axes[0].lines) == 8


def test_a_line_joins_the_points_that_can_be_drawn() -> None:
    curve = [(0.0, 1.0), (1.0, float("nan")), (2.0, 3.0), (float("inf"), 1.0), (1.5, 2.0)]
    (line,) = charts.line_chart({"a": curve}, xlabel="x", ylabel="y").axes[0].lines
    assert line.get_xydata().tolist() == [[0, 1], [2, 3], [1.5, 2]]
    figure = charts.line_chart({"a": curve, "none": []}, xlabel="x", ylabel="y", log_x=True, marks={"m": (0.1, 9.0)})
    line, none, mark = figure.axes[0].lines
    assert line.get_xydata().tolist() == [[2, 3], [1.5, 2]]
    assert len(none.get_xydata()) == 0
    assert mark.get_xydata().tolist() == [[0.1, 9]]
    assert figure.axes[0].get_ylim()[1] >= 9
    assert "0.1" in texts(figure)  # not 10⁻¹ in mathematics that a page cannot show
    assert "m" in texts(figure)


def test_small_charts_share_names_and_their_colours() -> None:
    panels = {"kappa": {"a": [(0.1, 1), (0.9, 2)], "b": [(0.1, 2)]}, "factor": {"b": [(0, 1), (2, 3)]}}
    figure = charts.small_charts(panels, ylabel="mean rank", log_x=["factor"])
    first, second = figure.axes
    assert [axes.get_xlabel() for axes in figure.axes] == ["kappa", "factor"]
    assert (first.get_ylabel(), second.get_xscale()) == ("mean rank", "log")
    assert [line.get_color() for line in first.lines] == [line.get_color() for line in second.lines]
    assert second.lines[1].get_xydata().tolist() == [[2, 3]]
    assert len(second.lines[0].get_xydata()) == 0
    assert {"a", "b"} <= set(texts(figure))


def test_bars_are_as_long_as_their_values() -> None:
    values = {"a": 1200.0, "b": 0.12345, "c": float("nan"), "d": 0.0}
    figure = charts.bar_chart(values, xlabel="x", intervals={"a": (1000, 1500), "c": (float("nan"), float("nan"))})
    axes = figure.axes[0]
    assert [bar.get_width() for bar in axes.patches] == [1200, 0.12345, 0, 0]
    assert [line.get_xdata().tolist() for line in map(plotted, axes.lines)] == [[1000, 1500]]
    assert [text for text in texts(figure) if text in ("1,200", "0.123", "–")] == ["1,200", "0.123", "–"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first is at the top


def plotted(line):
    line.set_xdata(np.asarray(line.get_xdata()))
    return line


def test_distributions_show_shares() -> None:
    edges, counts = np.linspace(0, 1, 5), [1, 3, 0, 4]
    one, many = (
        charts.inline(charts.distributions({"a": np.multiply(counts, by)}, edges=edges, xlabel="D"), "t")
        for by in (1, 1000)
    )
    assert one == many
    figure = charts.distributions({"a": counts, "none": [0] * 4}, edges=edges, xlabel="D", marks={"a": 0.625})
    (steps,) = figure.axes[0].patches
    heights = -(np.array(steps.get_data().values) - 0)
    assert heights / heights.max() == pytest.approx(np.array(counts) / 4)
    assert heights.max() < 1  # it stays in its row
    assert [text.get_text() for text in figure.axes[0].texts] == ["50 %", "0.625", "highest bin"]
    assert any(list(line.get_xdata()) == [0.625, 0.625] for line in figure.axes[0].lines)


@pytest.mark.parametrize("kind", KINDS)
def test_in_a_page_charts_take_its_colours_and_names_are_text(kind: str) -> None:
    svg = charts.inline(chart(kind, HOSTILE), HOSTILE)
    root = ElementTree.fromstring(re.sub(r" xlink:href=\"[^\"]*\"", "", svg))
    assert root.get("aria-label") == HOSTILE
    assert HOSTILE in " ".join(root.itertext())
    assert root.find(".//b") is None
    assert "currentColor" in svg
    assert not any(stand_in in svg for stand_in in (charts.INK, charts.BAR, charts.PAPER))
    assert svg == charts.inline(chart(kind, HOSTILE), HOSTILE)
    assert re.findall('style="(fill: [^;"]*)', svg)[:2] == ["fill: none"] * 2  # the page shows through


@pytest.mark.parametrize("kind", KINDS)
def test_print_is_black_on_white(kind: str, tmp_path: Path) -> None:
    for name in ("one", "two"):
        for suffix in ("png", "svg"):
            charts.save(chart(kind), tmp_path / "new" / f"{name}.{suffix}")
    assert (tmp_path / "new" / "one.png").read_bytes() == (tmp_path / "new" / "two.png").read_bytes()
    with Image.open(tmp_path / "new" / "one.png") as image:
        assert image.getpixel((0, 0)) == (255, 255, 255, 255)
    svg = (tmp_path / "new" / "one.svg").read_text()
    assert svg == (tmp_path / "new" / "two.svg").read_text()
    ElementTree.fromstring(svg)
    assert "var(--" not in svg
    assert "fill: #ffffff" in svg
    assert "<text" not in svg  # outlines, which need no font


@pytest.mark.parametrize(
    "values",
    [[5.0], [-3.0, -3.0], [0.0], [-1e7, 0.0, 1e9], list(np.linspace(-200, 3000, 500))],
    ids=["one", "two that are equal", "zero", "far apart", "many"],
)
def test_histograms_of_anything(values: list[float]) -> None:
    array = np.array(values)
    figure = charts.histogram(array, xlabel="severity", ylabel="regions")
    counts = figure.axes[0].patches[0].get_data().values
    assert counts.sum() == array.size
    svg = charts.inline(figure, "t")
    assert svg.startswith("<svg role=")
    assert "://" not in svg
    assert not any(stand_in in svg for stand_in in (charts.INK, charts.BAR, charts.PAPER))
    assert len(svg) < 40_000


@given(st.lists(st.tuples(st.integers(0, 10**6), st.floats(-1e30, 1e30)), max_size=1200))
def test_thinned_curves_keep_their_mean_and_order(points: list[tuple[float, float]]) -> None:
    points.sort()
    kept = charts.thinned(points)
    assert len(kept) == min(len(points), 500)
    assert (np.diff(kept[:, 0]) >= 0).all()
    if 0 < len(points) <= 500:
        assert np.array_equal(kept, np.array(points))


def test_curves_of_anything() -> None:
    nan, inf = float("nan"), float("inf")
    curves = ([(0, 0.0)], [(5, 1.0)], [(1, 2.0), (2, nan), (3, 2.0)], [(1, -1e300), (10**9, 1e300)], [], [(2, inf)])
    for points in curves:
        figure = charts.line_chart({"a": points, "b": points[:1]}, xlabel="x", ylabel="y", marks={"best": (2, 0.5)})
        svg = charts.inline(figure, "t")
        assert svg.startswith("<svg role=")
        assert "#0102" not in svg
        assert "://" not in svg
    long = charts.thinned([(float(step), np.sin(step)) for step in range(100_000)])
    figure = charts.line_chart({"a": long, "b": long, "c": long}, xlabel="x", ylabel="y", marks={"best": (50_000, 0)})
    assert len(charts.inline(figure, "t")) < 60_000
