"""Sample pairs with artifacts at known places, made from the photos inside scikit-image's wheel.

What GAN super-resolution models get wrong is imitated on results that are sound otherwise: worms, grids and
blotches where the scene is smooth, patches that lost their texture where it is not. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Literal, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from desra_core import imageio

SCALE = 4
KINDS = ("lr", "mse_sr", "gan_sr")

_SEED = 2023
# The spread that worms, grids and blotches add, in grey levels: visible at a glance, still no noise picture.
_STRENGTH = 15.0

Floats = npt.NDArray[np.float32]


class Artifact(NamedTuple):
    """Texture invented or lost around a point; ``centre`` and ``radii`` are (x, y) shares of the sides."""

    kind: Literal["worms", "grid", "blotches", "flat"]
    centre: tuple[float, float]
    radii: tuple[float, float]


class Sample(NamedTuple):
    """A pair to make: ``photo`` is a file in ``skimage/data``, ``size`` (width, height) of the results."""

    photo: str
    size: tuple[int, int]
    artifacts: tuple[Artifact, ...]

    @property
    def name(self) -> str:
        """The image id, shared by the three files of a pair."""
        return Path(self.photo).stem


SAMPLES = (
    Sample("astronaut.png", (512, 512), (Artifact("worms", (0.2, 0.66), (0.2, 0.22)),)),
    Sample("camera.png", (512, 512), (Artifact("grid", (0.72, 0.15), (0.28, 0.18)),)),
    Sample(
        "chelsea.png",
        (900, 600),
        (Artifact("flat", (0.42, 0.18), (0.22, 0.24)), Artifact("grid", (0.14, 0.72), (0.14, 0.2))),
    ),
    Sample("coffee.png", (900, 600), (Artifact("worms", (0.24, 0.66), (0.13, 0.26)),)),
    Sample("hubble_deep_field.jpg", (1000, 872), ()),
    Sample("motorcycle_left.png", (740, 500), ()),
    Sample("retina.jpg", (800, 800), (Artifact("worms", (0.62, 0.6), (0.18, 0.15)),)),
    Sample("rocket.jpg", (960, 640), (Artifact("blotches", (0.38, 0.27), (0.13, 0.22)),)),
)


def make_pairs(folder: Path) -> None:
    """Write ``folder/{lr,mse_sr,gan_sr}/NAME.png`` for every sample; complete pairs are left as they are.

    The same bytes come out everywhere the same versions of NumPy and OpenCV are installed.
    """
    for index, sample in enumerate(SAMPLES):
        paths = [folder / kind / f"{sample.name}.png" for kind in KINDS]
        if all(path.exists() for path in paths):
            continue
        rng = np.random.default_rng([_SEED, index])
        for path, pixels in zip(paths, _pair(sample, rng), strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            partial.write_bytes(imageio.encode_png(pixels))
            partial.replace(path)


def _pair(sample: Sample, rng: np.random.Generator) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield the LR image ``(H/4, W/4, C)`` and both results ``(H, W, C)`` of a sample."""
    photo = _photo(sample)
    lr = _rounded(_resized(photo, _shrunk(sample.size)))
    mse_sr = _mse_result(lr.astype(np.float32), sample.size)
    gan_sr = _gan_result(photo, mse_sr)
    for artifact in sample.artifacts:
        gan_sr = _with_artifact(gan_sr, artifact, rng)
    yield from (lr, _rounded(mse_sr), _rounded(gan_sr))


def _photo(sample: Sample) -> Floats:
    """Read a photo ``(H, W, C)``, 0..255, cut about its centre and brought to the size of the results."""
    file = resources.files("skimage") / "data" / sample.photo
    pixels = imageio.decode(file.read_bytes(), Path(str(file))).pixels.astype(np.float32)
    height, width = pixels.shape[:2]
    ratio = min(width / sample.size[0], height / sample.size[1])
    columns, rows = round(sample.size[0] * ratio), round(sample.size[1] * ratio)
    top, left = (height - rows) // 2, (width - columns) // 2
    return _resized(pixels[top : top + rows, left : left + columns], sample.size)


def _mse_result(lr: Floats, size: tuple[int, int]) -> Floats:
    """Enlarge an LR image as an MSE-trained model would, true to it but without texture: back-projection."""
    result = _resized(lr, size)
    for _ in range(2):
        result = result + _resized(lr - _resized(result, _shrunk(size)), size)
    return result


