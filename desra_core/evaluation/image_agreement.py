"""How well one mask agrees with its ground truth: counts, by class too, and every region of both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any, Literal

import numpy as np

from desra_core.detection.class_weights import CLASS_COUNT
from desra_core.detection.mask import valid
from desra_core.detection.regions import Components
from desra_core.errors import ImageError, LostError
from desra_core.evaluation.mask_files import FRAME, decode_mask, is_lossy, on_valid_region, shape_of_image
from desra_core.evaluation.mask_pairs import MaskPair
from desra_core.evaluation.mask_regions import MaskRegion, mask_regions
from desra_core.evaluation.metrics import Agreement
from desra_core.files.hashing import read_bytes
from desra_core.images.codec import Labels, Mask, decode_labels, image_size

# What masks have that are as large as their ground truth, where nothing else tells: the size of the image or that of
# its valid region.
Sizes = Literal["image", "valid"]


@dataclass(frozen=True)
class ImageAgreement:
    """What was found of one image.

    Attributes
    ----------
    pair
        The masks.
    shape
        ``(H, W)`` of the image.
    agreement
        Over the valid region.
    marked, detected
        The regions of the ground truth and of the mask, each in reading order.
    classes
        The same counts by class: of pixels by their own class, of regions by their dominant one. None without labels.
    prominent
        Against the prominent regions alone, see `prominent_agreement`; None without ratings.
    lossy
        Which of the files are JPEG or lossy WebP.
    assumed, framed
        Whether only `Sizes` told that the masks have their size, and whether the mask then marks something in the
        outermost 5 px.
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


def compare_pair(
    pair: MaskPair, *, sizes: Sizes = "image", noticed: Mapping[int, float] | None = None, least_noticed: float = 0.5
) -> ImageAgreement:
    """Read a mask and its ground truth, and compare them on the valid region.

    Parameters
    ----------
    pair
        The masks.
    sizes
        What they have if they are of one size and nothing else tells.
    noticed
        The share of viewers by number of the ground-truth region, from 1.
    least_noticed
        Regions noticed by at least this share are prominent.

    Raises
    ------
    ImageError
        A file cannot be read, is not binary, or has a size that does not fit.
    """
    (whole_mask, mask_lossy), (whole_truth, truth_lossy) = map(_read, (pair.mask, pair.ground_truth))
    labels = _read_labels(pair.labels) if pair.labels else None
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
    prominent = None
    if noticed is not None:
        flags = np.array([noticed.get(number, -1) >= least_noticed for number in range(1, len(marked) + 1)], np.bool_)
        prominent = prominent_agreement(mask, truth, flags)
    return ImageAgreement(
        pair=pair,
        shape=shape,
        agreement=_agreement(mask, truth, right, found),
        marked=found,
        detected=right,
        classes=None if classes is None else _by_class(mask, truth, right, found, classes),
        prominent=prominent,
        lossy=tuple(compress((pair.mask, pair.ground_truth), (mask_lossy, truth_lossy))),
        assumed=assumed,
        framed=assumed and _marks_frame(whole_mask),
    )


def prominent_agreement(mask: Mask, ground_truth: Mask, prominent: np.ndarray[Any, np.dtype[np.bool_]]) -> Agreement:
    """Hold a mask against some regions of a ground truth; the others are neither right nor wrong.

    Pixels of the others do not count. A detected region is right when at least half of its pixels outside of them lie
    in a prominent one; one that is right only by all regions of the ground truth is left out; the rest is wrong.

    Parameters
    ----------
    mask, ground_truth
        ``(H, W)`` bool.
    prominent
        ``(N,)`` bool, a flag per region of the ground truth in reading order.
    """
    marked, detected = Components(ground_truth), Components(mask)
    asked = marked.chosen(prominent)
    ignored = ground_truth & ~asked
    counted = mask & ~ignored
    inside, elsewhere = detected.overlap(asked), detected.overlap(ignored)
    right = (inside > 0) & (2 * inside >= detected.areas - elsewhere)
    left_out = ~right & (2 * (inside + elsewhere) >= detected.areas)
    found = prominent & marked.covered(mask)
    return Agreement(
        intersection=int((counted & asked).sum()),
        union=int((counted | asked).sum()),
        detected=int((~left_out).sum()),
        right=int(right.sum()),
        marked=int(prominent.sum()),
        found=int(found.sum()),
        mask_pixels=int(counted.sum()),
        ground_truth_pixels=int(asked.sum()),
    )


