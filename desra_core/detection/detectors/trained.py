"""A detector that was learned from masks: boosted trees over the features of blocks, in a JSON file without code."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from desra_core.detection.blocks import BLOCK, FEATURES, VERSION, block_features
from desra_core.detection.learned import Form
from desra_core.detection.mask import WINDOW
from desra_core.detection.similarity import compiled
from desra_core.files import content_key
from desra_core.images.codec import Labels, Pixels

FORM = Form("desra-detector", "detector", [VERSION, *FEATURES], "desra train-detector")
# Larger log-odds would overflow as odds in float32.
MOST_LOG_ODDS = 60.0


class Trees(NamedTuple):
    """The nodes of all trees, one tree after the other; a child comes after its parent.

    ``value`` counts where ``left`` is 0: that node is a leaf. Other nodes send a row to the left where its feature is
    at most the threshold.
    """

    feature: npt.NDArray[np.int64]
    threshold: npt.NDArray[np.float64]
    left: npt.NDArray[np.int64]
    right: npt.NDArray[np.int64]
    value: npt.NDArray[np.float64]
    roots: npt.NDArray[np.int64]  # the first node of each tree
    baseline: float

    def log_odds(self, features: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """Sum the leaves that rows ``(N, F)`` come to: ``(N,)``."""
        return np.asarray(_walk(features, *self))

    def is_sound(self) -> bool:
        """Check that walks end, and read nothing outside of the arrays."""
        count, places = len(self.value), np.arange(len(self.value))
        inner = self.left != 0
        return (
            {len(column) for column in self[:5]} == {count}
            and len(self.roots) > 0
            and bool(((self.roots >= 0) & (self.roots < count)).all())
            and bool((inner <= ((self.left > places) & (self.left < count))).all())
            and bool((inner <= ((self.right > places) & (self.right < count))).all())
            and bool(((self.feature >= 0) & (self.feature < len(FEATURES))).all())
            and all(bool(np.isfinite(column).all()) for column in (self.threshold, self.value, self.baseline))
        )


class TrainedDetector:
    """Scores the odds that people mark a pixel as an artifact: 1 where it is as likely as not."""

    smallest: ClassVar[int] = WINDOW
    inputs: ClassVar[tuple[str, ...]] = ()

    def __init__(self, trees: Trees, threshold: float) -> None:
        self.trees, self.threshold = trees, threshold

    def __call__(
        self, mse_sr: Pixels, gan_sr: Pixels, _lr: Pixels | None = None, _labels: Labels | None = None, /
    ) -> npt.NDArray[np.float32]:
        """Score a pair, between blocks by interpolation; there is no frame."""
        height, width = gan_sr.shape[:2]
        return odds_of(self.trees, block_features(mse_sr, gan_sr))[:height, :width]


def odds_of(trees: Trees, features: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Compute the odds of each pixel from the features of blocks ``(h, w, F)``: ``(8 h, 8 w)``."""
    rows, columns = features.shape[:2]
    odds = trees.log_odds(features.reshape(rows * columns, -1)).reshape(rows, columns)
    size = columns * BLOCK, rows * BLOCK
    smooth = cv2.resize(odds.astype(np.float32), size, interpolation=cv2.INTER_LINEAR)
    return np.asarray(np.exp(np.clip(smooth, -MOST_LOG_ODDS, MOST_LOG_ODDS)))


def as_document(trees: Trees, threshold: float, origin: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a detector's file; ``origin`` tells what it was learned from."""
    columns = {name: np.asarray(values).tolist() for name, values in trees._asdict().items()}
    return FORM.document(origin, threshold=threshold, trees=columns)


def load_trained(path: Path) -> TrainedDetector:
    """Load a detector that ``desra train-detector`` has written (raises `UsageError`)."""
    return _kept(path, content_key(path))


@lru_cache(maxsize=4)
def _kept(path: Path, _key: str) -> TrainedDetector:
    return FORM.read(path, _built)


def _built(document: dict[str, Any]) -> TrainedDetector:
    columns, threshold = document["trees"], float(document["threshold"])
    whole = {name: np.array(columns[name], np.int64).reshape(-1) for name in ("feature", "left", "right", "roots")}
    parts = {name: np.array(columns[name], np.float64).reshape(-1) for name in ("threshold", "value")}
    arrays: Any = whole | parts
    trees = Trees(**arrays, baseline=float(columns["baseline"]))
    if not trees.is_sound():
        raise ValueError("its trees lead nowhere")
    if not 0 < threshold < math.inf:
        raise ValueError(f"its threshold is {threshold}")
    return TrainedDetector(trees, threshold)


@compiled
def _walk(
    features: npt.NDArray[np.float32],
    feature: npt.NDArray[np.int64],
    threshold: npt.NDArray[np.float64],
    left: npt.NDArray[np.int64],
    right: npt.NDArray[np.int64],
    value: npt.NDArray[np.float64],
    roots: npt.NDArray[np.int64],
    baseline: float,
) -> npt.NDArray[np.float64]:
    total = np.full(len(features), baseline)
    for row in range(len(features)):
        for root in roots:
            node = root
            while left[node]:
                node = left[node] if features[row, feature[node]] <= threshold[node] else right[node]
            total[row] += value[node]
    return total
