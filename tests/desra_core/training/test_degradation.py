"""Degraded photos: sizes, seeds, ranges, and what each kind does to a photo."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from desra_core.training.degradation import degrade

RNG = np.random.default_rng(3)
SHARP = np.clip(RNG.normal(0.5, 0.3, (96, 128, 3)), 0, 1).astype(np.float32)
SMOOTH = np.clip(cv2.GaussianBlur(SHARP, (0, 0), 6) * 4 - 1.5, 0, 1)


@pytest.mark.parametrize("kind", ["real", "mild", "bicubic"])
@given(scale=st.sampled_from([2, 3, 4, 8]), seed=st.integers(0, 2**32))
@settings(max_examples=15, deadline=None)
def test_a_photo_of_the_right_size_in_8_bits(kind: str, scale: int, seed: int) -> None:
    sharp = SHARP[: 24 * 3, : 24 * 4]
    photo = degrade(sharp, scale, kind, (seed,))  # type: ignore[arg-type]
    assert photo.shape == (72 // scale, 96 // scale, 3)
    assert photo.dtype == np.float32
    assert np.array_equal(photo, (np.rint(photo * 255) / 255).astype(np.float32))
    assert 0 <= photo.min() <= photo.max() <= 1


@pytest.mark.parametrize("kind", ["real", "mild"])
def test_the_seed_alone_decides_and_global_generators_stay_as_they_were(kind: str) -> None:
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    on_errors = np.geterr()
    first = degrade(SHARP, 4, kind, (7, 1))  # type: ignore[arg-type]
    assert random.getstate() == states[0]
    assert np.geterr() == on_errors
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), states[1], strict=True))  # noqa: NPY002
    random.seed(2)
    np.random.seed(2)  # noqa: NPY002
    assert np.array_equal(degrade(SHARP, 4, kind, (7, 1)), first)  # type: ignore[arg-type]
    assert not np.array_equal(degrade(SHARP, 4, kind, (7, 2)), first)  # type: ignore[arg-type]


def test_real_photos_lose_more_than_mild_ones_and_bicubic_only_shrinks() -> None:
    shrunk = cv2.resize(SMOOTH, (32, 24), interpolation=cv2.INTER_AREA)
    errors = {
        kind: np.mean([np.square(degrade(SMOOTH, 4, kind, (seed,)) - shrunk).mean() for seed in range(30)])
        for kind in ("real", "mild", "bicubic")
    }
    assert errors["real"] > 2 * errors["mild"] > 2 * errors["bicubic"]
    assert errors["bicubic"] < 1e-4


def test_channels_keep_their_places() -> None:
    """Compression works on BGR: red stays red."""
    red = np.zeros((64, 64, 3), np.float32)
    red[:, :, 0] = 0.8
    for kind in ("real", "mild", "bicubic"):
        photos = np.mean([degrade(red, 4, kind, (seed,)) for seed in range(10)], axis=0)  # type: ignore[arg-type]
        assert photos[:, :, 0].mean() > 0.6
        assert photos[:, :, 1:].mean() < 0.2


def test_a_thread_that_did_not_import_basicsr_gets_no_warnings() -> None:
    """The warnings would be errors here."""
    with ThreadPoolExecutor(1) as threads:
        for seed in range(8):
            threads.submit(degrade, SHARP, 4, "real", (seed,)).result()
