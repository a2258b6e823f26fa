"""The photos of the experiment on real models: sharp ones for the twins, low-resolution ones to mine.

Needs ``../shared/data``, whose LR photos are copied. Each HR photo is cut in two: its left half is a sharp photo for
the twin, and of its right half two LR photos are made, a mild one and a real one. A folder per scene, so that
``--group-by folder`` keeps a scene together.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import cv2
import numpy as np

from desra_core.training.degradation import degrade

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
SCALE = 4
# The largest side of a right half: RRDBNet takes a quarter of a minute for the LR photo of it on two cores.
LARGEST = 1024


def make_photos(sharp: Path, photos: Path) -> None:
    """Write all photos: ``sharp/SCENE.png`` and ``photos/SCENE/NAME``; the same bytes each time."""
    sharp.mkdir(parents=True, exist_ok=True)
    for path in sorted((DATA / "lr").rglob("*.*")):
        copy = photos / path.stem / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    for seed, path in enumerate(sorted((DATA / "hr").rglob("*.png"))):
        hr = cv2.imread(str(path))
        assert hr is not None
        middle = hr.shape[1] // 2
        assert cv2.imwrite(str(sharp / path.name), hr[:, :middle])
        height, width = (min(LARGEST, side) // SCALE * SCALE for side in (hr.shape[0], hr.shape[1] - middle))
        half = hr[:height, middle : middle + width, ::-1].astype(np.float32) / np.float32(255)
        for kind in ("mild", "real"):
            lr = np.rint(degrade(half, SCALE, kind, (seed,)) * 255).astype(np.uint8)
            copy = photos / path.stem / f"{kind}.png"
            copy.parent.mkdir(parents=True, exist_ok=True)
            assert cv2.imwrite(str(copy), lr[:, :, ::-1])
