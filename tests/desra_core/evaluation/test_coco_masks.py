"""COCO files: their content is read exactly, and each mistake is refused in one line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco

from desra_core.errors import UsageError
from desra_core.evaluation.coco_masks import CocoMask, decode_coco_mask, read_coco

IMAGE = {"id": 1, "file_name": "a.png", "width": 7, "height": 5}


def document(*annotations: Any, images: Any = (IMAGE,), **more: Any) -> dict[str, Any]:
    rows = [{"id": number, "image_id": 1, "segmentation": each} for number, each in enumerate(annotations)]
    return {"images": list(images), "annotations": rows} | more


def read(tmp_path: Path, content: Any) -> dict[str, CocoMask]:
    path = tmp_path / "a.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_coco(path)


def compressed(mask: np.ndarray) -> dict[str, Any]:
    encoded = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": encoded["counts"].decode()}


def runs(mask: np.ndarray) -> dict[str, Any]:
    """Encode run lengths column by column, pixel by pixel."""
    counts, value = [0], False
    for pixel in mask.T.ravel():
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return {"size": list(mask.shape), "counts": counts}


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_run_lengths_are_decoded_and_joined(tmp_path_factory, data) -> None:
    height, width = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    seed, share = data.draw(st.integers(0, 2**32 - 1)), data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    masks = np.random.default_rng(seed).random((2, height, width)) < share
    image = {"id": 1, "file_name": "a.png", "width": width, "height": height}
    content = document(compressed(masks[0]), runs(masks[1]), images=[image])
    (found,) = read(tmp_path_factory.mktemp("coco"), content).values()
    assert (decode_coco_mask(found) == masks.any(axis=0)).all()


def test_long_runs_are_decoded(tmp_path) -> None:
    """Counts of several digits, larger and smaller than the ones before."""
    mask = np.zeros((300, 500), bool)
    mask[17:290, 40:300] = mask[3, 490:] = True
    image = {"id": 1, "file_name": "a.png", "width": 500, "height": 300}
    (found,) = read(tmp_path, document(compressed(mask), images=[image])).values()
    assert (decode_coco_mask(found) == mask).all()


def test_a_polygon_covers_its_rectangle(tmp_path) -> None:
    (found,) = read(tmp_path, document([[2, 1, 6, 1, 6, 3, 2, 3]])).values()
    expected = np.zeros((5, 7), bool)
    expected[1:3, 2:6] = True
    assert (decode_coco_mask(found) == expected).all()


def test_an_image_without_annotations_is_empty(tmp_path) -> None:
    other = IMAGE | {"id": "two", "file_name": "b/c.png"}
    found = read(tmp_path, document(images=[IMAGE, other]))
    assert found == {"a.png": CocoMask(5, 7, ""), "b/c.png": CocoMask(5, 7, "")}
    assert not decode_coco_mask(found["a.png"]).any()
    assert decode_coco_mask(found["a.png"]).shape == (5, 7)


def test_only_artifacts_count_where_there_are_any(tmp_path) -> None:
    whole = [[0, 0, 7, 0, 7, 5, 0, 5]]
    content = document(whole)
    content["annotations"][0]["category_id"] = 2
    for names, marked in ((["artifact", "text"], False), (["blur", "text"], True), ([], True)):
        content["categories"] = [{"id": number, "name": name} for number, name in enumerate(names, 1)]
        (found,) = read(tmp_path, content).values()
        assert decode_coco_mask(found).all() == marked


WHOLE = [[0, 0, 7, 0, 7, 5, 0, 5]]
CATEGORIES = [{"id": 1, "name": "artifact"}, {"id": 2, "name": "text"}]


@pytest.mark.parametrize(
    ("annotation", "more"),
    [
        ({"category_id": "1"}, {}),
        ({"category_id": 1.0}, {}),
        ({"category_id": " 1 "}, {}),
        ({"category_id": "artifact"}, {}),
        ({"category_id": "Artifact"}, {"categories": [{"id": 5, "name": "Artifact"}, {"id": 6, "name": "text"}]}),
        ({"category_id": 1}, {"categories": [{"id": "1", "name": "artifact"}, {"id": "2", "name": "text"}]}),
        ({"category_id": "a"}, {"categories": [{"id": "a", "name": "artifact"}, {"id": "b", "name": "text"}]}),
        ({}, {"categories": CATEGORIES[:1]}),
        ({"category_id": None}, {"categories": CATEGORIES[:1]}),
        ({"category_id": 9}, {"categories": []}),
        ({"category_id": 1, "image_id": "1"}, {}),
        ({"category_id": 1, "image_id": 1.0}, {"images": [IMAGE | {"id": "1"}]}),
        ({"category_id": 1}, {"images": [IMAGE | {"width": 7.0, "height": "5"}]}),
    ],
)
def test_ids_and_sizes_as_tools_write_them(tmp_path, annotation, more) -> None:
    content = document(WHOLE, **({"categories": CATEGORIES} | more))
    content["annotations"][0] |= annotation
    (found,) = read(tmp_path, content).values()
    assert decode_coco_mask(found).all()
    assert (found.kinds, found.left_out) == (("polygon",), ())


def test_large_and_odd_ids_stay_apart(tmp_path) -> None:
    """Ids above 2^53, where floating-point numbers skip integers, and hexadecimal ids that look like numbers."""
    keys = [2**60, 2**60 + 1, "1e5", 100_000, "0a", str(2**60 + 2)]
    images = [IMAGE | {"id": key, "file_name": f"{number}.png"} for number, key in enumerate(keys)]
    content = document(WHOLE, images=images)
    content["annotations"][0]["image_id"] = keys[1]
    assert [name for name, mask in read(tmp_path, content).items() if mask.kinds] == ["1.png"]
    content["annotations"][0]["image_id"] = 2**60 + 2
    assert [name for name, mask in read(tmp_path, content).items() if mask.kinds] == ["5.png"]


@pytest.mark.parametrize(
    ("category", "told"),
    [
        ({"category_id": 7}, "annotation 0: is of category 7, which is not there; give it the id of one of the file's "
         "categories: artifact (1), text (2)"),
        ({"category_id": "blur"}, "is of category blur, which is not there"),
        ({"category_id": [1]}, "which is not there"),
        ({"category_id": True}, "which is not there"),
        ({}, "annotation 0: has no category_id"),
        ({"category_id": None}, "has no category_id"),
    ],
)  # fmt: skip
def test_regions_of_unknown_categories_are_never_dropped(tmp_path, category, told) -> None:
    content = document(WHOLE, categories=CATEGORIES)
    content["annotations"][0] |= category
    with pytest.raises(UsageError) as raised:
        read(tmp_path, content)
    assert told in str(raised.value)


def test_regions_of_other_categories_are_counted(tmp_path) -> None:
    content = document(WHOLE, [[2, 1, 6, 1, 6, 3, 2, 3]], categories=CATEGORIES)
    for annotation, category in zip(content["annotations"], (2, 1), strict=True):
        annotation["category_id"] = category
    (found,) = read(tmp_path, content).values()
    assert decode_coco_mask(found).sum() == 8
    assert (found.kinds, found.left_out) == (("polygon",), ("region of category text",))


@pytest.mark.parametrize("segmentation", [[], [[]], None, {}, "absent"])
def test_a_box_stands_for_a_missing_outline(tmp_path, segmentation) -> None:
    content = document(segmentation)
    content["annotations"][0]["bbox"] = [2, 1, 4.0, 2]
    if segmentation == "absent":
        del content["annotations"][0]["segmentation"]
    (found,) = read(tmp_path, content).values()
    expected = np.zeros((5, 7), bool)
    expected[1:3, 2:6] = True
    assert (decode_coco_mask(found) == expected).all()
    assert found.kinds == ("box",)


@pytest.mark.parametrize(("angle", "kind"), [(0, "box"), (360, "box"), (90, "rotated box"), (30.5, "rotated box")])
def test_boxes_are_turned_as_cvat_turns_them(tmp_path, angle, kind) -> None:
    """CVAT writes the box before it is turned, and the clockwise angle around its middle as an attribute."""
    image = IMAGE | {"width": 120, "height": 100}
    content = document([], images=[image])
    content["annotations"][0] |= {"bbox": [30, 40, 60, 20], "attributes": {"occluded": False, "rotation": angle}}
    (found,) = read(tmp_path, content).values()
    mask = decode_coco_mask(found)
    rows, columns = np.mgrid[:100, :120] + 0.5
    turn = np.deg2rad(angle)
    along = (columns - 60) * np.cos(turn) + (rows - 50) * np.sin(turn)
    across = -(columns - 60) * np.sin(turn) + (rows - 50) * np.cos(turn)
    inside = (abs(along) < 30) & (abs(across) < 10)
    assert (mask != inside).sum() <= (0 if angle % 90 == 0 else 80)
    assert found.kinds == (kind,)


def test_slivers_beside_a_whole_outline_are_reported(tmp_path) -> None:
    (found,) = read(tmp_path, document([[2, 1, 6, 1, 6, 3, 2, 3], [4, 1, 5, 1]])).values()
    assert decode_coco_mask(found).sum() == 8
    assert found.left_out == ("outline of fewer than three points",)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "gb18030", "gbk"])
def test_files_in_other_encodings(tmp_path, encoding) -> None:
    image = IMAGE | {"file_name": "图/效果.png"}
    path = tmp_path / "a.json"
    path.write_bytes(json.dumps(document(WHOLE, images=[image]), ensure_ascii=False).encode(encoding))
    assert list(read_coco(path)) == ["图/效果.png"]


def test_a_file_in_an_unknown_encoding(tmp_path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(json.dumps(document(WHOLE, info="café"), ensure_ascii=False).encode("latin-1"))
    with pytest.raises(UsageError, match="is text in another encoding than UTF-8, UTF-16 and GB18030"):
        read_coco(path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[]", "is no COCO file"),
        ({"annotations": []}, "is no COCO file"),
        ({"images": [3]}, "images, entry 0: has no id"),
        ({"images": [IMAGE | {"width": 0}]}, "has no width"),
        ({"images": [IMAGE | {"file_name": 3}]}, "has no file_name"),
        ({"images": [IMAGE, IMAGE | {"id": 2}]}, "has two images called a.png"),
        ({"images": [IMAGE, IMAGE]}, "has two images with the id 1"),
        ({"images": [IMAGE], "annotations": [{"image_id": 9, "segmentation": []}]}, "is of image 9, which is not"),
        ({"images": [IMAGE], "annotations": [{"image_id": 1}]}, "annotation ?: has no segmentation and no bbox"),
        (document({"size": [7, 5], "counts": [35]}), "annotation 0: holds no mask of an image of 7x5 px"),
        (document({"size": [5, 7], "counts": [30]}), "holds no mask of an image of 7x5 px: its runs cover 30 of 35 px"),
        (document({"size": [5, 7], "counts": [40, -5]}), "holds no mask"),
        (document({"size": [5, 7], "counts": [34.5, 0.5]}), "holds no mask"),
        (document({"size": [5, 7], "counts": "0"}), "holds no mask"),
        (document({"size": [5, 7], "counts": "z"}), "holds no mask"),
        (document({"size": [5, 7], "counts": "\u20ac"}), "holds no mask"),
        (document({"size": [5, 7], "counts": None}), "holds no mask"),
        (document({"counts": [35]}), "holds no mask"),
        (document([[1, 1, 2, 2]]), "holds no mask of an image of 7x5 px: no outline has three points"),
        (document([[1, 1, 1, 1, 1, 1]]), "the polygon covers none of its pixels"),
        (document([[20, 1, 25, 1, 25, 4]]), "the polygon covers none of its pixels"),
        (document([[1, 1, 2, 2, 3, 3, 4]]), "an outline is not of pairs of numbers near the image"),
        (document("abc"), "holds no mask"),
        ({"images": [IMAGE], "annotations": [{"image_id": 1, "bbox": [2, 2, 0, 3]}]}, "the box covers none"),
        ({"images": [IMAGE], "annotations": [{"image_id": 1, "bbox": [2, 2, 3]}]}, "the bbox is not left, top, width"),
        ({"images": [IMAGE], "annotations": {"image_id": 1}}, "annotations: is no list"),
        ({"images": [IMAGE | {"width": 7.5}]}, "has no width"),
        (document([[1, 1, 2, 2, 3, "x"]]), "holds no mask"),
        (document([1, 1, 2, 2, 3, 3]), "holds no mask"),
        # pycocotools would take more memory than there is, without end or to a crash
        ({"images": [IMAGE | {"width": 2**16, "height": 2**16}]}, "has an image of 65536x65536 px"),
        ({"images": [IMAGE | {"width": 1e30}]}, "x5 px, a.png; mend its width and height"),
        (
            document([[0, 0, 60_000, 1] * 100], images=[IMAGE | {"width": 60_000, "height": 60_000}]),
            "is longer than any",
        ),
    ],
)
def test_damaged_files_are_refused(tmp_path, content, told) -> None:
    with pytest.raises(UsageError) as raised:
        read(tmp_path, content)
    assert told in str(raised.value)
    assert str(tmp_path / "a.json") in str(raised.value)


def test_a_missing_file_is_refused(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    for name in ("none.json", "pipe.json"):
        with pytest.raises(UsageError, match="cannot be read"):
            read_coco(tmp_path / name)
