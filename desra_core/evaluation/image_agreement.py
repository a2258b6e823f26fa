"""How well one mask agrees with its ground truth: counts, by class too, and every region of both."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from desra_core.detection.mask import valid
from desra_core.detection.regions import Components, Flags
from desra_core.errors import ImageError, LostError
from desra_core.evaluation.mask_files import FRAME, decode_mask, is_lossy, on_valid_region, shape_of_image
from desra_core.evaluation.mask_pairs import MaskPair
from desra_core.evaluation.metrics import Agreement, count_agreement
from desra_core.files.hashing import read_bytes
from desra_core.images.codec import CLASS_COUNT, Labels, Mask, check_labels, decode_labels, image_size

# The size of masks that are as large as their ground truth: the image's, or that of its valid region.
Sizes = Literal["image", "valid"]


class MaskRegion(NamedTuple):
    """One 8-connected component of a mask.

    Box and area are in pixels of the image; ``inside`` is the number of its pixels in the other mask;
    ``dominant_class`` the most frequent ADE20K class, None without labels.
    """

    x: int
    y: int
    width: int
    height: int
    area: int
    inside: int
    dominant_class: int | None

    @property
    def covered(self) -> bool:
        """Check whether at least half of the region lies in the other mask."""
        return 2 * self.inside >= self.area


@dataclass(frozen=True)
class ImageAgreement:
    """The comparison of one image's masks.

    Attributes:
        pair: The masks.
        shape: ``(H, W)`` of the image.
        agreement: Over the valid region.
        marked, detected: The regions of the ground truth and of the mask, each in reading order.
        classes: The counts by class: a pixel counts for its own class, a region for its dominant class. None without
            labels.
        prominent: Against the prominent regions alone, see `prominent_agreement`; None without ratings.
        lossy: The files that are JPEG or lossy WebP.
        assumed: Whether no file showed the size of the image, so that `Sizes` decided.
        framed: Whether the size was assumed, and the mask marks something in the outermost 5 px.
    """

    pair: MaskPair
    shape: tuple[int, int]
    agreement: Agreement
    marked: list[MaskRegion]
    detected: list[MaskRegion]
    classes: dict[int, Agreement] | None
    prominent: Agreement | None
    lossy: tuple[Path, ...]
    assumed: bool
    framed: bool


def compare_pair(pair: MaskPair, *, sizes: Sizes = "image", prominent: Collection[int] | None = None) -> ImageAgreement:
    """Read a mask and its ground truth, and compare them on the valid region.

    Args:
        pair: The masks.
        sizes: The size of both masks, where they are of one size and no other file shows the image's size.
        prominent: The numbers of the prominent regions of the ground truth, from 1; None without ratings.

    Raises:
        ImageError: A file cannot be read, is not binary, or has a size that does not fit.
    """
    paths = pair.mask, pair.ground_truth
    contents = [read_bytes(path) for path in paths]
    whole_mask, whole_truth = (decode_mask(data, path) for data, path in zip(contents, paths, strict=True))
    labels = read_labels(pair.labels) if pair.labels else None
    shape = _known_shape(pair, whole_mask, whole_truth, labels)
    assumed = shape is None
    if shape is None:
        added = 2 * FRAME if sizes == "valid" else 0
        shape = whole_mask.shape[0] + added, whole_mask.shape[1] + added
    mask = on_valid_region(whole_mask, shape, pair.mask)
    truth = on_valid_region(whole_truth, shape, pair.ground_truth)
    classes = None if labels is None else valid(labels, FRAME)
    detected, marked = Components(mask), Components(truth)
    found = mask_regions(marked, mask, classes, FRAME)
    right = mask_regions(detected, truth, classes, FRAME)
    flags = None if prominent is None else np.isin(np.arange(1, len(marked) + 1), list(prominent))
    return ImageAgreement(
        pair=pair,
        shape=shape,
        agreement=count_agreement(mask, truth, _covered(right), _covered(found)),
        marked=found,
        detected=right,
        classes=None if classes is None else _by_class(mask, truth, right, found, classes),
        prominent=None if flags is None else prominent_agreement(mask, truth, flags),
        lossy=tuple(compress(paths, map(is_lossy, contents))),
        assumed=assumed,
        framed=assumed and bool(np.count_nonzero(whole_mask) > np.count_nonzero(valid(whole_mask, FRAME))),
    )


def mask_regions(components: Components, other: Mask, labels: Labels | None, offset: int) -> list[MaskRegion]:
    """Measure the components of a mask against another mask, in reading order.

    Args:
        components: Of an ``(H, W)`` mask.
        other: ``(H, W)`` bool.
        labels: ``(H, W)`` uint8 in 0..149, or None.
        offset: Pixels from the image's left and upper edge to the mask's.
    """
    boxes = np.add(components.boxes, (offset, offset, 0, 0)).tolist()
    measured = components.areas.tolist(), components.overlap(other).tolist(), components.dominant_classes(labels)
    return [MaskRegion(*box, *rest) for box, *rest in zip(boxes, *measured, strict=True)]


def prominent_agreement(mask: Mask, ground_truth: Mask, prominent: Flags) -> Agreement:
    """Compare a mask with the prominent regions of a ground truth; its other regions are neither right nor wrong.

    Pixels of the other regions do not count. A detected region is right when at least half of its pixels outside of
    the other regions lie in prominent ones. A detected region is left out when it is not right, but at least half of it
    lies in the whole ground truth. All others are wrong.

    Args:
        mask, ground_truth: ``(H, W)`` bool.
        prominent: ``(N,)`` bool, a flag per region of the ground truth in reading order.
    """
    marked, detected = Components(ground_truth), Components(mask)
    asked = marked.chosen(prominent)
    ignored = ground_truth & ~asked
    inside, elsewhere = detected.overlap(asked), detected.overlap(ignored)
    right = (inside > 0) & (2 * inside >= detected.areas - elsewhere)
    left_out = ~right & (2 * (inside + elsewhere) >= detected.areas)
    return count_agreement(mask & ~ignored, asked, right[~left_out], marked.covered(mask)[prominent])


def _known_shape(pair: MaskPair, mask: Mask, truth: Mask, labels: Labels | None) -> tuple[int, int] | None:
    """Find ``(H, W)`` of the image, if its files show it (raises `ImageError` where they contradict each other)."""
    shape = shape_of_image(mask, truth, pair.mask, pair.ground_truth)
    if shape is None and pair.whole:
        shape = mask.shape
    if labels is not None and pair.labels is not None:
        shown, path = labels.shape, pair.labels
    elif pair.gan_sr is not None and shape is None:
        shown, path = image_size(read_bytes(pair.gan_sr), pair.gan_sr), pair.gan_sr
    else:
        return shape
    if shown not in ([shape] if shape else [mask.shape, (mask.shape[0] + 2 * FRAME, mask.shape[1] + 2 * FRAME)]):
        reason = f"is {shown[1]}x{shown[0]} but {pair.mask} is {mask.shape[1]}x{mask.shape[0]}"
        raise ImageError(path, reason, "give the file that belongs to these masks")
    return shown


def _covered(regions: Sequence[MaskRegion]) -> Flags:
    return np.array([region.covered for region in regions], np.bool_)


def _by_class(
    mask: Mask, truth: Mask, detected: list[MaskRegion], marked: list[MaskRegion], labels: Labels
) -> dict[int, Agreement]:
    regions = []
    for chosen in (detected, marked):
        regions.append([region.dominant_class for region in chosen])
        regions.append([region.dominant_class for region in chosen if region.covered])
    # In the order of the fields of Agreement.
    columns = [labels[mask & truth], labels[mask | truth], *regions, labels[mask], labels[truth]]
    rows = zip(*(np.bincount(np.array(column, np.intp), minlength=CLASS_COUNT) for column in columns), strict=True)
    return {index: Agreement(*map(int, row)) for index, row in enumerate(rows) if any(row)}


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