def _gan_result(photo: Floats, mse_sr: Floats) -> Floats:
    """Add the photo's own texture to the MSE result, as a GAN-trained model without artifacts would.

    A model sharpens what is there. Texture of which nothing is left in the MSE result is held back, so that
    the two local standard deviations stay well within the factor of 2.45 that counts as an artifact.
    """
    detail = photo - mse_sr
    allowed = 0.9 * _local_std(mse_sr) + 2.0
    gain = np.minimum(1.0, allowed / (_local_std(detail) + 1e-3)).min(axis=2, keepdims=True)
    return mse_sr + detail * _blurred(gain, 2.0)


def _with_artifact(image: Floats, artifact: Artifact, rng: np.random.Generator) -> Floats:
    """Blend one artifact into a GAN result ``(H, W, C)``."""
    share = _extent(image, artifact, rng)
    if artifact.kind == "flat":
        return image + share * (_blurred(image, 6.0) - image)
    return image + share * _STRENGTH * _texture(artifact.kind, image.shape, rng)


def _extent(image: Floats, artifact: Artifact, rng: np.random.Generator) -> Floats:
    """Each pixel's share of an artifact, ``(H, W, 1)``, 0..1: a ragged ellipse that keeps to one surface."""
    height, width, channels = image.shape
    y, x = np.mgrid[:height, :width].astype(np.float32)
    (cx, cy), (rx, ry) = artifact.centre, artifact.radii
    radius = np.hypot((x / width - cx) / rx, (y / height - cy) / ry)
    radius += 0.12 * _noise((height, width, 1), 24.0, rng)[..., 0]
    core = np.median(image[radius < 0.5].reshape(-1, channels), axis=0)
    unlike = np.abs(_blurred(image, 5.0) - core).max(axis=2)
    share = np.clip((1.0 - radius) / 0.45, 0.0, 1.0) * np.exp(-((unlike / 75.0) ** 4))
    return _blurred(share[..., None].astype(np.float32), 2.0)


def _texture(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> Floats:
    """Invent texture ``(H, W, C)``, about zero, with a standard deviation of 1 to 2."""
    height, width, channels = shape
    if kind == "worms":
        pattern = 1.8 * np.tanh(2.0 * _noise((height, width, 1), 2.0, rng))
        return np.asarray(pattern * rng.uniform(0.75, 1.1, channels), np.float32)
    if kind == "grid":
        y, x = np.mgrid[:height, :width]
        board = np.cos(np.pi * x / 4) * np.cos(np.pi * y / 4)
        swell = 1.6 + 0.3 * _noise((height, width, 1), 12.0, rng)
        return np.asarray(board[..., None] * swell * rng.uniform(0.85, 1.1, channels), np.float32)
    common, coloured = _noise((height, width, 1), 3.0, rng), _noise(shape, 3.0, rng)
    return common + 0.7 * coloured


def _noise(shape: tuple[int, ...], size: float, rng: np.random.Generator) -> Floats:
    """Draw noise ``(H, W, C)`` of one grain, ``size`` pixels, with mean 0 and standard deviation 1."""
    white = rng.standard_normal(shape).astype(np.float32)
    band = _blurred(white, size) - _blurred(white, 1.6 * size)
    return np.asarray((band - band.mean()) / band.std())


def _local_std(image: Floats) -> Floats:
    mean = _blurred(image, 1.5)
    return np.asarray(np.sqrt(np.maximum(_blurred(image * image, 1.5) - mean * mean, 0.0)))


def _blurred(image: Floats, sigma: float) -> Floats:
    return np.asarray(cv2.GaussianBlur(image, (0, 0), sigma), np.float32).reshape(image.shape)


def _resized(image: Floats, size: tuple[int, int]) -> Floats:
    shrinks = size[0] < image.shape[1]
    resized = cv2.resize(image, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
    return np.asarray(resized, np.float32).reshape(size[1], size[0], image.shape[2])


def _shrunk(size: tuple[int, int]) -> tuple[int, int]:
    return size[0] // SCALE, size[1] // SCALE


def _rounded(image: Floats) -> npt.NDArray[np.uint8]:
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)
