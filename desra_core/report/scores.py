"""The score maps of all detectors for one image, on one scale: each divided by its own threshold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from desra_core.detection.class_weights import load_weights, weighted_scores
from desra_core.detection.detectors import METHODS, TIMES, AppliedDetector, DetectorInputs, Scores, applied
from desra_core.detection.mask import WINDOW, valid
from desra_core.detection.similarity import TILE
from desra_core.errors import ImageError, UsageError
from desra_core.images.crops import RGB, fitted
from desra_core.report.pictures import heat_map

# Scores of larger images would take minutes and gigabytes for a picture of a few hundred pixels.
_MOST_PIXELS = 2**26


@dataclass(frozen=True)
class ScoreMap:
    """A kind of score map: its caption, the detector, and whether class weights are applied to its scores."""

    kind: str
    caption: str
    detector: AppliedDetector
    adjusted: bool = False

    @property
    def threshold(self) -> float:
        """The value of the picture above which a pixel is suspect."""
        return self.detector.pictured_threshold


def score_kinds(measure: AppliedDetector) -> list[ScoreMap]:
    """List all score maps, DeSRA's first, that of a user's own detector last.

    The threshold is the detector's default, and for the detector of the run the one that was asked for.
    """
    kinds = []
    for method in [*METHODS, *([] if measure.name in METHODS else [measure.name])]:
        detector = measure if method == measure.name else applied(method)
        if detector.weighs_classes:
            kinds += [
                ScoreMap("difference", detector.picture, detector),
                ScoreMap("adjusted", "1 − adjusted similarity", detector, adjusted=True),
            ]
        else:
            kinds.append(ScoreMap(method if method in METHODS else "own", detector.picture, detector))
    return kinds


def score_picture(kind: ScoreMap, pair: DetectorInputs, settings: dict[str, Any], *, largest: int) -> RGB:
    """Draw a heat map of the whole image from 0 to twice the threshold, gray where there is no score.

    Args:
        kind: One of `score_kinds`.
        pair: The image.
        settings: Of the run: the window and the class weights.
        largest: Longer sides are scaled down to this, in pixels.

    Raises:
        ImageError: It is too small or too large for the detector, lacks an input, or makes it fail.
    """
    height, width = pair.gan_sr.shape[:2]
    if height * width > _MOST_PIXELS:
        raise ImageError(kind.caption, f"not computed for {width}x{height} pixels", "look at a part of it")
    try:
        scores = _scores(kind, pair, settings)
    except UsageError as error:
        raise ImageError("detector", error.reason, error.remedy) from None
    ratio = kind.detector.pictured(scores).astype(np.float32) / np.float32(TIMES * kind.threshold)
    frame = (height - scores.shape[0]) // 2
    return heat_map(fitted(np.pad(np.clip(ratio, 0, 1), frame, constant_values=np.nan), largest))


def _scores(kind: ScoreMap, pair: DetectorInputs, settings: dict[str, Any]) -> Scores:
    window = settings.get("window")
    window = window if isinstance(window, int) and window % 2 == 1 and window > 0 else WINDOW
    if kind.adjusted and pair.labels is None:
        raise ImageError("class labels", "there are none, so that every weight is 1", "add --segmenter")
    scores = kind.detector.score("the image", pair, window, TILE, 1)
    if not kind.adjusted or pair.labels is None:
        return scores
    weights = load_weights(str(settings.get("weights") or "published")).values
    return weighted_scores(scores, valid(pair.labels, (pair.labels.shape[0] - scores.shape[0]) // 2), weights)
