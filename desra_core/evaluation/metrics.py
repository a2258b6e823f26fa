"""The mask metrics of the DeSRA paper: counted per image, class and region, and pooled over a set with intervals.

A region of one mask is *covered* by the other mask when at least half of its pixels lie in that mask. A detected region
is right when the ground truth covers it (precision). A ground-truth region is found when the mask covers it (recall).
With an `Overlap`, ground-truth regions are counted a second time, by another share and a widened mask.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import compress
from operator import add
from pathlib import Path
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from desra_core.detection.mask import Components, Flags, valid
from desra_core.errors import ImageError, LostError
from desra_core.evaluation.mask_files import FRAME, SIZES, MaskPair, decode_any_mask, is_lossy, on_valid_region
from desra_core.files import read_bytes
from desra_core.images.codec import CLASS_COUNT, Labels, Mask, check_labels, decode_labels, image_size

# The size of masks that are as large as their ground truth: the image's, or that of its valid region.
Sizes = Literal["image", "valid"]

MEASURES = (
    "iou", "iou_with_empty", "precision", "recall", "f1", "pixel_f1", "pixel_f1_mean", "recall_at_kappa",
    "flagged_share",
)  # fmt: skip
CONFIDENCE = 0.95
RESAMPLES = 2000
SEED = 0
INTERVAL_KIND = f"{100 * CONFIDENCE:g} % percentile bootstrap over images, {RESAMPLES} resamples, seed {SEED}"

# 95 % of a normal distribution lie within this many deviations of its mean.
_Z = 1.959963984540054
_WHY_UNDEFINED = {
    "iou": "no mask and no ground truth marks anything",
    "iou_with_empty": "there is no image",
    "precision": "no region was detected",
    "recall": "the ground truth marks no region",
    "f1": "precision or recall is undefined",
    "pixel_f1": "no mask and no ground truth marks anything",
    "pixel_f1_mean": "no mask and no ground truth marks anything",
    "recall_at_kappa": "the ground truth marks no region",
    "flagged_share": "there is no image",
}

Interval = tuple[float, float]


class Overlap(NamedTuple):
    """When a ground-truth region counts in `Agreement.found_at_kappa`; by default as for recall.

    At least the share ``kappa`` of its pixels must lie in the mask, which is widened by ``dilate`` px to all sides: by
    a square, as in the morphology of DeSRA's masks.
    """

    kappa: float = 0.5
    dilate: int = 0

    def flags(self, regions: Components, mask: Mask) -> Flags:
        """Flag the regions of a ground truth that count as found by an ``(H, W)`` bool mask: ``(N,)`` bool."""
        return np.asarray(shares_inside(regions, mask, self.dilate) >= self.kappa)


def shares_inside(regions: Components, mask: Mask, dilate: int) -> npt.NDArray[np.float64]:
    """Measure the share of each region in an ``(H, W)`` bool mask, widened by ``dilate`` px: ``(N,)``."""
    if dilate:
        mask = cv2.dilate(mask.astype(np.uint8), np.ones((2 * dilate + 1,) * 2, np.uint8)) > 0
    return np.asarray(regions.overlap(mask) / regions.areas)


AS_PUBLISHED = Overlap()


@dataclass(frozen=True)
class Agreement:
    """Counts of how far two masks of one image agree, or their sums over several images.

    The fields are also columns of the tables and keys of the JSON files that ``desra evaluate`` writes.
    """

    intersection: int = 0  # pixels that are marked in both masks
    union: int = 0  # pixels that are marked in at least one mask
    detected: int = 0  # regions of the mask
    right: int = 0  # regions of the mask that the ground truth covers
    marked: int = 0  # regions of the ground truth
    found: int = 0  # regions of the ground truth that the mask covers
    mask_pixels: int = 0  # marked pixels of the mask
    ground_truth_pixels: int = 0  # marked pixels of the ground truth
    pixels: int = 0  # all pixels that count, marked or not
    found_at_kappa: int = 0  # regions of the ground truth that the mask finds by an `Overlap`

    @property
    def empty(self) -> bool:
        """Check whether neither mask marks a pixel: the masks agree, but the published IoU is undefined."""
        return self.union == 0

    @property
    def iou(self) -> float | None:
        """Intersection over union; None where both masks are empty."""
        return ratio(self.intersection, self.union)

    @property
    def precision(self) -> float | None:
        """Share of the detected regions that are right; None without detected regions."""
        return ratio(self.right, self.detected)

    @property
    def recall(self) -> float | None:
        """Share of the ground-truth regions that were found; None without ground-truth regions."""
        return ratio(self.found, self.marked)

    @property
    def pixel_precision(self) -> float | None:
        """Share of the mask's pixels that lie in the ground truth; None for an empty mask."""
        return ratio(self.intersection, self.mask_pixels)

    @property
    def pixel_recall(self) -> float | None:
        """Share of the ground truth's pixels that lie in the mask; None for an empty ground truth."""
        return ratio(self.intersection, self.ground_truth_pixels)

    @property
    def pixel_f1(self) -> float | None:
        """Harmonic mean of the precision and recall of pixels (Dice); None where both masks are empty."""
        return ratio(2 * self.intersection, self.mask_pixels + self.ground_truth_pixels)

    @property
    def recall_at_kappa(self) -> float | None:
        """Share of the ground-truth regions that were found by an `Overlap`; None without ground-truth regions."""
        return ratio(self.found_at_kappa, self.marked)

    @property
    def flagged_share(self) -> float | None:
        """Share of the pixels that the mask marks; None without pixels."""
        return ratio(self.mask_pixels, self.pixels)

    @property
    def f1(self) -> float | None:
        """Harmonic mean of precision and recall; None where either is undefined, 0 where both are 0."""
        precision, recall = self.precision, self.recall
        if precision is None or recall is None:
            return None
        return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


