"""The measures, compared with the published numbers and with the rules of the published scripts."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.stats import binomtest
from sklearn.metrics import f1_score

from desra_core.evaluation import metrics
from desra_core.evaluation.mask_files import read_mask
from desra_core.evaluation.metrics import (
    MEASURES,
    Agreement,
    Overlap,
    bootstrap_intervals,
    compare_masks,
    mean_iou,
    pooled,
    score_masks,
    wilson_interval,
)
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
    assert total.found_at_kappa == total.found
    values = score_masks(agreements).values
    flat = [np.concatenate([np.ravel(mask) for mask in given]) for given in (truths, masks)]
    assert values["pixel_f1"] == pytest.approx(f1_score(*flat), abs=1e-12)
    some = [f1_score(truth.ravel(), mask.ravel()) for mask, truth in zip(masks, truths, strict=True)
            if (mask | truth).any()]  # fmt: skip
    assert values["pixel_f1_mean"] == pytest.approx(np.mean(some), abs=1e-12)
    assert values["flagged_share"] == flat[1].mean()


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2**32), st.sampled_from([0.1, 0.3, 0.5, 0.7, 1.0]), st.integers(0, 4))
def test_masks_found_at_an_overlap(seed: int, kappa: float, dilate: int) -> None:
    """Component by component, with exact fractions and scipy's dilation."""
    (mask, truth), square = random_masks(seed, 2, (0.05, 0.3)), np.ones((2 * dilate + 1,) * 2)
    wide = ndimage.binary_dilation(mask, square) if mask.any() else mask
    found = [
        Fraction(int((region & wide).sum()), int(region.sum())) >= Fraction(str(kappa))
        for region in published_scripts.components(truth)
    ]
    agreement = compare_masks(mask, truth, Overlap(kappa, dilate))
    assert (agreement.found_at_kappa, agreement.marked) == (sum(found), len(found))
    assert agreement.recall_at_kappa == (sum(found) / len(found) if found else None)
    assert replace(agreement, found_at_kappa=0) == replace(compare_masks(mask, truth), found_at_kappa=0)


def test_numbers_of_a_drawn_pair() -> None:
    """Two regions are covered by exactly half, one wholly; three pixels of six lie in both."""
    mask = mask_of("##....#", "......#", "##.....")
    truth = mask_of("##..#..", "....#..", "#.....#")
    agreement = compare_masks(mask, truth)
    assert agreement == Agreement(
        intersection=3, union=9, detected=3, right=2, marked=4, found=2, mask_pixels=6, ground_truth_pixels=6,
        pixels=21, found_at_kappa=2,
    )  # fmt: skip
    assert (agreement.precision, agreement.recall) == (2 / 3, 0.5)
    assert agreement.f1 == pytest.approx(4 / 7)
    assert (agreement.pixel_precision, agreement.pixel_recall, agreement.pixel_f1) == (0.5, 0.5, 0.5)
    assert agreement.flagged_share == 6 / 21
    assert compare_masks(mask, truth, Overlap(0.51)).found_at_kappa == 2  # both are covered wholly
    assert compare_masks(mask, truth, Overlap(1, 1)).found_at_kappa == 3  # one more is next to a marked pixel


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
    """The published script sums so; a compensated sum ends in another digit."""
    agreements = [Agreement(intersection=1, union=10)] * 10
    assert mean_iou(agreements) == 0.09999999999999999
    assert math.fsum([0.1] * 10) / 10 == 0.1


def test_masks_of_two_sizes() -> None:
    with pytest.raises(ValueError, match=r"\(1, 4\) and \(1, 2\)"):
        compare_masks(mask_of("#..."), mask_of("#."))


def random_agreements(seed: int, count: int, *, detections: int = 9) -> list[Agreement]:
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        union = int(rng.integers(0, 4)) * 25
        detected, marked = int(rng.integers(0, detections)), int(rng.integers(0, 9))
        rows.append(
            Agreement(
                intersection=int(rng.integers(0, union + 1)),
                union=union,
                detected=detected,
                right=int(rng.integers(0, detected + 1)),
                marked=marked,
                found=int(rng.integers(0, marked + 1)),
                mask_pixels=union // 2,
                ground_truth_pixels=union - union // 4,
                pixels=int(rng.integers(100, 200)),
                found_at_kappa=int(rng.integers(0, marked + 1)),
            )
        )
    return rows


def slow_intervals(agreements: list[Agreement], resamples: int, confidence: float, seed: int) -> dict[str, object]:
    """Measure one resampled set after the other by the functions for a set."""
    chosen = np.random.default_rng(seed).integers(len(agreements), size=(resamples, len(agreements)))
    values: dict[str, list[float]] = {measure: [] for measure in MEASURES}
    for row in chosen:
        drawn = [agreements[index] for index in row]
        total = pooled(drawn)
        f1 = [each.pixel_f1 for each in drawn if each.pixel_f1 is not None]
        measured = (mean_iou(drawn), mean_iou(drawn, empty=1), total.precision, total.recall, total.f1, total.pixel_f1,
                    sum(f1) / len(f1) if f1 else None, total.recall_at_kappa, total.flagged_share)  # fmt: skip
        for measure, value in zip(MEASURES, measured, strict=True):
            values[measure] += [] if value is None else [value]
    tail = 50 * (1 - confidence)
    return {key: tuple(np.percentile(found, [tail, 100 - tail])) if found else None for key, found in values.items()}


