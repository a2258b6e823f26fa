"""A benchmark that needs no labels: which injected artifacts a detector finds, and what it marks without any."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from desra_core.benchmarking.injection import contrast, inject, texture
from desra_core.benchmarking.operating_points import Answer, Bits, Counts, OperatingPoints
from desra_core.benchmarking.places import SIZES, STRENGTHS, Case, cases
from desra_core.detection.detectors import Detector, Scores
from desra_core.detection.mask import MIN_AREA, score_mask
from desra_core.images.codec import Labels, Mask, Pixels

MIN_AREAS = (400, 1000, 2000, 4000, 8000)
# Of a detector's own threshold: from a quarter to four times of it, and on to where hardly anything is marked.
GRID = (*(2 ** (step / 3) for step in range(-6, 7)), 8.0, 16.0, 32.0)
# An injection that changes less, in grey levels of 255, is hardly an artifact to anybody.
FAINT = 5.0


class Response(NamedTuple):
    """What one method makes of one injected artifact.

    Attributes
    ----------
    contrast
        What the injection changed, see `desra_core.benchmarking.injection.contrast`.
    texture
        Of the MSE result at the place, see `desra_core.benchmarking.injection.texture`.
    found
        Whether at least half of the place is marked, by threshold and minimal area.
    already
        The same of the pair without artifacts: what is marked anyway is no find.
    iou
        Of the place and the region that fits it best, at the default threshold and minimal area.
    """

    case: Case
    contrast: float
    texture: float
    method: str
    found: Bits
    already: Bits
    iou: float


class FalseAlarms(NamedTuple):
    """What one method marks in the pair without artifacts, outside of ``exclude``, by threshold and minimal area.

    A region counts when less than half of it is excluded, its other pixels anyway.
    """

    method: str
    regions: Counts
    pixels: Counts


@dataclass(frozen=True)
class Trial:
    """One pair under all methods.

    Attributes
    ----------
    clean_pixels
        Those of the image that are not excluded.
    faint
        Cases that were left out, since the image gave them less than `FAINT`.
    thresholds, default
        By method: all thresholds, ascending, and the detector's own.
    min_areas, min_area
        All minimal areas in pixels, ascending, and the default one.
    responses
        To each case and method, save those that are faint.
    seconds, scored_pixels
        By method the time to score the injected images, and their size together.
    """

    image: str
    clean_pixels: int
    faint: int
    thresholds: dict[str, tuple[float, ...]]
    default: dict[str, float]
    min_areas: tuple[int, ...]
    min_area: int
    responses: tuple[Response, ...]
    false_alarms: tuple[FalseAlarms, ...]
    seconds: dict[str, float]
    scored_pixels: int

    def to_json(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Trial:
        """Read what `to_json` gave."""
        read: dict[str, Any] = {key: _frozen(value) for key, value in document.items()}
        read["responses"] = tuple(Response(Case(*case), *rest) for case, *rest in read["responses"])
        read["false_alarms"] = tuple(FalseAlarms(*row) for row in read["false_alarms"])
        return cls(**read)


def trial(
    name: str,
    mse_sr: Pixels,
    gan_sr: Pixels,
    methods: Mapping[str, Detector],
    *,
    lr: Pixels | None = None,
    labels: Labels | None = None,
    exclude: Mask | None = None,
    strengths: Sequence[float] = STRENGTHS,
    sizes: Sequence[int] = SIZES,
    seed: int = 0,
    thresholds: Mapping[str, Sequence[float]] | None = None,
    min_areas: Sequence[int] = MIN_AREAS,
    min_area: int = MIN_AREA,
) -> Trial:
    """Inject artifacts into a pair of results, and see which methods find them.

    Parameters
    ----------
    name
        Of the image: with the seed it settles what is injected.
    mse_sr, gan_sr, lr, labels
        As for `Detector`. Labels are those of the clean result.
    methods
        By name. A method is left out that needs what is not there, or a larger image. The first one that is not says
        where nothing is injected: near what it marks in the clean pair at its default threshold and the smallest area.
    exclude
        ``(H, W)`` bool, artifacts that are known: nothing is injected near them, and they are no false alarms.
    strengths, sizes, seed
        As for `desra_core.benchmarking.places.cases`.
    thresholds
        By method; where there are none, `GRID` times the detector's own. That one is added.
    min_areas, min_area
        In pixels, all and the default one, which is added.

    Raises
    ------
    ValueError
        The images differ in size, or a strength is out of range.
    """
    if mse_sr.shape[:2] != gan_sr.shape[:2]:
        raise ValueError(f"results of the shapes {mse_sr.shape} and {gan_sr.shape} are no pair")
    usable = {key: method for key, method in methods.items() if _usable(method, gan_sr, lr, labels)}
    areas = tuple(sorted({*map(int, min_areas), int(min_area)}))
    points = {
        key: _points(method, gan_sr, (thresholds or {}).get(key), areas, min_area) for key, method in usable.items()
    }
    clean = {key: _score(method, mse_sr, gan_sr, lr, labels) for key, method in usable.items()}
    known = np.zeros(gan_sr.shape[:2], np.bool_) if exclude is None else exclude
    drawn: list[Case] = []
    for key in list(usable)[:1]:
        fired = score_mask(clean[key], points[key].shape, threshold=usable[key].threshold, min_area=areas[0])
        drawn = cases(name, gan_sr, strengths=strengths, sizes=sizes, seed=seed, exclude=known | fired)

    injected: list[_Injected] = []
    found: dict[str, list[Answer]] = {key: [] for key in usable}
    seconds, scored_pixels = dict.fromkeys(usable, 0.0), 0
    for sheet, artifacts in _sheets(mse_sr, gan_sr, drawn):
        injected += artifacts
        scored_pixels += known.size
        for key, method in usable.items():
            start = time.thread_time()
            scores = _score(method, mse_sr, sheet, lr, labels)
            seconds[key] += time.thread_time() - start
            found[key] += points[key].answers(scores, [artifact.pixels for artifact in artifacts])
    responses: list[Response] = []
    for key in usable:
        already = points[key].answers(clean[key], [artifact.pixels for artifact in injected])
        responses += [
            Response(artifact.case, artifact.contrast, artifact.texture, key, after.found, before.found, after.iou)
            for artifact, after, before in zip(injected, found[key], already, strict=True)
        ]
    return Trial(
        image=name,
        clean_pixels=int(np.count_nonzero(~known)),
        faint=len(drawn) - len(injected),
        thresholds={key: value.thresholds for key, value in points.items()},
        default={key: value.threshold for key, value in points.items()},
        min_areas=areas,
        min_area=int(min_area),
        responses=tuple(responses),
        false_alarms=tuple(FalseAlarms(key, *points[key].false_alarms(clean[key], known)) for key in usable),
        seconds=seconds,
        scored_pixels=scored_pixels,
    )


class _Injected(NamedTuple):
    case: Case
    contrast: float
    texture: float
    pixels: npt.NDArray[np.intp]


def _sheets(mse_sr: Pixels, gan_sr: Pixels, drawn: Sequence[Case]) -> Iterator[tuple[Pixels, list[_Injected]]]:
    """The injected images, with those of their artifacts that can be seen."""
    by_sheet = sorted(drawn, key=lambda case: case.sheet)
    for _, group in groupby(by_sheet, key=lambda case: case.sheet):
        sheet, artifacts = gan_sr, []
        for case in group:
            place = case.place(gan_sr.shape)
            rng = np.random.default_rng(case.seed)
            after = inject(sheet, case.kind, place, strength=case.strength, rng=rng)
            change = contrast(sheet, after, place)
            if change >= FAINT:
                sheet = after
                artifacts.append(_Injected(case, change, texture(mse_sr, place), np.flatnonzero(place)))
        if artifacts:
            yield sheet, artifacts


def _usable(method: Detector, gan_sr: Pixels, lr: Pixels | None, labels: Labels | None) -> bool:
    missing = {key for key, value in (("lr", lr), ("labels", labels)) if value is None}
    return missing.isdisjoint(method.inputs) and min(gan_sr.shape[:2]) >= method.smallest


def _score(method: Detector, mse_sr: Pixels, gan_sr: Pixels, lr: Pixels | None, labels: Labels | None) -> Scores:
    return method(mse_sr, gan_sr, lr if "lr" in method.inputs else None, labels if "labels" in method.inputs else None)


def _points(
    method: Detector, gan_sr: Pixels, thresholds: Sequence[float] | None, min_areas: tuple[int, ...], min_area: int
) -> OperatingPoints:
    default = float(method.threshold)
    wanted = map(float, thresholds) if thresholds is not None else (default * factor for factor in GRID)
    height, width = map(int, gan_sr.shape[:2])
    return OperatingPoints((height, width), tuple(sorted({*wanted, default})), min_areas, default, int(min_area))


def _frozen(value: Any) -> Any:
    """Tuples in the place of the lists that JSON has."""
    if isinstance(value, dict):
        return {key: _frozen(item) for key, item in value.items()}
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value
