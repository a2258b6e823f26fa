"""The trial of a pair, compared with masks that are made one by one."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from scipy import ndimage

from desra_core.benchmarking import injection, trial
from desra_core.benchmarking.injection import cases, contrast, inject, texture
from desra_core.benchmarking.trial import FAINT, GRID, ScoreGrid, Trial, run_trial
from desra_core.detection.class_weights import load_weights
from desra_core.detection.detectors import DetectorInputs, load_detector
from desra_core.detection.detectors.desra import Desra
from desra_core.detection.mask import MIN_AREA, score_mask

EIGHT = np.ones((3, 3))


class Residual:
    """A user's detector: the blurred difference with a frame of 3 px. It needs labels."""

    threshold = 6.0
    smallest = 20
    inputs = ("labels",)

    def __call__(self, mse_sr: np.ndarray, gan_sr: np.ndarray, lr: np.ndarray | None, labels: np.ndarray) -> np.ndarray:
        assert lr is None
        assert labels.shape == gan_sr.shape[:2]
        difference = np.abs(mse_sr.astype(float) - gan_sr).mean(axis=2)
        return cv2.GaussianBlur(difference, (7, 7), 2)[3:-3, 3:-3]


def pair(shape: tuple[int, int] = (260, 280), seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Make a soft photo and its noisier twin, which has an artifact already."""
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


def pair_of(inputs: dict[str, np.ndarray]) -> DetectorInputs:
    return DetectorInputs(inputs["mse_sr"], inputs["gan_sr"], labels=inputs["labels"])


def designed(
    patch: pytest.MonkeyPatch,
    strengths: tuple[float, ...],
    sizes: tuple[int, ...],
    grid: tuple[float, ...],
    areas: tuple[int, ...] = trial.MIN_AREAS,
) -> None:
    """Make trials of few artifacts, thresholds and minimal areas."""
    patch.setattr(injection, "STRENGTHS", strengths)
    patch.setattr(injection, "SIZES", sizes)
    patch.setattr(trial, "GRID", grid)
    patch.setattr(trial, "MIN_AREAS", areas)


@pytest.fixture(scope="module")
def few() -> Iterator[None]:
    """The design of `tried`."""
    with pytest.MonkeyPatch.context() as patch:
        designed(patch, (0.25, 1.0), (24**2, 40**2), (0.25, 1.5), (100, 300))
        yield


@pytest.fixture(scope="module")
def tried(inputs: dict[str, np.ndarray], few: None) -> Trial:
    return run_trial("a", pair_of(inputs), METHODS, inputs["exclude"], seed=2, min_area=200)


def test_trial(tried: Trial, inputs: dict[str, np.ndarray]) -> None:
    """All counts are made again from the definitions: inject, score, mask, compare."""
    mse_sr, gan_sr, exclude, labels = (inputs[key] for key in ("mse_sr", "gan_sr", "exclude", "labels"))
    shape = gan_sr.shape[:2]
    clean = {name: method(mse_sr, gan_sr, None, labels) for name, method in METHODS.items()}
    fired = score_mask(clean["desra"], shape, threshold=METHODS["desra"].threshold, min_area=100)
    assert fired[20:70, 20:80].mean() > 0.5
    drawn = cases("a", gan_sr, seed=2, exclude=exclude | fired)
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
    assert tried.thresholds["desra"] == (0.25 * Desra.threshold, Desra.threshold, 1.5 * Desra.threshold)
    assert tried.thresholds["residual"] == (1.5, 6.0, 9.0)
    assert tried.default == {"desra": Desra.threshold, "residual": 6.0, "plain": Desra.threshold}
    assert 1.0 in GRID
    sheets = {row.case.sheet for row in tried.responses}
    assert tried.scored_pixels == len(sheets) * 260 * 280
    assert all(seconds > 0 for seconds in tried.seconds.values())


def test_a_trial_is_plain_and_repeatable(tried: Trial, inputs: dict[str, np.ndarray]) -> None:
    adapter = TypeAdapter(Trial)
    assert adapter.validate_json(adapter.dump_json(tried)) == tried
    assert adapter.validate_json(json.dumps(asdict(tried))) == tried
    assert pickle.loads(pickle.dumps(tried)) == tried
    again = run_trial("a", pair_of(inputs), METHODS, inputs["exclude"], seed=2, min_area=200)
    assert replace(again, seconds=tried.seconds) == tried


def test_methods_that_cannot_be_run_are_left_out(
    inputs: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    designed(monkeypatch, (1.0,), (24**2,), (1.0,))
    both = DetectorInputs(inputs["mse_sr"], inputs["gan_sr"])
    made = run_trial("a", both, METHODS, min_area=MIN_AREA)
    assert list(made.thresholds) == list(made.seconds) == ["plain"]
    assert {row.method for row in made.responses} == {"plain"}
    both = DetectorInputs(inputs["mse_sr"][:60, :60], inputs["gan_sr"][:60, :60])
    tiny = run_trial("a", both, {"niqe": load_detector("niqe")}, min_area=MIN_AREA)
    assert tiny.responses == ()
    assert tiny.thresholds == {}


def test_gray_and_deep(inputs: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same grey levels in 16 bits, and a gray pair, which has no colour to shift."""
    designed(monkeypatch, (1.0,), (30**2,), (0.5, 1.0, 2.0))
    gray = [inputs[key][:, :, :1] for key in ("mse_sr", "gan_sr")]
    deep = [image.astype(np.uint16) * np.uint16(257) for image in gray]
    pairs = [DetectorInputs(*both) for both in (gray, deep)]
    shallow, exact = (run_trial("a", both, {"plain": Desra()}, min_area=MIN_AREA) for both in pairs)
    kinds = {row.case.kind for row in shallow.responses}
    assert "colour_shift" not in kinds
    assert "worms" in kinds
    assert [row.case for row in shallow.responses] == [row.case for row in exact.responses]
    assert shallow.false_alarms == exact.false_alarms


def test_real_pair(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A strong grid on a real photo is found outside of texture; a change of colour is not found."""
    read = [cv2.imread(str(shared_data / "pairs" / role / "computer.png")) for role in ("mse_sr", "gan_sr")]
    mse_sr, gan_sr = (np.ascontiguousarray(image[:600, :600, ::-1]) for image in read)
    designed(monkeypatch, (1.0,), (64**2, 90**2), (1.0,))
    made = run_trial("computer", DetectorInputs(mse_sr, gan_sr), {"desra": Desra()}, min_area=400)
    found = {row.case.kind: [] for row in made.responses}
    for row in made.responses:
        found[row.case.kind].append(row.found[0][0])
    assert any(found["checkerboard"])
    assert any(found["worms"])
    assert not any(found["colour_shift"])


THRESHOLDS, MIN_AREAS = (0.2, 0.5, 1.0, 9.0), (100, 250, 400, 900)


def smooth(rng: np.random.Generator, shape: tuple[int, int], sigma: float) -> np.ndarray:
    field = cv2.GaussianBlur(rng.standard_normal(shape), (0, 0), sigma)
    return field / field.std()


def slow_grid(scores: np.ndarray, shape: tuple[int, int], places: list[np.ndarray], excluded: np.ndarray) -> tuple:
    """Count found places, regions and pixels with a separate mask for each point."""
    found = [[[] for _ in THRESHOLDS] for _ in places]
    regions, pixels = [[] for _ in THRESHOLDS], [[] for _ in THRESHOLDS]
    for row, threshold in enumerate(THRESHOLDS):
        for area in MIN_AREAS:
            mask = score_mask(scores, shape, threshold=threshold, min_area=area)
            for number, place in enumerate(places):
                found[number][row].append((mask & place).sum() / place.sum() >= 0.5)
            named, count = ndimage.label(mask, EIGHT)
            wrong = [named == index + 1 for index in range(count)]
            regions[row].append(sum((one & excluded).sum() / one.sum() < 0.5 for one in wrong))
            pixels[row].append((mask & ~excluded).sum())
    return found, regions, pixels


def grid(shape: tuple[int, int]) -> ScoreGrid:
    return ScoreGrid(shape, THRESHOLDS, MIN_AREAS, threshold=0.5, min_area=400)


@settings(deadline=None, max_examples=30)
@given(st.integers(40, 90), st.integers(40, 90), st.integers(0, 6), st.integers(0, 2**32 - 1))
def test_grid(height: int, width: int, frame: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = height, width
    scores = smooth(rng, shape, rng.uniform(1.5, 6))[frame : height - frame, frame : width - frame]
    excluded = smooth(rng, shape, 5) > 0.8
    places = [smooth(rng, shape, 6) > level for level in (0.5, 1.0, 1.4)]
    places = [place for place in places if place.any()]
    found, regions, pixels = slow_grid(scores, shape, places, excluded)
    answers = grid(shape).find(scores, [np.flatnonzero(place) for place in places])
    assert [np.array(bits).tolist() for bits, _ in answers] == found
    assert grid(shape).false_alarms(scores, excluded) == (
        tuple(map(tuple, regions)),
        tuple(map(tuple, pixels)),
    )
    mask = score_mask(scores, shape, threshold=0.5, min_area=400)
    named, count = ndimage.label(mask, EIGHT)
    for place, (_, iou) in zip(places, answers, strict=True):
        fits = [((named == index + 1) & place).sum() / ((named == index + 1) | place).sum() for index in range(count)]
        assert iou == pytest.approx(max(fits, default=0))


def test_exactly_half_is_found() -> None:
    scores = np.zeros((60, 60))
    scores[10:50, 10:50] = 1
    mask = score_mask(scores, (60, 60), threshold=0.5, min_area=400)
    rows = np.flatnonzero(mask.any(axis=1))
    place = np.zeros((60, 60), bool)
    place[rows[0] - 3 : rows[0] + 3, 20:40] = True
    assert grid((60, 60)).find(scores, [np.flatnonzero(place)])[0][0][1][1]
    place[rows[0] - 4, 20] = True
    assert not grid((60, 60)).find(scores, [np.flatnonzero(place)])[0][0][1][1]
    # A region of which just half is excluded is no false alarm.
    half = np.zeros((60, 60), bool)
    half[:, :30] = True
    assert grid((60, 60)).false_alarms(scores, half)[0][1][1] == 0
    half[rows[0], 29] = False
    assert grid((60, 60)).false_alarms(scores, half)[0][1][1] == 1


def test_a_region_of_the_minimal_area_is_dropped() -> None:
    scores = np.zeros((80, 80))
    scores[20:32, 20:33] = 1
    mask = score_mask(scores, (80, 80), threshold=0.5, min_area=1)
    area = int(mask.sum())
    for min_area, found in ((area, False), (area - 1, True)):
        one = ScoreGrid((80, 80), (0.5,), (1, min_area), threshold=0.5, min_area=min_area)
        assert one.find(scores, [np.flatnonzero(mask)]) == [(((True, found),), found)]
        assert one.false_alarms(scores, np.zeros((80, 80), bool))[0] == ((1, int(found)),)


def test_nothing_above() -> None:
    place = np.arange(100)
    ((bits, iou),) = grid((50, 50)).find(np.zeros((50, 50)), [place])
    assert not np.array(bits).any()
    assert iou == 0
    assert np.array(grid((50, 50)).false_alarms(np.zeros((50, 50)), np.zeros((50, 50), bool))).sum() == 0
