"""Data sets as people keep them: spellings, endings, missing files, and mistakes that are refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from desra_core.benchmarking.data_sets import read_data_set
from desra_core.errors import UsageError

REFUSALS = {
    "nothing": "does not exist",
    "file.txt": "is no data set",
    "empty": "is no data set",
    "no_mse": "has no folder MSE-SR; add it, or give --mse-sr",
    "no_truth": "has no folder GT-Mask nor annotations.json; add it",
    "twice": "has two folders for GAN-SR: GAN-SR and gan_sr",
    "both": "has both masks in gt_mask and annotations.json",
    "no_images": "holds no images",
    "strangers": "is an empty data set: no GAN result has a ground truth",
    "broken.json": "is no JSON",
    "half": "SwinIR: has no folder MSE-SR",
}


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def names_of(root: Path, **folders: Path) -> dict[str, set[str]]:
    """The roles of each image."""
    examples = read_data_set(root, folders, root / "out").examples
    return {example.title: {*example.files} | ({"coco"} if example.coco_mask else set()) for example in examples}


@pytest.mark.parametrize(
    "spelling",
    [
        ("MSE-SR", "GAN-SR", "GT-Mask", "DeSRA-Mask", "LR"),
        ("mse_sr", "gan_sr", "gt_mask", "desra_mask", "lr"),
        ("Mse Sr", "GAN_SR", "GT masks", "desra-masks", "Lr"),
        ("msesr", "gansr", "GT", "DeSRAMask", "LR"),
    ],
)
def test_folders_are_known_in_any_spelling(tmp_path, spelling) -> None:
    for folder in spelling:
        touch(tmp_path, f"{folder}/a/b.png")
    touch(tmp_path, "notes/readme.txt")
    assert names_of(tmp_path) == {"a/b": {"mse_sr", "gan_sr", "gt_mask", "desra_mask", "lr"}}


def test_method_folders_are_parts(tmp_path) -> None:
    for part in ("SwinIR", "GAN", "LDL"):
        touch(tmp_path, f"{part}/MSE-SR/0.png", f"{part}/GAN-SR/0.jpg", f"{part}/GT-Mask/0.png")
    touch(tmp_path, "LDL/LR/0.png", "paper/figure.png")
    found = names_of(tmp_path)
    assert list(found) == ["GAN/0", "LDL/0", "SwinIR/0"]
    assert found["LDL/0"] == {"mse_sr", "gan_sr", "gt_mask", "lr"}
    touch(tmp_path / "labels", "LDL/0.png", "GAN/0.png", "SwinIR/0.png")
    assert "labels" in names_of(tmp_path, labels=tmp_path / "labels")["GAN/0"]


def test_endings_that_all_files_of_a_folder_have_are_dropped(tmp_path) -> None:
    for name in ("x/01", "x/02", "03_out"):
        touch(tmp_path, f"GAN-SR/{name}_GAN-SR.png", f"MSE-SR/{name}-mse.x4.png", f"GT-Mask/{name}.png")
        touch(tmp_path, f"LR/{name}.jpg")
    found = names_of(tmp_path)
    assert list(found) == ["03_out", "x/01", "x/02"]
    assert all(roles == {"mse_sr", "gan_sr", "gt_mask", "lr"} for roles in found.values())


def test_names_that_agree_keep_their_endings(tmp_path) -> None:
    """The names of photos of one subject may end alike by chance."""
    for name in ("1_a", "2_a", "11_a"):
        touch(tmp_path, f"GAN-SR/{name}.png", f"MSE-SR/{name}.png", f"GT-Mask/{name}.png")
    touch(tmp_path, "DeSRA-Mask/1_a.png")
    assert names_of(tmp_path)["1_a"] == {"mse_sr", "gan_sr", "gt_mask", "desra_mask"}
    assert set(names_of(tmp_path)) == {"1_a", "2_a", "11_a"}


def test_a_coco_file_stands_for_masks(tmp_path) -> None:
    touch(tmp_path, "GAN-SR/a.png", "GAN-SR/d/b.png", "MSE-SR/a.png", "MSE-SR/d/b.png", "GAN-SR/c.png")
    images = [
        {"id": number, "file_name": name, "width": 5, "height": 4}
        for number, name in enumerate(["GAN-SR/a.png", "images/d/b.jpg", "d/gone.png"])
    ]
    (tmp_path / "annotations.json").write_text(json.dumps({"images": images}))
    data_set = read_data_set(tmp_path, {}, tmp_path / "out")
    assert {example.name: example.coco_mask.width for example in data_set.examples} == {"a": 5, "d/b": 5}
    (failure,) = data_set.failures
    assert "annotations.json: d/gone: has no image of its name in" in str(failure)
    assert [path.name for path in data_set.unjudged] == ["c.png"]
    assert read_data_set(tmp_path / "annotations.json", {}, tmp_path / "out").examples == data_set.examples
    named = {"gan_sr": tmp_path / "GAN-SR", "mse_sr": tmp_path / "MSE-SR"}
    (tmp_path / "far").mkdir()
    (tmp_path / "annotations.json").rename(tmp_path / "far" / "mine.json")
    assert len(read_data_set(tmp_path / "far" / "mine.json", named, tmp_path / "out").examples) == 2


def test_a_coco_file_of_other_folders_and_boxes(tmp_path) -> None:
    """The file is read as one of corrected masks."""
    touch(tmp_path, *(f"{role}/{name}.png" for role in ("GAN-SR", "MSE-SR") for name in ("a/x", "b/x", "b/ü")))
    files = ["C:\\\\data\\\\a\\\\x.png", "/data/b/x.png", "0123abcd-u\u0308.png"]
    images = [{"id": str(n), "file_name": name, "width": 5.0, "height": "4"} for n, name in enumerate(files)]
    annotations = [{"id": 1, "image_id": 0, "bbox": [1, 1, 2, 2], "segmentation": None}]
    content = {"images": images, "annotations": annotations}
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    found = {example.name: example.coco_mask for example in read_data_set(tmp_path, {}, tmp_path / "out").examples}
    assert {name: mask.kinds for name, mask in found.items()} == {"a/x": ("box",), "b/x": (), "b/ü": ()}
    images[0]["file_name"] = "x.png"
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match=r"annotations\.json, x\.png: may be of a/x or of b/x; write its path below"):
        read_data_set(tmp_path, {}, tmp_path / "out")


def test_two_images_of_a_coco_file_cannot_be_one(tmp_path) -> None:
    touch(tmp_path, "GAN-SR/a.png", "MSE-SR/a.png")
    images = [{"id": number, "file_name": f"{number}/a.png", "width": 5, "height": 4} for number in range(2)]
    (tmp_path / "annotations.json").write_text(json.dumps({"images": images}))
    with pytest.raises(UsageError, match=r"1/a\.png: is a again"):
        read_data_set(tmp_path, {}, tmp_path / "out")


def test_missing_files_are_reported(tmp_path) -> None:
    touch(tmp_path, *(f"{role}/{name}.png" for role in ("MSE-SR", "GAN-SR", "GT-Mask") for name in "ab"))
    touch(tmp_path, "GAN-SR/c.png", "GAN-SR/d.png", "GT-Mask/d.png", "GT-Mask/e.png", "GAN-SR/a.jpg")
    data_set = read_data_set(tmp_path, {}, tmp_path / "out")
    assert [example.name for example in data_set.examples] == ["b"]
    assert [path.name for path in data_set.unjudged] == ["c.png"]
    told = sorted(str(failure).replace(str(tmp_path), "") for failure in data_set.failures)
    assert told == [
        "/GAN-SR/d.png: has no image of its name in /MSE-SR; add it, or remove this one",
        "/GT-Mask/e.png: has no image of its name in /GAN-SR; add it, or remove the mask",
        "a: has two candidates among the gan_sr files: a.jpg and a.png; keep one of them",
    ]


def test_pairs_need_no_masks(tmp_path) -> None:
    touch(tmp_path, "m/a.png", "g/a.png", "m/b.png", "g/b.png", "x/a.png")
    folders = {"mse_sr": tmp_path / "m", "gan_sr": tmp_path / "g", "exclude": tmp_path / "x"}
    found = read_data_set(None, folders, tmp_path / "out").examples
    assert {example.name: set(example.files) for example in found} == {
        "a": {"mse_sr", "gan_sr", "exclude"}, "b": {"mse_sr", "gan_sr"}}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_folders_that_are_no_data_set_are_refused(tmp_path, name) -> None:
    complete = ("MSE-SR/a.png", "GAN-SR/a.png", "GT-Mask/a.png")
    touch(tmp_path, "file.txt", "broken.json", *complete, "empty/x.txt", "no_mse/GAN-SR/a.png", "no_mse/GT-Mask/a.png")
    touch(tmp_path / "no_truth", *complete[:2])
    touch(tmp_path / "twice", *complete, "gan_sr/a.png")
    touch(tmp_path / "both", "mse_sr/a.png", "gan_sr/a.png", "gt_mask/a.png", "annotations.json")
    touch(tmp_path / "no_images", *complete[:2], "GT-Mask/a.txt")
    touch(tmp_path / "strangers", "MSE-SR/a.png", "GAN-SR/a.png", "annotations.json")
    (tmp_path / "strangers" / "annotations.json").write_text('{"images": []}')
    touch(tmp_path / "half", *(f"LDL/{file}" for file in complete), "SwinIR/GAN-SR/a.png", "SwinIR/GT-Mask/a.png")
    with pytest.raises(UsageError) as raised:
        read_data_set(tmp_path / name, {}, tmp_path / "out")
    assert REFUSALS[name] in str(raised.value)
    assert name in str(raised.value)


def test_a_set_without_any_usable_image_reports_the_first_failure(tmp_path) -> None:
    touch(tmp_path, "MSE-SR/x.png", "GAN-SR/a.png", "GAN-SR/b.png", "GT-Mask/a.png", "GT-Mask/b.png")
    with pytest.raises(UsageError, match=r"a.png: has no image of its name in .* \(1 more file fails\)"):
        read_data_set(tmp_path, {}, tmp_path / "out")


def test_a_folder_of_labels_has_one_for_each_part(tmp_path) -> None:
    touch(tmp_path, "LDL/MSE-SR/a.png", "LDL/GAN-SR/a.png", "LDL/GT-Mask/a.png", "labels/other/a.png")
    with pytest.raises(UsageError, match=r"--labels: .* has no folder LDL"):
        read_data_set(tmp_path, {"labels": tmp_path / "labels"}, tmp_path / "out")


def test_results_inside_the_data_set_are_not_read(tmp_path) -> None:
    touch(tmp_path, "MSE-SR/a.png", "GAN-SR/a.png", "GT-Mask/a.png", "GAN-SR/out/masks/desra/a.png")
    data_set = read_data_set(tmp_path, {}, tmp_path / "GAN-SR" / "out")
    assert [example.name for example in data_set.examples] == ["a"]
    assert not data_set.unjudged


def test_no_name_is_emptied(tmp_path) -> None:
    """A whole name may be the ending of all others."""
    touch(tmp_path, *(f"{role}/{name}.png" for role in ("GAN-SR", "MSE-SR") for name in ("_out", "1_out")))
    touch(tmp_path, "GT-Mask/1.png", "GT-Mask/3.png")
    with pytest.raises(UsageError, match="has no image of its name"):
        read_data_set(tmp_path, {}, tmp_path / "out")
