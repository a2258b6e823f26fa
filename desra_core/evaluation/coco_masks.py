"""The masks of a COCO file: all annotations of an image together, as one run-length encoding."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from desra_core.errors import UsageError
from desra_core.imageio import Mask

CATEGORY = "artifact"

_FORMAT = "give a COCO file whose images have id, file_name, width and height, and annotations a segmentation"
_TYPES: dict[str, Any] = {"id": int | str, "image_id": int | str, "file_name": str, "name": str, "width": int,
                          "height": int, "segmentation": list | dict}  # fmt: skip
_POSITIVE = ("width", "height")


class CocoMask(NamedTuple):
    """A compressed run-length encoding, column by column, of an image of a size in pixels."""

    height: int
    width: int
    counts: str


def read_coco(path: Path, *, category: str | None = None) -> dict[str, CocoMask]:
    """Read the masks of all images, by file name; that of an image without annotations is empty.

    Parameters
    ----------
    path
        JSON. Segmentations are polygons, or run-length encodings, compressed or not; where one is an empty list, the
        box counts, which is how tools write a rectangle.
    category
        Only annotations of this one count; by default of `CATEGORY`, and where there is none of that name, of all.

    Raises
    ------
    UsageError
        It cannot be read, has no such category, an image or annotation lacks something, or a segmentation does not fit
        its image.
    """
    document = _document(path)
    images: dict[Any, dict[str, Any]] = {}
    for image in _rows(document, "images", ("id", "file_name", "width", "height"), path):
        if image["id"] in images:
            raise UsageError(path, f"has two images with the id {image['id']}", "keep one of them")
        images[image["id"]] = image
    encodings: dict[Any, list[Any]] = {image_id: [] for image_id in images}
    names = [category.get("name") for category in document.get("categories") or () if isinstance(category, dict)]
    if category is not None and category not in names:
        raise UsageError(path, f"has no category {category}", f"it has {', '.join(map(str, names)) or 'none'}")
    wanted = category or CATEGORY
    counted = {
        row["id"]
        for row in (_rows(document, "categories", ("id", "name"), path) if names else ())
        if wanted not in names or row["name"] == wanted
    }
    for annotation in _rows(document, "annotations", ("image_id", "segmentation"), path):
        where = f"{path}, annotation {annotation.get('id', '?')}"
        if annotation["image_id"] not in images:
            raise UsageError(where, f"is of image {annotation['image_id']}, which is not there", _FORMAT)
        if counted and annotation.get("category_id") not in counted:
            continue
        image = images[annotation["image_id"]]
        try:
            shape = annotation["segmentation"] or _outline(annotation.get("bbox"))
            encodings[image["id"]] += _encoded(shape, image["height"], image["width"])
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
            size = f"{image['width']}x{image['height']} px"
            raise UsageError(where, f"holds no mask of an image of {size}", _FORMAT) from None
    masks: dict[str, CocoMask] = {}
    for image_id, image in images.items():
        if image["file_name"] in masks:
            raise UsageError(path, f"has two images called {image['file_name']}", "keep one of them")
        masks[image["file_name"]] = CocoMask(image["height"], image["width"], _merged(encodings[image_id]))
    return masks


def decode_coco_mask(mask: CocoMask) -> Mask:
    """Decode to ``(H, W)`` bool."""
    lengths = _run_lengths(mask.counts) or [mask.height * mask.width]
    columns = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths).reshape(mask.width, mask.height)
    return np.ascontiguousarray(columns.T)


def _document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(path, f"cannot be read ({error.strerror})", "give a readable COCO file") from None
    except (ValueError, RecursionError):
        raise UsageError(path, "is no JSON", _FORMAT) from None
    if not isinstance(document, dict) or not isinstance(document.get("images"), list):
        raise UsageError(path, "is no COCO file", _FORMAT)
    return document


def _rows(document: dict[str, Any], kind: str, needed: tuple[str, ...], path: Path) -> Iterator[dict[str, Any]]:
    """The entries of a list of the file, each of which has what is needed, sizes and names of the right type."""
    for number, row in enumerate(document.get(kind) or ()):
        for name in needed:
            if not isinstance(row, dict) or not _fits(name, row.get(name)):
                raise UsageError(f"{path}, {kind}, entry {number}", f"has no {name}", _FORMAT)
        yield row


def _fits(name: str, value: Any) -> bool:
    return isinstance(value, _TYPES[name]) and (name not in _POSITIVE or value >= 1)


def _outline(box: Any) -> list[list[float]]:
    """The polygon around a box of left, top, width and height; none where there is no box."""
    if not box:
        return []
    x, y, width, height = box
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def _encoded(segmentation: Any, height: int, width: int) -> list[Any]:
    """Run-length encodings of an annotation; raises what Python does for one that is none."""
    from pycocotools import mask as coco

    if isinstance(segmentation, list):
        # Of four numbers pycocotools would make a box; far away, it would draw edges without end.
        far = 4 * (height + width)
        if any(len(polygon) < 6 or len(polygon) % 2 or not (np.abs(polygon) < far).all() for polygon in segmentation):
            raise ValueError
        return list(coco.frPyObjects(segmentation, height, width)) if segmentation else []
    if list(segmentation["size"]) != [height, width]:
        raise ValueError
    counts = segmentation["counts"]
    lengths = counts if isinstance(counts, list) else _run_lengths(counts)
    # pycocotools believes what it is given, and leaves pixels undefined that no run reaches.
    if not all(isinstance(length, int) and length >= 0 for length in lengths) or sum(lengths) != height * width:
        raise ValueError
    return [coco.frPyObjects({"size": [height, width], "counts": lengths}, height, width)]


def _run_lengths(counts: str) -> list[int]:
    """Undo the compression, as ``rleFrString`` of pycocotools does.

    Numbers are written to the base 32 from the lowest digit on; from the fourth on, less the one before the last.
    """
    lengths: list[int] = []
    value = shift = 0
    for character in counts:
        digit = ord(character) - 48
        value |= (digit & 31) << shift
        shift += 5
        if digit & 32:
            continue
        if digit & 16:
            value -= 1 << shift
        lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError
    return lengths


def _merged(encodings: list[Any]) -> str:
    from pycocotools import mask as coco

    return str(coco.merge(encodings)["counts"].decode()) if encodings else ""