@pytest.mark.parametrize(("count", "detections"), [(2, 9), (7, 2), (40, 9)])
def test_the_same_as_one_set_after_the_other(monkeypatch: pytest.MonkeyPatch, count: int, detections: int) -> None:
    monkeypatch.setattr(metrics, "RESAMPLES", 100)
    monkeypatch.setattr(metrics, "CONFIDENCE", 0.9)
    for seed in range(3):
        agreements = [
            *random_agreements(seed, count, detections=detections),
            *[Agreement(1, 3, 2, 1, 3, 2, 2, 2, 9, 1)] * 2,
        ]
        monkeypatch.setattr(metrics, "SEED", seed)
        found = bootstrap_intervals(agreements)
        expected = slow_intervals(agreements, 100, 0.9, seed)
        assert list(found) == list(expected)
        for measure, interval in found.items():
            assert interval == (None if expected[measure] is None else pytest.approx(expected[measure], rel=1e-12))


def test_the_seed_decides_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    agreements = random_agreements(0, 20)
    found = bootstrap_intervals(agreements)
    assert bootstrap_intervals(agreements) == found
    monkeypatch.setattr(metrics, "SEED", 1)
    assert bootstrap_intervals(agreements) != found


def test_intervals_hold_the_measure_as_often_as_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """95 % of the intervals of sets that are drawn from a large set hold the large set's measure, or slightly fewer."""
    monkeypatch.setattr(metrics, "RESAMPLES", 300)
    population = random_agreements(5, 3000)
    total = pooled(population)
    truth = {"iou": mean_iou(population), "precision": total.precision, "recall": total.recall}
    rng = np.random.default_rng(0)
    held = dict.fromkeys(truth, 0)
    for _ in range(200):
        sample = [population[index] for index in rng.integers(len(population), size=40)]
        intervals = bootstrap_intervals(sample)
        for measure, value in truth.items():
            low, high = intervals[measure]
            held[measure] += low <= value <= high
    assert all(175 <= count <= 199 for count in held.values()), held


def test_where_there_is_no_interval() -> None:
    nothing = dict.fromkeys(MEASURES)
    assert bootstrap_intervals([]) == nothing
    assert bootstrap_intervals([Agreement(1, 2, 1, 1, 1, 1)]) == nothing
    empty = bootstrap_intervals([Agreement(pixels=20)] * 3)
    assert empty == nothing | {"iou_with_empty": (1.0, 1.0), "flagged_share": (0.0, 0.0)}
    one_of_two = bootstrap_intervals([Agreement(1, 2, 1, 1, 0, 0, 2, 1, 20), Agreement(pixels=20)])
    assert one_of_two == nothing | {"iou_with_empty": (0.5, 1.0), "flagged_share": (0.0, 0.1)}
    missed = bootstrap_intervals([Agreement(0, 9, 0, 0, 2, 0, 0, 9, 20)] * 2)
    assert missed == dict.fromkeys(MEASURES, (0.0, 0.0)) | dict.fromkeys(("precision", "f1"))
    wrong = bootstrap_intervals([Agreement(0, 9, 1, 0, 2, 0, 5, 4, 20)] * 2)
    assert wrong == dict.fromkeys(MEASURES, (0.0, 0.0)) | {"flagged_share": (0.25, 0.25)}


def test_the_scores_of_a_set() -> None:
    agreements = [
        Agreement(1, 2, 1, 1, 2, 1, 1, 2, 10, 2), Agreement(pixels=10), Agreement(0, 4, 3, 1, 0, 0, 4, 0, 20),
    ]  # fmt: skip
    scores = score_masks(agreements * 2)
    assert (scores.images, scores.empty_pairs) == (6, 2)
    assert scores.values == {
        "iou": 0.25, "iou_with_empty": 0.5, "precision": 0.5, "recall": 0.5, "f1": 0.5,
        "pixel_f1": 2 / 7, "pixel_f1_mean": 1 / 3, "recall_at_kappa": 1, "flagged_share": 1 / 8,
    }  # fmt: skip
    assert scores.undefined == {}
    assert all(low <= scores.values[name] <= high for name, (low, high) in scores.intervals.items())


def test_why_a_measure_is_undefined() -> None:
    defined = {"iou_with_empty", "flagged_share"}
    assert set(score_masks([Agreement(pixels=9)]).undefined) == set(MEASURES) - defined
    assert set(score_masks([]).undefined) == set(MEASURES)
    assert score_masks([Agreement(0, 9, 0, 0, 2, 0, 0, 9, 20)]).undefined == {
        "precision": "no region was detected",
        "f1": "precision or recall is undefined",
    }


def test_wilson_at_published_values() -> None:
    """Newcombe (1998), Table I: 81 of 263, 15 of 148, 0 of 20 and 1 of 29."""
    published = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (successes, trials), interval in published.items():
        assert wilson_interval(successes, trials) == pytest.approx(interval, abs=5e-5)


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 5000).flatmap(lambda trials: st.tuples(st.integers(0, trials), st.just(trials))))
def test_wilson_is_scipys(counts: tuple[int, int]) -> None:
    successes, trials = counts
    low, high = wilson_interval(successes, trials)
    reference = binomtest(successes, trials).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((reference.low, reference.high), abs=1e-12)
    assert 0 <= low <= successes / trials + 1e-12
    assert successes / trials - 1e-12 <= high <= 1


def test_wilson_without_trials_and_out_of_range() -> None:
    assert wilson_interval(0, 0) == (0, 1)
    for successes, trials in ((1, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="successes in"):
            wilson_interval(successes, trials)
