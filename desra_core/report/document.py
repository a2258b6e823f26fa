"""Render HTML pages from ``templates/``, with one style and one script; a page is one file, pictures included."""

import base64
import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jinja2
import matplotlib
import matplotlib.colors
from markupsafe import Markup

from desra_core import __version__
from desra_core.errors import ImageError, printable
from desra_core.evaluation.table import counted, fixed
from desra_core.images.parts import RGB, encode_webp
from desra_core.report import charts, wording
from desra_core.report.pictures import FALSE, HEAT, MISSED, OUTLINE, RIGHT

# Number of stops in the CSS gradient that shows the colour map.
_STOPS = 12
# Each thread holds a whole decoded picture, of at most 800 MB.
_THREADS = 2

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

    ``content`` holds its variables; a lacking one is an error. Text is escaped, `markupsafe.Markup` is not. Filters
    are the formatters of `desra_core.report.wording` and `charts.inline`. The page asks for no other file.
    """
    folder = resources.files("desra_core.report") / "templates"
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (folder / name).read_text("utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    formatters: list[Callable[..., str]] = [
        charts.inline, counted, fixed, csp_hash, wording.count, wording.percent, wording.decimal, wording.severity,
        wording.duration, wording.moment, wording.shortened, wording.stage_name, wording.short_path,
    ]  # fmt: skip
    environment.filters |= {formatter.__name__: formatter for formatter in formatters}
    colours = [matplotlib.colors.to_hex(matplotlib.colormaps[HEAT](step / _STOPS)) for step in range(_STOPS + 1)]
    environment.globals |= {
        "version": __version__,
        "charts": charts,
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
    return environment.get_template(template).render(content)


def csp_hash(script: str) -> str:
    """Compute the hash by which a content security policy allows an inline script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def hex_colour(colour: tuple[int, int, int]) -> str:
    """Write a colour of three bytes as ``#rrggbb``."""
    return "#" + bytes(colour).hex()


def make_cell(kind: str, make: Callable[[], RGB]) -> Cell:
    """Make a picture and encode it; the cell holds the reason instead where ``make`` raises an `ImageError`."""
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
    """Draw items in their order, in two threads, as long as all data URIs together fit into ``budget`` characters.

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
