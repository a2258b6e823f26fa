"""The page of calibrated weights, and the same for the Prefect UI."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from desra_core.calibration.weights import (
    CalibratedWeights,
    count_image,
    derive_weights,
    merged,
    suggest,
    weight_values,
)
from desra_core.detection.class_weights import load_weights
from desra_core.report.pages import (
    calibration_markdown,
    class_distributions,
    render_calibration,
    weight_rows,
    write_calibration,
)
from desra_core.settings.models import Fallback


@pytest.fixture
def calibrated() -> CalibratedWeights:
    """Three classes in three images; the third is thin."""
    rng = np.random.default_rng(0)
    tables = []
    for _ in range(3):
        labels = np.repeat(np.array([4, 2, 9], np.uint8), [2000, 990, 10])[np.newaxis]
        similarity = rng.beta(np.where(labels == 4, 3, 30), 1.2).astype(np.float32)
        tables.append(count_image(similarity, labels).to_table())
    histogram = merged(tables)
    rows = derive_weights(histogram, min_pixels=1000, fallback="one")
    published = load_weights("published").values
    suggested = suggest(histogram, weight_values(rows), published, 0.001)
    origin = {"workspace": "/a <b> & c", "min_pixels": 1000, "min_images": 3, "fallback": "one", "exclude": None}
    return CalibratedWeights(rows, histogram, suggested, (0.25, 0.5), origin)


def cells(page: str) -> list[list[str]]:
    rows = re.findall(r"<tr>(<td>.*?)</tr>", page)
    return [re.findall(r"<td>(.*?)</td>", row) for row in rows]


def test_page(calibrated: CalibratedWeights, tmp_path: Path) -> None:
    written = write_calibration(calibrated, tmp_path / "mine.toml")
    assert written == [tmp_path / name for name in ("mine.toml", "mine.html", "mine.svg")]
    page = written[1].read_text()
    assert page == render_calibration(calibrated, written[0])
    before = [path.read_bytes() for path in written]
    write_calibration(calibrated, tmp_path / "mine.toml")
    assert [path.read_bytes() for path in written] == before
    assert len(cells(page)) == 150
    assert cells(page)[:3] == [list(row.values()) for row in weight_rows(calibrated.rows)[:3]]
    ours, published = (f"{value:.4g}" for value in calibrated.suggested[1:])
    assert f"at most 0.10 % of the counted, artifact-free pixels fall below is\n<b>{ours}</b>" in page
    assert f"with the published weights {published}:" in page
    assert "2 of 150 classes have weights of their own, from 9,000\npixels of 3 images" in page
    assert "/a &lt;b&gt; &amp; c" in page
    assert "1 class has fewer than\n1,000 pixels or 3 images" in page
    assert "147 unseen classes" in page
    assert page.count("<svg") == 2
    assert not re.search(r"(src|href)=.(https?:|//)", page)


def test_rows_by_pixels(calibrated: CalibratedWeights) -> None:
    first, second, third, fourth = weight_rows(calibrated.rows)[:4]
    tree = next(row for row in calibrated.rows if row.class_index == 4)
    ratio = f"{tree.weight / tree.published_weight:.2f} x published"
    assert first == {
        "class": "4 tree", "pixels": "6,000", "images": "3", "interval": str(tree.interval),
        "published interval": str(tree.published_interval), "weight": f"{20 / (20 - tree.interval):.3f}",
        "published weight": f"{20 / (20 - tree.published_interval):.3f}", "note": ratio,
    }  # fmt: skip
    assert (second["class"], third["note"], fourth["note"]) == ("2 sky", "thin: fallback", "unseen: fallback")


@pytest.mark.parametrize("fallback", ["published", "one"])
def test_page_where_nothing_differs(calibrated: CalibratedWeights, fallback: Fallback) -> None:
    rows = derive_weights(calibrated.histogram, min_pixels=10**6, fallback=fallback)
    page = render_calibration(calibrated._replace(rows=rows), Path("a.csv"))
    assert "No calibrated class differs from the published table." in page
    assert page.count("<svg") == 1


def test_figure(calibrated: CalibratedWeights) -> None:
    axes = class_distributions(calibrated).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["tree", "sky", "grass, thin"]
    weights = {row.class_index: row.weight for row in calibrated.rows}
    lines = [line.get_xdata()[0] for line in axes.get_lines() if len(set(line.get_xdata())) == 1]
    assert lines == [1 / weights[index] for index in (4, 2, 9)]


def test_markdown(calibrated: CalibratedWeights) -> None:
    text = calibration_markdown(calibrated)
    assert text.startswith("9,000 pixels of 3 images; 147 classes are unseen.\n")
    ours, published = (f"{value:.4g}" for value in calibrated.suggested[1:])
    assert (
        f"At most 0.1 % of the pixels are below the threshold {ours}, with the published weights below {published}"
        in text
    )
    assert "| 4 tree | 6,000 | 3 |" in text
    assert text.count("\n| ") == 2 + 3
