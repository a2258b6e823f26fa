"""The synthetic benchmark of a pair, held against masks that are made one by one; and its sums, added up slowly."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest
from scipy import ndimage

from desra_core.benchmarking import synthetic
from desra_core.benchmarking.injection import contrast, inject, texture
from desra_core.benchmarking.places import cases
from desra_core.benchmarking.synthetic import FAINT, GRID, Trial, trial
from desra_core.detection.class_weights import load_weights
from desra_core.detection.detectors import load_detector
from desra_core.detection.detectors.desra import Desra
from desra_core.detection.mask import score_mask

EIGHT = np.ones((3, 3))
GIVEN = {
    "strengths": (0.25, 1.0),
    "sizes": (24**2, 40**2),
    "min_areas": (100, 300),
    "min_area": 200,
    "seed": 2,
    "thresholds": {"desra": (0.2, 0.6), "plain": (0.15, 0.5)},
}


class Residual:
    """A detector of a user's own: the blurred difference, with a frame of 3 px, which insists on labels."""

    threshold = 6.0
    smallest = 20
    inputs = ("labels",)

    def __call__(self, mse_sr: np.ndarray, gan_sr: np.ndarray, lr: np.ndarray | None, labels: np.ndarray) -> np.ndarray:
        assert lr is None
        assert labels.shape == gan_sr.shape[:2]
        difference = np.abs(mse_sr.astype(float) - gan_sr).mean(axis=2)
        return cv2.GaussianBlur(difference, (7, 7), 2)[3:-3, 3:-3]


