"""Judgements of results with artifacts, losses and noise that the tests have put there."""

from __future__ import annotations

import dataclasses
import json
import math

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from desra_core import artifact_mask, find_regions, variance_similarity
from desra_core.detection.class_weights import class_names, load_weights
from desra_core.errors import ArgumentError
from desra_core.gate.criteria import Judgement, NewRegion, OldRegion
from desra_core.gate.judge import Artifacts, detect, judge, noisy

MIN_AREA = 1000
CODEC = TypeAdapter(Judgement)
BLOTCHES = {"left": np.s_[30:90, 20:80], "right": np.s_[40:110, 140:220]}


def mse_sr(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    smooth = cv2.GaussianBlur(rng.integers(0, 256, (150, 240, 3)).astype(np.float32), (0, 0), 6)
    return np.clip(128 + 6 * (smooth - 128), 30, 225).astype(np.uint8)


def gan_sr(*blotches: str, seed: int = 0, texture: float = 4) -> np.ndarray:
    """The smooth result with fine texture everywhere, and blotches of wrong texture."""
    rng = np.random.default_rng(100 + seed)
    pixels = mse_sr(seed) + rng.normal(0, texture, (150, 240, 3))
    wrong = rng.normal(0, 45, pixels.shape)
    for name in blotches:
        pixels[BLOTCHES[name]] += wrong[BLOTCHES[name]]
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def judged(before: np.ndarray, after: np.ndarray, labels=None, min_area=MIN_AREA) -> Judgement:
    found = [detect(mse_sr(), result, labels, min_area=min_area) for result in (before, after)]
    return judge("set/photo.png", "0f", "model", *found)


def test_detect_is_the_detection_of_desra_detect() -> None:
    """The labels have a class of a large weight in the upper rows, which keeps part of a blotch out of the mask."""
    labels = np.full((150, 240), 12, np.uint8)
    labels[:60] = 2
    weights = load_weights("published").values
    result = gan_sr("left", "right")
    weighting = {"threshold": 0.6, "labels": labels, "weights": weights}
    found = detect(mse_sr(), result, min_area=900, window=9, **weighting, tile=64, threads=2)
    similarity = variance_similarity(mse_sr(), result, window=9)
    mask = artifact_mask(similarity, min_area=900, frame=4, **weighting)
    assert found.pixels is result
    assert mask.any()
    assert np.array_equal(found.mask, mask)
    assert np.array_equal(found.low_area_mask, artifact_mask(similarity, min_area=225, frame=4, **weighting))
    assert found.regions == find_regions(mask, similarity, **weighting)
    assert not np.array_equal(mask, detect(mse_sr(), result, threshold=0.6, min_area=900, window=9).mask)


def test_the_loose_mask_is_taken_at_a_quarter_of_the_area() -> None:
    """The quarter is rounded down: for 4003 px the smallest region has 1001."""
    blotch = detect(mse_sr(), gan_sr("left"), min_area=MIN_AREA)
    (region,) = blotch.regions
    for quarter, there in ((region.area - 1, True), (region.area, False)):
        found = detect(mse_sr(), gan_sr("left"), min_area=4 * quarter + 3)
        assert not found.mask.any()
        assert found.low_area_mask.any() == there


def test_one_blotch_deleted_one_kept_one_added() -> None:
    judgement = judged(gan_sr("left"), gan_sr("right"))
    (left,) = judgement.regions
    (right,) = judgement.added
    assert left.gone
    assert left.x < 40 < 80 < left.x + left.width
    assert right.x > 100
    kept = judged(gan_sr("left", "right"), gan_sr("right"))
    assert [region.gone for region in kept.regions] == [True, False]
    assert kept.added == []
    assert kept.artifact_pixels_before == sum(region.area for region in kept.regions)
    assert kept.artifact_pixels_after < kept.artifact_pixels_before
    assert kept.pixels == 150 * 240
    assert kept.outside_pixels == kept.pixels - kept.artifact_pixels_before


def test_fidelity_is_taken_outside_of_the_mask_before() -> None:
    """The pixels that replace a blotch cost nothing, beyond the halo of the measures."""
    before = gan_sr("left")
    after = np.where(detect(mse_sr(), before, min_area=MIN_AREA).mask[:, :, None], mse_sr(), before)
    judgement = judged(before, after)
    assert [region.gone for region in judgement.regions] == [True]
    assert judgement.squared_error == 0
    assert 0.97 < judgement.ssim < 1
    assert 0.97 < judgement.gradient_similarity < 1
    assert judgement.sharpness_after < judgement.sharpness_before
    whole = judged(gan_sr(), gan_sr(texture=8))
    difference = gan_sr().astype(float) - gan_sr(texture=8)
    assert whole.squared_error == pytest.approx((difference**2).sum() / 3)


@pytest.mark.parametrize("blotches", [(), ("left",), ("left", "right")])
def test_equal_results(blotches: tuple[str, ...]) -> None:
    judgement = judged(gan_sr(*blotches), gan_sr(*blotches))
    assert [region.gone for region in judgement.regions] == [False] * len(blotches)
    assert judgement.clean == (not blotches)
    assert judgement.added == []
    assert (judgement.squared_error, judgement.ssim, judgement.gradient_similarity) == (0, 1, 1)
    assert judgement.sharpness_before == judgement.sharpness_after > 0
    assert judgement.artifact_pixels_before == judgement.artifact_pixels_after
    assert judgement.lpips is None


def test_hysteresis_at_the_minimal_area() -> None:
    """A region that shrinks just below the minimal area is not gone; a region that grows just above it is not added."""
    (region,) = detect(mse_sr(), gan_sr("left"), min_area=MIN_AREA).regions
    min_area = region.area - 1
    smaller = gan_sr("left")
    smaller[:, :30] = gan_sr()[:, :30]
    fallen = judged(gan_sr("left"), smaller, min_area=min_area)
    assert [fate.gone for fate in fallen.regions] == [False]
    assert fallen.artifact_pixels_after == 0
    risen = judged(smaller, gan_sr("left"), min_area=min_area)
    assert risen.clean
    assert risen.artifact_pixels_after == region.area
    assert risen.added == []


def test_exactly_half_is_neither_gone_nor_added() -> None:
    """The masks are made by hand: the right half of a region, and one pixel less."""
    pixels = np.zeros((30, 40, 1), np.uint8)
    similarity = np.full((20, 30), 0.2, np.float32)

    def found(columns: slice) -> Artifacts:
        mask = np.zeros((30, 40), bool)
        mask[10:20, columns] = True
        return Artifacts(pixels, mask, mask, find_regions(mask, similarity))

    whole, half, less = found(slice(10, 20)), found(slice(15, 20)), found(slice(15, 20))
    less.low_area_mask[10, 15] = False
    assert [region.gone for region in judge("a", "b", "c", whole, half).regions] == [False]
    assert judge("a", "b", "c", half, whole).added == []
    assert [region.gone for region in judge("a", "b", "c", whole, less).regions] == [True]
    (added,) = judge("a", "b", "c", less, whole).added
    assert added == NewRegion(10, 10, 10, 10, 100, None, pytest.approx(50, rel=1e-6))


def test_classes_are_named() -> None:
    labels = np.full((150, 240), 4, np.uint8)
    labels[:, 120:] = 149
    judgement = judged(gan_sr("left"), gan_sr("left", "right"), labels)
    names = class_names()
    assert [region.class_name for region in judgement.regions] == [names[4]]
    assert [region.class_name for region in judgement.added] == [names[149]]
    assert judgement.regions[0].severity > 0


def test_lpips_is_measured_where_there_is_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def brightening(model: float, before: np.ndarray, after: np.ndarray) -> float:
        return model * float((after - before).max())

    monkeypatch.setattr("desra_core.gate.judge.lpips_distance", brightening)
    found = detect(mse_sr(), gan_sr(), min_area=MIN_AREA)
    other = found._replace(pixels=found.pixels + np.uint8(1))
    assert judge("a", "b", "c", found, other, lpips=0.25).lpips == 0.25
    assert judge("a", "b", "c", found, other).lpips is None


def test_iou_with_the_mask_that_people_drew() -> None:
    """Pixel by pixel, without the 5 px frame; an empty mask gives none."""
    before, after = (detect(mse_sr(), gan_sr(*names), min_area=MIN_AREA) for names in (("left", "right"), ("right",)))
    drawn = np.zeros((150, 240), bool)
    drawn[3:60, 2:90] = True
    expected = []
    for found in (before, after):
        both = either = 0
        for row in range(5, 145):
            for column in range(5, 235):
                one, other = found.mask[row, column], drawn[row, column]
                both, either = both + (one and other), either + (one or other)
        expected.append(both / either)
    judgement = judge("a", "b", "c", before, after, human=drawn)
    assert (judgement.iou_before, judgement.iou_after) == tuple(expected)
    assert expected[0] > expected[1]
    framed = np.pad(np.zeros((140, 230), bool), 5, constant_values=True)
    for nothing in (None, np.zeros_like(drawn), framed):
        without = judge("a", "b", "c", before, after, human=nothing)
        assert (without.iou_before, without.iou_after) == (None, None)


def test_results_of_two_sizes() -> None:
    found = detect(mse_sr(), gan_sr(), min_area=MIN_AREA)
    smaller = detect(mse_sr()[1:], gan_sr()[1:], min_area=MIN_AREA)
    with pytest.raises(ArgumentError, match="two masks of one image"):
        judge("a", "b", "c", found, smaller)


REGION = (
    st.integers(0, 10**6), st.integers(0, 10**6), st.integers(1, 10**5), st.integers(1, 10**5), st.integers(1, 10**10),
    st.none() | st.text(), st.floats(0, 1e9),
)  # fmt: skip
JUDGEMENTS = st.builds(
    Judgement,
    regions=st.lists(st.builds(OldRegion, *REGION, st.booleans()), max_size=3),
    added=st.lists(st.builds(NewRegion, *REGION), max_size=3),
    **{
        field: st.floats(0, 1e12)
        for field in ("squared_error", "ssim", "gradient_similarity", "sharpness_before", "sharpness_after")
    },
    lpips=st.none() | st.floats(0, 2),
)


@settings(deadline=None, max_examples=100)
@given(JUDGEMENTS)
def test_judgements_survive_json(judgement: Judgement) -> None:
    read = CODEC.validate_python(json.loads(json.dumps(CODEC.dump_python(judgement))))
    assert read == judgement
    assert all(type(region) is OldRegion for region in read.regions)
    assert all(type(region) is NewRegion for region in read.added)


def test_a_real_judgement_survives_json() -> None:
    """Its numbers are Python's: JSON refuses NumPy's."""
    judgement = judged(gan_sr("left"), gan_sr("right"))
    document = json.loads(json.dumps(CODEC.dump_python(judgement)))
    assert CODEC.validate_python(document) == judgement
    assert set(document) == {field.name for field in dataclasses.fields(Judgement)}
    assert list(document["regions"][0])[-2:] == ["severity", "gone"]


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(st.integers(1, 20), st.integers(1, 20), st.sampled_from([1, 3])),
    st.text(),
    st.integers(0, 2**32 - 1),
)
def test_noise_is_repeatable_and_small(shape: tuple[int, ...], text: str, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    changed = noisy(pixels, text)
    assert changed.dtype == np.uint8
    assert np.abs(changed.astype(int) - pixels).max() <= 2
    assert np.array_equal(changed, noisy(pixels.copy(), text))
    wide = noisy(pixels.astype(np.uint16) * 257, text)
    assert wide.dtype == np.uint16
    assert np.array_equal(wide, changed.astype(np.uint16) * 257)


def test_noise_is_uniform_and_independent() -> None:
    gray = np.full((400, 500, 3), 128, np.uint8)
    noise = noisy(gray, "photo").astype(int) - 128
    shares = np.bincount(noise.ravel() + 2) / noise.size
    assert shares == pytest.approx([0.2] * 5, abs=5 * math.sqrt(0.16 / noise.size))
    for other in (np.roll(noise, 1, 0), np.roll(noise, 1, 1), np.roll(noise, 1, 2), noisy(gray, "photo 2") - 128.0):
        assert abs((noise * other).mean()) < 5 * 2 / math.sqrt(noise.size)  # their product has a deviation of 2


def test_noise_is_clipped() -> None:
    for dtype in (np.uint8, np.uint16):
        white = np.iinfo(dtype).max
        pixels = np.zeros((50, 50, 3), dtype)
        pixels[25:] = white
        noise = noisy(pixels, "")
        step = white // 255
        assert np.unique(noise[:25]).tolist() == [0, step, 2 * step]
        assert np.unique(noise[25:]).tolist() == [white - 2 * step, white - step, white]


def test_noise_changes_no_verdict() -> None:
    before = gan_sr("left", "right")
    judgement = judged(before, noisy(before, "0f"))
    assert [region.gone for region in judgement.regions] == [False, False]
    assert judgement.added == []
    assert 0 < judgement.squared_error <= 4 * judgement.outside_pixels
