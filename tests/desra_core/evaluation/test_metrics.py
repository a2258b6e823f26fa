"""The measures, held against the published numbers and against the published scripts' rules written anew."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from desra_core.evaluation.mask_files import read_mask
from desra_core.evaluation.metrics import Agreement, compare_masks, mean_iou, pooled
from tests.desra_core.evaluation import published_scripts


def mask_of(*rows: str) -> np.ndarray:
    """A mask drawn in characters: # is marked."""
    return np.array([[character == "#" for character in row] for row in rows])


def random_masks(seed: int, count: int, shares: tuple[float, ...] = (0.0, 0.1, 0.4, 0.7)) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.random((12, 15)) < rng.choice(shares) for _ in range(count)]


def test_the_published_numbers_to_the_last_digit(shared_data: Path) -> None:
    pairs = shared_data / "pairs"
    published = json.loads((pairs / "metrics.json").read_text())
    agreements = [
        compare_masks(read_mask(path), read_mask(pairs / "gt_mask" / path.name)[5:-5, 5:-5])
        for path in sorted((pairs / published["predictions"]).glob("*.png"))
    ]
    total = pooled(agreements)
    found = {"iou": mean_iou(agreements), "precision": total.precision, "recall": total.recall}
    assert found == published["published_scripts"]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.integers(1, 4))
def test_random_sets(seed: int, count: int) -> None:
    masks, truths = random_masks(seed, count), random_masks(seed + 1, count)
    agreements = [compare_masks(mask, truth) for mask, truth in zip(masks, truths, strict=True)]
    total = pooled(agreements)
    assume(total.detected and total.marked)
    assert total.precision == published_scripts.precision(masks, truths)
    assert total.recall == published_scripts.recall(masks, truths)
    expected = published_scripts.iou(masks, truths)
    if math.isnan(expected):
        assert any(agreement.empty for agreement in agreements)
    else:
        assert mean_iou(agreements) == expected
    assert total.mask_pixels == sum(map(np.sum, masks))
    assert total.ground_truth_pixels == sum(map(np.sum, truths))


def test_numbers_of_a_drawn_pair() -> None:
    """Two regions are covered by exactly half, one wholly; three pixels of six lie in both."""
    mask = mask_of("##....#", "......#", "##.....")
    truth = mask_of("##..#..", "....#..", "#.....#")
    agreement = compare_masks(mask, truth)
    assert agreement == Agreement(
        intersection=3, union=9, detected=3, right=2, marked=4, found=2, mask_pixels=6, ground_truth_pixels=6
    )
    assert (agreement.precision, agreement.recall) == (2 / 3, 0.5)
    assert agreement.f1 == pytest.approx(4 / 7)
    assert (agreement.pixel_precision, agreement.pixel_recall) == (0.5, 0.5)


def test_diagonal_pixels_are_one_region() -> None:
    assert compare_masks(mask_of("#.", ".#"), mask_of("#.", "..")).right == 1


@pytest.mark.parametrize(("area", "inside", "expected"), [(4, 2, True), (4, 1, False), (5, 2, False), (5, 3, True)])
def test_exactly_half_is_enough(area: int, inside: int, expected: bool) -> None:
    row, other = np.zeros((1, 9), bool), np.zeros((1, 9), bool)
    row[:, :area] = other[:, :inside] = True
    assert compare_masks(row, other).right == expected


def test_nothing_marked_is_undefined_and_not_zero() -> None:
    nothing, something = np.zeros((3, 3), bool), np.ones((3, 3), bool)
    empty = compare_masks(nothing, nothing)
    assert empty.empty
    values = (empty.iou, empty.precision, empty.recall, empty.f1, empty.pixel_precision, empty.pixel_recall)
    assert values == (None,) * 6
    missed = compare_masks(nothing, something)
    assert (missed.iou, missed.precision, missed.recall, missed.f1) == (0.0, None, 0.0, None)
    assert mean_iou([empty, missed]) == 0.0
    assert mean_iou([empty, missed], empty=1) == 0.5
    assert mean_iou([empty]) is None
    assert mean_iou([empty], empty=1) == 1.0


def test_nothing_right_and_nothing_found_is_zero() -> None:
    agreement = compare_masks(mask_of("#..."), mask_of("...#"))
    assert (agreement.iou, agreement.precision, agreement.recall, agreement.f1) == (0, 0, 0, 0)


def test_the_mean_is_summed_one_by_one() -> None:
    """As the published script does; a compensated sum ends in another digit."""
    agreements = [Agreement(intersection=1, union=10)] * 10
    assert mean_iou(agreements) == 0.09999999999999999
    assert math.fsum([0.1] * 10) / 10 == 0.1


def test_masks_of_two_sizes() -> None:
    with pytest.raises(ValueError, match=r"\(1, 4\) and \(1, 2\)"):
        compare_masks(mask_of("#..."), mask_of("#."))
