"""Curves and orders of score maps, against scikit-learn and scipy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata, spearmanr
from sklearn.metrics import average_precision_score

from desra_core.detection.mask import Components
from desra_core.errors import UsageError
from desra_core.evaluation.score_histogram import (
    ScoreHistogram,
    count_scores,
    pooled_histogram,
    rank_correlation,
    ranks,
    region_means,
)
from tests.desra_core.evaluation.published_scripts import components


def rounded(scores: np.ndarray) -> np.ndarray:
    """Scores without the last 12 bits of their fraction, towards zero; negative ones away from it by one bin."""
    bits = scores.astype(np.float32).view(np.uint32)
    down = (bits & 0xFFFFF000).view(np.float32)
    return np.where(scores < 0, ((bits | 0xFFF).view(np.float32)), down)


def made(seed: int, kind: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Score maps of some images, with ties, over many octaves or of both signs; and ground truths that go with them."""
    rng = np.random.default_rng(seed)
    maps, truths = [], []
    for _ in range(int(rng.integers(1, 4))):
        base = rng.normal(size=(14, 17))
        truths.append(base + rng.normal(size=base.shape) > rng.uniform(0, 2))
        scores = {"normal": base, "ties": np.round(base), "octaves": np.exp(9 * base), "close": 1 + base / 4000}[kind]
        maps.append(scores.astype(np.float32 if seed % 2 else np.float64))
    return maps, truths


@settings(deadline=None, max_examples=12)
@given(st.integers(0, 2**32), st.sampled_from(["normal", "ties", "octaves", "close"]))
def test_the_area_is_scikit_learns(tmp_path_factory: pytest.TempPathFactory, seed: int, kind: str) -> None:
    """Of the rounded scores exactly, and of the scores themselves within the error that it says."""
    maps, truths = made(seed, kind)
    folder = tmp_path_factory.mktemp("histograms")
    for index, (scores, truth) in enumerate(zip(maps, truths, strict=True)):
        (folder / str(index)).write_bytes(count_scores(scores, truth, None).encoded())
    found = pooled_histogram(sorted(folder.iterdir())).average_precision()
    scores, truth = (np.concatenate([np.ravel(one) for one in given]) for given in (maps, truths))
    if not truth.any():
        assert found is None
        return
    assert found is not None
    assert found.value == pytest.approx(average_precision_score(truth, rounded(scores)), abs=1e-12)
    assert abs(found.value - average_precision_score(truth, scores)) <= found.error + 1e-12
    if kind == "ties":
        assert found.value == pytest.approx(average_precision_score(truth, scores), abs=1e-12)
        assert found.error == 0


def test_a_fine_map_has_a_small_error() -> None:
    """A quarter of a million different scores."""
    rng = np.random.default_rng(3)
    truth = rng.random((500, 500)) < 0.1
    scores = rng.random(truth.shape) + 0.3 * truth
    found = count_scores(scores, truth, None).average_precision()
    assert found is not None
    assert abs(found.value - average_precision_score(truth.ravel(), scores.ravel())) <= found.error < 2e-3


def test_ignored_pixels_and_pixels_without_a_score() -> None:
    rng = np.random.default_rng(0)
    truth, scores = rng.random((20, 30)) < 0.3, rng.integers(-3, 9, (20, 30)).astype(np.float64)
    ignored = truth & (rng.random(truth.shape) < 0.5)
    scores[:, 25:] = -np.inf
    histogram = count_scores(scores, truth, ignored)
    finite = np.where(np.isfinite(scores), scores, -100)
    prominent, every = histogram.average_precision(prominent=True), histogram.average_precision()
    assert prominent is not None
    assert every is not None
    assert every.value == pytest.approx(average_precision_score(truth.ravel(), finite.ravel()))
    left = ~ignored
    assert prominent.value == pytest.approx(average_precision_score(truth[left], finite[left]))
    assert prominent.value != every.value
    means = region_means(scores, Components(truth))
    for mean, region in zip(means, components(truth), strict=True):
        known = scores[region][np.isfinite(scores[region])]
        assert mean == (pytest.approx(known.mean()) if known.size else None)
    assert None in means


def test_zeros_of_both_signs_are_one_score() -> None:
    truth = np.array([[True, False]])
    found = count_scores(np.array([[-0.0, 0.0]]), truth, None).average_precision()
    assert found is not None
    assert found == (0.5, 0)


@settings(deadline=None, max_examples=80)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9)), min_size=2, max_size=30))
def test_rank_correlation_is_scipys(pairs: list[tuple[int, int]]) -> None:
    one, other = zip(*pairs, strict=True)
    assert ranks(one).tolist() == rankdata(one).tolist()
    found = rank_correlation(one, other)
    if len(set(one)) == 1 or len(set(other)) == 1:
        assert found is None
    else:
        assert found == pytest.approx(spearmanr(one, other).statistic, abs=1e-12)


def test_rank_correlation_of_nothing() -> None:
    assert rank_correlation([], []) is None
    assert rank_correlation([1.0], [2.0]) is None


@pytest.mark.parametrize("keep", [0, 40, -30])
def test_a_damaged_file(tmp_path: Path, keep: int) -> None:
    whole = count_scores(np.ones((4, 4)), np.eye(4, dtype=bool), None).encoded()
    (tmp_path / "a.npz").write_bytes(whole[:keep])
    with pytest.raises(UsageError, match=r"a\.npz: is damaged; delete it"):
        pooled_histogram([tmp_path / "a.npz"])


def test_nothing_was_counted() -> None:
    assert pooled_histogram([]).average_precision() is None
    assert isinstance(pooled_histogram([]), ScoreHistogram)
