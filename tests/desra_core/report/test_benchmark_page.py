"""The pages of both benchmarks: what they show, and that they stand alone."""

from __future__ import annotations

import html
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from desra_core.benchmarking import AnyBenchmark, plan
from desra_core.benchmarking.annotated import read_records
from desra_core.benchmarking.annotated_results import annotated_tables, results_of
from desra_core.report.pages import publish_results, render_benchmark, worst_records
from tests.benchmark_sets import as_published, judge, make_plain, write
from tests.browser import Page
from tests.desra_core.report.pages import stands_alone

HOSTILE = "<b>x<b> | 'y'"


@pytest.fixture(scope="module")
def judged(make_pairs, tmp_path_factory) -> AnyBenchmark:
    """Two parts, one under a hostile name, with a mask that cannot be read."""
    root = tmp_path_factory.mktemp("page")
    names = make_plain(root / "plain", make_pairs, 6)
    as_published(root / "plain", root / "set", names)
    (root / "set" / "LDL").rename(root / "set" / HOSTILE)
    shutil.copytree(root / "set" / "SwinIR" / "GT-Mask", root / "set" / "SwinIR" / "DeSRA-Mask")
    write(root / "set" / "SwinIR" / "GT-Mask" / f"{sorted(names)[-1]}.png", np.zeros((9, 9), np.uint8))
    benchmark, _ = judge(root / "set", root / "out")
    return benchmark


def rendered(benchmark: AnyBenchmark) -> str:
    results, failures = results_of(benchmark), benchmark.failed()
    return render_benchmark(benchmark, results, annotated_tables(benchmark, results, failures), failures)


def text_of(page: str) -> str:
    return html.unescape(" ".join(re.sub(r"<[^>]*>", " ", page).split()))


def page_of(benchmark: AnyBenchmark) -> Path:
    return benchmark.workspace.root / "benchmark.html"


def test_the_page_shows_tables_failures_and_the_worst_images(judged) -> None:
    page = page_of(judged).read_text("utf-8")
    text = text_of(page)
    assert "3 detectors on 5 images." in text
    assert "1 image could not be judged" in text
    assert "desra, weight 1" in text
    assert 'aria-label="Sensitivity of the ranking"' in page
    assert "Agreement with the data set's DeSRA masks" in text
    assert "not measured here" in text
    assert "&lt;b&gt;x&lt;b&gt;" in page
    assert "<b>x" not in page
    assert "nan" not in text.lower()
    for kind in ("GAN-SR", "MSE-SR", "desra", "ldl, 0.001"):
        assert len(re.findall(rf'<figure data-kind="{kind}">', page)) == 3


def test_the_same_bytes_again_and_no_request(judged, monkeypatch) -> None:
    page = page_of(judged).read_text("utf-8")
    assert rendered(judged) == page
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", page)
    # Where nothing has changed the page is not even drawn.
    monkeypatch.setattr("desra_core.report.pages.render_page", None)
    publish_results(plan(judged.settings))


def test_the_worst_come_first(judged) -> None:
    records = read_records(judged)
    chosen = worst_records(judged, records)
    ious = [record.runs["desra"].agreements["desra"].iou for record in chosen]
    assert len(chosen) == 3
    assert ious == sorted(ious)
    assert worst_records(judged, records, 2) == chosen[:2]


def test_a_picture_that_has_gone(judged, tmp_path) -> None:
    worst = worst_records(judged, read_records(judged))[0]
    picture = Path(judged.settings.dataset) / worst.part / "GAN-SR" / f"{worst.name}_GAN-SR.png"
    away = shutil.move(picture, tmp_path)
    page = rendered(judged)
    shutil.move(away, picture)
    assert "there is no such file" in text_of(page)
    assert len(re.findall(r'<figure data-kind="MSE-SR">', page)) == 3


def test_in_a_browser(judged, browser: Page) -> None:
    browser.visit(page_of(judged).as_uri(), width=1400)
    stands_alone(browser)
