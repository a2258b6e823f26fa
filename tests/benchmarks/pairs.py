"""Pairs of SR results to measure with: real photos at any size, and tiny noise where only the number counts."""

from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]

# Beside the checkout, in the project's own workshop; elsewhere the photos in scikit-image's wheel serve.
_HR = Path(__file__).resolve().parents[3] / "shared" / "data" / "hr"
_SAMPLES = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
_BYTE_PNG = [cv2.IMWRITE_PNG_COMPRESSION, 1]


def photo_files() -> list[Path]:
    """HR photos, where they are present, or scikit-image's."""
    found = sorted(_HR.glob("*/*.png"))
    return found or [Path(str(resources.files("skimage") / "data" / name)) for name in _SAMPLES]


def write_photo_pairs(folder: Path, count: int, side: int) -> None:
    """Write ``folder/{mse_sr,gan_sr}/NNNNN.png``: blurred photos, and those with texture; a third has artifacts."""
    photos = [cv2.imread(str(path)) for path in photo_files()]
    for index in range(count):
        rng = np.random.default_rng(index)
        photo = _cut(photos[index % len(photos)], side, rng)
        _write(folder, index, *pair_of(photo, artifact=index % 3 == 0, rng=rng))


def pair_of(photo: Floats, *, artifact: bool, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """A pair ``(H, W, C)`` in 0..255: the photo smoothed, and with half of its texture and perhaps a blotch of noise.

    Half of the texture stays within the factor of 2.45 in standard deviation that counts as an artifact.
    """
    mse_sr = cv2.GaussianBlur(photo, (0, 0), 1.0)
    gan_sr = 0.5 * (photo + mse_sr)
    if artifact:
        height, width = photo.shape[:2]
        y, x = np.ogrid[:height, :width]
        cy, cx = rng.uniform(0.25, 0.75, 2)
        inside = np.hypot(y / height - cy, x / width - cx) < 0.15
        gan_sr += inside[..., None] * rng.standard_normal(photo.shape, np.float32) * 40
    return mse_sr, np.clip(gan_sr, 0, 255)


def write_tiny_pairs(folder: Path, count: int, side: int = 24) -> None:
    """Write many small pairs of noise; no two files are alike, and none is large enough for an artifact."""
    rng = np.random.default_rng(0)
    for index, (x, y) in enumerate(_noise(count, side, rng)):
        _write(folder, index, x, y)


def large_pair(side: int, *, depth: int, alpha: bool, ruined: bool = False, patch: int = 1024) -> tuple[Pixels, Pixels]:
    """A square pair ``(side, side, 3 or 4)`` BGR, 8 or 16 bits deep, of equal patches with an artifact in each.

    ``ruined``: nothing else but an artifact, a single one.
    """
    rng = np.random.default_rng(0)
    kind, scale = (np.uint16, 257) if depth == 16 else (np.uint8, 1)
    if ruined:
        shape = (patch, patch, 3)
        pair = (np.full(shape, 128, np.float32), rng.uniform(0, 255, shape).astype(np.float32))
    else:
        pair = pair_of(_cut(cv2.imread(str(photo_files()[0])), patch, rng), artifact=True, rng=rng)
    opaque = np.full((patch, patch, 1), 255 * scale, kind)
    patches = [np.rint(result * scale).astype(kind) for result in pair]
    first, second = (np.concatenate([result, opaque], axis=2) if alpha else result for result in patches)
    repeats = (side // patch, side // patch, 1)
    return np.tile(first, repeats), np.tile(second, repeats)


def _cut(photo: npt.NDArray[np.uint8], side: int, rng: np.random.Generator) -> Floats:
    """A square of a photo, enlarged where it is smaller."""
    ratio = side / min(photo.shape[:2])
    if ratio > 1:
        size = (max(side, round(photo.shape[1] * ratio)), max(side, round(photo.shape[0] * ratio)))
        photo = cv2.resize(photo, size, interpolation=cv2.INTER_CUBIC)
    top, left = (rng.integers(0, length - side + 1) for length in photo.shape[:2])
    return photo[top : top + side, left : left + side].astype(np.float32)


def _noise(count: int, side: int, rng: np.random.Generator) -> Iterator[npt.NDArray[np.uint8]]:
    for _ in range(count):
        yield rng.integers(0, 256, (2, side, side, 3), np.uint8)


def _write(folder: Path, index: int, mse_sr: npt.NDArray[np.generic], gan_sr: npt.NDArray[np.generic]) -> None:
    for role, result in (("mse_sr", mse_sr), ("gan_sr", gan_sr)):
        path = folder / role / f"{index // 1000:02d}" / f"{index:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        ok, encoded = cv2.imencode(".png", np.rint(result).astype(np.uint8), _BYTE_PNG)
        assert ok
        path.write_bytes(encoded.tobytes())
