"""Degrade sharp photos as cameras, compression and resizing do, with basicsr's kernels and noise.

The degradation ``real`` is the second-order one of Wang et al., "Real-ESRGAN: Training Real-World Blind
Super-Resolution with Pure Synthetic Data" (2021), with the probabilities and ranges of the published
``finetune_realesrgan_x4plus.yml``.
"""

import contextlib
import math
import random
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from desra_core.third_party import mend_basicsr

Floats = npt.NDArray[np.float32]
Degradation = Literal["real", "mild", "bicubic"]
Range = tuple[float, float]

_KERNELS = {"iso": 0.45, "aniso": 0.25, "generalized_iso": 0.12, "generalized_aniso": 0.03, "plateau_iso": 0.12,
            "plateau_aniso": 0.03}  # fmt: skip
_KERNEL_SIZES = range(7, 22, 2)
_BETA_GAUSSIAN, _BETA_PLATEAU = (0.5, 4.0), (1.0, 2.0)
_SINC = 0.1  # probability of a sinc filter in place of a blur
_FINAL_SINC = 0.8  # probability of a sinc filter at the end
_RESIZES = (cv2.INTER_AREA, cv2.INTER_LINEAR, cv2.INTER_CUBIC)
_GAUSSIAN = 0.5  # probability of Gaussian noise; else the noise is Poisson noise
_GRAY = 0.4  # probability that noise is the same in all channels


class Round(NamedTuple):
    """A round of blur, resizing, noise and JPEG: probabilities, and ranges of what is drawn uniformly."""

    blur: float  # probability of any blur
    sigma: Range
    resize: tuple[float, float, float]  # probabilities of enlarging, shrinking and neither
    factor: Range
    gaussian: Range  # sigma in grey levels of 255
    poisson: Range
    quality: Range  # of the JPEG


REAL = (
    Round(1.0, (0.2, 3.0), (0.2, 0.7, 0.1), (0.15, 1.5), (1.0, 30.0), (0.05, 3.0), (30.0, 95.0)),
    Round(0.8, (0.2, 1.5), (0.3, 0.4, 0.3), (0.3, 1.2), (1.0, 25.0), (0.05, 2.5), (30.0, 95.0)),
)
MILD = (Round(0.8, (0.2, 1.2), (0.2, 0.4, 0.4), (0.5, 1.2), (1.0, 8.0), (0.05, 0.8), (70.0, 95.0)),)


def degrade(sharp: Floats, scale: int, kind: Degradation, seed: Sequence[int]) -> Floats:
    """Make a low-resolution photo of a sharp one.

    Args:
        sharp: ``(H, W, 3)`` in 0..1, with sides that are multiples of ``scale``.
        scale: The side of an LR pixel in SR pixels.
        kind: ``real``: two rounds of blur, resizing, noise and JPEG; ``mild``: one gentle round, and the same ringing
            at the end; ``bicubic``: resizing as in MATLAB, and nothing else.
        seed: The same seed gives the same photo.

    Returns:
        ``(H / scale, W / scale, 3)`` in 0..1, rounded to 8 bits.
    """
    mend_basicsr()
    size = sharp.shape[1] // scale, sharp.shape[0] // scale
    if kind == "bicubic":
        from basicsr.utils.matlab_functions import imresize

        photo = imresize(sharp, 1 / scale)
    else:
        rng = np.random.default_rng(list(seed))
        with _basicsr_seeded(rng):
            *rounds, last = REAL if kind == "real" else MILD
            photo = sharp
            for each in rounds:
                photo = _compressed(_noisy(_resized(_blurred(photo, each, rng), each, rng), each, rng), each, rng)
            photo = _noisy(_resized(_blurred(photo, last, rng), last, rng, final=size), last, rng)
            # The last resizing, with ringing as of sharpened photos, comes before or after the last compression.
            if rng.random() < 0.5:
                photo = _compressed(_ringing(_to_size(photo, size, rng), rng), last, rng)
            else:
                photo = _ringing(_to_size(_compressed(photo, last, rng), size, rng), rng)
    return np.asarray(np.rint(np.clip(photo, 0, 1) * 255) / 255, np.float32)


