"""Settings, stages and numbers in words that a reader knows."""

import math
from datetime import UTC, datetime
from pathlib import PurePath
from typing import Any

from pydantic import BaseModel

from desra_core import settings as settings_module
from desra_core.errors import printable
from desra_core.workspace.products import PRODUCTS

# A file name may have 4000 characters; a page has to stay readable, and below its size.
_LONGEST = 240

STAGES = {product.name: product.title for product in PRODUCTS} | {
    "inference": "of which inference",
    "scan": "scan of the folders",
}
ROLES = {"lr": "LR photos", "mse_sr": "MSE-SR results", "gan_sr": "GAN-SR results", "labels": "class labels"}
_SETTINGS = ROLES | {
    "photos": "LR photos",
    "mse_model": "MSE model",
    "gan_model": "GAN model",
    "segmenter": "source of class labels",
    "weights": "class weights",
    "threshold": "similarity threshold",
    "min_area": "minimal area of a region",
    "window": "Gaussian window",
    "keep": "arrays kept",
    "limit": "images at most",
    "exclude": "left out",
    "shard_size": "images per shard",
    "group_by": "kept together",
    "pixel": "pixel loss",
    "perceptual": "perceptual loss",
    "gan_weight": "GAN weight",
    "ema": "EMA",
    "amp": "number format",
}


def settings_rows(settings: dict[str, Any], above: tuple[str, ...] = ()) -> list[tuple[str, str, str]]:
    """Write the settings of a run as rows of name, value and meaning; a nested setting gives a row per leaf."""
    models = [kind for kind in vars(settings_module).values() if isinstance(kind, type) and issubclass(kind, BaseModel)]
    meanings = {name: field.description or "" for model in models for name, field in model.model_fields.items()}
    rows = []
    for name, value in settings.items():
        path = (*above, name)
        if isinstance(value, dict) and value:
            rows += settings_rows(value, path)
        else:
            label = " ".join(_SETTINGS.get(part, part.replace("_", " ")) for part in path)
            rows.append((shortened(label), _value(name, value, settings), meanings.get(path[0], "")))
    return rows


def stage_name(stage: str | None) -> str:
    """Name a stage in words."""
    return STAGES.get(stage or "", (stage or "").replace("_", " "))


def shortened(text: object, longest: int = _LONGEST) -> str:
    """Write a text in one printable line; leave out its middle where it is longer than ``longest`` characters."""
    line = printable("" if text is None else text)
    half = longest // 2
    return line if len(line) <= longest else f"{line[:half]} … {line[-half:]}"


def count(number: int) -> str:
    """Format a count as ``12,345``."""
    return f"{number:,}"


def percent(share: float | None) -> str:
    """Format a share with two significant digits; a dash where it is undefined."""
    if share is None:
        return "–"
    value = 100 * share
    if value == 0 or value >= 10:
        return f"{value:.1f} %".replace(".0 %", " %")
    return f"{value:.{max(1, 1 - math.floor(math.log10(value)))}f} %" if value >= 1e-4 else "below 0.0001 %"


def decimal(number: float | None) -> str:
    """Format a measured number with three significant digits; a dash where it is undefined."""
    if number is None or not math.isfinite(number):
        return "–"
    digits = 2 - math.floor(math.log10(abs(number))) if number else 0
    return f"{number:,.{max(0, min(digits, 4))}f}"


def number_label(value: float) -> str:
    """Format a value in a chart: whole numbers in full, others with three significant digits."""
    return (f"{value:,.0f}" if value == round(value) else f"{value:.3g}").replace("-", "−")


def tick(number: float) -> str:
    """Format the label of a tick: ``10 k``, ``3 M``, ``−0.5``."""
    for factor, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(number) >= factor:
            return f"{number / factor:g}{unit}".replace("-", "−")
    return f"{number:g}".replace("-", "−")


def severity(number: float) -> str:
    """Format the severity of a region: ``1,234.5``, ``−0.5``."""
    return f"{number:,.1f}".replace("-", "−")


def duration(seconds: float) -> str:
    """Format a computing time in the unit that suits it."""
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{decimal(seconds / length)} {unit}"
    return f"{decimal(seconds)} s"


def moment(time: datetime) -> str:
    """Format a point in time to the minute."""
    return f"{time.astimezone(UTC):%-d %B %Y, %H:%M} UTC"


def short_path(path: str) -> str:
    """Write the end of a path: a file and its folder."""
    parts = PurePath(path).parts
    return shortened(path if len(parts) <= 3 else "/".join(("…", *parts[-2:])), 90)


def _value(name: str, value: Any, settings: dict[str, Any]) -> str:
    if name == "weights" and value is None:
        return "none, every class has weight 1" if settings.get("segmenter", "none") == "none" else "published"
    if value is None:
        return "all" if name == "limit" else "not given"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return shortened(", ".join(map(str, value)) or "nothing")
    return shortened(value)
