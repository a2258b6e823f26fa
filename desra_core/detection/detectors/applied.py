"""A detector as runs use it: its cache key, its threshold, its score maps, and the words for them.

Scores are larger where a pixel is worse, whatever the detector. A workspace holds minus the score, because DeSRA's
similarity came first: in the arrays called similarity, in the mean similarity of regions and in recorded thresholds.
Minus a float is exact, so nothing is lost on the way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib import import_module
from pathlib import PurePath
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from desra_core.detection.detectors import (
    DEFAULT,
    METHODS,
    Detector,
    DetectorInputs,
    Scores,
    detector_key,
    load_detector,
    score_pair,
)
from desra_core.errors import printable

# Pictures show scores up to this many times the threshold.
TIMES = 2


@dataclass(frozen=True)
class AppliedDetector:
    """A detector and the threshold of a run. Here is what holds for all but DeSRA, which overrides it.

    Attributes:
        name: One of `METHODS`, or the path of a user's file.
        threshold: As people give and read it.
        weighs_classes: Whether class weights (Eq. 9) apply to its scores.
        usual_threshold: As people give it, where that is not the detector's own.
        highest: The largest value that there can be, as people read values.
        word, worse: The name of a value for people, and the side of the threshold on which artifacts lie.
    """

    name: str
    threshold: float
    weighs_classes: ClassVar[bool] = False
    usual_threshold: ClassVar[float | None] = None
    highest: ClassVar[float | None] = None
    word: ClassVar[str] = "score"
    worse: ClassVar[str] = "above"

    @property
    def inputs(self) -> tuple[str, ...]:
        """Which of ``lr`` and ``labels`` its scores depend on (raises `UsageError` where it cannot be loaded)."""
        return tuple(load_detector(self.name).inputs)

    @property
    def score_threshold(self) -> float:
        """The score above which a pixel is suspect (raises `UsageError` where there is no such threshold)."""
        return self.threshold

    def weighted(self, _weights: npt.NDArray[np.float64] | None) -> Detector:
        """Load it, with class weights where these apply."""
        return load_detector(self.name)

    def scores_key(self, decoding: int, _window: int, labels_key: str | None) -> tuple[object, ...]:
        """Identify its score maps, beside the pair: what their cache key is the fingerprint of."""
        return "score", decoding, detector_key(self.name), labels_key

    def score(self, image: object, inputs: DetectorInputs, _window: int, _tile: int, _threads: int) -> Scores:
        """Compute the float32 score map of a pair, before class weights (raises `ImageError`, which names the image).

        Window, tile and threads are those of `desra_core.detection.similarity.variance_similarity`.
        """
        return score_pair(load_detector(self.name), self.name, image, inputs).astype(np.float32)

    @property
    def title(self) -> str:
        """The detector, briefly."""
        name = printable(PurePath(self.name).name)
        return name if len(name) <= 40 else f"{name[:20]} … {name[-20:]}"

    @property
    def picture(self) -> str:
        """The quantity that heat maps show: `pictured` scores, from 0 to `top`."""
        return f"{self.title} score"

    def pictured(self, scores: Scores) -> Scores:
        """Turn scores into the quantity of a heat map."""
        return scores

    @property
    def pictured_threshold(self) -> float:
        """The threshold in the same quantity."""
        return self.threshold

    @property
    def axis(self) -> str:
        """The quantity that people read."""
        return self.picture

    @property
    def top(self) -> float:
        """Values are shown from 0 to this."""
        return TIMES * self.threshold

    @property
    def limit(self) -> float:
        """Scores lie below this: a chunk that is lost is read as zeros, which no score of DeSRA is."""
        return math.inf

    def value(self, scores: Any) -> Any:
        """Turn a score, or an array of them, into the values that people read."""
        return scores

    def text(self, score: float) -> str:
        """Write a score as people read it."""
        return f"{score:.3g}"

    def heat(self, scores: Scores) -> Scores:
        """Turn scores into 0..1 of a colour scale; NaN stays NaN."""
        return np.asarray(np.clip(self.pictured(scores) / self.top, 0, 1))


def applied(name: str = DEFAULT, threshold: float | None = None) -> AppliedDetector:
    """Find how runs use a detector.

    Args:
        name: One of `METHODS`, or the path of a user's file, which is not read.
        threshold: As people give it; by default the detector's own.

    Raises:
        UsageError: It has to be loaded for its own threshold, and cannot be.
    """
    kind: type[AppliedDetector] = AppliedDetector
    if name in METHODS:
        kind = getattr(import_module(f"{__package__}.{name}"), "applied_class", AppliedDetector)
    if threshold is None:
        threshold = kind.usual_threshold or load_detector(name).threshold
    return kind(name, threshold)
