"""A page about one image: all pictures and all score maps of the whole of it, at one size and on one colour scale."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

import pyarrow.compute as pc

from desra_core.detection.detectors import TIMES, DetectorInputs
from desra_core.errors import ImageError
from desra_core.images.codec import Labels
from desra_core.images.crops import RGB
from desra_core.images.tiling import Rectangle
from desra_core.report.document import Cell, hex_colour, make_cell, render_page
from desra_core.report.maps import StoredImage
from desra_core.report.pictures import HUMAN_OUTLINE, KINDS, Crops, class_shares, label_picture
from desra_core.report.results import WorkspaceResults
from desra_core.report.scores import ScoreMap, score_kinds, score_picture

FOLDER = "pages"
# Of the page's 20 MB.
PICTURE_CHARACTERS = 18_000_000

_LARGEST = 900
_REGIONS = 200
_CAPTIONS = KINDS | {"human": "human mask", "labels": "class labels"}

Read = TypeVar("Read")


class Page(NamedTuple):
    """A page to be written: its image, and its place beside the report."""

    name: str
    id: str
    path: str

    @property
    def link(self) -> str:
        """Its address in the report."""
        return quote(os.fsencode(self.path))


def render_pages(results: WorkspaceResults, pages: list[Page], report: str) -> Iterator[tuple[Page, str]]:
    """Render pages about images, one after the other; each links back to the file ``report``."""
    images = results.stored_images([page.name for page in pages], [page.id for page in pages])
    people = results.human_masks()
    for page in pages:
        image = images[page.name]
        if page.id in people:
            image = replace(image, files={**image.files, "human": people[page.id].path})
        yield page, render_page("image.html.j2", **_content(results, page, image, report))


def _content(results: WorkspaceResults, page: Page, image: StoredImage, report: str) -> dict[str, Any]:
    regions = results.regions.filter(pc.equal(results.regions["image"], page.name)).to_pylist()
    regions.sort(key=lambda region: (-region["severity"], region["y"], region["x"]))
    scores = score_kinds(image.measure)
    labels = None if 0 in image.shape else _or_none(partial(_labels, image))
    cells = _cells(results, image, labels, scores)
    return {
        "name": page.name,
        "back": "../" * page.path.count("/") + quote(os.fsencode(report)),
        "shape": image.shape,
        "marked": sum(region["area"] for region in regions),
        "regions": regions[:_REGIONS],
        "left_out": max(0, len(regions) - _REGIONS),
        "measure": image.measure,
        "pictures": cells[: -len(scores)],
        "maps": cells[-len(scores) :],
        "captions": _CAPTIONS | {score.kind: score.caption for score in scores},
        "thresholds": {score.kind: score.threshold for score in scores},
        "times": TIMES,
        "legend": [] if labels is None else class_shares(labels),
        "human_outline": hex_colour(HUMAN_OUTLINE),
    }


def _cells(results: WorkspaceResults, image: StoredImage, labels: Labels | None, scores: list[ScoreMap]) -> list[Cell]:
    """Draw all pictures, then all score maps; as many as the page has room for."""
    kinds = ["mse_sr", "gan_sr", "mask", "pseudo_gt", "labels"]
    if "lr" in results.sources:
        kinds.insert(0, "lr")
    if "human" in image.files:
        kinds.insert(kinds.index("mask") + 1, "human")
    if 0 in image.shape:
        kinds += [score.kind for score in scores]
        return [Cell(kind, None, reason="The image has failed since.") for kind in kinds]
    crops = Crops(image, largest=_LARGEST)
    draw: dict[str, Callable[[], RGB]] = {kind: partial(crops.make, kind) for kind in kinds}
    draw["labels"] = lambda: label_picture(_labels(image) if labels is None else labels, largest=_LARGEST)
    cells = [make_cell(kind, draw[kind]) for kind in kinds] + _score_maps(results, image, labels, scores)
    left = PICTURE_CHARACTERS
    kept = []
    for cell in cells:
        left -= len(cell.uri or "")
        kept.append(cell if left >= 0 else Cell(cell.kind, None, reason="Left out, to keep this page below 20 MB."))
    return kept


def _score_maps(
    results: WorkspaceResults, image: StoredImage, labels: Labels | None, scores: list[ScoreMap]
) -> list[Cell]:
    """Draw the score maps of the whole image; where its results cannot be read, each cell gives that reason."""
    try:
        mse_sr, gan_sr = image.picture("mse_sr"), image.picture("gan_sr")
        pair = DetectorInputs(mse_sr, gan_sr, _or_none(partial(image.picture, "lr")), labels)
    except (ImageError, MemoryError) as error:
        subject, reason = getattr(error, "subject", "memory"), getattr(error, "reason", "there is not enough")
        return [Cell(score.kind, None, reason=f"{Path(subject).name}: {reason}") for score in scores]
    settings = results.settings
    return [make_cell(score.kind, partial(score_picture, score, pair, settings, largest=_LARGEST)) for score in scores]


def _labels(image: StoredImage) -> Labels:
    """Read the classes of the whole image (raises `ImageError`)."""
    return image.label_reader()(Rectangle(0, 0, *image.shape))


def _or_none(read: Callable[[], Read]) -> Read | None:
    try:
        return read()
    except (ImageError, MemoryError):
        return None
