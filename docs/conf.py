"""Configuration of the documentation site, which `make docs` builds without a network; every warning is an error."""

import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx

from desra_core import __version__

sys.path.append(str(Path(__file__).parent))

project = "desra"
author = "the desra authors"
release = version = __version__

extensions = [
    "myst_nb",  # Markdown pages and notebooks
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "settings_tables",  # docs/settings_tables.py
]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = "desra"
html_show_sourcelink = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"  # below
smartquotes_action = "qe"  # quotes and dots, but no dashes: the flags of the command line begin with two

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # a test runs the notebooks: tests/test_docs.py

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say shapes and ranges, too
napoleon_google_docstring = True
napoleon_numpy_docstring = False


def setup(app: Sphinx) -> None:
    """Have equations written as MathML: MathJax, which Sphinx takes by default, would be loaded from the network."""

    def write(translator: Any, node: nodes.Element) -> None:
        translator.body.append(tex2mathml(node.astext(), as_block=isinstance(node, nodes.math_block)))
        raise nodes.SkipNode

    app.add_html_math_renderer("mathml", (write, None), (write, None))
