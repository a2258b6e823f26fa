"""``desra export`` and ``desra import`` as a user meets them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from desra_core.settings import Mining
from desra_core.workspace import Workspace
from tests.conftest import Desra, refusal
from tests.in_process import process


@pytest.fixture(scope="module")
def mined(make_models, make_photos, tmp_path_factory) -> SimpleNamespace:
    root = tmp_path_factory.mktemp("annotations")
    mse, gan = make_models(root / "models")
    names = make_photos(root / "photos", 3)
    process(Mining(photos=root / "photos", mse_model=mse, gan_model=gan, workspace=root / "ws"))
    return SimpleNamespace(root=root, mse=mse, gan=gan, names=names)


@pytest.fixture
def workspace(mined, tmp_path) -> Workspace:
    return Workspace(Path(shutil.copytree(mined.root / "ws", tmp_path / "ws")))


def mask(path: Path) -> np.ndarray:
    return cv2.imread(str(path), cv2.IMREAD_UNCHANGED)


def test_there_and_back(desra_here: Desra, mined, workspace, tmp_path) -> None:
    out = tmp_path / "out"
    run = desra_here("export", "--workspace", workspace.root, "--format", "labelme", "--output", out)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [
        "2 images with 2 regions exported",
        f"export   {out}",
        f"pictures {out}",
        f"next     labelme {out}; then desra import labelme {out} --workspace {workspace.root}",
    ]
    edited = out / f"{mined.names[1]}.json"
    edited.write_text(json.dumps(json.loads(edited.read_bytes()) | {"shapes": []}))
    run = desra_here("import", "labelme", out, "--workspace", workspace.root)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [
        "1 human mask, 1 of them other than the detector's and 1 without any artifact",
        "regions  0 in 0 images",
        "left out 1 image, whose mask is as exported: it keeps what counts now; --unchanged takes such masks too",
        f"masks    {workspace.human}, which pseudo-GT, finetune, evaluation and calibration prefer",
        "dataset  mask and pseudo-GT of 1 image made again",
        f"next     desra evaluate --workspace {workspace.root}; "
        f"desra finetune --workspace {workspace.root} --output RUN",
    ]
    assert not mask(workspace.human_mask(mined.names[1])).any()
    assert not workspace.human_mask(mined.names[2]).exists()
    run = desra_here("import", "labelme", out, "--workspace", workspace.root, "--unchanged")
    assert run.stdout.splitlines()[:2] == [
        "2 human masks, 1 of them other than the detector's and 1 without any artifact",
        "regions  1 in 1 image: 1 polygon",
    ]
    assert np.array_equal(mask(workspace.human_mask(mined.names[2])), mask(workspace.mask(mined.names[2])))
    models = ("--mse-model", mined.mse, "--gan-model", mined.gan)
    again = desra_here("mine", mined.root / "photos", *models, "--workspace", workspace.root)
    assert "nothing to do: 3 of 3 images done" in again.stdout, again.stderr
    assert "people   2 images with a human mask" in again.stdout
    coco = desra_here("export", "--workspace", workspace.root, "--format", "coco", "--output", out, "--no-images")
    assert f"{mined.names[1]}.json: was edited since it was exported" in refusal(coco)
    coco = desra_here("export", "--workspace", workspace.root, "--format", "coco", "--output", out, "--no-images",
                      "--overwrite", "--all")  # fmt: skip
    assert "2 images with 1 region exported, 2 of them with a human mask" in coco.stdout
    assert "1 clean image left out: desra mine --keep all keeps their pictures" in coco.stderr
    assert f"pictures {workspace.root}/dataset/gan_sr" in coco.stdout
    run = desra_here("import", "coco", out / "annotations.json", "--workspace", workspace.root)
    assert "2 human masks, 1 of them other" in run.stdout


def test_two_of_nine_files_were_edited(desra_here: Desra, mined, workspace, tmp_path) -> None:
    """Images without a human mask follow the detector, to the last byte of the dataset."""
    names = [name for name in mined.names if workspace.dataset("mask", name).exists()]
    shutil.copytree(workspace.root / "dataset", tmp_path / "dataset")
    out = tmp_path / "out"
    desra_here("export", "--workspace", workspace.root, "--format", "labelme", "--output", out)
    run = desra_here("import", "labelme", out, "--workspace", workspace.root)
    assert (run.returncode, run.stdout.splitlines()) == (0, [
        "nothing to import: every mask is as exported",
        "left out 2 images, whose masks are as exported: they keep what counts now; --unchanged takes such masks too",
    ])  # fmt: skip
    assert not workspace.human.exists()
    edited = out / f"{names[0]}.json"
    rectangle = {"label": "artifact", "shape_type": "rectangle", "points": [[1, 1], [9, 9]]}
    document = json.loads(edited.read_bytes())
    edited.write_text(json.dumps(document | {"shapes": [*document["shapes"], rectangle, rectangle]}))
    run = desra_here("import", "labelme", out, "--workspace", workspace.root)
    assert "1 human mask" in run.stdout
    assert "regions  3 in 1 image: 2 rectangles, 1 polygon" in run.stdout
    assert workspace.dataset("mask", names[0]).read_bytes() != (tmp_path / f"dataset/mask/{names[0]}.png").read_bytes()
    run = desra_here("import", "--undo", "--workspace", workspace.root)
    assert run.stdout.splitlines() == [
        "taken back: the masks of 1 image, of which 0 have an earlier mask again",
        "dataset  mask and pseudo-GT of 1 image made again",
        f"masks    {workspace.human}",
    ]
    for path in (tmp_path / "dataset").rglob("*.png"):
        assert (workspace.root / "dataset" / path.relative_to(tmp_path / "dataset")).read_bytes() == path.read_bytes()
    table = "dataset/manifest.parquet"
    assert pq.read_table(workspace.root / table).equals(pq.read_table(tmp_path / table))
    assert not workspace.human_mask(names[0]).exists()
    run = desra_here("import", "--undo", "--workspace", workspace.root)
    assert "holds no import that could be taken back" in refusal(run)


def test_an_image_that_only_a_person_had_marked_leaves_the_dataset(desra_here: Desra, mined, workspace, tmp_path):
    clean = next(name for name in mined.names if not workspace.dataset("mask", name).exists())
    path = tmp_path / f"drawn/{clean}.json"
    path.parent.mkdir(parents=True)
    rectangle = {"label": "artifact", "shape_type": "rectangle", "points": [[1, 1], [9, 9]]}
    path.write_text(json.dumps({"shapes": [rectangle]}))
    desra_here("import", "labelme", tmp_path / "drawn", "--workspace", workspace.root)
    process(Mining(photos=mined.root / "photos", mse_model=mined.mse, gan_model=mined.gan, workspace=workspace.root))
    assert mask(workspace.dataset("mask", clean)).any()
    desra_here("import", "--undo", "--workspace", workspace.root)
    assert not any(workspace.dataset(kind, clean).exists() for kind in ("lr", "mse_sr", "gan_sr", "mask", "pseudo_gt"))
    assert "pending    0" in desra_here("status", "--workspace", workspace.root).stdout


def test_left_out_shapes_are_counted(desra_here: Desra, mined, workspace, tmp_path) -> None:
    size = dict(zip(("height", "width"), mask(workspace.mask(mined.names[0])).shape, strict=True))
    images = [{"id": number, "file_name": f"{name}.png", **size} for number, name in enumerate(mined.names[::2])]
    boxes = [{"bbox": [4, 4, 9, 9], "segmentation": []}, {"segmentation": [[1, 1, 9, 1, 9, 9], [1, 1, 2, 2]]},
             {"bbox": [4, 4, 9, 9], "category_id": 2}]  # fmt: skip
    rows = [{"id": number, "image_id": 0, "category_id": 1} | box for number, box in enumerate(boxes)]
    categories = [{"id": 1, "name": "artifact"}, {"id": 2, "name": "text"}]
    path = tmp_path / "coco.json"
    path.write_text(json.dumps({"images": images, "annotations": rows, "categories": categories}))
    run = desra_here("import", "coco", path, "--workspace", workspace.root)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[1] == "regions  2 in 1 image: 1 box, 1 polygon"
    assert lines[2:4] == [
        "left out 1 outline of fewer than three points, in 1 image",
        "left out 1 region of category text, in 1 image",
    ]


def test_bad_files_cost_a_line_each_and_nothing_changes(desra_here: Desra, mined, workspace, tmp_path) -> None:
    out = tmp_path / "out"
    desra_here("export", "--workspace", workspace.root, "--format", "labelme", "--output", out)
    for name in mined.names[1:]:
        (out / f"{name}.json").write_text("{")
    run = desra_here("import", "labelme", out, "--workspace", workspace.root)
    errors = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert (run.returncode, len(errors), run.stdout) == (2, 2, "")
    assert all("is no JSON; save it again with LabelMe, or remove it" in line for line in errors)
    assert run.stderr.splitlines()[-1] == "nothing was imported"
    assert not workspace.human.exists()


def test_images_that_wait_for_a_run_are_counted(desra_here: Desra, mined, workspace, tmp_path) -> None:
    path = tmp_path / f"drawn/{mined.names[0]}.json"
    path.parent.mkdir(parents=True)
    rectangle = {"label": "artifact", "shape_type": "rectangle", "points": [[1, 1], [9, 9]]}
    path.write_text(json.dumps({"shapes": [rectangle]}))
    run = desra_here("import", "labelme", tmp_path / "drawn", "--workspace", workspace.root)
    assert "next     desra mine, again: it makes the pictures of 1 image to train on" in run.stdout
    assert "pending    1" in desra_here("status", "--workspace", workspace.root).stdout


def test_commands_that_cannot_be_carried_out(desra_here: Desra, workspace, tmp_path) -> None:
    export = ("export", "--output", tmp_path / "out", "--workspace")
    assert "--no-images: and --format labelme are both given" in refusal(
        desra_here(*export, workspace.root, "--format", "labelme", "--no-images")
    )
    assert "is no workspace with a run in it" in refusal(desra_here(*export, tmp_path, "--format", "coco"))
    assert "is no workspace with a run in it" in refusal(desra_here("import", "coco", "x", "--workspace", tmp_path))
    assert "lies inside the workspace" in refusal(
        desra_here("export", "--workspace", workspace.root, "--format", "coco", "--output", workspace.root / "out")
    )
    assert desra_here("import", "yolo", "x", "--workspace", workspace.root).returncode == 2
    assert "import: lacks what to bring" in refusal(desra_here("import", "coco", "--workspace", workspace.root))
    assert "and something to import are both given" in refusal(
        desra_here("import", "coco", "x", "--undo", "--workspace", workspace.root)
    )


def test_an_unreadable_image_is_left_out(desra_here: Desra, mined, workspace, tmp_path) -> None:
    workspace.dataset("gan_sr", mined.names[1]).write_bytes(b"")
    run = desra_here("export", "--workspace", workspace.root, "--format", "labelme", "--output", tmp_path / "out")
    assert run.returncode == 1
    assert run.stdout.startswith("1 image with 1 region exported, 1 left out\n")
    (line,) = [line for line in run.stderr.splitlines() if line.startswith("failed: ")]
    assert (
        f"{mined.names[1]}.png: is not as it was written; find and mend all such files with desra verify --repair"
        in line
    )
