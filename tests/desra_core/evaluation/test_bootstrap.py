"""Intervals, held against a plain loop over the same draws, and against what they are for."""

from __future__ import annotations

import numpy as np
import pytest

from desra_core.evaluation import bootstrap
from desra_core.evaluation.bootstrap import MEASURES, bootstrap_intervals
from desra_core.evaluation.mask_scores import score_masks
from desra_core.evaluation.metrics import Agreement, mean_iou, pooled


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
            )
        )
    return rows


def slow_intervals(agreements: list[Agreement], resamples: int, confidence: float, seed: int) -> dict[str, object]:
    """One resampled set after the other, measured by the functions for a set."""
    chosen = np.random.default_rng(seed).integers(len(agreements), size=(resamples, len(agreements)))
    values: dict[str, list[float]] = {measure: [] for measure in MEASURES}
    for row in chosen:
        drawn = [agreements[index] for index in row]
        total = pooled(drawn)
        measured = (mean_iou(drawn), mean_iou(drawn, empty=1), total.precision, total.recall, total.f1)
        for measure, value in zip(MEASURES, measured, strict=True):
            values[measure] += [] if value is None else [value]
    tail = 50 * (1 - confidence)
    return {key: tuple(np.percentile(found, [tail, 100 - tail])) if found else None for key, found in values.items()}


@pytest.mark.parametrize(("count", "detections"), [(2, 9), (7, 2), (40, 9)])
def test_the_same_as_one_set_after_the_other(count: int, detections: int) -> None:
    for seed in range(3):
        agreements = [*random_agreements(seed, count, detections=detections), *[Agreement(1, 3, 2, 1, 3, 2)] * 2]
        found = bootstrap_intervals(agreements, resamples=100, confidence=0.9, seed=seed)
        expected = slow_intervals(agreements, 100, 0.9, seed)
        assert list(found) == list(expected)
        for measure, interval in found.items():
            assert interval == (None if expected[measure] is None else pytest.approx(expected[measure], rel=1e-12))


def test_the_draws_do_not_depend_on_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit."""
    rng = np.random.default_rng(0)
    sets = [[Agreement(int(part), 9973) for part in rng.integers(1, 9000, 101)] for _ in range(10)]
    whole = [bootstrap_intervals(agreements) for agreements in sets]
    for size in (1, 7, 50):
        monkeypatch.setattr(bootstrap, "_DRAWS", size * 101)
        assert [bootstrap_intervals(agreements) for agreements in sets] == whole
    assert bootstrap_intervals(sets[0], seed=1) != whole[0]


def test_they_hold_what_they_promise() -> None:
    """Of sets drawn from a large one, 95 % of the intervals hold its measure; bootstrap intervals are a bit short."""
    population = random_agreements(5, 3000)
    total = pooled(population)
    truth = {"iou": mean_iou(population), "precision": total.precision, "recall": total.recall}
    rng = np.random.default_rng(0)
    held = dict.fromkeys(truth, 0)
    for _ in range(200):
        sample = [population[index] for index in rng.integers(len(population), size=40)]
        intervals = bootstrap_intervals(sample, resamples=300)
        for measure, value in truth.items():
            low, high = intervals[measure]
            held[measure] += low <= value <= high
    assert all(175 <= count <= 199 for count in held.values()), held


def test_where_there_is_no_interval() -> None:
    nothing = dict.fromkeys(MEASURES)
    assert bootstrap_intervals([]) == nothing
    assert bootstrap_intervals([Agreement(1, 2, 1, 1, 1, 1)]) == nothing
    empty = bootstrap_intervals([Agreement()] * 3)
    assert empty == nothing | {"iou_with_empty": (1.0, 1.0)}
    one_of_two = bootstrap_intervals([Agreement(1, 2, 1, 1, 0, 0), Agreement()])
    assert one_of_two == nothing | {"iou_with_empty": (0.5, 1.0)}
    missed = bootstrap_intervals([Agreement(0, 9, 0, 0, 2, 0)] * 2)
    assert missed == nothing | dict.fromkeys(("iou", "iou_with_empty", "recall"), (0.0, 0.0))
    wrong = bootstrap_intervals([Agreement(0, 9, 1, 0, 2, 0)] * 2)
    assert wrong == dict.fromkeys(MEASURES, (0.0, 0.0))


def test_the_scores_of_a_set() -> None:
    agreements = [Agreement(1, 2, 1, 1, 2, 1), Agreement(), Agreement(0, 4, 3, 1, 0, 0)]
    scores = score_masks(agreements * 2)
    assert (scores.images, scores.empty_pairs) == (6, 2)
    assert scores.values == {
        "iou": 0.25, "iou_with_empty": 0.5, "precision": 0.5, "recall": 0.5, "f1": 0.5,
    }  # fmt: skip
    assert scores.undefined == {}
    assert all(low <= scores.values[name] <= high for name, (low, high) in scores.intervals.items())


def test_why_a_measure_is_undefined() -> None:
    assert set(score_masks([Agreement()]).undefined) == {"iou", "precision", "recall", "f1"}
    assert set(score_masks([]).undefined) == set(MEASURES)
    assert score_masks([Agreement(0, 9, 0, 0, 2, 0)]).undefined == {
        "precision": "no region was detected",
        "f1": "precision or recall is undefined",
    }
