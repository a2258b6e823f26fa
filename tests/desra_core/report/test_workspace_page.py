"""The page as text: its sentences, and names and files that must not change anything else."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from desra_core.errors import UsageError
from desra_core.planning.plan import REGIONS
from desra_core.report import workspace_page as page_module
from desra_core.report import write_report
from desra_core.report.document import csp_hash
from desra_core.report.results import read_results
from desra_core.report.workspace_page import choose, make_gallery
from desra_core.settings import Mining
from desra_core.workspace import Workspace
from desra_core.workspace.matching import FAILURES
from desra_core.workspace.products import SCHEMA
from tests.desra_core.report.conftest import HOSTILE, SIZE, detect, write
from tests.desra_core.report.pages import EVENTS, Elements, words


def test_the_page_names_no_address(page: str) -> None:
    assert "http:" not in page
    assert "https:" not in page
    elements = Elements(page)
    references = {
        value for _, attributes in elements.tags for name, value in attributes.items() if name in ("src", "href")
    }
    assert all(value.startswith(("data:", "#")) for value in references)
    assert not re.search(r"url\((?!#)|@import", page)
    assert [tag for tag, _ in elements.tags if tag in ("iframe", "object", "embed", "base", "form")] == []


def test_names_are_text_and_nothing_else(page: str) -> None:
    elements = Elements(page)
    assert [tag for tag, _ in elements.tags].count("script") == 1
    assert not [name for _, attributes in elements.tags for name in attributes if EVENTS.match(name)]
    for name in HOSTILE[:4]:
        assert name in elements.text
    assert "two\\nlines \\u202egnp" in elements.text  # what cannot be seen is made visible
    assert "\u202e" not in page
    assert "broken <b>" in elements.text
    alternatives = {attributes.get("alt") for tag, attributes in elements.tags if tag == "img"}
    assert f"GAN-SR of {HOSTILE[1]}" in alternatives


def test_the_policy_allows_this_script_only(page: str) -> None:
    policy = next(attributes["content"] for tag, attributes in Elements(page).tags if tag == "meta" and
                  attributes.get("http-equiv") == "Content-Security-Policy")  # fmt: skip
    script = re.search("<script>(.*?)</script>", page, re.DOTALL)
    assert script is not None
    assert "default-src 'none'" in policy
    assert f"script-src '{csp_hash(script[1])}'" in policy


def test_the_page_has_numbers_failures_and_settings(page: str) -> None:
    text = words(page)
    assert "10 of 18 images have artifacts: 10 regions that cover" in text
    assert "55.6 % of images done have artifacts" in text
    assert "21 images" in text
    assert "3 failed" in text
    assert "3 of 21 images could not be processed" in text
    for failure in ("broken <b>", "other size", "no twin"):
        assert failure in text
    assert "both results of one photo must have the same size" in text
    assert "weight 1 for every class" in text
    assert "run with --segmenter mmseg:CONFIG,CHECKPOINT" in text
    assert "threshold 0.7 Suspect where" in text
    assert "Suspect where the adjusted similarity is below this." in text
    assert "LR photo: none of this name" in text


def test_the_page_says_what_its_masks_rest_on(mined: Workspace) -> None:
    document = json.loads(mined.settings.read_bytes())
    assert "masks rest on" not in write_report(mined).read_text()
    del document["reference"]  # as earlier versions wrote it
    for reference in ({}, {"reference": "a <b>network</b>"}):
        mined.settings.write_text(json.dumps(document | reference))
        text = write_report(mined).read_text()
        assert ("<dt>masks rest on</dt><dd>a &lt;b&gt;network&lt;/b&gt;</dd>" in text) == bool(reference)


def test_pictures_are_those_of_the_region(page: str) -> None:
    rows = page.split('<article class="region">')[1:]
    assert len(rows) == 8  # two of the ten are copies
    for row in rows:
        kinds = re.findall(r'data-kind="(\w+)"', row)
        assert kinds == ["lr", "mse_sr", "gan_sr", "difference", "mask", "pseudo_gt"]
        sizes = set(re.findall(r'<img [^>]*width="(\d+)" height="(\d+)"', row))
        assert len(sizes) == 1


def test_the_same_results_give_the_same_bytes(workspace: Workspace, drawn_anew: None) -> None:
    before = write_report(workspace)
    content, made = before.read_bytes(), before.stat().st_mtime_ns
    assert write_report(workspace) == before == workspace.root / "report.html"
    assert before.read_bytes() == content
    assert before.stat().st_mtime_ns == made


def test_nothing_else_is_touched(workspace: Workspace) -> None:
    def content() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in workspace.root.rglob("*") if path.is_file()}

    array = next(workspace.maps.rglob("similarity"))
    shutil.rmtree(array / "c")
    before = content()
    report = write_report(workspace, output=workspace.root.parent / "new" / "page.htm")
    assert content() == before
    assert report.is_file()
    assert [path.name for path in report.parent.iterdir()] == ["page.htm"]


def test_files_that_are_gone_cost_a_cell(corpus, workspace: Workspace) -> None:
    shutil.rmtree(workspace.maps)
    workspace.mask(HOSTILE[0]).write_bytes(b"damaged")
    workspace.mask(HOSTILE[1]).unlink()
    write(workspace.mask(HOSTILE[2]), np.zeros((10, 10), np.uint8))
    text = words(write_report(workspace).read_text())
    for reason in ("D: is not kept", "is not an image", "there is no such file", "is 10x10 now, and was 240x200"):
        assert reason in text


def test_a_mined_workspace_shows_its_dataset(mined: Workspace) -> None:
    page = write_report(mined).read_text()
    assert "The latest run was desra mine" in words(page)
    assert "Checkpoint of the GAN-trained model" in words(page)
    shutil.rmtree(mined.root / "dataset" / "pseudo_gt")
    without = words(write_report(mined).read_text())
    regions, missing_lr = page.count('<article class="region">'), 1
    assert without.count("there is no such file") == regions + missing_lr


def test_no_artifacts_and_no_lr(tmp_path, make_pairs) -> None:
    make_pairs(tmp_path, 4)
    shutil.rmtree(tmp_path / "gan_sr")
    shutil.copytree(tmp_path / "mse_sr", tmp_path / "gan_sr")
    page = write_report(detect(tmp_path, "mse_sr", "gan_sr")).read_text()
    assert "No artifact was found in 4 images." in words(page)
    assert "There is no artifact region." in words(page)
    assert "<article" not in page
    assert page.count("<svg") == 1  # computing times


def test_without_lr_there_is_no_lr_column(workspace: Workspace) -> None:
    manifest = pq.read_table(workspace.manifest)
    metadata = {key: value for key, value in manifest.schema.metadata.items() if key != b"lr"}
    lacking = manifest.set_column(
        manifest.schema.get_field_index("lr_path"), "lr_path", pa.nulls(manifest.num_rows, pa.string())
    )
    pq.write_table(lacking.replace_schema_metadata(metadata), workspace.manifest)
    page = write_report(workspace).read_text()
    assert 'data-kind="lr"' not in page
    assert 'data-kind="gan_sr"' in page


def test_a_run_that_was_cut_off(workspace: Workspace) -> None:
    workspace.regions.unlink()
    for path in workspace.records.iterdir():
        table = pq.read_table(path, schema=SCHEMA)
        pq.write_table(table.slice(0, table.num_rows - 2), path)
    text = words(write_report(workspace).read_text())
    assert re.search(r"[1-9]\d* images are still to be done", text)
    assert "The region table is missing" in text


def test_a_changed_setting(workspace: Workspace) -> None:
    document = json.loads(workspace.settings.read_bytes())
    document["target"]["mask_key"] = "another"
    document["settings"] |= {"exclude": ["1", "<b>"], "limit": None}
    del document["versions"]
    workspace.settings.write_text(json.dumps(document))
    text = words(write_report(workspace).read_text())
    assert "that earlier settings found" in text
    assert "exclude 1, <b>" in text
    assert "limit all" in text
    workspace.settings.unlink()
    with pytest.raises(UsageError, match="no workspace with a run in it"):
        write_report(workspace)


def test_many_and_long_failures(workspace: Workspace) -> None:
    rows = [
        {"name": f"{index:05d}" + '"<&' * 1000, "stage": "scan", "subject": "&" * 4000, "reason": "<" * 4000,
         "remedy": "'" * 4000} for index in range(400)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows, FAILURES), workspace.scan_failures)
    path = write_report(workspace, worst=0)
    assert path.stat().st_size < 2_500_000
    text = words(path.read_text())
    assert "And 202 more that are not in this page" in text
    assert "desra status --workspace" in text
    assert "This report was asked for none." in text


@pytest.mark.parametrize("name", ["report", "report.html.parquet", "masks"])
def test_only_html_files_are_written(workspace: Workspace, name: str) -> None:
    with pytest.raises(UsageError, match="no HTML file"):
        write_report(workspace, output=workspace.root / name)


def test_a_folder_that_is_no_workspace(tmp_path) -> None:
    with pytest.raises(UsageError, match="no workspace"):
        write_report(Workspace(tmp_path))
    assert list(tmp_path.iterdir()) == []


def regions(*rows: tuple[str, str, float]) -> pa.Table:
    """Regions of image, id and severity, side by side."""
    return pa.Table.from_pylist(
        [
            {"image": image, "id": key, "severity": severity, "x": 10 * index, "y": 0, "width": 9, "height": 9}
            for index, (image, key, severity) in enumerate(rows)
        ],
        REGIONS,
    )


def chosen(table: pa.Table, worst: int) -> list[tuple[str, float]]:
    return [(region["image"], region["severity"]) for region in choose(table, worst)]


def test_the_worst_come_first_few_of_an_image() -> None:
    one = [("a", "a", float(severity)) for severity in range(1000)]
    table = regions(*one, ("b", "b", -5.0), ("c", "c", 500.5))
    assert chosen(table, 24) == [("a", 999), ("a", 998), ("a", 997), ("c", 500.5)], "and none below zero"
    assert chosen(table, 2) == [("a", 999), ("a", 998)]
    assert chosen(table, 0) == []
    assert chosen(regions(), 24) == []


def test_copies_count_as_one_image() -> None:
    rows = [(name, "same", severity) for name in ("b", "a") for severity in (3.0, 2.0)]
    table = regions(*rows)
    columns = [pa.array([0, 10, 0, 10], pa.int32()) if name == "x" else table[name] for name in REGIONS.names]
    assert chosen(pa.table(columns, schema=REGIONS), 24) == [("a", 3), ("a", 2)]


def test_regions_with_one_corner_are_not_copies() -> None:
    table = regions(("a", "a", 3.0), ("a", "a", 2.0))
    changed = {"x": pa.array([0, 0], pa.int32()), "width": pa.array([5, 9], pa.int32())}
    columns = [changed.get(name, table[name]) for name in REGIONS.names]
    assert chosen(pa.table(columns, schema=REGIONS), 24) == [("a", 3), ("a", 2)]


def test_ties_do_not_depend_on_the_order_of_the_table() -> None:
    rows = [(f"image{index:02d}", str(index), 1.0) for index in range(40)]
    assert chosen(regions(*rows), 5) == chosen(regions(*rows[::-1]), 5)


def test_regions_that_do_not_fit_are_left_out(corpus: Path) -> None:
    results = read_results(Workspace(corpus / "ws"))
    whole, left_out = make_gallery(results, 24, 10**9)
    assert left_out == 0
    sizes = [sum(len(cell.uri or "") for cell in cells) for _, cells in whole]
    assert make_gallery(results, 24, sum(sizes[:3])) == (whole[:3], len(sizes) - 3)
    assert make_gallery(results, 24, 0) == ([], len(sizes))


def test_a_page_about_noise_stays_below_its_size(workspace: Workspace, tmp_path: Path, monkeypatch) -> None:
    """Regions that fill large images of noise, the worst there is for a picture format, and far too many of them."""
    results = read_results(workspace)
    noise = np.random.default_rng(0).integers(0, 256, (420, 420, 3), dtype=np.uint8)
    for kind in ("lr", "mse_sr", "gan_sr", "pseudo_gt"):
        write(workspace.dataset(kind, "noise"), noise)
    write(workspace.mask("noise"), np.full((420, 420), 255, np.uint8))
    row = {"image": "noise", "x": 0, "y": 0, "width": 420, "height": 420, "area": 176_400, "mean_similarity": 0.1}
    count = 6
    table = pa.Table.from_pylist([row | {"id": f"{index}", "severity": 1.0} for index in range(count)], REGIONS)
    record = {"name": "noise", "height": 420, "width": 420, "mask_key": "k", "artifact_pixels": 176_400}
    images = pa.Table.from_pylist([record | {"id": f"{index}"} for index in range(count)], results.images.schema)
    mining = Mining(photos="/p", workspace="/w", mse_model="/m", gan_model="/g")
    large = replace(results, settings=mining, regions=table, images=images)
    monkeypatch.setattr(page_module, "read_results", lambda _: large)
    assert page_module.PICTURE_CHARACTERS <= 17_000_000
    monkeypatch.setattr(page_module, "PICTURE_CHARACTERS", 1_700_000)  # a tenth of the page, to be quick
    path = write_report(workspace, worst=count, output=tmp_path / "large.html")
    assert 1_250_000 < path.stat().st_size < 2_000_000
    assert "more were asked for and are left out, to keep this page below 20 MB" in path.read_text()


def test_a_record_that_has_gone_costs_the_pictures_only(workspace: Workspace) -> None:
    table = pq.read_table(workspace.regions)
    results = read_results(workspace)
    unknown = results.images.set_column(2, "height", pa.nulls(results.images.num_rows, pa.int32()))
    gallery, _ = make_gallery(replace(results, images=unknown), 24, 10**9)
    assert table.num_rows > 0
    assert {cell.reason for _, cells in gallery for cell in cells} == {"The image has failed since."}


def test_the_crops_have_the_size_of_the_image_where_it_is_small(corpus: Path) -> None:
    gallery, _ = make_gallery(read_results(Workspace(corpus / "ws")), 24, 10**9)
    assert {(cell.height, cell.width) for _, cells in gallery for cell in cells if cell.uri} == {(192, 192)}
    assert min(SIZE) > 192
