"""The artifact map of LDL (Liang et al., CVPR 2022), with the MSE result in the place of the ground truth."""

from typing import ClassVar

import cv2
import numpy as np
import numpy.typing as npt

from desra_core.images.codec import Labels, Pixels
from desra_core.images.parts import row_strips

_SIDE = 7
_EXPONENT = 0.2
_STRIP = 2**18


class LDL:
    """The local variance of the residual, times a power of its variance over the image.

    The residual is the sum over the channels of ``|mse_sr - gan_sr|``, each in 0..1. Both variances are unbiased. The
    local variance is that of a window of 7x7 px; the image is reflected at its border.
    """

    threshold: ClassVar[float] = 0.005
    # The thresholds in the DeSRA paper, at which benchmarks judge LDL.
    thresholds: ClassVar[tuple[float, ...]] = (0.01, 0.005, 0.001)
    smallest: ClassVar[int] = _SIDE
    inputs: ClassVar[tuple[str, ...]] = ()

    def __call__(
        self, mse_sr: Pixels, gan_sr: Pixels, _lr: Pixels | None = None, _labels: Labels | None = None, /
    ) -> npt.NDArray[np.float32]:
        """Score a pair; there is no frame. Gray counts as three equal channels."""
        residual = np.zeros(gan_sr.shape[:2])
        for channel in range(3):
            residual += np.abs(_unit(mse_sr, channel) - _unit(gan_sr, channel))
        weight = float(residual.var(ddof=1)) ** _EXPONENT
        # Without its mean, so that the difference of two squares below loses little precision.
        residual -= residual.mean()
        half = _SIDE // 2
        padded = np.pad(residual, half, mode="reflect")
        scores = np.empty(gan_sr.shape[:2], np.float32)
        for rows in row_strips(scores.shape, _STRIP):
            values = padded[rows.start : rows.stop + 2 * half]
            moments = (cv2.blur(moment, (_SIDE, _SIDE)) for moment in (values, values * values))
            mean, square = (moment[half:-half, half:-half] for moment in moments)
            scores[rows] = weight * (np.maximum(square - mean * mean, 0) * (_SIDE**2 / (_SIDE**2 - 1)))
        return scores


def _unit(pixels: Pixels, channel: int) -> npt.NDArray[np.float64]:
    """Read a channel as values in 0..1."""
    return pixels[:, :, channel if pixels.shape[2] == 3 else 0] / float(np.iinfo(pixels.dtype).max)


detector = LDL()
