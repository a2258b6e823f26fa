"""The synthetic benchmark as a run: its trials, its files, and the images that a second run computes again."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from desra_core.benchmarking.synthetic import read_trials, summarise
from desra_core.benchmarking.synthetic_tables import sections_of
from desra_core.benchmarking.trial import Design, run_trial
from desra_core.detection.detectors import DetectorInputs
from desra_core.evaluation.table import document_as_markdown
from desra_core.images.codec import decode
from desra_core.report.benchmark_page import plan
from tests.benchmark_sets import make_plain, run_here, spoil, write


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
    expected = []
    for name in sorted(names):
        paths = [folder / role / f"{name}.png" for role in ("mse_sr", "gan_sr")]
        pair = DetectorInputs(*(decode(path.read_bytes(), path).pixels for path in paths))
        expected.append(run_trial(name, pair, detectors, Design(min_area=400)))
    # Times differ; all else is what one call says.
    sections = [section for section in sections_of(summarise(expected)) if "s per MP" not in str(section.table)]
    assert len(sections) == 6
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
    assert "Artifacts that desra, weight 1 does not see" in page
    assert page.count("<svg") == 2


def test_only_what_is_new_is_computed(plain, spoiled, tmp_path) -> None:
    folder, names = plain
    benchmark, _ = spoiled
    settings = benchmark.settings
    assert plan(settings).missing() == []
    for change in ({"seed": 1}, {"min_area": "500"}, {"labels": folder / "labels"}):
        assert len(plan(settings.model_copy(update=change)).missing()) == 2
    write(tmp_path / "people" / f"{names[1]}.png", np.full((190, 230), 255, np.uint8))
    excluded = plan(settings.model_copy(update={"exclude": tmp_path / "people"}))
    assert [work.name for _, work in excluded.missing()] == [names[1]]


def test_marks_of_a_human_mask_are_no_false_alarm(plain, tmp_path) -> None:
    folder, names = plain
    for name in names:
        write(tmp_path / "people" / f"{name}.png", np.full((190, 230), 255, np.uint8))
    benchmark, published = spoil(folder, tmp_path / "out", exclude=tmp_path / "people")
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
