"""Copies of a photo get its group, other photos do not; the nearest photo is that of a plain search."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import cv2
import numpy as np
import pytest
import skimage.data
from hypothesis import given, settings
from hypothesis import strategies as st

from desra_core.training.pools import MAX_DISTANCE, nearest_group, signature


def scene(seed: int, height: int = 180, width: int = 240) -> np.ndarray:
    """``(H, W, 3)`` uint8 with the spectrum of a photo."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    layers = [np.fft.irfft2(np.fft.rfft2(rng.normal(size=(height, width))) / frequency, (height, width))
              for _ in range(4)]  # fmt: skip
    channels = [layers[0] + 0.3 * layer for layer in layers[1:]]
    return np.dstack([np.clip(128 + 45 * channel / channel.std(), 0, 255) for channel in channels]).astype(np.uint8)


def encoded(pixels: np.ndarray, suffix: str, quality: int) -> np.ndarray:
    flag = cv2.IMWRITE_JPEG_QUALITY if suffix == ".jpg" else cv2.IMWRITE_WEBP_QUALITY
    return cv2.imdecode(cv2.imencode(suffix, pixels, [flag, quality])[1], cv2.IMREAD_COLOR)


def resized(pixels: np.ndarray, factor: float) -> np.ndarray:
    return cv2.resize(pixels, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA if factor < 1 else 1)


COPIES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "itself": lambda pixels: pixels,
    "JPEG 85": lambda pixels: encoded(pixels, ".jpg", 85),
    "JPEG 30": lambda pixels: encoded(pixels, ".jpg", 30),
    "WebP": lambda pixels: encoded(pixels, ".webp", 60),
    "halved": lambda pixels: resized(pixels, 0.5),
    "a third": lambda pixels: resized(pixels, 1 / 3),
    "doubled": lambda pixels: resized(pixels, 2),
    "halved JPEG": lambda pixels: encoded(resized(pixels, 0.5), ".jpg", 60),
    "noisy": lambda pixels: np.clip(
        pixels + np.random.default_rng(0).normal(0, 8, pixels.shape), 0, 255).astype(np.uint8),
    "darker": lambda pixels: (pixels * 0.7).astype(np.uint8),
    "flatter": lambda pixels: (64 + pixels * 0.5).astype(np.uint8),
    "blurred": lambda pixels: cv2.GaussianBlur(pixels, (0, 0), 1.5),
    "16 bits": lambda pixels: pixels.astype(np.uint16) * 257,
    "gray": lambda pixels: cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)[:, :, None],
}  # fmt: skip
PHOTOS = {name: np.ascontiguousarray(getattr(skimage.data, name)()) for name in ("astronaut", "chelsea", "coffee")}
SCENES = {f"scene {seed}": scene(seed) for seed in range(5)}
ALL = PHOTOS | SCENES


def distance(first: bytes, second: bytes) -> int:
    return (int.from_bytes(first) ^ int.from_bytes(second)).bit_count()


@pytest.mark.parametrize("copy", COPIES)
def test_a_copy_finds_its_photo(copy: str) -> None:
    signatures = bytearray().join(map(signature, ALL.values()))
    for name, pixels in ALL.items():
        assert nearest_group(signatures, list(ALL), signature(COPIES[copy](pixels))) == name


@pytest.mark.parametrize("copy", ["itself", "16 bits"])
def test_copies_of_the_same_brightness_change_no_bit(copy: str) -> None:
    for pixels in ALL.values():
        assert signature(COPIES[copy](pixels)) == signature(pixels)


def test_other_photos_are_far_away() -> None:
    found = [signature(pixels) for pixels in ALL.values()] + [signature(scene(seed)) for seed in range(5, 40)]
    assert min(distance(*two) for two in itertools.combinations(found, 2)) > 2 * MAX_DISTANCE


def test_a_mirrored_photo_is_no_copy() -> None:
    for pixels in ALL.values():
        assert distance(signature(pixels[:, ::-1]), signature(pixels)) > MAX_DISTANCE


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 40, 1), (17, 16, 3), (16, 17, 1), (3, 2000, 3)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_any_size_has_a_signature(shape: tuple[int, int, int], dtype: type) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape).astype(dtype)
    assert len(signature(pixels)) == 32


def nearest(known: list[tuple[bytes, str]], wanted: bytes) -> str | None:
    """Find the nearest signature by comparing all in turn."""
    best, group = MAX_DISTANCE + 1, None
    for found, name in known:
        if distance(found, wanted) < best:
            best, group = distance(found, wanted), name
    return group


def flipped(original: bytes, bits: set[int]) -> bytes:
    return (int.from_bytes(original) ^ sum(1 << bit for bit in bits)).to_bytes(32)


originals = st.sampled_from([bytes(32), bytes([255] * 32), bytes(range(32)), np.random.default_rng(0).bytes(32)])
signatures = st.builds(flipped, originals, st.sets(st.integers(0, 255), max_size=2 * MAX_DISTANCE))


@given(st.lists(signatures, max_size=30), st.lists(signatures, max_size=10))
@settings(deadline=None, max_examples=150)
def test_the_nearest_is_that_of_a_plain_search(known: list[bytes], wanted: list[bytes]) -> None:
    signatures, groups, pairs = bytearray(), [], []
    for number, found in enumerate(known):
        signatures += found
        groups.append(str(number))
        pairs.append((found, str(number)))
        assert nearest_group(signatures, groups, found) == nearest(pairs, found)
    for each in wanted:
        assert nearest_group(signatures, groups, each) == nearest(pairs, each)


@pytest.mark.parametrize("bits", [0, 1, MAX_DISTANCE, MAX_DISTANCE + 1])
def test_the_greatest_distance(bits: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        known = rng.bytes(32)
        found = nearest_group(bytearray(known), ["known"], flipped(known, set(rng.permutation(256)[:bits].tolist())))
        assert found == ("known" if bits <= MAX_DISTANCE else None)


def test_thousands_of_photos() -> None:
    rng = np.random.default_rng(0)
    signatures, groups = bytearray(), []
    known = [rng.bytes(32) for _ in range(5000)]
    for number, found in enumerate(known):
        assert nearest_group(signatures, groups, found) is None
        signatures += found
        groups.append(str(number))
    for number in (0, 1023, 1024, 1025, 2048, 4999):
        assert nearest_group(signatures, groups, flipped(known[number], {1, 100, 200})) == str(number)
