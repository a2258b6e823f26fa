"""Corrected masks: every pixel comes back, and files that do not fit are errors before anything changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from desra_core.annotations.corrections import Correction, publish_corrections, read_corrections, undo_import
from desra_core.annotations.export import export_workspace
from desra_core.errors import DesraError, UsageError
from desra_core.images.codec import encode_mask, encode_png
from desra_core.planning.plan import load_settings, prepare
from desra_core.workspace import Workspace, read_table
from desra_core.workspace.human_masks import HUMAN_MASKS, read_human_masks
from desra_core.workspace.manifest import read_manifest
from desra_core.workspace.products import Record, gather_shard, read_shard
from tests.desra_core.annotations.drawn_masks import MASKS, drawing

NAMES = ["set 1/a.v2", "set 1/ünï/b", "c", "d.png.x", "e.json/e.json", "$f'", "images/g", "h\\i", "i"]
EXPORTS = {"labelme": "", "coco": "annotations.json"}
MARKED = np.kron(drawing("#..", ".#.", "..."), np.ones((8, 10), bool))
CLEAN = np.zeros_like(MARKED)


def all_masks(folder: Path) -> dict[str, np.ndarray]:
    return {
        path.relative_to(folder).as_posix().removesuffix(".png"): cv2.imdecode(
            np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_UNCHANGED
        )
        for path in folder.rglob("*.png")
    }


def equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def bring_back(
    workspace: Workspace, form: str, path: Path, label: str | None = None, *, unchanged: bool = True
) -> list[Correction]:
    with workspace.locked():
        corrections, errors = read_corrections(workspace, form, path, label, unchanged=unchanged)
        assert not errors, errors[0]
        corrections = [one for one in corrections if unchanged or not one.as_exported]
        publish_corrections(workspace, corrections)
    return corrections


@pytest.mark.parametrize("form", EXPORTS)
def test_a_round_trip_loses_nothing(make_workspace, tmp_path: Path, form: str) -> None:
    scaled = (np.kron(mask, np.ones((9, 8), bool)) for mask in MASKS.values())
    workspace = make_workspace(dict(zip(NAMES, scaled, strict=True)))
    export_workspace(workspace, tmp_path / "out", form, everything=True)
    corrections = bring_back(workspace, form, tmp_path / "out" / EXPORTS[form])
    assert equal(all_masks(workspace.human), all_masks(workspace.masks))
    assert not any(correction.changed for correction in corrections)
    # Once more, from the human masks.
    export_workspace(workspace, tmp_path / "again", form)
    shutil.rmtree(workspace.human)
    bring_back(workspace, form, tmp_path / "again" / EXPORTS[form])
    assert equal(all_masks(workspace.human), all_masks(workspace.masks))


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=4, deadline=None)
def test_any_masks_come_back(make_workspace_once: Callable[..., Workspace], seed: int) -> None:
    rng = np.random.default_rng(seed)
    masks = {}
    for index in range(6):
        noise = cv2.GaussianBlur(rng.random((90, 70 + index)).astype(np.float32), (0, 0), rng.uniform(0.1, 6))
        masks[f"m{index}"] = noise > np.quantile(noise, rng.uniform(0.3, 0.99))
    workspace = make_workspace_once(masks, str(seed))
    for form, file in EXPORTS.items():
        out = workspace.root.parent / form
        export_workspace(workspace, out, form, everything=True)
        shutil.rmtree(workspace.human, ignore_errors=True)
        bring_back(workspace, form, out / file)
        assert equal(all_masks(workspace.human), all_masks(workspace.masks))


@pytest.fixture
def workspace(make_workspace) -> Workspace:
    return make_workspace({"a/marked": MARKED, "clean": CLEAN}, copies={"twin": "a/marked"})


@pytest.fixture
def labelme(workspace: Workspace, tmp_path: Path) -> Path:
    export_workspace(workspace, tmp_path / "labelme", "labelme", everything=True)
    return tmp_path / "labelme"


@pytest.fixture
def coco(workspace: Workspace, tmp_path: Path) -> Path:
    export_workspace(workspace, tmp_path / "coco", "coco", everything=True)
    return tmp_path / "coco/annotations.json"


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changes))


def files(folder: Path) -> dict[Path, tuple[bytes, int]]:
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def problems(
    workspace: Workspace, form: str, path: Path, label: str | None = None, *, unchanged: bool = True
) -> list[DesraError]:
    before = files(workspace.root)
    _, errors = read_corrections(workspace, form, path, label, unchanged=unchanged)
    assert files(workspace.root) == before
    assert all("\n" not in str(error) for error in errors)
    return errors


def test_pictures_without_shapes_have_empty_masks(workspace: Workspace, labelme: Path, coco: Path) -> None:
    edit(labelme / "a/marked.json", shapes=[])
    (labelme / "clean.json").unlink()
    (correction,) = bring_back(workspace, "labelme", labelme)
    assert (correction.changed, correction.pixels, correction.regions) == (True, 0, 0)
    assert equal(all_masks(workspace.human), {"a/marked": 0 * MARKED, "twin": 0 * MARKED})
    shutil.rmtree(workspace.human)
    edit(coco, annotations=[])
    bring_back(workspace, "coco", coco)
    assert equal(all_masks(workspace.human), {"a/marked": 0 * MARKED, "twin": 0 * MARKED, "clean": 0 * CLEAN})


def test_masks_that_are_not_among_the_files_stay(workspace: Workspace, labelme: Path, coco: Path) -> None:
    bring_back(workspace, "labelme", labelme)
    before = files(workspace.human)
    document = json.loads(coco.read_bytes())
    edit(coco, images=[row for row in document["images"] if row["file_name"] == "clean.png"], annotations=[])
    bring_back(workspace, "coco", coco)
    after = files(workspace.human)
    assert after.keys() == before.keys()
    assert {path for path in after if path.suffix == ".png" and after[path] != before[path]} == set()
    document = json.loads((labelme / "clean.json").read_bytes())
    rectangle = {"label": "x", "points": [[1, 1], [3, 2]], "shape_type": "rectangle"}
    edit(labelme / "clean.json", shapes=[*document["shapes"], rectangle])
    (labelme / "a/marked.json").unlink()
    (correction,) = bring_back(workspace, "labelme", labelme)
    assert (correction.pixels, correction.regions) == (6, 1)
    rows = {row["name"]: row for row in read_table(workspace.human_manifest, HUMAN_MASKS).to_pylist()}
    assert {name: row["pixels"] for name, row in rows.items()} == {"a/marked": 160, "twin": 160, "clean": 6}
    assert rows["a/marked"]["regions"] == 1


def test_all_names_of_an_image_get_its_mask(workspace: Workspace, labelme: Path) -> None:
    bring_back(workspace, "labelme", labelme)
    assert workspace.human_mask("twin").read_bytes() == workspace.human_mask("a/marked").read_bytes()
    masks = read_human_masks(workspace, None)
    assert len(masks) == 2
    assert all(np.array_equal(mask.read(), MARKED if mask.pixels else CLEAN) for mask in masks.values())


def test_one_file_or_one_folder_of_an_export(workspace: Workspace, labelme: Path) -> None:
    assert [c.name for c in bring_back(workspace, "labelme", labelme / "a")] == ["a/marked"]
    assert [c.name for c in bring_back(workspace, "labelme", labelme / "a/marked.json")] == ["a/marked"]


def test_files_from_elsewhere_need_no_export(workspace: Workspace, labelme: Path, coco: Path) -> None:
    (labelme / ".desra-export.json").unlink()
    assert len(bring_back(workspace, "labelme", labelme)) == 2
    document = json.loads(coco.read_bytes())
    images = [row | {"file_name": f"data/images/{row['file_name']}"} for row in document["images"]]
    edit(coco, images=images)
    (coco.parent / ".desra-export.json").unlink()
    assert len(bring_back(workspace, "coco", coco)) == 2


def test_polygons_and_uncompressed_encodings_of_coco(workspace: Workspace, coco: Path) -> None:
    document = json.loads(coco.read_bytes())
    number = next(row["id"] for row in document["images"] if row["file_name"] == "clean.png")
    height, width = CLEAN.shape
    polygon = [3.3, 2.5, 20.1, 4.5, 11.7, 19.9]
    counts = [5, 7, height * width - 12]
    rows = [{"segmentation": [polygon]}, {"segmentation": {"size": [height, width], "counts": counts}}]
    annotations = [{"id": index, "image_id": number, "category_id": 1} | row for index, row in enumerate(rows)]
    edit(coco, annotations=annotations)
    bring_back(workspace, "coco", coco)
    expected = np.zeros(height * width, bool)
    expected[5:12] = True
    expected = expected.reshape(width, height).T
    (encoded,) = coco_mask.frPyObjects([polygon], height, width)
    area = int(coco_mask.area(encoded))
    found = all_masks(workspace.human)["clean"] > 0
    assert found[:, 0].tolist() == expected[:, 0].tolist()
    assert (found[:, 1:].sum(), area > 100) == (area, True)


def test_labels(workspace: Workspace, labelme: Path) -> None:
    shapes = json.loads((labelme / "a/marked.json").read_bytes())["shapes"]
    blur = {"label": "blur", "points": [[20, 16], [22, 18]], "shape_type": "rectangle"}
    edit(labelme / "a/marked.json", shapes=[*shapes, blur])
    bring_back(workspace, "labelme", labelme)
    assert all_masks(workspace.human)["a/marked"][17, 21]
    bring_back(workspace, "labelme", labelme, "artifact")
    assert np.array_equal(all_masks(workspace.human)["a/marked"] > 0, MARKED)
    with pytest.raises(UsageError, match="no shape is labelled blurr; labels are artifact, blur"):
        read_corrections(workspace, "labelme", labelme, "blurr")


def test_labels_of_coco(workspace: Workspace, coco: Path) -> None:
    with pytest.raises(UsageError, match="has no category blur; it has artifact"):
        read_corrections(workspace, "coco", coco, "blur")


def test_bad_labelme_files_cost_a_line_each(workspace: Workspace, labelme: Path) -> None:
    shutil.copy(labelme / "clean.json", labelme / "stranger.json")
    edit(labelme / "stranger.json", imagePath="stranger.png")
    edit(labelme / "clean.json", imageWidth=31)
    (labelme / "a/marked.json").write_text("{")
    errors = problems(workspace, "labelme", labelme)
    reasons_by_file = {Path(error.subject).relative_to(labelme).as_posix(): error.reason for error in errors}
    assert reasons_by_file == {
        "a/marked.json": "is no JSON",
        "clean.json": "is of 31x24 px but the image has 30x24",
        "stranger.json": "matches no finished image of this workspace",
    }
    edit(labelme / "clean.json", imageWidth=30, shapes=[{"points": [[1, 1], [2, 2]], "shape_type": "polygon"}])
    reasons = [error.reason for error in problems(workspace, "labelme", labelme)]
    assert "has as shape 1 a polygon of 2 points, which has no area" in reasons


@pytest.mark.parametrize(
    ("annotation", "reason"),
    [
        ({"segmentation": [[1, 1, 5, 5]]}, "holds no mask of an image of 30x24 px"),
        ({"segmentation": {"size": [24, 31], "counts": [24 * 31]}}, "holds no mask of an image of 30x24 px"),
        ({"segmentation": {"size": [24, 30], "counts": [24 * 29]}}, "holds no mask of an image of 30x24 px"),
        ({"segmentation": {"size": [24, 30], "counts": "0PPPP"}}, "holds no mask of an image of 30x24 px"),
        ({"segmentation": [[1, 1, 5, 5, 1e300, 9]]}, "holds no mask of an image of 30x24 px"),
        ({"segmentation": [], "bbox": [1, 2, 3]}, "holds no mask of an image of 30x24 px"),
        ({"segmentation": [], "image_id": 99}, "is of image 99, which is not there"),
        ({}, "has no segmentation and no bbox"),
        ({"segmentation": [[1, 1, 9, 1, 9, 9]], "category_id": 7}, "is of category 7, which is not there"),
    ],
)
def test_bad_coco_files_cost_a_line(workspace: Workspace, coco: Path, annotation: dict[str, Any], reason: str) -> None:
    edit(coco, annotations=[{"id": 5, "image_id": 1, "category_id": 1} | annotation])
    with pytest.raises(UsageError, match=reason):
        problems(workspace, "coco", coco)


def test_coco_files_of_other_images(workspace: Workspace, coco: Path) -> None:
    images = json.loads(coco.read_bytes())["images"]
    images[0]["file_name"] = "stranger.png"
    edit(coco, images=images, annotations=[])
    (error,) = problems(workspace, "coco", coco)
    assert str(error).startswith(f"{coco}, stranger.png: matches no finished image of this workspace")
    images[0] |= {"file_name": "a/marked.png", "width": 99}
    edit(coco, images=images)
    (error,) = problems(workspace, "coco", coco)
    assert error.reason == "is of 99x24 px but the image has 30x24"
    images[0]["id"] = images[1]["id"]
    edit(coco, images=images)
    with pytest.raises(UsageError, match="has two images with the id"):
        problems(workspace, "coco", coco)


def test_one_image_corrected_in_two_ways(workspace: Workspace, labelme: Path, coco: Path) -> None:
    shutil.copy(labelme / "a/marked.json", labelme / "twin.json")
    assert len(bring_back(workspace, "labelme", labelme)) == 3
    edit(labelme / "twin.json", shapes=[])
    (error,) = problems(workspace, "labelme", labelme)
    assert (Path(error.subject).name, Path(error.reason).name) == ("twin.json", "marked.json")
    # Masks that were neither edited nor confirmed contradict nothing.
    shutil.rmtree(workspace.human)
    assert not problems(workspace, "labelme", labelme, unchanged=False)
    images = json.loads(coco.read_bytes())["images"]
    edit(coco, images=[*images, images[0] | {"id": 99, "file_name": "images/a/marked.png"}], annotations=[])
    (error,) = problems(workspace, "coco", coco)
    assert "is of the same image as" in error.reason


def test_an_export_of_another_result_is_refused(workspace: Workspace, labelme: Path, coco: Path) -> None:
    source = workspace.root.parent / "gan_sr/clean.png"
    source.write_bytes(encode_png(np.zeros((*CLEAN.shape, 3), np.uint8)))
    plan = prepare(load_settings(workspace)[0]).plan
    assert plan.pending == 1
    (error,) = problems(workspace, "labelme", labelme)
    assert error.reason == "matches no finished image of this workspace"
    # The same once the image is done.
    manifest = read_manifest(workspace).to_pylist()
    row = next(row for row in manifest if row["name"] == "clean")
    known = next(iter(read_shard(workspace, 0).values()))
    done = Record(row["id"], *CLEAN.shape, similarity_key=known.similarity_key, mask_key=known.mask_key,
                   artifact_pixels=0)  # fmt: skip
    gather_shard(workspace, row["shard"], [done])
    for form, path in (("labelme", labelme), ("coco", coco)):
        (error,) = problems(workspace, form, path)
        assert error.reason == "was exported from another result than the workspace holds"


def test_places_without_anything_to_import(workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for form, path, reason in (
        ("labelme", tmp_path / "nowhere", "does not exist"),
        ("labelme", tmp_path / "empty", "holds no LabelMe files"),
        ("coco", tmp_path / "nowhere.json", "cannot be read"),
        ("coco", tmp_path / "empty", "cannot be read"),
    ):
        with pytest.raises(UsageError, match=reason):
            problems(workspace, form, path)


@pytest.mark.parametrize("form", EXPORTS)
def test_masks_as_exported_are_recognised(workspace: Workspace, tmp_path: Path, form: str) -> None:
    """The tool may have written the rest of the file anew, and to another place."""
    export_workspace(workspace, tmp_path / "out", form, everything=True)
    elsewhere = tmp_path / "elsewhere"
    for path in (tmp_path / "out").rglob("*.json"):
        if not path.name.startswith("."):
            copy = elsewhere / path.relative_to(tmp_path / "out")
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(json.dumps(json.loads(path.read_bytes()) | {"flags": {"seen": True}}))
    assert bring_back(workspace, form, elsewhere / EXPORTS[form], unchanged=False) == []
    if form == "coco":
        document = json.loads((elsewhere / "annotations.json").read_bytes())
        number = next(row["id"] for row in document["images"] if row["file_name"] == "clean.png")
        added = {"id": 99, "image_id": number, "category_id": 1, "bbox": [2, 2, 5, 5]}
        edit(elsewhere / "annotations.json", annotations=[*document["annotations"], added])
    else:
        rectangle = {"label": "artifact", "points": [[2, 2], [6, 6]], "shape_type": "rectangle"}
        edit(elsewhere / "clean.json", shapes=[rectangle])
    (correction,) = bring_back(workspace, form, elsewhere / EXPORTS[form], unchanged=False)
    assert (correction.name, correction.pixels, correction.kinds) == (
        "clean", 25, ("box" if form == "coco" else "rectangle",)
    )  # fmt: skip
    assert all_masks(workspace.human).keys() == {"clean"}
    assert len(bring_back(workspace, form, elsewhere / EXPORTS[form])) == 2
    # Exported again, a human mask stays a human mask, also a confirmed one.
    export_workspace(workspace, tmp_path / "again", form)
    names = {one.name for one in bring_back(workspace, form, tmp_path / "again" / EXPORTS[form], unchanged=False)}
    assert names == {"a/marked", "clean"}


def test_a_person_may_go_back_to_what_the_detector_marked(workspace: Workspace, labelme: Path, tmp_path: Path) -> None:
    detected = json.loads((labelme / "a/marked.json").read_bytes())["shapes"]
    older = Path(shutil.copytree(labelme, tmp_path / "older"))
    edit(labelme / "a/marked.json", shapes=[])
    bring_back(workspace, "labelme", labelme, unchanged=False)
    # Another person's copy of the export, in which the image is as exported.
    assert bring_back(workspace, "labelme", older, unchanged=False) == []
    edit(labelme / "a/marked.json", shapes=detected)
    assert [one.pixels for one in bring_back(workspace, "labelme", labelme, unchanged=False)] == [MARKED.sum()]
    edit(labelme / "a/marked.json", shapes=[])
    bring_back(workspace, "labelme", labelme, unchanged=False)
    export_workspace(workspace, tmp_path / "again", "labelme")
    edit(tmp_path / "again/a/marked.json", shapes=detected)
    (correction,) = bring_back(workspace, "labelme", tmp_path / "again", unchanged=False)
    assert (correction.name, correction.changed) == ("a/marked", False)
    assert np.array_equal(all_masks(workspace.human)["a/marked"] > 0, MARKED)


def test_masks_of_an_older_threshold_are_no_human_masks(workspace: Workspace, labelme: Path, coco: Path) -> None:
    """Masks of earlier exports stay known, also when the detector marks other regions now."""
    with_less = MARKED.copy()
    with_less[:8] = False
    workspace.publish(workspace.mask("a/marked"), encode_mask(with_less))
    for form, path in (("labelme", labelme), ("coco", coco)):
        corrections, errors = read_corrections(workspace, form, path)
        assert not errors
        assert [(one.name, one.changed, one.as_exported) for one in corrections] == [
            ("a/marked", True, True), ("clean", False, True)
        ]  # fmt: skip


def test_a_workspace_that_was_made_anew_knows_the_masks_of_the_export(
    workspace: Workspace, labelme: Path, coco: Path
) -> None:
    shutil.rmtree(workspace.exported)
    for form, path in (("labelme", labelme), ("coco", coco)):
        assert bring_back(workspace, form, path, unchanged=False) == []


def test_an_empty_file_from_elsewhere_is_a_human_mask(workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "clean.json").write_text(json.dumps({"shapes": []}))
    (correction,) = bring_back(workspace, "labelme", tmp_path / "clean.json", unchanged=False)
    assert (correction.as_exported, correction.changed) == (False, False)
    assert workspace.human_mask("clean").exists()


def test_imports_are_taken_back_one_by_one(workspace: Workspace, labelme: Path, coco: Path) -> None:
    before = files(workspace.root)
    edit(labelme / "a/marked.json", shapes=[])
    bring_back(workspace, "labelme", labelme, unchanged=False)
    first = all_masks(workspace.human)
    table = read_table(workspace.human_manifest, HUMAN_MASKS)
    bring_back(workspace, "coco", coco)
    assert all_masks(workspace.human).keys() == {"a/marked", "twin", "clean"}
    with workspace.locked():
        undone = undo_import(workspace)
        assert (undone.names, undone.restored, undone.renewed) == (3, 2, 0)
        assert equal(all_masks(workspace.human), first)
        assert read_table(workspace.human_manifest, HUMAN_MASKS).equals(table)
        undo_import(workspace)
        assert not all_masks(workspace.human)
        assert read_human_masks(workspace, None) == {}
        with pytest.raises(UsageError, match="holds no import that could be taken back"):
            undo_import(workspace)
    after = files(workspace.root)
    assert {path: after[path] for path in before} == before


def test_an_import_that_was_killed_and_run_again_is_one(
    workspace: Workspace, labelme: Path, coco: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Undone, it leaves the masks of before the first try, however often it was run."""
    bring_back(workspace, "coco", coco)
    before = files(workspace.human)
    edit(labelme / "a/marked.json", shapes=[])

    class KilledError(BaseException):
        pass

    def killed_at_the_table(self: Workspace, path: Path, table: pa.Table) -> None:
        if path == workspace.human_manifest:
            raise KilledError
        publish_table(self, path, table)

    publish_table = Workspace.publish_table
    for again in (True, False):
        with monkeypatch.context() as patched:
            patched.setattr(Workspace, "publish_table", killed_at_the_table)
            with pytest.raises(KilledError):
                bring_back(workspace, "labelme", labelme)
        assert not all_masks(workspace.human)["a/marked"].any()
        if again:
            bring_back(workspace, "labelme", labelme)
        with workspace.locked():
            assert undo_import(workspace).restored == 3
        assert {path: data for path, (data, _) in files(workspace.human).items()} == {
            path: data for path, (data, _) in before.items()
        }


