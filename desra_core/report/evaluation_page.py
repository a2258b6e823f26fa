"""One page about an evaluation: scores with intervals, the worst images, classes, and what was not judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from desra_core.errors import ImageError, printable
from desra_core.evaluation.evaluation import Evaluation
from desra_core.evaluation.evaluation_files import class_rows, image_rows, rated_regions
from desra_core.evaluation.image_agreement import ImageAgreement
from desra_core.evaluation.mask_scores import MaskScores
from desra_core.files.atomic import replace_file
from desra_core.images.crops import encode_webp, fitted
from desra_core.report.document import render_page
from desra_core.report.evaluation_charts import charts_of, class_chart
from desra_core.report.gallery import Cell, as_uri
from desra_core.report.overlays import FALSE, LARGEST, MISSED, RIGHT, agreement_picture, gan_sr_of

KINDS = {"gan_sr": "GAN-SR", "agreement": "mask against ground truth"}
NAMES = {"iou": "IoU", "precision": "precision", "recall": "recall", "f1": "F1"}
WORST = 6

_ROWS, _CLASSES, _LISTED = 200, 20, 200


class Tile(NamedTuple):
    """A measure in large letters; ``value`` is a dash and ``meaning`` the reason where it is undefined."""

    value: str
    name: str
    meaning: str


class Case(NamedTuple):
    """An image and its pictures."""

    image: ImageAgreement
    cells: list[Cell]


class Cases(NamedTuple):
    """Images that are bad in one way, the worst first."""

    title: str
    cases: list[Case]


def write_evaluation_page(evaluation: Evaluation, path: Path) -> Path:
    """Write the page: one HTML file that needs no other file and no network.

    Two pages of the same evaluation are the same bytes.

    Raises
    ------
    TransientError
        The disk is full or failed.
    """
    page = render_page("evaluation.html.j2", **_content(evaluation)).encode()
    replace_file(path, page)
    return path


def worst_images(images: Sequence[ImageAgreement], count: int = WORST) -> dict[str, list[ImageAgreement]]:
    """The images with the lowest IoU, the most missed and the most false regions, each but once.

    Parameters
    ----------
    images
        Of an evaluation.
    count
        How many of each kind, at most; images without such a fault are none of them.
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
        # Of images without any overlap, the one with the most pixels in either mask is the worst.
        chosen[kind] = sorted(left, key=lambda image: (-badness(image), -image.agreement.union))[:count]
        shown |= {image.pair.name for image in chosen[kind]}
    return {kind: found for kind, found in chosen.items() if found}


def _content(evaluation: Evaluation) -> dict[str, Any]:
    pairing, scores = evaluation.pairing, evaluation.scores
    rows = sorted(image_rows(evaluation), key=lambda row: (row["iou"] is None, row["iou"]))
    return {
        "masks": printable(pairing.masks),
        "ground_truth": [printable(folder) for folder in pairing.ground_truth],
        "scores": scores,
        "tiles": _tiles(scores),
        "severity": evaluation.severity,
        "rated": rated_regions(evaluation),
        "prominent": evaluation.prominent,
        "prominent_tiles": _tiles(evaluation.prominent) if evaluation.prominent else [],
        "notes": _notes(evaluation),
        "charts": charts_of(evaluation),
        "worst": [
            Cases(kind, [_case(image) for image in found]) for kind, found in worst_images(evaluation.images).items()
        ],
        "kinds": KINDS,
        "colours": {
            "right": "#" + bytes(RIGHT).hex(),
            "false": "#" + bytes(FALSE).hex(),
            "missed": "#" + bytes(MISSED).hex(),
        },
        "rows": rows[:_ROWS],
        "all_rows": len(rows),
        "classes": sorted(class_rows(evaluation), key=lambda row: (-row["marked"] - row["detected"], row["class"])),
        "classes_at_once": _CLASSES,
        "class_chart": class_chart(evaluation.classes or {}),
        "unlabelled": evaluation.unlabelled,
        "failures": evaluation.failures,
        "without_ground_truth": [printable(path) for path in pairing.without_ground_truth.values()],
        "without_mask": [printable(path) for path in pairing.without_mask.values()],
        "not_looked_at": pairing.not_looked_at,
        "listed": _LISTED,
    }


def _tiles(scores: MaskScores) -> list[Tile]:
    tiles = []
    for measure, name in NAMES.items():
        value, interval = scores.values[measure], scores.intervals[measure]
        if value is None:
            tiles.append(Tile("–", name, f"undefined: {scores.undefined[measure]}"))
        else:
            bounds = f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else "no interval"
            tiles.append(Tile(f"{value:.3f}", name, bounds))
    return tiles


def _notes(evaluation: Evaluation) -> list[str]:
    """What a reader has to know to judge the numbers."""
    notes = []
    if evaluation.scores.images == 1:
        notes.append("One image was judged: nothing tells how far these numbers hold for others.")
    if evaluation.failures:
        notes.append(f"{len(evaluation.failures):,} files could not be judged; they are listed below.")
    if evaluation.lossy:
        notes.append(f"{len(evaluation.lossy):,} masks are JPEG or lossy WebP, thresholded at half: their edges are "
                     "uncertain.")  # fmt: skip
    if evaluation.sizes is not None:
        taken = {"image": "that of the image, of which 5 px a side are cropped", "valid": "that without the 5 px frame"}
        notes.append(f"The size of masks as large as their ground truth was taken for {taken[evaluation.sizes]}; "
                     "--size says otherwise.")  # fmt: skip
    if evaluation.pairing.outdated:
        notes.append(f"{evaluation.pairing.outdated:,} masks by people were drawn on another photo or on another "
                     "model's result, and do not count.")  # fmt: skip
    return notes


def _case(image: ImageAgreement) -> Case:
    gan_sr = gan_sr_of(image)
    cells = []
    if gan_sr is not None:
        shown = fitted(gan_sr, LARGEST)
        cells.append(Cell("gan_sr", as_uri(encode_webp(shown)), shown.shape[1], shown.shape[0]))
    try:
        drawn = agreement_picture(image, gan_sr)
        cells.append(Cell("agreement", as_uri(encode_webp(drawn)), drawn.shape[1], drawn.shape[0]))
    except ImageError as error:
        cells.append(Cell("agreement", None, reason=printable(error.reason)))
    return Case(image, cells)
