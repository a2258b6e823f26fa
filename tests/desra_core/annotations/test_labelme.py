"""LabelMe files: masks written and read, by LabelMe's own rules of drawing."""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from scipy import ndimage

from desra_core.annotations.labelme import draw_shapes, labelme_document, labelme_shape, read_labelme
from desra_core.detection.mask import Components
from desra_core.errors import ImageError
from tests.desra_core.annotations.drawn_masks import MASKS

SHAPE = (40, 50)
EIGHT = np.ones((3, 3), bool)


def document_of(mask: np.ndarray) -> bytes:
    found = Components(mask)
    shapes = [labelme_shape(x, y, found.crop(index), "") for index, (x, y, *_) in enumerate(found.boxes.tolist())]
    return labelme_document("set/photo.v2", mask.shape, shapes)


def labelme_mask(shape: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
    """One shape as ``labelme.utils.shape_to_mask`` and ``shapes_to_label`` of LabelMe 5.5 draw it."""
    points = [tuple(point) for point in shape["points"]]
    if shape["shape_type"] == "mask":
        (x1, y1), (x2, y2) = np.asarray(points).astype(int)
        crop = cv2.imdecode(np.frombuffer(base64.b64decode(shape["mask"]), np.uint8), cv2.IMREAD_UNCHANGED)
        mask = np.zeros(size, bool)
        mask[y1 : y2 + 1, x1 : x2 + 1] = crop.astype(bool)
        return mask
    canvas = Image.fromarray(np.zeros(size, np.uint8))
    draw = ImageDraw.Draw(canvas)
    if shape["shape_type"] == "circle":
        (cx, cy), (px, py) = points
        d = math.sqrt((cx - px) ** 2 + (cy - py) ** 2)
        draw.ellipse([cx - d, cy - d, cx + d, cy + d], outline=1, fill=1)
    elif shape["shape_type"] == "rectangle":
        draw.rectangle(points, outline=1, fill=1)
    else:
        draw.polygon(xy=points, outline=1, fill=1)
    return np.array(canvas, dtype=bool)


def check_document(mask: np.ndarray, folder: Path) -> list[dict[str, Any]]:
    """Each shape is one region, drawn by LabelMe's rules, and reading gives the mask; returns the shapes."""
    document = document_of(mask)
    shapes = json.loads(document)["shapes"]
    regions, count = ndimage.label(mask, EIGHT)
    assert len(shapes) == count
    for number, shape in enumerate(shapes, 1):
        assert np.array_equal(labelme_mask(shape, mask.shape), regions == number)
    path = folder / "file.json"
    path.write_bytes(document)
    assert np.array_equal(draw_shapes(read_labelme(path), mask.shape), mask)
    return shapes


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_awkward_masks_come_back(mask: np.ndarray, tmp_path: Path) -> None:
    check_document(mask, tmp_path)
    check_document(np.kron(mask, np.ones((7, 9), bool)), tmp_path)


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_any_mask_comes_back(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    rng = np.random.default_rng(seed)
    noise = cv2.GaussianBlur(rng.random((60, 70)).astype(np.float32), (0, 0), rng.uniform(0.1, 4))
    check_document(noise > np.quantile(noise, rng.uniform(0.2, 0.99)), tmp_path_factory.mktemp("any"))


def test_outlines_are_polygons_that_people_can_move(tmp_path: Path) -> None:
    solid = cv2.circle(np.zeros((80, 90), np.uint8), (40, 40), 30, 1, -1) > 0
    (shape,) = check_document(solid, tmp_path)
    assert (shape["shape_type"], shape["mask"]) == ("polygon", None)
    assert all(isinstance(value, float) for point in shape["points"] for value in point)
    solid[40, 40] = False
    (shape,) = check_document(solid, tmp_path)
    assert shape["shape_type"] == "mask"
    assert shape["points"] == [[10, 10], [70, 70]]


def test_a_file_is_as_labelme_writes_it() -> None:
    document = json.loads(document_of(MASKS["two"]))
    assert list(document) == ["version", "flags", "shapes", "imagePath", "imageData", "imageHeight", "imageWidth"]
    assert (document["imageHeight"], document["imageWidth"]) == MASKS["two"].shape
    assert (document["imagePath"], document["imageData"]) == ("photo.v2.png", None)
    shape = document["shapes"][0]
    assert set(shape) == {"label", "points", "group_id", "description", "shape_type", "flags", "mask"}
    assert (shape["label"], shape["flags"], shape["group_id"]) == ("artifact", {}, None)
    assert isinstance(shape["description"], str)


SHAPES = {
    "triangle": ("polygon", [[3.7, 2.2], [30.9, 5.5], [12.1, 35.3]]),
    "no type": (None, [[3.7, 2.2], [30.9, 5.5], [12.1, 35.3]]),
    "beyond the image": ("polygon", [[-20, -7.5], [80, 10], [20, 90.5]]),
    "bow tie": ("polygon", [[5, 5], [30, 30], [30, 5], [5, 30]]),
    "turned rectangle": ("oriented_rectangle", [[10, 2], [20, 12], [12, 20], [2, 10]]),
    "rectangle": ("rectangle", [[4.4, 6.6], [20.2, 18.9]]),
    "circle": ("circle", [[20.5, 20.5], [27.5, 21.0]]),
}


def stored(folder: Path, *shapes: Any, **fields: Any) -> Path:
    path = folder / "file.json"
    document = {"version": "5.5.0", "imageHeight": SHAPE[0], "imageWidth": SHAPE[1], "imageData": "x" * 9} | fields
    path.write_text(json.dumps({"shapes": shapes} | document))
    return path


@pytest.mark.parametrize(("kind", "points"), SHAPES.values(), ids=SHAPES)
def test_shapes_are_drawn_as_labelme_does(kind: str | None, points: list[list[float]], tmp_path: Path) -> None:
    shape = {"label": "artifact", "points": points, "shape_type": kind}
    drawn = draw_shapes(read_labelme(stored(tmp_path, shape)), SHAPE)
    assert drawn.any()
    assert np.array_equal(drawn, labelme_mask(shape, SHAPE))


def test_shapes_are_taken_together_and_rectangles_may_be_turned_around(tmp_path: Path) -> None:
    shapes = [{"label": name, "points": points, "shape_type": kind} for name, (kind, points) in SHAPES.items()]
    together = np.any([labelme_mask(shape, SHAPE) for shape in shapes], axis=0)
    shapes[5]["points"].reverse()
    file = read_labelme(stored(tmp_path, *shapes, {"label": "x", "shape_type": "mask", "points": [[45, 1], [46, 1]],
                                                   "mask": png(np.array([[0, 1]], np.uint8))}))  # fmt: skip
    together[1, 46] = True
    assert np.array_equal(draw_shapes(file, SHAPE), together)
    assert np.array_equal(draw_shapes(file._replace(label="circle"), SHAPE), labelme_mask(shapes[6], SHAPE))
    assert not draw_shapes(file._replace(label="other"), SHAPE).any()


CORNERS = [[4.0, 6.0], [20.0, 6.0], [20.0, 18.0], [4.0, 18.0]]
TURNED = [[10, 2], [20, 12], [12, 20], [2, 10]]


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 3, 0, 1), (3, 2, 1, 0), (0, 1, 3, 2)])
@pytest.mark.parametrize("kind", ["rectangle", "rotation", "oriented_rectangle"])
def test_rectangles_of_four_corners(kind: str, order: tuple[int, ...], tmp_path: Path) -> None:
    """As X-AnyLabeling saves them; a rectangle that is not turned equals that of its two corners."""
    shape = {"label": "artifact", "points": [CORNERS[index] for index in order], "shape_type": kind, "direction": 0.0}
    upright = labelme_mask({"points": [CORNERS[0], CORNERS[2]], "shape_type": "rectangle"}, SHAPE)
    assert np.array_equal(draw_shapes(read_labelme(stored(tmp_path, shape)), SHAPE), upright)
    file = read_labelme(stored(tmp_path, shape | {"points": [TURNED[index] for index in order]}))
    assert np.array_equal(draw_shapes(file, SHAPE), labelme_mask({"points": TURNED, "shape_type": None}, SHAPE))
    assert file.kinds == ("rectangle" if kind == "rectangle" else "rotated rectangle",)


