"""``desra benchmark`` as a user meets it."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from deployments.commands.runs import Workspace
from desra_core.benchmarking import plan
from desra_core.benchmarking.injection import KINDS
from desra_core.detection.detectors.trained import Trees, as_document
from desra_core.files import write_json
from desra_core.images.codec import read_image
from desra_core.settings.models import Benchmarking
from tests.benchmark_sets import FAST, judge, make_plain, write
from tests.conftest import refusal

SYNTHETIC = ("synthetic", "--mse-sr", "set/mse_sr", "--gan-sr")


def everything(folder: Path) -> dict[str, tuple[int, int]]:
    status = {str(path): path.stat() for path in folder.rglob("*") if path.is_file()}
    return {path: (found.st_ino, found.st_mtime_ns) for path, found in status.items() if not path.endswith("lock")}


@pytest.fixture(scope="module")
def plain(make_pairs, tmp_path_factory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("plain")
    return folder, make_plain(folder, make_pairs, 4)


def test_a_data_set_is_judged_by_all_methods(plain, tmp_path, desra, desra_here) -> None:
    root, names = tmp_path / "set", plain[1]
    shutil.copytree(plain[0], root)
    write(root / "gt_mask" / f"{names[2]}.png", np.arange(256, dtype=np.uint8).reshape(16, 16))
    output = tmp_path / "out"
    command = ("benchmark", root, "--output", output, "--min-area", 100, "--workers", 2)
    run = desra(*command)
    assert run.returncode == 1, run.stderr
    assert "3 of 4 images judged, 1 failed" in run.stdout
    assert f"failed: {root / 'gt_mask' / names[2]}.png: is not binary" in run.stderr
    assert "Traceback" not in run.stderr
    header, *rows = run.stdout[run.stdout.index("method ") :].splitlines()
    assert header.split() == ["method", "images", "IoU", "precision", "recall", "F1", "s/MP"] or "both empty" in header
    told = [row.split("  ")[0] for row in rows[:9]]
    assert told == [
        "desra",
        "desra, weight 1",
        "ldl, 0.01",
        "ldl, 0.005",
        "ldl, 0.001",
        "ssim",
        "niqe",
        "colour",
        "flip",
    ]
    assert "Published, on the authors' data" in run.stdout
    document = json.loads((output / "benchmark.json").read_bytes())
    assert [row["method"] for row in document["table"]] == told
    assert all(row["seconds_per_megapixel"] > 0 for row in document["table"])

    before = everything(output)
    again = desra_here(*command)
    assert again.returncode == 1
    assert again.stdout.startswith("nothing to do")
    assert run.stdout.endswith(again.stdout.partition("\n")[2])
    assert everything(output) == before
    shutil.copy(plain[0] / "gt_mask" / f"{names[2]}.png", root / "gt_mask" / f"{names[2]}.png")
    asked = Benchmarking(dataset=root, output=output, min_area="100")
    assert [image.names for image, _ in plan(asked).missing()] == [(names[2],)]


def test_known_results_are_printed_without_servers(plain, tmp_path, desra_here) -> None:
    judge(plain[0], tmp_path / "out")
    command = ("benchmark", plain[0], "--output", tmp_path / "out", "--min-area", 100)
    run = desra_here(*command, "--methods", FAST)
    assert run.returncode == 0
    assert "4 of 4 images judged, 0 failed" in run.stdout
    fewer = desra_here(*command, "--methods", "ldl")
    assert "desra," not in fewer.stdout.partition("Published")[0]
    assert fewer.returncode == 0


def test_a_synthetic_benchmark_prints_one_screen(plain, tmp_path, desra, desra_here) -> None:
    pairs = ("--mse-sr", plain[0] / "mse_sr", "--gan-sr", plain[0] / "gan_sr")
    command = ("benchmark", "synthetic", *pairs, "--output", tmp_path / "out", "--min-area", 400, "--methods", FAST)
    run = desra(*command)
    assert run.returncode == 0, run.stderr
    again = desra_here(*command)
    assert again.returncode == 0
    assert again.stdout.startswith("nothing to do")
    assert run.stdout.endswith(again.stdout.partition("\n")[2])
    lines = run.stdout.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines[:-4])) <= 120
    assert lines[-5] == "The files have the tables by strength, size, texture and price:"
    document = json.loads((tmp_path / "out/synthetic.json").read_bytes())
    header, *rows = lines[lines.index(next(line for line in lines if line.startswith("method "))) :]
    kinds = {kind.replace("_", " "): kind for kind in KINDS}
    assert re.split(" {2,}", header) == ["method", "all", *kinds, "false/MP", "clean %"]
    for method, row in zip(document["methods"], rows, strict=False):
        name, every, *recalls, regions, clean = re.split(" {2,}", row)
        assert (name, every) == (method["method"], f"{100 * method['recall']:.0f}")
        cells = [each for each in document["recall"] if each["method"] == name]
        for kind, told in zip(kinds.values(), recalls, strict=True):
            found, counted = (sum(each[key] for each in cells if each["kind"] == kind) for key in ("found", "counted"))
            assert told == f"{100 * found / counted:.0f}"
        assert regions == f"{method['false_regions_per_megapixel']:.2f}"
        assert clean == f"{100 * method['false_pixel_share']:.2f}"
    assert all(Path(line.split()[-1]).is_file() for line in lines[-4:])
    assert "Recall at a price" in (tmp_path / "out/synthetic.md").read_text()


def test_the_synthetic_benchmark_has_its_own_flags(desra_here) -> None:
    own, shared = (desra_here("benchmark", *more, "--help").stdout for more in (["synthetic"], []))
    assert "benchmark synthetic [OPTIONS]\n" in own
    assert all(flag in own and flag not in shared for flag in ("--seed", "--exclude"))
    assert "DATASET" not in own
    lacking = desra_here("benchmark", "synthetic", "--output", "out")
    assert lacking.returncode == 2
    assert "Missing option '--mse-sr'" in lacking.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("nowhere",), "nowhere: does not exist"),
        (("empty",), "empty: is no data set; name a folder with MSE-SR, GAN-SR and GT-Mask in it"),
        (("set", "--methods", "desra,niqqe"), "niqqe: is no method"),
        (("set", "--methods", ","), "--methods: , is not accepted (names no method)"),
        (("set", "--min-area", "most"), "--min-area: most is not accepted"),
        (("set", "--segmenter", "labels:x"), "--segmenter: labels:x is not accepted"),
        (("set", "--weights", "w.csv"), "class weights cannot be read"),
        ((*SYNTHETIC, "empty"), "empty: holds no images"),
        (
            (*SYNTHETIC, "set/gan_sr", "--min-area", "1%"),
            "--min-area: 1% is not accepted",
        ),
    ],
)
def test_bad_input_is_refused_in_a_line(plain, tmp_path, desra_here, monkeypatch, arguments, told) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "set").symlink_to(plain[0])
    run = desra_here("benchmark", *arguments, "--output", "out")
    assert told in refusal(run)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "set"]


def test_the_folder_of_something_else_is_left_alone(plain, tmp_path, desra_here) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    assert "is a folder with other things in it" in refusal(
        desra_here("benchmark", plain[0], "--output", tmp_path / "photos", "--methods", FAST)
    )
    Workspace(tmp_path / "ws").create()
    (tmp_path / "ws" / "manifest.parquet").touch()
    before = everything(tmp_path)
    assert "is a workspace of images" in refusal(desra_here("benchmark", plain[0], "--output", tmp_path / "ws"))
    assert everything(tmp_path) == before


def test_heat_maps_and_a_learned_detector_are_judged_by_the_command(plain, tmp_path, desra) -> None:
    root, names = plain
    folder = tmp_path / "set"
    for name in names:
        for role, tag in (("mse_sr", "RF"), ("gan_sr", "SR")):
            write(folder / f"{name}@{tag}@.png", read_image(root / role / f"{name}.png"))
        truth = read_image(root / "gt_mask" / f"{name}.png")
        np.save(tmp_path / "map.npy", (truth[:, :, 0] > 0).astype(np.float32))
        (folder / f"{name}@SR@.npy.gz").write_bytes(gzip.compress((tmp_path / "map.npy").read_bytes()))
    shutil.copytree(root / "gt_mask", folder / "GT-Mask")
    trees = Trees(*map(np.array, ([0], [0.0], [0], [0], [0.5], [0])), baseline=0.0)
    write_json(tmp_path / "mine.json", as_document(trees, 1.0, {}))
    run = desra(
        "benchmark", folder, "--output", tmp_path / "out", "--methods", tmp_path / "mine.json", "--min-area", 100
    )
    assert run.returncode == 0, run.stderr
    rows = json.loads((tmp_path / "out/benchmark.json").read_text())["table"]
    assert [row["method"] for row in rows] == ["mine", "heat map SR"]
    assert all(row["images"] > 0 for row in rows)
    assert json.loads((tmp_path / "mine.json").read_text())["kind"] == "desra-detector"
