"""Repair: the MSE result in the mask, no seam around it, and nothing else."""

from __future__ import annotations

import heapq

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from desra_core.detection.repair import STEP, repair
from desra_core.errors import ArgumentError

Array = npt.NDArray[np.generic]


def slow_share(mse_sr: Array, gan_sr: Array, mask: Array, feather: int, strength: float) -> npt.NDArray[np.float64]:
    """The largest shares whose steps are allowed, by Dijkstra's search from the pixels of the mask."""
    depth = np.iinfo(gan_sr.dtype).max / 255
    differences = np.abs(mse_sr.astype(float) - gan_sr.astype(float)).reshape(*mask.shape, -1).max(axis=2) / depth
    share = np.zeros(mask.shape)
    queue = [(-1.0, *place) for place in zip(*np.nonzero(mask), strict=True)]
    while queue:
        value, row, column = heapq.heappop(queue)
        if -value <= share[row, column]:
            continue
        share[row, column] = -value
        for y, x in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            if 0 <= y < mask.shape[0] and 0 <= x < mask.shape[1]:
                slope = 1 / feather
                if differences[y, x]:
                    slope = min(slope, STEP / (strength * differences[y, x]))
                if -value - slope > share[y, x]:
                    heapq.heappush(queue, (value + slope, y, x))
    return share * strength


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Array, Array, Array]:
    """Two results whose difference is small in one part and large in another, and a mask."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = draw(st.tuples(st.integers(1, 24), st.integers(1, 24), st.sampled_from([1, 3])))
    dtype = draw(st.sampled_from([np.uint8, np.uint16]))
    levels = np.iinfo(dtype).max // 255
    gan_sr = rng.integers(0, 256, shape)
    strength = rng.choice([0, 1, 5, 60, 255], (1, shape[1], 1))
    mse_sr = np.clip(gan_sr + rng.integers(-1, 2, shape) * strength, 0, 255)
    mask = np.zeros(shape[:2], bool)
    top, left = rng.integers(shape[0]), rng.integers(shape[1])
    mask[top : top + rng.integers(8), left : left + rng.integers(8)] = True
    return (mse_sr * levels).astype(dtype), (gan_sr * levels).astype(dtype), mask


@settings(deadline=None)  # the first call compiles
@given(pair=pairs(), feather=st.integers(1, 12), strength=st.sampled_from([0.1, 0.5, 1.0]))
def test_repairs_are_whole_seamless_and_no_wider_than_needed(pair, feather: int, strength: float) -> None:
    mse_sr, gan_sr, mask = pair
    pixels, share = repair(mse_sr, gan_sr, mask, feather=feather, strength=strength)
    np.testing.assert_allclose(share, slow_share(mse_sr, gan_sr, mask, feather, strength), atol=1e-5)

    level = np.iinfo(gan_sr.dtype).max / 255
    mse, gan, found = (array.astype(float) / level for array in (mse_sr, gan_sr, pixels))
    blended = gan + share[:, :, None].astype(float) * (mse - gan)
    assert np.abs(found - blended).max() <= 0.5 + 1e-3  # rounded once
    assert (pixels[share == 0] == gan_sr[share == 0]).all()
    if strength == 1:
        assert (pixels[mask] == mse_sr[mask]).all()
    for axis in (0, 1):
        step, of_gan, of_mse = (np.diff(array, axis=axis) for array in (found, gan, mse))
        low, high = np.minimum(of_gan, of_mse), np.maximum(of_gan, of_mse)
        added = np.maximum(np.maximum(low - step, step - high), 0)
        assert added.max(initial=0) <= 2


def test_strength_zero_and_an_empty_mask_leave_the_result_as_it_is() -> None:
    rng = np.random.default_rng(0)
    mse_sr, gan_sr = rng.integers(0, 256, (2, 9, 8, 3), np.uint8)
    full, empty = np.ones((9, 8), bool), np.zeros((9, 8), bool)
    for mask, strength in ((full, 0.0), (empty, 1.0)):
        pixels, share = repair(mse_sr, gan_sr, mask, strength=strength)
        assert (pixels == gan_sr).all()
        assert not share.any()


def test_results_of_other_depth_and_channels_are_brought_together() -> None:
    gan_sr = np.full((4, 4, 3), 40, np.uint8)
    mse_sr = np.full((4, 4, 1), 41 * 257, np.uint16)
    pixels, _ = repair(mse_sr, gan_sr, np.ones((4, 4), bool))
    assert (pixels.dtype, pixels.shape, np.unique(pixels).tolist()) == (np.uint8, (4, 4, 3), [41])
    pixels, _ = repair(gan_sr[:, :, 0], gan_sr[:, :, 0] + 1, np.ones((4, 4), bool))
    assert np.unique(pixels).tolist() == [40]


@pytest.mark.parametrize("setting", [{"feather": 0}, {"strength": -0.1}, {"strength": 1.1}, {"mask": np.ones((3, 4))}])
def test_what_cannot_be_is_refused(setting) -> None:
    gan_sr = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(ArgumentError):
        repair(gan_sr, gan_sr, **({"mask": np.ones((4, 4), bool)} | setting))
