"""The photos of the Delete experiment: real LR photos as they are, and HR photos spoilt in three ways.

Needs ``../shared/data``. A folder per scene, so that ``--group-by folder`` keeps all that shows one scene in one pool.
None of the scenes was seen by the demo's models in training.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


class Spoiling(NamedTuple):
    """How an HR photo becomes an LR one: smaller by ``factor``, grain, a JPEG."""

    name: str
    factor: int
    noise: float
    quality: int


SPOILINGS = (
    Spoiling("good", 3, noise=0, quality=92),
    Spoiling("forwarded", 3, noise=0, quality=40),
    Spoiling("dusk", 2, noise=5, quality=75),
)


def make_photos(folder: Path) -> None:
    """Write all photos, as ``SCENE/NAME``; the same bytes each time."""
    for path in sorted((DATA / "lr").rglob("*.*")):
        copy = folder / path.stem / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    for seed, path in enumerate(sorted((DATA / "hr").rglob("*.png"))):
        hr = cv2.imread(str(path))
        assert hr is not None
        for spoiling in SPOILINGS:
            copy = folder / path.stem / f"{spoiling.name}.jpg"
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(_spoilt(hr, spoiling, np.random.default_rng(seed)))


def _spoilt(hr: np.ndarray, spoiling: Spoiling, rng: np.random.Generator) -> bytes:
    size = hr.shape[1] // spoiling.factor, hr.shape[0] // spoiling.factor
    lr = cv2.resize(hr, size, interpolation=cv2.INTER_AREA).astype(np.float32)
    lr += spoiling.noise * rng.standard_normal(lr.shape, np.float32)
    lr8 = np.clip(np.rint(lr), 0, 255).astype(np.uint8)
    encoded = cv2.imencode(".jpg", lr8, [cv2.IMWRITE_JPEG_QUALITY, spoiling.quality])[1]
    return encoded.tobytes()
