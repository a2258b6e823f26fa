"""The synthetic benchmark over all images: recall by kind, strength and size, false alarms, and the operating curve."""

from __future__ import annotations

import statistics
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from desra_core.benchmarking.synthetic import Response, Trial
from desra_core.evaluation.removal import wilson_interval

# Between these multiples of the texture's contrast, the recall of what is added to an image is told apart.
RATIOS = (1.0, 2.0, 4.0)
_ADDED = frozenset({"blotches", "checkerboard", "worms", "ringing"})


class Rate(NamedTuple):
    """So many found of so many artifacts."""

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


class Point(NamedTuple):
    """A method at one threshold and minimal area.

    ``rate`` leaves out the places that are marked without an artifact, too. The false alarms are regions and pixels of
    so many ``clean_pixels``.
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
    """One method over all images that it can be run on.

    Attributes
    ----------
    default
        At its own threshold and the default minimal area.
    cells
        The default point's recall by kind, strength and size.
    ratios
        The default point's recall of artifacts that add something, by their contrast as a multiple of the MSE result's
        texture at their place: below the first of `RATIOS`, from it to the second, and so on.
    already
        The artifacts that the default point leaves out, since their places are marked without them.
    iou
        The mean over what the default point finds; None where that is nothing.
    seconds_per_megapixel
        To compute the scores: the median over the images; None where nothing was injected.
    curve
        All points, by threshold and minimal area.
    """

    method: str
    default: Point
    cells: dict[tuple[str, float, int], Rate]
    ratios: tuple[Rate, ...]
    already: int
    iou: float | None
    seconds_per_megapixel: float | None
    curve: tuple[Point, ...]

    def recall(self, *, kind: str | None = None, strength: float | None = None, size: int | None = None) -> Rate:
        """The default point's recall of some of the artifacts."""
        wanted = (kind, strength, size)
        rates = [
            rate
            for cell, rate in self.cells.items()
            if all(value is None or value == own for value, own in zip(wanted, cell, strict=True))
        ]
        return Rate(sum(rate.found for rate in rates), sum(rate.trials for rate in rates))

    def best(self, pixel_share: float) -> Point | None:
        """The point that finds most while it marks no more than this share of the clean pixels; None without any."""
        allowed = [point for point in self.curve if point.rate.trials and (point.pixel_share or 0) <= pixel_share]
        return max(allowed, key=lambda point: (point.rate.share or 0, -point.false_pixels), default=None)


@dataclass(frozen=True)
class Summary:
    """All methods over all images.

    Attributes
    ----------
    images, clean_pixels
        The pairs, and their pixels outside of what is excluded.
    injected, faint
        Artifacts that were injected, and those that were left out because their image gave them too little contrast.
    methods
        In the order in which they were given.
    """

    images: int
    clean_pixels: int
    injected: int
    faint: int
    methods: tuple[MethodSummary, ...]


def summarise(trials: Iterable[Trial]) -> Summary:
    """Add up the trials of several images.

    Raises
    ------
    ValueError
        They differ in thresholds or minimal areas.
    """
    images = clean_pixels = injected = faint = 0
    sums: dict[str, _Sums] = {}
    for trial in trials:
        images += 1
        clean_pixels += trial.clean_pixels
        injected += len({response.case for response in trial.responses})
        faint += trial.faint
        for method, thresholds in trial.thresholds.items():
            if method not in sums:
                sums[method] = _Sums(thresholds, trial.default[method], trial.min_areas, trial.min_area)
            sums[method].add(method, trial)
    methods = tuple(own.summary(method) for method, own in sums.items())
    return Summary(images=images, clean_pixels=clean_pixels, injected=injected, faint=faint, methods=methods)


class _Sums:
    """The sums of one method."""

    def __init__(
        self, thresholds: tuple[float, ...], threshold: float, min_areas: tuple[int, ...], min_area: int
    ) -> None:
        self._axes = thresholds, threshold, min_areas, min_area
        # By the numbers of a threshold and a minimal area.
        self._points = [(row, column) for row in range(len(thresholds)) for column in range(len(min_areas))]
        self._default = thresholds.index(threshold), min_areas.index(min_area)
        self._counts: dict[str, Counter[tuple[int, int]]] = {
            name: Counter() for name in ("found", "trials", "regions", "pixels")
        }
        self._cells: dict[tuple[str, float, int], Rate] = {}
        self._ratios = [Rate(0, 0)] * (len(RATIOS) + 1)
        self._fits: list[float] = []
        self._already = self._clean_pixels = 0
        self._seconds: list[float] = []

    def add(self, method: str, trial: Trial) -> None:
        if self._axes != (trial.thresholds[method], trial.default[method], trial.min_areas, trial.min_area):
            raise ValueError(f"{trial.image} was tried with other thresholds or areas of {method} than others were")
        self._clean_pixels += trial.clean_pixels
        if trial.scored_pixels:
            self._seconds.append(1e6 * trial.seconds[method] / trial.scored_pixels)
        for alarms in trial.false_alarms:
            if alarms.method == method:
                for row, column in self._points:
                    self._counts["regions"][row, column] += alarms.regions[row][column]
                    self._counts["pixels"][row, column] += alarms.pixels[row][column]
        for response in trial.responses:
            if response.method == method:
                self._add_response(response)

    def _add_response(self, response: Response) -> None:
        for row, column in self._points:
            if not response.already[row][column]:
                self._counts["trials"][row, column] += 1
                self._counts["found"][row, column] += response.found[row][column]
        row, column = self._default
        cell = response.case.kind, response.case.strength, response.case.size
        rate = self._cells.setdefault(cell, Rate(0, 0))
        if response.already[row][column]:
            self._already += 1
            return
        found = response.found[row][column]
        self._cells[cell] = Rate(rate.found + found, rate.trials + 1)
        if response.case.kind in _ADDED:
            ratio = bisect_right(RATIOS, response.contrast / max(response.texture, 1e-9))
            self._ratios[ratio] = Rate(self._ratios[ratio].found + found, self._ratios[ratio].trials + 1)
        if found:
            self._fits.append(response.iou)

    def summary(self, method: str) -> MethodSummary:
        curve = {point: self._point(*point) for point in self._points}
        return MethodSummary(
            method=method,
            default=curve[self._default],
            cells=dict(sorted(self._cells.items())),
            ratios=tuple(self._ratios),
            already=self._already,
            iou=sum(self._fits) / len(self._fits) if self._fits else None,
            seconds_per_megapixel=statistics.median(self._seconds) if self._seconds else None,
            curve=tuple(curve.values()),
        )

    def _point(self, row: int, column: int) -> Point:
        thresholds, _, min_areas, _ = self._axes
        found, trials, regions, pixels = (counts[row, column] for counts in self._counts.values())
        return Point(thresholds[row], min_areas[column], Rate(found, trials), regions, pixels, self._clean_pixels)
