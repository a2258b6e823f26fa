"""Evaluate a set of masks: compare the masks with their ground truth, add up the measures, and write files.

Severity labels are a CSV file that people fill in, with the columns ``image`` (the name: relative path without suffix),
``region`` (the number of a ground-truth region of that image, in reading order from 1) and ``noticed`` (the share of
viewers who noticed the region, 0..1; empty where no viewer was asked). People fill in the ``regions.csv`` that ``desra
evaluate --output`` writes. Its columns ``x``, ``y``, ``width`` and ``height`` may be removed; if they are kept, they
must match the region.
"""

import csv
import io
import os
import re
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

from desra_core.detection.class_weights import class_name, class_names
from desra_core.errors import ImageError, UsageError
from desra_core.evaluation import metrics
from desra_core.evaluation.mask_files import MaskPair, Pairing
from desra_core.evaluation.metrics import Agreement, ImageAgreement, MaskRegion, MaskScores, Overlap
from desra_core.evaluation.table import as_csv, as_json, counted, failure_rows
from desra_core.files import read_input, replace_file

# Each thread holds two decoded masks and their components.
_THREADS = 8
_RATING_COLUMNS = ("image", "region", "noticed")
_BOX = ("x", "y", "width", "height")
_FORMAT = "fill in the column noticed of the regions.csv that desra evaluate --output writes"

Row = dict[str, Any]

_MEASURES = ("iou", "precision", "recall", "f1", "pixel_f1", "flagged_share")
_COUNTS = tuple(field.name for field in fields(Agreement))
_IMAGE_COLUMNS = ("image", "height", "width", *_MEASURES, *_COUNTS, "mask", "ground_truth")
_CLASS_COLUMNS = ("class", "name", *_MEASURES, "pixel_precision", "pixel_recall", *_COUNTS)
_REGION_COLUMNS = ("image", "region", *_BOX, "area", "share_inside", "class")


class Rating(NamedTuple):
    """A row of severity labels."""

    noticed: float | None  # the share of viewers who noticed the region; None where no viewer was asked
    box: tuple[str, ...] | None  # the cells of `_BOX`; None unless all four are filled in
    line: int  # the line number in the file


# By image and number of the region.
Ratings = dict[str, dict[int, Rating]]


class SeverityLabels(NamedTuple):
    """Ratings of ground-truth regions, their file, and the least share of viewers that makes a region prominent."""

    ratings: Ratings
    path: Path
    least_noticed: float

    def prominent(self, image: str) -> set[int]:
        """Return the numbers of the prominent regions of an image."""
        shares = {number: rating.noticed for number, rating in self.ratings.get(image, {}).items()}
        return {number for number, share in shares.items() if share is not None and share >= self.least_noticed}

    def check(self, image: str, boxes: Sequence[Sequence[int]]) -> None:
        """Check that the ratings of an image are of its regions, by their boxes (raises `UsageError`)."""
        for number, rating in self.ratings.get(image, {}).items():
            where = f"{self.path}, line {rating.line}"
            if number > len(boxes):
                raise UsageError(where, f"names region {number} of {image}, which has {len(boxes)}", _FORMAT)
            if rating.box and rating.box != tuple(map(str, boxes[number - 1])):
                raise UsageError(where, f"describes another region than number {number} of {image}", _FORMAT)

    def check_images(self, images: Container[str]) -> None:
        """Check that the ratings are of these images (raises `UsageError`)."""
        for image, rows in self.ratings.items():
            if image not in images:
                where = f"{self.path}, line {next(iter(rows.values())).line}"
                raise UsageError(where, f"names {image}, an image without ground truth", _FORMAT)


@dataclass(frozen=True)
class Evaluation:
    """The result of comparing a set of masks with its ground truth."""

    pairing: Pairing
    images: list[ImageAgreement]  # the images that could be judged, sorted by name
    failures: list[ImageError]  # files that could not be judged, and names that are ambiguous
    sizes: metrics.Sizes | None  # the size assumed for masks whose files do not show it; None where all files show it
    scores: MaskScores  # of all images
    classes: dict[int, Agreement] | None  # the sums over the images with labels, by class; None without such images
    overlap: Overlap  # when a region counts in found_at_kappa
    severity: SeverityLabels | None
    prominent: MaskScores | None  # against the prominent regions alone; None without severity labels

    @property
    def lossy(self) -> list[Path]:
        """The JPEG and lossy WebP files."""
        return [path for image in self.images for path in image.lossy]

    @property
    def unlabelled(self) -> int:
        """Count the images without class labels."""
        return sum(image.classes is None for image in self.images)


