"""What a calibration comes to: weights, their comparison with the published ones, thresholds, and where all is from."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from desra_core import __version__
from desra_core.calibration.counting import Counting
from desra_core.calibration.histogram import ClassHistogram, false_alarm_rate, false_alarm_threshold
from desra_core.calibration.weight_table import ClassWeight, derive_weights, to_csv, to_toml, weight_values
from desra_core.detection.class_weights import load_weights
from desra_core.detection.mask import THRESHOLD
from desra_core.errors import UsageError
from desra_core.files.atomic import replace_file
from desra_core.files.hashing import content_key
from desra_core.planning.keys import check_kind, load_settings
from desra_core.settings import CorpusSettings, Detection, Mining, detector_of
from desra_core.settings.models import Calibrating
from desra_core.workspace import Workspace

RATES = (0.1, 0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001)


class Suggestion(NamedTuple):
    """Thresholds for a share of artifact-free pixels below: with the derived weights, and with the published ones."""

    rate: float
    threshold: float | None
    published_threshold: float | None


class CalibratedWeights(NamedTuple):
    """The weight of each class and what it rests on.

    ``suggested`` is for the rate that was asked for, ``suggestions`` for several. ``below`` is the share of the counted
    pixels below the default threshold with the derived and with the published weights. ``origin`` is for people.
    """

    rows: list[ClassWeight]
    histogram: ClassHistogram
    suggested: Suggestion
    suggestions: list[Suggestion]
    below: tuple[float, float]
    origin: dict[str, Any]


def corpus_of(calibrating: Calibrating) -> CorpusSettings:
    """What detect or mine have to do first: what the latest run did, but for what is given, and keep all maps.

    Raises
    ------
    UsageError
        No pairs or no labels are known, only one folder is given, or the workspace belongs to another kind of run or
        to another detector.
    """
    workspace = Workspace(calibrating.workspace)
    given: dict[str, Any] = {name: getattr(calibrating, name) for name in ("mse_sr", "gan_sr")}
    given = {name: folder for name, folder in given.items() if folder is not None}
    if len(given) == 1:
        lacking = "--gan-sr" if "mse_sr" in given else "--mse-sr"
        raise UsageError(lacking, "is not given", "give both folders, or none for those of the latest run")
    kind: type[CorpusSettings] = Detection
    recorded: dict[str, Any] = {}
    if not given and not workspace.settings.exists():
        remedy = "name one of desra detect or mine, or give --mse-sr and --gan-sr"
        raise UsageError(workspace.root, "is no workspace with a run in it", remedy)
    if workspace.settings.exists():
        settings, _ = load_settings(workspace)
        kind, recorded = type(settings), settings.model_dump()
    if kind is not Detection and given:
        check_kind(workspace, Detection(workspace=workspace.root, **given))
    if calibrating.segmenter != "none":
        given["segmenter"] = calibrating.segmenter
    keep = "all" if recorded.get("keep") == "all" else "maps"
    corpus = kind(**(recorded | given | {"workspace": workspace.root, "keep": keep}))
    if corpus.segmenter == "none":
        raise UsageError("--labels", "are needed, because each class has its own weight", "add --labels or --segmenter")
    detector = detector_of(corpus)
    if not detector.weighs_classes:
        reason = f"is of desra detect --method {detector.name}, which weighs no classes"
        raise UsageError(workspace.root, reason, "name another workspace")
    return corpus


def conclude(calibrating: Calibrating, corpus: CorpusSettings, counting: Counting) -> CalibratedWeights:
    """Derive weights and thresholds from what was counted.

    Raises
    ------
    UsageError
        Nothing was, or a file is damaged.
    """
    histogram = counting.histogram()
    if not histogram.pixels.any():
        reason = "holds no pixel to be counted"
        raise UsageError(corpus.workspace, reason, "see desra status for what failed, and the masks of --exclude")
    rows = derive_weights(
        histogram,
        rule=calibrating.rule,
        percentile=calibrating.percentile,
        min_pixels=calibrating.min_pixels,
        min_images=calibrating.min_images,
        fallback=calibrating.fallback,
    )
    ours, published = weight_values(rows), load_weights("published").values
    rates = sorted({*RATES, calibrating.false_alarm_rate}, reverse=True)
    suggestions = [suggest(histogram, ours, published, rate) for rate in rates]
    below = tuple(false_alarm_rate(histogram, weights, THRESHOLD) or 0.0 for weights in (ours, published))
    return CalibratedWeights(
        rows=rows,
        histogram=histogram,
        suggested=suggestions[rates.index(calibrating.false_alarm_rate)],
        suggestions=suggestions,
        below=(below[0], below[1]),
        origin=_origin(calibrating, corpus, counting, histogram),
    )


def suggest(
    histogram: ClassHistogram, ours: npt.NDArray[np.float64], published: npt.NDArray[np.float64], rate: float
) -> Suggestion:
    """The thresholds for a rate."""
    thresholds = (false_alarm_threshold(histogram, weights, rate) for weights in (ours, published))
    return Suggestion(rate, *thresholds)


def write_weights(calibrated: CalibratedWeights, path: Path) -> None:
    """Write the weights as TOML with their origin, or as CSV, by the suffix (raises `TransientError`)."""
    if path.suffix.lower() == ".csv":
        data = to_csv(calibrated.rows)
    else:
        alarms = [suggestion._asdict() for suggestion in calibrated.suggestions]
        suggested = calibrated.suggested._asdict()
        data = to_toml(calibrated.rows, {"origin": calibrated.origin, "suggestion": suggested, "false_alarms": alarms})
    replace_file(path, data)


def _origin(
    calibrating: Calibrating, corpus: CorpusSettings, counting: Counting, histogram: ClassHistogram
) -> dict[str, Any]:
    models: dict[str, Any] = {}
    if isinstance(corpus, Mining):
        for role in ("mse_model", "gan_model"):
            path = getattr(corpus, role)
            models |= {role: str(path), f"{role}_key": content_key(path)}
        models |= {"photos": str(corpus.photos), "precision": corpus.precision}
    else:
        models |= {role: str(getattr(corpus, role)) for role in ("mse_sr", "gan_sr")}
    return {
        "desra": __version__,
        "counted": max(shard.covered.time for shard in counting.counted() if shard.covered),
        "run": f"desra {corpus.verb}",
        "workspace": str(corpus.workspace),
        **models,
        "segmenter": corpus.segmenter,
        "window": corpus.window,
        "exclude": str(calibrating.exclude) if calibrating.exclude else None,
        "rule": calibrating.rule,
        "percentile": calibrating.percentile,
        "fallback": calibrating.fallback,
        "min_pixels": calibrating.min_pixels,
        "min_images": calibrating.min_images,
        "images": histogram.seen,
        "pixels": int(histogram.pixels.sum()),
        "excluded_pixels": histogram.excluded,
    }
