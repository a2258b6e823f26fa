"""The masks of a COCO file: all annotations of an image together, as one run-length encoding."""

import cmath
import contextlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from desra_core.errors import UsageError
from desra_core.files import read_input
from desra_core.images.codec import Mask

CATEGORY = "artifact"

Id = int | str | None

# The most pixels of an image, and of an outline in it: pycocotools counts in 32 bits, and takes 80 bytes for each pixel
# of an outline.
_MOST_PIXELS = 2**32 - 1
_LONGEST = 2**23

_WHOLE = re.compile(r"\s*([+-]?\d{1,40})(?:\.0*)?\s*")
_FORMAT = "give a COCO file whose images have id, file_name, width and height, and annotations a segmentation or a bbox"


class CocoMask(NamedTuple):
    """The artifacts of an image in a COCO file."""

    height: int  # pixels of the image
    width: int
    counts: str  # compressed run-length encoding, column by column
    kinds: tuple[str, ...] = ()  # the shape of each region: polygon, box, rotated box or RLE
    left_out: tuple[str, ...] = ()  # a phrase for each shape that does not count, such as "region of category text"


@dataclass
class _Image:
    """An image of the file, and the content of its annotations."""

    name: str
    height: int
    width: int
    encodings: list[Any] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def mask(self) -> CocoMask:
        from pycocotools import mask as coco

        counts = coco.merge(self.encodings)["counts"].decode() if self.encodings else ""
        return CocoMask(self.height, self.width, counts, tuple(self.kinds), tuple(self.left_out))


def read_coco(path: Path, *, category: str | None = None) -> dict[str, CocoMask]:
    """Read the masks of all images, by file name; the mask of an image without annotations is empty.

    Ids may be numbers or text, sizes 384 or 384.0, and an annotation may name its category in place of the id.

    Args:
        path: JSON, see `decode_json`. Segmentations are polygons or run-length encodings, compressed or not. Without
            a segmentation, or with an empty one, the box counts, turned by CVAT's attribute ``rotation`` (degrees).
        category: Only annotations of this category count; by default those of `CATEGORY`, or all if the file has no
            category of that name.

    Raises:
        UsageError: The file cannot be read or has no such category, an image or annotation lacks something, an
            annotation is of no known image or category, or its shape does not fit the image.
    """
    try:
        document = decode_json(read_input(path))
    except OSError as error:
        raise UsageError(path, f"cannot be read ({error.strerror})", "give a readable COCO file") from None
    except ValueError as error:
        raise UsageError(path, str(error), _FORMAT) from None
    if not isinstance(document, dict) or not isinstance(document.get("images"), list):
        raise UsageError(path, "is no COCO file", _FORMAT)
    images = _images(document, path)
    categories = _categories(document, category, path)
    for annotation in _entries(document, "annotations", ("image_id",), path):
        where = f"{path}, annotation {annotation.get('id', '?')}"
        image = images.get(_id(annotation["image_id"]))
        if image is None:
            raise UsageError(where, f"is of image {annotation['image_id']}, which is not there", _FORMAT)
        name, counts = _category(annotation, categories, where)
        if counts:
            _draw(annotation, image, where)
        else:
            image.left_out.append(f"region of category {name}")
    return {image.name: image.mask() for image in images.values()}


def decode_json(data: bytes) -> Any:
    """Parse JSON in UTF-8, UTF-16, UTF-32 or GB18030 (which includes GBK), with a byte order mark or without.

    Raises `ValueError`: the data is no JSON, or text in another encoding.
    """
    try:
        with contextlib.suppress(UnicodeDecodeError):
            return json.loads(data)
        return json.loads(data.decode("gb18030"))
    except UnicodeDecodeError:
        raise ValueError("is text in another encoding than UTF-8, UTF-16 and GB18030") from None
    except (ValueError, RecursionError):
        raise ValueError("is no JSON") from None


