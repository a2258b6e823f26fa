"""The error map of FLIP (Andersson et al. 2020), by the authors' package: what is seen when two images alternate."""

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from desra_core.images.codec import Labels, Pixels, rgb_levels
from desra_core.images.parts import strips_with_halo

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
        for rows, source, kept in strips_with_halo(scores.shape, _HALO, _STRIP):
            strips = [np.asarray(rgb_levels(image[source]) / 255, np.float32, order="C") for image in (mse_sr, gan_sr)]
            errors, *_ = flip_evaluator.evaluate(*strips, "LDR", applyMagma=False, computeMeanError=False)
            scores[rows] = errors[kept, :, 0]
        return scores


detector = Flip()
