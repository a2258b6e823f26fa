"""D by class: the sample against whole arrays, and its bounds."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from desra_core.detection.class_weights import class_names
from desra_core.detection.detectors import applied
from desra_core.images.codec import encode_png
from desra_core.report import distribution as distribution_module
from desra_core.report import write_report
from desra_core.report.distribution import BINS, class_distributions, quantile
from desra_core.report.results import read_results, recorded_detector
from desra_core.settings import Detection
from desra_core.workspace import Workspace
from desra_core.workspace.arrays import read_array, write_array
from tests.desra_core.report.conftest import SIZE
from tests.desra_core.report.pages import words
from tests.in_process import process

RNG = np.random.default_rng(1)
LABELS = {f"photo{index:03d}": RNG.choice([2, 4, 9, 12], SIZE, p=[0.7, 0.2, 0.06, 0.04]).astype(np.uint8)
          for index in range(6)}  # fmt: skip


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory, make_pairs) -> Path:
    """A folder with a corpus and label files, and in ``ws`` its workspace with all maps."""
    folder = tmp_path_factory.mktemp("labelled")
    for name in make_pairs(folder, 6):
        path = folder / "labels" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_png(LABELS[name.partition("/")[2]]))
    process(detection(folder))
    return folder


def detection(folder: Path, **changes: object) -> Detection:
    given = {"workspace": folder / "ws", "segmenter": f"labels:{folder / 'labels'}", "keep": "maps"} | changes
    return Detection(mse_sr=folder / "mse_sr", gan_sr=folder / "gan_sr", **given)


@pytest.fixture
def copied(labelled: Path, tmp_path: Path) -> Workspace:
    return Workspace(Path(shutil.copytree(labelled / "ws", tmp_path / "ws")))


def whole(workspace: Workspace) -> dict[str, np.ndarray]:
    """The histograms of all stored maps by class name."""
    counts: dict[str, np.ndarray] = {}
    for row in pq.read_table(workspace.manifest).to_pylist():
        key = zarr.open_array(workspace.group(row["id"]) / "similarity", mode="r").attrs["key"]
        similarity = read_array(workspace, row["id"], "similarity", key=key).astype(np.float64)
        labels = LABELS[row["name"].partition("/")[2]][5:-5, 5:-5]
        for label in np.unique(labels):
            values = similarity[labels == label]
            found = [int(((values >= low / BINS) & (values < (low + 1) / BINS)).sum()) for low in range(BINS)]
            found[-1] += int((values == 1).sum())
            name = class_names()[label]
            counts[name] = counts.get(name, np.zeros(BINS, int)) + found
    return counts


def test_small_images_are_counted_whole(labelled: Path) -> None:
    results = read_results(Workspace(labelled / "ws"))
    found = class_distributions(results, recorded_detector(results.settings))
    assert found is not None
    expected = whole(Workspace(labelled / "ws"))
    assert {name: counts.tolist() for name, counts in found.histograms.items()} == {
        name: counts.tolist() for name, counts in expected.items()
    }
    assert (found.images, found.kept, found.classes) == (6, 6, 4)
    for name, mark in found.marks.items():
        bins = expected[name]
        below = np.interp(mark, found.edges, np.concatenate([[0], np.cumsum(bins)]))
        assert below / bins.sum() == pytest.approx(0.15)
    assert list(found.marks.values()) == sorted(found.marks.values())


def test_the_report_says_what_it_rests_on(labelled: Path, tmp_path: Path) -> None:
    text = words(write_report(Workspace(labelled / "ws"), output=tmp_path / "r.html").read_text())
    assert "D by class" in text
    assert "85 % of its pixels lie above the line" in text
    assert "Rests on a sample: 6 of the 6 images whose maps and labels are kept" in text
    assert "with --keep maps only" not in text
    page = (tmp_path / "r.html").read_text()
    assert 'aria-label="Artifact regions by class"' in page
    assert 'aria-label="Distribution of D by class"' in page
    assert words(page).count("0.") > 10


def test_the_sample_is_bounded(labelled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = read_results(Workspace(labelled / "ws"))
    monkeypatch.setattr(distribution_module, "IMAGES", 2)
    monkeypatch.setattr(distribution_module, "_TILE", 50)
    monkeypatch.setattr(distribution_module, "_TILES", 3)
    found = class_distributions(results, applied())
    assert found is not None
    assert (found.images, found.kept) == (2, 6)
    pixels = sum(int(counts.sum()) for counts in found.histograms.values())
    assert 0 < pixels <= 2 * 3 * 50 * 50
    again = class_distributions(results, applied())
    assert again is not None
    assert again.marks == found.marks


def test_what_cannot_be_read_is_passed_over_and_not_mended(copied: Workspace, labelled: Path) -> None:
    rows = pq.read_table(copied.manifest).to_pylist()
    damaged, lost = (copied.group(row["id"]) for row in rows[:2])
    shutil.rmtree(damaged / "similarity" / "c")
    shutil.rmtree(lost)
    before = {str(path) for path in copied.root.rglob("*")}
    found = class_distributions(read_results(copied), applied())
    assert found is not None
    assert found.images == 4
    assert {str(path) for path in copied.root.rglob("*")} == before


def test_stored_labels_count_as_label_files_do(copied: Workspace, labelled: Path) -> None:
    """As a segmentation model leaves them."""
    results = read_results(copied)
    from_files = class_distributions(results, applied())
    table = pq.read_table(copied.manifest)
    metadata = {key: value for key, value in table.schema.metadata.items() if key != b"labels"}
    for row in table.to_pylist():
        write_array(copied, row["id"], "labels", LABELS[row["name"].partition("/")[2]], key="key")
    for column in [name for name in table.column_names if name.startswith("labels_")]:
        kind = table.schema.field(column).type
        table = table.set_column(table.schema.get_field_index(column), column, pa.nulls(6, kind))
    pq.write_table(table.replace_schema_metadata(metadata), copied.manifest)
    for path in copied.records.iterdir():
        records = pq.read_table(path)
        kept = pa.array([True] * records.num_rows)
        pq.write_table(records.set_column(records.schema.get_field_index("labels_kept"), "labels_kept", kept), path)
    stored = class_distributions(read_results(copied), applied())
    assert from_files is not None
    assert stored is not None
    assert {name: counts.tolist() for name, counts in stored.histograms.items()} == {
        name: counts.tolist() for name, counts in from_files.histograms.items()
    }


def test_without_labels_there_are_no_classes(workspace: Workspace) -> None:
    assert class_distributions(read_results(workspace), applied()) is None


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8).filter(any), st.floats(0.01, 0.99))
@settings(max_examples=60, deadline=None)
def test_a_quantile_has_its_share_below(counts: list[int], share: float) -> None:
    edges = np.linspace(0, 2, len(counts) + 1)
    value = quantile(np.array(counts), edges, share)
    below = np.interp(value, edges, np.concatenate([[0], np.cumsum(counts)])) / sum(counts)
    assert below == pytest.approx(share)
