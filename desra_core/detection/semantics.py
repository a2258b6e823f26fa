"""The 150 ADE20K classes and the weight ``w_k`` that each puts on the similarity (Eq. 9 of the paper)."""

from __future__ import annotations

import csv
import hashlib
import io
import math
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from desra_core.errors import UsageError

CLASS_COUNT = 150

_BINS = 20
_PUBLISHED = resources.files("desra_core.detection") / "semantic_intervals.csv"
_FORMAT = "give a CSV with the header ade20k_index,name,interval or ade20k_index,name,weight and a row per class"


class Weights(NamedTuple):
    """One weight per class, ``(150,)`` float64, and the fingerprint of what they were read from."""

    values: npt.NDArray[np.float64]
    key: str


def load_weights(source: str) -> Weights:
    """Read class weights.

    Parameters
    ----------
    source
        ``published`` for the authors' intervals, ``none`` for weight 1 everywhere, or the path of a CSV file
        with the columns ``ade20k_index``, ``name`` and either ``interval`` (0..19, Eq. 9: ``w = 20 / (20 - interval)``)
        or ``weight`` (positive).

    Raises
    ------
    UsageError
        The file cannot be read, does not hold each of the 150 classes once, or a value is out of range.
    """
    if source == "none":
        return Weights(np.ones(CLASS_COUNT), "none")
    try:
        content = _PUBLISHED.read_bytes() if source == "published" else Path(source).read_bytes()
        rows = list(csv.DictReader(io.StringIO(content.decode("utf-8-sig"))))
    except OSError as error:
        raise UsageError(source, f"class weights cannot be read ({error.strerror})", _FORMAT) from None
    except (UnicodeDecodeError, csv.Error):
        raise UsageError(source, "class weights are not a CSV file", _FORMAT) from None
    values = np.full(CLASS_COUNT, np.nan)
    for line, row in enumerate(rows, start=2):
        index, weight = _parse(row, f"{source}, line {line}")
        if not np.isnan(values[index]):
            raise UsageError(f"{source}, line {line}", f"class {index} is there twice", "keep one row for it")
        values[index] = weight
    missing = np.flatnonzero(np.isnan(values))
    if missing.size:
        raise UsageError(source, f"has no row for {missing.size} classes, the first is {missing[0]}", _FORMAT)
    return Weights(values, hashlib.blake2b(values.tobytes(), digest_size=16).hexdigest())


def class_names() -> list[str]:
    """The 150 ADE20K class names by index, as the published table spells them."""
    rows = csv.DictReader(io.StringIO(_PUBLISHED.read_text("utf-8")))
    return [row["name"] for row in rows]


def _weight(interval: int) -> float:
    return _BINS / (_BINS - interval) if 0 <= interval < _BINS else math.nan


def _parse(row: dict[str, str], where: str) -> tuple[int, float]:
    try:
        index = int(row["ade20k_index"])
        weight = float(row["weight"]) if "weight" in row else _weight(int(row["interval"]))
    except (KeyError, TypeError, ValueError):
        raise UsageError(where, "is no class weight", _FORMAT) from None
    if not 0 <= index < CLASS_COUNT:
        raise UsageError(where, f"has class {index}", "ADE20K classes are 0..149")
    if not (np.isfinite(weight) and weight > 0):
        raise UsageError(where, f"gives the weight {weight:g}", "weights are positive, intervals 0..19")
    return index, weight