class MaskRegion(NamedTuple):
    """One 8-connected component of a mask; box and area are in pixels of the image."""

    x: int
    y: int
    width: int
    height: int
    area: int
    inside: int  # its pixels that are marked in the other mask
    dominant_class: int | None  # the most frequent ADE20K class; None without labels

    @property
    def covered(self) -> bool:
        """Check whether at least half of the region lies in the other mask."""
        return 2 * self.inside >= self.area


@dataclass(frozen=True)
class ImageAgreement:
    """The comparison of one image's masks."""

    pair: MaskPair
    shape: tuple[int, int]  # ``(H, W)`` of the image
    agreement: Agreement  # over the valid region
    marked: list[MaskRegion]  # the regions of the ground truth, in reading order
    detected: list[MaskRegion]  # the regions of the mask, in reading order
    # Counts by class, None without labels: a pixel counts for its own class, a region for its dominant class.
    classes: dict[int, Agreement] | None
    prominent: Agreement | None  # with the prominent regions alone, see `prominent_agreement`; None without ratings
    lossy: tuple[Path, ...]  # the files that are JPEG or lossy WebP
    size_assumed: bool  # no file shows the size of the image: ``shape`` follows from the argument ``sizes``
    marks_border: bool  # the mask's file has marked pixels among its outermost 5 px


@dataclass(frozen=True)
class MaskScores:
    """The measures of a set of masks, in the order of `MEASURES`."""

    images: int
    empty_pairs: int  # images in which neither mask marks a pixel
    total: Agreement  # the sums over the images, whose precision, recall and F1 are those of the set
    # By measure, None where undefined. iou and pixel_f1_mean are means over images, without images whose masks are both
    # empty; in iou_with_empty such images count as 1. The others are those of the sums.
    values: dict[str, float | None]
    intervals: dict[str, Interval | None]  # 95 % intervals by measure, see `bootstrap_intervals`

    @property
    def undefined(self) -> dict[str, str]:
        """Explain by name why a measure has no value."""
        return {measure: _WHY_UNDEFINED[measure] for measure, value in self.values.items() if value is None}


def compare_masks(mask: Mask, ground_truth: Mask, overlap: Overlap = AS_PUBLISHED) -> Agreement:
    """Count how far a mask and a ground truth agree.

    Args:
        mask, ground_truth: ``(H, W)`` bool, of one shape; 8-connected components are the regions. The published scripts
            take the valid region only: crop both by 5 px.
        overlap: When a region counts in ``found_at_kappa``.

    Raises:
        ValueError: The shapes differ.
    """
    marked = Components(ground_truth)
    right, found = Components(mask).covered(ground_truth), marked.covered(mask)
    return count_agreement(mask, ground_truth, right, found, overlap.flags(marked, mask))


def count_agreement(
    mask: Mask, ground_truth: Mask, right: Flags | Sequence[bool], found: Flags | Sequence[bool], at_kappa: Flags
) -> Agreement:
    """Count the pixels of two masks, and their regions by flags: ``(N,)`` right detections, ``(M,)`` found regions.

    ``at_kappa`` has the ``(M,)`` flags by an `Overlap`.
    """
    return Agreement(
        intersection=int((mask & ground_truth).sum()),
        union=int((mask | ground_truth).sum()),
        detected=len(right),
        right=int(np.sum(right)),
        marked=len(found),
        found=int(np.sum(found)),
        mask_pixels=int(mask.sum()),
        ground_truth_pixels=int(ground_truth.sum()),
        pixels=mask.size,
        found_at_kappa=int(at_kappa.sum()),
    )


