"""The score maps of all detectors for one image, on one scale: each divided by its own threshold."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from desra_core.detection.class_weights import load_weights, weighted_scores
from desra_core.detection.detectors import METHODS, Detector, Scores, load_detector
from desra_core.detection.mask import WINDOW, valid
from desra_core.detection.similarity import variance_similarity
from desra_core.errors import ImageError, UsageError
from desra_core.images.codec import Labels, Pixels
from desra_core.images.crops import RGB, fitted
from desra_core.report.measure import DESRA, TIMES, Measure
from desra_core.report.pictures import heat_map
from desra_core.report.wording import shortened

# Scores of larger images would take minutes and gigabytes for a picture of a few hundred pixels.
_MOST_PIXELS = 2**26


class ScoreMap(NamedTuple):
    """A kind of score map: what it is called, and the score above which a pixel is suspect by default."""

    kind: str
    caption: str
    threshold: float


class Pair(NamedTuple):
    """What detectors look at; ``lr`` and ``labels`` where there are any."""

    mse_sr: Pixels
    gan_sr: Pixels
    lr: Pixels | None
    labels: Labels | None


def score_kinds(measure: Measure) -> list[ScoreMap]:
    """All score maps, DeSRA's first, that of a user's own detector last.

    The threshold is the detector's default, and for the method of the run the one that was asked for.
    """
    similarity = 1 - measure.threshold if measure.method == DESRA else load_detector(DESRA).threshold
    kinds = [ScoreMap("difference", "1 − D", similarity), ScoreMap("adjusted", "1 − adjusted similarity", similarity)]
    for method in METHODS:
        if method != DESRA:
            threshold = measure.threshold if method == measure.method else load_detector(method).threshold
            kinds.append(ScoreMap(method, f"{method} score", threshold))
    if measure.method not in METHODS:
        kinds.append(ScoreMap("own", f"{measure.name} score", measure.threshold))
    return kinds


def score_picture(kind: ScoreMap, pair: Pair, settings: dict[str, Any], measure: Measure, *, largest: int) -> RGB:
    """A heat map of the whole image from 0 to twice the threshold, gray where there is no score.

    Parameters
    ----------
    kind
        One of `score_kinds`.
    pair
        The image.
    settings
        Of the run: the window and the class weights of DeSRA.
    measure
        Of the run.
    largest
        Longer sides are scaled down to this, in pixels.

    Raises
    ------
    ImageError
        It is too small or too large for the detector, lacks what that needs, or makes it fail.
    """
    height, width = pair.gan_sr.shape[:2]
    if height * width > _MOST_PIXELS:
        raise ImageError(kind.caption, f"not computed for {width}x{height} pixels", "look at a part of it")
    if kind.kind in ("difference", "adjusted"):
        scores = _desra(pair, settings, adjusted=kind.kind == "adjusted")
    else:
        scores = _detected(measure.method if kind.kind == "own" else kind.kind, pair)
    frame = (height - scores.shape[0]) // 2
    ratio = np.clip(scores.astype(np.float32) / np.float32(TIMES * kind.threshold), 0, 1)
    return heat_map(fitted(np.pad(ratio, frame, constant_values=np.nan), largest))


def _desra(pair: Pair, settings: dict[str, Any], *, adjusted: bool) -> Scores:
    window = settings.get("window")
    window = window if isinstance(window, int) and window % 2 == 1 and window > 0 else WINDOW
    _check_size("D", pair, window)
    labels, weights = None, None
    if adjusted:
        labels, weights = pair.labels, _weights(settings)
        if labels is None:
            raise ImageError("class labels", "there are none, so that every weight is 1", "add --segmenter")
    similarity = variance_similarity(pair.mse_sr, pair.gan_sr, window=window)
    return 1 + weighted_scores(
        -similarity.astype(np.float64), None if labels is None else valid(labels, window // 2), weights
    )


def _weights(settings: dict[str, Any]) -> npt.NDArray[np.float64]:
    try:
        return load_weights(str(settings.get("weights") or "published")).values
    except UsageError as error:
        raise ImageError("class weights", error.reason, error.remedy) from None


def _detected(method: str, pair: Pair) -> Scores:
    try:
        detector = load_detector(method)
    except UsageError as error:
        raise ImageError("detector", error.reason, error.remedy) from None
    _check_size(method, pair, detector.smallest)
    given = {name: getattr(pair, name) if name in detector.inputs else None for name in ("lr", "labels")}
    for name in detector.inputs:
        if given.get(name) is None:
            raise ImageError(method, f"needs {'the LR photo' if name == 'lr' else 'class labels'}", "add it")
    return _whole(detector, pair, given["lr"], given["labels"])


def _whole(detector: Detector, pair: Pair, lr: Pixels | None, labels: Labels | None) -> Scores:
    """Scores that are as the protocol says, whatever a user's file does."""
    try:
        scores = np.asarray(detector(pair.mse_sr, pair.gan_sr, lr, labels))
    except Exception as error:  # noqa: BLE001 what a user's file may raise
        told = shortened(f"{type(error).__name__}: {error}", 120)
        raise ImageError("detector", f"fails ({told})", "mend it") from None
    height, width = pair.gan_sr.shape[:2]
    frame = height - scores.shape[0] if scores.ndim == 2 else -1
    if frame < 0 or frame % 2 or scores.shape[1] != width - frame or not np.isfinite(scores).all():
        raise ImageError("detector", "gives no finite score per pixel", "mend it")
    return scores


def _check_size(subject: str, pair: Pair, smallest: int) -> None:
    height, width = pair.gan_sr.shape[:2]
    if min(height, width) < smallest:
        raise ImageError(subject, f"the image is {width}x{height}, and {smallest} px are needed", "none")
