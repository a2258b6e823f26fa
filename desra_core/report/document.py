"""HTML pages from the templates beside this module: one look, one script, everything in one file."""

from __future__ import annotations

import base64
import hashlib
from importlib import resources
from typing import Any

import jinja2
import matplotlib
import matplotlib.colors

from desra_core import __version__
from desra_core.report import wording
from desra_core.report.crops import HEAT, OUTLINE

_FILTERS = (wording.count, wording.percent, wording.decimal, wording.duration, wording.shortened, wording.stage_name,
            wording.short_path)  # fmt: skip


def render_page(template: str, **content: Any) -> str:
    """Fill in a template of this package.

    Parameters
    ----------
    template
        Such as ``report.html.j2``: a file in `desra_core.report` that extends ``base.html.j2`` and fills its blocks
        ``title`` and ``content``. Beside what is given it has the functions of `desra_core.report.wording` as filters.
    content
        Its variables; one that is lacking is an error. Text is escaped, `markupsafe.Markup` is not.

    Returns
    -------
    The page, which asks for nothing else.
    """
    folder = resources.files("desra_core.report")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (folder / name).read_text("utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {function.__name__: function for function in _FILTERS} | {"csp_hash": csp_hash}
    environment.globals |= {
        "version": __version__,
        "heat": ", ".join(heat_colours()),
        "outline": "#" + bytes(OUTLINE).hex(),
    }
    return environment.get_template(template).render(content)


def heat_colours(name: str = HEAT, steps: int = 12) -> list[str]:
    """The stops of a CSS gradient that shows a colour map of matplotlib."""
    return [matplotlib.colors.to_hex(matplotlib.colormaps[name](step / steps)) for step in range(steps + 1)]


def csp_hash(script: str) -> str:
    """How a content security policy names an inline script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