@contextlib.contextmanager
def _basicsr_seeded(rng: np.random.Generator) -> Iterator[None]:
    """Seed the global generators that basicsr draws from, and restore them at the end."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    random.seed(int(rng.integers(2**32)))
    np.random.seed(rng.integers(2**32))  # noqa: NPY002
    try:
        with np.errstate(divide="ignore", invalid="ignore"):  # as basicsr expects
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002


def _blurred(photo: Floats, each: Round, rng: np.random.Generator) -> Floats:
    from basicsr.data.degradations import random_mixed_kernels

    if rng.random() >= each.blur:
        return photo
    size = int(rng.choice(_KERNEL_SIZES))
    if rng.random() < _SINC:
        # Small kernels cannot hold the ringing of low frequencies.
        kernel = _sinc(math.pi / 3 if size < 13 else math.pi / 5, size, rng)
    else:
        kernel = random_mixed_kernels(list(_KERNELS), list(_KERNELS.values()), size, each.sigma, each.sigma,
                                      (-math.pi, math.pi), _BETA_GAUSSIAN, _BETA_PLATEAU)  # fmt: skip
    return _filtered(photo, kernel)


def _ringing(photo: Floats, rng: np.random.Generator) -> Floats:
    if rng.random() >= _FINAL_SINC:
        return photo
    return _filtered(photo, _sinc(math.pi / 3, int(rng.choice(_KERNEL_SIZES)), rng))


def _sinc(lowest: float, size: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Make the kernel of a low-pass filter with a random cutoff frequency from ``lowest`` on."""
    from basicsr.data.degradations import circular_lowpass_kernel

    return np.asarray(circular_lowpass_kernel(rng.uniform(lowest, math.pi), size))


def _filtered(photo: Floats, kernel: npt.NDArray[np.float64]) -> Floats:
    return np.asarray(cv2.filter2D(photo, -1, kernel, borderType=cv2.BORDER_REFLECT_101), np.float32)


def _resized(photo: Floats, each: Round, rng: np.random.Generator, final: tuple[int, int] | None = None) -> Floats:
    """Resize by a random factor, of the photo's own size or of the ``final`` size (width, height)."""
    lowest, highest = each.factor
    ranges = ((1.0, highest), (lowest, 1.0), (1.0, 1.0))
    factor = rng.uniform(*ranges[rng.choice(3, p=each.resize)])
    width, height = final or (photo.shape[1], photo.shape[0])
    return _to_size(photo, (max(1, round(width * factor)), max(1, round(height * factor))), rng)


def _to_size(photo: Floats, size: tuple[int, int], rng: np.random.Generator) -> Floats:
    return np.asarray(cv2.resize(photo, size, interpolation=int(rng.choice(_RESIZES))), np.float32)


def _noisy(photo: Floats, each: Round, rng: np.random.Generator) -> Floats:
    from basicsr.data.degradations import random_add_gaussian_noise, random_add_poisson_noise

    if rng.random() < _GAUSSIAN:
        noisy = random_add_gaussian_noise(photo, each.gaussian, _GRAY, clip=True, rounds=False)
    else:
        noisy = random_add_poisson_noise(photo, each.poisson, _GRAY, clip=True, rounds=False)
    return np.asarray(noisy, np.float32)


def _compressed(photo: Floats, each: Round, rng: np.random.Generator) -> Floats:
    """Compress and decompress as JPEG; basicsr's own function does not work with OpenCV 5."""
    levels = np.rint(np.clip(photo[:, :, ::-1], 0, 1) * 255).astype(np.uint8)
    quality = round(rng.uniform(*each.quality))
    encoded = cv2.imencode(".jpg", levels, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    decoded = np.asarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR))
    return np.asarray(decoded[:, :, ::-1] / np.float32(255), np.float32)
