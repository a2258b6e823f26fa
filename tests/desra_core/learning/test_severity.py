"""Fitting how many viewers notice a region, to made-up raters of known behaviour."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss

from desra_core.detection.blocks import MAPS, block_maps
from desra_core.detection.class_weights import load_weights
from desra_core.detection.mask import Region
from desra_core.detection.severity import (
    REGION_FEATURES,
    SeverityModel,
    as_document,
    load_severity_model,
    region_features,
)
from desra_core.errors import UsageError
from desra_core.files import as_json, write_json
from desra_core.learning.severity import Bin, Rated, fit_severity, reliability
from tests.desra_core.detection.test_detectors import pair

FEATURES = len(REGION_FEATURES)


def made_up(seed: int, regions: int = 150, raters: int = 6) -> tuple[Rated, np.ndarray]:
    """Raters who notice a region by its area and its colour alone; returns the true shares, too."""
    rng = np.random.default_rng(seed)
    scaled = rng.normal(0, 1, (regions, FEATURES))
    features = scaled * np.geomspace(0.1, 50, FEATURES) + 3
    colour = REGION_FEATURES.index("colour")
    truth = 1 / (1 + np.exp(-(1.5 * scaled[:, 0] + 2 * scaled[:, colour] - 0.5)))
    counts = np.full(regions, raters)
    return Rated(features, rng.binomial(counts, truth), counts, np.arange(regions) % 30), truth


def test_raters_of_known_behaviour_are_predicted() -> None:
    rated, _ = made_up(0)
    fitted = fit_severity(rated)
    new, truth = made_up(1, 1000)
    predicted = fitted.model.noticed(new.features)
    assert np.abs(predicted - truth).mean() < 0.05
    assert fitted.brier < 0.7 * fitted.brier_of_mean
    assert fitted.rank_correlation > 0.7
    assert (fitted.images, fitted.regions, fitted.ratings) == (30, 150, 900)
    for one in fitted.reliability:
        assert abs(one.predicted - one.observed) < 0.15 + 1 / np.sqrt(one.ratings)


def test_raters_who_guess_teach_nothing() -> None:
    rated, _ = made_up(2)
    guessed = rated._replace(yes=np.random.default_rng(3).binomial(rated.raters, 0.4))
    fitted = fit_severity(guessed)
    assert fitted.brier > 0.97 * fitted.brier_of_mean
    assert fitted.model.noticed(rated.features).std() < 0.1


def test_the_brier_score_is_that_of_single_ratings(monkeypatch) -> None:
    rated, _ = made_up(4)
    monkeypatch.setattr("desra_core.learning.severity._PENALTIES", (0.1,))
    fitted = fit_severity(rated)
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    answers = np.array([(region, one) for region, yes in enumerate(rated.yes) for one in [1] * yes + [0] * (6 - yes)])
    predicted = np.empty(150)
    for known, left_out in GroupKFold(5).split(rated.features, groups=rated.groups):
        some = answers[np.isin(answers[:, 0], known)]
        model = make_pipeline(StandardScaler().fit(rated.features[known]))
        logistic = LogisticRegression(C=0.1, max_iter=1000)
        logistic.fit(model.transform(rated.features[some[:, 0]]), some[:, 1])
        predicted[left_out] = logistic.predict_proba(model.transform(rated.features[left_out]))[:, 1]
    assert fitted.brier == pytest.approx(brier_score_loss(answers[:, 1], predicted[answers[:, 0]]), abs=1e-4)


def test_reliability_by_hand() -> None:
    bins = reliability([0.05, 0.07, 0.31, 1.0], np.array([0, 3, 1, 4]), np.array([2, 3, 2, 4]))
    expected = [Bin((0.05 * 2 + 0.07 * 3) / 5, 3 / 5, 5), Bin(0.31, 1 / 2, 2), Bin(1.0, 1.0, 4)]
    np.testing.assert_allclose(bins, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda rated: Rated(*(column[:30] for column in rated)),
            "are 180, of 30 images; 200 of 5 images are the least",
        ),
        (lambda rated: rated._replace(groups=rated.groups % 4), "are 900, of 4 images"),
        (lambda rated: rated._replace(yes=rated.raters), "all say yes"),
        (lambda rated: rated._replace(yes=0 * rated.raters), "all say no"),
        (lambda rated: Rated(*(np.zeros(0, int),) * 4), "are 0, of 0 images"),
    ],
)
def test_too_few_ratings_are_told(change, message) -> None:
    with pytest.raises(UsageError, match=f"the ratings: {message}"):
        fit_severity(change(made_up(5)[0]))


def test_features_of_regions() -> None:
    mse_sr, gan_sr = pair(1, (200, 240, 3))
    mask = np.zeros((200, 240), np.bool_)
    mask[16:80, 24:88] = True  # whole blocks
    mask[150:153, 201:204] = True  # less than half of any block
    regions = [Region(24, 16, 64, 64, 64 * 64, 4, 0.5, 1.0), Region(201, 150, 3, 3, 9, None, 0.4, 1.0)]
    features = region_features(regions, mse_sr, gan_sr, mask)
    assert features.shape == (2, FEATURES)
    assert np.isfinite(features).all()
    first = dict(zip(REGION_FEATURES, features[0], strict=True))
    assert first["area"] == pytest.approx(np.log(4096))
    assert first["share"] == pytest.approx(np.log(4096 / 48000))
    assert first["class_weight"] == load_weights("published").values[4] != 1
    assert features[1, -1] == 1
    whole = block_maps(mse_sr, gan_sr)[2:10, 3:11].reshape(64, -1)
    np.testing.assert_allclose(features[0, 2:-3], whole.mean(axis=0), rtol=1e-4, atol=1e-5)
    assert first["lowest_similarity"] == pytest.approx(whole[:, 0].min(), rel=1e-5)
    around = block_maps(mse_sr, gan_sr)[:16, :17, MAPS.index("texture")].copy()
    around[2:10, 3:11] = np.nan
    assert first["texture_around"] == pytest.approx(np.nanmean(around), rel=0.02)  # but for the window's border
    # What lies far away changes nothing but the share.
    changed = gan_sr.copy()
    changed[:, 180:] = 0
    np.testing.assert_array_equal(region_features(regions, mse_sr, changed, mask)[0], features[0])


def sound() -> dict:
    ones = np.ones(FEATURES)
    return as_document(SeverityModel(0 * ones, ones, ones, 0.5), {})


def test_a_file_gives_back_the_model(tmp_path) -> None:
    fitted = fit_severity(made_up(6)[0])
    write_json(tmp_path / "a.json", as_document(fitted.model, {"images": 30}))
    for before, after in zip(fitted.model, load_severity_model(tmp_path / "a.json"), strict=True):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize(
    "change",
    [
        {"scale": [0] * FEATURES},
        {"mean": [0] * (FEATURES - 1)},
        {"coefficients": [float("nan")] * FEATURES},
        {"coefficients": "x"},
        {"intercept": None},
        {"mean": [[0] * FEATURES]},
        {"intercept": float("inf")},
    ],
)
def test_damaged_models_are_refused(tmp_path: Path, change) -> None:
    document = sound()
    (tmp_path / "a.json").write_bytes(as_json(document))
    assert load_severity_model(tmp_path / "a.json").noticed(np.zeros((1, FEATURES)))[0] == 1 / (1 + np.exp(-0.5))
    (tmp_path / "a.json").write_bytes(as_json(document | {"model": document["model"] | change}))
    with pytest.raises(UsageError, match=r"a\.json: is damaged"):
        load_severity_model(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({}, "is no severity model"),
        ({"kind": "desra-detector"}, "is no severity model"),
        (sound() | {"features": [0]}, "was learned by another version of desra"),
    ],
)
def test_other_files_are_no_model(tmp_path, document, message) -> None:
    (tmp_path / "a.json").write_bytes(as_json(document))
    with pytest.raises(UsageError, match=message):
        load_severity_model(tmp_path / "a.json")
