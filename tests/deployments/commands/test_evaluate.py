"""``desra evaluate`` as a user runs it: what it prints and writes, its exit codes, and every refusal in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest

from desra_core.images.codec import encode_mask, encode_png
from desra_core.workspace import Workspace
from desra_core.workspace.human_masks import HUMAN_MASKS
from desra_core.workspace.manifest import read_manifest, scan
from desra_core.workspace.matching import Sources
from tests.conftest import Desra, assert_told_in_help, refusal

ROOT = Path(__file__).resolve().parents[3]


def put(path: Path, *corners: tuple[int, int], shape: tuple[int, int] = (60, 90)) -> None:
    """A mask with squares of 10 px."""
    mask = np.zeros(shape, bool)
    for top, left in corners:
        mask[top : top + 10, left : left + 10] = True
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_mask(mask))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two pairs: one with a region right, one wrong and one missed, and one with nothing on either side."""
    put(tmp_path / "masks/a.png", (10, 10), (10, 40))
    put(tmp_path / "gt/a.png", (10, 10), (40, 40))
    put(tmp_path / "masks/set/b.png")
    put(tmp_path / "gt/set/b.png")
    return tmp_path


def folders(data: Path) -> list[object]:
    return ["evaluate", "--masks", data / "masks", "--gt", data / "gt"]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def numbers(run: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """Read the JSON document that is all of the output; NaN and infinity are no JSON."""

    def refused(constant: str) -> None:
        raise AssertionError(constant)

    found: dict[str, Any] = json.loads(run.stdout, parse_constant=refused)
    return found


def test_the_published_numbers(desra_here: Desra, shared_data: Path) -> None:
    pairs = shared_data / "pairs"
    published = json.loads((pairs / "metrics.json").read_text())
    masks = pairs / published["predictions"]
    command = ("evaluate", "--masks", masks, "--gt", pairs / "gt_mask")
    run = desra_here(*command)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.splitlines() == [
        "8 images judged",
        "",
        "measure                                        value   95 % interval",
        "IoU: mean over 8 images                        0.3327  0.265–0.405",
        "precision: 408 of 656 detected regions right   0.6220  0.494–0.828",
        "recall: 244 of 775 ground-truth regions found  0.3148  0.115–0.516",
        "F1: of precision and recall                    0.4181  0.199–0.534",
        "pixel F1: of all pixels                        0.5311  0.427–0.591",
        "pixel F1: mean over 8 images                   0.4904  0.415–0.570",
        "flagged: share of all pixels                   0.2060  0.065–0.373",
    ]
    found = numbers(desra_here(*command, "--json"))
    assert {key: found[key] for key in ("iou", "precision", "recall")} == published["published_scripts"]
    assert 0 < found["f1"] < 1
    for measure in ("iou", "precision", "recall", "f1"):
        low, high = found["intervals"][measure]
        assert f"{found[measure]:.4f}  {low:.3f}–{high:.3f}" in run.stdout
    for count in ("images", "detected", "right", "marked", "found"):
        assert f"{found[count]} " in run.stdout


def test_the_printed_scores_and_the_written_files(desra_here: Desra, data: Path) -> None:
    before = contents(data)
    run = desra_here(*folders(data), "--output", data / "out")
    assert run.returncode == 0
    assert run.stdout.splitlines() == [
        "2 images judged",
        "",
        "measure                                        value   95 % interval",
        "IoU: mean over 1 image                         0.3333  –",
        "precision: 1 of 2 detected regions right       0.5000  –",
        "recall: 1 of 2 ground-truth regions found      0.5000  –",
        "F1: of precision and recall                    0.5000  –",
        "pixel F1: of all pixels                        0.5000  –",
        "pixel F1: mean over 1 image                    0.5000  –",
        "flagged: share of all pixels                   0.0250  0.000–0.050",
        "IoU: with 1 pair of empty masks, as agreement  0.6667  0.333–1.000",
        f"tables   {data / 'out'}",
        f"page     {data / 'out/evaluation.html'}",
    ]
    assert "taken for the image's, so 5 px a side are cropped (--size)" in run.stderr
    assert {path.name for path in (data / "out").iterdir()} == {
        "images.csv", "regions.csv", "detections.csv", "evaluation.json", "evaluation.html",
    }  # fmt: skip
    assert {path: data for path, data in contents(data).items() if "out" not in path.parts} == before
    again = desra_here(*folders(data), "--output", data / "out", "--json")
    assert numbers(again) == json.loads((data / "out/evaluation.json").read_text())


def test_undefined_is_said_and_null(desra_here: Desra, data: Path) -> None:
    for folder in ("masks", "gt"):
        (data / folder / "a.png").unlink()
    run = desra_here(*folders(data))
    assert run.returncode == 0
    assert [line.rstrip("– ") for line in run.stdout.splitlines()[3:11]] == [
        "IoU: undefined, no mask and no ground truth marks anything",
        "precision: undefined, no region was detected",
        "recall: undefined, the ground truth marks no region",
        "F1: undefined, precision or recall is undefined",
        "pixel F1: undefined, no mask and no ground truth marks anything",
        "pixel F1: undefined, no mask and no ground truth marks anything",
        "flagged: share of all pixels                                     0.0000",
        "IoU: with 1 pair of empty masks, as agreement                    1.0000",
    ]
    found = numbers(desra_here(*folders(data), "--json"))
    assert [found[key] for key in ("iou", "precision", "recall", "f1")] == [None] * 4
    assert (found["iou_with_empty"], found["empty_pairs"]) == (1, 1)


def test_missing_twins_and_files_that_fail(desra_here: Desra, data: Path) -> None:
    """Listed and never touched; missing twins are no failure, what cannot be judged is one of that file alone."""
    for index in range(25):
        put(data / f"gt/more/{index:02d}.png")
    put(data / "masks/alone.png")
    run = desra_here(*folders(data), "--json")
    assert run.returncode == 0
    assert f"missing: {data / 'masks/alone.png'}: has no ground truth" in run.stderr
    assert run.stderr.count(": has no mask") == 19
    assert "and 6 more: --json lists them all" in run.stderr
    found = numbers(run)
    assert found["without_ground_truth"] == {"alone": str(data / "masks/alone.png")}
    assert len(found["without_mask"]) == 25
    put(data / "gt/alone.png", shape=(61, 90))
    put(data / "masks/more/00.png", (10, 10))
    (data / "gt/more/00.png").write_bytes(encode_png(np.arange(5400).reshape(60, 90).astype(np.uint8)))
    before = contents(data)
    run = desra_here(*folders(data))
    assert run.returncode == 1
    assert run.stdout.startswith("2 images judged, 2 failed\n")
    failed = [line for line in run.stderr.splitlines() if line.startswith("failed: ")]
    assert f"{data / 'masks/alone.png'}: is 90x60 but {data / 'gt/alone.png'} is 90x61; masks have" in failed[0]
    assert f"{data / 'gt/more/00.png'}: is not binary" in failed[1]
    assert len(failed) == 2
    assert contents(data) == before


def test_jpeg_masks_are_warned_about(desra_here: Desra, data: Path) -> None:
    mask = cv2.imread(str(data / "masks/a.png"), cv2.IMREAD_GRAYSCALE)
    (data / "masks/a.png").unlink()
    cv2.imwrite(str(data / "masks/a.jpg"), mask)
    run = desra_here(*folders(data), "--json")
    assert run.returncode == 0
    assert "warning: 1 mask is JPEG or lossy WebP, thresholded at half: save masks as PNG\n" in run.stderr
    assert numbers(run)["lossy"] == [str(data / "masks/a.jpg")]


def test_classes(desra_here: Desra, data: Path) -> None:
    classes = np.zeros((60, 90), np.uint8)
    classes[:, 30:] = 12
    (data / "labels").mkdir()
    (data / "labels/a.png").write_bytes(encode_png(classes))
    command = (*folders(data), "--labels", data / "labels")
    run = desra_here(*command)
    assert run.stdout.splitlines()[16:] == [
        "class   IoU    precision       recall          pixel precision  pixel recall",
        "wall    1.000  1.000 (1 of 1)  1.000 (1 of 1)  1.000            1.000",
        "person  0.000  0.000 (0 of 1)  0.000 (0 of 1)  0.000            0.000",
    ]
    assert "warning: 1 image without class labels is left out by class" in run.stderr
    assert [row["name"] for row in numbers(desra_here(*command, "--json"))["per_class"]] == ["wall", "person"]


def test_severity_labels(desra_here: Desra, data: Path) -> None:
    """The table that comes out, filled in, goes in again."""
    desra_here(*folders(data), "--output", data / "out")
    rows = (data / "out/regions.csv").read_text().splitlines()
    assert rows[0] == "image,region,x,y,width,height,area,share_inside,class,found,noticed"
    (data / "noticed.csv").write_text("\n".join([rows[0], rows[1] + "0.7", rows[2] + "0.1"]))
    command = [*folders(data), "--severity", data / "noticed.csv"]
    run = desra_here(*command)
    assert run.returncode == 0
    assert run.stdout.splitlines()[12:24] == [
        "Prominent regions",
        "",
        "Of 2 rated regions, those that at least 50 % of the viewers noticed. The others do not count, nor detected "
        "regions that are right only by them.",
        "",
        "measure                                        value   95 % interval",
        "IoU: mean over 1 image                         0.5000  –",
        "precision: 1 of 2 detected regions right       0.5000  –",
        "recall: 1 of 1 ground-truth region found       1.0000  –",
        "F1: of precision and recall                    0.6667  –",
        "pixel F1: of all pixels                        0.6667  –",
        "pixel F1: mean over 1 image                    0.6667  –",
        "flagged: share of all pixels                   0.0253  0.000–0.051",
    ]
    found = numbers(desra_here(*command, "--json"))
    assert_told_in_help(desra_here, "evaluate", found)
    prominent = found["prominent"]
    assert (prominent["noticed_by_at_least"], prominent["rated_regions"], prominent["recall"]) == (0.5, 2, 1)
    run = desra_here(*command, "--kappa", "0.4", "--dilate", "2")
    every, prominent = run.stdout.split("Prominent regions")
    at_kappa = "(at least 40 % in the mask, widened by 2 px)"
    assert f"found: 1 of 2 ground-truth regions {at_kappa}  0.5000  –" in every
    assert f"found: 1 of 1 ground-truth region {at_kappa}  1.0000  –" in prominent
    run = desra_here(*command, "--prominent", "0.05")
    assert "recall: 1 of 2 ground-truth regions found      0.5000" in run.stdout.partition("Prominent regions")[2]


def test_severity_labels_that_somebody_filled_in_are_not_lost(desra_here: Desra, data: Path) -> None:
    command = [*folders(data), "--output", data / "out"]
    assert desra_here(*command).returncode == 0
    assert desra_here(*command).returncode == 0  # nothing is filled in yet
    table = data / "out/regions.csv"
    rows = table.read_text().splitlines()
    table.write_text("\n".join([rows[0], rows[1] + "0.7", *rows[2:]]))
    filled = table.read_bytes()
    assert "regions.csv: holds shares of viewers that a person filled in" in refusal(desra_here(*command))
    assert table.read_bytes() == filled
    assert desra_here(*command, "--severity", table).returncode == 0
    assert ",0.7" in table.read_text()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("a,1,1\na,1,1", "noticed.csv, line 3: rates region 1 of a a second time"),
        ("a,3,1", "noticed.csv, line 2: names region 3 of a, which has 2"),
        ("z,1,1", "noticed.csv, line 2: names z, an image without ground truth"),
        ("a,1,2", "noticed.csv, line 2: has the share '2'"),
    ],
)
def test_severity_labels_that_do_not_fit(desra_here: Desra, data: Path, rows: str, message: str) -> None:
    (data / "noticed.csv").write_text(f"image,region,noticed\n{rows}\n")
    run = desra_here(*folders(data), "--severity", data / "noticed.csv", "--output", data / "o")
    assert message in refusal(run)
    assert not (data / "o").exists()