def compare_pair(
    pair: MaskPair,
    *,
    sizes: Sizes = "image",
    prominent: Collection[int] | None = None,
    overlap: Overlap = AS_PUBLISHED,
) -> ImageAgreement:
    """Read a mask and its ground truth, and compare them on the valid region.

    Args:
        pair: The masks.
        sizes: The size of the masks, if they have one size and no other file shows the image's size.
        prominent: The numbers of the prominent regions of the ground truth, from 1; None without ratings.
        overlap: When a region counts in ``found_at_kappa``.

    Raises:
        ImageError: A file cannot be read, is not binary, or has a size that does not fit.
    """
    paths = pair.mask, pair.ground_truth
    contents = [read_bytes(path) for path in paths]
    whole_mask, whole_truth = (decode_any_mask(data, path) for data, path in zip(contents, paths, strict=True))
    labels = read_labels(pair.labels) if pair.labels else None
    shape = _known_shape(pair, whole_mask, whole_truth, labels)
    size_assumed = shape is None
    if shape is None:
        added = 2 * FRAME if sizes == "valid" else 0
        shape = whole_mask.shape[0] + added, whole_mask.shape[1] + added
    mask = on_valid_region(whole_mask, shape, pair.mask)
    truth = on_valid_region(whole_truth, shape, pair.ground_truth)
    classes = None if labels is None else valid(labels, FRAME)
    detected, marked = Components(mask), Components(truth)
    marked_regions = mask_regions(marked, mask, classes, FRAME)
    detected_regions = mask_regions(detected, truth, classes, FRAME)
    right, found = ([region.covered for region in regions] for regions in (detected_regions, marked_regions))
    at_kappa = overlap.flags(marked, mask)
    by_class = None
    if classes is not None:
        by_class = _by_class(mask, truth, detected_regions, marked_regions, at_kappa, classes)
    flags = None if prominent is None else np.isin(np.arange(1, len(marked) + 1), list(prominent))
    return ImageAgreement(
        pair=pair,
        shape=shape,
        agreement=count_agreement(mask, truth, right, found, at_kappa),
        marked=marked_regions,
        detected=detected_regions,
        classes=by_class,
        prominent=None if flags is None else prominent_agreement(mask, truth, flags, overlap),
        lossy=tuple(compress(paths, map(is_lossy, contents))),
        size_assumed=size_assumed,
        marks_border=bool(np.count_nonzero(whole_mask) > np.count_nonzero(valid(whole_mask, FRAME))),
    )


def mask_regions(components: Components, other: Mask, labels: Labels | None, offset: int) -> list[MaskRegion]:
    """Measure the components of a mask against another mask, in reading order.

    Args:
        components: Of an ``(H, W)`` mask.
        other: ``(H, W)`` bool.
        labels: ``(H, W)`` uint8 in 0..149, or None.
        offset: Pixels from the image's left and upper edges to the mask's edges.
    """
    boxes = np.add(components.boxes, (offset, offset, 0, 0)).tolist()
    measured = components.areas.tolist(), components.overlap(other).tolist(), components.dominant_classes(labels)
    return [MaskRegion(*box, *rest) for box, *rest in zip(boxes, *measured, strict=True)]


def prominent_agreement(
    mask: Mask,
    ground_truth: Mask,
    prominent: Flags,
    overlap: Overlap = AS_PUBLISHED,
) -> Agreement:
    """Compare a mask with the prominent regions of a ground truth; the ground truth's other regions are ignored.

    Pixels of ignored regions do not count. A detected region is right when at least half of its pixels outside of
    ignored regions lie in prominent regions. A detected region is left out when it is not right, but at least half of
    it lies in the whole ground truth. All other detected regions are wrong.

    Args:
        mask, ground_truth: ``(H, W)`` bool.
        prominent: ``(N,)`` bool, a flag per region of the ground truth in reading order.
        overlap: When a region counts in ``found_at_kappa``.
    """
    marked, detected = Components(ground_truth), Components(mask)
    asked = marked.chosen(prominent)
    ignored = ground_truth & ~asked
    inside, elsewhere = detected.overlap(asked), detected.overlap(ignored)
    right = (inside > 0) & (2 * inside >= detected.areas - elsewhere)
    left_out = ~right & (2 * (inside + elsewhere) >= detected.areas)
    found, at_kappa = marked.covered(mask)[prominent], overlap.flags(marked, mask)[prominent]
    counts = count_agreement(mask & ~ignored, asked, right[~left_out], found, at_kappa)
    return replace(counts, pixels=int(mask.size - ignored.sum()))