@pytest.mark.parametrize("earlier", [False, True])
def test_an_import_is_taken_back_from_a_name_that_changed(workspace: Workspace, tmp_path: Path, earlier: bool) -> None:
    """The image is called ``clean.png`` once there is ``clean.bmp``."""
    drawn = labelme_files(tmp_path / "drawn", clean="clean.png")
    if earlier:
        bring_back(workspace, "labelme", drawn)
    edit(drawn / "clean.json", shapes=[RECTANGLE | {"points": [[5, 5], [9, 9]]}])
    bring_back(workspace, "labelme", drawn)
    for role in ("mse_sr", "gan_sr"):
        picture = cv2.imread(str(workspace.root.parent / role / "clean.png"))
        assert cv2.imwrite(str(workspace.root.parent / role / "clean.bmp"), picture[::-1])
    prepare(load_settings(workspace)[0])
    assert all_masks(workspace.human)["clean.png"].any()
    with workspace.locked():
        assert undo_import(workspace) == (1, int(earlier), 0)
    marked = {name: np.count_nonzero(mask) for name, mask in all_masks(workspace.human).items()}
    assert marked == ({"clean.png": 6} if earlier else {})
    assert [mask.name for mask in read_human_masks(workspace, None).values()] == ["clean.png"] * earlier


