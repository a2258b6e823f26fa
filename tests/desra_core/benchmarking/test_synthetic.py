"""The synthetic benchmark as a run, and its sums and tables, compared with counts that are made by hand."""

from __future__ import annotations

import csv
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from desra_core.benchmarking import plan
from desra_core.benchmarking.injection import KINDS, Case
from desra_core.benchmarking.synthetic import (
    RATIO_BOUNDS,
    Rate,
    SyntheticSummary,
    curves,
    read_trials,
    sections_of,
    summarise,
    to_rows,
)
from desra_core.benchmarking.trial import FalseAlarms, Response, Trial, run_trial
from desra_core.detection.detectors import DetectorInputs
from desra_core.evaluation.metrics import wilson_interval
from desra_core.evaluation.table import Section, document_as_markdown, document_as_text
from desra_core.images.codec import decode
from tests.benchmark_sets import make_plain, run_here, spoil, write

STRENGTHS, SIZES = (0.25, 1.0), (64**2, 128**2)


@pytest.fixture(scope="module")
def plain(make_pairs, tmp_path_factory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("plain")
    return folder, make_plain(folder, make_pairs, 2)


@pytest.fixture(scope="module")
def spoiled(plain, tmp_path_factory):
    return spoil(plain[0], tmp_path_factory.mktemp("spoiled") / "out")


def test_results_are_the_sums_of_the_trials(plain, spoiled) -> None:
    folder, names = plain
    benchmark, published = spoiled
    assert [method.name for method in benchmark.methods] == ["desra, weight 1"]
    detectors = {"desra, weight 1": benchmark.methods[0].detector(None)}
    trials = read_trials(benchmark)
    assert [trial.image for trial in trials] == sorted(names)
    paths = [folder / role / f"{trials[0].image}.png" for role in ("mse_sr", "gan_sr")]
    pair = DetectorInputs(*(decode(path.read_bytes(), path).pixels for path in paths))
    expected = run_trial(trials[0].image, pair, detectors, min_area=400)
    # Times differ; all else is what one call says.
    assert replace(trials[0], seconds={}) == replace(expected, seconds={})
    sections = [section for section in sections_of(summarise(trials)) if "s per MP" not in str(section.table)]
    assert len(sections) == 5
    assert all(document_as_markdown("", [section]).removeprefix("# \n\n") in published.markdown for section in sections)
    assert published.judged == 2


def test_files_of_a_synthetic_benchmark(spoiled) -> None:
    benchmark, published = spoiled
    names = [path.name for path in published.files]
    assert names == ["synthetic.md", "synthetic.csv", "synthetic.json", "synthetic.html"]
    root = benchmark.workspace.root
    with (root / "synthetic.csv").open() as file:
        rows = list(csv.DictReader(file))
    document = json.loads((root / "synthetic.json").read_bytes())
    assert len(rows) == len(document["recall"])
    assert {row["method"] for row in rows} == {"desra, weight 1"}
    assert document["settings"]["seed"] == 0
    assert published.markdown == (root / "synthetic.md").read_text()
    page = (root / "synthetic.html").read_text()
    assert "Recall by kind: what desra does not see" in page
    assert page.count("<svg") == 1


def test_only_what_is_new_is_computed(plain, spoiled, tmp_path) -> None:
    folder, names = plain
    benchmark, _ = spoiled
    asked = benchmark.settings
    assert plan(asked).missing() == []
    for change in ({"seed": 1}, {"min_area": "500"}, {"labels": folder / "labels"}):
        assert len(plan(asked.model_copy(update=change)).missing()) == 2
    write(tmp_path / "people" / f"{names[1]}.png", np.full((190, 230), 255, np.uint8))
    excluded = plan(asked.model_copy(update={"exclude": tmp_path / "people"}))
    assert [work.name for _, work in excluded.missing()] == [names[1]]


def test_marks_of_a_human_mask_are_no_false_alarm(plain, tmp_path) -> None:
    folder, names = plain
    for role in ("mse_sr", "gan_sr"):
        copy = tmp_path / role / f"{names[0]}.png"
        copy.parent.mkdir(parents=True)
        shutil.copy(folder / role / f"{names[0]}.png", copy)
    write(tmp_path / "people" / f"{names[0]}.png", np.full((190, 230), 255, np.uint8))
    benchmark, published = spoil(tmp_path, tmp_path / "out", exclude=tmp_path / "people")
    assert {found.clean_pixels for found in read_trials(benchmark)} == {200 * 240 - 190 * 230}
    assert "Nothing could be injected" in published.text


def test_failures_are_reported_and_the_others_go_on(plain, tmp_path) -> None:
    folder, names = plain
    for name, size in zip(names, ((200, 240), (10, 10)), strict=True):
        write(tmp_path / "people" / f"{name}.png", np.zeros(size, np.uint8))
    benchmark, published = spoil(folder, tmp_path / "out", exclude=tmp_path / "people")
    assert published.judged == 1
    assert "is 10x10 but its image is 240x200" in str(published.failures[0])
    assert run_here(benchmark) == []
    assert "10x10" in (tmp_path / "out" / "synthetic.html").read_text()


def bits(rng: np.random.Generator, share: float) -> tuple[tuple[bool, ...], ...]:
    return tuple(tuple(bool(bit) for bit in row) for row in rng.random((3, 2)) < share)


def made(image: str, seed: int, *, methods: tuple[str, ...] = ("desra", "ssim"), clean_pixels: int = 10**6) -> Trial:
    """Make the trial of an image: three thresholds, of which the second is the default, and two areas."""
    rng = np.random.default_rng(seed)
    drawn = [
        Case(kind, strength, size, 0, 4 * number, seed, number)
        for number, kind in enumerate(KINDS)
        for strength in STRENGTHS
        for size in SIZES
        if rng.random() < 0.8
    ]
    responses = tuple(
        Response(case, 10.0, float(rng.uniform(1, 20)), method, bits(rng, 0.6), bits(rng, 0.2), float(rng.random()))
        for method in methods
        for case in drawn
    )
    counts = rng.integers(0, 900, (len(methods), 2, 3, 2)).tolist()
    return Trial(
        image=image,
        clean_pixels=clean_pixels,
        faint=2,
        thresholds=dict.fromkeys(methods, (0.1, 0.3, 0.9)),
        default=dict.fromkeys(methods, 0.3),
        min_areas=(400, 4000),
        min_area=4000,
        responses=responses,
        false_alarms=tuple(
            FalseAlarms(method, *(tuple(map(tuple, table)) for table in both))
            for method, both in zip(methods, counts, strict=True)
        ),
        seconds=dict.fromkeys(methods, float(rng.uniform(1, 9))),
        scored_pixels=8 * 10**6,
    )


@settings(deadline=None, max_examples=10)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=4, unique=True))
def test_summary(seeds: list[int]) -> None:
    """Each number is counted again by a loop over all responses."""
    trials = [made(f"{seed}", seed) for seed in seeds]
    summary = summarise(trials)
    assert summary.images == len(seeds)
    assert summary.clean_pixels == 10**6 * len(seeds)
    assert summary.faint == 2 * len(seeds)
    assert summary.injected == sum(len(one.responses) for one in trials) / 2
    for number, method in enumerate(summary.methods):
        rows = [row for one in trials for row in one.responses if row.method == method.method]
        for point in method.curve:
            at = (0.1, 0.3, 0.9).index(point.threshold), (400, 4000).index(point.min_area)
            counted = [row for row in rows if not row.already[at[0]][at[1]]]
            assert point.rate == (sum(row.found[at[0]][at[1]] for row in counted), len(counted))
            assert point.false_regions == sum(one.false_alarms[number].regions[at[0]][at[1]] for one in trials)
            assert point.false_pixels == sum(one.false_alarms[number].pixels[at[0]][at[1]] for one in trials)
            assert point.regions_per_megapixel == pytest.approx(point.false_regions / len(seeds))
            assert point.pixel_share == pytest.approx(point.false_pixels / len(seeds) / 1e6)
        assert len(method.curve) == 6
        assert (method.default.threshold, method.default.min_area) == (0.3, 4000)
        counted = [row for row in rows if not row.already[1][1]]
        assert method.marked_before == len(rows) - len(counted)
        fits = [row.iou for row in counted if row.found[1][1]]
        assert method.iou == (pytest.approx(np.mean(fits)) if fits else None)
        for kind in (None, *KINDS):
            for strength in (None, *STRENGTHS):
                for size in (None, *SIZES):
                    wanted = [
                        row.found[1][1]
                        for row in counted
                        if kind in (None, row.case.kind)
                        and strength in (None, row.case.strength)
                        and size in (None, row.case.size)
                    ]
                    assert method.recall(kind=kind, strength=strength, size=size) == (sum(wanted), len(wanted))
        for rate, low, high in zip(method.by_ratio, (0, *RATIO_BOUNDS), (*RATIO_BOUNDS, np.inf), strict=True):
            added = [
                row.found[1][1]
                for row in counted
                if row.case.kind not in ("colour_shift", "flattening") and low <= row.contrast / row.texture < high
            ]
            assert rate == (sum(added), len(added))
        assert method.seconds_per_megapixel == pytest.approx(np.median([one.seconds["ssim"] for one in trials]) / 8)


