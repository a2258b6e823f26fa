"""What the stored map of an image tells: DeSRA's similarity, or the score of another detector."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np
import numpy.typing as npt

from desra_core.detection.mask import THRESHOLD
from desra_core.report.wording import shortened

DESRA = "desra"
# A score map shows scores up to this many times the threshold.
TIMES = 2

Values = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Measure:
    """How the maps and the mean similarities of a workspace are to be read.

    Of a run of another method than DeSRA they hold minus the score.

    Attributes
    ----------
    method
        The detector: a name, or the file of a user's own.
    threshold
        As the user gave it: of the adjusted similarity, below which a pixel is suspect, or of the score, above which.
    """

    method: str = DESRA
    threshold: float = THRESHOLD

    @property
    def is_score(self) -> bool:
        """Whether larger means more of an artifact."""
        return self.method != DESRA

    @property
    def word(self) -> str:
        """What a value is."""
        return "score" if self.is_score else "similarity"

    @property
    def name(self) -> str:
        """The detector, briefly."""
        return shortened(PurePath(self.method).name, 40)

    @property
    def picture(self) -> str:
        """What a heat map shows."""
        return f"{self.name} score" if self.is_score else "1 − D"

    @property
    def top(self) -> float:
        """Values are shown from 0 to this."""
        return TIMES * self.threshold if self.is_score else 1.0

    @property
    def lowest(self) -> float:
        """Stored values lie above this: a chunk that is not there is read as zeros, and D is never 0."""
        return -math.inf if self.is_score else 0.0

    def value(self, stored: Any) -> Any:
        """The similarity or the score, of a number or an array as it is stored."""
        return -stored if self.is_score else stored

    def told(self, stored: float) -> str:
        """The similarity or the score in words."""
        return f"{self.value(stored):.3g}" if self.is_score else f"{stored:.3f}"

    def heat(self, stored: Values) -> Values:
        """How much a pixel looks like an artifact, 0..1 of the colour scale; NaN stays NaN."""
        return np.clip(-stored / self.top, 0, 1) if self.is_score else 1 - stored


def measure_of(settings: dict[str, Any]) -> Measure:
    """The measure of a run by its settings; without a word about it DeSRA's."""
    method, threshold = settings.get("method"), settings.get("threshold")
    if not isinstance(method, str) or not method:
        method = DESRA
    if not isinstance(threshold, int | float) or not 0 < threshold < math.inf:
        threshold = THRESHOLD
    return Measure(method, float(threshold))
