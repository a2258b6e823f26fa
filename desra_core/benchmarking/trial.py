"""A trial of one clean pair: inject artifacts, see which artifacts the detectors find, and count false alarms."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from desra_core.benchmarking.injection import Case, cases, contrast, inject, texture
from desra_core.detection.detectors import Detector, DetectorInputs, Scores
from desra_core.detection.mask import Components, score_mask
from desra_core.images.codec import Mask, Pixels

MIN_AREAS = (400, 1000, 2000, 4000, 8000)
# Multiples of a detector's own threshold: from a quarter to four times, and three at which hardly a pixel is marked.
GRID = (*(2 ** (step / 3) for step in range(-6, 7)), 8.0, 16.0, 32.0)
# An injection that changes less, in grey levels of 255, is hardly visible as an artifact.
FAINT = 5.0

# By threshold (outer) and minimal area (inner).
Bits = tuple[tuple[bool, ...], ...]
Counts = tuple[tuple[int, ...], ...]
# An artifact: its case, its contrast, the texture at its place, and its pixels as indices of the flattened image.
Injected = tuple[Case, float, float, npt.NDArray[np.intp]]


class Response(NamedTuple):
    """The response of one method to one injected artifact."""

    case: Case
    contrast: float  # see `desra_core.benchmarking.injection.contrast`
    texture: float  # see `desra_core.benchmarking.injection.texture`
    method: str
    found: Bits  # by threshold and minimal area: at least half of the place is marked
    already: Bits  # the same in the clean pair; if true, a mark proves nothing, and the artifact is not counted
    iou: float  # of the place and the region that fits it best, at default threshold and minimal area


class FalseAlarms(NamedTuple):
    """The marks of one method in the pair without artifacts, outside of ``exclude``, by threshold and minimal area."""

    method: str
    regions: Counts  # regions of which less than half is excluded
    pixels: Counts  # marked pixels that are not excluded


@dataclass(frozen=True)
class Trial:
    """The responses of all methods to one pair; dictionaries are by method."""

    image: str
    clean_pixels: int  # pixels that are not excluded
    faint: int  # cases that were left out because their contrast in this image is below `FAINT`
    thresholds: dict[str, tuple[float, ...]]  # ascending
    default: dict[str, float]  # the detector's own threshold
    min_areas: tuple[int, ...]  # in pixels, ascending
    min_area: int  # the default
    responses: tuple[Response, ...]
    false_alarms: tuple[FalseAlarms, ...]
    seconds: dict[str, float]  # time to score the injected images
    scored_pixels: int  # total size of the injected images


@dataclass(frozen=True)
class ScoreGrid:
    """Thresholds and minimal areas, each ascending, for images of ``(H, W)``, and the default of each.

    One mask per threshold is enough: the mask at the smallest minimal area holds the regions at all larger ones.
    """

    shape: tuple[int, int]
    thresholds: tuple[float, ...]
    min_areas: tuple[int, ...]
    threshold: float
    min_area: int

    def find(self, scores: Scores, places: Sequence[npt.NDArray[np.intp]]) -> list[tuple[Bits, float]]:
        """Check which places a score map marks.

        Args:
            scores: ``(H - 2 f, W - 2 f)``, from a `Detector`.
            places: The pixels of each place, as indices of the flattened image.

        Returns:
            `Response.found` and `Response.iou` of each place.
        """
        found: list[list[tuple[bool, ...]]] = [[] for _ in places]
        ious = [0.0] * len(places)
        for threshold, regions in self._regions(scores):
            for index, pixels in enumerate(places):
                inside = np.bincount(regions.numbers.ravel()[pixels], minlength=len(regions) + 1)[1:]
                half_marked = [2 * inside[regions.areas > area].sum() >= pixels.size for area in self.min_areas]
                found[index].append(tuple(map(bool, half_marked)))
                if threshold == self.threshold:
                    kept = regions.areas > self.min_area
                    union = regions.areas[kept] + pixels.size - inside[kept]
                    ious[index] = float(np.max(inside[kept] / union, initial=0.0))
        return [(tuple(bits), iou) for bits, iou in zip(found, ious, strict=True)]

    def false_alarms(self, scores: Scores, excluded: Mask) -> tuple[Counts, Counts]:
        """Count the regions and pixels of `FalseAlarms`; ``excluded`` is ``(H, W)`` bool, True at known artifacts."""
        counted, marked = [], []
        for _, regions in self._regions(scores):
            known = regions.overlap(excluded)
            large = [regions.areas > area for area in self.min_areas]
            counted.append(tuple(int((kept & (2 * known < regions.areas)).sum()) for kept in large))
            marked.append(tuple(int((regions.areas - known)[kept].sum()) for kept in large))
        return tuple(counted), tuple(marked)

    def _regions(self, scores: Scores) -> Iterator[tuple[float, Components]]:
        """Yield each threshold with its regions at the smallest minimal area."""
        highest = float(scores.max())
        for threshold in self.thresholds:
            mask = np.zeros(self.shape, np.bool_)
            if threshold < highest:
                mask = score_mask(scores, self.shape, threshold=threshold, min_area=self.min_areas[0])
            yield threshold, Components(mask)


def run_trial(
    name: str,
    pair: DetectorInputs,
    detectors: Mapping[str, Detector],
    exclude: Mask | None = None,
    *,
    seed: int = 0,
    min_area: int,
) -> Trial:
    """Inject artifacts into a pair of results, clean or nearly so, and see which detectors find them.

    Args:
        name: The name of the image. Name and seed determine the artifacts.
        pair: The results, and the labels of the clean GAN result.
        detectors: By method. A detector that needs a lacking input or a larger image is left out. Nothing is injected
            near regions that the first detector which is not left out marks in the clean pair, at its own threshold
            and the smallest minimal area.
        min_area: It is added to the grid of minimal areas, as each detector's own threshold is to the thresholds.
        exclude: ``(H, W)`` bool, known artifacts: nothing is injected near them, and they are no false alarms.
    """
    shape: tuple[int, int] = pair.gan_sr.shape[:2]
    given = {role for role in ("lr", "labels") if getattr(pair, role) is not None}
    usable = {
        key: detector
        for key, detector in detectors.items()
        if given.issuperset(detector.inputs) and min(shape) >= detector.smallest
    }
    areas = tuple(sorted({*MIN_AREAS, min_area}))
    grids = {}
    for key, detector in usable.items():
        own = float(detector.threshold)
        thresholds = tuple(sorted({own, *(own * factor for factor in GRID)}))
        grids[key] = ScoreGrid(shape, thresholds, areas, own, min_area)
    clean = {key: _score(detector, pair, pair.gan_sr) for key, detector in usable.items()}
    known = np.zeros(shape, np.bool_) if exclude is None else exclude
    drawn: list[Case] = []
    if usable:
        first = next(iter(usable))
        marked = score_mask(clean[first], shape, threshold=grids[first].threshold, min_area=areas[0])
        drawn = cases(name, pair.gan_sr, seed=seed, exclude=known | marked)

    # One injected image at a time: all of them together may take more memory than a worker has.
    injected: list[Injected] = []
    found: dict[str, list[tuple[Bits, float]]] = {key: [] for key in usable}
    seconds, scored_pixels = dict.fromkeys(usable, 0.0), 0
    for sheet, artifacts in injected_sheets(pair, drawn):
        injected += artifacts
        scored_pixels += known.size
        for key, detector in usable.items():
            start = time.thread_time()
            scores = _score(detector, pair, sheet)
            seconds[key] += time.thread_time() - start
            found[key] += grids[key].find(scores, [place for *_, place in artifacts])
    responses: list[Response] = []
    for key, grid in grids.items():
        already = grid.find(clean[key], [place for *_, place in injected])
        responses += [
            Response(*artifact[:3], key, after, before, iou)
            for artifact, (after, iou), (before, _) in zip(injected, found[key], already, strict=True)
        ]
    return Trial(
        image=name,
        clean_pixels=int(np.count_nonzero(~known)),
        faint=len(drawn) - len(injected),
        thresholds={key: grid.thresholds for key, grid in grids.items()},
        default={key: grid.threshold for key, grid in grids.items()},
        min_areas=areas,
        min_area=min_area,
        responses=tuple(responses),
        false_alarms=tuple(FalseAlarms(key, *grid.false_alarms(clean[key], known)) for key, grid in grids.items()),
        seconds=seconds,
        scored_pixels=scored_pixels,
    )


def injected_sheets(pair: DetectorInputs, drawn: Sequence[Case]) -> Iterator[tuple[Pixels, list[Injected]]]:
    """Yield the injected images, each with its artifacts. Faint artifacts are not injected."""
    by_sheet = sorted(drawn, key=lambda case: case.sheet)
    for _, group in groupby(by_sheet, key=lambda case: case.sheet):
        sheet, artifacts = pair.gan_sr, []
        for case in group:
            place = case.place(pair.gan_sr.shape)
            after = inject(sheet, case.kind, place, strength=case.strength, rng=np.random.default_rng(case.seed))
            change = contrast(sheet, after, place)
            if change >= FAINT:
                sheet = after
                artifacts.append((case, change, texture(pair.mse_sr, place), np.flatnonzero(place)))
        if artifacts:
            yield sheet, artifacts


def _score(detector: Detector, pair: DetectorInputs, gan_sr: Pixels) -> Scores:
    lr, labels = (getattr(pair, role) if role in detector.inputs else None for role in ("lr", "labels"))
    return detector(pair.mse_sr, gan_sr, lr, labels)
