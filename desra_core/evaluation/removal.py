"""Which artifact regions are gone and which were added, with the hysteresis that keeps noise out of the count.

A region counts as present in the other result where half of its pixels lie in the mask of that result taken at a
quarter of the minimal area. Without this, a region next to the minimal area or the threshold comes and goes with
two grey levels of noise.
"""

from __future__ import annotations

import math

import cv2
import numpy as np

from desra_core.images.codec import Mask
from desra_core.images.tiling import row_strips

# The other mask is taken at the minimal area divided by this.
LOOSENESS = 4

# Two-sided 95 % of the normal distribution.
_Z = 1.959963984540054


def uncovered(mask: Mask, other: Mask) -> list[bool]:
    """Tell for each region of a mask whether less than half of its pixels lie in another mask.

    With the mask before and the loose mask after finetuning, these regions are gone; with the mask after and the
    loose mask before, they were added.

    Parameters
    ----------
    mask
        ``(H, W)`` bool, whose 8-connected components are the regions.
    other
        ``(H, W)`` bool.

    Returns
    -------
    One bool per region, in the order of `desra_core.detection.find_regions`. Exactly half is not less than half.

    Raises
    ------
    ValueError
        The masks differ in size.

    Examples
    --------
    >>> mask = np.array([[True, True, False, True, True]])
    >>> uncovered(mask, np.array([[True, False, True, False, False]]))
    [False, True]
    """
    if mask.shape != other.shape:
        raise ValueError(f"masks of the shapes {mask.shape} and {other.shape} cannot be compared")
    count, components = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    area, covered = np.zeros(count, np.int64), np.zeros(count, np.int64)
    order: dict[int, None] = {}
    for rows in row_strips(mask.shape):
        inside = components[rows][mask[rows]]
        area += np.bincount(inside, minlength=count)
        covered += np.bincount(inside[other[rows][mask[rows]]], minlength=count)
        # By the first pixel in reading order: OpenCV's own numbering may depend on its threads.
        found, first = np.unique(inside, return_index=True)
        order |= dict.fromkeys(found[np.argsort(first)].tolist())
    return [bool(2 * covered[index] < area[index]) for index in order]


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of a share after so many successes in so many independent trials (Wilson 1927).

    Returns
    -------
    Bounds within 0..1; all of it without trials.

    Raises
    ------
    ValueError
        There are more successes than trials, or fewer than none.

    Examples
    --------
    >>> [round(bound, 4) for bound in wilson_interval(8, 10)]
    [0.4902, 0.9433]
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes in {trials} trials")
    if trials == 0:
        return 0.0, 1.0
    share, spread = successes / trials, _Z**2 / trials
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)
