"""What is told about class weights, in a terminal and in the Prefect UI."""

from __future__ import annotations

from desra_core.calibration.summary import thin_classes, weight_rows, weight_sections
from desra_core.calibration.weights import derive_weights
from desra_core.evaluation.table import document_as_markdown, document_as_text
from tests.calibrated_weights import calibrated_weights

CALIBRATED = calibrated_weights()
TREE = next(row for row in CALIBRATED.rows if row.class_index == 4)


def test_rows_by_pixels() -> None:
    first, second, third, fourth = weight_rows(CALIBRATED.rows)[:4]
    ratio = f"{TREE.weight / TREE.published_weight:.2f} x published"
    assert first == {
        "class": "4 tree", "pixels": "6,000", "images": "3", "interval": str(TREE.interval),
        "published interval": str(TREE.published_interval), "weight": f"{20 / (20 - TREE.interval):.3f}",
        "published weight": f"{20 / (20 - TREE.published_interval):.3f}", "note": ratio,
    }  # fmt: skip
    assert (second["class"], third["note"], fourth["note"]) == ("2 sky", "thin: fallback", "unseen: fallback")


def test_text() -> None:
    lines = document_as_text("", weight_sections(CALIBRATED)[:1]).splitlines()
    suggested = CALIBRATED.suggested
    assert lines[:5] == [
        "- 9,000 pixels of 3 images counted",
        "- classes: 2 calibrated, 1 thin, 147 unseen; thin and unseen ones get the fallback, one",
        "- at threshold 0.7, 25 % of the counted pixels are below (50 % with the published weights), before morphology",
        f"- --threshold {suggested.threshold:.4g} puts at most 0.1 % of the counted, artifact-free pixels below, "
        f"before morphology; with the published weights {suggested.published_threshold:.4g}",
        f"- tree: weight {TREE.weight:.3f}, published {TREE.published_weight:.3f}",
    ]


def test_markdown() -> None:
    text = document_as_markdown("Class weights", weight_sections(CALIBRATED))
    assert f"--threshold {CALIBRATED.suggested.threshold:.4g} puts" in text
    assert "| 4 tree | 6,000 | 3 |" in text
    assert text.count("\n| ") == 2 + 3
    assert "wall, building, floor, ceiling, " in text


def test_thin_classes() -> None:
    assert thin_classes(CALIBRATED) == "classes with fewer than 1,000 pixels or 3 images: grass (30 px in 3)"
    rows = derive_weights(CALIBRATED.histogram, min_pixels=1, fallback="one")
    assert thin_classes(CALIBRATED._replace(rows=rows)) == ""
