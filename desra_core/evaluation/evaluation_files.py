"""An evaluation as files: JSON for programs, CSV tables for people."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import IO, Any

from desra_core.detection.class_weights import class_names
from desra_core.evaluation.evaluation import Evaluation
from desra_core.evaluation.image_agreement import ImageAgreement, MaskRegion
from desra_core.evaluation.metrics import INTERVAL_KIND, Agreement, MaskScores
from desra_core.files.atomic import replace_file

Row = dict[str, Any]

_BOX = ("x", "y", "width", "height", "area")
_MEASURES = ("iou", "precision", "recall", "f1")
_COUNTS = tuple(field.name for field in fields(Agreement))
_IMAGE_COLUMNS = ("image", "height", "width", *_MEASURES, *_COUNTS, "mask", "ground_truth")
_CLASS_COLUMNS = ("class", "name", *_MEASURES, "pixel_precision", "pixel_recall", *_COUNTS)
_REGION_COLUMNS = ("image", "region", *_BOX, "share_inside", "class")


def as_document(evaluation: Evaluation) -> dict[str, Any]:
    """Everything but the single regions, as plain values that JSON can hold; what is undefined is None."""
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
        "failures": [
            {"file": error.subject, "reason": error.reason, "remedy": error.remedy} for error in evaluation.failures
        ],
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
    """The measures of a set, their intervals, and why one is undefined."""
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
    """How many of the judged regions viewers were asked about."""
    return sum(row["noticed"] is not None for row in region_rows(evaluation)) if evaluation.severity else 0


def write_json(evaluation: Evaluation, path: Path) -> None:
    """Write `as_document` (raises `TransientError`)."""
    text = json.dumps(as_document(evaluation), indent=1, ensure_ascii=False, allow_nan=False)
    replace_file(path, f"{text}\n".encode())


def write_tables(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Write images.csv, regions.csv, detections.csv and, with labels, classes.csv.

    Returns
    -------
    The files.

    Raises
    ------
    TransientError
        The disk is full or failed.
    """
    tables = {
        "images.csv": (_IMAGE_COLUMNS, image_rows(evaluation)),
        "regions.csv": ((*_REGION_COLUMNS, "found", "noticed"), region_rows(evaluation)),
        "detections.csv": ((*_REGION_COLUMNS, "right"), detection_rows(evaluation)),
    }
    if evaluation.classes is not None:
        tables["classes.csv"] = _CLASS_COLUMNS, class_rows(evaluation)
    else:
        (folder / "classes.csv").unlink(missing_ok=True)  # of an earlier evaluation
    for name, (columns, rows) in tables.items():
        replace_file(folder / name, partial(_write_csv, columns, rows))
    return [folder / name for name in tables]


def image_rows(evaluation: Evaluation) -> list[Row]:
    """A row per judged image."""
    rows = [
        (image.pair.name, *image.shape, *_measures(image.agreement), *vars(image.agreement).values(),
         str(image.pair.mask), str(image.pair.ground_truth))
        for image in evaluation.images
    ]  # fmt: skip
    return [dict(zip(_IMAGE_COLUMNS, row, strict=True)) for row in rows]


def class_rows(evaluation: Evaluation) -> list[Row]:
    """A row per class that a mask or a ground truth marks: pixels by their own class, regions by their dominant one."""
    names = class_names()
    rows = [
        (index, names[index], *_measures(agreement), agreement.pixel_precision, agreement.pixel_recall,
         *vars(agreement).values())
        for index, agreement in (evaluation.classes or {}).items()
    ]  # fmt: skip
    return [dict(zip(_CLASS_COLUMNS, row, strict=True)) for row in rows]


def region_rows(evaluation: Evaluation) -> list[Row]:
    """A row per region of the ground truth: whether it was found, and the share of viewers who noticed it, if known."""
    ratings = evaluation.severity.ratings if evaluation.severity else {}
    return [
        row
        | {
            "found": region.covered,
            "noticed": rating.noticed if (rating := ratings.get(image.pair.name, {}).get(row["region"])) else None,
        }
        for image in evaluation.images
        for row, region in _numbered(image, image.marked)
    ]


def detection_rows(evaluation: Evaluation) -> list[Row]:
    """A row per detected region: whether it is right."""
    return [
        row | {"right": region.covered}
        for image in evaluation.images
        for row, region in _numbered(image, image.detected)
    ]


def _numbered(image: ImageAgreement, regions: Sequence[MaskRegion]) -> Iterator[tuple[Row, MaskRegion]]:
    """The columns that regions of both sides share; ``share_inside`` is that of the pixels inside the other mask."""
    names = class_names()
    for number, region in enumerate(regions, 1):
        class_name = None if region.dominant_class is None else names[region.dominant_class]
        values = (image.pair.name, number, *region[: len(_BOX)], region.inside / region.area, class_name)
        yield dict(zip(_REGION_COLUMNS, values, strict=True)), region


def _measures(agreement: Agreement) -> tuple[float | None, ...]:
    return agreement.iou, agreement.precision, agreement.recall, agreement.f1


def _write_csv(columns: Sequence[str], rows: Sequence[Row], file: IO[bytes]) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_cell(row[column]) for column in columns] for row in rows)
    file.write(text.getvalue().encode())


def _cell(value: Any) -> Any:
    """What a CSV holds of a value; of one that is undefined, nothing."""
    return str(value).lower() if isinstance(value, bool) else value