def read_labels(path: Path) -> Labels:
    """Read class labels from an image file or from an array of a workspace (raises `ImageError`)."""
    if path.is_dir():
        from desra_core.workspace.arrays import StoredArray

        damaged = ImageError(path, "is damaged", "run desra detect or mine again, or give --labels")
        try:
            labels = StoredArray(path).whole()
        except LostError:
            raise damaged from None
        if labels.dtype != np.uint8 or labels.ndim != 2:
            raise damaged
        check_labels(labels, path)
        return labels
    return decode_labels(read_bytes(path), path)


def pooled(agreements: Iterable[Agreement]) -> Agreement:
    """Add up the counts of several images; the published precision and recall of a set are those of the sums."""
    rows = [tuple(vars(agreement).values()) for agreement in agreements]
    return Agreement(*(sum(column) for column in zip(*rows, strict=True)))


def mean_iou(agreements: Iterable[Agreement], *, empty: float | None = None) -> float | None:
    """Average the IoU over images; None where no IoU is defined.

    Args:
        agreements: One per image.
        empty: The IoU of an image in which both masks are empty; 1 counts such an image as agreement. By default such
            images are left out, because with them the published mean is undefined.
    """
    return _mean(empty if agreement.iou is None else agreement.iou for agreement in agreements)


def _mean(values: Iterable[float | None]) -> float | None:
    """Average the values that are defined."""
    defined = [value for value in values if value is not None]
    # Added one by one like in the published script, because sum() rounds differently from Python 3.12 on.
    return reduce(add, defined) / len(defined) if defined else None


def measure(agreements: Sequence[Agreement]) -> dict[str, float | None]:
    """Compute the `MEASURES` of a set of images; the mean IoU is summed in their order."""
    total = pooled(agreements)
    means = {
        "iou": mean_iou(agreements),
        "iou_with_empty": mean_iou(agreements, empty=1.0),
        "pixel_f1_mean": _mean(agreement.pixel_f1 for agreement in agreements),
    }
    return {name: means[name] if name in means else getattr(total, name) for name in MEASURES}


def score_masks(agreements: Sequence[Agreement]) -> MaskScores:
    """Measure a set of images, with intervals."""
    return MaskScores(
        images=len(agreements),
        empty_pairs=sum(agreement.empty for agreement in agreements),
        total=pooled(agreements),
        values=measure(agreements),
        intervals=bootstrap_intervals(agreements),
    )


def scores_document(scores: MaskScores) -> dict[str, Any]:
    """Describe the measures of a set, their intervals, and why one is undefined."""
    return {
        **scores.values,
        "intervals": scores.intervals,
        "interval_kind": INTERVAL_KIND,
        "undefined": scores.undefined,
        "images": scores.images,
        "empty_pairs": scores.empty_pairs,
        **vars(scores.total),
    }


def bootstrap_intervals(agreements: Sequence[Agreement]) -> dict[str, Interval | None]:
    """Bound the measures of a set of images by the percentile bootstrap over images (Efron 1979).

    Each of `RESAMPLES` draws as many images with replacement, and is measured like the set.

    Returns:
        Lower and upper bound by measure, within 0..1. None where the measure is undefined or rests on a single image.
        Resamples in which a measure is undefined are left out.
    """
    images = len(agreements)
    if images < 2:
        return dict.fromkeys(MEASURES)
    counts = [
        (a.iou or 0, a.pixel_f1 or 0, not a.empty, a.empty, a.right, a.detected, a.found, a.marked, a.found_at_kappa,
         a.intersection, a.mask_pixels, a.ground_truth_pixels, a.pixels)
        for a in agreements
    ]  # fmt: skip
    columns = np.array(counts, np.float64)
    draws, sums = np.random.default_rng(SEED), []
    for _ in range(RESAMPLES):
        times = np.bincount(draws.integers(images, size=images), minlength=images)
        # Fractions are summed apart: only the other columns are whole numbers, whose matrix product is exact.
        sums.append([*((times * columns[:, part]).sum() for part in (0, 1)), *(times @ columns[:, 2:])])
    iou, pixel_f1, with_pixels, empty, right, all_detected, found, all_marked, *others = np.transpose(sums)
    at_kappa, both, in_masks, in_truths, pixels = others
    with np.errstate(divide="ignore", invalid="ignore"):
        precision, recall = right / all_detected, found / all_marked
        # This form of F1 is 0 where precision, recall or both are 0.
        f1 = 2 / (1 / precision + 1 / recall)
        values = (
            iou / with_pixels, (iou + empty) / (with_pixels + empty), precision, recall, f1,
            2 * both / (in_masks + in_truths), pixel_f1 / with_pixels, at_kappa / all_marked, in_masks / pixels,
        )  # fmt: skip
    tail = (1 - CONFIDENCE) / 2
    defined, detected, marked = np.count_nonzero(columns[:, [2, 5, 7]], axis=0)
    support = (defined, images, detected, marked, min(detected, marked), defined, defined, marked, images)
    intervals: dict[str, Interval | None] = dict.fromkeys(MEASURES)
    for measure, row, images_behind in zip(MEASURES, values, support, strict=True):
        finite = row[np.isfinite(row)]
        if images_behind > 1 and finite.size:
            low, high = np.quantile(finite, [tail, 1 - tail])
            intervals[measure] = float(low), float(high)
    return intervals


