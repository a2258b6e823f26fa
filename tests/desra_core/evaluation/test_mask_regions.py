"""Regions in reading order, held against scipy's labelling and plain loops."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from desra_core.detection.regions import Components
from desra_core.evaluation.mask_regions import MaskRegion, mask_regions
from tests.desra_core.evaluation.published_scripts import components, lies_inside


def slow_regions(mask: np.ndarray, other: np.ndarray, labels: np.ndarray, offset: int) -> list[MaskRegion]:
    regions = []
    for component in components(mask):
        rows, columns = np.nonzero(component)
        classes = Counter(labels[component].tolist())
        dominant = min(classes, key=lambda label: (-classes[label], label))
        regions.append(
            MaskRegion(
                int(columns.min()) + offset, int(rows.min()) + offset, int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1,
                int(component.sum()), int((component & other).sum()), dominant,
            )
        )  # fmt: skip
    return regions


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 25), st.integers(1, 25), st.floats(0, 0.7), st.integers(0, 2**32))
def test_random_masks(height: int, width: int, share: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask, other = rng.random((2, height, width)) < share
    labels = rng.integers(147, 150, (height, width)).astype(np.uint8)
    found = Components(mask)
    regions = mask_regions(found, other, labels, 5)
    assert regions == slow_regions(mask, other, labels, 5)
    assert [region.covered for region in regions] == [lies_inside(part, other) for part in components(mask)]
    assert [region.dominant_class for region in mask_regions(found, other, None, 0)] == [None] * len(regions)


@pytest.mark.parametrize("shape", [(4, 6), (1, 1)])
def test_nothing_and_everything(shape: tuple[int, int]) -> None:
    nothing, everything = np.zeros(shape, bool), np.ones(shape, bool)
    assert len(Components(nothing)) == 0
    assert mask_regions(Components(nothing), everything, np.zeros(shape, np.uint8), 5) == []
    (region,) = mask_regions(Components(everything), nothing, np.full(shape, 149, np.uint8), 5)
    assert region == MaskRegion(5, 5, shape[1], shape[0], shape[0] * shape[1], 0, 149)
