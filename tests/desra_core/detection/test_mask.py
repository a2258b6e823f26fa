"""Masks, held against a slow formulation with scipy and against the masks of the authors' script."""

from __future__ import annotations

import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from desra_core import artifact_mask, detect_artifacts, find_regions, variance_similarity
from desra_core.detection.class_weights import load_weights
from desra_core.errors import ArgumentError
from desra_core.images.codec import decode, decode_labels

PAIRS = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "pairs"
EIGHT = np.ones((3, 3), bool)
FIVE = np.ones((5, 5), bool)
SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 40))
AREAS = st.integers(0, 60)


def slow_mask(similarity, threshold, min_area, labels=None, weights=None, frame=5) -> np.ndarray:
    height, width = similarity.shape
    adjusted = similarity.astype(np.float64)
    if labels is not None:
        inner = labels[frame : frame + height, frame : frame + width]
        for row in range(height):
            for column in range(width):
                adjusted[row, column] *= weights[inner[row, column]]
    binary = np.clip(adjusted, 0, 1) < threshold
    binary = ndimage.binary_erosion(binary, FIVE, border_value=1)
    binary = np.pad(binary, 8)  # scipy 1.17's iterated morphology is wrong on arrays narrower than its structure
    binary = ndimage.binary_dilation(binary, FIVE, iterations=3)[8:-8, 8:-8]
    binary = ndimage.binary_fill_holes(np.pad(binary, 8), EIGHT)[8:-8, 8:-8]
    components, count = ndimage.label(binary, EIGHT)
    for index in range(1, count + 1):
        if (components == index).sum() <= min_area:
            binary[components == index] = False
    return np.pad(binary, frame)


@st.composite
def blotches(draw: st.DrawFn) -> np.ndarray:
    """Low similarity in rectangles and rings, so that erosion leaves something and dilation makes holes."""
    height, width = draw(st.integers(1, 60)), draw(st.integers(1, 60))
    similarity = np.full((height, width), draw(st.sampled_from([0.9, 1.0, 0.7, 0.5])), np.float32)
    for _ in range(draw(st.integers(0, 6))):
        top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
        low = np.float32(draw(st.sampled_from([0.0, 0.3, 0.6999, 0.7, 0.95])))
        bottom, right = top + draw(st.integers(1, 40)), left + draw(st.integers(1, 40))
        similarity[top:bottom, left:right] = low
    return similarity


@settings(deadline=None, max_examples=200)
@given(blotches(), st.sampled_from([0.3, 0.7, 0.85, 1.0]), AREAS)
def test_blotches(similarity: np.ndarray, threshold: float, min_area: int) -> None:
    mask = artifact_mask(similarity, threshold=threshold, min_area=min_area)
    assert mask.dtype == np.bool_
    assert np.array_equal(mask, slow_mask(similarity, threshold, min_area))


@settings(deadline=None, max_examples=100)
@given(arrays(np.float32, SHAPES, elements=st.sampled_from([0.0, 0.7, 1.0])), AREAS)
def test_adversarial_maps(similarity: np.ndarray, min_area: int) -> None:
    assert np.array_equal(artifact_mask(similarity, min_area=min_area), slow_mask(similarity, 0.7, min_area))


@settings(deadline=None, max_examples=50)
@given(SHAPES, st.integers(0, 2**32 - 1), st.floats(0.001, 0.2), st.integers(0, 5))
def test_random_maps_with_labels(shape: tuple[int, int], seed: int, share: float, frame: int) -> None:
    """Smooth noise around the threshold, where a weight in float32 would make a difference."""
    rng = np.random.default_rng(seed)
    similarity = cv2.GaussianBlur(rng.random(shape).astype(np.float32), (0, 0), 3)
    similarity = np.clip(0.6 + 3 * (similarity - similarity.mean()), 0, 1).astype(np.float32)
    weights = 20 / (20 - rng.integers(0, 19, 150).astype(np.float64))
    labels = np.repeat(rng.integers(0, 150, shape[0] + 2 * frame, dtype=np.uint8)[:, None], shape[1] + 2 * frame, 1)
    min_area = int(share * similarity.size)
    mask = artifact_mask(similarity, min_area=min_area, labels=labels, weights=weights, frame=frame)
    assert mask.shape == labels.shape
    assert np.array_equal(mask, slow_mask(similarity, 0.7, min_area, labels, weights, frame))


