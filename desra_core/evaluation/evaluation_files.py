"""An evaluation as files: JSON for programs, CSV tables for people."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from desra_core.detection.class_weights import class_names
from desra_core.evaluation.evaluation import Evaluation
from desra_core.evaluation.image_agreement import ImageAgreement, MaskRegion
from desra_core.evaluation.metrics import INTERVAL_KIND, Agreement, MaskScores
from desra_core.evaluation.table import as_csv, as_json, failure_rows
from desra_core.files.atomic import replace_file

Row = dict[str, Any]

_BOX = ("x", "y", "width", "height", "area")
_MEASURES = ("iou", "precision", "recall", "f1")
_COUNTS = tuple(field.name for field in fields(Agreement))
_IMAGE_COLUMNS = ("image", "height", "width", *_MEASURES, *_COUNTS, "mask", "ground_truth")
_CLASS_COLUMNS = ("class", "name", *_MEASURES, "pixel_precision", "pixel_recall", *_COUNTS)
_REGION_COLUMNS = ("image", "region", *_BOX, "share_inside", "class")


def as_document(evaluation: Evaluation) -> dict[str, Any]:
    """Describe an evaluation without its single regions, in plain values for JSON; undefined ones are None."""
    pairing = evaluation.pairing
    document = scores_document(evaluation.scores) | {
        "masks": str(pairing.masks),
        "ground_truth": [str(folder) for folder in pairing.ground_truth],
        "sizes": evaluation.sizes,
        "without_ground_truth": {name: str(path) for name, path in pairing.without_ground_truth.items()},
        "without_mask": {name: str(path) for name, path in pairing.without_mask.items()},
        "not_looked_at": pairing.not_looked_at,
        "outdated_human_masks": pairing.outdated,
        "images_by_people": pairing.by_people,
        "failures": failure_rows(evaluation.failures),
        "lossy": [str(path) for path in evaluation.lossy],
        "per_image": image_rows(evaluation),
    }
    if evaluation.classes is not None:
        document |= {"unlabelled_images": evaluation.unlabelled, "per_class": class_rows(evaluation)}
    if evaluation.severity and evaluation.prominent:
        document["prominent"] = {
            "severity_labels": str(evaluation.severity.path),
            "noticed_by_at_least": evaluation.severity.least_noticed,
            "rated_regions": rated_regions(evaluation),
        } | scores_document(evaluation.prominent)
    return document


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


def rated_regions(evaluation: Evaluation) -> int:
    """Count the judged regions that viewers were asked about."""
    return sum(row["noticed"] is not None for row in region_rows(evaluation)) if evaluation.severity else 0


def write_json(evaluation: Evaluation, path: Path) -> None:
    """Write `as_document` (raises `TransientError`)."""
    replace_file(path, as_json(as_document(evaluation)).encode())


def write_tables(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Write images.csv, regions.csv, detections.csv and, with labels, classes.csv.

    Returns:
        The files.

    Raises:
        TransientError: The disk is full or failed.
    """
    tables = {
        "images.csv": (_IMAGE_COLUMNS, image_rows(evaluation)),
        "regions.csv": ((*_REGION_COLUMNS, "found", "noticed"), region_rows(evaluation)),
        "detections.csv": (
            (*_REGION_COLUMNS, "right"),
            [
                _region_row(image, number, region) | {"right": region.covered}
                for image in evaluation.images
                for number, region in enumerate(image.detected, 1)
            ],
        ),
    }
    if evaluation.classes is not None:
        tables["classes.csv"] = _CLASS_COLUMNS, class_rows(evaluation)
    else:
        (folder / "classes.csv").unlink(missing_ok=True)  # of an earlier evaluation
    for name, (columns, rows) in tables.items():
        replace_file(folder / name, as_csv(rows, columns).encode())
    return [folder / name for name in tables]


def image_rows(evaluation: Evaluation) -> list[Row]:
    """Make a row per judged image."""
    return [
        {"image": image.pair.name, "height": image.shape[0], "width": image.shape[1]}
        | _measures(image.agreement)
        | vars(image.agreement)
        | {"mask": str(image.pair.mask), "ground_truth": str(image.pair.ground_truth)}
        for image in evaluation.images
    ]


def class_rows(evaluation: Evaluation) -> list[Row]:
    """Make a row per class of a marked pixel; pixels count by their own class, regions by their dominant one."""
    return [
        {"class": index, "name": class_names()[index]}
        | _measures(agreement)
        | {"pixel_precision": agreement.pixel_precision, "pixel_recall": agreement.pixel_recall}
        | vars(agreement)
        for index, agreement in (evaluation.classes or {}).items()
    ]


def region_rows(evaluation: Evaluation) -> list[Row]:
    """Make a row per ground-truth region: whether it was found, and the share of viewers who noticed it, if known."""
    ratings = evaluation.severity.ratings if evaluation.severity else {}
    rows = []
    for image in evaluation.images:
        rated = ratings.get(image.pair.name, {})
        for number, region in enumerate(image.marked, 1):
            noticed = rated[number].noticed if number in rated else None
            rows.append(_region_row(image, number, region) | {"found": region.covered, "noticed": noticed})
    return rows


def _region_row(image: ImageAgreement, number: int, region: MaskRegion) -> Row:
    """Make the columns that both tables of regions have; ``share_inside`` is the share inside the other mask."""
    class_name = None if region.dominant_class is None else class_names()[region.dominant_class]
    values = (image.pair.name, number, *region[: len(_BOX)], region.inside / region.area, class_name)
    return dict(zip(_REGION_COLUMNS, values, strict=True))


def _measures(agreement: Agreement) -> Row:
    return {measure: getattr(agreement, measure) for measure in _MEASURES}
