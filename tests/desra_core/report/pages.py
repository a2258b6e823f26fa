"""Helpers of the tests of pages: their elements and words, the viewer, and human masks for a workspace."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from desra_core.images.codec import encode_mask
from desra_core.workspace import Workspace
from desra_core.workspace.human_masks import HUMAN_MASKS
from tests.browser import Page

EVENTS = re.compile(r"^on[a-z]+$")


class Elements(HTMLParser):
    """Every start tag with its attributes, and all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._open = tag

    def handle_endtag(self, tag):
        self._open = ""

    def handle_data(self, data):
        if self._open not in ("script", "style"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.texts)


def words(page: str) -> str:
    return " ".join(Elements(page).text.split())


def stands_alone(page: Page) -> None:
    """Check that a page of regions asks for nothing, shows all its pictures, fits, and enlarges a picture."""
    assert page.requests == []
    assert page.complaints == []
    broken = "[...document.images].filter((image) => image.getAttribute('src') && !image.naturalWidth).length"
    assert page.evaluate(broken) == 0
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.evaluate("document.querySelector('.region img').click()")
    assert page.evaluate("document.querySelector('#viewer').open")


def viewer(page: Page) -> list[object]:
    """Whether the viewer is open, the first words of its title and of its picture, and whether that shows."""
    shown = page.evaluate("""(() => {
        const [image, title] = ["img", "h2"].map((name) => viewer.querySelector(name));
        return [viewer.open, title.textContent.split(" ")[0], image.alt.split(" ")[0], image.naturalWidth > 0];
    })()""")
    assert isinstance(shown, list)
    return shown


def look_at(workspace: Workspace, masks: dict[str, np.ndarray], gan_sr_key: str | None = None) -> None:
    """Store human masks for some images."""
    ids = {row["name"]: row["id"] for row in pq.read_table(workspace.manifest).to_pylist()}
    for name, mask in masks.items():
        workspace.publish(workspace.human_mask(name), encode_mask(mask))
    rows = [{"name": name, "id": ids[name], "gan_sr_key": gan_sr_key, "pixels": int(mask.sum()), "regions": 1}
            for name, mask in masks.items()]  # fmt: skip
    workspace.publish_table(workspace.human_manifest, pa.Table.from_pylist(rows, HUMAN_MASKS))
