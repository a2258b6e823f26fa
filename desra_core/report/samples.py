"""Distributions and curves from a sample of the images: scores by class, and precision and recall by severity.

Ids of images are hashes of contents: the smallest ids are a random sample, and the same in every report.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from desra_core.detection.class_weights import class_names
from desra_core.detection.detectors import AppliedDetector
from desra_core.detection.mask import Components, valid
from desra_core.errors import ImageError
from desra_core.evaluation.mask_files import FRAME
from desra_core.images.codec import CLASS_COUNT, Mask
from desra_core.images.parts import grid
from desra_core.report.pictures import StoredImage
from desra_core.report.results import WorkspaceResults, firsts

IMAGES, HUMAN_IMAGES = 32, 300
BINS = 50
# The mark of a class has this share of the class's pixels on its good side, as in the published class weights.
SHARE = 0.85

_TRIED = 3 * IMAGES  # because some images may be unreadable
_CLASSES = 12
# Tiles of an image that are read: the side is that of the chunks of a stored map, and all are 4 MP at most.
_TILE, _TILES = 512, 16

Counts = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]


class Distributions(NamedTuple):
    """The distributions of the most frequent classes of a sample, ordered by their marks."""

    histograms: dict[str, Counts]  # (BINS,) pixels by class name, from 0 to measure.top; larger values in the last bin
    marks: dict[str, float]  # by class name: SHARE of the class's pixels lie on the good side of this value
    edges: Values
    images: int  # images in the sample
    kept: int  # images of the corpus whose maps and labels are kept
    classes: int  # classes in the sample


class JudgedRegions(NamedTuple):
    """Regions of one image: the severity of N detected ones, and how they match M human ones."""

    severity: Values
    right: npt.NDArray[np.bool_]  # (N,): at least half of the pixels lie in the human mask
    found: Values  # (M,): the regions of at least this severity cover half of the human region; -inf where never


class SeverityCurve(NamedTuple):
    """Precision and recall of the most severe regions, for growing numbers of regions."""

    points: list[tuple[float, float]]  # (recall, precision), the most severe regions alone first; empty if undefined
    images: int  # that the curve rests on
    looked_at: int  # images that have a human mask that counts
    detected: int  # detected regions
    right: int  # detected regions of which at least half of the pixels lie in the human mask
    marked: int  # regions of the human masks
    found: int  # marked regions of which at least half of the pixels are detected


def class_distributions(results: WorkspaceResults, measure: AppliedDetector) -> Distributions | None:
    """Sample the stored maps of a workspace, at most 4 MP of each of 32 images; None without maps and labels."""
    corpus = results.images
    labelled = corpus["labels_kept"] if "labels" not in results.sources else pa.scalar(True)
    kept = firsts(corpus.filter(pc.fill_null(pc.and_(corpus["similarity_kept"], labelled), False)))
    counts = np.zeros((CLASS_COUNT, BINS), np.int64)
    images = 0
    for image in _sampled(results, kept, _TRIED).values():
        try:
            counts += _counted(image)
        except (ImageError, MemoryError):
            continue
        images += 1
        if images == IMAGES:
            break
    pixels = counts.sum(axis=1)
    classes = int(np.count_nonzero(pixels))
    if not classes:
        return None
    edges = np.linspace(0, measure.top, BINS + 1)
    share = SHARE if measure.worse == "above" else 1 - SHARE
    frequent = np.argsort(-pixels, kind="stable")[: min(_CLASSES, classes)].tolist()
    by_name = {class_names()[index]: counts[index] for index in frequent}
    marks = {name: quantile(histogram, edges, share) for name, histogram in by_name.items()}
    marks = dict(sorted(marks.items(), key=lambda item: (item[1], item[0])))
    return Distributions({name: by_name[name] for name in marks}, marks, edges, images, kept.num_rows, classes)


def quantile(counts: Counts, edges: Values, share: float) -> float:
    """Find the value below which a share of a histogram lies; values are taken as evenly spread within each bin.

    >>> quantile(np.array([1, 0, 3]), np.array([0.0, 1.0, 2.0, 3.0]), 0.5)
    2.333...
    """
    return float(np.interp(share, np.concatenate([[0], np.cumsum(counts)]) / counts.sum(), edges))


def severity_curve(results: WorkspaceResults) -> SeverityCurve | None:
    """Compare the masks of a workspace with its human masks, at most 300 of them; None without human masks.

    Images whose masks cannot be read or are of another size are passed over.
    """
    masks = pa.array(results.human_masks(), pa.string())
    images = results.images
    done = images.filter(pc.and_(images["mask_key"].is_valid(), images["failed_stage"].is_null()))
    rows = firsts(done.filter(pc.is_in(done["id"], masks)))
    if rows.num_rows == 0:
        return None
    chosen = _sampled(results, rows, HUMAN_IMAGES)
    regions = results.regions.filter(pc.is_in(results.regions["image"], pa.array(chosen)))
    judged = []
    for name, image in chosen.items():
        try:
            mask, human = (image.picture(kind)[:, :, 0] > 0 for kind in ("mask", "human"))
            judged.append(judge(mask, human, regions.filter(pc.equal(regions["image"], name)).to_pylist()))
        except (ImageError, MemoryError):
            continue
    return curve_of(judged, looked_at=rows.num_rows)


def judge(mask: Mask, human: Mask, regions: list[dict[str, Any]]) -> JudgedRegions:
    """Compare one mask with a human mask.

    Args:
        mask, human: ``(H, W)`` bool. As in the published scripts the outer 5 px do not count.
        regions: Box (x, y, width, height) and severity of each component of the mask.

    Raises:
        ImageError: The mask has a component that is none of the regions.
    """
    whole = Components(mask)
    by_box = {tuple(region[key] for key in ("x", "y", "width", "height")): region["severity"] for region in regions}
    boxes = [tuple(box) for box in whole.boxes.tolist()]
    if not by_box.keys() >= set(boxes):
        raise ImageError("mask", "is not the one of the regions", "run again")
    of_component = np.array([0.0, *(by_box[box] for box in boxes)])
    mask, human, numbers = valid(mask, FRAME), valid(human, FRAME), valid(whole.numbers, FRAME)
    # A component that is cut in two by the crop counts as two components, as in the published scripts.
    parts = Components(mask)
    severity = np.zeros(len(parts) + 1)
    severity[parts.numbers[mask]] = of_component[numbers[mask]]
    return JudgedRegions(severity[1:], parts.covered(human), _found(parts.numbers, severity, human))


def curve_of(judged: list[JudgedRegions], *, looked_at: int) -> SeverityCurve:
    """Compute one curve from the regions of all images."""
    empty = JudgedRegions(np.zeros(0), np.zeros(0, np.bool_), np.zeros(0))
    severity, right, found = (np.concatenate(parts) for parts in zip(empty, *judged, strict=True))
    levels = np.unique(severity)[::-1]
    ascending, descending = np.sort(found), np.argsort(-severity, kind="stable")
    detected = np.searchsorted(-severity[descending], -levels, side="right")
    hits = np.concatenate([[0], np.cumsum(right[descending])])[detected]
    recalled = found.size - np.searchsorted(ascending, levels, side="left")
    points = list(zip((recalled / found.size).tolist(), (hits / detected).tolist(), strict=True)) if found.size else []
    return SeverityCurve(points, len(judged), looked_at, severity.size, int(right.sum()), found.size,
                         int(np.isfinite(found).sum()))  # fmt: skip


def _sampled(results: WorkspaceResults, rows: pa.Table, most: int) -> dict[str, StoredImage]:
    """Choose the rows of `firsts` with the smallest ids, and find where their images are stored, by name."""
    chosen = rows.take(pc.select_k_unstable(rows, min(most, rows.num_rows), [("id", "ascending")]))
    return results.stored_images(chosen["name"].to_pylist(), chosen["id"].to_pylist())


def _counted(image: StoredImage) -> Counts:
    """Count the pixels of an image by class and bin, in all its tiles or in evenly spread ones."""
    measure, labels_of = image.measure, image.label_reader()
    counts = np.zeros(CLASS_COUNT * BINS, np.int64)
    tiles = list(grid(*image.shape, _TILE))
    for index in np.linspace(0, len(tiles) - 1, min(_TILES, len(tiles))).astype(int):
        values = measure.value(image.scores(tiles[index]))
        defined = ~np.isnan(values)
        bins = np.clip(values[defined].astype(np.float64) * (BINS / measure.top), 0, BINS - 1).astype(np.int64)
        classes = labels_of(tiles[index])[defined].astype(np.int64)
        counts += np.bincount(classes * BINS + bins, minlength=counts.size)
    return counts.reshape(CLASS_COUNT, BINS)


def _found(parts: npt.NDArray[Any], severity: Values, human: Mask) -> Values:
    """Find for each human region the severity down to which regions must count, until they cover half of it."""
    marked = Components(human)
    area = [0, *marked.areas.tolist()]
    count, both = len(area), human & (parts > 0)
    pairs, pixels = np.unique(parts[both].astype(np.int64) * count + marked.numbers[both], return_counts=True)
    order = np.argsort(-severity[pairs // count], kind="stable")
    covered_so_far = np.zeros(count, np.int64)
    found = np.full(count, -np.inf)
    for pair, size in zip(pairs[order].tolist(), pixels[order].tolist(), strict=True):
        part, region = divmod(pair, count)
        covered_so_far[region] += size
        if np.isinf(found[region]) and 2 * covered_so_far[region] >= area[region]:
            found[region] = severity[part]
    return found[1:]