@pytest.fixture
def pages(make_workspace) -> Workspace:
    return make_workspace(dict.fromkeys(("x", "s1/x", "s1/y", "s2/y", "z"), CLEAN))


RECTANGLE = {"label": "artifact", "points": [[1, 1], [3, 2]], "shape_type": "rectangle"}


def labelme_files(folder: Path, **image_paths: str | None) -> Path:
    for place, image_path in image_paths.items():
        path = folder / f"{place.replace('__', '/')}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"shapes": [RECTANGLE]} | ({"imagePath": image_path} if image_path else {})))
    return folder


@pytest.mark.parametrize(
    ("places", "found"),
    [
        ({"x": "../exp3/s1/x.png"}, ["s1/x"]),
        ({"x": "..\\exp3\\s1\\x.png"}, ["s1/x"]),
        ({"x": "/home/me/exp3/s1/x.png"}, ["s1/x"]),
        ({"x": "s1/x.png"}, ["s1/x"]),
        ({"first": "s1/y.png", "second": "s2/y.png"}, ["s1/y", "s2/y"]),
        ({"z": "z.png"}, ["z"]),
        ({"z": None}, ["z"]),
        ({"z": "../elsewhere/z.png"}, ["z"]),
        # As in the folders of the images, each beside its picture.
        ({"x": "x.png", "s1__x": "x.png"}, ["s1/x", "x"]),
        ({"s1__y": "y.png"}, ["s1/y"]),
        ({"s1__y": None, "x": None}, ["s1/y", "x"]),
        ({"s1__y": "../pictures/renamed.png"}, ["s1/y"]),
        ({"s1__y": f"../{'long' * 99}.png"}, ["s1/y"]),
        ({"s1__y": "../zero\0.png"}, ["s1/y"]),
        ({"labels__z": "z.png"}, ["z"]),
        ({"labels__s1__y": "../../s1/y.png"}, ["s1/y"]),
    ],
)
def test_which_image_a_labelme_file_is_of(pages: Workspace, tmp_path: Path, places: dict, found: list[str]) -> None:
    corrections, errors = read_corrections(pages, "labelme", labelme_files(tmp_path / "drawn", **places))
    assert not errors
    assert sorted(one.name for one in corrections) == found


