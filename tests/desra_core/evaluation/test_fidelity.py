"""Fidelity, compared with slow formulations that go pixel by pixel."""

from __future__ import annotations

import math
import subprocess
import sys

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import structural_similarity

from desra_core.evaluation import fidelity
from desra_core.evaluation.fidelity import measure_fidelity
from desra_core.evaluation.metrics import psnr

SEEDS = st.integers(0, 2**32 - 1)
SHAPES = st.tuples(st.integers(11, 24), st.integers(11, 24), st.sampled_from([1, 3]))


def images(shape: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Make a smooth image, a changed one, and an outside of at least one pixel."""
    rng = np.random.default_rng(seed)
    before = cv2.GaussianBlur(rng.integers(0, 256, shape).astype(np.float32), (0, 0), 1).reshape(shape)
    before = np.clip(128 + 3 * (before - 128), 0, 255).astype(np.uint8)
    after = np.clip(before + rng.integers(-30, 31, shape), 0, 255).astype(np.uint8)
    outside = rng.random(shape[:2]) < rng.random()
    outside[0, 0] = True
    return before, after, outside


def slow_gradient(pixels: np.ndarray, row: int, column: int) -> float:
    """Apply Prewitt's filters to the nine pixels around each pixel; border pixels are repeated."""
    weights = (1.0,) if pixels.shape[2] == 1 else (0.299, 0.587, 0.114)

    def luminance(y: int, x: int) -> float:
        sample = pixels[min(max(y, 0), pixels.shape[0] - 1), min(max(x, 0), pixels.shape[1] - 1)]
        return sum(weight * float(value) for weight, value in zip(weights, sample, strict=True))

    steps = (-1, 0, 1)
    across = sum(luminance(row + step, column + 1) - luminance(row + step, column - 1) for step in steps) / 3
    down = sum(luminance(row + 1, column + step) - luminance(row - 1, column + step) for step in steps) / 3
    return math.sqrt(across**2 + down**2)


@settings(deadline=None, max_examples=40)
@given(SHAPES, SEEDS)
def test_squared_error(shape: tuple[int, int, int], seed: int) -> None:
    before, after, outside = images(shape, seed)
    expected = 0.0
    for row, column in np.argwhere(outside):
        channels = [(int(x) - int(y)) ** 2 for x, y in zip(before[row, column], after[row, column], strict=True)]
        expected += sum(channels) / len(channels)
    assert measure_fidelity(before, after, outside).squared_error == pytest.approx(expected, rel=1e-12)


@settings(deadline=None, max_examples=40)
@given(SHAPES, SEEDS)
def test_ssim_is_that_of_scikit_image(shape: tuple[int, int, int], seed: int) -> None:
    before, after, outside = images(shape, seed)
    shares = [1.0] if shape[2] == 1 else [0.299, 0.587, 0.114]
    x, y = (np.average(image.astype(np.float64), axis=2, weights=shares) for image in (before, after))
    _, similarity = structural_similarity(
        x, y, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255, full=True
    )
    assert measure_fidelity(before, after, outside).ssim == pytest.approx(similarity[outside].mean(), abs=1e-9)


@settings(deadline=None, max_examples=15)
@given(SHAPES, SEEDS)
def test_gradient_similarity(shape: tuple[int, int, int], seed: int) -> None:
    before, after, outside = images(shape, seed)
    similarities = []
    for row, column in np.argwhere(outside):
        g, h = slow_gradient(before, row, column), slow_gradient(after, row, column)
        similarities.append((2 * g * h + 170) / (g**2 + h**2 + 170))
    assert measure_fidelity(before, after, outside).gradient_similarity == pytest.approx(
        np.mean(similarities), rel=1e-9
    )


@settings(deadline=None, max_examples=15)
@given(SHAPES, SEEDS)
def test_sharpness(shape: tuple[int, int, int], seed: int) -> None:
    before, after, outside = images(shape, seed)
    fidelity = measure_fidelity(before, after, outside)
    for pixels, sharpness in ((before, fidelity.sharpness_before), (after, fidelity.sharpness_after)):
        gradients = [slow_gradient(pixels, row, column) for row, column in np.ndindex(shape[:2])]
        assert sharpness == pytest.approx(np.mean(gradients) / 2, rel=1e-9, abs=1e-9)


def test_sharpness_of_a_ramp_and_an_edge() -> None:
    """A ramp rises by three levels per pixel, by half of that at both ends; an edge counts half in both columns."""
    ramp = np.repeat(np.arange(0, 60, 3, dtype=np.uint8)[None, :, None], 11, axis=0)
    edge = np.zeros_like(ramp)
    edge[:, 10:] = 50
    flat = np.full_like(edge, 77)
    everywhere = np.ones(ramp.shape[:2], np.bool_)
    for channels in (1, 3):
        first, second = (
            measure_fidelity(*(image.repeat(channels, 2) for image in pair), everywhere)
            for pair in ((ramp, edge), (flat, ramp))
        )
        assert first.sharpness_before == second.sharpness_after == pytest.approx((18 * 3 + 2 * 1.5) / 20)
        assert first.sharpness_after == pytest.approx(2 * 25 / 20)
        assert second.sharpness_before == pytest.approx(0, abs=1e-12)


@settings(deadline=None, max_examples=30)
@given(SHAPES, SEEDS)
def test_equal_images(shape: tuple[int, int, int], seed: int) -> None:
    before, _, outside = images(shape, seed)
    error, ssim, gradient_similarity, sharpness_before, sharpness_after = measure_fidelity(
        before, before.copy(), outside
    )
    assert (error, ssim, gradient_similarity) == (0, 1, 1)
    assert sharpness_before == sharpness_after


@settings(deadline=None, max_examples=30)
@given(SHAPES, SEEDS)
def test_16_bits_agree_with_8(shape: tuple[int, int, int], seed: int) -> None:
    before, after, outside = images(shape, seed)
    wide_before, wide_after = (image.astype(np.uint16) * 257 for image in (before, after))
    assert measure_fidelity(wide_before, wide_after, outside) == measure_fidelity(before, after, outside)


def test_16_bits_are_finer_than_8() -> None:
    before = np.full((20, 20, 1), 40_000, np.uint16)
    after = before + np.uint16(1)
    error = measure_fidelity(before, after, np.ones((20, 20), bool)).squared_error
    assert error == pytest.approx(400 / 257**2)


def test_pixels_inside_do_not_count() -> None:
    """This holds beyond the halo of each measure: one pixel for gradients, five for SSIM."""
    before, _, _ = images((40, 40, 3), 1)
    after = before.copy()
    after[10:20, 10:20] = 255 - after[10:20, 10:20]
    for measure, halo, equal in (("squared_error", 0, 0), ("gradient_similarity", 1, 1), ("ssim", 5, 1)):
        outside = np.ones((40, 40), bool)
        outside[10 - halo : 20 + halo, 10 - halo : 20 + halo] = False
        assert getattr(measure_fidelity(before, after, outside), measure) == equal
        assert getattr(measure_fidelity(before, after, ~outside), measure) != equal


@pytest.mark.parametrize(("height", "width", "tile"), [(900, 700, 256), (61, 40, 1), (11, 40, 10), (49, 40, 12)])
def test_images_of_several_parts(height: int, width: int, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All parts, or the last one, may be smaller than the window of SSIM."""
    before, after, outside = images((height, width, 3), height)
    monkeypatch.setattr(fidelity, "TILE", max(height, width))
    whole = measure_fidelity(before, after, outside)
    monkeypatch.setattr(fidelity, "TILE", tile)
    assert measure_fidelity(before, after, outside) == pytest.approx(whole, rel=1e-11)


def test_psnr() -> None:
    """The PSNR of a pooled sum: two images of 100 pixels that differ by 1 and by 2 everywhere."""
    assert psnr(0, 100) == math.inf
    assert psnr(100 + 400, 200) == pytest.approx(10 * math.log10(65025 / 2.5))
    black, white = np.zeros((11, 11, 3), np.uint8), np.full((11, 11, 3), 255, np.uint8)
    assert psnr(measure_fidelity(black, white, np.ones((11, 11), bool)).squared_error, 121) == pytest.approx(0)


def test_refusals() -> None:
    pixels, outside = np.zeros((20, 20, 3), np.uint8), np.ones((20, 20), bool)
    wide = pixels.astype(np.uint16)
    for after, where in ((pixels[1:], outside), (pixels[:, :, :1], outside), (pixels, outside[:, 1:]), (wide, outside)):
        with pytest.raises(ValueError, match="do not belong together"):
            measure_fidelity(pixels, after, where)
    with pytest.raises(ValueError, match="no pixel lies outside"):
        measure_fidelity(pixels, pixels, ~outside)
    small = np.zeros((10, 30, 1), np.uint8)
    with pytest.raises(ValueError, match="30x10 pixels are fewer than the 11x11 window"):
        measure_fidelity(small, small, np.ones((10, 30), bool))


def test_torch_is_imported_on_use() -> None:
    code = "import sys, desra_core.evaluation.fidelity; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
