"""The artifact map of LDL (Liang et al., CVPR 2022), with the MSE result in the place of the ground truth.

The DeSRA paper compares itself with this map at the thresholds 0.01, 0.005 and 0.001.
"""

from __future__ import annotations

from typing import ClassVar

import cv2
import numpy as np
import numpy.typing as npt

from desra_core.imageio import Labels, Pixels

THRESHOLDS = (0.01, 0.005, 0.001)

_SIDE = 7
_EXPONENT = 0.2


class LDL:
    """The local variance of the residual, times a power of its variance over the image.

    ``r`` is the sum over the channels of ``|mse_sr - gan_sr|`` in 0..1; its variance is unbiased, in windows of 7x7 px
    with the image reflected at its border, and over the image.
    """

    threshold: ClassVar[float] = 0.005
    smallest: ClassVar[int] = _SIDE
    inputs: ClassVar[tuple[str, ...]] = ()

    def __call__(
        self, mse_sr: Pixels, gan_sr: Pixels, _lr: Pixels | None = None, _labels: Labels | None = None, /
    ) -> npt.NDArray[np.float32]:
        """Score a pair; there is no frame. Gray counts as three equal channels."""
        residual = np.abs(_unit(mse_sr) - _unit(gan_sr)).sum(axis=2)
        return (local_variance(residual) * residual.var(ddof=1) ** _EXPONENT).astype(np.float32)


def local_variance(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The unbiased variance of the 7x7 px around each pixel of ``(H, W)``, reflected at the border."""
    # Around the mean, so that little is lost where two large squares are subtracted.
    centred = values - values.mean()
    mean = _mean(centred)
    variance = _mean(centred * centred) - mean * mean
    count = _SIDE**2
    return np.asarray(np.maximum(variance, 0) * (count / (count - 1)))


def _mean(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.asarray(cv2.boxFilter(values, cv2.CV_64F, (_SIDE, _SIDE), borderType=cv2.BORDER_REFLECT_101))


def _unit(pixels: Pixels) -> npt.NDArray[np.float64]:
    """``(H, W, 3)`` in 0..1."""
    values = pixels / float(np.iinfo(pixels.dtype).max)
    return np.broadcast_to(values, (*values.shape[:2], 3))


detector = LDL()
