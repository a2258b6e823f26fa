"""Masks at many points, held against one mask after the other."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from desra_core.benchmarking.operating_points import OperatingPoints
from desra_core.detection.mask import score_mask

EIGHT = np.ones((3, 3))
THRESHOLDS, MIN_AREAS = (0.2, 0.5, 1.0, 9.0), (100, 250, 400, 900)


def smooth(rng: np.random.Generator, shape: tuple[int, int], sigma: float) -> np.ndarray:
    field = cv2.GaussianBlur(rng.standard_normal(shape), (0, 0), sigma)
    return field / field.std()


def slow(scores: np.ndarray, shape: tuple[int, int], places: list[np.ndarray], excluded: np.ndarray) -> tuple:
    """Found, regions and pixels from a mask of its own for each point."""
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


def points(shape: tuple[int, int]) -> OperatingPoints:
    return OperatingPoints(shape, THRESHOLDS, MIN_AREAS, threshold=0.5, min_area=400)


@settings(deadline=None, max_examples=30)
@given(st.integers(40, 90), st.integers(40, 90), st.integers(0, 6), st.integers(0, 2**32 - 1))
def test_points(height: int, width: int, frame: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = height, width
    scores = smooth(rng, shape, rng.uniform(1.5, 6))[frame : height - frame, frame : width - frame]
    excluded = smooth(rng, shape, 5) > 0.8
    places = [smooth(rng, shape, 6) > level for level in (0.5, 1.0, 1.4)]
    places = [place for place in places if place.any()]
    found, regions, pixels = slow(scores, shape, places, excluded)
    answers = points(shape).answers(scores, [np.flatnonzero(place) for place in places])
    assert [np.array(answer.found).tolist() for answer in answers] == found
    assert points(shape).false_alarms(scores, excluded) == (
        tuple(map(tuple, regions)),
        tuple(map(tuple, pixels)),
    )
    mask = score_mask(scores, shape, threshold=0.5, min_area=400)
    named, count = ndimage.label(mask, EIGHT)
    for place, answer in zip(places, answers, strict=True):
        fits = [((named == index + 1) & place).sum() / ((named == index + 1) | place).sum() for index in range(count)]
        assert answer.iou == pytest.approx(max(fits, default=0))


def test_exactly_half_is_found() -> None:
    scores = np.zeros((60, 60))
    scores[10:50, 10:50] = 1
    mask = score_mask(scores, (60, 60), threshold=0.5, min_area=400)
    rows = np.flatnonzero(mask.any(axis=1))
    place = np.zeros((60, 60), bool)
    place[rows[0] - 3 : rows[0] + 3, 20:40] = True
    assert points((60, 60)).answers(scores, [np.flatnonzero(place)])[0].found[1][1]
    place[rows[0] - 4, 20] = True
    assert not points((60, 60)).answers(scores, [np.flatnonzero(place)])[0].found[1][1]
    # A region of which just half is excluded is no false alarm.
    half = np.zeros((60, 60), bool)
    half[:, :30] = True
    assert points((60, 60)).false_alarms(scores, half)[0][1][1] == 0
    half[rows[0], 29] = False
    assert points((60, 60)).false_alarms(scores, half)[0][1][1] == 1


def test_a_region_of_the_minimal_area_is_dropped() -> None:
    scores = np.zeros((80, 80))
    scores[20:32, 20:33] = 1
    mask = score_mask(scores, (80, 80), threshold=0.5, min_area=1)
    area = int(mask.sum())
    for min_area, found in ((area, False), (area - 1, True)):
        one = OperatingPoints((80, 80), (0.5,), (1, min_area), threshold=0.5, min_area=min_area)
        answer = one.answers(scores, [np.flatnonzero(mask)])[0]
        assert answer.found == ((True, found),)
        assert answer.iou == found
        assert one.false_alarms(scores, np.zeros((80, 80), bool))[0] == ((1, int(found)),)


def test_nothing_above() -> None:
    place = np.arange(100)
    answer = points((50, 50)).answers(np.zeros((50, 50)), [place])[0]
    assert not np.array(answer.found).any()
    assert answer.iou == 0
    assert np.array(points((50, 50)).false_alarms(np.zeros((50, 50)), np.zeros((50, 50), bool))).sum() == 0
