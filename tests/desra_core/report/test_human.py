"""Precision and recall over severity, against counting anew at every level."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from desra_core.detection import find_regions
from desra_core.errors import ImageError
from desra_core.evaluation.metrics import compare_masks, pooled
from desra_core.report import human as human_module
from desra_core.report import write_report
from desra_core.report.human import curve_of, judge, severity_curve
from desra_core.report.results import read_results
from desra_core.workspace import Workspace
from tests.desra_core.report.conftest import SIZE, read
from tests.desra_core.report.pages import look_at, words

SHAPE = (60, 70)


def blobs(rng: np.random.Generator, count: int) -> np.ndarray:
    mask = np.zeros(SHAPE, np.bool_)
    for _ in range(count):
        y, x = rng.integers(0, SHAPE[0]), rng.integers(0, SHAPE[1])
        mask[y : y + rng.integers(1, 16), x : x + rng.integers(1, 16)] = True
    return mask


def boxes(mask: np.ndarray, rng: np.random.Generator) -> list[dict]:
    """The regions of a mask; severities that often tie."""
    found = find_regions(mask, np.ones(mask.shape, np.float32))
    return [region._asdict() | {"severity": float(rng.integers(-3, 4))} for region in found]


def parts(mask: np.ndarray, regions: list[dict], level: float) -> np.ndarray:
    """The components of a mask that are at least so severe."""
    _, components, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    severity = {(r["x"], r["y"], r["width"], r["height"]): r["severity"] for r in regions}
    kept = [False] + [severity[tuple(row[:4])] >= level for row in stats[1:].tolist()]
    return np.array(kept)[components]


@given(st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_the_curve_counts_what_a_mask_of_each_level_would(seed: int) -> None:
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(rng.integers(1, 4)):
        mask = blobs(rng, rng.integers(0, 9))
        images.append((mask, mask & blobs(rng, 6) | blobs(rng, rng.integers(0, 3)), boxes(mask, rng)))
    curve = curve_of([judge(*image) for image in images], looked_at=5)
    crop = (slice(5, -5), slice(5, -5))
    expected = []
    for level in sorted({region["severity"] for *_, regions in images for region in regions}, reverse=True):
        found = pooled(compare_masks(parts(mask, regions, level)[crop], human[crop]) for mask, human, regions in images)
        if found.detected and found.marked and (found.recall, found.precision) not in expected[-1:]:
            expected.append((found.recall, found.precision))
    kept = [point for index, point in enumerate(curve.points) if index == 0 or point != curve.points[index - 1]]
    assert kept == expected
    whole = pooled(compare_masks(mask[crop], human[crop]) for mask, human, _ in images)
    assert curve[1:] == (len(images), 5, whole.detected, whole.right, whole.marked, whole.found)


def test_ends_without_regions() -> None:
    none, some = np.zeros(SHAPE, np.bool_), np.zeros(SHAPE, np.bool_)
    some[20:30, 20:30] = True
    region = [{"x": 20, "y": 20, "width": 10, "height": 10, "severity": 5.0}]
    assert curve_of([], looked_at=0) == ([], 0, 0, 0, 0, 0, 0)
    assert curve_of([judge(none, some, [])], looked_at=1) == ([], 1, 1, 0, 0, 1, 0)
    assert curve_of([judge(some, none, region)], looked_at=1) == ([], 1, 1, 1, 0, 0, 0)
    assert curve_of([judge(some, some, region)], looked_at=1) == ([(1.0, 1.0)], 1, 1, 1, 1, 1, 1)


def test_several_regions_find_one_together() -> None:
    """Less than a quarter each: with the third of them, half of what the person marked is found."""
    mask, human = np.zeros(SHAPE, np.bool_), np.zeros(SHAPE, np.bool_)
    human[20:30, 10:50] = True
    regions = []
    for x, severity in ((10, 1.0), (20, 5.0), (30, 3.0), (40, 4.0)):
        mask[20:30, x : x + 9] = True
        regions.append({"x": x, "y": 20, "width": 9, "height": 10, "severity": severity})
    judged = judge(mask, human, regions)
    assert judged.found.tolist() == [3]
    assert curve_of([judged], looked_at=1).points == [(0, 1), (0, 1), (1, 1), (1, 1)]


def test_a_mask_of_other_regions_does_not_count() -> None:
    mask = np.zeros(SHAPE, np.bool_)
    mask[20:30, 20:30] = True
    with pytest.raises(ImageError, match="not the one of the regions"):
        judge(mask, mask, [{"x": 20, "y": 20, "width": 10, "height": 9, "severity": 5.0}])


def test_a_workspace_that_people_have_looked_at(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    results = read_results(workspace)
    assert severity_curve(results) is None
    assert "Held against people" not in words(write_report(workspace).read_text())
    worst = sorted(set(results.regions["image"].to_pylist()) & {"set0/photo008", "set1/photo011", "set0/photo010"})
    clean = "set0/photo000"
    right = read(workspace.mask(worst[0])) > 0
    people = {worst[0]: right, worst[1]: np.zeros(SIZE, np.bool_), clean: right, "set1/photo003": right[:9, :9]}
    look_at(workspace, people, gan_sr_key="of another model")
    assert severity_curve(results) is None
    look_at(workspace, people)
    curve = severity_curve(results)
    assert curve is not None
    assert curve[1:] == (3, 4, 2, 1, 2, 1)  # one mask is of another size
    assert curve.points[-1] == (0.5, 0.5)
    text = words(write_report(workspace).read_text())
    assert "On 3 images that a person has looked at, 1 of 2 regions are right (precision 50 %)" in text
    assert "Of 2 regions that people marked, 1 is found (recall 50 %)" in text
    assert "4 images have a human mask. Counted are 3" in text
    monkeypatch.setattr(human_module, "IMAGES", 2)
    bounded = severity_curve(results)
    assert bounded is not None
    assert (bounded.images <= 2, bounded.looked_at) == (True, 4)


def test_nothing_is_mended(workspace: Workspace) -> None:
    results = read_results(workspace)
    name = results.regions["image"][0].as_py()
    look_at(workspace, {name: read(workspace.mask(name)) > 0})
    workspace.human_mask(name).write_bytes(b"damaged")
    curve = severity_curve(results)
    assert curve is not None
    assert curve.images == 0
    assert workspace.human_mask(name).read_bytes() == b"damaged"