def whole_number(value: Any) -> int | None:
    """Read a number that JSON may hold as 384, 384.0 or "384"; None for anything else."""
    if isinstance(value, str):
        digits = _WHOLE.fullmatch(value)
        return int(digits[1]) if digits else None
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def decode_coco_mask(mask: CocoMask) -> Mask:
    """Decode a mask to ``(H, W)`` bool."""
    # pycocotools' decode makes NumPy 2 warn.
    lengths = _run_lengths(mask.counts) or [mask.height * mask.width]
    columns = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths).reshape(mask.width, mask.height)
    return np.ascontiguousarray(columns.T)


def _entries(document: dict[str, Any], kind: str, needed: tuple[str, ...], path: Path) -> Iterator[dict[str, Any]]:
    """Yield the entries of a list of the file; raises `UsageError` for one that lacks a needed id, name or size."""
    rows = document.get(kind) or ()
    if not isinstance(rows, list | tuple):
        raise UsageError(f"{path}, {kind}", "is no list", _FORMAT)
    for number, row in enumerate(rows):
        for name in needed:
            value = row.get(name) if isinstance(row, dict) else None
            if name in ("file_name", "name"):
                fits = isinstance(value, str) and value != ""
            elif name in ("width", "height"):
                fits = (whole_number(value) or 0) >= 1
            else:
                fits = _id(value) is not None
            if not fits:
                raise UsageError(f"{path}, {kind}, entry {number}", f"has no {name}", _FORMAT)
        yield row


def _id(value: Any) -> Id:
    """Read an id, which tools write as 7, 7.0 or "7"; None for anything else."""
    number = whole_number(value)
    return number if number is not None else value if isinstance(value, str) else None


def _images(document: dict[str, Any], path: Path) -> dict[Id, _Image]:
    """Collect the images of the file by id."""
    images: dict[Id, _Image] = {}
    names: set[str] = set()
    for row in _entries(document, "images", ("id", "file_name", "width", "height"), path):
        key, name = _id(row["id"]), row["file_name"]
        if key in images:
            raise UsageError(path, f"has two images with the id {row['id']}", "keep one of them")
        if name in names:
            raise UsageError(path, f"has two images called {name}", "keep one of them")
        names.add(name)
        height, width = whole_number(row["height"]) or 0, whole_number(row["width"]) or 0
        if height * width > _MOST_PIXELS:
            raise UsageError(path, f"has an image of {width}x{height} px, {name}", "mend its width and height")
        images[key] = _Image(name, height, width)
    return images


def _categories(document: dict[str, Any], wanted: str | None, path: Path) -> dict[Id, tuple[str, bool]]:
    """Collect the name of each category by its id, and whether its annotations count."""
    names = {_id(row["id"]): row["name"] for row in _entries(document, "categories", ("id", "name"), path)}
    if wanted is not None and wanted not in names.values():
        raise UsageError(path, f"has no category {wanted}", f"it has {', '.join(names.values()) or 'none'}")

    def is_wanted(name: str) -> bool:
        return name == wanted if wanted is not None else name.strip().casefold() == CATEGORY

    every = not any(map(is_wanted, names.values()))
    return {key: (name, every or is_wanted(name)) for key, name in names.items()}


def _category(annotation: dict[str, Any], categories: dict[Id, tuple[str, bool]], where: str) -> tuple[str, bool]:
    """Find the name of an annotation's category, and whether it counts."""
    if not categories:
        return "", True
    value = annotation.get("category_id")
    if value is None and len(categories) == 1:
        return next(iter(categories.values()))
    by_name = {name: (name, counts) for name, counts in categories.values()}
    found = categories.get(_id(value)) or (by_name.get(value) if isinstance(value, str) else None)
    if found is None:
        reason = "has no category_id" if value is None else f"is of category {value}, which is not there"
        known = ", ".join(f"{name} ({key})" for key, (name, _) in categories.items())
        raise UsageError(where, reason, f"give it the id of one of the file's categories: {known}")
    return found


