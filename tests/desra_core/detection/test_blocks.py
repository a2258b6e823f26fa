"""The features of blocks, against slow formulations, and their independence of strips."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.fft import dctn

from desra_core.detection import blocks
from desra_core.detection.blocks import FEATURES, MAPS, block_features
from desra_core.detection.similarity import variance_similarity
from desra_core.images.codec import LUMINANCE
from tests.desra_core.detection.test_detectors import pair


def maps_of(mse_sr: np.ndarray, gan_sr: np.ndarray) -> dict[str, np.ndarray]:
    return dict(zip(MAPS, np.moveaxis(blocks.block_maps(mse_sr, gan_sr), 2, 0), strict=True))


def in_blocks(image: np.ndarray) -> np.ndarray:
    """Average over blocks of 8x8 px."""
    return image.reshape(image.shape[0] // 8, 8, image.shape[1] // 8, 8).mean(axis=(1, 3))


def test_maps_by_hand_inside_of_the_image() -> None:
    mse_sr, gan_sr = pair(1, (64, 80, 3))
    maps = maps_of(mse_sr, gan_sr)
    inner = slice(1, -1), slice(1, -1)
    similarity = np.pad(np.asarray(variance_similarity(mse_sr, gan_sr)), 5, mode="edge")
    np.testing.assert_allclose(maps["similarity"][inner], in_blocks(similarity)[inner], rtol=1e-5)
    x, y = (image @ np.array(LUMINANCE) for image in (mse_sr, gan_sr))

    def windows(values: np.ndarray, side: int) -> np.ndarray:
        return np.lib.stride_tricks.sliding_window_view(np.pad(values, side // 2, mode="reflect"), (side, side))

    logs = {name: np.log1p(windows(v, side).std((-1, -2))) for name, v, side in (
        ("x3", x, 3), ("y3", y, 3), ("x11", x, 11), ("y11", y, 11))}  # fmt: skip
    np.testing.assert_allclose(maps["fine_contrast"][inner], in_blocks(logs["y3"] - logs["x3"])[inner], atol=1e-4)
    np.testing.assert_allclose(maps["contrast"][inner], in_blocks(logs["y11"] - logs["x11"])[inner], atol=1e-4)
    np.testing.assert_allclose(maps["texture"][inner], in_blocks(logs["x11"])[inner], atol=1e-4)
    np.testing.assert_allclose(maps["sharpness"][inner], in_blocks(logs["y3"] - logs["y11"])[inner], atol=1e-4)
    residual = np.abs(mse_sr.astype(float) - gan_sr).sum(axis=2)
    np.testing.assert_allclose(maps["residual"], in_blocks(np.log1p(residual)), rtol=1e-5)
    spread = np.log1p(windows(residual, 7).var((-1, -2)))
    np.testing.assert_allclose(maps["residual_variance"][inner], in_blocks(spread)[inner], rtol=1e-4)
    power = np.array([[dctn((y - x)[r : r + 8, c : c + 8], norm="ortho") ** 2 for c in range(0, 80, 8)]
                      for r in range(0, 64, 8)])  # fmt: skip
    power[:, :, 0, 0] = 0
    around = np.lib.stride_tricks.sliding_window_view(power, (3, 3), (0, 1)).mean((-1, -2))
    total = around.sum((-1, -2)) + 1
    fast = total - 1 - around[:, :, :4, :4].sum((-1, -2))
    np.testing.assert_allclose(maps["high_frequencies"][inner], np.log((fast + 1) / total), atol=1e-4)
    np.testing.assert_allclose(maps["pattern"][inner], np.log(around.max((-1, -2)) / total + 1e-3), atol=1e-4)


def test_features_are_relative_to_the_image() -> None:
    mse_sr, gan_sr = pair(2, (61, 90, 3))  # the last blocks are partly outside
    features = block_features(mse_sr, gan_sr)
    assert features.shape == (8, 12, len(FEATURES))
    assert features.dtype == np.float32
    assert np.isfinite(features).all()
    assert np.abs(np.median(features, axis=(0, 1))).max() < 1e-5
    maps = blocks.block_maps(mse_sr, gan_sr)
    values = maps - np.median(maps, axis=(0, 1))
    index = FEATURES.index("similarity, 1x1 blocks, in deviations")
    spread = np.median(np.abs(values), axis=(0, 1))
    np.testing.assert_allclose(features[:, :, index], values[:, :, 0] / (spread[0] + 1e-3), rtol=1e-4)


@pytest.mark.parametrize("shape", [(61, 90, 3), (11, 12, 3), (100, 40, 1)])
def test_no_feature_depends_on_the_strips(shape, monkeypatch) -> None:
    mse_sr, gan_sr = pair(3, shape)
    whole = block_features(mse_sr, gan_sr)
    monkeypatch.setattr(blocks, "_STRIP", 64)
    np.testing.assert_allclose(block_features(mse_sr, gan_sr), whole, rtol=1e-5, atol=1e-5)


def test_16_bits_have_the_features_of_8() -> None:
    mse_sr, gan_sr = pair(4, (40, 48, 3))
    deep = block_features(mse_sr.astype(np.uint16) * 257, gan_sr.astype(np.uint16) * 257)
    np.testing.assert_allclose(deep, block_features(mse_sr, gan_sr), atol=1e-4)
