import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import sliding_window_view

import desra_core
from desra_core.detection.similarity import variance_similarity
from desra_core.errors import ArgumentError

Array = npt.NDArray[np.generic]
Pixels = npt.NDArray[np.uint8]
PAIRS = Path(__file__).resolve().parents[3].parent / "shared/data/pairs"


def slow_similarity(x: Array, y: Array, window: int = 11, sigma: float = 1.5) -> npt.NDArray[np.float64]:
    """Eq. 7 literally: 2-D weights, and the variance as the mean squared deviation from a window's mean."""
    offsets = np.arange(window) - window // 2
    weights = np.exp(-(offsets[:, None] ** 2 + offsets[None, :] ** 2) / (2 * sigma**2))
    weights /= weights.sum()

    def variance(channel: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        windows = sliding_window_view(channel, (window, window))
        mean = (windows * weights).sum((2, 3))
        deviation = windows - mean[:, :, None, None]
        return np.asarray((deviation**2 * weights).sum((2, 3)))

    per_channel = []
    for c in range(x.shape[2]):
        vx, vy = variance(x[:, :, c].astype(np.float64)), variance(y[:, :, c].astype(np.float64))
        stabiliser = (0.03 * 255) ** 2
        numerator = 2 * np.sqrt(vx + 1e-8) * np.sqrt(vy + 1e-8) + stabiliser
        per_channel.append(numerator / (vx + vy + stabiliser))
    return np.asarray(np.mean(per_channel, axis=0))


def texture(shape: tuple[int, ...], seed: int = 0) -> Pixels:
    """Noise of a strength that varies over the image, with flat patches at both ends of the range."""
    rng = np.random.default_rng(seed)
    strength = np.linspace(0, 90, shape[1]).reshape(1, -1, *[1] * (len(shape) - 2))
    image = np.clip(128 + strength * rng.standard_normal(shape), 0, 255).astype(np.uint8)
    image[:20, :20] = 255
    image[-20:, -20:] = 0
    return image


@st.composite
def images(draw: st.DrawFn, height: int, width: int) -> Pixels:
    """Noise between two levels, coarse or fine, so with flat runs and with the extremes."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    low, high = sorted(draw(st.tuples(*[st.sampled_from([0, 1, 100, 128, 129, 254, 255])] * 2)))
    block = draw(st.sampled_from([1, 2, 5, 16]))
    blocks = rng.integers(low, high, (height // block + 1, width // block + 1, 3), np.uint8, endpoint=True)
    return blocks.repeat(block, 0).repeat(block, 1)[:height, :width]


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Pixels, Pixels]:
    height, width = draw(st.tuples(st.integers(11, 40), st.integers(11, 40)))
    return draw(images(height, width)), draw(images(height, width))


@given(pairs())
@settings(deadline=None)
def test_agrees_with_the_literal_formula(pair: tuple[Pixels, Pixels]) -> None:
    np.testing.assert_allclose(variance_similarity(*pair), slow_similarity(*pair), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("window", "sigma"), [(1, 1.5), (3, 0.5), (7, 4.0), (11, 1e-3), (11, 1e9), (23, 3.0)])
def test_agrees_with_the_literal_formula_for_other_windows(window: int, sigma: float) -> None:
    x, y = texture((40, 45, 3), 1), texture((40, 45, 3), 2)
    similarity = variance_similarity(x, y, window=window, sigma=sigma)
    np.testing.assert_allclose(similarity, slow_similarity(x, y, window, sigma), rtol=0, atol=1e-6)


@pytest.mark.parametrize("left", [0, 1, 3, 128, 254, 255])
@pytest.mark.parametrize("right", [0, 7, 255])
def test_flat_images_are_alike_whatever_their_level(left: int, right: int) -> None:
    x, y = np.full((20, 24, 3), left, np.uint8), np.full((20, 24, 3), right, np.uint8)
    similarity = variance_similarity(x, y)
    np.testing.assert_array_equal(similarity, 1)


def test_flat_against_the_strongest_texture() -> None:
    flat = np.full((40, 40, 3), 255, np.uint8)
    checks = np.broadcast_to((np.indices((40, 40)).sum(0) % 2 * 255)[:, :, None], (40, 40, 3)).astype(np.uint8)
    similarity = variance_similarity(flat, checks)
    np.testing.assert_allclose(similarity, slow_similarity(flat, checks), rtol=0, atol=1e-6)
    assert similarity.max() < 0.01


def test_fractional_flat_levels_keep_the_root_real() -> None:
    levels = np.random.default_rng(5).uniform(0, 255, 200)
    for level in (*levels, np.nextafter(255, 0), 5e-324):
        x = np.full((11, 11), level)
        np.testing.assert_array_equal(variance_similarity(x, x), 1)


@given(pairs())
@settings(deadline=None)
def test_lies_above_0_and_up_to_1_is_symmetric_and_1_for_equal_images(
    pair: tuple[Pixels, Pixels],
) -> None:
    x, y = pair
    similarity = variance_similarity(x, y)
    assert similarity.dtype == np.float32
    assert similarity.shape == (x.shape[0] - 10, x.shape[1] - 10)
    assert (similarity > 0).all()
    assert (similarity <= 1).all()
    np.testing.assert_array_equal(similarity, variance_similarity(y, x))
    np.testing.assert_array_equal(variance_similarity(x, x), 1)


@given(tile=st.integers(1, 80), threads=st.integers(1, 5), height=st.integers(11, 70), width=st.integers(11, 70))
@settings(max_examples=40, deadline=None)
def test_tile_and_threads_change_no_bit(tile: int, threads: int, height: int, width: int) -> None:
    x, y = texture((70, 70, 3), 1)[:height, :width], texture((70, 70, 3), 2)[:height, :width]
    tiled = variance_similarity(x, y, tile=max(tile, 4), threads=threads)
    np.testing.assert_array_equal(tiled, variance_similarity(x, y, tile=1000))


@pytest.mark.parametrize("tile", [64, 128, 255, 256, 257])
def test_large_tiles_change_no_bit(tile: int) -> None:
    x, y = texture((530, 301, 3), 1), texture((530, 301, 3), 2)
    whole = variance_similarity(x, y, tile=1000)
    np.testing.assert_array_equal(variance_similarity(x, y, tile=tile, threads=2), whole)
    # The same pixels in another place of the image.
    np.testing.assert_array_equal(variance_similarity(x[3:, 5:], y[3:, 5:], tile=tile), whole[3:, 5:])


@given(pairs())
@settings(deadline=None)
def test_16_bits_mean_the_same_as_8(pair: tuple[Pixels, Pixels]) -> None:
    x, y = pair
    deep_x, deep_y = x.astype(np.uint16) * 257, y.astype(np.uint16) * 257
    expected = variance_similarity(x, y)
    np.testing.assert_array_equal(variance_similarity(deep_x, deep_y), expected)
    np.testing.assert_array_equal(variance_similarity(deep_x, y), expected)
    np.testing.assert_array_equal(variance_similarity(x.astype(np.float32), y.astype(np.float64)), expected)


def test_16_bits_are_not_truncated_to_8() -> None:
    rng = np.random.default_rng(3)
    x, y = rng.integers(0, 65536, (2, 40, 40, 3), np.uint16)
    np.testing.assert_allclose(variance_similarity(x, y), slow_similarity(x / 257, y / 257), rtol=0, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_alpha_is_ignored(channels: int) -> None:
    x, y = texture((40, 40, channels), 1), texture((40, 40, channels), 2)
    alpha = texture((40, 40, 1), 3)
    expected = variance_similarity(x, y)
    np.testing.assert_array_equal(variance_similarity(np.dstack([x, alpha]), y), expected)
    np.testing.assert_array_equal(variance_similarity(x, np.dstack([y, 255 - alpha])), expected)
    not_finite = np.dstack([x.astype(np.float32), np.full((40, 40, 1), np.nan, np.float32)])
    np.testing.assert_array_equal(variance_similarity(not_finite, y), expected)


def test_gray_is_the_same_in_any_shape_and_as_three_equal_channels() -> None:
    x, y, colour = texture((40, 40), 1), texture((40, 40), 2), texture((40, 40, 3), 3)
    similarity = variance_similarity(x, y)
    np.testing.assert_array_equal(variance_similarity(x[:, :, None], y), similarity)
    x3, y3 = (np.repeat(image[:, :, None], 3, axis=2) for image in (x, y))
    np.testing.assert_allclose(variance_similarity(x3, y3), similarity, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(variance_similarity(x, colour), variance_similarity(x3, colour))


def test_views_and_read_only_arrays_are_read_as_they_are_and_never_written() -> None:
    x, y = texture((50, 60, 3), 1), texture((50, 60, 3), 2)
    expected = variance_similarity(x, y)
    x.flags.writeable = False
    np.testing.assert_array_equal(variance_similarity(x, np.asfortranarray(y)), expected)
    mirrored = variance_similarity(x[:, ::-1, ::-1], y[:, ::-1, ::-1])
    np.testing.assert_allclose(mirrored, expected[:, ::-1], rtol=0, atol=1e-6)
    transposed = variance_similarity(x.swapaxes(0, 1), y.swapaxes(0, 1))
    np.testing.assert_allclose(transposed, expected.T, rtol=0, atol=1e-6)
    padded = np.zeros((50, 120, 3), np.uint8)
    padded[:, ::2] = y
    np.testing.assert_array_equal(variance_similarity(x, padded[:, ::2]), expected)


BLACK = np.zeros((20, 30, 3), np.uint8)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (np.zeros((30, 20, 3), np.uint8), "gan_sr: is 20x30 pixels, but mse_sr is 30x20; give"),
        (BLACK.astype(np.int32), "gan_sr: is of dtype int32"),
        (BLACK.astype(np.float16), "gan_sr: is of dtype float16"),
        (BLACK.astype(bool), "gan_sr: is of dtype bool"),
        (BLACK.astype(">u2"), "gan_sr: is of dtype >u2"),
        (np.zeros((20, 30, 5), np.uint8), "gan_sr: is of shape"),
        (np.zeros((20, 30, 0), np.uint8), "gan_sr: is of shape"),
        (np.zeros((20,), np.uint8), "gan_sr: is of shape"),
        (np.zeros((1, 20, 30, 3), np.uint8), "gan_sr: is of shape"),
        (np.where(np.arange(30)[:, None] == 7, np.nan, BLACK), "gan_sr: holds samples that are not finite"),
        (np.full_like(BLACK, np.inf, np.float32), "gan_sr: holds samples that are not finite"),
        (np.full_like(BLACK, -np.inf, np.float64), "gan_sr: holds samples that are not finite"),
        (np.full_like(BLACK, 255.5, np.float32), r"outside of 0\.\.255"),
        (np.full_like(BLACK, -0.5, np.float32), r"outside of 0\.\.255"),
    ],
)
def test_images_that_cannot_be_compared_are_refused(other: Array, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        variance_similarity(BLACK, other)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(10, 30, 3), (30, 10), (0, 0, 3), (0, 20)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_images_smaller_than_the_window_are_refused(shape: tuple[int, ...], dtype: type) -> None:
    with pytest.raises(ArgumentError, match="fewer than the 11x11 window"):
        variance_similarity(np.zeros(shape, dtype), np.zeros(shape, dtype))


@pytest.mark.parametrize(
    "setting",
    [
        {"window": 10}, {"window": 0}, {"window": -3}, {"tile": 0}, {"threads": 0},
        {"sigma": 0.0}, {"sigma": -1.5}, {"sigma": float("nan")}, {"sigma": float("inf")},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(setting: dict[str, float]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(setting))):
        variance_similarity(BLACK, BLACK, **setting)  # type: ignore[arg-type]


def test_works_where_the_compiled_code_cannot_be_kept(tmp_path: Path) -> None:
    shutil.copytree(
        Path(desra_core.__file__).parent,
        tmp_path / "desra_core",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    # A file in the place of a folder keeps even root from writing there.
    for place in (tmp_path / "desra_core/detection/__pycache__", tmp_path / "home"):
        place.touch()
    environment = {
        "PATH": os.environ["PATH"], "HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "home"),
        "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    code = (
        "import numpy as np; from desra_core.detection import similarity; x = np.zeros((11, 11), np.uint8);"
        "print(similarity.__file__, similarity.variance_similarity(x, x))"
    )
    command = [sys.executable, "-c", code]
    answer = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
    assert answer.stdout == f"{tmp_path}/desra_core/detection/similarity.py [[1.]]\n"


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_extra_memory_does_not_grow_with_the_image(dtype: type) -> None:
    variance_similarity(BLACK, BLACK)  # the compiler's own memory is not the subject
    for side in (300, 1200):
        image = np.zeros((side, side, 3), dtype)
        tracemalloc.start()
        output = variance_similarity(image, image, tile=64)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak - output.nbytes < 1_000_000


@pytest.mark.skipif(not PAIRS.is_dir(), reason="the reference pairs are not here")
@pytest.mark.parametrize("name", ["butterfly2", "frog", "dog", "pattern", "computer", "tiger", "painting", "OST_009"])
def test_gives_the_published_script_s_values_on_real_pairs(name: str) -> None:
    expected = json.loads((PAIRS / "reference.json").read_text())[name]["distance"]
    mse_sr, gan_sr = (cv2.imread(str(next((PAIRS / folder).glob(f"{name}.*")))) for folder in ("mse_sr", "gan_sr"))
    similarity = variance_similarity(mse_sr, gan_sr).astype(np.float64)
    assert similarity.mean() == pytest.approx(expected["mean"], abs=1e-7)
    assert similarity.min() == pytest.approx(expected["min"], abs=1e-6)
    for quantile in (5, 50):
        assert np.percentile(similarity, quantile) == pytest.approx(expected[f"p{quantile:02}"], abs=1e-6)