def evaluate_masks(
    pairing: Pairing,
    *,
    sizes: Literal["auto"] | metrics.Sizes = "auto",
    severity: SeverityLabels | None = None,
    overlap: Overlap = metrics.AS_PUBLISHED,
    on_judged: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Compare all pairs of masks, on the valid region of each image.

    Args:
        pairing: The masks.
        sizes: The size of masks that are as large as their ground truth, where no other file shows the image's size:
            ``image``, the image's own, or ``valid``, that of its valid region. ``auto`` takes ``image``, unless one of
            these masks marks something in the outermost 5 px, where DeSRA marks nothing.
        severity: Severity labels.
        overlap: When a region counts in ``found_at_kappa``.
        on_judged: Called with the number of images judged so far, and the number of all images.

    Raises:
        UsageError: No image could be judged (the message is that of the first failure, if any), or the severity labels
            do not belong to this ground truth.
    """
    taken: metrics.Sizes = "image" if sizes == "auto" else sizes
    compare = partial(_compare, severity=severity, overlap=overlap)
    results = _judged(pairing.pairs, partial(compare, sizes=taken), on_judged, stop_at_border=sizes == "auto")
    if results is None:  # a mask of unknown size marks the border, so that it can only be of the valid region
        taken = "valid"
        results = _judged(pairing.pairs, partial(compare, sizes=taken), on_judged) or []
    judged = [result for result in results if isinstance(result, ImageAgreement)]
    failures = pairing.failures + [result for result in results if isinstance(result, ImageError)]
    if not judged and failures:
        raise all_failed(failures)
    if not judged:
        lacking = next(chain(pairing.without_ground_truth.values(), pairing.without_mask.values()), "the ground truth")
        remedy = "a mask and its ground truth have the same path below their folders, suffix aside"
        raise UsageError(lacking, "has no twin, and neither has any other mask", remedy)
    if severity:
        severity.check_images({pair.name for pair in pairing.pairs} | pairing.without_mask.keys())
        for image in judged:
            severity.check(image.pair.name, [(box.x, box.y, box.width, box.height) for box in image.marked])
    by_class: dict[int, list[Agreement]] = {}
    for image in judged:
        for index, agreement in (image.classes or {}).items():
            by_class.setdefault(index, []).append(agreement)
    labelled = any(image.classes is not None for image in judged)
    prominent = [image.prominent for image in judged if image.prominent is not None]
    return Evaluation(
        pairing=pairing,
        images=judged,
        failures=failures,
        sizes=taken if any(image.size_assumed for image in judged) else None,
        scores=metrics.score_masks([image.agreement for image in judged]),
        classes={index: metrics.pooled(by_class[index]) for index in sorted(by_class)} if labelled else None,
        overlap=overlap,
        severity=severity,
        prominent=metrics.score_masks(prominent) if severity else None,
    )


def all_failed(failures: Sequence[ImageError]) -> UsageError:
    """Combine the failures of all files into one error: the first failure, and the number of the others."""
    subject, reason, remedy = failures[0].failure
    others = len(failures) - 1
    more = f" ({counted(others, 'more file')} {'fails' if others == 1 else 'fail'})" if others else ""
    return UsageError(subject, reason + more, remedy)


def as_document(evaluation: Evaluation) -> dict[str, Any]:
    """Describe an evaluation, but not its single regions, in plain values for JSON; undefined measures are None."""
    pairing = evaluation.pairing
    document = metrics.scores_document(evaluation.scores) | {
        "masks": str(pairing.masks),
        "ground_truth": [str(folder) for folder in pairing.ground_truth],
        "sizes": evaluation.sizes,
        **evaluation.overlap._asdict(),
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
        } | metrics.scores_document(evaluation.prominent)
    return document


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
    """Make a row per class that has a marked pixel; pixels count by their own class, regions by their dominant one."""
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


def has_ratings(path: Path) -> bool:
    """Check whether a file is a CSV with anything in its column ``noticed``."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return any((row.get("noticed") or "").strip() for row in csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error):
        return False


def read_ratings(path: Path) -> Ratings:
    """Read a CSV of severity labels.

    Raises:
        UsageError: The file cannot be read, lacks a column or any rating, has two rows for a region, or holds a value
            that is no number of a region or no share.
    """
    ratings: Ratings = {}
    for line, row in csv_rows(path, _RATING_COLUMNS, _FORMAT):
        region, rating = _rating(row, line, path)
        if rating != ratings.setdefault(row["image"], {}).setdefault(region, rating):
            reason = f"rates region {region} of {row['image']} a second time"
            raise UsageError(f"{path}, line {rating.line}", reason, "keep one row for it")
    if not any(rating.noticed is not None for rows in ratings.values() for rating in rows.values()):
        raise UsageError(path, "rates no region", _FORMAT)
    return ratings


def csv_rows(path: Path, columns: Sequence[str], remedy: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the rows of a CSV file in UTF-8 that has some columns, each with the number of its line.

    Raises:
        UsageError: The file cannot be read, lacks a column, or has a row with more or fewer cells.
    """
    try:
        reader = csv.DictReader(io.StringIO(read_input(path).decode("utf-8-sig"), newline=""), strict=True)
        missing = [column for column in columns if column not in (reader.fieldnames or ())]
        if missing:
            raise UsageError(path, f"has no column {missing[0]}", remedy)
        for row in reader:
            if None in row or None in row.values():
                where = f"{path}, line {reader.line_num}"
                raise UsageError(where, "has more or fewer cells than there are columns", remedy)
            yield reader.line_num, row
    except OSError as error:
        raise UsageError(path, f"cannot be read ({error.strerror})", "mend the file or its name") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(path, f"is no CSV file in UTF-8 ({error})", remedy) from None


def share_of_viewers(text: str, where: str) -> float | None:
    """Parse a share of viewers in 0..1; None where the cell is empty (raises `UsageError`)."""
    text = text.strip()
    try:
        share = float(text) if text else None
    except ValueError:
        share = -1.0
    if share is not None and not 0 <= share <= 1:
        raise UsageError(where, f"has the share {text!r}", "shares of viewers are numbers in 0..1")
    return share


def _judged(
    pairs: Sequence[MaskPair],
    compare: Callable[[MaskPair], ImageAgreement | ImageError],
    on_judged: Callable[[int, int], None] | None,
    *,
    stop_at_border: bool = False,
) -> list[ImageAgreement | ImageError] | None:
    """Compare all pairs in their order.

    With ``stop_at_border``, return None at the first mask of assumed size that marks its border. Such a mask shows only
    the valid region, because DeSRA marks nothing in the border of an image.
    """
    results = []
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        try:
            for result in pool.map(compare, pairs):
                if (
                    stop_at_border
                    and isinstance(result, ImageAgreement)
                    and result.size_assumed
                    and result.marks_border
                ):
                    return None
                results.append(result)
                if on_judged:
                    on_judged(len(results), len(pairs))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return results


def _compare(
    pair: MaskPair, *, severity: SeverityLabels | None, overlap: Overlap, sizes: metrics.Sizes
) -> ImageAgreement | ImageError:
    prominent = severity.prominent(pair.name) if severity else None
    try:
        return metrics.compare_pair(pair, sizes=sizes, prominent=prominent, overlap=overlap)
    except ImageError as error:
        return error
    except MemoryError:
        return ImageError(pair.mask, "needs more memory than there is", "judge it on a larger machine")


def _rating(row: dict[str, str], line: int, path: Path) -> tuple[int, Rating]:
    """Parse a row; returns the number of its region and the rating."""
    where = f"{path}, line {line}"
    region = row["region"].strip()
    if not re.fullmatch("0*[1-9][0-9]{0,8}", region):
        raise UsageError(where, f"has the region {region!r}", "regions are numbered 1, 2, ... within each image")
    share = share_of_viewers(row["noticed"], where)
    box = tuple(row.get(column, "").strip() for column in _BOX)
    return int(region), Rating(share, box if all(box) else None, line)


def _region_row(image: ImageAgreement, number: int, region: MaskRegion) -> Row:
    """Make the columns that both tables of regions have; ``share_inside`` is the region's share in the other mask."""
    values = (image.pair.name, number, *region[:5], region.inside / region.area, class_name(region.dominant_class))
    return dict(zip(_REGION_COLUMNS, values, strict=True))


def _measures(agreement: Agreement) -> Row:
    return {measure: getattr(agreement, measure) for measure in _MEASURES}
