"""Which regions are shown, and that the page keeps its size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from desra_core.planning.tables import REGIONS
from desra_core.report import page as page_module
from desra_core.report import write_report
from desra_core.report.gallery import choose, make_gallery
from desra_core.report.results import read_results
from desra_core.workspace import Workspace
from tests.desra_core.report.conftest import SIZE, write


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


def test_ties_do_not_depend_on_the_order_of_the_table() -> None:
    rows = [(f"image{index:02d}", str(index), 1.0) for index in range(40)]
    assert chosen(regions(*rows), 5) == chosen(regions(*rows[::-1]), 5)


def test_what_does_not_fit_is_left_out(corpus: Path) -> None:
    results = read_results(Workspace(corpus / "ws"))
    whole = make_gallery(results, 24, 10**9)
    sizes = [sum(len(cell.uri or "") for cell in row.cells) for row in whole.rows]
    part = make_gallery(results, 24, sum(sizes[:3]))
    assert whole.left_out == 0
    assert part.rows == whole.rows[:3]
    assert part.left_out == len(sizes) - 3
    assert make_gallery(results, 24, 0).rows == []


def test_a_page_about_noise_stays_below_its_size(workspace: Workspace, tmp_path: Path, monkeypatch) -> None:
    """Regions that fill large images of noise, the worst there is for a picture format, and far too many of them."""
    results = read_results(workspace)
    noise = np.random.default_rng(0).integers(0, 256, (420, 420, 3), dtype=np.uint8)
    for kind in ("lr", "mse_sr", "gan_sr", "pseudo_gt"):
        write(workspace.dataset(kind, "noise"), noise)
    write(workspace.mask("noise"), np.full((420, 420), 255, np.uint8))
    row = {"image": "noise", "x": 0, "y": 0, "width": 420, "height": 420, "area": 176_400, "mean_similarity": 0.1}
    count = 60
    table = pa.Table.from_pylist([row | {"id": f"{index}", "severity": 1.0} for index in range(count)], REGIONS)
    record = {"name": "noise", "height": 420, "width": 420, "mask_key": "k", "artifact_pixels": 176_400}
    images = pa.Table.from_pylist([record | {"id": f"{index}"} for index in range(count)], results.images.schema)
    large = replace(results, document={"verb": "mine", "settings": {}}, regions=table, images=images)
    monkeypatch.setattr(page_module, "read_results", lambda _: large)
    path = write_report(workspace, worst=count, output=tmp_path / "large.html")
    assert 15_000_000 < path.stat().st_size < 20_000_000
    assert "more were asked for and are left out, to keep this page below 20 MB" in path.read_text()


def test_a_record_that_has_gone_costs_the_pictures_only(workspace: Workspace) -> None:
    table = pq.read_table(workspace.regions)
    results = read_results(workspace)
    unknown = results.images.set_column(2, "height", pa.nulls(results.images.num_rows, pa.int32()))
    gallery = make_gallery(replace(results, images=unknown), 24, 10**9)
    assert table.num_rows > 0
    assert {cell.reason for row in gallery.rows for cell in row.cells} == {"The image has failed since."}


def test_the_crops_have_the_size_of_the_image_where_it_is_small(corpus: Path) -> None:
    gallery = make_gallery(read_results(Workspace(corpus / "ws")), 24, 10**9)
    assert {(cell.height, cell.width) for row in gallery.rows for cell in row.cells if cell.uri} == {(192, 192)}
    assert min(SIZE) > 192
