"""Distribution of the similarity, or of a detector's score, within each class, from a sample of the stored maps."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from desra_core.detection.class_weights import CLASS_COUNT, class_names
from desra_core.detection.detectors import AppliedDetector
from desra_core.errors import ImageError
from desra_core.images.tiling import Rectangle, grid
from desra_core.report.maps import StoredImage
from desra_core.report.results import WorkspaceResults, firsts

IMAGES = 32
BINS = 50
# The share of a class's pixels that is on the good side of its mark, as in the published class weights.
SHARE = 0.85

_TRIED = 3 * IMAGES
_CLASSES = 12
# As the chunks of a stored map; 4 MP of an image at most.
_TILE, _TILES = 512, 16

Counts = npt.NDArray[np.int64]


class Distributions(NamedTuple):
    """The most frequent classes of a sample, in the order of their marks."""

    histograms: dict[str, Counts]  # (BINS,) pixels by class name, from 0 to measure.top; larger values in the last bin
    marks: dict[str, float]  # by class name, the value on the good side of which SHARE of the pixels lie
    edges: npt.NDArray[np.float64]
    images: int  # in the sample
    kept: int  # images of the corpus whose maps and labels are kept
    classes: int  # in the sample


def class_distributions(results: WorkspaceResults, measure: AppliedDetector) -> Distributions | None:
    """Sample the stored maps of a workspace; None where there is nothing to sample.

    Reads at most 4 MP of each of 32 images, whatever the size of the corpus; which ones depends on their content only.
    """
    corpus = results.images
    labelled = corpus["labels_kept"] if "labels" not in results.sources else pa.scalar(True)
    kept = firsts(corpus.filter(pc.fill_null(pc.and_(corpus["similarity_kept"], labelled), False)))
    # Ids are hashes of contents: the smallest ones are a random sample that stays.
    chosen = kept.take(pc.select_k_unstable(kept, min(_TRIED, kept.num_rows), [("id", "ascending")])).to_pylist()
    stored = results.stored_images([row["name"] for row in chosen], [row["id"] for row in chosen])
    counts = np.zeros((CLASS_COUNT, BINS), np.int64)
    images = 0
    for row in chosen:
        try:
            counts += _counted(stored[row["name"]])
        except (ImageError, MemoryError):
            continue
        images += 1
        if images == IMAGES:
            break
    if not counts.any():
        return None
    edges = np.linspace(0, measure.top, BINS + 1)
    names = class_names()
    frequent = [index for index in np.argsort(-counts.sum(axis=1), kind="stable")[:_CLASSES] if counts[index].any()]
    share = SHARE if measure.worse == "above" else 1 - SHARE
    marks = {names[index]: quantile(counts[index], edges, share) for index in frequent}
    marks = dict(sorted(marks.items(), key=lambda item: (item[1], item[0])))
    by_name = {names[index]: counts[index] for index in frequent}
    classes = int(counts.any(axis=1).sum())
    return Distributions({name: by_name[name] for name in marks}, marks, edges, images, kept.num_rows, classes)


def quantile(counts: Counts, edges: npt.NDArray[np.float64], share: float) -> float:
    """Find the value below which a share of a histogram lies; values are taken as evenly spread within each bin.

    >>> quantile(np.array([1, 0, 3]), np.array([0.0, 1.0, 2.0, 3.0]), 0.5)
    2.333...
    """
    below = np.concatenate([[0], np.cumsum(counts)]) / counts.sum()
    position = int(np.searchsorted(below, share, side="left"))
    before = max(position - 1, 0)
    width = below[position] - below[before]
    part = (share - below[before]) / width if width else 0.0
    return float(edges[before] + part * (edges[position] - edges[before]))


def _counted(image: StoredImage) -> Counts:
    """Count the pixels of an image by class and bin."""
    measure, labels_of = image.measure, image.label_reader()
    counts = np.zeros(CLASS_COUNT * BINS, np.int64)
    for window in _tiles(image.shape):
        values = measure.value(image.scores(window))
        defined = ~np.isnan(values)
        bins = np.clip(values[defined].astype(np.float64) * (BINS / measure.top), 0, BINS - 1).astype(np.int64)
        classes = labels_of(window)[defined].astype(np.int64)
        counts += np.bincount(classes * BINS + bins, minlength=counts.size)
    return counts.reshape(CLASS_COUNT, BINS)


def _tiles(shape: tuple[int, int]) -> list[Rectangle]:
    """Some tiles of an image, evenly spread; all of it where it is small."""
    tiles = list(grid(*shape, _TILE))
    chosen = np.linspace(0, len(tiles) - 1, min(_TILES, len(tiles))).astype(int)
    return [tiles[index] for index in chosen]
