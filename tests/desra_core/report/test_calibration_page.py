"""The page of calibrated weights."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from desra_core.calibration.summary import weight_rows
from desra_core.calibration.weights import (
    derive_weights,
)
from desra_core.report.pages import (
    class_distributions,
    render_calibration,
    write_calibration,
)
from desra_core.settings.models import Fallback
from tests.calibrated_weights import calibrated_weights

CALIBRATED = calibrated_weights()


def cells(page: str) -> list[list[str]]:
    rows = re.findall(r"<tr>(<td>.*?)</tr>", page)
    return [re.findall(r"<td>(.*?)</td>", row) for row in rows]


def test_page(tmp_path: Path) -> None:
    written = write_calibration(CALIBRATED, tmp_path / "mine.toml")
    assert written == [tmp_path / name for name in ("mine.toml", "mine.html", "mine.svg")]
    page = written[1].read_text()
    assert page == render_calibration(CALIBRATED, written[0])
    before = [path.read_bytes() for path in written]
    write_calibration(CALIBRATED, tmp_path / "mine.toml")
    assert [path.read_bytes() for path in written] == before
    assert cells(page) == [list(row.values()) for row in weight_rows(CALIBRATED.rows)[:3]]
    assert "9,000 pixels of 3 images counted" in page
    assert "classes: 2 calibrated, 1 thin, 147 unseen; thin and unseen ones get the fallback, one" in page
    assert "at threshold 0.7, 25 % of the counted pixels are below (50 % with the published weights)" in page
    assert "/a &lt;b&gt; &amp; c" in page
    assert "fewer than 1,000 pixels or 3 images: grass (30 px in 3)" in page
    assert "wall, building, floor, ceiling, " in page
    assert page.count("<svg") == 2
    assert not re.search(r"(src|href)=.(https?:|//)", page)


@pytest.mark.parametrize("fallback", ["published", "one"])
def test_page_where_nothing_differs(fallback: Fallback) -> None:
    rows = derive_weights(CALIBRATED.histogram, min_pixels=10**6, fallback=fallback)
    page = render_calibration(CALIBRATED._replace(rows=rows), Path("a.csv"))
    assert page.count("<svg") == 1


def test_figure() -> None:
    axes = class_distributions(CALIBRATED).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["tree", "sky", "grass, thin"]
    weights = {row.class_index: row.weight for row in CALIBRATED.rows}
    lines = [line.get_xdata()[0] for line in axes.get_lines() if len(set(line.get_xdata())) == 1]
    assert lines == [1 / weights[index] for index in (4, 2, 9)]
