"""COCO files as pycocotools reads them."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from pycocotools.coco import COCO
from scipy import ndimage

from desra_core.annotations.export import export_workspace
from desra_core.evaluation.coco_masks import decode_coco_mask, read_coco
from desra_core.workspace import Workspace
from tests.desra_core.annotations.drawn_masks import MASKS

NAMES = ["set 1/a.v2", "set 1/ünï/b", "c", "d.png.x", "e", "f", "g", "h", "i"]


@pytest.fixture
def workspace(make_workspace) -> Workspace:
    scaled = (np.kron(mask, np.ones((9, 8), bool)) for mask in MASKS.values())
    return make_workspace(dict(zip(NAMES, scaled, strict=True)))


def opened(path: Path) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(path))


def mask_of(workspace: Workspace, name: str) -> np.ndarray:
    import cv2

    return cv2.imdecode(np.frombuffer(workspace.mask(name).read_bytes(), np.uint8), cv2.IMREAD_UNCHANGED) > 0


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of pycocotools' decode
def test_masks_are_equal_pixel_for_pixel(workspace: Workspace, tmp_path: Path) -> None:
    export_workspace(workspace, tmp_path / "out", "coco", everything=True)
    coco = opened(tmp_path / "out/annotations.json")
    assert [image["file_name"] for image in coco.dataset["images"]] == [f"{name}.png" for name in sorted(NAMES)]
    assert [category["name"] for category in coco.dataset["categories"]] == ["artifact"]
    table = pq.read_table(workspace.regions).to_pylist()
    for image in coco.dataset["images"]:
        name = image["file_name"].removesuffix(".png")
        mask = mask_of(workspace, name)
        assert (image["height"], image["width"]) == mask.shape
        regions, count = ndimage.label(mask, np.ones((3, 3)))
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=image["id"], iscrowd=False))
        rows = [row for row in table if row["image"] == name]
        assert len(annotations) == len(rows) == count
        for number, (annotation, row) in enumerate(zip(annotations, rows, strict=True), 1):
            assert np.array_equal(coco.annToMask(annotation) > 0, regions == number)
            assert annotation["bbox"] == [row[field] for field in ("x", "y", "width", "height")]
            assert (annotation["area"], annotation["score"]) == (row["area"], row["severity"])
            assert annotation["attributes"] == {
                "mask_by": "detector", "class": row["class_name"], "severity": row["severity"],
                "mean_similarity": row["mean_similarity"],
            }  # fmt: skip


def test_regions_serve_as_results_too(workspace: Workspace, tmp_path: Path) -> None:
    """pycocotools takes annotations with scores as detections."""
    export_workspace(workspace, tmp_path / "out", "coco")
    coco = opened(tmp_path / "out/annotations.json")
    with contextlib.redirect_stdout(io.StringIO()):
        results = coco.loadRes(coco.dataset["annotations"])
    assert len(results.anns) == pq.read_table(workspace.regions).num_rows


def test_without_labels_there_is_no_class(make_workspace, tmp_path: Path) -> None:
    workspace = make_workspace({"a": MASKS["two"]}, labelled=False)
    export_workspace(workspace, tmp_path / "out", "coco")
    document = json.loads((tmp_path / "out/annotations.json").read_bytes())
    assert all("class" not in annotation["attributes"] for annotation in document["annotations"])


def test_pictures_may_stay_where_they_are(workspace: Workspace, tmp_path: Path) -> None:
    exported = export_workspace(workspace, tmp_path / "out", "coco", pictures=False)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"annotations.json", ".desra-export.json"}
    for image in opened(tmp_path / "out/annotations.json").dataset["images"]:
        assert (exported.pictures / image["file_name"]).is_file()


def coco_file(folder: Path, *annotations: dict, categories: tuple[str, ...] = ("artifact",)) -> Path:
    path = folder / "coco.json"
    rows = [{"id": number, "image_id": 7, "category_id": 1} | row for number, row in enumerate(annotations)]
    images = [{"id": 7, "file_name": "a.png", "width": 30, "height": 20}]
    named = [{"id": number, "name": name} for number, name in enumerate(categories, 1)]
    path.write_text(json.dumps({"images": images, "annotations": rows, "categories": named}))
    return path


def test_rectangles_and_categories(tmp_path: Path) -> None:
    """CVAT writes a rectangle as a box with an empty outline."""
    box = {"segmentation": [], "bbox": [4, 3, 6, 5]}
    expected = np.zeros((20, 30), bool)
    expected[3:8, 4:10] = True
    assert np.array_equal(decode_coco_mask(read_coco(coco_file(tmp_path, box))["a.png"]), expected)
    path = coco_file(tmp_path, box | {"category_id": 2}, categories=("artifact", "blur"))
    assert not decode_coco_mask(read_coco(path)["a.png"]).any()
    assert np.array_equal(decode_coco_mask(read_coco(path, category="blur")["a.png"]), expected)
