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

from desra_core.evaluation import fidelity
from desra_core.evaluation.fidelity import gradient_similarity, psnr, sharpness, squared_error, structural_similarity

MEASURES = [squared_error, structural_similarity, gradient_similarity]
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
    assert squared_error(before, after, outside) == pytest.approx(expected, rel=1e-12)


@settings(deadline=None, max_examples=40)
@given(SHAPES, SEEDS)
def test_structural_similarity(shape: tuple[int, int, int], seed: int) -> None:
    """Against the formula of Wang et al., with OpenCV's Gaussian in place of scipy's."""
    before, after, outside = images(shape, seed)

    def blurred(values: np.ndarray) -> np.ndarray:
        return cv2.GaussianBlur(values, (11, 11), 1.5, borderType=cv2.BORDER_REFLECT)

    shares = [1.0] if shape[2] == 1 else [0.299, 0.587, 0.114]
    x, y = (np.average(image.astype(np.float64), axis=2, weights=shares) for image in (before, after))
    mean_x, mean_y = blurred(x), blurred(y)
    var_x, var_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
    covariance = blurred(x * y) - mean_x * mean_y
    c1, c2 = 2.55**2, 7.65**2
    top = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity = (top / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)))[outside].mean()
    assert structural_similarity(before, after, outside) == pytest.approx(similarity, abs=1e-9)


@settings(deadline=None, max_examples=15)
@given(SHAPES, SEEDS)
def test_gradient_similarity(shape: tuple[int, int, int], seed: int) -> None:
    before, after, outside = images(shape, seed)
    similarities = []
    for row, column in np.argwhere(outside):
        g, h = slow_gradient(before, row, column), slow_gradient(after, row, column)
        similarities.append((2 * g * h + 170) / (g**2 + h**2 + 170))
    assert gradient_similarity(before, after, outside) == pytest.approx(np.mean(similarities), rel=1e-9)


@settings(deadline=None, max_examples=15)
@given(st.tuples(st.integers(1, 14), st.integers(1, 14), st.sampled_from([1, 3])), SEEDS)
def test_sharpness(shape: tuple[int, int, int], seed: int) -> None:
    before, _, _ = images(shape, seed)
    gradients = [slow_gradient(before, row, column) for row, column in np.ndindex(shape[:2])]
    assert sharpness(before) == pytest.approx(np.mean(gradients) / 2, rel=1e-9, abs=1e-9)


def test_sharpness_of_a_ramp_and_an_edge() -> None:
    """A ramp rises by three levels per pixel, by half of that at both ends; an edge counts half in both columns."""
    ramp = np.repeat(np.arange(0, 60, 3, dtype=np.uint8)[None, :, None], 8, axis=0)
    assert sharpness(ramp) == pytest.approx((18 * 3 + 2 * 1.5) / 20)
    assert sharpness(np.repeat(ramp, 3, axis=2)) == pytest.approx((18 * 3 + 2 * 1.5) / 20)
    edge = np.zeros((8, 20, 3), np.uint8)
    edge[:, 10:] = 50
    assert sharpness(edge) == pytest.approx(2 * 25 / 20)
    assert sharpness(np.full_like(edge, 77)) == pytest.approx(0, abs=1e-12)


@settings(deadline=None, max_examples=30)
@given(SHAPES, SEEDS)
def test_equal_images(shape: tuple[int, int, int], seed: int) -> None:
    before, _, outside = images(shape, seed)
    assert squared_error(before, before.copy(), outside) == 0
    assert structural_similarity(before, before.copy(), outside) == 1
    assert gradient_similarity(before, before.copy(), outside) == 1


@settings(deadline=None, max_examples=30)
@given(SHAPES, SEEDS)
def test_16_bits_agree_with_8(shape: tuple[int, int, int], seed: int) -> None:
    before, after, outside = images(shape, seed)
    wide_before, wide_after = (image.astype(np.uint16) * 257 for image in (before, after))
    for measure in MEASURES:
        assert measure(wide_before, wide_after, outside) == measure(before, after, outside)
    assert sharpness(wide_before) == sharpness(before)


def test_16_bits_are_finer_than_8() -> None:
    before = np.full((20, 20, 1), 40_000, np.uint16)
    after = before + np.uint16(1)
    assert squared_error(before, after, np.ones((20, 20), bool)) == pytest.approx(400 / 257**2)


def test_pixels_inside_do_not_count() -> None:
    """This holds beyond the halo of each measure: one pixel for gradients, five for SSIM."""
    before, _, _ = images((40, 40, 3), 1)
    after = before.copy()
    after[10:20, 10:20] = 255 - after[10:20, 10:20]
    for measure, halo in ((squared_error, 0), (gradient_similarity, 1), (structural_similarity, 5)):
        outside = np.ones((40, 40), bool)
        outside[10 - halo : 20 + halo, 10 - halo : 20 + halo] = False
        assert measure(before, after, outside) == measure(before, before, outside)
        assert measure(before, after, ~outside) != measure(before, before, ~outside)


@pytest.mark.parametrize(
    ("height", "width", "strip"), [(900, 700, 2**18), (61, 40, 1), (11, 40, 1), (49, 40, 12 * 40), (30, 40, 29 * 40)]
)
def test_images_of_several_strips(height: int, width: int, strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All strips, or the last one, may have fewer rows than the window of SSIM."""
    before, after, outside = images((height, width, 3), height)
    monkeypatch.setattr(fidelity, "_STRIP", height * width)
    whole = [measure(before, after, outside) for measure in MEASURES] + [sharpness(before)]
    monkeypatch.setattr(fidelity, "_STRIP", strip)
    in_strips = [measure(before, after, outside) for measure in MEASURES] + [sharpness(before)]
    assert in_strips == pytest.approx(whole, rel=1e-11)


def test_psnr() -> None:
    """The PSNR of a pooled sum: two images of 100 pixels that differ by 1 and by 2 everywhere."""
    assert psnr(0, 100) == math.inf
    assert psnr(100 + 400, 200) == pytest.approx(10 * math.log10(65025 / 2.5))
    black, white = np.zeros((9, 9, 3), np.uint8), np.full((9, 9, 3), 255, np.uint8)
    assert psnr(squared_error(black, white, np.ones((9, 9), bool)), 81) == pytest.approx(0)


@pytest.mark.parametrize("measure", MEASURES)
def test_refusals(measure) -> None:
    pixels, outside = np.zeros((20, 20, 3), np.uint8), np.ones((20, 20), bool)
    for after, where in ((pixels[1:], outside), (pixels[:, :, :1], outside), (pixels, outside[:, 1:])):
        with pytest.raises(ValueError, match="do not belong together"):
            measure(pixels, after, where)
    with pytest.raises(ValueError, match="no pixel lies outside"):
        measure(pixels, pixels, ~outside)


def test_ssim_of_images_smaller_than_its_window() -> None:
    small = np.zeros((10, 30, 1), np.uint8)
    with pytest.raises(ValueError, match="win_size exceeds image extent"):
        structural_similarity(small, small, np.ones((10, 30), bool))


def test_scikit_image_is_imported_on_use() -> None:
    code = "import sys, desra_core.evaluation.fidelity; assert not {'skimage', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