def test_kinds_and_other_labels(tmp_path: Path) -> None:
    shapes = [{"label": name[0], "points": points, "shape_type": kind} for name, (kind, points) in SHAPES.items()]
    file = read_labelme(stored(tmp_path, *shapes))
    kinds = ("polygon", "polygon", "polygon", "polygon", "rotated rectangle", "rectangle", "circle")
    assert (file.kinds, file.left_out) == (kinds, ())
    assert file._replace(label="t").kinds == ("polygon", "rotated rectangle")
    assert file._replace(label="t").left_out == tuple(f"region labelled {letter}" for letter in "nbbrc")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "gb18030", "gbk"])
def test_files_in_other_encodings(encoding: str, tmp_path: Path) -> None:
    """Old LabelMe writes in the encoding of Windows."""
    path = stored(tmp_path, shape_with(label="\u6548\u679c"), flags={"\u8bf4\u660e": True}, imagePath="\u56fe.png")
    path.write_bytes(json.dumps(json.loads(path.read_bytes()), ensure_ascii=False).encode(encoding))
    file = read_labelme(path)
    assert ({shape["label"] for shape in file.shapes}, file.image_path) == ({"\u6548\u679c"}, "\u56fe.png")


def png(pixels: np.ndarray) -> str:
    return base64.b64encode(cv2.imencode(".png", pixels)[1].tobytes()).decode()