def test_refusals(desra_here: Desra, data: Path) -> None:
    (data / "empty").mkdir()
    masks, gt = ["--masks", data / "masks"], ["--gt", data / "gt"]
    before = contents(data)
    for arguments, message in (
        ([], "--masks: is not given; give --masks and --gt, or --workspace"),
        (masks, "--gt: is not given"),
        ([*masks, *gt, "--workspace", data / "ws"], "--workspace: and --masks are both given; leave one out"),
        (["--workspace", data / "ws"], "ws: has no masks; name the workspace of desra detect or mine"),
        (["--masks", data / "empty", *gt], "empty: holds no images; name a folder of mask files"),
        ([*masks, "--gt", data / "empty"], "empty: holds no images; name a folder of ground-truth files"),
        (["--masks", data / "nowhere", *gt], "nowhere: is no folder"),
        ([*masks, "--gt", data / "gt/set"], "has no twin, and neither has any other mask"),
        ([*masks, *gt, "--output", data / "masks/a.png"], "a.png: is no folder; name a folder for --output"),
        ([*masks, *gt, "--labels", data / "nowhere"], "nowhere: is no folder"),
        ([*masks, *gt, "--severity", data / "none.csv"], "none.csv: cannot be read (No such file or directory)"),
    ):
        run = desra_here("evaluate", *arguments)
        assert message in refusal(run), arguments
        assert run.stdout == ""
    assert contents(data) == before


