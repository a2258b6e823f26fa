"""DeSRA as a detector: one minus the adjusted similarity (Eq. 7 and 9 of the paper)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from desra_core.detection.mask import THRESHOLD, adjusted_similarity, valid
from desra_core.detection.similarity import WINDOW, variance_similarity
from desra_core.images.codec import Labels, Pixels


@dataclass(frozen=True)
class Desra:
    """The score is ``1 - clip(w_k D, 0, 1)``, in 0..1.

    For thresholds T of the similarity of 0.5 and above the subtraction is exact where it matters: just the pixels
    whose adjusted similarity is below T have a score above 1 - T.

    Parameters
    ----------
    weights
        ``(150,)`` float64, ``w_k`` by class; without them, or without labels, every weight is 1.
    """

    weights: npt.NDArray[np.float64] | None = None
    threshold: ClassVar[float] = 1 - THRESHOLD
    smallest: ClassVar[int] = WINDOW
    inputs: ClassVar[tuple[str, ...]] = ()

    def __call__(
        self, mse_sr: Pixels, gan_sr: Pixels, _lr: Pixels | None = None, labels: Labels | None = None, /
    ) -> npt.NDArray[np.float64]:
        """Score a pair; the frame is 5 px wide."""
        similarity = variance_similarity(mse_sr, gan_sr)
        classes = None if labels is None else valid(labels, WINDOW // 2)
        return 1 - adjusted_similarity(similarity, classes, self.weights)


detector = Desra()