def shape_with(**fields: Any) -> dict[str, Any]:
    return {
        "label": "artifact",
        "points": [[1, 1], [3, 2]],
        "shape_type": "mask",
        "mask": png(np.ones((2, 3))),
    } | fields


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        (shape_with(shape_type="polygon"), "has as shape 1 a polygon of 2 points, which has no area"),
        (shape_with(shape_type="linestrip", points=[[1, 1], [2, 2], [3, 1]]), "a linestrip of 3 points"),
        (shape_with(shape_type="point", points=[[1, 1]]), "a point of 1 point, "),
        (shape_with(shape_type="rectangle", points=[[1, 1]]), "a rectangle of 1 point, "),
        (shape_with(shape_type="rectangle", points=[[1, 1], [9, 1], [9, 9]]), "a rectangle of 3 points"),
        (shape_with(shape_type="line"), "has as shape 1 a line of 2 points, which has no area"),
        (shape_with(shape_type="rotation"), "a rotation of 2 points"),
        (shape_with(points=[[1, 1], [math.nan, 2]]), "whose points are not numbers on the image"),
        (shape_with(points=[[1, 1], [1e30, 2]]), "whose points are not numbers on the image"),
        (shape_with(shape_type="circle", points=[[1, 1], [10**6, 1]]), "whose points are not numbers on the image"),
        (shape_with(points=[[1, 1], [2]]), "whose points are not numbers on the image"),
        (shape_with(points=[[1, 1], ["a", "b"]]), "whose points are not numbers on the image"),
        (shape_with(points="far"), "whose points are not numbers on the image"),
        (shape_with(points=None), "a mask of 0 points"),
        (shape_with(mask=None), "shape 1: holds no mask"),
        (shape_with(mask="AAAA"), "shape 1: is not an image"),
        (shape_with(points=[[1, 1], [4, 2]]), "is a mask of 3x2 in the box (1, 1) to (4, 2)"),
        (shape_with(points=[[48, 1], [50, 2]]), "of an image of 50x40"),
        (shape_with(shape_type="polygon", points=[[60, 1], [70, 1], [65, 9]]), "covers no pixel of its image of 50x40"),
        (shape_with(shape_type="rectangle", points=[[1, -9], [9, -3]]), "covers no pixel of its image of 50x40"),
        (shape_with(shape_type="polygon", points=[[30, -20], [90, 5], [10, -60]]), "covers no pixel of its image"),
        (shape_with(shape_type="circle", points=[[3.4, 3.4], [3.5, 3.4]]), "covers no pixel of its image of 50x40"),
        (shape_with(mask=png(np.zeros((2, 3)))), "covers no pixel of its image of 50x40"),
        (shape_with(points=[[-1, 1], [1, 2]]), "in the box (-1, 1) to (1, 2)"),
    ],
)
def test_shapes_that_cannot_be_drawn(shape: dict[str, Any], reason: str, tmp_path: Path) -> None:
    file = read_labelme(stored(tmp_path, shape))
    with pytest.raises(ImageError) as caught:
        draw_shapes(file, SHAPE)
    assert reason in str(caught.value)
    assert "file.json" in caught.value.subject
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"shapes": 3}', '{"shapes": [3]}', "[" * 100_000])
def test_files_of_another_kind(text: str, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(ImageError, match=r"file\.json: is no"):
        read_labelme(path)


def test_odd_but_sound_files(tmp_path: Path) -> None:
    file = read_labelme(stored(tmp_path, shape_with(label=None), imageHeight=None, imageWidth=None))
    assert (file.width, file.height, file.shapes[0]["label"]) == (None, None, None)
    file = read_labelme(stored(tmp_path, imageHeight=40.0, imageWidth="50", imageData=None, imagePath=None))
    assert (file.width, file.height, file.image_path) == (50, 40, "")
    for width in ("wide", 0, 50.5, [50], True):
        with pytest.raises(ImageError, match="has no valid size"):
            read_labelme(stored(tmp_path, imageWidth=width))
    # Flags of the file draw nothing.
    file = read_labelme(stored(tmp_path, flags={"clean": True}))
    assert not draw_shapes(file, SHAPE).any()
    grouped = shape_with(group_id=7, flags={"sure": False}, description=None)
    assert draw_shapes(read_labelme(stored(tmp_path, grouped)), SHAPE).sum() == 6
