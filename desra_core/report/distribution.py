"""How the similarity, or a detector's score, is distributed within each class: from a sample of the stored maps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from desra_core.detection.class_weights import CLASS_COUNT, class_names
from desra_core.errors import ImageError
from desra_core.images.tiling import Rectangle, grid
from desra_core.report.gallery import picture_files
from desra_core.report.maps import label_reader, read_map
from desra_core.report.measure import Measure
from desra_core.report.results import Results, firsts

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
    """The most frequent classes of a sample.

    Attributes
    ----------
    histograms
        ``(BINS,)`` pixels by class name, from 0 to ``measure.top``; what lies beyond counts for the last bin.
    marks
        By class name, the value on the good side of which ``SHARE`` of the pixels lie. In this order are the classes.
    edges
        Of the bins.
    images, kept
        Images in the sample, and of the corpus those whose maps and labels are kept.
    classes
        Found in the sample.
    """

    histograms: dict[str, Counts]
    marks: dict[str, float]
    edges: npt.NDArray[np.float64]
    images: int
    kept: int
    classes: int


def class_distributions(results: Results, measure: Measure) -> Distributions | None:
    """Sample the stored maps of a workspace; None where there is nothing to sample.

    Reads at most 4 MP of each of 32 images, whatever the size of the corpus; which ones depends on their content only.
    """
    kept = _kept(results)
    counts = np.zeros((CLASS_COUNT, BINS), np.int64)
    images = 0
    for found in _sampled(results, kept, measure):
        counts += found
        images += 1
        if images == IMAGES:
            break
    if not counts.any():
        return None
    edges = np.linspace(0, measure.top, BINS + 1)
    names = class_names()
    frequent = [index for index in np.argsort(-counts.sum(axis=1), kind="stable")[:_CLASSES] if counts[index].any()]
    share = SHARE if measure.is_score else 1 - SHARE
    marks = {names[index]: quantile(counts[index], edges, share) for index in frequent}
    marks = dict(sorted(marks.items(), key=lambda item: (item[1], item[0])))
    by_name = {names[index]: counts[index] for index in frequent}
    classes = int(counts.any(axis=1).sum())
    return Distributions({name: by_name[name] for name in marks}, marks, edges, images, kept.num_rows, classes)


def quantile(counts: Counts, edges: npt.NDArray[np.float64], share: float) -> float:
    """The value below which a share of what a histogram counts lies, evenly spread within each bin.

    >>> quantile(np.array([1, 0, 3]), np.array([0.0, 1.0, 2.0, 3.0]), 0.5)
    2.333...
    """
    below = np.concatenate([[0], np.cumsum(counts)]) / counts.sum()
    position = int(np.searchsorted(below, share, side="left"))
    before = max(position - 1, 0)
    width = below[position] - below[before]
    part = (share - below[before]) / width if width else 0.0
    return float(edges[before] + part * (edges[position] - edges[before]))


def _kept(results: Results) -> pa.Table:
    """One row per image content whose map and labels are kept: name, id, height, width."""
    images = results.images
    labelled = images["labels_kept"] if "labels" not in results.sources else pa.scalar(True)
    wanted = pc.fill_null(pc.and_(images["similarity_kept"], labelled), False)
    return firsts(images.filter(wanted))


def _sampled(results: Results, kept: pa.Table, measure: Measure) -> Iterator[Counts]:
    """Pixels by class and bin of one image after the other; what cannot be read is passed over."""
    # Ids are hashes of contents: the smallest ones are a random sample that stays.
    chosen = kept.take(pc.select_k_unstable(kept, min(_TRIED, kept.num_rows), [("id", "ascending")])).to_pylist()
    files = picture_files(results, [row["name"] for row in chosen])
    for row in chosen:
        try:
            yield _counted(results, row, files.get(row["name"], {}).get("labels"), measure)
        except (ImageError, MemoryError):
            continue


def _counted(results: Results, row: dict[str, Any], label_file: Path | None, measure: Measure) -> Counts:
    group, shape = results.workspace.group(row["id"]), (row["height"] or 0, row["width"] or 0)
    labels_of = label_reader(label_file, group / "labels", shape)
    counts = np.zeros(CLASS_COUNT * BINS, np.int64)
    for window in _tiles(shape):
        values = measure.value(read_map(group / "similarity", shape, window, measure))
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
