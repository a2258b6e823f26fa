"""Fit boosted trees to the blocks of masked pairs, and choose a threshold on scenes that the trees have not seen."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from desra_core.annotations.export import MaskedImage, decode_result, select_images, with_pictures
from desra_core.benchmarking.annotated import read_ground_truth
from desra_core.benchmarking.data_sets import DataSet, Example
from desra_core.benchmarking.injection import cases
from desra_core.benchmarking.trial import injected_sheets
from desra_core.detection.blocks import BLOCK, block_features
from desra_core.detection.detectors import DetectorInputs
from desra_core.detection.detectors.trained import MOST_LOG_ODDS, Trees
from desra_core.errors import ImageError, UsageError
from desra_core.evaluation.mask_files import FRAME, on_valid_region, read_mask
from desra_core.files import read_bytes
from desra_core.images.codec import Mask, Pixels, decode
from desra_core.planning.plan import load_settings
from desra_core.workspace import Workspace

FOLDS = 5
# Bounds the time of the fit, and its memory: 450 MB of features, of which it makes about four copies. Blocks are drawn
# evenly from the images.
MOST_BLOCKS = 2_000_000
_LEAST_BLOCKS = 100  # of either kind
_SEED = 0
OnMeasured = Callable[[int, int], None] | None  # called with how many images are done, of how many
_FIT: dict[str, Any] = {"max_iter": 150, "max_leaf_nodes": 31, "min_samples_leaf": 200, "learning_rate": 0.1,
                        "early_stopping": False, "random_state": _SEED}  # fmt: skip


class Blocks(NamedTuple):
    """Blocks of one image: their features ``(N, F)`` float32, and which of them people marked ``(N,)`` bool."""

    features: npt.NDArray[np.float32]
    marked: npt.NDArray[np.bool_]


class FittedDetector(NamedTuple):
    """Trees of all scenes, and how trees of other scenes judge each scene.

    ``recall`` is the share of marked blocks above the threshold, ``precision_recall`` the area under the curve.
    """

    trees: Trees
    threshold: float
    recall: float
    precision_recall: float
    images: int
    blocks: int
    marked: int


def blocks_of(mse_sr: Pixels, gan_sr: Pixels, mask: Mask, *, most: int) -> Blocks:
    """Measure the blocks of a pair, and draw at most so many of them.

    A block is marked if at least half of its pixels are, and left out if only some are.
    """
    features = block_features(mse_sr, gan_sr)
    rows, columns = features.shape[:2]
    padded = np.pad(mask, [(0, rows * BLOCK - mask.shape[0]), (0, columns * BLOCK - mask.shape[1])], mode="edge")
    share = cv2.resize(padded.astype(np.float32), (columns, rows), interpolation=cv2.INTER_AREA)
    clear = np.flatnonzero((share == 0) | (share >= 0.5))
    if len(clear) > most:
        clear = np.sort(np.random.default_rng(_SEED).choice(clear, most, replace=False))
    return Blocks(features.reshape(rows * columns, -1)[clear], share.ravel()[clear] >= 0.5)


def injected_blocks(name: str, mse_sr: Pixels, gan_sr: Pixels, *, most: int, seed: int) -> Blocks:
    """Measure the blocks of a clean pair, and those of the pair with artifacts injected; see `cases`."""
    pair = DetectorInputs(mse_sr, gan_sr)
    sheets = list(injected_sheets(pair, cases(name, gan_sr, seed=seed)))
    share = most // (1 + len(sheets))
    parts = [blocks_of(mse_sr, gan_sr, np.zeros(gan_sr.shape[:2], np.bool_), most=share)]
    for sheet, artifacts in sheets:
        mask = np.zeros(gan_sr.shape[0] * gan_sr.shape[1], np.bool_)
        for *_, pixels in artifacts:
            mask[pixels] = True
        parts.append(blocks_of(mse_sr, sheet, mask.reshape(gan_sr.shape[:2]), most=share))
    return Blocks(*map(np.concatenate, zip(*parts, strict=True)))


class Learned(NamedTuple):
    """The blocks of all scenes by name, and why other images were left out."""

    scenes: dict[str, Blocks]
    failures: list[ImageError]


def learn_from_data_set(data_set: DataSet, seed: int, on_measured: OnMeasured = None) -> Learned:
    """Measure the blocks of a data set; into pairs without a ground truth, artifacts are injected.

    Images of one name, of several parts, are one scene.
    """

    def measured(example: Example, most: int) -> Blocks:
        mse_sr, gan_sr = (_result(example.files[role]) for role in ("mse_sr", "gan_sr"))
        path, shape = example.files["gan_sr"], gan_sr.shape[:2]
        if mse_sr.shape[:2] != shape:
            reason = f"is {shape[1]}x{shape[0]} but {example.files['mse_sr']} is {mse_sr.shape[1]}x{mse_sr.shape[0]}"
            raise ImageError(path, reason, "both results of one photo must have the same size")
        if truth := example.files.get("gt_mask"):
            mask = on_valid_region(read_mask(truth), shape, truth)
        elif example.coco_mask:
            mask = read_ground_truth(example.coco_mask, shape, path)
        else:
            return injected_blocks(example.title, mse_sr, gan_sr, most=most, seed=seed)
        return blocks_of(mse_sr, gan_sr, np.pad(mask, FRAME, mode="edge"), most=most)

    named = [(example.name, partial(measured, example)) for example in data_set.examples]
    return _measured(named, data_set.failures, on_measured)


def learn_from_workspace(workspace: Workspace, on_measured: OnMeasured = None) -> Learned:
    """Measure the blocks of the images of a workspace that have a human mask.

    Clean images whose results were not kept are among the failures (raises `UsageError`: there has been no run).
    """
    settings, target = load_settings(workspace)

    def measured(image: MaskedImage, most: int) -> Blocks:
        mse_sr, gan_sr = (decode_result(image, role).pixels for role in ("mse_sr", "gan_sr"))
        return blocks_of(mse_sr, gan_sr, image.mask(), most=most)

    chosen = [image for image in select_images(workspace, target, everything=True, worst=None) if image.human]
    images = with_pictures(workspace, chosen, mined=settings.verb == "mine")
    lacking = {image.name for image in chosen} - {image.name for image in images}
    remedy = "run desra mine with --keep all to learn from its mask"
    failures = [ImageError(name, "is clean, so its results were not kept", remedy) for name in sorted(lacking)]
    return _measured([(image.name, partial(measured, image)) for image in images], failures, on_measured)


def _measured(
    named: Sequence[tuple[str, Callable[[int], Blocks]]],
    failures: Iterable[ImageError],
    on_measured: OnMeasured,
) -> Learned:
    """Call functions of the most blocks in threads, and put the blocks of one name together."""
    parts: dict[str, list[Blocks]] = {}
    failed = list(failures)
    most = max(1, MOST_BLOCKS // max(1, len(named)))

    def attempted(one: tuple[str, Callable[[int], Blocks]]) -> Blocks | ImageError:
        try:
            return one[1](most)
        except ImageError as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done, ((name, _), result) in enumerate(zip(named, pool.map(attempted, named), strict=True), 1):
            if isinstance(result, ImageError):
                failed.append(result)
            else:
                parts.setdefault(name, []).append(result)
            if on_measured:
                on_measured(done, len(named))
    scenes = {name: Blocks(*map(np.concatenate, zip(*some, strict=True))) for name, some in parts.items()}
    return Learned(scenes, failed)


def _result(path: Path) -> Pixels:
    return decode(read_bytes(path), path, as_stored=True).pixels


def fit_detector(scenes: Sequence[Blocks], *, false_alarms: float) -> FittedDetector:
    """Fit trees to the blocks of all scenes.

    The threshold lets this share of the blocks without artifacts pass. It is taken from scenes that were left out of
    the fit, a fifth at a time, so it holds for new scenes of this kind. Each scene is one image, or several that show
    the same.

    Raises:
        UsageError: There are fewer than two scenes with marked blocks, or too few blocks of either kind.
    """
    from sklearn.metrics import average_precision_score
    from sklearn.model_selection import StratifiedGroupKFold

    marked = np.concatenate([scene.marked for scene in scenes]) if scenes else np.zeros(0, np.bool_)
    with_artifacts = sum(bool(scene.marked.any()) for scene in scenes)
    counts = int(marked.sum()), int((~marked).sum())
    if with_artifacts < 2 or min(counts) < _LEAST_BLOCKS:
        reason = f"have {counts[0]} marked and {counts[1]} other blocks of 8x8 px in {with_artifacts} marked images"
        raise UsageError(
            "the masks", reason, "mask more; two images with artifacts and some hundred blocks are the least"
        )
    features = np.concatenate([scene.features for scene in scenes])
    groups = np.repeat(np.arange(len(scenes)), [len(scene.marked) for scene in scenes])
    unseen = np.empty(len(marked))
    # Scenes with artifacts are spread over the folds, so that each fit has seen some.
    folds = StratifiedGroupKFold(min(FOLDS, with_artifacts))
    for known, left_out in folds.split(features, marked, groups):
        unseen[left_out] = _fit(features[known], marked[known]).log_odds(features[left_out])
    limit = np.quantile(unseen[~marked], 1 - false_alarms, method="higher")
    limit = np.clip(limit, -MOST_LOG_ODDS, MOST_LOG_ODDS - 1)  # so that a score can be above it
    return FittedDetector(
        trees=_fit(features, marked),
        threshold=float(np.exp(limit)),
        recall=float((unseen[marked] > limit).mean()),
        precision_recall=float(average_precision_score(marked, unseen)),
        images=len(scenes),
        blocks=len(marked),
        marked=counts[0],
    )


def _fit(features: npt.NDArray[np.float32], marked: npt.NDArray[np.bool_]) -> Trees:
    """Fit trees by scikit-learn, and take them over; they must predict what scikit-learn predicts."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    model = HistGradientBoostingClassifier(**_FIT).fit(features, marked)
    # scikit-learn has no public way to a fitted tree's nodes but pickle, which may hold code.
    grown = [predictor.nodes for (predictor,) in model._predictors]
    roots = np.cumsum([0, *(len(nodes) for nodes in grown[:-1])])
    shift = np.repeat(roots, [len(nodes) for nodes in grown])
    nodes = np.concatenate(grown)
    inner = nodes["is_leaf"] == 0
    trees = Trees(
        feature=nodes["feature_idx"].astype(np.int64),
        threshold=np.where(inner, nodes["num_threshold"], 0.0),
        left=np.where(inner, nodes["left"] + shift, 0).astype(np.int64),
        right=np.where(inner, nodes["right"] + shift, 0).astype(np.int64),
        value=np.where(inner, 0.0, nodes["value"]),
        roots=roots.astype(np.int64),
        baseline=float(np.ravel(model._baseline_prediction)[0]),
    )
    sample = features[:: max(1, len(features) // 1000)]
    assert np.allclose(trees.log_odds(sample), model.decision_function(sample)), "scikit-learn's trees have changed"
    return trees
