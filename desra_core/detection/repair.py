"""Repair a GAN result: put the MSE result in the place of its artifacts, without a seam.

A pseudo-GT has a hard edge, which training does not mind. In a picture for people the edge would show, so here the MSE
result fades out around the mask, and the more slowly the more the two results differ.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from desra_core.detection.mask import alike
from desra_core.detection.similarity import compiled
from desra_core.errors import ArgumentError
from desra_core.images.codec import Mask, Pixels, grey_levels
from desra_core.images.parts import row_strips

# The largest step, in levels of 0..255, that fading puts between two neighbouring pixels. Rounding the two may add one.
STEP = 1.0

Share = npt.NDArray[np.float32]


class Repaired(NamedTuple):
    """A repaired result.

    Attributes:
        pixels: ``(H, W)`` or ``(H, W, C)``, of the dtype of the GAN result.
        share: ``(H, W)`` float32 in 0..1: the share of the MSE result in each pixel.
    """

    pixels: Pixels
    share: Share


def repair(mse_sr: Pixels, gan_sr: Pixels, mask: Mask, *, feather: int = 16, strength: float = 1.0) -> Repaired:
    """Replace the artifacts of a GAN result by the MSE result, and fade it out around them.

    In the mask, the share of the MSE result is ``strength``. From there it falls by at most ``1 / feather`` a pixel,
    and by so little that no two neighbouring pixels differ by more than `STEP` levels of 0..255 for that reason alone.

    Args:
        mse_sr, gan_sr: ``(H, W)`` or ``(H, W, C)`` uint8 or uint16, C = 1 or 3, as of `assemble_pseudo_gt`.
        mask: ``(H, W)``, true where there is an artifact.
        feather: The least number of pixels over which the MSE result fades out.
        strength: How much of an artifact to replace, in 0..1.

    Raises:
        ArgumentError: The arrays are not of one image, or a setting is out of range.

    Examples:
        >>> mse_sr, gan_sr = np.full((1, 6), 100, np.uint8), np.full((1, 6), 140, np.uint8)
        >>> repair(mse_sr, gan_sr, np.arange(6)[None] < 2, feather=2).pixels.tolist()
        [[100, 100, 101, 102, 103, 104]]
        >>> repair(mse_sr // 10 + 128, gan_sr, np.arange(6)[None] < 2, feather=2).pixels.tolist()
        [[138, 138, 139, 140, 140, 140]]
    """
    if feather < 1 or not 0 <= strength <= 1:
        reason = f"are {feather} and {strength}"
        raise ArgumentError("feather and strength", reason, "give a pixel or more, and a share in 0..1")
    mse_sr, gan_sr = alike(mse_sr, gan_sr, mask)
    share = mask.astype(np.float32)
    if mask.any() and strength:
        slope = np.empty(mask.shape, np.float32)
        for rows in row_strips(mask.shape):
            differences = np.abs(grey_levels(mse_sr[rows]) - grey_levels(gan_sr[rows]))
            largest = differences if differences.ndim == 2 else differences.max(axis=2)
            with np.errstate(divide="ignore"):
                slope[rows] = np.minimum(1 / feather, STEP / (strength * largest))
        _spread(share, slope)
        del slope
    share *= np.float32(strength)
    pixels = np.empty_like(gan_sr)
    for rows in row_strips(mask.shape):
        part, there = gan_sr[rows].astype(np.float64), share[rows]
        part += (mse_sr[rows] - part) * (there if part.ndim == 2 else there[:, :, np.newaxis])
        pixels[rows] = np.rint(part)
    return Repaired(pixels, share)


@compiled
def _spread(share: Share, slope: Share) -> None:
    """Raise each share to that of its four neighbours less its own slope, until nothing changes."""
    height, width = share.shape
    changed = True
    while changed:
        changed = False
        for direction in (1, -1):  # down and to the right, then up and to the left
            top, left = (0, 0) if direction == 1 else (height - 1, width - 1)
            for i in range(height):
                row = top + direction * i
                for j in range(width):
                    column = left + direction * j
                    largest = np.float32(0.0)
                    if i > 0:
                        largest = share[row - direction, column]
                    if j > 0 and share[row, column - direction] > largest:
                        largest = share[row, column - direction]
                    if largest - slope[row, column] > share[row, column]:
                        share[row, column] = largest - slope[row, column]
                        changed = True