def _draw(annotation: dict[str, Any], image: _Image, where: str) -> None:
    """Add the shape of an annotation to its image."""
    remedy = f"redraw or remove annotation {annotation.get('id', '?')}"
    if not annotation.get("segmentation") and not annotation.get("bbox"):
        raise UsageError(where, "has no segmentation and no bbox", remedy)
    try:
        segmentation = annotation.get("segmentation")
        if segmentation and isinstance(segmentation, dict):
            image.encodings.append(_run_lengths_of(segmentation, image.height, image.width))
            image.kinds.append("RLE")
        else:
            _draw_outlines(annotation, image)
    # In a damaged file any value may have any type.
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        why = f": {error}" if type(error) is ValueError and str(error) else ""
        reason = f"holds no mask of an image of {image.width}x{image.height} px{why}"
        raise UsageError(where, reason, remedy) from None


def _draw_outlines(annotation: dict[str, Any], image: _Image) -> None:
    """Add polygons, or else the box; raises `ValueError`, or another error of Python for values of a wrong type."""
    from pycocotools import mask as coco

    drawn, kind = [outline for outline in annotation.get("segmentation") or () if outline], "polygon"
    if drawn:
        outlines = [outline for outline in drawn if len(outline) >= 6]
        if not outlines:
            raise ValueError("no outline has three points")
        image.left_out += ["outline of fewer than three points"] * (len(drawn) - len(outlines))
    else:
        outlines, kind = _outline_of_box(annotation)
    # pycocotools does not finish drawing an edge to a point that is very far away.
    far = 4 * (image.height + image.width)
    if any(len(outline) % 2 or not (np.abs(outline) < far).all() for outline in outlines):
        raise ValueError("an outline is not of pairs of numbers near the image")
    if any(np.abs(np.diff(np.reshape(outline, (-1, 2)), axis=0)).sum() > _LONGEST for outline in outlines):
        raise ValueError("an outline is longer than any that encloses a region")
    encodings = coco.frPyObjects(outlines, image.height, image.width)
    if not coco.area(coco.merge(encodings)):
        raise ValueError(f"the {kind} covers none of its pixels")
    image.encodings += encodings
    image.kinds.append(kind)


def _outline_of_box(annotation: dict[str, Any]) -> tuple[list[list[float]], str]:
    """Make the outline of a box, turned clockwise around its middle, and name its kind."""
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4:
        raise ValueError("the bbox is not left, top, width and height")
    x, y, width, height = map(float, box)
    corners = [(x, y), (x + width, y), (x + width, y + height), (x, y + height)]
    attributes = annotation.get("attributes")
    angle = float(attributes.get("rotation") or 0) % 360 if isinstance(attributes, dict) else 0.0
    if angle:
        turn = cmath.rect(1, math.radians(angle))
        middle = complex(x + width / 2, y + height / 2)
        turned = [(complex(*corner) - middle) * turn + middle for corner in corners]
        corners = [(point.real, point.imag) for point in turned]
    return [list(chain.from_iterable(corners))], "rotated box" if angle else "box"


def _run_lengths_of(segmentation: dict[str, Any], height: int, width: int) -> Any:
    """Check a run-length encoding, which pycocotools does not (pixels after it are undefined), and compress it."""
    from pycocotools import mask as coco

    size, counts = [whole_number(side) for side in segmentation["size"]], segmentation["counts"]
    if size != [height, width]:
        raise ValueError(f"its size is {segmentation['size']}, of height and width")
    lengths = counts if isinstance(counts, list) else _run_lengths(counts)
    if not all(isinstance(length, int) and length >= 0 for length in lengths):
        raise ValueError("its counts are no run lengths")
    if sum(lengths) != height * width:
        raise ValueError(f"its runs cover {sum(lengths)} of {height * width} px")
    return coco.frPyObjects({"size": [height, width], "counts": lengths}, height, width)


def _run_lengths(counts: str) -> list[int]:
    """Undo the compression of ``rleFrString`` in pycocotools, which reads past the end of damaged text.

    Numbers are written in base 32, the lowest digit first. From the fourth number on, the text holds the difference to
    the number two places before.
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
