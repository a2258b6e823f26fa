"""DeSRA: scores from the similarity D of a pair (Eq. 7 of the paper), weighted by class (Eq. 9).

Benchmarks use `Desra`, with scores ``1 - D``; runs use `AppliedDesra`, with scores ``-D``.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
import numpy.typing as npt

from desra_core.detection.class_weights import weighted_scores
from desra_core.detection.detectors import METHODS, AppliedDetector, Detector, DetectorInputs, Scores
from desra_core.detection.mask import THRESHOLD, WINDOW, valid
from desra_core.errors import ImageError, UsageError
from desra_core.images.codec import Labels, Pixels


@dataclass(frozen=True)
class Desra:
    """Scores ``1 - clip(w_k D, 0, 1)`` in 0..1, because benchmarks multiply the threshold, which must be positive.

    For a similarity threshold T >= 0.5, exactly the pixels whose adjusted similarity is below T have a score above
    1 - T; below 0.5 rounding can differ. In runs scores are ``-D``, so that the comparison is exact for every T.

    Args:
        weights: ``(150,)`` float64, ``w_k`` by class. Weights need labels; without weights every weight is 1.
    """

    weights: npt.NDArray[np.float64] | None = None
    threshold: ClassVar[float] = 1 - THRESHOLD
    smallest: ClassVar[int] = WINDOW

    @property
    def inputs(self) -> tuple[str, ...]:
        """The labels, where there are weights."""
        return () if self.weights is None else ("labels",)

    def __call__(
        self, mse_sr: Pixels, gan_sr: Pixels, _lr: Pixels | None = None, labels: Labels | None = None, /
    ) -> npt.NDArray[np.float64]:
        """Score a pair; the frame is 5 px wide."""
        from desra_core.detection.similarity import variance_similarity

        scores = -np.asarray(variance_similarity(mse_sr, gan_sr, window=WINDOW))
        classes = None if labels is None else valid(labels, WINDOW // 2)
        return 1 + weighted_scores(scores, classes, self.weights).astype(np.float64, copy=False)


class AppliedDesra(AppliedDetector):
    """DeSRA in runs: the score is minus the similarity, and people give and read the similarity."""

    weighs_classes: ClassVar[bool] = True
    usual_threshold: ClassVar[float | None] = THRESHOLD
    word: ClassVar[str] = "similarity"
    worse: ClassVar[str] = "below"
    heat_name: ClassVar[str] = "1 − D"
    value_name: ClassVar[str] = "D"
    highest: ClassVar[float | None] = 1.0
    limit: ClassVar[float] = 0.0
    inputs: ClassVar[tuple[str, ...]] = ()

    @property
    def score_threshold(self) -> float:
        """Minus the threshold of the similarity (raises `UsageError` where it is above 1)."""
        if self.threshold > 1:
            raise UsageError("--threshold", f"{self.threshold:g} is no similarity", "give one of 0..1")
        return -self.threshold

    def weighted(self, weights: npt.NDArray[np.float64] | None) -> Detector:
        """Load DeSRA with class weights."""
        return cast(Detector, Desra(weights))

    def scores_key(self, decoding: int, window: int, _labels_key: str | None) -> tuple[object, ...]:
        """Return the parts of the similarity's cache key, without class weights, which are applied to it later."""
        return "similarity", METHODS["desra"], decoding, window

    def score(self, image: object, inputs: DetectorInputs, window: int, tile: int, threads: int) -> Scores:
        """Compute minus the similarity (raises `ImageError` for images that are smaller than the window)."""
        from desra_core.detection.similarity import variance_similarity

        height, width = inputs.gan_sr.shape[:2]
        if min(height, width) < window:
            reason = f"has results of {width}x{height}, smaller than the {window} px window"
            raise ImageError(image, reason, "remove it, or give a smaller --window")
        options = {"window": window, "tile": tile, "threads": threads}
        similarity = np.asarray(variance_similarity(inputs.mse_sr, inputs.gan_sr, **options))
        return np.negative(similarity, out=similarity)

    def text(self, score: float) -> str:
        """Write the D of a score."""
        return f"{-score:.3f}"

    def heat_value(self, scores: Any) -> Any:
        """Turn scores into 1 - D."""
        return 1 + scores


detector = Desra()
applied_class = AppliedDesra
