"""Render HTML pages from ``templates/``, with one style and one script; a page is one file, pictures included.

Settings, stages and numbers are written in words that a reader knows.
"""

import base64
import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path, PurePath
from typing import Any, NamedTuple, TypeVar

import jinja2
import matplotlib
import matplotlib.colors
from markupsafe import Markup
from pydantic import BaseModel

from desra_core import __version__
from desra_core import settings as settings_module
from desra_core.errors import ImageError, printable
from desra_core.evaluation.table import counted, fixed
from desra_core.images.parts import RGB, encode_webp
from desra_core.report.pictures import FALSE, HEAT, MISSED, OUTLINE, RIGHT
from desra_core.workspace.products import PRODUCTS

# Number of stops in the CSS gradient that shows the colour map.
_STOPS = 12
# Each thread holds a whole decoded picture, of at most 800 MB.
_THREADS = 2
# The most characters of a text. A path may have 4000, but a page must stay readable and small.
_LONGEST = 240

STAGES = {product.name: product.title for product in PRODUCTS} | {
    "inference": "of which inference",
    "scan": "scan of the folders",
}
ROLES = {"lr": "LR photos", "mse_sr": "MSE-SR results", "gan_sr": "GAN-SR results", "labels": "class labels"}

Item = TypeVar("Item")


class Cell(NamedTuple):
    """A picture of some kind as a data URI; where ``uri`` is None, ``reason`` says why."""

    kind: str
    uri: str | None
    width: int = 0
    height: int = 0
    reason: str = ""


def render_page(template: str, **content: Any) -> str:
    """Fill in a template of ``templates/``, such as ``report.html.j2``.

    ``content`` holds the template's variables; a missing one is an error. Text is escaped, except `markupsafe.Markup`.
    The filters are the formatters of this module. The page loads no other file.
    """
    return _environment().get_template(template).render(content)


@functools.cache
def _environment() -> jinja2.Environment:
    """Make the environment of all templates, which compiles each of them once."""
    folder = resources.files("desra_core.report") / "templates"
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (folder / name).read_text("utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    formatters: list[Callable[..., str]] = [
        counted, fixed, csp_hash, count, percent, decimal, severity, duration, moment, shortened, stage_name,
        short_path,
    ]  # fmt: skip
    environment.filters |= {formatter.__name__: formatter for formatter in formatters}
    colours = [matplotlib.colors.to_hex(matplotlib.colormaps[HEAT](step / _STOPS)) for step in range(_STOPS + 1)]
    environment.globals |= {
        "version": __version__,
        "style": Markup((folder / "style.css").read_text("utf-8")),  # noqa: S704 our own
        "script": Markup((folder / "viewer.js").read_text("utf-8")),  # noqa: S704 our own
        "heat": ", ".join(colours),
        "outline": hex_colour(OUTLINE),
        "agreement": {
            "right: in both": hex_colour(RIGHT),
            "false: in the mask alone": hex_colour(FALSE),
            "missed: in the ground truth alone": hex_colour(MISSED),
        },
    }
    return environment


def csp_hash(script: str) -> str:
    """Compute the hash by which a content security policy allows an inline script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def hex_colour(colour: tuple[int, int, int]) -> str:
    """Write a colour of three bytes as ``#rrggbb``."""
    return "#" + bytes(colour).hex()


def make_cell(kind: str, make: Callable[[], RGB]) -> Cell:
    """Make a picture and encode it; where ``make`` raises an `ImageError`, the cell holds the reason instead."""
    try:
        pixels = make()
    except ImageError as error:
        return Cell(kind, None, reason=printable(f"{Path(error.subject).name}: {error.reason}"))
    except MemoryError:
        return Cell(kind, None, reason="It needs more memory than there is.")
    return Cell(kind, as_uri(encode_webp(pixels)), pixels.shape[1], pixels.shape[0])


def as_uri(webp: bytes) -> str:
    """Write a WebP file as a data URI."""
    return "data:image/webp;base64," + base64.b64encode(webp).decode()


def cells_within(
    budget: int, items: Sequence[Item], draw: Callable[[Item], list[Cell]]
) -> list[tuple[Item, list[Cell]]]:
    """Draw items in their order, in two threads, until their data URIs exceed ``budget`` characters in sum.

    Returns:
        The items that fit, each with its pictures.
    """
    drawn = []
    with ThreadPoolExecutor(_THREADS) as pool:
        for item, cells in zip(items, pool.map(draw, items), strict=True):
            budget -= characters(cells)
            if budget < 0:
                pool.shutdown(wait=False, cancel_futures=True)
                break
            drawn.append((item, cells))
    return drawn


def characters(cells: Sequence[Cell]) -> int:
    """Count the characters of the data URIs of pictures."""
    return sum(len(cell.uri or "") for cell in cells)


def settings_rows(settings: dict[str, Any], above: tuple[str, ...] = ()) -> list[tuple[str, str, str]]:
    """Write the settings of a run as rows of name, value and meaning; the names are those of the flags.

    A nested setting gives a row per leaf.
    """
    models = [kind for kind in vars(settings_module).values() if isinstance(kind, type) and issubclass(kind, BaseModel)]
    meanings = {name: field.description or "" for model in models for name, field in model.model_fields.items()}
    rows = []
    for name, value in settings.items():
        path = (*above, name)
        if isinstance(value, dict) and value:
            rows += settings_rows(value, path)
        else:
            label = " ".join(part.replace("_", " ") for part in path)
            text = shortened(value)
            if name == "weights" and value is None:
                text = "none, every class has weight 1" if settings.get("segmenter", "none") == "none" else "published"
            elif value is None:
                text = "all" if name == "limit" else "not given"
            elif isinstance(value, bool):
                text = "yes" if value else "no"
            elif isinstance(value, list):
                text = shortened(", ".join(map(str, value)) or "nothing")
            rows.append((shortened(label), text, meanings.get(path[0], "")))
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
