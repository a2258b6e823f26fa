"""A score map cut at many thresholds and minimal areas: which places are found, and what is marked besides.

The regions of a mask at the smallest minimal area hold those at all others, so that a threshold costs one mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from desra_core.detection.detectors import Scores
from desra_core.detection.mask import score_mask
from desra_core.detection.regions import Components
from desra_core.images.codec import Mask

# By threshold (outer) and minimal area (inner).
Bits = tuple[tuple[bool, ...], ...]
Counts = tuple[tuple[int, ...], ...]


class Answer(NamedTuple):
    """What a score map says of a place.

    Attributes
    ----------
    found
        Whether at least half of it is marked.
    iou
        Of the place and the region that fits it best, at the default point; 0 without any.
    """

    found: Bits
    iou: float


@dataclass(frozen=True)
class OperatingPoints:
    """Thresholds and minimal areas, each ascending, for images of a shape ``(H, W)``; the default is one of each."""

    shape: tuple[int, int]
    thresholds: tuple[float, ...]
    min_areas: tuple[int, ...]
    threshold: float
    min_area: int

    def answers(self, scores: Scores, places: Sequence[npt.NDArray[np.intp]]) -> list[Answer]:
        """Look for places in a score map.

        Parameters
        ----------
        scores
            ``(H - 2 f, W - 2 f)``, as of a `Detector`.
        places
            The pixels of each, as indices of the flattened image.
        """
        found: list[list[tuple[bool, ...]]] = [[] for _ in places]
        fits = [0.0] * len(places)
        for threshold, regions in self._cuts(scores):
            for number, pixels in enumerate(places):
                inside = np.bincount(regions.numbers.ravel()[pixels], minlength=len(regions) + 1)[1:]
                found[number].append(
                    tuple(bool(2 * inside[regions.areas > area].sum() >= pixels.size) for area in self.min_areas)
                )
                if threshold == self.threshold:
                    fits[number] = self._fit(regions, inside, pixels.size)
        return [Answer(tuple(bits), fit) for bits, fit in zip(found, fits, strict=True)]

    def false_alarms(self, scores: Scores, excluded: Mask) -> tuple[Counts, Counts]:
        """Count what is marked outside of known artifacts.

        Parameters
        ----------
        scores
            As for `answers`, of a pair without artifacts save those that are known.
        excluded
            ``(H, W)`` bool, the known ones.

        Returns
        -------
        Regions of which less than half is excluded, and pixels that are not, by threshold and minimal area.
        """
        counted, marked = [], []
        for _, regions in self._cuts(scores):
            known = regions.overlap(excluded)
            large = [regions.areas > area for area in self.min_areas]
            counted.append(tuple(int((kept & (2 * known < regions.areas)).sum()) for kept in large))
            marked.append(tuple(int((regions.areas - known)[kept].sum()) for kept in large))
        return tuple(counted), tuple(marked)

    def _fit(self, regions: Components, inside: npt.NDArray[np.intp], size: int) -> float:
        kept = regions.areas > self.min_area
        return float(np.max(inside[kept] / (regions.areas[kept] + size - inside[kept]), initial=0.0))

    def _cuts(self, scores: Scores) -> Iterator[tuple[float, Components]]:
        """The regions at each threshold and the smallest minimal area."""
        none = Components(np.zeros(self.shape, np.bool_))
        highest = float(scores.max())
        for threshold in self.thresholds:
            if threshold >= highest:
                yield threshold, none
                continue
            mask = score_mask(scores, self.shape, threshold=threshold, min_area=self.min_areas[0])
            yield threshold, Components(mask)
