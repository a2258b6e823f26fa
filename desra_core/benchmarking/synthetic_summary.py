"""The synthetic benchmark over all images: recall by kind, strength and size, false alarms, and the operating curve."""

from __future__ import annotations

import statistics
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from desra_core.benchmarking.trial import Trial
from desra_core.evaluation.metrics import wilson_interval

# Bounds of contrast over texture, between which the recall of artifacts that add something is given.
RATIOS = (1.0, 2.0, 4.0)
_ADDED = frozenset({"blotches", "checkerboard", "worms", "ringing"})


class Rate(NamedTuple):
    """How many of how many artifacts were found."""

    found: int
    trials: int

    @property
    def share(self) -> float | None:
        """0..1; None without trials."""
        return self.found / self.trials if self.trials else None

    @property
    def interval(self) -> tuple[float, float]:
        """The share's 95 % interval, as if the artifacts of one image were independent."""
        return wilson_interval(self.found, self.trials)


class GridPoint(NamedTuple):
    """A method at one threshold and minimal area.

    ``rate`` leaves out the places that are marked without an artifact, too. The false alarms are regions and pixels
    among ``clean_pixels``.
    """

    threshold: float
    min_area: int
    rate: Rate
    false_regions: int
    false_pixels: int
    clean_pixels: int

    @property
    def regions_per_megapixel(self) -> float | None:
        """False regions in a million clean pixels; None without any pixels."""
        return 1e6 * self.false_regions / self.clean_pixels if self.clean_pixels else None

    @property
    def pixel_share(self) -> float | None:
        """Share of the clean pixels that are marked; None without any."""
        return self.false_pixels / self.clean_pixels if self.clean_pixels else None


@dataclass(frozen=True)
class MethodSummary:
    """One method over all images that it can be run on; ``curve`` has all points, by threshold and minimal area.

    All else is at the ``default`` point, its own threshold and the default minimal area. ``cells`` has the recall by
    kind, strength and size. ``ratios`` has the recall of artifacts that add something, by contrast over texture: below
    the first of `RATIOS`, from it to the second, and so on. ``already`` counts the artifacts whose places are marked
    without them. ``iou`` is the mean over the finds, ``seconds_per_megapixel`` the median over the images of the time
    to compute scores; None without any.
    """

    method: str
    default: GridPoint
    cells: dict[tuple[str, float, int], Rate]
    ratios: tuple[Rate, ...]
    already: int
    iou: float | None
    seconds_per_megapixel: float | None
    curve: tuple[GridPoint, ...]

    def recall(self, *, kind: str | None = None, strength: float | None = None, size: int | None = None) -> Rate:
        """Add up the default point's recall of some of the artifacts; None takes any."""
        wanted = (kind, strength, size)
        rates = [
            rate
            for cell, rate in self.cells.items()
            if all(value is None or value == own for value, own in zip(wanted, cell, strict=True))
        ]
        return Rate(sum(rate.found for rate in rates), sum(rate.trials for rate in rates))

    def best(self, pixel_share: float) -> GridPoint | None:
        """Choose the point that finds most and marks no more than this share of the clean pixels; None without any."""
        allowed = [point for point in self.curve if point.rate.trials and (point.pixel_share or 0) <= pixel_share]
        return max(allowed, key=lambda point: (point.rate.share or 0, -point.false_pixels), default=None)


@dataclass(frozen=True)
class SyntheticSummary:
    """All methods over all images.

    ``clean_pixels`` counts pixels that are not excluded, ``faint`` the artifacts left out for too little contrast.
    """

    images: int
    clean_pixels: int
    injected: int
    faint: int
    methods: tuple[MethodSummary, ...]


def summarise(trials: Sequence[Trial]) -> SyntheticSummary:
    """Add up the trials of several images.

    Raises `ValueError`: they differ in thresholds or minimal areas.
    """
    return SyntheticSummary(
        images=len(trials),
        clean_pixels=sum(trial.clean_pixels for trial in trials),
        injected=sum(len({response.case for response in trial.responses}) for trial in trials),
        faint=sum(trial.faint for trial in trials),
        methods=tuple(
            _summarise(method, [trial for trial in trials if method in trial.thresholds])
            for method in dict.fromkeys(method for trial in trials for method in trial.thresholds)
        ),
    )


def _summarise(method: str, trials: Sequence[Trial]) -> MethodSummary:
    first = trials[0]
    thresholds, min_areas = first.thresholds[method], first.min_areas
    for trial in trials:
        axes = (trial.thresholds[method], trial.default[method], trial.min_areas, trial.min_area)
        if axes != (thresholds, first.default[method], min_areas, first.min_area):
            raise ValueError(f"{trial.image} was tried with other thresholds or areas of {method} than others were")
    responses = [response for trial in trials for response in trial.responses if response.method == method]
    alarms = [alarm for trial in trials for alarm in trial.false_alarms if alarm.method == method]
    # By response, threshold and minimal area.
    shape = (len(responses), len(thresholds), len(min_areas))
    counted = ~np.array([response.already for response in responses], np.bool_).reshape(shape)
    found = counted & np.array([response.found for response in responses], np.bool_).reshape(shape)
    clean_pixels = sum(trial.clean_pixels for trial in trials)
    false_alarms = (np.array([alarm[part] for alarm in alarms]).sum(axis=0) for part in (1, 2))
    tables = (found.sum(axis=0), counted.sum(axis=0), *false_alarms)
    curve = {}
    for row, threshold in enumerate(thresholds):
        for column, min_area in enumerate(min_areas):
            hits, tries, regions, pixels = (int(table[row, column]) for table in tables)
            curve[threshold, min_area] = GridPoint(
                threshold, min_area, Rate(hits, tries), regions, pixels, clean_pixels
            )

    default = thresholds.index(first.default[method]), min_areas.index(first.min_area)
    cells: dict[tuple[str, float, int], Rate] = {}
    ratios = [Rate(0, 0)] * (len(RATIOS) + 1)
    fits = []
    for response, tried, hit in zip(responses, counted[:, *default].tolist(), found[:, *default].tolist(), strict=True):
        cell = response.case.kind, response.case.strength, response.case.size
        cells[cell] = _plus(cells.get(cell, Rate(0, 0)), hit, tried)
        if response.case.kind in _ADDED:
            ratio = bisect_right(RATIOS, response.contrast / max(response.texture, 1e-9))
            ratios[ratio] = _plus(ratios[ratio], hit, tried)
        if hit:
            fits.append(response.iou)
    seconds = [1e6 * trial.seconds[method] / trial.scored_pixels for trial in trials if trial.scored_pixels]
    return MethodSummary(
        method=method,
        default=curve[first.default[method], first.min_area],
        cells=dict(sorted(cells.items())),
        ratios=tuple(ratios),
        already=int((~counted[:, *default]).sum()),
        iou=sum(fits) / len(fits) if fits else None,
        seconds_per_megapixel=statistics.median(seconds) if seconds else None,
        curve=tuple(curve.values()),
    )


def _plus(rate: Rate, found: bool, tried: bool) -> Rate:
    return Rate(rate.found + found, rate.trials + tried)
