"""Read and write LabelMe files of artifact regions, one beside each picture, so that LabelMe draws regions exactly.

Polygons are drawn by `PIL.ImageDraw`, outline included, as in ``labelme.utils.shape_to_mask``. A region that its
polygon does not draw exactly (one with holes, or of fewer than three points) is written as a mask.
"""

import base64
import json
import math
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageDraw

from desra_core.errors import ImageError
from desra_core.evaluation.coco_masks import decode_json, whole_number
from desra_core.evaluation.table import counted
from desra_core.files import read_bytes
from desra_core.images.codec import Mask, decode, encode_png

LABEL = "artifact"

# The first version of LabelMe that reads masks.
_VERSION = "5.5.0"
# X-AnyLabeling calls a turned rectangle a rotation, and writes the four corners of every rectangle.
_RECTANGLES = {"rectangle": "rectangle", "oriented_rectangle": "rotated rectangle", "rotation": "rotated rectangle"}
_POLYGONS = ("polygon", "quadrilateral", "oriented_rectangle", "rotation")
_SAVE_AGAIN = "save it again with LabelMe, or remove it"
# Coordinates of valid shapes are smaller than this, as a multiple of height + width; Pillow takes long to draw farther.
_FAR = 4


class LabelMeFile(NamedTuple):
    """The contents of a LabelMe file."""

    path: Path
    width: int | None  # None where the file has no size
    height: int | None
    shapes: list[dict[str, Any]]
    image_path: str = ""  # the picture's path relative to the file's folder; empty where the file names none
    label: str | None = None  # only shapes with this label count, if given

    def counts(self, shape: dict[str, Any]) -> bool:
        """Check whether a shape has the label that counts."""
        return self.label is None or shape.get("label") == self.label

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of each shape that counts."""
        kinds = [_kind(shape) for shape in self.shapes if self.counts(shape)]
        return tuple(_RECTANGLES.get(kind, kind) for kind in kinds)

    @property
    def left_out(self) -> tuple[str, ...]:
        """A phrase for each shape that does not count."""
        return tuple(f"region labelled {shape.get('label')}" for shape in self.shapes if not self.counts(shape))


def labelme_document(name: str, size: tuple[int, int], shapes: list[dict[str, Any]]) -> bytes:
    """Make the LabelMe file of an image of size ``(H, W)``; the picture NAME.png is to lie beside the file."""
    document: dict[str, Any] = {
        "version": _VERSION,
        "flags": {},
        "shapes": shapes,
        "imagePath": f"{PurePosixPath(name).name}.png",
        "imageData": None,
        "imageHeight": size[0],
        "imageWidth": size[1],
    }
    return json.dumps(document, indent=2).encode()


def labelme_shape(x: int, y: int, crop: Mask, description: str) -> dict[str, Any]:
    """Make the shape of a connected region: a polygon where LabelMe draws it exactly, else a mask.

    Args:
        x, y: Left and upper edge of the region, in pixels of the image.
        crop: ``(h, w)`` bool, the region alone.
        description: Shown beside the shape.
    """
    outlines, _ = cv2.findContours(crop.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    points = [(int(column), int(row)) for column, row in outlines[0][:, 0]]
    canvas = Image.fromarray(np.zeros(crop.shape, np.uint8))
    if len(points) >= 3:
        ImageDraw.Draw(canvas).polygon(points, outline=1, fill=1)
    exact = np.array_equal(np.asarray(canvas, np.bool_), crop)
    corners = [(0, 0), (crop.shape[1] - 1, crop.shape[0] - 1)]
    return {
        "label": LABEL,
        "points": [[float(x + column), float(y + row)] for column, row in (points if exact else corners)],
        "group_id": None,
        "description": description,
        "shape_type": "polygon" if exact else "mask",
        "flags": {},
        "mask": None if exact else base64.b64encode(encode_png(crop.astype(np.uint8))).decode(),
    }


def read_labelme(path: Path, *, label: str | None = None) -> LabelMeFile:
    """Read a LabelMe file, without the picture in it; only shapes with the label count, if a label is given.

    Raises:
        ImageError: The file cannot be read, is damaged, or is another kind of JSON.
    """
    try:
        document = decode_json(read_bytes(path))
    except ValueError as error:
        raise ImageError(path, str(error), _SAVE_AGAIN) from None
    shapes = document.get("shapes") if isinstance(document, dict) else None
    if not isinstance(shapes, list) or not all(isinstance(shape, dict) for shape in shapes):
        raise ImageError(path, "is no LabelMe file", _SAVE_AGAIN)
    given = document.get("imageWidth"), document.get("imageHeight")
    width, height = map(whole_number, given)
    if any(side is not None and (number or 0) < 1 for side, number in zip(given, (width, height), strict=True)):
        raise ImageError(path, "has no valid size of its image", _SAVE_AGAIN)
    image_path = document.get("imagePath")
    return LabelMeFile(path, width, height, shapes, image_path if isinstance(image_path, str) else "", label)


def draw_shapes(file: LabelMeFile, shape: tuple[int, int]) -> Mask:
    """Draw the shapes of a file that count, by LabelMe's own rules, on an image of ``(H, W)``.

    Args:
        file: Its shapes are polygons, rectangles (two corners, or all four of a turned one), circles and masks.
        shape: The size of the image.

    Returns:
        ``(H, W)`` bool.

    Raises:
        ImageError: A shape has no area, is damaged, or covers no pixel of the image.
    """
    canvas = Image.fromarray(np.zeros(shape, np.uint8))
    draw = ImageDraw.Draw(canvas)
    mask = np.zeros(shape, np.bool_)
    for number, drawn in enumerate(file.shapes, 1):
        if not file.counts(drawn):
            continue
        kind, points = _kind(drawn), _points(drawn, file.path, number, _FAR * sum(shape))
        axes = [*zip(*points, strict=True)]
        upright = len(points) == len(set(points)) == 4 and all(len(set(axis)) == 2 for axis in axes)
        if kind == "rectangle" and (len(points) == 2 or upright):
            (left, right), (top, bottom) = ((min(axis), max(axis)) for axis in axes)
            draw.rectangle((left, top, right, bottom), outline=1, fill=1)
        elif kind in _RECTANGLES and len(points) == 4:
            x, y = (sum(axis) / 4 for axis in axes)
            # Sorted along the outline, because tools write the corners in any order.
            around = sorted(points, key=lambda point: math.atan2(point[1] - y, point[0] - x))
            draw.polygon(around, outline=1, fill=1)
        elif kind in _POLYGONS and len(points) >= 3:
            draw.polygon(points, outline=1, fill=1)
        elif kind == "circle" and len(points) == 2:
            (x, y), radius = points[0], math.dist(*points)
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=1, fill=1)
        elif kind == "mask" and len(points) == 2:
            (x, y), corner = ((int(x), int(y)) for x, y in points)
            crop = _crop(drawn, (x, y), corner, shape, file.path.with_name(f"{file.path.name}, shape {number}"))
            canvas.paste(Image.fromarray(crop.astype(np.uint8)), (x, y))
        else:
            reason = f"has as shape {number} a {kind} of {counted(len(points), 'point')}, which has no area"
            raise ImageError(file.path, reason, "draw polygons, rectangles, circles or masks")
        box = canvas.getbbox()
        if box is None:
            reason = f"has a shape, number {number}, that covers no pixel of its image of {shape[1]}x{shape[0]}"
            raise ImageError(file.path, reason, "redraw or delete the shape")
        x0, y0, x1, y1 = box
        mask[y0:y1, x0:x1] |= np.asarray(canvas.crop(box), np.bool_)
        canvas.paste(0, box)
    return mask


def _kind(drawn: dict[str, Any]) -> str:
    return str(drawn.get("shape_type") or "polygon")


def _points(drawn: dict[str, Any], path: Path, number: int, far: int) -> list[tuple[float, float]]:
    points = drawn.get("points")
    try:
        found = [(float(x), float(y)) for x, y in points or ()]
    except (ValueError, TypeError, OverflowError):
        found = [(math.nan, math.nan)]
    if not all(abs(value) < far for point in found for value in point):
        raise ImageError(path, f"has a shape, number {number}, whose points are not numbers on the image", _SAVE_AGAIN)
    return found


def _crop(
    drawn: dict[str, Any], first: tuple[int, int], last: tuple[int, int], shape: tuple[int, int], where: Path
) -> Mask:
    """Decode the mask that a shape holds, and check that it fits the box from its first to its last pixel."""
    encoded = drawn.get("mask")
    try:
        data = base64.b64decode(encoded, validate=True) if isinstance(encoded, str) else b""
    except ValueError:
        data = b""
    if not data:
        raise ImageError(where, "holds no mask", _SAVE_AGAIN)
    crop: Mask = np.asarray(decode(data, where, as_stored=True).pixels.any(axis=2))
    height, width = crop.shape
    fits = (first[0] + width - 1, first[1] + height - 1) == last
    if not fits or min(first) < 0 or last[0] >= shape[1] or last[1] >= shape[0]:
        box = f"{first} to {last} of an image of {shape[1]}x{shape[0]}"
        raise ImageError(where, f"is a mask of {width}x{height} in the box {box}", _SAVE_AGAIN)
    return crop