def test_best_has_the_highest_recall_for_the_price() -> None:
    method = summarise([made("a", 4)]).methods[0]
    for budget in (0.0, 0.0002, 0.0005, 1.0):
        allowed = [point for point in method.curve if point.pixel_share <= budget]
        best = method.best(budget)
        assert (best is None) == (not allowed)
        if best:
            assert best in allowed
            assert all(point.rate.share <= best.rate.share for point in allowed)
            ties = [point for point in allowed if point.rate.share == best.rate.share]
            assert best.false_pixels == min(point.false_pixels for point in ties)


def test_points_that_mark_more_for_the_same_recall_are_left_out() -> None:
    """All six points find a half; the last point marks least."""
    nowhere = ((False, False),) * 3
    cases = [Case("worms", 1.0, 4096, 0, 0, index, 0) for index in range(60)]
    responses = tuple(
        Response(case, 30.0, 10.0, "desra", ((index % 2 == 0,) * 2,) * 3, nowhere, 0.5)
        for index, case in enumerate(cases)
    )
    pixels = ((600, 500), (400, 300), (200, 100))
    alarms = FalseAlarms("desra", ((1, 1),) * 3, pixels)
    summary = summarise([replace(made("a", 1, methods=("desra",)), responses=responses, false_alarms=(alarms,))])
    assert {point.rate for point in summary.methods[0].curve} == {(30, 60)}
    assert summary.methods[0].best(1.0) == summary.methods[0].curve[-1]
    assert curves(summary) == {"desra": [(100 / 1e6, 0.5)]}


