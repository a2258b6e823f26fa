"""Make ``tests/old_workspace.tar.gz``, the workspaces of ``tests/test_old_workspace.py``, by the real command line.

``python tests/make_old_workspace.py FOLDER``, with a new FOLDER, of which the archive holds what a person would copy to
another machine: photos, models and workspaces, without the history of the Prefect server. It was run at commit b56595c,
which the archive tells too (``COMMIT``), and is run again only where the workspaces are to be those of a later one.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
ARCHIVE = Path(__file__).with_name("old_workspace.tar.gz")
MODELS = REPOSITORY / "tests" / "models"
SIDE = 4  # of a model's result, per pixel of the photo
# What each workspace was made with, beside its folders and models. The tests give the same.
DETECT = ("--min-area", "300", "--keep", "maps")
CALIBRATE = ("--min-pixels", "1000", "--min-images", "2")
MINE = ("--min-area", "400")
CYCLED = ("--min-area", "400")
FINETUNE = ("--preset", "cpu", "--iterations", "4", "--checkpoint-every", "4", "--patch", "64", "--batch", "2",
            "--discriminator-features", "4", "--warmup", "1", "--images", "3",
            "--group-by", "^[a-z]+[0-9]+")  # fmt: skip
GATE = ("--min-removal", "0", "--max-detail-loss", "1")


def smooth(seed: int, height: int, width: int) -> np.ndarray:
    """``(H, W, 3)`` float32 around 0."""
    noise = np.random.default_rng(seed).normal(0, 1, (height, width, 3)).astype(np.float32)
    return cv2.GaussianBlur(noise, (0, 0), 6) * 6 * 12


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.clip(pixels, 0, 255).astype(np.uint8))


def make_pairs(folder: Path) -> None:
    """Three pairs with labels, two of them with an artifact."""
    for index, name in enumerate(("a/one", "a/two", "b/three")):
        mse_sr = 128 + smooth(index, 64, 80)
        gan_sr = mse_sr.copy()
        if index:
            gan_sr[16:48, 20:60] += np.random.default_rng(index).normal(0, 40, (32, 40, 3))
        write(folder / f"mse_sr/{name}.png", mse_sr)
        write(folder / f"gan_sr/{name}.png", gan_sr)
        write(folder / f"labels/{name}.png", np.repeat([2, 9], 40)[None].repeat(64, 0))


def make_photos(folder: Path) -> None:
    """Three photos: pieces of the demo's."""
    sys.path.insert(0, str(REPOSITORY))
    from deployments.demo_photos import make_photos as make_demo_photos

    make_demo_photos(folder / "whole")
    for name, source, x, y in (
        ("page", "page.jpg", 60, 30),
        ("motorcycle/shelf", "motorcycle_shelf.jpg", 100, 60),
        ("moon", "moon.jpg", 80, 40),
    ):
        pixels = cv2.imread(str(folder / "whole" / source))
        write(folder / f"{name}.png", pixels[y : y + 20, x : x + 26])
    shutil.rmtree(folder / "whole")


def make_scenes(folder: Path) -> None:
    """Photos of scenes for `make_models`: bright ones of both pools, and two dark ones that are held out."""
    for index in (5, 6, 7, 8, 12, 16, 25):
        pixels = 90 + smooth(index, 18, 20) / 3
        if index % 3:
            pixels[3:15, 4:16] += 110
        write(folder / f"scene{index:02d}.png", pixels)


def make_models(folder: Path) -> None:
    """A pair of a few weights: the one repeats pixels, the other adds texture where a photo is bright."""
    pattern = torch.from_numpy(np.random.default_rng(0).choice([-1.0, 1.0], 3 * SIDE**2)).float()
    pick, keep = torch.zeros(4, 3, 3, 3), torch.zeros(4, 4, 3, 3)
    pick[0, :, 1, 1], keep[0, 0, 1, 1] = 1 / 3, 1
    folder.mkdir()
    for name, strength in (("mse", 0.0), ("gan", 1.5)):
        add = torch.zeros(3 * SIDE**2, 4, 3, 3)
        add[:, 0, 1, 1] = strength * pattern
        layers = [(pick, torch.tensor([-0.7, 0, 0, 0])), (torch.zeros(4),), (keep, torch.zeros(4)), (torch.zeros(4),),
                  (add, 0 * pattern)]  # fmt: skip
        weights = {f"body.{index}.{kind}": value for index, layer in enumerate(layers)
                   for kind, value in zip(("weight", "bias"), layer, strict=False)}  # fmt: skip
        torch.save({"params": weights}, folder / f"{name}.pth")


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "deployments.cli", *map(str, arguments)]