@pytest.mark.parametrize(
    ("places", "reason"),
    [
        ({"x": "x.png"}, "may be of s1/x or of x"),
        ({"x": None}, "may be of s1/x or of x"),
        ({"y": "y.png"}, "may be of s1/y or of s2/y"),
        ({"labels__x": "x.png"}, "may be of s1/x or of x"),
        ({"x": "../exp3/s7/gone.png"}, "matches no finished image of this workspace"),
        ({"y": "../s7/y.png"}, "matches no finished image of this workspace"),
        ({"z": "s1/y.png"}, "its place says image z, its imagePath says s1/y"),
        ({"s1__x": "../s2/y.png"}, "its place says image s1/x, its imagePath says s2/y"),
        ({"gone": None}, "matches no finished image of this workspace"),
    ],
)
def test_which_image_cannot_be_decided(pages: Workspace, tmp_path: Path, places: dict, reason: str) -> None:
    (error,) = problems(pages, "labelme", labelme_files(tmp_path / "drawn", **places))
    assert error.reason == reason


def test_the_place_of_the_picture_identifies_the_image(pages: Workspace, tmp_path: Path) -> None:
    """The picture may lie in an export or in the source folder, below folders of any name."""
    export_workspace(pages, tmp_path / "s1", "labelme", everything=True)
    for folder in (tmp_path / "s1", pages.root.parent / "gan_sr"):
        for name in ("x", "s1/x"):
            drawn = labelme_files(tmp_path / "drawn", x=f"../{folder.relative_to(tmp_path)}/{name}.png")
            (correction,), errors = read_corrections(pages, "labelme", drawn)
            assert (correction.name, errors) == (name, [])
    (tmp_path / "linked").symlink_to(tmp_path / "s1/s1")
    (correction,), _ = read_corrections(pages, "labelme", labelme_files(tmp_path / "drawn", x="../linked/x.png"))
    assert correction.name == "s1/x"
    (tmp_path / "s1/s7").mkdir()
    shutil.copy(tmp_path / "s1/x.png", tmp_path / "s1/s7/x.png")
    (error,) = problems(pages, "labelme", labelme_files(tmp_path / "drawn", x="../s1/s7/x.png"))
    assert error.reason == "matches no finished image of this workspace"


@pytest.mark.parametrize(
    ("file_name", "found"),
    [
        ("/data/exp/s1/x.png", "s1/x"), ("D:\\data\\s2\\y.jpg", "s2/y"), ("upload/0123abcd-z.png", "z"),
        ("z.png", "z"), ("x.png", "x"),
    ],
)  # fmt: skip
def test_which_image_a_coco_entry_is_of(pages: Workspace, tmp_path: Path, file_name: str, found: str) -> None:
    path = tmp_path / "coco.json"
    image = {"id": 1, "file_name": file_name, "width": 30, "height": 24}
    path.write_text(json.dumps({"images": [image], "annotations": [{"id": 1, "image_id": 1, "bbox": [1, 2, 3, 4]}]}))
    (correction,), errors = read_corrections(pages, "coco", path)
    assert (correction.name, correction.pixels, errors) == (found, 12, [])
    edit(path, images=[image | {"file_name": "y.png"}])
    (error,) = problems(pages, "coco", path)
    assert str(error) == (
        f"{path}, y.png: may be of s1/y or of s2/y; write the path of its picture, folders included, as file_name"
    )
