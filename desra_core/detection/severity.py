"""How many viewers notice a region: its features, and a model that was fitted to ratings.

A logistic model, in a JSON file without code, which ``desra calibrate severity`` writes.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from desra_core.detection.blocks import BLOCK, MAPS, VERSION, block_maps
from desra_core.detection.class_weights import load_weights
from desra_core.detection.learned import Form
from desra_core.detection.mask import Components, Region
from desra_core.files import content_key
from desra_core.images.codec import Mask, Pixels
from desra_core.images.parts import Rectangle

# Logarithms of area and share of the image; means over the blocks of the region; the lowest similarity; the texture of
# the MSE result around the region; and the published weight of the region's class, 1 without labels.
REGION_FEATURES = ("area", "share", *MAPS, "lowest_similarity", "texture_around", "class_weight")
FORM = Form("desra-severity", "severity model", [VERSION, *REGION_FEATURES], "desra calibrate severity")
_AROUND = 6  # blocks

Features = npt.NDArray[np.float64]


class SeverityModel(NamedTuple):
    """Predicts the share of viewers from the features of regions, by a logistic function of their weighted sum."""

    mean: Features  # (F,), and the deviation by which features are divided
    scale: Features
    coefficients: Features
    intercept: float

    def noticed(self, features: Features) -> Features:
        """Predict the share of viewers who notice each region, ``(N,)`` in 0..1, from features ``(N, F)``."""
        odds = (features - self.mean) / self.scale @ self.coefficients + self.intercept
        return np.asarray(1 / (1 + np.exp(-np.clip(odds, -50, 50))))

    def rated(self, regions: list[Region], mse_sr: Pixels, gan_sr: Pixels, mask: Mask) -> list[Region]:
        """Set the severity of the regions of a mask to the percentage of viewers who notice them."""
        shares = self.noticed(region_features(regions, mse_sr, gan_sr, mask))
        return [region._replace(severity=100 * share) for region, share in zip(regions, shares.tolist(), strict=True)]


def region_features(regions: list[Region], mse_sr: Pixels, gan_sr: Pixels, mask: Mask) -> Features:
    """Measure the regions of a mask.

    Args:
        regions: The regions, from top to bottom, as `desra_core.detection.mask.find_regions` lists them.
        mse_sr, gan_sr: The pair, ``(H, W, 1 or 3)``.
        mask: ``(H, W)`` bool, whose components are the regions.

    Returns:
        ``(N, len(REGION_FEATURES))``. They depend on the region and some 70 px around it.
    """
    found, weights = Components(mask), load_weights("published").values
    rows = np.empty((len(regions), len(REGION_FEATURES)))
    for index, region in enumerate(regions):
        window = _window(region, mask.shape)
        maps = block_maps(mse_sr[window], gan_sr[window])
        inside = found.numbers[window] == index + 1
        share = _block_share(inside, maps.shape[:2])
        own = maps[share >= min(0.5, share.max())]
        texture = maps[:, :, MAPS.index("texture")]
        around = texture[share == 0]
        label = region.dominant_class
        rows[index] = (
            np.log(region.area),
            np.log(region.area / mask.size),
            *own.mean(axis=0),
            own[:, MAPS.index("similarity")].min(),
            around.mean() if around.size else texture.mean(),
            1.0 if label is None else weights[label],
        )
    return rows


def _window(region: Region, shape: tuple[int, ...]) -> tuple[slice, slice]:
    """Return the region's box with its surroundings, which begins and ends with whole blocks of the image."""
    margin = _AROUND * BLOCK
    left, top = (max(0, start - margin) // BLOCK * BLOCK for start in (region.x, region.y))
    right = min(shape[1], -(-(region.x + region.width + margin) // BLOCK) * BLOCK)
    bottom = min(shape[0], -(-(region.y + region.height + margin) // BLOCK) * BLOCK)
    return Rectangle(top, left, bottom - top, right - left).slices


def _block_share(inside: Mask, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    rows, columns = shape
    missing = [(0, rows * BLOCK - inside.shape[0]), (0, columns * BLOCK - inside.shape[1])]
    padded = np.pad(inside, missing).astype(np.float32)
    return np.asarray(cv2.resize(padded, (columns, rows), interpolation=cv2.INTER_AREA))


def as_document(model: SeverityModel, origin: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a model's file; ``origin`` tells what it was fitted to."""
    return FORM.document(origin, model={name: np.asarray(value).tolist() for name, value in model._asdict().items()})


def load_severity_model(path: Path) -> SeverityModel:
    """Load a model that ``desra calibrate severity`` has written (raises `UsageError`)."""
    return _kept(path, content_key(path))


@lru_cache(maxsize=4)
def _kept(path: Path, _key: str) -> SeverityModel:
    return FORM.read(path, _built)


def _built(document: dict[str, Any]) -> SeverityModel:
    numbers = document["model"]
    mean, scale, coefficients = (np.array(numbers[name], np.float64) for name in SeverityModel._fields[:3])
    model = SeverityModel(mean, scale, coefficients, float(numbers["intercept"]))
    sized = {column.shape for column in (mean, scale, coefficients)} == {(len(REGION_FEATURES),)}
    if not (sized and all(np.isfinite(value).all() for value in model) and (scale > 0).all()):
        raise ValueError("its numbers are no model")
    return model
