"""A page about an evaluation: scores with intervals, the worst images, classes, and the files that were not judged."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from desra_core.detection.class_weights import class_names
from desra_core.errors import ImageError
from desra_core.evaluation.evaluation import Evaluation, class_rows, image_rows, rated_regions
from desra_core.evaluation.mask_files import FRAME, on_valid_region, read_mask
from desra_core.evaluation.metrics import ImageAgreement, MaskScores, wilson_interval
from desra_core.evaluation.table import counted, fixed
from desra_core.files.content import read_bytes, replace_file
from desra_core.images.codec import decode
from desra_core.images.parts import RGB, fitted, rgb8
from desra_core.report.charts import bar_chart, distributions, inline
from desra_core.report.document import Cell, make_cell, render_page
from desra_core.report.pictures import AGREEMENT_SIDE, MAX_PIXELS, drawn_agreement

KINDS = {"gan_sr": "GAN-SR", "agreement": "mask against ground truth"}
NAMES = {"iou": "IoU", "precision": "precision", "recall": "recall", "f1": "F1"}
WORST = 6

_ROWS, _LISTED = 200, 200
_BINS, _DRAWN_CLASSES = 20, 12
# Edges of the bins of areas of regions, in pixels.
_EDGES = (0, 1000, 4000, 16_000, 64_000, math.inf)
_FOUND, _RIGHT = "share of ground-truth regions that are found", "share of detected regions that are right"


def write_evaluation_page(evaluation: Evaluation, path: Path) -> Path:
    """Write the page of an evaluation to ``path``, and return that: one HTML file that needs no other file.

    The same evaluation gives the same bytes.

    Raises:
        TransientError: The disk is full or failed.
    """
    prominent, worst = evaluation.prominent, worst_images(evaluation.images)
    rows = sorted(image_rows(evaluation), key=lambda row: (row["iou"] is None, row["iou"]))
    ranked = sorted((evaluation.classes or {}).items(), key=lambda item: (-item[1].marked, item[0]))
    by_class = {class_names()[index]: (counts.found, counts.marked) for index, counts in ranked if counts.marked}
    page = render_page(
        "evaluation.html.j2",
        evaluation=evaluation,
        masks=evaluation.pairing.masks,
        tiles=_tiles(evaluation.scores),
        rated=rated_regions(evaluation),
        prominent_tiles=_tiles(prominent) if prominent else [],
        notes=_notes(evaluation),
        plots=_charts(evaluation),
        worst={kind: [(image, _cells(image)) for image in found] for kind, found in worst.items()},
        kinds=KINDS,
        rows=rows[:_ROWS],
        all_rows=len(rows),
        classes=sorted(class_rows(evaluation), key=lambda row: (-row["marked"] - row["detected"], row["class"])),
        class_chart=_shares(dict(list(by_class.items())[:_DRAWN_CLASSES]), _FOUND, "by class") if by_class else "",
        listed=_LISTED,
    )
    replace_file(path, page.encode())
    return path


def worst_images(images: Sequence[ImageAgreement], count: int = WORST) -> dict[str, list[ImageAgreement]]:
    """Choose the images with the lowest IoU, the most missed and the most false regions, each image once.

    Each kind gets at most ``count`` images, and none without its fault.
    """
    kinds: dict[str, Callable[[ImageAgreement], float]] = {
        "Lowest IoU": lambda image: 0 if image.agreement.iou is None else 1 - image.agreement.iou,
        "Most missed regions": lambda image: image.agreement.marked - image.agreement.found,
        "Most false regions": lambda image: image.agreement.detected - image.agreement.right,
    }
    chosen: dict[str, list[ImageAgreement]] = {}
    shown: set[str] = set()
    for kind, badness in kinds.items():
        left = [image for image in images if badness(image) > 0 and image.pair.name not in shown]
        # A tie, as between images without any overlap, is decided by the pixels in either mask.
        chosen[kind] = sorted(left, key=lambda image: (-badness(image), -image.agreement.union))[:count]
        shown |= {image.pair.name for image in chosen[kind]}
    return {kind: found for kind, found in chosen.items() if found}


def _tiles(scores: MaskScores) -> list[tuple[str, str, bool, str]]:
    """Write value, name and interval of each measure; a dash and the reason where it is undefined."""
    tiles = []
    for measure, name in NAMES.items():
        value, interval = scores.values[measure], scores.intervals[measure]
        more = f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else "no interval"
        if value is None:
            more = f"undefined: {scores.undefined[measure]}"
        tiles.append((fixed(value), name, False, more))
    return tiles


def _notes(evaluation: Evaluation) -> list[str]:
    """Write the notes that a reader needs to judge the numbers."""
    notes = []
    if evaluation.scores.images == 1:
        notes.append("One image was judged: these numbers may not hold for other images.")
    if evaluation.failures:
        notes.append(f"{counted(len(evaluation.failures), 'file')} could not be judged: see below.")
    if evaluation.lossy:
        lossy = counted(len(evaluation.lossy), "mask is", "masks are")
        notes.append(f"{lossy} JPEG or lossy WebP, thresholded at half: edges are uncertain.")
    if evaluation.sizes is not None:
        taken = {"image": "that of the image, of which 5 px a side are cropped", "valid": "that without the 5 px frame"}
        notes.append(f"The size of masks as large as their ground truth was taken for {taken[evaluation.sizes]}; "
                     "--size says otherwise.")  # fmt: skip
    if evaluation.pairing.outdated:
        outdated = counted(evaluation.pairing.outdated, "human mask does not count: it was",
                           "human masks do not count: they were")  # fmt: skip
        notes.append(f"{outdated} drawn on another photo or on another model's result.")
    return notes


def _cells(image: ImageAgreement) -> list[Cell]:
    gan_sr = gan_sr_of(image)
    cells = [make_cell("agreement", partial(agreement_picture, image, gan_sr))]
    if gan_sr is not None:
        cells.insert(0, make_cell("gan_sr", lambda: fitted(gan_sr, AGREEMENT_SIDE)))
    return cells


def agreement_picture(image: ImageAgreement, gan_sr: RGB | None) -> RGB:
    """Read two masks again and draw them with `drawn_agreement`.

    Raises:
        ImageError: A mask cannot be read any more, or has another size now.
    """
    mask, truth = (
        np.pad(on_valid_region(read_mask(path), image.shape, path), FRAME)
        for path in (image.pair.mask, image.pair.ground_truth)
    )
    return drawn_agreement(mask, truth, gan_sr)


def gan_sr_of(image: ImageAgreement) -> RGB | None:
    """Read the whole GAN result of an image; None where its file is not known, cannot be read or has another size."""
    path = image.pair.gan_sr
    if path is None:
        return None
    try:
        pixels = decode(read_bytes(path), path, max_pixels=MAX_PIXELS).pixels
    except ImageError:
        return None
    return rgb8(pixels) if pixels.shape[:2] == image.shape else None


def _charts(evaluation: Evaluation) -> list[Markup]:
    """Draw the spread of the measures of single images, and recall and precision by area of regions where defined."""
    histograms: dict[str, npt.NDArray[np.int64]] = {}
    marks: dict[str, float] = {}
    for measure in ("iou", "precision", "recall"):
        values = [getattr(image.agreement, measure) for image in evaluation.images]
        counts, edges = np.histogram([value for value in values if value is not None], _BINS, (0, 1))
        histograms[NAMES[measure]] = counts
        of_set = evaluation.scores.values[measure]
        if of_set is not None:
            marks[NAMES[measure]] = of_set
    figure = distributions(histograms, edges=edges, xlabel="of one image; the line: of all", marks=marks)
    charts = [inline(figure, "How the measures of single images spread, and those of all")]
    sides = {_FOUND: [image.marked for image in evaluation.images], _RIGHT: [im.detected for im in evaluation.images]}
    for title, of_images in sides.items():
        regions = list(chain.from_iterable(of_images))
        parts = {}
        for low, high in pairwise(_EDGES):
            name = f"{low:,.0f} to {high:,.0f} px" if math.isfinite(high) else f"from {low:,.0f} px"
            covered = [region.covered for region in regions if low <= region.area < high]
            parts[name] = sum(covered), len(covered)
        if regions:
            charts.append(_shares(parts, title, "by area"))
    return charts


def _shares(parts: Mapping[str, tuple[int, int]], title: str, of_what: str) -> Markup:
    """Draw a bar for each (part, whole), with its 95 % interval."""
    named = {f"{name} ({whole:,})": (part, whole) for name, (part, whole) in parts.items() if whole}
    values = {name: part / whole for name, (part, whole) in named.items()}
    intervals = {name: wilson_interval(part, whole) for name, (part, whole) in named.items()}
    return inline(bar_chart(values, xlabel=title, intervals=intervals), f"The {title}, {of_what}")
