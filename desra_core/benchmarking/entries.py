"""What a benchmark compares: detectors, each with the thresholds at which its masks are judged."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt

from desra_core.detection.detectors import Detector, detector_key, load_detector
from desra_core.detection.detectors.desra import Desra
from desra_core.detection.detectors.ldl import LDL
from desra_core.errors import UsageError

# Of a detector's own threshold, for its precision/recall curve: from a fifth to five times of it.
_FACTORS = tuple(2 ** (step / 3) for step in range(-7, 8))


class Entry(NamedTuple):
    """A row of the table: the masks of a contender at one threshold of its scores."""

    name: str
    threshold: float

    @property
    def folder(self) -> str:
        """Where its masks lie."""
        return self.name.replace(", ", "-").replace(" ", "-")


@dataclass(frozen=True)
class Contender:
    """A detector, whose score maps are computed once per image, and its entries.

    ``weighted`` where it is DeSRA with class weights; ``key`` identifies its scores.
    """

    name: str
    method: str
    key: str
    inputs: tuple[str, ...]
    entries: tuple[Entry, ...]
    weighted: bool = False

    @property
    def thresholds(self) -> tuple[float, ...]:
        """Those of its curve, ascending; none where its own is not positive."""
        own = load_detector(self.method).threshold
        return tuple(own * factor for factor in _FACTORS) if own > 0 else ()

    def detector(self, weights: npt.NDArray[np.float64] | None) -> Detector:
        """What makes its score maps; ``weights`` are the class weights of the benchmark."""
        return cast(Detector, Desra(weights)) if self.weighted else load_detector(self.method)


def contenders(methods: Iterable[str], *, weights_key: str | None) -> list[Contender]:
    """The contenders of a benchmark.

    DeSRA stands for two, with class weights and with weight 1; the LDL map has an entry for each of the thresholds of
    the DeSRA paper; others have one, at their own.

    Parameters
    ----------
    methods
        Names and files, as for `desra_core.detection.detectors.load_detector`.
    weights_key
        Of the class weights; None without class labels, or where every weight is 1.

    Raises
    ------
    UsageError
        A method is unknown, fails to load, or two have one name.
    """
    found: list[Contender] = []
    for method in methods:
        detector = load_detector(method)
        name = Path(method).stem if method.endswith(".py") else method
        key, inputs = detector_key(method), tuple(detector.inputs)
        if method == "desra":
            if weights_key is not None:
                weighted = (Entry("desra", detector.threshold),)
                found.append(Contender("desra", method, f"{key} {weights_key}", ("labels",), weighted, weighted=True))
            name = "desra, weight 1"
        thresholds = LDL.thresholds if method == "ldl" else (detector.threshold,)
        entries = tuple(
            Entry(f"{name}, {threshold:g}" if len(thresholds) > 1 else name, threshold) for threshold in thresholds
        )
        found.append(Contender(name, method, key, inputs, entries))
    folders = [entry.folder for contender in found for entry in contender.entries]
    for folder in folders:
        if folders.count(folder) > 1:
            raise UsageError("--methods", f"has two methods called {folder}", "rename a file, or leave one out")
    return found
