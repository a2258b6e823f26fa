"""A page about one image: all pictures and all score maps of the whole of it, at one size and on one colour scale."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

import pyarrow.compute as pc

from desra_core.errors import ImageError
from desra_core.images.codec import Labels
from desra_core.images.tiling import Rectangle
from desra_core.report.crops import HUMAN_OUTLINE, Crops, read_picture
from desra_core.report.document import render_page
from desra_core.report.gallery import KINDS, Cell, choose, image_shapes, make_cell, picture_files
from desra_core.report.human import human_masks
from desra_core.report.label_map import class_shares, label_picture
from desra_core.report.maps import label_reader
from desra_core.report.measure import TIMES, Measure, measure_of
from desra_core.report.results import Results
from desra_core.report.scores import Pair, score_kinds, score_picture

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


@dataclass(frozen=True)
class Image:
    """What the pictures of one image are made from."""

    files: dict[str, Path]
    group: Path
    shape: tuple[int, int]
    settings: dict[str, Any]
    measure: Measure

    def labels(self) -> Labels:
        """``(H, W)`` classes (raises `ImageError`)."""
        read = label_reader(self.files.get("labels"), self.group / "labels", self.shape)
        return read(Rectangle(0, 0, *self.shape))

    def pair(self) -> Pair:
        """What the detectors look at (raises `ImageError`)."""
        mse_sr, gan_sr = (read_picture(self.files, kind, self.shape) for kind in ("mse_sr", "gan_sr"))
        return Pair(mse_sr, gan_sr, _found(partial(read_picture, self.files, "lr")), _found(self.labels))


def choose_pages(results: Results, count: int) -> list[Page]:
    """The images with the most severe regions, worst first."""
    chosen = choose(results.regions, count, per_image=1)
    return [Page(region["image"], region["id"], f"{FOLDER}/{region['image']}.html") for region in chosen]


def render_pages(results: Results, pages: list[Page], report: str) -> Iterator[tuple[Page, str]]:
    """Each page with its text.

    Parameters
    ----------
    results
        The workspace; nothing in it changes.
    pages
        As chosen.
    report
        Name of the file of the report, to link back to it.
    """
    files = picture_files(results, [page.name for page in pages])
    shapes = image_shapes(results, [page.id for page in pages])
    people = human_masks(results)
    for page in pages:
        found = dict(files.get(page.name, {}))
        if page.id in people:
            found["human"] = people[page.id].path
        image = Image(
            files=found,
            group=results.workspace.group(page.id),
            shape=shapes.get(page.id, (0, 0)),
            settings=results.settings,
            measure=measure_of(results.settings),
        )
        yield page, render_page("image.html.j2", **_content(results, page, image, report))


def _content(results: Results, page: Page, image: Image, report: str) -> dict[str, Any]:
    regions = results.regions.filter(pc.equal(results.regions["image"], page.name)).to_pylist()
    regions.sort(key=lambda region: (-region["severity"], region["y"], region["x"]))
    scores = score_kinds(image.measure)
    cells = _cells(image, with_lr="lr" in results.sources)
    labels = None if 0 in image.shape else _found(image.labels)
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
        "human_outline": "#" + bytes(HUMAN_OUTLINE).hex(),
    }


def _cells(image: Image, *, with_lr: bool) -> list[Cell]:
    """All pictures, then all score maps."""
    kinds = ["mse_sr", "gan_sr", "mask", "pseudo_gt", "labels"]
    if with_lr:
        kinds.insert(0, "lr")
    if "human" in image.files:
        kinds.insert(kinds.index("mask") + 1, "human")
    if 0 in image.shape:
        kinds += [score.kind for score in score_kinds(image.measure)]
        return [Cell(kind, None, reason="The image has failed since.") for kind in kinds]
    return _within_budget([*_pictures(image, kinds), *_score_maps(image)])


def _pictures(image: Image, kinds: list[str]) -> Iterator[Cell]:
    """The pictures of the whole image."""
    crops = Crops(image.files, image.group / "similarity", image.shape, None, largest=_LARGEST)
    for kind in kinds:
        if kind == "labels":
            yield make_cell(kind, lambda: label_picture(image.labels(), largest=_LARGEST))
        else:
            yield make_cell(kind, partial(crops.make, kind))


def _score_maps(image: Image) -> Iterator[Cell]:
    """The score maps of the whole image; all for the same reason none where its results are not there."""
    scores = score_kinds(image.measure)
    try:
        pair = image.pair()
    except (ImageError, MemoryError) as error:
        subject, reason = getattr(error, "subject", "memory"), getattr(error, "reason", "there is not enough")
        yield from (Cell(score.kind, None, reason=f"{Path(subject).name}: {reason}") for score in scores)
        return
    for score in scores:
        make = partial(score_picture, score, pair, image.settings, image.measure, largest=_LARGEST)
        yield make_cell(score.kind, make)


def _within_budget(cells: list[Cell]) -> list[Cell]:
    """Cells that the page has room for, of noise; others say that they are left out."""
    left = PICTURE_CHARACTERS
    kept = []
    for cell in cells:
        left -= len(cell.uri or "")
        kept.append(cell if left >= 0 else Cell(cell.kind, None, reason="Left out, to keep this page below 20 MB."))
    return kept


def _found(read: Callable[[], Read]) -> Read | None:
    """What there may be."""
    try:
        return read()
    except (ImageError, MemoryError):
        return None