def wilson_interval(successes: int, trials: int, *, deviations: float = _Z) -> Interval:
    """Compute an interval of a share after so many successes in so many independent trials (Wilson 1927).

    It reaches so many standard deviations to both sides, by default those of the 95 % interval.

    Returns:
        Bounds within 0..1; ``(0, 1)`` without trials.

    Raises:
        ValueError: There are more successes than trials, or fewer than none.

    Examples:
        >>> [round(bound, 4) for bound in wilson_interval(8, 10)]
        [0.4902, 0.9433]
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes in {trials} trials")
    if trials == 0:
        return 0.0, 1.0
    share, spread = successes / trials, deviations**2 / trials
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def psnr(squared_error: float, pixels: int) -> float:
    """Compute the peak signal-to-noise ratio in dB from a sum of squared errors, in levels of 255; infinite for 0."""
    return 10 * math.log10(255**2 * pixels / squared_error) if squared_error else math.inf


def ratio(part: float, whole: float) -> float | None:
    """Divide, or return None where the whole is 0."""
    return part / whole if whole else None


def _known_shape(pair: MaskPair, mask: Mask, truth: Mask, labels: Labels | None) -> tuple[int, int] | None:
    """Find ``(H, W)`` of the image, if its files show it (raises `ImageError` where they contradict each other)."""
    # An image is as large as its mask, or larger by a frame on all sides. Both masks must agree on a possible size.
    by_mask, by_truth = (
        {given.shape, (given.shape[0] + 2 * FRAME, given.shape[1] + 2 * FRAME)} for given in (mask, truth)
    )
    possible = by_mask & by_truth
    size = f"{mask.shape[1]}x{mask.shape[0]}"
    if not possible:
        reason = f"is {size} but {pair.ground_truth} is {truth.shape[1]}x{truth.shape[0]}"
        raise ImageError(pair.mask, reason, SIZES)
    if pair.whole and mask.shape == truth.shape:
        possible = {mask.shape}
    # Other files of the image show its size.
    if labels is not None and pair.labels is not None:
        shown, path = labels.shape, pair.labels
    elif pair.gan_sr is not None and len(possible) > 1:
        shown, path = image_size(read_bytes(pair.gan_sr), pair.gan_sr), pair.gan_sr
    else:
        return possible.pop() if len(possible) == 1 else None
    if shown not in possible:
        reason = f"is {shown[1]}x{shown[0]} but {pair.mask} is {size}"
        raise ImageError(path, reason, "give the file that belongs to these masks")
    return shown


def _by_class(
    mask: Mask, truth: Mask, detected: list[MaskRegion], marked: list[MaskRegion], at_kappa: Flags, labels: Labels
) -> dict[int, Agreement]:
    regions = []
    for chosen in (detected, marked):
        regions.append([region.dominant_class for region in chosen])
        regions.append([region.dominant_class for region in chosen if region.covered])
    # The columns have the order of the fields of Agreement.
    found_at_kappa = [region.dominant_class for region in compress(marked, at_kappa)]
    columns = [labels[mask & truth], labels[mask | truth], *regions, labels[mask], labels[truth], labels.ravel(),
               found_at_kappa]  # fmt: skip
    rows = zip(*(np.bincount(np.array(column, np.intp), minlength=CLASS_COUNT) for column in columns), strict=True)
    return {index: Agreement(*map(int, row)) for index, row in enumerate(rows) if any(row[:-2])}
