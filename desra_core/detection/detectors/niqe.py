"""NIQE (Mittal et al. 2013) by blocks: how unnatural each block of the GAN result is; the MSE result is not used."""

import warnings
from functools import cache
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from desra_core import third_party
from desra_core.images.codec import Labels, Pixels, bgr8
from desra_core.images.parts import row_strips

_BLOCK = 96


class NIQE:
    """The distance of a block's statistics to those of natural images, which basicsr ships.

    Features, statistics and blocks of 96x96 px are those of basicsr's ``calculate_niqe``, which computes one distance
    for all blocks together. Here each block has its own distance, by the covariance of natural images alone. The last
    block of a row or column ends at the border; where it overlaps an earlier block, the earlier block's score stays.
    """

    # No threshold is published. On the pairs of docs/benchmarks.md this one marks as much as DeSRA does at weight 1.
    threshold: ClassVar[float] = 10.5
    smallest: ClassVar[int] = _BLOCK
    inputs: ClassVar[tuple[str, ...]] = ()

    def __call__(
        self, _mse_sr: Pixels, gan_sr: Pixels, _lr: Pixels | None = None, _labels: Labels | None = None, /
    ) -> npt.NDArray[np.float32]:
        """Score a GAN result, from 0 upwards; there is no frame. A block without texture scores 0."""
        _, mean, inverse, _ = _library()
        scores = np.empty(gan_sr.shape[:2], np.float32)
        # From the last block to the first, so that the earlier block's scores stay where blocks overlap.
        for (top, left), features in reversed(block_features(gan_sr)):
            away = mean - features
            distance = float(np.sqrt(np.maximum(away @ inverse @ away, 0)))
            scores[top : top + _BLOCK, left : left + _BLOCK] = distance if np.isfinite(distance) else 0
        return scores


def block_features(gan_sr: Pixels) -> list[tuple[tuple[int, int], npt.NDArray[np.float64]]]:
    """Compute the place (top, left) and the 36 features of each block; not finite for blocks without texture."""
    niqe, _, _, window = _library()
    luminance = np.empty(gan_sr.shape[:2], np.float32)
    for rows in row_strips(luminance.shape):
        # Rounded as in basicsr, which agrees with the authors' program.
        luminance[rows] = niqe.to_y_channel(bgr8(gan_sr[rows]).astype(np.float32))[:, :, 0].round()
    half = _normalised(niqe.imresize(luminance / 255, scale=0.5, antialiasing=True) * 255, niqe, window)
    scales = (_normalised(luminance, niqe, window), half)
    starts = (sorted({*range(0, side - _BLOCK + 1, _BLOCK), side - _BLOCK}) for side in gan_sr.shape[:2])
    found = []
    with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
        warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)  # of a block without texture
        for top, left in product(*starts):
            corners = ((image, _BLOCK // scale, top // scale, left // scale) for scale, image in enumerate(scales, 1))
            blocks = (image[y : y + side, x : x + side] for image, side, y, x in corners)
            found.append(((top, left), np.concatenate([niqe.compute_feature(block) for block in blocks])))
    return found


def _normalised(image: npt.NDArray[Any], niqe: Any, window: npt.NDArray[np.float64]) -> npt.NDArray[Any]:
    """Subtract the local mean from luminance, and divide by the local contrast (Eq. 1 of the NIQE paper)."""
    mean = niqe.convolve(image, window, mode="nearest")
    deviation = niqe.convolve(np.square(image), window, mode="nearest")
    deviation -= np.square(mean)
    np.sqrt(np.abs(deviation, out=deviation), out=deviation)
    deviation += 1
    return np.asarray(np.subtract(image, mean, out=mean) / deviation)


@cache
def _library() -> tuple[Any, npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Load basicsr's module, and of natural images the mean, the inverse covariance and the window."""
    third_party.mend_basicsr()
    niqe = import_module("basicsr.metrics.niqe")
    with np.load(Path(niqe.__file__ or "").with_name("niqe_pris_params.npz")) as statistics:
        inverse = np.linalg.pinv(statistics["cov_pris_param"])
        return niqe, statistics["mu_pris_param"].ravel(), inverse, statistics["gaussian_window"]


detector = NIQE()