def test_curves_rise() -> None:
    summary = summarise([made("a", 1), made("b", 2)])
    for method, (name, curve) in zip(summary.methods, curves(summary).items(), strict=True):
        assert name == method.method
        points = {(point.pixel_share, point.rate.share) for point in method.curve}
        assert set(curve) <= points
        assert curve == sorted(curve)
        assert [recall for _, recall in curve] == sorted({recall for _, recall in curve})
        for price, recall in points:
            assert any(own_price <= price and own_recall >= recall for own_price, own_recall in curve)


def test_rates() -> None:
    assert Rate(0, 0).share is None
    assert Rate(0, 0).interval == (0, 1)
    assert Rate(8, 10).share == 0.8
    assert Rate(8, 10).interval == wilson_interval(8, 10)


def test_methods_may_lack_images() -> None:
    summary = summarise([made("a", 1), made("b", 2, methods=("desra",), clean_pixels=3 * 10**6)])
    desra, ssim = summary.methods
    assert desra.default.clean_pixels == 4 * 10**6
    assert ssim.default.clean_pixels == 10**6


def markdown(summary: SyntheticSummary) -> str:
    return document_as_markdown("Title", sections_of(summary))


def test_sections_as_text() -> None:
    rows = [{"method": "a", "recall": "10 % (7–13) of 3"}, {"method": "desra, weight 1", "recall": "–"}]
    sections = [Section(note="One."), Section("More", ["one", "two - three"], "Two.", rows)]
    aligned = "method           recall\na                10 % (7–13) of 3\ndesra, weight 1  –"
    assert document_as_text("Title", sections) == f"Title\n\nOne.\n\nMore\n\n- one\n- two - three\n\nTwo.\n\n{aligned}"
    table = "| method | recall |\n| --- | --- |\n| a | 10 % (7–13) of 3 |\n| desra, weight 1 | – |"
    assert (
        document_as_markdown("Title", sections)
        == f"# Title\n\nOne.\n\n## More\n\n- one\n- two - three\n\nTwo.\n\n{table}\n"
    )


def test_markdown() -> None:
    text = markdown(summarise([made("a", 1), made("b", 2)]))
    assert text.startswith("# Title\n\n41 artifacts in 2 pairs (2.0 MP that count as clean); 4 more were left out")
    assert "## Recall by kind: what desra does not see" in text
    assert "Strength 1 adds 40 grey levels" in text
    assert "Regions of at most 4,000 px are dropped" in text
    assert "## ssim: recall by kind, strength and size" in text
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 6
    for table in tables:
        assert len({line.count("|") for line in table}) == 1
    assert "nan" not in text
    assert "None" not in text


def test_what_d_does_not_see_is_said_of_desra_alone() -> None:
    texts = [markdown(summarise([made("a", 1, methods=(name,))])) for name in ("desra, weight 1", "ssim")]
    assert ["D compares local contrasts and nothing else" in text for text in texts] == [True, False]
    assert ["what desra does not see" in text for text in texts] == [True, False]
    assert "## Recall by kind\n" in texts[1]


def test_nothing_injected() -> None:
    empty = replace(made("a", 1), responses=())
    assert "Nothing could be injected" in markdown(summarise([empty]))
    assert "Nothing could be injected" in markdown(summarise([]))
    assert to_rows(summarise([]))["recall"] == []
    assert curves(summarise([])) == {}


def test_rows() -> None:
    summary = summarise([made("a", 1), made("b", 2)])
    tables = to_rows(summary)
    json.dumps(tables, allow_nan=False)
    for rows in tables.values():
        assert len({tuple(row) for row in rows}) == 1
        csv.DictWriter(io.StringIO(), list(rows[0])).writerows(rows)
    assert len(tables["curve"]) == 12
    assert len(tables["recall"]) == sum(len(method.cells) for method in summary.methods)
    first = tables["recall"][0]
    rate = summary.methods[0].cells[first["kind"], first["strength"], first["size"]]
    assert (first["found"], first["counted"]) == rate
    assert (first["low"], first["high"]) == rate.interval
