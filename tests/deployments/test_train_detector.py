"""``desra train-detector``: from a data set, a workspace and clean pairs, to a run with what was learned."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from desra_core.detection.detectors import load_detector
from desra_core.evaluation.mask_files import read_mask
from desra_core.images.codec import encode_mask, encode_png
from desra_core.learning import detector
from desra_core.workspace import Workspace
from tests.conftest import Desra, refusal

ROOM = (slice(60, 120), slice(60, 140))


def written(folder: Path, name: str, data: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.png").write_bytes(data)


@pytest.fixture(scope="module")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pairs, of which four have a shifted tint in one place, which D cannot see."""
    root = tmp_path_factory.mktemp("data_set")
    for number in range(6):
        rng = np.random.default_rng(number)
        ground = np.clip(120 + np.cumsum(rng.normal(0, 2, (200, 240, 3)), axis=1), 0, 215).astype(np.uint8)
        gan_sr = np.clip(ground + rng.normal(0, 4, ground.shape), 0, 255).astype(np.uint8)
        mask = np.zeros(ground.shape[:2], np.bool_)
        if number < 4:
            mask[ROOM] = True
            gan_sr[ROOM] += np.array([40, 0, 0], np.uint8)
        written(root / "MSE-SR", f"image{number}", encode_png(ground))
        written(root / "GAN-SR", f"image{number}", encode_png(gan_sr))
        written(root / "GT-Mask", f"image{number}", encode_mask(mask))
    return root


def told(desra: Desra, *arguments: str, code: int = 0) -> dict:
    run = desra("train-detector", *arguments, "--json")
    assert run.returncode == code, run.stderr
    return json.loads(run.stdout)


def succeed(run: subprocess.CompletedProcess[str]) -> None:
    assert run.returncode == 0, run.stderr


def test_a_data_set_gives_a_detector_that_runs(data_set, tmp_path, desra) -> None:
    output = tmp_path / "mine.json"
    numbers = told(desra, str(data_set), "--output", str(output))
    assert numbers["images"] == 6
    assert numbers["recall"] > 0.5
    assert numbers["failures"] == []
    assert numbers["threshold"] == load_detector(str(output)).threshold
    origin = json.loads(output.read_text())["origin"]
    assert {name: numbers[name] for name in origin} == origin
    results = ("--mse-sr", str(data_set / "MSE-SR"), "--gan-sr", str(data_set / "GAN-SR"), "--min-area", "1000")
    succeed(desra("detect", *results, "--workspace", str(tmp_path / "ws"), "--method", str(output)))
    succeed(desra("detect", *results, "--workspace", str(tmp_path / "ws-desra")))
    mask = read_mask(Workspace(tmp_path / "ws").mask("image1"))
    assert mask[ROOM].mean() > 0.8
    assert not read_mask(Workspace(tmp_path / "ws-desra").mask("image1"))[ROOM].any()


def test_human_masks_of_a_workspace_teach(data_set, tmp_path, desra) -> None:
    results = ("--mse-sr", str(data_set / "MSE-SR"), "--gan-sr", str(data_set / "GAN-SR"))
    workspace = str(tmp_path / "ws")
    succeed(desra("detect", *results, "--workspace", workspace))
    nothing = desra("train-detector", "--workspace", workspace, "--output", str(tmp_path / "a.json"))
    assert "the masks: have 0 marked" in refusal(nothing)
    for number in range(6):
        # As labelme, a rectangle holds the pixels from its corners on.
        shape = {"label": "artifact", "shape_type": "rectangle", "points": [[60, 60], [139, 119]]}
        document = {"imagePath": str(data_set / "GAN-SR" / f"image{number}.png"), "imageHeight": 200, "imageWidth": 240,
                    "shapes": [shape] if number < 4 else []}  # fmt: skip
        written(tmp_path / "labels", f"image{number}", json.dumps(document).encode())
        (tmp_path / "labels" / f"image{number}.png").rename(tmp_path / "labels" / f"image{number}.json")
    succeed(desra("import", "labelme", str(tmp_path / "labels"), "--workspace", workspace))
    numbers = told(desra, "--workspace", workspace, "--output", str(tmp_path / "a.json"))
    by_files = told(desra, str(data_set), "--output", str(tmp_path / "b.json"))
    assert [numbers[name] for name in ("images", "marked")] == [by_files[name] for name in ("images", "marked")]


def test_artifacts_are_injected_into_clean_pairs(data_set, tmp_path, desra_here, monkeypatch) -> None:
    monkeypatch.setitem(detector._FIT, "max_iter", 5)
    pairs = ("--mse-sr", str(data_set / "MSE-SR"), "--gan-sr", str(data_set / "MSE-SR"))
    (tmp_path / "a.json").write_text("an older file is replaced")
    numbers = told(desra_here, *pairs, "--output", str(tmp_path / "a.json"), "--false-alarms", "0.02")
    assert numbers["marked"] > 100
    other = told(desra_here, *pairs, "--output", str(tmp_path / "a.json"), "--seed", "1")
    assert other["marked"] != numbers["marked"]


def test_broken_files_are_named_and_the_rest_is_learned_from(data_set, tmp_path, desra) -> None:
    for folder in ("MSE-SR", "GAN-SR", "GT-Mask"):
        for file in (data_set / folder).iterdir():
            written(tmp_path / "set" / folder, file.stem, file.read_bytes())
    (tmp_path / "set" / "GAN-SR" / "image0.png").write_bytes(b"no picture")
    written(tmp_path / "set" / "MSE-SR", "image5", encode_png(np.zeros((9, 9, 3), np.uint8)))
    numbers = told(desra, str(tmp_path / "set"), "--output", str(tmp_path / "a.json"), code=1)
    assert numbers["images"] == 4
    assert [Path(failure["subject"]).name for failure in numbers["failures"]] == ["image0.png", "image5.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--output", "a.pth", "--workspace", "ws"), "a.pth: has another suffix than .json"),
        (("--output", "a.json"), "DATASET: is not given; give DATASET, --workspace, or --mse-sr and --gan-sr"),
        (("--output", "a.json", "--mse-sr", "x"), "--gan-sr: is not given"),
        (("x", "--workspace", "y", "--output", "a.json"), "DATASET: is given beside --workspace"),
        (("masks.csv", "--output", "a.json"), "masks.csv: is a CSV file, from which no detector is learned"),
        (("nowhere", "--output", "a.json"), "nowhere: does not exist"),
        (("--workspace", "nowhere", "--output", "a.json"), "nowhere"),
    ],
)
def test_bad_arguments(desra, arguments, message) -> None:
    assert message in refusal(desra("train-detector", *arguments))