def _read(path: Path) -> tuple[Mask, bool]:
    """A mask, and whether its file is lossy."""
    data = read_bytes(path)
    return decode_mask(data, path), is_lossy(data)


def _known_shape(pair: MaskPair, mask: Mask, truth: Mask, labels: Labels | None) -> tuple[int, int] | None:
    """``(H, W)`` of the image, as far as its files tell (raises `ImageError` where they contradict each other)."""
    shape = shape_of_image(mask, truth, pair.mask, pair.ground_truth)
    if shape is None and pair.whole:
        shape = mask.shape
    told, path = (labels.shape, pair.labels) if labels is not None else (None, pair.gan_sr)
    if path is None or (shape is not None and told is None):
        return shape
    told = told or image_size(read_bytes(path), path)
    if told not in ([shape] if shape else [mask.shape, (mask.shape[0] + 2 * FRAME, mask.shape[1] + 2 * FRAME)]):
        reason = f"is {told[1]}x{told[0]} but {pair.mask} is {mask.shape[1]}x{mask.shape[0]}"
        raise ImageError(path, reason, "give the file that belongs to these masks")
    return told


def _agreement(mask: Mask, truth: Mask, detected: list[MaskRegion], marked: list[MaskRegion]) -> Agreement:
    return Agreement(
        intersection=int((mask & truth).sum()),
        union=int((mask | truth).sum()),
        detected=len(detected),
        right=sum(region.covered for region in detected),
        marked=len(marked),
        found=sum(region.covered for region in marked),
        mask_pixels=int(mask.sum()),
        ground_truth_pixels=int(truth.sum()),
    )


def _by_class(
    mask: Mask, truth: Mask, detected: list[MaskRegion], marked: list[MaskRegion], labels: Labels
) -> dict[int, Agreement]:
    pixels = [np.bincount(labels[part], minlength=CLASS_COUNT) for part in (mask & truth, mask | truth, mask, truth)]
    regions = [
        np.bincount([region.dominant_class for region in chosen if region.dominant_class is not None],
                    minlength=CLASS_COUNT)
        for chosen in (detected, [region for region in detected if region.covered],
                       marked, [region for region in marked if region.covered])
    ]  # fmt: skip
    rows = zip(*pixels[:2], *regions, *pixels[2:], strict=True)
    return {index: Agreement(*map(int, row)) for index, row in enumerate(rows) if any(row)}


def _read_labels(path: Path) -> Labels:
    """Labels of a file, or an array as a workspace stores it (raises `ImageError`)."""
    labels = _read_stored_labels(path) if path.is_dir() else decode_labels(read_bytes(path), path)
    if labels.max(initial=0) >= CLASS_COUNT:
        raise ImageError(path, f"holds the label {labels.max()}", "labels are ADE20K indices 0..149")
    return labels


def _read_stored_labels(path: Path) -> Labels:
    from desra_core.workspace.arrays import StoredArray

    damaged = ImageError(path, "is damaged", "run desra detect or mine again, or give --labels")
    try:
        labels = StoredArray(path).whole()
    except LostError:
        raise damaged from None
    if labels.dtype != np.uint8 or labels.ndim != 2:
        raise damaged
    return labels


def _marks_frame(mask: Mask) -> bool:
    inner = valid(mask, FRAME)
    return int(np.count_nonzero(mask)) > int(np.count_nonzero(inner))
