"""Class weights of three classes, for tests of what is told about them."""

from __future__ import annotations

import numpy as np

from desra_core.calibration.weights import (
    CalibratedWeights,
    count_image,
    derive_weights,
    merged,
    suggest,
    weight_values,
)
from desra_core.detection.class_weights import load_weights


def calibrated_weights() -> CalibratedWeights:
    """Three classes in three images; the third is thin."""
    rng = np.random.default_rng(0)
    tables = []
    for _ in range(3):
        labels = np.repeat(np.array([4, 2, 9], np.uint8), [2000, 990, 10])[np.newaxis]
        similarity = rng.beta(np.where(labels == 4, 3, 30), 1.2).astype(np.float32)
        tables.append(count_image(similarity, labels).to_table())
    histogram = merged(tables)
    rows = derive_weights(histogram, min_pixels=1000, fallback="one")
    published = load_weights("published").values
    suggested = suggest(histogram, weight_values(rows), published, 0.001)
    origin = {"workspace": "/a <b> & c", "min_pixels": 1000, "min_images": 3, "fallback": "one", "exclude": None,
              "doubts": []}  # fmt: skip
    return CalibratedWeights(rows, histogram, suggested, (0.25, 0.5), origin)
