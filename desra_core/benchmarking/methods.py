"""The methods that a benchmark compares: detectors, each with the thresholds at which its masks are judged."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from desra_core.detection.detectors import Detector, applied, detector_key, load_detector
from desra_core.errors import UsageError

# Multiples of a detector's own threshold for its precision/recall curve: from a fifth to five times.
_FACTORS = tuple(2 ** (step / 3) for step in range(-7, 8))


class OperatingPoint(NamedTuple):
    """A row of the table: the masks of a method at one threshold of its scores."""

    name: str
    threshold: float

    @property
    def folder(self) -> str:
        """The name of the folder of its masks."""
        return self.name.replace(", ", "-").replace(" ", "-")


@dataclass(frozen=True)
class Method:
    """A detector, whose score maps are computed once per image, and its operating points.

    ``spec`` is its name or file as for `desra_core.detection.detectors.load_detector`, ``key`` identifies its scores,
    ``weighs_classes`` says that class weights can apply to them, and ``weighted`` that they do.
    """

    name: str
    spec: str
    key: str
    inputs: tuple[str, ...]
    points: tuple[OperatingPoint, ...]
    weighs_classes: bool = False
    weighted: bool = False

    @property
    def thresholds(self) -> tuple[float, ...]:
        """Thresholds of its curve, ascending; none where its own is not positive."""
        own = load_detector(self.spec).threshold
        return tuple(own * factor for factor in _FACTORS) if own > 0 else ()

    def detector(self, weights: npt.NDArray[np.float64] | None) -> Detector:
        """Load the detector; ``weights`` are the class weights of the benchmark, ``(150,)``."""
        return applied(self.spec).weighted(weights) if self.weighted else load_detector(self.spec)


def load_methods(specs: Iterable[str], *, weights_key: str | None) -> list[Method]:
    """List the methods of a benchmark; ``specs`` are names and files of detectors, as `load_detector` takes them.

    A detector that weighs classes gives two, with class weights, identified by ``weights_key``, unless that is None,
    and with weight 1. An operating point is the detector's own threshold, or each of its ``thresholds``.

    Raises `UsageError`: a method is unknown, fails to load, or two have one name.
    """
    found: list[Method] = []
    for spec in specs:
        detector = load_detector(spec)
        name = Path(spec).stem if spec.endswith(".py") else spec
        key, inputs = detector_key(spec), tuple(detector.inputs)
        weighs_classes = applied(spec).weighs_classes
        if weighs_classes:
            if weights_key is not None:
                own = (OperatingPoint(name, detector.threshold),)
                found.append(Method(name, spec, f"{key} {weights_key}", ("labels",), own, True, weighted=True))
            name = f"{name}, weight 1"
        points = [OperatingPoint(f"{name}, {value:g}", value) for value in getattr(detector, "thresholds", ())]
        points = points or [OperatingPoint(name, detector.threshold)]
        found.append(Method(name, spec, key, inputs, tuple(points), weighs_classes))
    folders = [point.folder for method in found for point in method.points]
    for folder in folders:
        if folders.count(folder) > 1:
            raise UsageError("--methods", f"has two methods called {folder}", "rename a file, or leave one out")
    return found
