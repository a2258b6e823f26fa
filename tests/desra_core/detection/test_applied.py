"""Detectors as runs use them: thresholds, keys and words, and DeSRA's masks at every threshold."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from desra_core.detection.class_weights import weighted_scores
from desra_core.detection.detectors import METHODS, AppliedDetector, DetectorInputs, applied, load_detector
from desra_core.detection.mask import artifact_mask, score_mask
from desra_core.detection.similarity import variance_similarity
from desra_core.errors import ImageError, UsageError
from desra_core.settings import Detection
from desra_core.settings.models import Benchmarking


@given(st.integers(0, 2**32 - 1), st.floats(0.01, 1), st.booleans())
@settings(max_examples=40, deadline=None)
def test_minus_a_similarity_loses_no_pixel(seed: int, threshold: float, labelled: bool) -> None:
    """Also at thresholds that equal a value of the map."""
    rng = np.random.default_rng(seed)
    similarity = rng.random((60, 50)).astype(np.float32)
    classes = rng.integers(0, 150, similarity.shape).astype(np.uint8) if labelled else None
    weights = 1 + 3 * rng.random(150)
    adjusted = similarity.astype(np.float64)
    if classes is not None:
        adjusted = np.clip(adjusted * weights[classes], 0, 1)
    for limit in (threshold, float(adjusted[3, 4]), float(np.nextafter(adjusted[5, 6], 2))):
        suspect = weighted_scores(-similarity, classes, weights) > -np.float64(limit)
        assert np.array_equal(suspect, adjusted < limit)


def test_desra_in_runs_is_minus_the_similarity() -> None:
    rng = np.random.default_rng(1)
    pair = DetectorInputs(*rng.integers(0, 256, (2, 70, 60, 3)).astype(np.uint8))
    desra = applied(threshold=0.4)
    similarity = variance_similarity(*pair[:2], window=7)
    scores = desra.score(Path("a.png"), pair, 7, 256, 1)
    assert np.array_equal(scores, -similarity)
    mask = score_mask(scores, (70, 60), threshold=np.float64(desra.score_threshold), min_area=10)
    assert np.array_equal(mask, artifact_mask(similarity, threshold=0.4, min_area=10))
    with pytest.raises(ImageError, match=r"a\.png: has results of 60x70, smaller than the 61 px window; .*--window"):
        desra.score(Path("a.png"), pair, 61, 256, 1)


def test_thresholds_and_keys() -> None:
    assert (applied().name, applied().threshold, applied().score_threshold) == ("desra", 0.7, -0.7)
    assert (applied("ldl").threshold, applied("ldl").score_threshold) == (0.005, 0.005)
    assert applied("niqe", 3).score_threshold == 3
    with pytest.raises(UsageError, match=r"1\.5 is no similarity"):
        _ = applied("desra", 1.5).score_threshold
    assert applied("desra").scores_key(2, 11, "labels") == ("similarity", 1, 2, 11)
    assert applied("ssim").scores_key(2, 11, None) == ("score", 2, "ssim 1", None)
    for name in METHODS:
        assert applied(name).inputs == load_detector(name).inputs == ()
        assert applied(name).weighs_classes == (name == "desra")


def test_values_as_people_read_them() -> None:
    stored = np.array([0.0, 0.25, 1.0, np.nan], np.float32)
    desra, ldl = applied(), applied("ldl", 0.25)
    assert desra.heat(-stored)[:3].tolist() == [1, 0.75, 0]
    assert ldl.heat(stored)[:3].tolist() == [0, 0.5, 1]  # the threshold in the middle, clipped beyond twice of it
    assert math.isnan(ldl.heat(stored)[3])
    assert math.isnan(desra.heat(-stored)[3])
    assert (desra.text(-0.62), ldl.text(0.00123)) == ("0.620", "0.00123")
    assert (desra.heat_name, desra.value_name, ldl.value_name) == ("1 − D", "D", "ldl score")


def test_a_file_is_not_read_for_its_name() -> None:
    gone = applied("/some/folder/mine.py", 1.0)
    assert type(gone) is AppliedDetector
    assert gone.heat_name == "mine.py score"
    with pytest.raises(UsageError, match="does not exist"):
        applied("/some/folder/mine.py")


def test_every_method_is_in_the_documentation_and_in_the_help() -> None:
    page = (Path(__file__).parents[3] / "docs" / "how-to" / "detector.md").read_text()
    text = str(Detection.model_fields["method"].description) + str(Benchmarking.model_fields["methods"].description)
    for name in METHODS:
        assert name in page
        assert text.count(name) == 2
