"""Which regions of a mask another mask covers, held against a slow formulation with scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from desra_core import find_regions
from desra_core.detection.mask import Components
from desra_core.errors import ArgumentError

EIGHT = np.ones((3, 3), bool)


def uncovered(mask: np.ndarray, other: np.ndarray) -> list[bool]:
    return (~Components(mask).covered(other)).tolist()


def slow_uncovered(mask: np.ndarray, other: np.ndarray) -> list[bool]:
    components, count = ndimage.label(mask, EIGHT)
    fates = {}
    for index in range(1, count + 1):
        pixels = [(int(row), int(column)) for row, column in np.argwhere(components == index)]
        fates[pixels[0]] = sum(bool(other[pixel]) for pixel in pixels) / len(pixels) < 0.5
    return [fate for _, fate in sorted(fates.items())]


@settings(deadline=None, max_examples=200)
@given(
    st.integers(1, 30), st.integers(1, 30), st.floats(0, 0.7), st.sampled_from([0, 0.4, 0.5, 1]), st.integers(0, 2**32)
)
def test_random_masks(height: int, width: int, share: float, covered: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask, other = rng.random((height, width)) < share, rng.random((height, width)) < covered
    assert uncovered(mask, other) == slow_uncovered(mask, other)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 30), st.integers(1, 30), st.floats(0.05, 0.6), st.integers(0, 2**32))
def test_equal_masks_cover_each_other(height: int, width: int, share: float, seed: int) -> None:
    """And there is a fate for each region that is found."""
    mask = np.random.default_rng(seed).random((height, width)) < share
    regions = find_regions(mask, np.zeros(mask.shape, np.float32))
    assert uncovered(mask, mask) == [False] * len(regions)
    assert uncovered(mask, ~mask) == [True] * len(regions)


@pytest.mark.parametrize("area", [6, 7])
def test_exactly_half_is_not_gone(area: int) -> None:
    """Of six pixels three are half; of seven four are more and three less."""
    mask = np.zeros((5, 12), bool)
    mask[2, 2 : 2 + area] = True
    half = math.ceil(area / 2)
    for kept in range(area + 1):
        other = np.zeros_like(mask)
        other[2, 2 : 2 + kept] = True
        assert uncovered(mask, other) == [kept < half]


def test_pixels_beside_a_region_do_not_cover_it() -> None:
    mask = np.zeros((10, 10), bool)
    mask[4:6, 4:6] = True
    assert uncovered(mask, ~mask) == [True]
    assert uncovered(mask, np.ones_like(mask)) == [False]


def test_the_order_is_that_of_the_regions() -> None:
    """The lower left region begins further down, though its box begins further left."""
    mask = np.zeros((40, 40), bool)
    mask[30:35, 5:10] = mask[8:12, 30:35] = mask[8:20, 10:15] = mask[9:11, 20:22] = True
    regions = find_regions(mask, np.zeros((30, 30), np.float32))
    for lost, region in enumerate(regions):
        other = mask.copy()
        other[region.y : region.y + region.height, region.x : region.x + region.width] = False
        assert uncovered(mask, other) == [index == lost for index in range(4)]


def test_regions_longer_than_a_strip() -> None:
    """Two bars of 1400 rows, which are counted strip by strip; a third begins in the last one."""
    mask = np.zeros((1500, 1000), bool)
    mask[50:1450, 100:300] = mask[60:1460, 600:800] = mask[1400:1450, 400:500] = True
    other = mask.copy()
    other[749:] = False  # 699 rows of 1400 of the first bar remain, and 689 of the second
    assert uncovered(mask, other) == [True, True, True]
    other[749, 100:300] = True
    assert uncovered(mask, other) == [False, True, True]
    assert uncovered(mask, other) == slow_uncovered(mask, other)


def test_no_regions() -> None:
    empty = np.zeros((7, 9), bool)
    assert uncovered(empty, ~empty) == []


def test_masks_of_two_sizes() -> None:
    with pytest.raises(ArgumentError, match=r"\(7, 9\) and \(9, 7\)"):
        uncovered(np.ones((7, 9), bool), np.ones((9, 7), bool))