def test_masks_by_people_in_a_workspace(desra_here: Desra, tmp_path: Path) -> None:
    for role in ("mse_sr", "gan_sr"):
        for index, name in enumerate("abc"):
            (tmp_path / role).mkdir(exist_ok=True)
            (tmp_path / role / f"{name}.png").write_bytes(encode_png(np.full((60, 90, 3), 50 * index, np.uint8)))
    workspace = Workspace(tmp_path / "ws")
    workspace.create()
    scan(Sources(mse_sr=tmp_path / "mse_sr", gan_sr=tmp_path / "gan_sr"), workspace, shard_size=10)
    manifest = read_manifest(workspace)
    assert manifest is not None
    for name in "abc":
        put(workspace.mask(name), (10, 10))
    put(workspace.human_mask("a"), (10, 10), (40, 40))
    put(tmp_path / "gt/a.png")
    put(tmp_path / "gt/b.png", (40, 40))
    row = {"name": "a", "id": manifest["id"][0].as_py(), "gan_sr_key": None, "pixels": 200, "regions": 2}
    workspace.publish_table(workspace.human_manifest, pa.Table.from_pylist([row], HUMAN_MASKS))
    before = contents(workspace.root)
    run = desra_here("evaluate", "--workspace", workspace.root)
    assert "\nIoU: mean over 1 image                     0.5000  –\n" in run.stdout
    assert run.stdout.endswith("people   1 image with a human mask\n")
    assert run.stderr.splitlines() == [
        "warning: one image was judged: these numbers may not hold for other images",
        "warning: 2 images without a human mask: not judged",
    ]
    run = desra_here("evaluate", "--workspace", workspace.root, "--gt", tmp_path / "gt", "--output", tmp_path / "out")
    assert "1 of 2 detected regions right" in run.stdout
    assert "1 of 3 ground-truth regions found" in run.stdout
    assert "GAN-SR of b" in (tmp_path / "out/evaluation.html").read_text()
    assert contents(workspace.root) == before


def test_evaluate_needs_no_server_and_no_networks(data: Path) -> None:
    """A process of its own, from the arguments to the page."""
    arguments = ["desra", *map(str, folders(data)), "--output", str(data / "out")]
    code = f"""
import contextlib, sys
from deployments.cli import main
sys.argv = {arguments!r}
with contextlib.suppress(SystemExit):
    main()
heavy = {{'prefect', 'dask', 'distributed', 'torch', 'mmseg', 'mmcv'}}
print('heavy', *heavy & {{name.partition('.')[0] for name in sys.modules}})
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.stdout.splitlines()[-1] == "heavy", run.stderr
    assert (data / "out/evaluation.html").exists()
