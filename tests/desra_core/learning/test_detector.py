"""Learning a detector: blocks and their marks, trees equal to scikit-learn's, and files that are no detector."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import average_precision_score

from desra_core.detection.blocks import FEATURES
from desra_core.detection.detectors import DetectorInputs, detector_files, load_detector, score_pair
from desra_core.detection.detectors.trained import FORM, Trees, as_document, load_trained, odds_of
from desra_core.errors import UsageError
from desra_core.files import as_json, write_json
from desra_core.learning import detector
from desra_core.learning.detector import Blocks, blocks_of, fit_detector, injected_blocks
from tests.desra_core.detection.test_detectors import pair


def scene(seed: int, count: int = 1500) -> Blocks:
    """Blocks that are marked more often the larger the sum of two of their features is."""
    rng = np.random.default_rng(seed)
    features = rng.normal(0, 1, (count, len(FEATURES))).astype(np.float32)
    return Blocks(features, rng.random(count) < 1 / (1 + np.exp(4 - 3 * (features[:, 3] + features[:, 20]))))


@pytest.fixture(autouse=True)
def _few_trees(monkeypatch) -> None:
    monkeypatch.setitem(detector._FIT, "max_iter", 20)


@pytest.fixture(scope="module")
def scenes() -> list[Blocks]:
    return [scene(seed) for seed in range(6)]


def test_trees_predict_what_scikit_learn_predicts(scenes) -> None:
    blocks = Blocks(*map(np.concatenate, zip(*scenes, strict=True)))
    model = HistGradientBoostingClassifier(**detector._FIT).fit(*blocks)
    new = scene(99).features
    new[0, 3] = np.float32(model._predictors[0][0].nodes["num_threshold"][0])  # a value at a threshold
    odds = detector._fit(*blocks).log_odds(new)
    np.testing.assert_allclose(odds, model.decision_function(new), rtol=1e-9, atol=1e-9)


def test_numbers_are_of_scenes_left_out(scenes) -> None:
    fitted = fit_detector(scenes, false_alarms=0.05)
    assert (fitted.images, fitted.blocks, fitted.marked) == (6, 9000, sum(int(one.marked.sum()) for one in scenes))
    # By hand: with six scenes and five folds, each fold leaves out one scene or two.
    from sklearn.model_selection import StratifiedGroupKFold

    features, marked = map(np.concatenate, zip(*scenes, strict=True))
    groups = np.repeat(range(6), 1500)
    odds = np.empty(9000)
    for known, unseen in StratifiedGroupKFold(5).split(features, marked, groups):
        assert not set(groups[known]) & set(groups[unseen])
        model = HistGradientBoostingClassifier(**detector._FIT).fit(features[known], marked[known])
        odds[unseen] = model.decision_function(features[unseen])
    limit = np.log(fitted.threshold) + 1e-9
    assert 0.049 < (odds[~marked] > limit).mean() <= 0.05
    assert fitted.recall == pytest.approx((odds[marked] > limit).mean())
    assert fitted.precision_recall == pytest.approx(average_precision_score(marked, odds))


def test_each_fit_sees_artifacts_though_few_scenes_have_some(scenes) -> None:
    clean = [Blocks(scene(seed).features - np.float32(6), np.zeros(1500, np.bool_)) for seed in range(20, 28)]
    for order in ([*scenes[:2], *clean], [scenes[0], *clean, scenes[1]], [*clean, *scenes[:2]]):
        assert fit_detector(order, false_alarms=0.01).recall > 0.3


def test_a_detector_without_doubts_can_be_read(scenes, tmp_path) -> None:
    sure = [Blocks(one.features, one.features[:, 3] > 1) for one in scenes]
    fitted = fit_detector(sure, false_alarms=0.01)
    write_json(tmp_path / "a.json", as_document(fitted.trees, fitted.threshold, {}))
    assert 0 < load_trained(tmp_path / "a.json").threshold < np.exp(60)


def test_marks_of_blocks() -> None:
    mse_sr, gan_sr = pair(1, (64, 66, 3))
    mask = np.zeros((64, 66), np.bool_)
    mask[:8, :8] = True  # whole
    mask[:8, 16:20] = True  # half
    mask[:8, 32:35] = True  # less than half: left out
    mask[:, 64:] = True  # the last column of blocks lies partly outside of the image, whose border goes on
    blocks = blocks_of(mse_sr, gan_sr, mask, most=1000)
    assert blocks.features.shape == (8 * 9 - 1, len(FEATURES))
    assert blocks.marked.sum() == 2 + 8
    some = blocks_of(mse_sr, gan_sr, mask, most=20)
    assert len(some.marked) == 20
    assert {row.tobytes() for row in some.features} <= {row.tobytes() for row in blocks.features}


def test_injected_artifacts_are_marked() -> None:
    rng = np.random.default_rng(5)
    smooth = np.cumsum(rng.normal(0, 3, (400, 400, 3)), axis=1)
    image = np.clip(128 + smooth - smooth.mean(axis=1, keepdims=True), 0, 255).astype(np.uint8)
    blocks = injected_blocks("a", image, image, most=100_000, seed=1)
    contrast = blocks.features[:, FEATURES.index("residual, 1x1 blocks, from median")]
    assert 0.03 < blocks.marked.mean() < 0.4
    assert contrast[blocks.marked].mean() > contrast[~blocks.marked].mean() + 1


def test_too_little_to_learn_from_is_told(scenes) -> None:
    clean = Blocks(scenes[0].features, np.zeros(1500, np.bool_))
    for some in ([], [clean], [scenes[0], clean]):
        with pytest.raises(
            UsageError, match=r"the masks: have \d+ marked and \d+ other blocks of 8x8 px in [01] marked"
        ):
            fit_detector(some, false_alarms=0.01)


def test_a_file_gives_back_the_detector(scenes, tmp_path) -> None:
    fitted = fit_detector(scenes, false_alarms=0.05)
    path = tmp_path / "mine.json"
    write_json(path, as_document(fitted.trees, fitted.threshold, {"images": 6}))
    loaded = load_trained(path)
    assert detector_files(str(path)) == [path]
    assert loaded.threshold == fitted.threshold
    for before, after in zip(fitted.trees, loaded.trees, strict=True):
        np.testing.assert_array_equal(before, after)
    mse_sr, gan_sr = pair(2, (41, 50, 3))
    scores = score_pair(load_detector(str(path)), "mine", "a.png", DetectorInputs(mse_sr, gan_sr))
    assert scores.shape == (41, 50)
    assert (scores > 0).all()


def test_odds_are_those_of_the_block_at_its_centre() -> None:
    trees = Trees(
        np.zeros(1, int), np.zeros(1), np.zeros(1, int), np.zeros(1, int), np.full(1, 0.5), np.zeros(1, int), 1.0
    )
    np.testing.assert_allclose(odds_of(trees, np.zeros((2, 3, len(FEATURES)), np.float32)), np.exp(1.5), rtol=1e-6)


SOUND = {"feature": [0, 0, 0], "threshold": [0.5, 0, 0], "left": [1, 0, 0], "right": [2, 0, 0], "value": [0, 1, 2.0],
         "roots": [0], "baseline": 0.1}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"left": [0, 0, 0], "feature": [0, 0]},
        {"left": [3, 0, 0]},
        {"right": [-1, 0, 0]},
        {"left": [1, 1, 0]},  # a node that leads to itself would never end
        {"right": [2, 0, 1], "left": [1, 0, 1]},
        {"feature": [len(FEATURES), 0, 0]},
        {"feature": [-1, 0, 0]},
        {"roots": []},
        {"roots": [3]},
        {"value": [0, float("nan"), 1]},
        {"threshold": [float("inf"), 0, 0]},
        {"baseline": float("nan")},
        {"feature": [2**70, 0, 0]},
        {"feature": "abc"},
        {"feature": None},
    ],
)
def test_hostile_trees_are_refused(tmp_path, change) -> None:
    path = tmp_path / "a.json"
    document = FORM.document({}, threshold=2.0, trees=SOUND)
    path.write_bytes(as_json(document))
    assert load_trained(path).trees.log_odds(np.zeros((1, len(FEATURES)), np.float32))[0] == 1.1
    path.write_bytes(as_json(document | {"trees": SOUND | change}))
    with pytest.raises(UsageError, match=r"a\.json: is damaged"):
        load_trained(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{}", "is no detector"),
        (b"[1]", "is no detector"),
        (b"not json", "is damaged"),
        (as_json(FORM.document({}) | {"features": [0]}), "was learned by another version of desra"),
        (as_json(FORM.document({})), "is damaged"),
        (as_json(FORM.document({}, threshold=0, trees=SOUND)), r"is damaged \(its threshold is 0"),
        (as_json(FORM.document({}, threshold=1, trees=SOUND)).replace(b"desra-", b"desra_"), "is damaged"),
    ],
)
def test_other_files_are_no_detector(tmp_path, data, message) -> None:
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(UsageError, match=f"a.json: {message}"):
        load_trained(tmp_path / "a.json")
