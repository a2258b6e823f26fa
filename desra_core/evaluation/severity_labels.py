"""Read the share of viewers who noticed each region of a ground truth from a CSV that people fill in.

Its columns are ``image`` (the name: relative path without suffix), ``region`` (the number of a ground-truth region of
that image, 1 for the one that begins first in reading order) and ``noticed`` (the share of viewers, 0..1; empty where
no viewer was asked). The ``regions.csv`` that ``desra evaluate --output`` writes is one to fill in; where its columns
``x``, ``y``, ``width`` and ``height`` are there, they must still be true.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from desra_core.errors import UsageError
from desra_core.evaluation.image_agreement import MaskRegion

_COLUMNS = ("image", "region", "noticed")
_BOX = ("x", "y", "width", "height")
_FORMAT = "fill in the column noticed of the regions.csv that desra evaluate --output writes"


class Rating(NamedTuple):
    """A row: the share of viewers, if any were asked; the box, if it is given; and the line of the file."""

    noticed: float | None
    box: tuple[str, ...] | None
    line: int


# By image and number of the region.
Ratings = dict[str, dict[int, Rating]]


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
    try:
        reader = csv.DictReader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline=""), strict=True)
        missing = [column for column in _COLUMNS if column not in (reader.fieldnames or ())]
        if missing:
            raise UsageError(path, f"has no column {missing[0]}", _FORMAT)
        ratings: Ratings = {}
        for row in reader:
            rating, region = _parsed(row, reader.line_num, path)
            if rating != ratings.setdefault(row["image"], {}).setdefault(region, rating):
                reason = f"rates region {region} of {row['image']} a second time"
                raise UsageError(f"{path}, line {rating.line}", reason, "keep one row for it")
    except OSError as error:
        raise UsageError(path, f"cannot be read ({error.strerror})", "mend the file or its name") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(path, f"is no CSV file in UTF-8 ({error})", _FORMAT) from None
    if not any(rating.noticed is not None for rows in ratings.values() for rating in rows.values()):
        raise UsageError(path, "rates no region", _FORMAT)
    return ratings


def check_ratings(ratings: Ratings, path: Path, regions: Mapping[str, Sequence[MaskRegion] | None]) -> None:
    """Check that ratings belong to the ground truth.

    Args:
        ratings, path: Ratings and their file.
        regions: The ground-truth regions by image; None for images that could not be judged.

    Raises:
        UsageError: A row names an image without ground truth, a region that the image does not have, or one that lies
            elsewhere.
    """
    for image, rows in ratings.items():
        if image not in regions:
            line = min(rating.line for rating in rows.values())
            raise UsageError(f"{path}, line {line}", f"names {image}, an image without ground truth", _FORMAT)
        of_image = regions[image]
        if of_image is None:
            continue
        for number, rating in rows.items():
            where = f"{path}, line {rating.line}"
            if number > len(of_image):
                raise UsageError(where, f"names region {number} of {image}, which has {len(of_image)}", _FORMAT)
            if rating.box and rating.box != tuple(map(str, of_image[number - 1][: len(_BOX)])):
                raise UsageError(where, f"describes another region than number {number} of {image}", _FORMAT)


def _parsed(row: dict[str, str], line: int, path: Path) -> tuple[Rating, int]:
    """A row and the number of its region."""
    where = f"{path}, line {line}"
    if None in row or None in row.values():
        raise UsageError(where, "has more or fewer cells than there are columns", _FORMAT)
    region, noticed = row["region"].strip(), row["noticed"].strip()
    if not (region.isascii() and region.isdigit() and int(region) > 0):
        raise UsageError(where, f"has the region {region!r}", "regions are numbered 1, 2, ... within each image")
    try:
        share = float(noticed) if noticed else None
    except ValueError:
        share = -1.0
    if share is not None and not 0 <= share <= 1:
        raise UsageError(where, f"has the share {noticed!r}", "shares of viewers are numbers in 0..1")
    box = tuple(row.get(column, "").strip() for column in _BOX)
    return Rating(share, box if all(box) else None, line), int(region)
