"""Histograms of similarity by class, the rules and the thresholds, against loops over pixels."""

from __future__ import annotations

import csv
import math
import tomllib
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from desra_core.calibration.weights import (
    BINS,
    ClassHistogram,
    count_image,
    derive_weights,
    false_alarm_rate,
    false_alarm_threshold,
    largest_differences,
    merged,
    published_intervals,
    quantile_weights,
    to_csv,
    to_toml,
    weight_values,
)
from desra_core.detection.class_weights import class_names, load_weights
from desra_core.errors import UsageError
from desra_core.images.codec import CLASS_COUNT

few = settings(max_examples=20, deadline=None)
# Values on the edges of bins, just beside them, and anywhere.
edges = st.integers(0, 20).map(lambda edge: np.float32(edge / 20))
values = st.one_of(
    edges,
    edges.map(lambda value: np.nextafter(value, np.float32(0))),
    st.floats(0, 1, width=32).map(np.float32),
)


def image(seed: int, *, classes: int = 5, shape: tuple[int, int] = (40, 50)) -> tuple[Any, Any]:
    """D and labels; the classes differ in how D is distributed."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, shape).astype(np.uint8)
    similarity = rng.beta(2 + labels, 1.3).astype(np.float32)
    similarity[rng.random(shape) < 0.02] = 1
    return similarity, labels


def of_pixels(pixels: dict[int, list[Any]]) -> ClassHistogram:
    """The histogram of an image with the given D by class."""
    similarity = np.concatenate([np.array(found, np.float32) for found in pixels.values()])
    labels = np.repeat(list(pixels), [len(found) for found in pixels.values()]).astype(np.uint8)
    return count_image(similarity[np.newaxis], labels[np.newaxis])


def slow_interval(found: list[Any], percentile: Fraction) -> int:
    """Bins of a twentieth counted from the top, in rational numbers."""
    bins = [min(math.floor(20 * Fraction(float(value))), 19) for value in found]
    count = 1
    while 100 * sum(index >= 20 - count for index in bins) <= percentile * len(bins):
        count += 1
    return count - 1


def slow_quantile(found: list[Any], percentile: Fraction) -> Fraction:
    """The largest D that more than a percentile of the pixels reach."""
    ordered = sorted((Fraction(float(value)) for value in found), reverse=True)
    return next(value for value in ordered if 100 * sum(other >= value for other in ordered) > percentile * len(found))


def equal(one: ClassHistogram, other: ClassHistogram) -> bool:
    same = np.array_equal(one.counts, other.counts) and np.array_equal(one.images, other.images)
    return same and (one.seen, one.excluded) == (other.seen, other.excluded)


def test_every_pixel_is_in_its_bin() -> None:
    similarity, labels = image(0)
    exclude = np.random.default_rng(1).random(labels.shape) < 0.3
    labels[labels == 3] = 149
    exclude[labels == 4] = True
    histogram = count_image(similarity, labels, exclude)
    expected: dict[tuple[int, int], int] = {}
    for value, label, excluded in zip(similarity.flat, labels.flat, exclude.flat, strict=True):
        if not excluded:
            key = (int(label), min(math.floor(BINS * Fraction(float(value))), BINS - 1))
            expected[key] = expected.get(key, 0) + 1
    assert {(k, b): int(histogram.counts[k, b]) for k, b in zip(*np.nonzero(histogram.counts), strict=True)} == expected
    assert histogram.pixels.sum() == (~exclude).sum()
    assert np.flatnonzero(histogram.images).tolist() == [0, 1, 2, 149]
    assert (histogram.seen, histogram.excluded) == (1, exclude.sum())


def test_large_images_are_counted_in_strips() -> None:
    similarity, labels = image(0, shape=(3, 700_000))
    histogram = count_image(similarity, labels)
    assert histogram.pixels.tolist() == np.bincount(labels.ravel(), minlength=CLASS_COUNT).tolist()
    assert histogram.images.max() == 1


@pytest.mark.parametrize(
    ("similarity", "reason"),
    [(np.ones((2, 2)), "float64"), (np.full((2, 2), np.nan, np.float32), "not finite")],
)
def test_maps_that_cannot_be_counted_exactly(similarity, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        count_image(similarity, np.zeros((2, 2), np.uint8))


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=6, max_size=6), st.randoms())
def test_any_partition_of_the_images_gives_the_same(parts: list[int], random: Any) -> None:
    tables = [count_image(*image(seed, classes=1 + seed)).to_table() for seed in range(6)]
    whole = merged(tables)
    random.shuffle(tables)
    groups = [[table for table, part in zip(tables, parts, strict=True) if part == number] for number in range(3)]
    assert equal(merged(merged(group).to_table() for group in groups), whole)
    assert whole.images[:7].tolist() == [6, 5, 4, 3, 2, 1, 0]
    assert whole.seen == 6


def test_pixels_of_images_are_pooled() -> None:
    """The sum is that of one image with all pixels."""
    pairs = [image(seed) for seed in range(4)]
    together = count_image(*(np.concatenate([pair[part] for pair in pairs]) for part in (0, 1)))
    assert np.array_equal(merged(count_image(*pair).to_table() for pair in pairs).counts, together.counts)


def test_other_tables_are_refused() -> None:
    table = count_image(*image(0)).to_table()
    with pytest.raises(UsageError, match="is no histogram"):
        merged([table.replace_schema_metadata({})])


@few
@given(st.lists(values, min_size=1, max_size=60), st.integers(10, 999))
def test_rules_on_any_values(found: list[Any], tenths: int) -> None:
    histogram = of_pixels({7: found, 9: [1.0]})
    exact, percentile = Fraction(tenths, 10), tenths / 10
    interval = slow_interval(found, exact)
    assert published_intervals(histogram, percentile)[[7, 9, 8]].tolist() == [interval, 0, -1]
    weights = quantile_weights(histogram, percentile)
    quantile = slow_quantile(found, exact)
    lower = Fraction(min(math.floor(BINS * quantile), BINS - 1), BINS)
    assert weights[7] == pytest.approx(float(1 / max(lower, Fraction(1, BINS))), rel=1e-15)
    assert weights[9] == pytest.approx(BINS / (BINS - 1))
    assert np.isnan(weights[8])
    lifted = sum(Fraction(float(value)) >= lower for value in found)
    assert 100 * lifted > exact * len(found)
    assert 0 <= quantile - lower <= Fraction(1, BINS)


@pytest.mark.parametrize(
    ("percentile", "in_top_bin", "interval"),
    [(85, 84, 1), (85, 85, 1), (85, 86, 0), (57, 57, 1), (57, 58, 0), (14, 14, 1), (14, 15, 0), (99, 99, 1)],
)
def test_bins_hold_strictly_more_than_the_percentile(percentile: float, in_top_bin: int, interval: int) -> None:
    histogram = of_pixels({0: [0.97] * in_top_bin + [0.92] * (100 - in_top_bin)})
    assert published_intervals(histogram, percentile)[0] == interval
    quantile = 0.97 if interval == 0 else 0.92
    assert 1 / quantile_weights(histogram, percentile)[0] == pytest.approx(quantile, abs=1e-4)


def test_a_percentile_just_below_100_has_a_finite_weight() -> None:
    histogram = of_pixels({0: [0.97] * 9 + [0.0]})
    assert published_intervals(histogram, 99.9999999999999)[0] == 19
    (row, *_) = derive_weights(histogram, percentile=99.9999999999999, min_pixels=1, min_images=1)
    assert row.weight == 20
    assert quantile_weights(histogram, 99.9999999999999)[0] == BINS


def test_the_first_bin_has_a_finite_weight() -> None:
    histogram = of_pixels({0: [0.0] * 10})
    assert published_intervals(histogram)[0] == 19
    assert quantile_weights(histogram)[0] == BINS


@pytest.mark.parametrize("rate", [0.5, 0.1, 0.013, 0.001, 1e-6])
def test_thresholds_for_a_rate(rate: float) -> None:
    pairs = [image(seed, shape=(100, 100)) for seed in range(3)]
    histogram = merged(count_image(*pair).to_table() for pair in pairs)
    weights = np.random.default_rng(0).uniform(0.8, 3, CLASS_COUNT)
    adjusted = np.sort(
        np.concatenate([np.clip(weights[labels] * similarity.astype(np.float64), 0, 1).ravel()
                        for similarity, labels in pairs])
    )  # fmt: skip
    exact = adjusted[math.floor(rate * adjusted.size)]
    threshold = false_alarm_threshold(histogram, weights, rate)
    assert threshold is not None
    assert (adjusted < threshold).mean() <= rate
    assert exact - 3e-4 - 1e-4 <= threshold <= exact
    share = false_alarm_rate(histogram, weights, threshold)
    assert share is not None
    assert (adjusted < threshold).mean() <= share <= rate
    assert (adjusted < 0.7).mean() <= false_alarm_rate(histogram, weights, 0.7) <= (adjusted < 0.7003).mean()


def test_thresholds_at_the_ends() -> None:
    ones = np.ones(CLASS_COUNT)
    assert false_alarm_threshold(of_pixels({0: [0.99] * 10}), 2 * ones, 0.1) == 1
    assert false_alarm_threshold(of_pixels({0: [0.5] * 9 + [0.25]}), ones, 0.1) == 0.5
    assert false_alarm_threshold(of_pixels({0: [0.5] * 9 + [0.25]}), ones, 0.09) == 0.25
    assert false_alarm_threshold(of_pixels({0: [0.0] * 10}), ones, 0.1) is None
    empty = merged([])
    assert false_alarm_threshold(empty, ones) is None
    assert false_alarm_rate(empty, ones, 0.7) is None


@pytest.fixture
def histogram() -> ClassHistogram:
    """Class 0 in three images, class 1 in one, class 2 with few pixels in three."""
    rare = (np.full((1, 4), 0.5, np.float32), np.full((1, 4), 2, np.uint8))
    pairs = [image(seed, classes=1) for seed in range(3)] + [rare] * 3
    pairs.append((np.full((40, 50), 0.96, np.float32), np.full((40, 50), 1, np.uint8)))
    return merged(count_image(*pair).to_table() for pair in pairs)


def test_thin_and_unseen_classes_get_the_fallback(histogram: ClassHistogram) -> None:
    about: dict[str, Any] = {"min_pixels": 1000, "min_images": 3}
    rows = derive_weights(histogram, **about)
    assert [row.state for row in rows[:4]] == ["calibrated", "thin", "thin", "unseen"]
    assert [(row.pixels, row.images) for row in rows[:4]] == [(6000, 3), (2000, 1), (12, 3), (0, 0)]
    published = load_weights("published").values
    own = published_intervals(histogram)[0]
    assert rows[0].weight == 20 / (20 - own) != published[0]
    assert weight_values(rows)[1:].tolist() == published[1:].tolist()
    assert [row.interval for row in rows] == [own, *(row.published_interval for row in rows[1:])]

    ones = derive_weights(histogram, **about, fallback="one", rule="quantile")
    assert {row.weight for row in ones[1:]} == {1.0}
    assert ones[0].weight == quantile_weights(histogram)[0]
    pooled = derive_weights(histogram, **about, fallback="pooled", rule="quantile", percentile=70)
    values = sorted(np.concatenate([image(seed, classes=1)[0].ravel() for seed in range(3)]).tolist())
    values = sorted(values + [0.5] * 12 + [np.float32(0.96)] * 2000, reverse=True)
    assert pooled[5].weight == pytest.approx(1 / values[math.floor(0.7 * len(values))], rel=2e-4)
    assert len({row.weight for row in pooled[1:]}) == 1
    assert all(row.weight == 1 for row in derive_weights(merged([]), fallback="one"))
    assert weight_values(derive_weights(merged([]), fallback="pooled")).tolist() == published.tolist()
    assert derive_weights(histogram, min_pixels=1, min_images=1)[2].state == "calibrated"


def test_largest_differences_are_of_calibrated_classes() -> None:
    # The published intervals are 1, 11, 0, 0 and 8.
    histogram = of_pixels({3: [0.62] * 100, 144: [0.99] * 100, 37: [0.99] * 100, 58: [0.7] * 10, 29: [0.42] * 100})
    rows = derive_weights(histogram, min_pixels=50, min_images=1)
    ratios = {row.name: row.weight / row.published_weight for row in rows if row.state == "calibrated"}
    assert min(ratios.values()) < 1 < max(ratios.values())
    expected = sorted(ratios, key=lambda name: -max(ratios[name], 1 / ratios[name]))
    assert [row.name for row in largest_differences(rows, 9)] == [name for name in expected if ratios[name] != 1]
    assert [row.name for row in largest_differences(rows, 2)] == expected[:2]
    assert largest_differences(derive_weights(histogram, min_pixels=10**6), 2) == []


@pytest.mark.parametrize("rule", ["published", "quantile"])
@pytest.mark.parametrize("suffix", ["toml", "csv"])
def test_weights_files_give_the_very_weights(histogram: ClassHistogram, tmp_path: Path, rule: Any, suffix: str) -> None:
    rows = derive_weights(histogram, rule=rule, min_pixels=1000)
    about = {"origin": {"path": 'a "b"\\c\n\x7f ü \udcff', "none": None, "number": 1e-05}, "suggestion": {"rate": 0.5}}
    path = tmp_path / f"mine.{suffix}"
    path.write_bytes(to_toml(rows, about) if suffix == "toml" else to_csv(rows))
    weights = load_weights(str(path))
    assert weights.values.tolist() == weight_values(rows).tolist()
    other = tmp_path / "other.csv"
    other.write_bytes(to_csv(rows))
    assert weights.key == load_weights(str(other)).key != load_weights("published").key
    if suffix == "csv":
        header = next(csv.reader(path.read_text().splitlines()))
        assert header == ["ade20k_index", "name", "interval" if rule == "published" else "weight"]
        return
    document = tomllib.loads(path.read_text("utf-8"))
    assert document["version"] == 1
    assert document["origin"] == {"path": 'a "b"\\c\\n\\x7f ü \\udcff', "number": 1e-05}
    assert document["suggestion"] == {"rate": 0.5}
    assert [entry["name"] for entry in document["class"]] == class_names()
    assert document["class"][0] | {"interval": 0, "weight": 0} == {
        "index": 0, "name": "wall", "pixels": 6000, "images": 3, "source": "calibrated", "interval": 0, "weight": 0
    }  # fmt: skip
    assert {entry["source"] for entry in document["class"][1:]} == {"fallback"}


def toml(changes: dict[int, str] | None = None, *, count: int = CLASS_COUNT, version: str = "version = 1") -> str:
    classes = {index: f"index = {index}\nweight = 1.5" for index in range(count)} | (changes or {})
    return "\n".join([version, *(f"[[class]]\n{entry}" for entry in classes.values())]) + "\n"


def test_a_weights_file_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "mine.TOML"
    path.write_text(toml({3: "index = 3\ninterval = 10", 4: "index = 4\nweight = 2"}))
    assert load_weights(str(path)).values[:5].tolist() == [1.5, 1.5, 1.5, 2, 2]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (toml()[:-3] + "=", "is damaged or no TOML"),
        (b"\xff\xfe", "is damaged or no TOML"),
        ("", "holds no class weights"),
        (toml(version=""), "holds no class weights"),
        ("version = 1\nclass = 3", "holds no class weights"),
        ("version = 1\nclass = [3]", "holds no class weights"),
        (toml(version="version = 2"), "is of version 2 of the format, but this desra reads version 1"),
        (toml(count=171), "has weights for 171 classes; ADE20K has 150"),
        (toml(count=149), "has weights for 149 classes; ADE20K has 150"),
        (toml({5: "index = 4\nweight = 1"}), "class table 6: class 4 is there twice"),
        (toml({5: "index = 150\nweight = 1"}), "class table 6: has class 150"),
        (toml({5: "weight = 1"}), "class table 6: is no class weight"),
        (toml({5: "index = 5"}), "class table 6: is no class weight"),
        (toml({5: "index = 5.0\nweight = 1"}), "class table 6: is no class weight"),
        (toml({5: "index = 5\nweight = true"}), "class table 6: is no class weight"),
        (toml({5: "index = 5\nweight = [1]"}), "class table 6: is no class weight"),
        (toml({5: f"index = 5\nweight = 1{'0' * 400}"}), "class table 6: is no class weight"),
        (toml({5: "index = 5\nweight = -1"}), "class table 6: gives the weight -1"),
        (toml({5: "index = 5\nweight = nan"}), "class table 6: gives the weight nan"),
        (toml({5: "index = 5\ninterval = 1.0"}), "class table 6: is no class weight"),
        (toml({5: "index = 5\ninterval = 20"}), "class table 6: gives the interval 20"),
    ],
)
def test_malformed_weights_files(tmp_path: Path, content: str | bytes, reason: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=reason) as caught:
        load_weights(str(path))
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
