"""The error map of FLIP (Andersson et al. 2020), by the authors' package: what is seen when two images alternate."""

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from desra_core.images.codec import Labels, Pixels, grey_levels
from desra_core.images.parts import row_strips

_STRIP = 2**18
# Wider than FLIP's filters, so that strips have the scores of the whole image.
_HALO = 32


class Flip:
    """LDR-FLIP at 67 pixels per degree, the package's default: a 0.7 m wide 4K screen at 0.7 m."""

    # No threshold is published. On the pairs of docs/benchmarks.md this one marks as much as DeSRA does at weight 1.
    threshold: ClassVar[float] = 0.33
    smallest: ClassVar[int] = 1
    inputs: ClassVar[tuple[str, ...]] = ()

    def __call__(
        self, mse_sr: Pixels, gan_sr: Pixels, _lr: Pixels | None = None, _labels: Labels | None = None, /
    ) -> npt.NDArray[np.float32]:
        """Score a pair, in 0..1; there is no frame."""
        import flip_evaluator

        scores = np.empty(gan_sr.shape[:2], np.float32)
        for rows in row_strips(scores.shape, _STRIP):
            first = max(0, rows.start - _HALO)
            strips = [_unit(image[first : rows.stop + _HALO]) for image in (mse_sr, gan_sr)]
            errors, *_ = flip_evaluator.evaluate(*strips, "LDR", applyMagma=False, computeMeanError=False)
            kept = slice(rows.start - first, rows.start - first + scores[rows].shape[0])
            scores[rows] = errors[kept, :, 0]
        return scores


def _unit(pixels: Pixels) -> npt.NDArray[np.float32]:
    shape = (*pixels.shape[:2], 3)
    return np.ascontiguousarray(np.broadcast_to(grey_levels(pixels) / 255, shape), np.float32)


detector = Flip()
