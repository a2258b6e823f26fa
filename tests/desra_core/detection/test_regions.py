"""Regions, held against a slow formulation with scipy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from desra_core import Region, artifact_mask, find_regions
from desra_core.detection.mask import Components

EIGHT = np.ones((3, 3), bool)


def slow_regions(mask, similarity, threshold, labels=None, weights=None) -> list[Region]:
    frame = (mask.shape[0] - similarity.shape[0]) // 2
    components, count = ndimage.label(mask, EIGHT)
    boxes = ndimage.find_objects(components)
    regions = []
    for index in range(1, count + 1):
        pixels = [(int(row), int(column)) for row, column in np.argwhere(components == index)]
        values = [float(similarity[row - frame, column - frame]) for row, column in pixels]
        classes = None if labels is None else [int(labels[pixel]) for pixel in pixels]
        factors = [1.0] * len(pixels) if classes is None else [float(weights[label]) for label in classes]
        adjusted = [min(max(w * d, 0), 1) for w, d in zip(factors, values, strict=True)]
        dominant = None
        if classes is not None:
            dominant = min(set(classes), key=lambda label: (-classes.count(label), label))
        rows, columns = boxes[index - 1]
        region = Region(
            x=columns.start,
            y=rows.start,
            width=columns.stop - columns.start,
            height=rows.stop - rows.start,
            area=len(pixels),
            dominant_class=dominant,
            mean_similarity=sum(values) / len(values),
            severity=len(values) * (threshold - sum(adjusted) / len(adjusted)),
        )
        regions.append((pixels[0], region))
    return [region for _, region in sorted(regions, key=lambda pair: pair[0])]


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 25), st.integers(1, 25), st.floats(0, 0.7), st.integers(0, 2**32))
def test_components_of_random_masks(height: int, width: int, share: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask, other = rng.random((2, height, width)) < share
    labelled, count = ndimage.label(mask, EIGHT)
    parts = sorted((labelled == index + 1 for index in range(count)), key=lambda part: int(part.argmax()))
    found = Components(mask)
    assert len(found) == count
    assert found.areas.tolist() == [part.sum() for part in parts]
    assert found.overlap(other).tolist() == [(part & other).sum() for part in parts]
    assert found.covered(other).tolist() == [2 * (part & other).sum() >= part.sum() for part in parts]
    assert np.array_equal(found.numbers, sum((part * (index + 1) for index, part in enumerate(parts)), 0 * mask))
    for index, part in enumerate(parts):
        rows, columns = ndimage.find_objects(part.astype(int))[0]
        assert np.array_equal(found.crop(index), part[rows, columns])
        assert found.boxes[index].tolist() == [columns.start, rows.start, *part[rows, columns].shape[::-1]]
    flags = rng.random(count) < 0.5
    chosen = [part for part, flag in zip(parts, flags, strict=True) if flag]
    assert np.array_equal(found.chosen(flags), np.any([np.zeros_like(mask), *chosen], axis=0))


def assert_alike(found: list[Region], expected: list[Region]) -> None:
    assert [region[:6] for region in found] == [region[:6] for region in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.mean_similarity == pytest.approx(other.mean_similarity, rel=1e-12)
        assert one.severity == pytest.approx(other.severity, rel=1e-9, abs=1e-9)


@settings(deadline=None, max_examples=100)
@given(
    st.integers(1, 25), st.integers(1, 25), st.integers(0, 5), st.floats(0, 1), st.booleans(), st.integers(0, 2**32 - 1)
)
def test_random_masks(height: int, width: int, frame: int, share: float, labelled: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = np.pad(rng.random((height, width)) < share, frame)
    similarity = rng.random((height, width)).astype(np.float32)
    weighting = {}
    if labelled:
        weighting = {"labels": rng.integers(147, 150, mask.shape, dtype=np.uint8), "weights": rng.random(150) * 3}
    found = find_regions(mask, similarity, threshold=0.8, **weighting)
    assert_alike(found, slow_regions(mask, similarity, 0.8, **weighting))


def test_order_is_that_of_the_first_pixel() -> None:
    """The lower left region begins further down, though its box begins further left."""
    mask = np.zeros((40, 40), bool)
    mask[30:35, 5:10] = mask[8:12, 30:35] = mask[8:20, 10:15] = mask[9:11, 20:22] = True
    regions = find_regions(mask, np.zeros((30, 30), np.float32))
    assert [(region.x, region.y) for region in regions] == [(10, 8), (30, 8), (20, 9), (5, 30)]


@pytest.mark.parametrize(("row", "dominant"), [([7, 7, 3, 3], 3), ([7, 7, 7, 3], 7), ([149, 0, 149, 0], 0)])
def test_the_lower_class_wins_a_tie(row: list[int], dominant: int) -> None:
    mask, labels = np.ones((1, 4), bool), np.array([row], np.uint8)
    (region,) = find_regions(mask, np.zeros((1, 4), np.float32), labels=labels, weights=np.ones(150))
    assert region.dominant_class == dominant


def test_labels_name_classes_without_weights() -> None:
    mask, labels = np.ones((2, 2), bool), np.full((2, 2), 9, np.uint8)
    (region,) = find_regions(mask, np.full((2, 2), 0.5, np.float32), labels=labels)
    assert region.dominant_class == 9
    assert region.severity == pytest.approx(4 * 0.2)


def test_empty_mask() -> None:
    assert find_regions(np.zeros((30, 30), bool), np.ones((20, 20), np.float32)) == []


def test_severity_is_area_times_missing_similarity() -> None:
    mask = np.pad(np.ones((4, 5), bool), 5)
    similarity = np.full((4, 5), 0.25, np.float32)
    (region,) = find_regions(mask, similarity, threshold=0.75)
    assert region == Region(5, 5, 5, 4, 20, None, 0.25, 10.0)


def test_regions_of_a_found_mask_are_more_severe_where_similarity_is_lower() -> None:
    similarity = np.ones((100, 200), np.float32)
    similarity[20:80, 20:80] = 0.6
    similarity[20:80, 120:180] = 0.2
    mild, grave = find_regions(artifact_mask(similarity, min_area=100), similarity)
    assert 0 < mild.severity < grave.severity
    assert mild.area == grave.area