def desra(*arguments: object) -> None:
    print("desra", *arguments, flush=True)
    subprocess.run(command(*arguments), cwd=REPOSITORY, check=True)


def kill_in_mid_run(workspace: Path, *arguments: object) -> None:
    """SIGKILL a run as soon as it has finished an image, and not all of them."""
    print("desra", *arguments, "# killed", flush=True)
    with subprocess.Popen(command(*arguments), cwd=REPOSITORY, start_new_session=True) as run:
        while not any(workspace.glob("masks/**/*.png")):
            assert run.poll() is None
            time.sleep(0.001)
        os.killpg(run.pid, signal.SIGKILL)
    assert any(workspace.glob("journal/*/*.json")), "its shard was through: try again"


def make_detected(folder: Path) -> None:
    """Two runs of pairs with labels, and a calibration; the one run was killed."""
    make_pairs(folder / "pairs")
    pairs = [f"--{role.replace('_', '-')}={folder / 'pairs' / role}" for role in ("mse_sr", "gan_sr", "labels")]
    detected, killed = folder / "detected", folder / "killed"
    desra("detect", *pairs, "--workspace", detected, "--workers", 1, *DETECT)
    desra("calibrate", "--workspace", detected, "--output", folder / "weights.toml", "--workers", 1, *CALIBRATE)
    kill_in_mid_run(killed, "detect", *pairs, "--workspace", killed, "--workers", 1, *DETECT)


def make_mined(folder: Path) -> None:
    """A run, with a mask that a person has drawn in an export."""
    make_photos(folder / "photos")
    models = ("--mse-model", MODELS / "mse.pth", "--gan-model", MODELS / "gan.pth")
    mined, review = folder / "mined", folder / "review"
    mine = ("mine", folder / "photos", *models, "--workspace", mined, "--workers", 1, *MINE)
    desra(*mine)
    desra("export", "--workspace", mined, "--format", "labelme", "--output", review)
    edited = next(path for path in sorted(review.rglob("*.json")) if not path.name.startswith("."))
    drawn = {"label": "artifact", "shape_type": "rectangle", "points": [[8, 8], [40, 30]]}
    edited.write_text(json.dumps(json.loads(edited.read_bytes()) | {"shapes": [drawn]}))
    desra("import", "labelme", review, "--workspace", mined)
    shutil.rmtree(review)
    desra(*mine)


def make_cycled(folder: Path) -> None:
    """A turn of the cycle: finetune, judgements, verdict and the promotion of a model."""
    make_scenes(folder / "scenes")
    make_models(folder / "models")
    models = ("--mse-model", folder / "models/mse.pth", "--gan-model", folder / "models/gan.pth")
    desra(
        "cycle", folder / "scenes", *models, "--workspace", folder / "cycled", "--workers", 1, *CYCLED, *FINETUNE, *GATE
    )


def pack(folder: Path) -> None:
    """Put all of it in the archive, but what is of the machine alone."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    (folder / "COMMIT").write_text(commit.stdout)
    for left in (*folder.glob("*/prefect"), *folder.glob("*/tmp")):
        shutil.rmtree(left)
    with tarfile.open(ARCHIVE, "w:gz", compresslevel=9) as archive:
        for path in sorted(folder.iterdir()):
            archive.add(path, path.name)
    print(f"{ARCHIVE.stat().st_size:,} bytes")


def main(folder: Path) -> None:
    folder.mkdir(parents=True)
    make_detected(folder)
    make_mined(folder)
    make_cycled(folder)
    pack(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
