"""The worst regions as rows of pictures, few per image, within a budget of bytes."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from desra_core.errors import ImageError, printable
from desra_core.images.crops import RGB, encode_webp
from desra_core.report.crops import Crops
from desra_core.report.measure import measure_of
from desra_core.report.results import Results
from desra_core.workspace import pictures

PER_IMAGE = 3
KINDS = {
    "lr": "LR",
    "mse_sr": "MSE-SR",
    "gan_sr": "GAN-SR",
    "difference": "1 − D",
    "mask": "artifact mask",
    "pseudo_gt": "pseudo-GT",
}

# Each holds a whole decoded picture, of 800 MB at the very most.
_THREADS = 2
_PREFIX = "data:image/webp;base64,"
_ORDER = [("severity", "descending"), ("image", "ascending"), ("y", "ascending"), ("x", "ascending")]


class Cell(NamedTuple):
    """A picture as a data URI, or why there is none."""

    kind: str
    uri: str | None
    width: int = 0
    height: int = 0
    reason: str = ""


class Row(NamedTuple):
    """A region (a row of the region table) and its pictures."""

    region: dict[str, Any]
    cells: list[Cell]


class Gallery(NamedTuple):
    """The rows shown, and how many more were asked for but did not fit."""

    rows: list[Row]
    left_out: int


def make_gallery(results: Results, worst: int, budget: int) -> Gallery:
    """Cut out and encode the pictures of the worst regions.

    Parameters
    ----------
    results
        The workspace.
    worst
        Number of regions wanted.
    budget
        Characters that the pictures may take in the page.
    """
    chosen = choose(results.regions, worst)
    files = picture_files(results, sorted({region["image"] for region in chosen}))
    shapes = image_shapes(results, [region["id"] for region in chosen])
    measure = measure_of(results.settings)
    kinds = [kind for kind in KINDS if kind != "lr" or "lr" in results.sources]

    def row(region: dict[str, Any]) -> Row:
        shape = shapes.get(region["id"], (0, 0))
        if 0 in shape:
            return Row(region, [Cell(kind, None, reason="The image has failed since.") for kind in kinds])
        box = (region["x"], region["y"], region["width"], region["height"])
        similarity = results.workspace.group(region["id"]) / "similarity"
        crops = Crops(files.get(region["image"], {}), similarity, shape, box, measure=measure)
        return Row(region, [make_cell(kind, partial(crops.make, kind)) for kind in kinds])

    rows: list[Row] = []
    with ThreadPoolExecutor(_THREADS) as pool:
        for made in pool.map(row, chosen):
            budget -= sum(len(cell.uri or "") for cell in made.cells)
            if budget < 0:
                pool.shutdown(wait=False, cancel_futures=True)
                break
            rows.append(made)
    return Gallery(rows, len(chosen) - len(rows))


def choose(regions: pa.Table, worst: int, per_image: int = PER_IMAGE) -> list[dict[str, Any]]:
    """The most severe regions, worst first, at most ``per_image`` of one image and of its copies together.

    Those with a severity below zero are none of them: on average, what they hold is no artifact.
    """
    regions = regions.filter(pc.greater_equal(regions["severity"], 0))
    reach = 4 * worst
    while worst > 0:
        found = regions.take(pc.select_k_unstable(regions, min(reach, regions.num_rows), _ORDER)).to_pylist()
        seen: Counter[str] = Counter()
        shown: set[tuple[str, int, int]] = set()
        chosen = []
        for region in found:
            place = (region["id"], region["x"], region["y"])
            if seen[region["id"]] < per_image and place not in shown:
                seen[region["id"]] += 1
                shown.add(place)
                chosen.append(region)
        if len(chosen) >= worst or len(found) == regions.num_rows:
            return chosen[:worst]
        reach *= 8
    return []


def picture_files(results: Results, names: list[str]) -> dict[str, dict[str, Path]]:
    """The files of some images by name and kind; see `desra_core.workspace.pictures.picture_files`."""
    return pictures.picture_files(results.workspace, results.verb, names)


def image_shapes(results: Results, ids: list[str]) -> dict[str, tuple[int, int]]:
    """``(H, W)`` of the results of some images by id; 0 where it is unknown."""
    wanted = pa.array(sorted(set(ids)), pa.string())
    rows = results.images.filter(pc.is_in(results.images["id"], wanted)).select(["id", "height", "width"])
    return {row["id"]: (row["height"] or 0, row["width"] or 0) for row in rows.to_pylist()}


def make_cell(kind: str, make: Callable[[], RGB]) -> Cell:
    """A picture as a cell, or why there is none."""
    try:
        pixels = make()
    except ImageError as error:
        return Cell(kind, None, reason=printable(f"{Path(error.subject).name}: {error.reason}"))
    except MemoryError:
        return Cell(kind, None, reason="It needs more memory than there is.")
    return Cell(kind, as_uri(encode_webp(pixels)), pixels.shape[1], pixels.shape[0])


def as_uri(webp: bytes) -> str:
    """A WebP file as a data URI."""
    return _PREFIX + base64.b64encode(webp).decode()
