"""Fit how many viewers notice a region to the ratings of a workspace, and measure the fit on images left out of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from desra_core.annotations.export import MaskedImage, decode_result, select_images, with_pictures
from desra_core.detection.mask import Components, Region
from desra_core.detection.severity import Features, SeverityModel, region_features
from desra_core.errors import ImageError, UsageError
from desra_core.planning.plan import load_settings
from desra_core.workspace import Workspace
from desra_core.workspace.answers import Box, Noticed, noticed

LEAST_RATINGS = 200
FOLDS = 5
_BINS = 10
# Strengths of the penalty that are tried; the best by the likelihood of images left out is taken.
_PENALTIES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


class Rated(NamedTuple):
    """Rated regions: features ``(N, F)``, how many noticed each, how many rated it, and the number of its image."""

    features: Features
    yes: npt.NDArray[np.int64]
    raters: npt.NDArray[np.int64]
    groups: npt.NDArray[np.int64]


class Bin(NamedTuple):
    """Regions whose predicted share lies in one tenth: means in 0..1, and how many ratings they have."""

    predicted: float
    observed: float
    ratings: int


class FittedSeverity(NamedTuple):
    """A model of all ratings, and how models of other images predict each image's.

    ``brier`` is the mean squared error over single ratings, ``brier_of_mean`` that of the mean share of the other
    images; ``rank_correlation`` is Spearman's, of predicted and observed shares of regions.
    """

    model: SeverityModel
    images: int
    regions: int
    ratings: int
    noticed: float
    brier: float
    brier_of_mean: float
    rank_correlation: float
    reliability: list[Bin]


class GatheredRatings(NamedTuple):
    """The rated regions of a workspace, how many ratings are of regions that are no more, and images left out."""

    rated: Rated
    gone: int
    failures: list[ImageError]


def gather_ratings(workspace: Workspace) -> GatheredRatings:
    """Measure the regions of a workspace that were rated in ``desra review --rate``.

    Raises:
        UsageError: There has been no run, or a file of ratings is damaged.
    """
    settings, target = load_settings(workspace)
    by_image: dict[str, dict[Box, Noticed]] = {}
    for (image_id, box), rating in noticed(workspace, target.gan_sr_key).items():
        by_image.setdefault(image_id, {})[box] = rating
    chosen = [image for image in select_images(workspace, target, everything=True, worst=None) if image.id in by_image]
    images = with_pictures(workspace, chosen, mined=settings.verb == "mine")
    parts, failures, used = [], [], 0
    for number, image in enumerate(images):
        try:
            features, counts = _measured(image, by_image[image.id])
        except ImageError as error:
            failures.append(error)
            continue
        used += len(counts)
        parts.append((features, *np.array(counts, np.int64).reshape(-1, 2).T, np.full(len(counts), number)))
    rated = Rated(*map(np.concatenate, zip(*parts, strict=True))) if parts else Rated(*(np.zeros(0, int),) * 4)
    return GatheredRatings(rated, sum(map(len, by_image.values())) - used, failures)


def _measured(image: MaskedImage, rated: Mapping[Box, Noticed]) -> tuple[Features, list[Noticed]]:
    """Measure the rated regions of an image; ratings of other boxes are of masks under other settings."""
    regions = [Region(**region) for region in image.regions]
    kept = [index for index, region in enumerate(regions) if region[:4] in rated]
    mask = image._replace(human=None).mask()
    if len(Components(mask)) != len(regions):
        raise ImageError(image.files["mask"], "is not the mask that was recorded", "delete it, and run again")
    mse_sr, gan_sr = (decode_result(image, role).pixels for role in ("mse_sr", "gan_sr"))
    features = region_features(regions, mse_sr, gan_sr, mask)
    return features[kept], [rated[regions[index][:4]] for index in kept]


def fit_severity(rated: Rated) -> FittedSeverity:
    """Fit a logistic model with a penalty to ratings.

    Raises:
        UsageError: There are fewer than 200 ratings, of fewer than five images, or all say the same.
    """
    from scipy.stats import spearmanr
    from sklearn.model_selection import GroupKFold

    ratings, yes = int(rated.raters.sum()), int(rated.yes.sum())
    images = len(np.unique(rated.groups))
    if ratings < LEAST_RATINGS or images < FOLDS:
        reason = f"are {ratings}, of {images} images; {LEAST_RATINGS} of {FOLDS} images are the least"
        raise UsageError("the ratings", reason, "rate more regions with desra review --rate")
    if yes in (0, ratings):
        raise UsageError("the ratings", f"all say {'yes' if yes else 'no'}", "rate other regions, too")
    folds = list(GroupKFold(FOLDS).split(rated.features, groups=rated.groups))
    shares = {penalty: np.empty(len(rated.yes)) for penalty in _PENALTIES}
    mean_share = np.empty(len(rated.yes))
    for known, left_out in folds:
        part = Rated(*(column[known] for column in rated))
        mean_share[left_out] = part.yes.sum() / part.raters.sum()
        for penalty, predicted in shares.items():
            predicted[left_out] = _fit(part, penalty).noticed(rated.features[left_out])
    best = max(_PENALTIES, key=lambda penalty: _likelihood(shares[penalty], rated))
    predicted = shares[best]
    observed = rated.yes / rated.raters
    return FittedSeverity(
        model=_fit(rated, best),
        images=images,
        regions=len(rated.yes),
        ratings=ratings,
        noticed=yes / ratings,
        brier=_brier(predicted, rated),
        brier_of_mean=_brier(mean_share, rated),
        rank_correlation=float(spearmanr(predicted, observed).statistic),
        reliability=reliability(predicted, rated.yes, rated.raters),
    )


def reliability(
    predicted: Sequence[float] | Features, yes: npt.NDArray[np.int64], raters: npt.NDArray[np.int64]
) -> list[Bin]:
    """Compare predicted with observed shares of regions, in tenths of the predicted share that have any regions."""
    shares = np.asarray(predicted)
    tenths = np.minimum((shares * _BINS).astype(int), _BINS - 1)
    bins = []
    for tenth in range(_BINS):
        inside = tenths == tenth
        if ratings := int(raters[inside].sum()):
            mean = float((shares[inside] * raters[inside]).sum() / ratings)
            bins.append(Bin(mean, float(yes[inside].sum() / ratings), ratings))
    return bins


def _fit(rated: Rated, penalty: float) -> SeverityModel:
    from sklearn.linear_model import LogisticRegression

    mean, scale = rated.features.mean(axis=0), rated.features.std(axis=0)
    scale[scale == 0] = 1
    scaled = (rated.features - mean) / scale
    # Each region counts as so many ratings of yes, and so many of no.
    answers = np.repeat([1, 0], len(scaled))
    weights = np.concatenate([rated.yes, rated.raters - rated.yes])
    model: Any = LogisticRegression(C=penalty, max_iter=1000)
    model.fit(np.concatenate([scaled, scaled]), answers, sample_weight=weights)
    return SeverityModel(mean, scale, model.coef_[0], float(model.intercept_[0]))


def _likelihood(predicted: Features, rated: Rated) -> float:
    inside = np.clip(predicted, 1e-9, 1 - 1e-9)
    return float((rated.yes * np.log(inside) + (rated.raters - rated.yes) * np.log(1 - inside)).sum())


def _brier(predicted: Features, rated: Rated) -> float:
    """Compute the mean squared error over single ratings, of which each is 1 or 0."""
    squared = rated.yes * (1 - predicted) ** 2 + (rated.raters - rated.yes) * predicted**2
    return float(squared.sum() / rated.raters.sum())
