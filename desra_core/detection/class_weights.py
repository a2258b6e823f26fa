"""The 150 ADE20K classes and the weight ``w_k`` that each puts on the similarity (Eq. 9 of the paper)."""

import csv
import io
import math
import tomllib
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from desra_core.errors import UsageError, described
from desra_core.files import digest, read_input
from desra_core.images.codec import CLASS_COUNT, Labels

# Eq. 9 cuts the similarity into this many bins; an interval is a number of bins.
INTERVAL_BINS = 20
# The version of the TOML files of desra calibrate; raise it when their meaning changes.
WEIGHTS_VERSION = 1

_PUBLISHED = resources.files("desra_core.detection") / "semantic_intervals.csv"
_FORMAT = (
    "give a file of desra calibrate, or a CSV with the header ade20k_index,name,interval or ade20k_index,name,weight "
    "and a row per class"
)


class Weights(NamedTuple):
    """One weight per class, ``(150,)`` float64, and the fingerprint of the values."""

    values: npt.NDArray[np.float64]
    key: str


def load_weights(source: str) -> Weights:
    """Read the weights of the 150 classes.

    Args:
        source: ``published`` for the authors' intervals, ``none`` for weight 1 everywhere, or the path of a file: a
            ``.toml`` file of desra calibrate, or a CSV file with the columns ``ade20k_index``, ``name`` and either
            ``interval`` (0..19, Eq. 9: ``w = 20 / (20 - interval)``) or ``weight`` (positive).

    Raises:
        UsageError: The file cannot be read, is of another version, does not hold each of the 150 classes once, or a
            value is out of range.
    """
    if source == "none":
        return Weights(np.ones(CLASS_COUNT), "none")
    try:
        content = _PUBLISHED.read_bytes() if source == "published" else read_input(Path(source))
    except OSError as error:
        raise UsageError(source, f"class weights cannot be read ({error.strerror})", _FORMAT) from None
    weights: dict[int, float] = {}
    for where, row in _rows(content, source):
        index, weight = _parse(row, where)
        if index in weights:
            raise UsageError(where, f"class {index} is there twice", "keep one row for it")
        weights[index] = weight
    if missing := sorted(set(range(CLASS_COUNT)) - weights.keys()):
        raise UsageError(source, f"has no row for {len(missing)} of the classes, the first is {missing[0]}", _FORMAT)
    values = np.array([weights[index] for index in range(CLASS_COUNT)])
    return Weights(values, digest(values.tobytes()))


def weighted_scores(
    scores: npt.NDArray[np.floating[Any]],
    classes: Labels | None,
    weights: npt.NDArray[np.float64] | None,
) -> npt.NDArray[np.floating[Any]]:
    """Apply class weights to scores (Eq. 9): ``-D`` becomes ``-clip(w_k D, 0, 1)``.

    Args:
        scores: ``-D``, floats of any shape.
        classes: The ADE20K class of each score, uint8.
        weights: ``(150,)``, ``w_k`` by class.

    Returns:
        Float64 of the same shape. Without classes or weights, the given scores are returned unchanged.
    """
    if classes is None or weights is None:
        return scores
    weighted = scores.astype(np.float64)
    weighted *= weights[classes]
    return np.clip(weighted, -1, 0, out=weighted)


def interval_weights(intervals: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Turn intervals 0..19 into weights ``20 / (20 - interval)`` (Eq. 9)."""
    return INTERVAL_BINS / (INTERVAL_BINS - intervals.astype(np.float64))


def published_table() -> npt.NDArray[np.int64]:
    """Read the authors' interval of each class, ``(150,)``."""
    return np.array([int(row["interval"]) for row in _published_rows()])


def class_names() -> list[str]:
    """List the 150 ADE20K class names by index, as the published table spells them."""
    return [row["name"] for row in _published_rows()]


def class_name(index: int | None) -> str | None:
    """Return the name of a region's class; None for a region without labels."""
    return None if index is None else class_names()[index]


def _published_rows() -> Iterator[dict[str, str]]:
    return csv.DictReader(io.StringIO(_PUBLISHED.read_text("utf-8")))


def _rows(content: bytes, source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a CSV file, or the classes of a file of desra calibrate, each with its place in the file.

    The classes of desra calibrate get the column names of the CSV file.
    """
    if not source.lower().endswith(".toml"):
        try:
            rows = list(csv.DictReader(io.StringIO(content.decode("utf-8-sig"))))
        except (UnicodeDecodeError, csv.Error):
            raise UsageError(source, "class weights are not a CSV file", _FORMAT) from None
        yield from ((f"{source}, line {line}", row) for line, row in enumerate(rows, start=2))
        return
    try:
        document = tomllib.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise UsageError(source, f"is damaged or no TOML ({described(error)})", _FORMAT) from None
    version, classes = document.get("version"), document.get("class")
    if not isinstance(version, int) or not isinstance(classes, list) or not all(isinstance(c, dict) for c in classes):
        raise UsageError(source, "holds no class weights", _FORMAT)
    if version != WEIGHTS_VERSION:
        reason = f"is of version {version} of the format, but this desra reads version {WEIGHTS_VERSION}"
        raise UsageError(source, reason, "run desra calibrate again")
    if len(classes) != CLASS_COUNT:
        raise UsageError(source, f"has weights for {len(classes)} classes", f"ADE20K has {CLASS_COUNT}; " + _FORMAT)
    for number, row in enumerate(classes, start=1):
        yield f"{source}, class table {number}", row | {"ade20k_index": row.get("index")}


def _parse(row: dict[str, Any], where: str) -> tuple[int, float]:
    try:
        index = _number(row["ade20k_index"], int)
        if "weight" in row:
            weight = float(_number(row["weight"], int, float))
        else:
            interval = _number(row["interval"], int)
            weight = INTERVAL_BINS / (INTERVAL_BINS - interval) if 0 <= interval < INTERVAL_BINS else math.nan
    except (KeyError, TypeError, ValueError, OverflowError):
        raise UsageError(where, "is no class weight", _FORMAT) from None
    if not 0 <= index < CLASS_COUNT:
        raise UsageError(where, f"has class {index}", "ADE20K classes are 0..149")
    if not (np.isfinite(weight) and weight > 0):
        given = f"weight {weight:g}" if "weight" in row else f"interval {row['interval']}"
        raise UsageError(where, f"gives the {given}", "weights are positive, intervals 0..19")
    return index, weight


def _number(value: Any, *kinds: type) -> Any:
    """Convert the text of a CSV cell, or a TOML value of one of these types (``true`` is no number), to a number."""
    if not isinstance(value, str) and type(value) not in kinds:
        raise TypeError(value)
    return kinds[-1](value)
