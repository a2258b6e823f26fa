"""Run a detector, which may be anybody's, on a pair, and see that what it returns are scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from desra_core.detection.detectors import Detector, Scores
from desra_core.errors import ImageError
from desra_core.images.codec import Labels, Pixels


def score_pair(
    detector: Detector,
    name: str,
    image: Path,
    mse_sr: Pixels,
    gan_sr: Pixels,
    lr: Pixels | None,
    labels: Labels | None,
) -> Scores:
    """Score a pair, and see that the scores are some.

    Parameters
    ----------
    detector, name
        A detector, and what it is called.
    image
        The file to name in errors.
    mse_sr, gan_sr, lr, labels
        As for `desra_core.detection.detectors.Detector`.

    Raises
    ------
    ImageError
        The image is too small, or the detector raises or returns something else than a score for each pixel.
    """
    height, width = gan_sr.shape[:2]
    if min(height, width) < detector.smallest:
        reason = f"is {width}x{height}, smaller than the {detector.smallest} px that {name} needs"
        raise ImageError(image, reason, "remove it, or take another method")
    try:
        scores = np.asarray(detector(mse_sr, gan_sr, lr, labels))
    except Exception as error:  # noqa: BLE001 what a user's file may raise
        told = " ".join(f"{type(error).__name__}: {error}".split())
        raise ImageError(image, f"makes {name} fail ({told})", "mend the method, or take another") from None
    frame = height - scores.shape[0] if scores.ndim == 2 and scores.dtype.kind in "fiub" else -1
    if frame < 0 or frame % 2 or scores.shape[1] != width - frame or not np.isfinite(scores).all():
        reason = f"gets no finite scores of its size less an even frame from {name}"
        raise ImageError(image, reason, "mend the method, or take another")
    return scores
