"""Find the artifact regions that are gone or were added, with a hysteresis that keeps noise out of the count.

A region counts as present in the other result where half of its pixels lie in the mask of that result taken at a
quarter of the minimal area. Without this, a region next to the minimal area or the threshold comes and goes with
two grey levels of noise.
"""

from __future__ import annotations

import math

from desra_core.detection.regions import Components
from desra_core.images.codec import Mask

# The other mask is taken at the minimal area divided by this.
LOOSENESS = 4

# Two-sided 95 % of the normal distribution.
_Z = 1.959963984540054


def uncovered(mask: Mask, other: Mask) -> list[bool]:
    """Find the regions of a mask that have less than half of their pixels in another mask.

    With the mask before and the low-area mask after finetuning, these regions are gone; with the mask after and the
    low-area mask before, they were added.

    Args:
        mask: ``(H, W)`` bool, whose 8-connected components are the regions.
        other: ``(H, W)`` bool.

    Returns:
        One bool per region, in the order of `desra_core.detection.find_regions`. Exactly half is not less than half.

    Raises:
        ValueError: The masks differ in size.

    Examples:
        >>> import numpy as np
        >>> mask = np.array([[True, True, False, True, True]])
        >>> uncovered(mask, np.array([[True, False, True, False, False]]))
        [False, True]
    """
    return [not covered for covered in Components(mask).covered(other).tolist()]


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Compute the 95 % interval of a share after so many successes in so many independent trials (Wilson 1927).

    Returns:
        Bounds within 0..1; all of it without trials.

    Raises:
        ValueError: There are more successes than trials, or fewer than none.

    Examples:
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
