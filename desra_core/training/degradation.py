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
        kind: ``real``: two rounds of blur, resizing, noise and JPEG; ``mild``: one gentle round; ``bicubic``: resizing
            as in MATLAB, and nothing else.
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
        with _seeded(seed):
            *rounds, last = REAL if kind == "real" else MILD
            photo = sharp
            for each in rounds:
                photo = _compressed(_noisy(_resized(_blurred(photo, each), each), each), each)
            photo = _noisy(_resized(_blurred(photo, last), last, final=size), last)
            # The last resizing, with ringing as of sharpened photos, comes before or after the last compression.
            if np.random.uniform() < 0.5:
                photo = _compressed(_ringing(_to_size(photo, size)), last)
            else:
                photo = _ringing(_to_size(_compressed(photo, last), size))
    return np.asarray(np.rint(np.clip(photo, 0, 1) * 255) / 255, np.float32)


@contextlib.contextmanager
def _seeded(seed: Sequence[int]) -> Iterator[None]:
    """Seed the global generators that basicsr draws from, and restore them at the end."""
    states = random.getstate(), np.random.get_state()
    numbers = np.random.SeedSequence(list(seed)).generate_state(2)
    random.seed(int(numbers[0]))
    np.random.seed(numbers[1])
    try:
        with np.errstate():  # basicsr changes how NumPy handles errors
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _blurred(photo: Floats, each: Round) -> Floats:
    from basicsr.data.degradations import random_mixed_kernels

    if np.random.uniform() >= each.blur:
        return photo
    size = random.choice(_KERNEL_SIZES)
    if np.random.uniform() < _SINC:
        kernel = _sinc(size)
    else:
        kernel = random_mixed_kernels(list(_KERNELS), list(_KERNELS.values()), size, each.sigma, each.sigma,
                                      (-math.pi, math.pi), _BETA_GAUSSIAN, _BETA_PLATEAU)  # fmt: skip
    return _filtered(photo, kernel)


def _sinc(size: int) -> npt.NDArray[np.float64]:
    from basicsr.data.degradations import circular_lowpass_kernel

    # Small kernels cannot hold the ringing of low frequencies.
    lowest = math.pi / 3 if size < 13 else math.pi / 5
    return np.asarray(circular_lowpass_kernel(np.random.uniform(lowest, math.pi), size))


def _ringing(photo: Floats) -> Floats:
    if np.random.uniform() >= _FINAL_SINC:
        return photo
    from basicsr.data.degradations import circular_lowpass_kernel

    kernel = circular_lowpass_kernel(np.random.uniform(math.pi / 3, math.pi), random.choice(_KERNEL_SIZES))
    return _filtered(photo, kernel)


def _filtered(photo: Floats, kernel: npt.NDArray[np.float64]) -> Floats:
    return np.asarray(cv2.filter2D(photo, -1, kernel, borderType=cv2.BORDER_REFLECT_101), np.float32)


def _resized(photo: Floats, each: Round, final: tuple[int, int] | None = None) -> Floats:
    """Resize by a random factor, of the size itself or of the ``final`` size (width, height)."""
    way = random.choices(("up", "down", "keep"), each.resize)[0]
    factor = {
        "up": lambda: np.random.uniform(1, each.factor[1]),
        "down": lambda: np.random.uniform(each.factor[0], 1),
        "keep": lambda: 1.0,
    }[way]()
    width, height = final or (photo.shape[1], photo.shape[0])
    return _to_size(photo, (max(1, round(width * factor)), max(1, round(height * factor))))


def _to_size(photo: Floats, size: tuple[int, int]) -> Floats:
    return np.asarray(cv2.resize(photo, size, interpolation=random.choice(_RESIZES)), np.float32)


def _noisy(photo: Floats, each: Round) -> Floats:
    from basicsr.data.degradations import random_add_gaussian_noise, random_add_poisson_noise

    if np.random.uniform() < _GAUSSIAN:
        noisy = random_add_gaussian_noise(photo, each.gaussian, _GRAY, clip=True, rounds=False)
    else:
        noisy = random_add_poisson_noise(photo, each.poisson, _GRAY, clip=True, rounds=False)
    return np.asarray(noisy, np.float32)


def _compressed(photo: Floats, each: Round) -> Floats:
    """Compress and decompress as JPEG; basicsr's own function does not work with OpenCV 5."""
    levels = np.rint(np.clip(photo[:, :, ::-1], 0, 1) * 255).astype(np.uint8)
    quality = round(np.random.uniform(*each.quality))
    encoded = cv2.imencode(".jpg", levels, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return np.asarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR)[:, :, ::-1] / np.float32(255), np.float32)
