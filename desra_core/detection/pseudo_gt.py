"""The pseudo ground truth: a GAN result whose masked parts are taken from its MSE-trained twin."""

from __future__ import annotations

import numpy as np

from desra_core.images.codec import Mask, Pixels


def assemble_pseudo_gt(mse_sr: Pixels, gan_sr: Pixels, mask: Mask) -> Pixels:
    """Compute the pseudo ground truth ``mask * mse_sr + (1 - mask) * gan_sr``.

    Args:
        mse_sr, gan_sr: ``(H, W, C)`` of one dtype.
        mask: ``(H, W)``, true where there is an artifact.

    Examples:
        >>> mse_sr, gan_sr = np.full((1, 2, 1), 7, np.uint8), np.full((1, 2, 1), 9, np.uint8)
        >>> assemble_pseudo_gt(mse_sr, gan_sr, np.array([[True, False]])).ravel().tolist()
        [7, 9]
    """
    return np.where(mask[:, :, np.newaxis], mse_sr, gan_sr)
