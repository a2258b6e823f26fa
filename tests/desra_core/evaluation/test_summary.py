"""What is told about an evaluation: what limits its numbers, and how much of long tables and lists."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from desra_core.evaluation import summary
from desra_core.evaluation.evaluation import Evaluation, evaluate_masks
from desra_core.evaluation.mask_files import pair_folders
from desra_core.images.codec import encode_mask, encode_png


@pytest.fixture
def evaluation(tmp_path: Path) -> Evaluation:
    """Two pairs, one right and one wrong, in three classes, and a mask and two ground truths without a twin."""
    for name, folder, column in (("a", "masks", 10), ("a", "gt", 10), ("b", "masks", 10), ("b", "gt", 50),
                                 ("c", "masks", 10), ("d", "gt", 10), ("e", "gt", 10)):  # fmt: skip
        mask = np.zeros((60, 90), np.bool_)
        mask[20:40, column : column + 20] = True
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f"{name}.png").write_bytes(encode_mask(mask))
    labels = np.repeat(np.array([2, 4, 12], np.uint8), 30)[np.newaxis].repeat(60, axis=0)
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "b.png").write_bytes(encode_png(labels))
    return evaluate_masks(pair_folders(tmp_path / "masks", tmp_path / "gt", labels=tmp_path / "labels"))


def test_long_tables_and_lists_are_cut(evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch) -> None:
    _, classes = summary.score_sections(evaluation, 1)
    assert [row["class"] for row in classes.table] == ["sky"]
    assert classes.note.endswith("The 1 of 3 classes with most regions.")
    images, _, left = summary.detail_sections(evaluation)
    assert [(row["image"], row["IoU"], row["precision"]) for row in images.table] == [
        ("b", "0.000", "0.000 (0 of 1)"), ("a", "1.000", "1.000 (1 of 1)"),
    ]  # fmt: skip
    assert [line.rpartition("/")[2] for line in left.bullets] == [
        "c.png: has no ground truth", "d.png: has no mask", "e.png: has no mask",
    ]  # fmt: skip
    monkeypatch.setattr(summary, "_IMAGES", 1)
    monkeypatch.setattr(summary, "_LISTED", 1)
    images, _, left = summary.detail_sections(evaluation)
    assert [row["image"] for row in images.table] == ["b"]
    assert images.note == "The 1 of 2 with the lowest IoU; images.csv has them all."
    assert left.bullets[1:] == ["and 2 more: evaluation.json has them all"]


def test_what_limits_the_numbers_is_said(evaluation: Evaluation) -> None:
    assert summary.notes(evaluation) == [
        "masks and ground truth have one size, which is taken for the image's, so 5 px a side are cropped (--size)",
        "1 image without class labels is left out by class",
    ]
    pairing = evaluation.pairing._replace(not_looked_at=2, outdated=1)
    *_, left = summary.detail_sections(replace(evaluation, pairing=pairing))
    assert left.bullets[-1] == "2 images without a human mask"
    assert summary.notes(replace(evaluation, pairing=pairing, classes=None, sizes="valid")) == [
        "2 images without a human mask: not judged",
        "1 human mask left out: drawn on another photo or on another model's result",
        "masks and ground truth have one size, which is taken for that of the image without 5 px a side (--size)",
    ]