@settings(deadline=None, max_examples=60)
@given(blotches(), st.floats(0.05, 1), st.floats(0.05, 1), AREAS, AREAS, st.floats(0.5, 3), st.floats(0.5, 3))
def test_monotone(similarity, one, other, small, large, light, heavy) -> None:
    """A lower threshold, a larger area or a larger weight never adds a pixel."""
    labels = np.zeros((similarity.shape[0] + 10, similarity.shape[1] + 10), np.uint8)

    def mask(threshold: float, min_area: int, weight: float) -> np.ndarray:
        weights = np.full(150, weight)
        return artifact_mask(similarity, threshold=threshold, min_area=min_area, labels=labels, weights=weights)

    loose = mask(max(one, other), min(small, large), min(light, heavy))
    assert not (mask(min(one, other), max(small, large), max(light, heavy)) & ~loose).any()


def test_maps_larger_than_a_strip() -> None:
    rng = np.random.default_rng(5)
    similarity = cv2.resize(rng.random((40, 40)).astype(np.float32), (1500, 1500), interpolation=cv2.INTER_LINEAR)
    labels = np.repeat((np.arange(1510) // 4 % 150).astype(np.uint8)[:, None], 1510, 1)
    weights = load_weights("published").values
    adjusted = np.clip(similarity * weights[labels[5:-5, 5:-5]], 0, 1)
    mask = artifact_mask(similarity, labels=labels, weights=weights)
    # The weighted map as a whole, in float64 already.
    whole = slow_mask(adjusted, 0.7, 4000)
    assert 0 < whole.sum() < whole.size
    assert np.array_equal(mask, whole)


def square(side: int, *, shape: tuple[int, int] = (60, 60)) -> np.ndarray:
    """A map whose mask is one square of ``side`` pixels: 8 more on each axis than the suspect square."""
    similarity = np.ones(shape, np.float32)
    similarity[20 : 20 + side - 8, 20 : 20 + side - 8] = 0
    return similarity


def test_area_is_strictly_greater() -> None:
    similarity = square(16)
    assert artifact_mask(similarity, min_area=255).sum() == 256
    assert not artifact_mask(similarity, min_area=256).any()


def test_the_threshold_itself_is_no_artifact() -> None:
    similarity = np.full((30, 30), 0.5, np.float32)
    assert not artifact_mask(similarity, threshold=0.5, min_area=0).any()
    assert artifact_mask(similarity, threshold=np.nextafter(0.5, 1), min_area=0).any()


def test_small_suspects_are_eroded_and_kept_ones_grow_by_four() -> None:
    similarity = np.ones((40, 40), np.float32)
    similarity[10:14, 10:30] = 0
    assert not artifact_mask(similarity, min_area=0).any()
    similarity[14, 10:30] = 0
    mask = artifact_mask(similarity, min_area=0)
    assert mask[11:24, 11:39].all()
    assert mask.sum() == 13 * 28


def test_holes_are_filled_before_the_area_counts() -> None:
    """A hole with a diagonal outlet stays open, and so does a hole at the border."""
    similarity = np.ones((80, 80), np.float32)
    similarity[10:70, 10:70] = 0
    similarity[25:55, 25:55] = 1
    assert artifact_mask(similarity, min_area=0).sum() == 68 * 68
    assert artifact_mask(similarity, min_area=68 * 68 - 1).any()
    similarity[25:55, 0:55] = 1
    opened = artifact_mask(similarity, min_area=0)
    assert not opened[45, 5:50].any()


def test_nothing_and_everything() -> None:
    assert not artifact_mask(np.ones((20, 30), np.float32), min_area=0).any()
    mask = artifact_mask(np.zeros((20, 30), np.float32), min_area=599)
    assert mask.shape == (30, 40)
    assert mask[5:-5, 5:-5].all()
    assert mask.sum() == 600


def test_many_components() -> None:
    """With ten thousand components; the slow formulation needs a pass for each."""
    suspect = np.zeros((1800, 1800), np.float32)
    suspect[:] = 1
    for row in range(5):
        for column in range(5):
            suspect[row + 2 :: 18, column + 2 :: 18] = 0
    mask = artifact_mask(suspect, min_area=0)
    assert ndimage.label(mask, EIGHT)[1] == 10_000
    assert not artifact_mask(suspect, min_area=169).any()


@pytest.mark.skipif(not PAIRS.is_dir(), reason="no ../shared/data beside the checkout")
@pytest.mark.parametrize("name", sorted(path.stem for path in PAIRS.glob("gan_sr/*")) or ["absent"])
def test_reference_masks(name: str) -> None:
    def content(folder: str) -> tuple[bytes, Path]:
        (path,) = (PAIRS / folder).glob(f"{name}.*")
        return path.read_bytes(), path

    mse_sr, gan_sr = (decode(*content(folder)).pixels for folder in ("mse_sr", "gan_sr"))
    similarity = variance_similarity(mse_sr, gan_sr)
    labels = decode_labels(*content("labels"))
    weights = load_weights("published").values
    folders = sorted((PAIRS / "reference_mask").iterdir())
    assert len(folders) == 6
    for folder in folders:
        kind, threshold, min_area = folder.name.split("_")
        weighting = {"labels": labels, "weights": weights} if kind == "semantic" else {}
        mask = artifact_mask(similarity, threshold=float(threshold[1:]), min_area=int(min_area[1:]), **weighting)
        reference = decode(*content(f"reference_mask/{folder.name}")).pixels[:, :, 0]
        assert np.array_equal(np.where(mask[5:-5, 5:-5], 255, 0), reference), folder.name
        if folder.name.endswith("_t0.7_a4000"):
            assert np.array_equal(detect_artifacts(mse_sr, gan_sr, weighting.get("labels")).mask, mask)


@pytest.mark.parametrize("window", [3, 7, 11, 15])
def test_the_mask_has_the_size_of_the_image_whatever_the_window(window: int) -> None:
    rng = np.random.default_rng(0)
    mse_sr = rng.integers(100, 110, (60, 70, 3)).astype(np.uint8)
    gan_sr = mse_sr.copy()
    gan_sr[20:40, 20:50] = rng.integers(0, 255, (20, 30, 3))
    similarity = variance_similarity(mse_sr, gan_sr, window=window)
    mask = artifact_mask(similarity, min_area=100)
    assert mask.shape == (60, 70)
    assert np.array_equal(mask, artifact_mask(np.asarray(similarity), min_area=100, frame=window // 2))
    assert mask[30, 35]
    assert not mask[: window // 2].any()
    labels = np.zeros((60, 70), np.uint8)
    weights = np.ones(150)
    for given_map in (similarity, np.asarray(similarity), pickle.loads(pickle.dumps(similarity))):
        weighted = artifact_mask(given_map, min_area=100, labels=labels, weights=weights)
        assert np.array_equal(weighted, mask)
    assert artifact_mask(pickle.loads(pickle.dumps(similarity)), min_area=100).shape == (60, 70)
    (region,) = find_regions(mask, similarity)
    assert region.area == mask.sum()


def test_sizes_that_do_not_belong_together_are_refused() -> None:
    similarity = variance_similarity(np.zeros((60, 70), np.uint8), np.zeros((60, 70), np.uint8), window=7)
    with pytest.raises(ArgumentError, match=r"labels: are of shape \(64, 74\), but the image of \(60, 70\)"):
        artifact_mask(similarity, labels=np.zeros((64, 74), np.uint8), weights=np.ones(150))
    for mask, labels in (((64, 72), None), ((50, 60), None), ((60, 70), (50, 60))):
        with pytest.raises(ArgumentError, match="does not belong to the image"):
            find_regions(
                np.zeros(mask, bool), similarity, labels=None if labels is None else np.zeros(labels, np.uint8)
            )
