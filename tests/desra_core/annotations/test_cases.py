"""Files of labelling tools that were read wrongly once: read to the pixel, or refused with the right reason."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from desra_core.annotations.corrections import Correction, Origin, read_corrections
from desra_core.errors import DesraError, UsageError
from desra_core.images.codec import decode
from desra_core.workspace import Workspace

CASES = Path("../shared/data/cases")
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason="needs ../shared/data/cases")


def box(top: int, bottom: int, left: int, right: int) -> np.ndarray:
    mask = np.zeros((320, 384), bool)
    mask[top:bottom, left:right] = True
    return mask


COCO = box(50, 90, 40, 100)
LABELME = box(50, 91, 40, 101)  # LabelMe's outlines belong to its shapes


def read(workspace: Workspace, origin: Origin, path: Path) -> tuple[list[Correction], list[DesraError]]:
    return read_corrections(workspace, origin, path)


def drawn(corrections: list[Correction]) -> dict[str, np.ndarray]:
    return {one.name: decode(one.png, Path(one.name)).pixels[:, :, 0] > 0 for one in corrections}


@pytest.mark.parametrize(
    ("origin", "file", "mask", "kinds", "left_out"),
    [
        ("coco", "08-coco-category/cat_missing.json", COCO, ("polygon",), ()),
        ("coco", "08-coco-category/cat_string.json", COCO, ("polygon",), ()),
        ("coco", "08-coco-category/cats_string_ids.json", COCO, ("polygon",), ()),
        ("coco", "08-coco-category/mixed_cat.json", COCO | box(200, 220, 200, 220), ("polygon",) * 2, ()),
        ("labelme", "10-labelme-rectangle4/p1.json", LABELME, ("rectangle",), ()),
        ("labelme", "10-labelme-rectangle4/rotation.json", LABELME, ("rotated rectangle",), ()),
        ("coco", "18-coco-box-only/float_size_image.json", COCO, ("polygon",), ()),
        ("coco", "18-coco-box-only/no_seg_bbox.json", COCO, ("box",), ()),
        ("coco", "18-coco-box-only/seg_emptypoly.json", COCO, ("box",), ()),
        ("coco", "18-coco-box-only/seg_null_bbox.json", COCO, ("box",), ()),
        ("coco", "18-coco-box-only/seg_one_good_one_short.json", COCO, ("polygon",),
         ("outline of fewer than three points",)),
        ("labelme", "21-labelme-gbk/p1.json", LABELME, ("rectangle",), ()),
    ],
)  # fmt: skip
def test_what_was_drawn_is_read(
    make_workspace: Callable[..., Workspace],
    origin: Origin,
    file: str,
    mask: np.ndarray,
    kinds: tuple[str, ...],
    left_out: tuple[str, ...],
) -> None:
    workspace = make_workspace({"p1": np.zeros((320, 384), bool), "p2": np.zeros((320, 384), bool)})
    (correction,), errors = read(workspace, origin, CASES / file)
    assert not errors
    assert np.array_equal(drawn([correction])["p1"], mask)
    assert (correction.kinds, correction.left_out) == (kinds, left_out)


def test_a_region_of_an_unknown_category_is_refused(make_workspace) -> None:
    workspace = make_workspace({"p1": np.zeros((320, 384), bool)})
    with pytest.raises(UsageError, match=r"annotation 1: is of category 7, which is not there; .* artifact \(1\)"):
        read(workspace, "coco", CASES / "08-coco-category/cat_unknown_id.json")


def test_a_file_written_flat_is_of_the_picture_that_it_names(make_workspace) -> None:
    workspace = make_workspace({"x": np.zeros((224, 256), bool), "s1/x": np.zeros((224, 256), bool)})
    (correction,), errors = read(workspace, "labelme", CASES / "09-labelme-flat-output/x.json")
    assert not errors
    assert (correction.name, correction.pixels) == ("s1/x", 51 * 51)


def test_names_of_decomposed_letters(make_workspace, tmp_path: Path) -> None:
    blank = np.zeros((224, 256), bool)
    workspace = make_workspace(dict.fromkeys(("Köln", "Zürich", "日本語"), blank))
    for place in (CASES / "15-nfd/labelme-nfd", *(CASES / "15-nfd/labelme-nfd").glob("*.json")):
        (correction,), errors = read(workspace, "labelme", place)
        assert not errors
        assert (correction.name, len(correction.kinds)) == ("Köln", 18)
    document = json.loads((CASES / "15-nfd/coco_nfd.json").read_bytes())
    names = {unicodedata.normalize("NFC", image["file_name"]): image for image in document["images"]}
    document["images"] = [names[f"{name}.png"] for name in ("Köln", "Zürich", "日本語")]
    ids = {image["id"] for image in document["images"]}
    document["annotations"] = [row for row in document["annotations"] if row["image_id"] in ids]
    (tmp_path / "coco.json").write_text(json.dumps(document))
    corrections, errors = read(workspace, "coco", tmp_path / "coco.json")
    assert not errors
    assert [one.name for one in corrections] == ["Köln", "Zürich", "日本語"]
    assert all(one.pixels for one in corrections)