def pair(shape: tuple[int, int] = (260, 280), seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A soft photo and its noisier twin, of which one part is spoilt already."""
    rng = np.random.default_rng(seed)
    smooth = cv2.GaussianBlur(rng.standard_normal((*shape, 3)), (0, 0), 9)
    mse_sr = 128 + 25 * smooth / smooth.std() + 4 * rng.standard_normal((*shape, 1))
    gan_sr = mse_sr + 3 * rng.standard_normal((*shape, 1))
    gan_sr[20:70, 20:80] += 40 * rng.standard_normal((50, 60, 1))
    return tuple(np.clip(image, 0, 255).astype(np.uint8) for image in (mse_sr, gan_sr))


@pytest.fixture(scope="module")
def inputs() -> dict[str, np.ndarray]:
    mse_sr, gan_sr = pair()
    exclude = np.zeros(gan_sr.shape[:2], bool)
    exclude[200:230, 30:70] = True
    labels = np.zeros(gan_sr.shape[:2], np.uint8)
    labels[:, 140:] = 17
    return {"mse_sr": mse_sr, "gan_sr": gan_sr, "exclude": exclude, "labels": labels}


METHODS = {"desra": Desra(load_weights("published").values), "residual": Residual(), "plain": Desra()}


@pytest.fixture(scope="module")
def tried(inputs: dict[str, np.ndarray]) -> Trial:
    rest = {key: value for key, value in inputs.items() if key not in ("mse_sr", "gan_sr")}
    return trial("a", inputs["mse_sr"], inputs["gan_sr"], METHODS, **rest, **GIVEN)


def test_trial(tried: Trial, inputs: dict[str, np.ndarray]) -> None:
    """All counts once more, from the definitions: inject, score, mask, compare."""
    mse_sr, gan_sr, exclude, labels = (inputs[key] for key in ("mse_sr", "gan_sr", "exclude", "labels"))
    shape = gan_sr.shape[:2]
    clean = {name: method(mse_sr, gan_sr, None, labels) for name, method in METHODS.items()}
    fired = score_mask(clean["desra"], shape, threshold=METHODS["desra"].threshold, min_area=100)
    assert fired[20:70, 20:80].mean() > 0.5
    drawn = cases("a", gan_sr, strengths=(0.25, 1.0), sizes=(24**2, 40**2), seed=2, exclude=exclude | fired)
    seen = []
    for sheet in sorted({case.sheet for case in drawn}):
        spoilt = gan_sr
        members = []
        for case in (case for case in drawn if case.sheet == sheet):
            place = case.place(shape)
            rng = np.random.default_rng(case.seed)
            after = inject(spoilt, case.kind, place, strength=case.strength, rng=rng)
            if contrast(spoilt, after, place) >= FAINT:
                members.append((case, contrast(spoilt, after, place)))
                spoilt = after
        for name, method in METHODS.items():
            scores = method(mse_sr, spoilt, None, labels)
            marked, before = (masks(values, shape, tried.thresholds[name]) for values in (scores, clean[name]))
            for case, told in members:
                place = case.place(shape)
                found, already = ([[half(mask, place) for mask in row] for row in cut] for cut in (marked, before))
                mask = score_mask(scores, shape, threshold=method.threshold, min_area=200)
                seen.append((case, told, texture(mse_sr, place), name, found, already, fit(mask, place)))
    assert len(tried.responses) == len(seen) > 40
    by_name = {(row.case, row.method): row for row in tried.responses}
    for case, told, hidden, name, found, already, iou in seen:
        row = by_name[case, name]
        assert row.contrast == pytest.approx(told)
        assert row.texture == pytest.approx(hidden)
        assert [list(bits) for bits in row.found] == found
        assert [list(bits) for bits in row.already] == already
        assert row.iou == pytest.approx(iou)
    assert any(np.array(row.already).any() for row in tried.responses)
    assert {bool(bit) for row in tried.responses for bit in np.ravel(row.found)} == {True, False}
    assert tried.faint == len(drawn) - len(seen) / 3


def test_false_alarms(tried: Trial, inputs: dict[str, np.ndarray]) -> None:
    shape = inputs["gan_sr"].shape[:2]
    for alarms in tried.false_alarms:
        method = METHODS[alarms.method]
        scores = method(inputs["mse_sr"], inputs["gan_sr"], None, inputs["labels"])
        for row, threshold in enumerate(tried.thresholds[alarms.method]):
            for column, area in enumerate(tried.min_areas):
                mask = score_mask(scores, shape, threshold=threshold, min_area=area)
                named, count = ndimage.label(mask, EIGHT)
                wrong = [(inputs["exclude"] & (named == index + 1)).sum() < (named == index + 1).sum() / 2
                         for index in range(count)]  # fmt: skip
                assert alarms.regions[row][column] == sum(wrong)
                assert alarms.pixels[row][column] == (mask & ~inputs["exclude"]).sum()
    assert tried.clean_pixels == (~inputs["exclude"]).sum()
    at = tried.thresholds["plain"].index(Desra.threshold), tried.min_areas.index(200)
    assert tried.false_alarms[2].regions[at[0]][at[1]] >= 1  # what was spoilt before


def masks(scores: np.ndarray, shape: tuple[int, int], thresholds: tuple[float, ...]) -> list[list[np.ndarray]]:
    return [[score_mask(scores, shape, threshold=t, min_area=a) for a in (100, 200, 300)] for t in thresholds]


def half(mask: np.ndarray, place: np.ndarray) -> bool:
    return bool((mask & place).sum() >= place.sum() / 2)


def fit(mask: np.ndarray, place: np.ndarray) -> float:
    named, count = ndimage.label(mask, EIGHT)
    regions = [named == index + 1 for index in range(count)]
    return max(((region & place).sum() / (region | place).sum() for region in regions), default=0)


def test_axes(tried: Trial) -> None:
    assert tried.min_areas == (100, 200, 300)
    assert tried.thresholds["desra"] == (0.2, Desra.threshold, 0.6)
    assert tried.thresholds["residual"] == tuple(sorted({6.0 * factor for factor in GRID}))
    assert tried.default == {"desra": Desra.threshold, "residual": 6.0, "plain": Desra.threshold}
    assert 1.0 in GRID
    sheets = {row.case.sheet for row in tried.responses}
    assert tried.scored_pixels == len(sheets) * 260 * 280
    assert all(seconds > 0 for seconds in tried.seconds.values())


def test_a_trial_is_plain_and_repeatable(tried: Trial, inputs: dict[str, np.ndarray]) -> None:
    assert Trial.from_json(json.loads(json.dumps(tried.to_json()))) == tried
    assert pickle.loads(pickle.dumps(tried)) == tried
    rest = {key: value for key, value in inputs.items() if key not in ("mse_sr", "gan_sr")}
    again = trial("a", inputs["mse_sr"], inputs["gan_sr"], METHODS, **rest, **GIVEN)
    left, right = tried.to_json(), again.to_json()
    del left["seconds"], right["seconds"]
    assert left == right


def test_methods_that_cannot_be_run_are_left_out(inputs: dict[str, np.ndarray]) -> None:
    small = {"strengths": (1.0,), "sizes": (24**2,)}
    made = trial("a", inputs["mse_sr"], inputs["gan_sr"], METHODS, **small)
    assert list(made.thresholds) == list(made.seconds) == ["desra", "plain"]
    assert {row.method for row in made.responses} == {"desra", "plain"}
    tiny = trial("a", inputs["mse_sr"][:60, :60], inputs["gan_sr"][:60, :60], {"niqe": load_detector("niqe")}, **small)
    assert tiny.responses == ()
    assert tiny.thresholds == {}


def test_gray_and_deep(inputs: dict[str, np.ndarray]) -> None:
    """The same grey levels in 16 bits, and a gray pair, which has no colour to shift."""
    small = {"strengths": (1.0,), "sizes": (30**2,), "methods": {"plain": Desra()}}
    gray = [inputs[key][:, :, :1] for key in ("mse_sr", "gan_sr")]
    deep = [image.astype(np.uint16) * np.uint16(257) for image in gray]
    shallow, exact = trial("a", *gray, **small), trial("a", *deep, **small)
    kinds = {row.case.kind for row in shallow.responses}
    assert "colour_shift" not in kinds
    assert "worms" in kinds
    assert [row.case for row in shallow.responses] == [row.case for row in exact.responses]
    assert shallow.false_alarms == exact.false_alarms


def test_images_of_two_sizes(inputs: dict[str, np.ndarray]) -> None:
    with pytest.raises(ValueError, match="no pair"):
        trial("a", inputs["mse_sr"][1:], inputs["gan_sr"], METHODS)


def test_real_pair(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A strong grid on a real photo is found where it is not lost in texture, a change of colour is not."""
    monkeypatch.setattr(synthetic, "GRID", (1.0,))
    read = [cv2.imread(str(shared_data / "pairs" / role / "computer.png")) for role in ("mse_sr", "gan_sr")]
    mse_sr, gan_sr = (np.ascontiguousarray(image[:600, :600, ::-1]) for image in read)
    made = trial("computer", mse_sr, gan_sr, {"desra": Desra()}, strengths=(1.0,), sizes=(64**2, 90**2), min_area=400)
    found = {row.case.kind: [] for row in made.responses}
    for row in made.responses:
        found[row.case.kind].append(row.found[0][0])
    assert any(found["checkerboard"])
    assert any(found["worms"])
    assert not any(found["colour_shift"])
