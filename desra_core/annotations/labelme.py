"""Read and write LabelMe files of artifact regions, one beside each picture; LabelMe draws them exactly.

Polygons are drawn by `PIL.ImageDraw`, outline included, as in ``labelme.utils.shape_to_mask``. Regions that no polygon
draws exactly (with holes, or of fewer than three points) are written as masks.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageDraw

from desra_core.annotations.selection import Annotated, Annotation, Part
from desra_core.errors import ImageError
from desra_core.evaluation.coco_masks import decode_json, whole_number
from desra_core.files.hashing import read_bytes
from desra_core.images.codec import Mask, decode, encode_png

LABEL = "artifact"

# The first one whose users all can read masks.
_VERSION = "5.5.0"
# X-AnyLabeling calls a turned rectangle a rotation, and writes all four corners of others too.
_RECTANGLES = {"rectangle": "rectangle", "oriented_rectangle": "rotated rectangle", "rotation": "rotated rectangle"}
_POLYGONS = ("polygon", "quadrilateral", "oriented_rectangle", "rotation")
_SAVE_AGAIN = "save it again with LabelMe, or remove it"
# Shapes are nearer to the image than this, in pixels; a damaged file may say otherwise.
_FAR = 2**20


class LabelMeFile(NamedTuple):
    """The contents of a LabelMe file.

    ``width`` and ``height`` are None where it has no size, and ``image_path``, the picture's path relative to the
    file's folder, is empty where it names none.
    """

    path: Path
    width: int | None
    height: int | None
    shapes: list[dict[str, Any]]
    image_path: str = ""

    @property
    def labels(self) -> set[str]:
        """The labels of its shapes."""
        return {str(shape.get("label")) for shape in self.shapes}

    def kinds(self, label: str | None = None) -> tuple[str, ...]:
        """List the kind of each shape with a label, or of all."""
        kinds = [_kind(shape) for shape in self.shapes if label is None or shape.get("label") == label]
        return tuple(_RECTANGLES.get(kind, kind) for kind in kinds)

    def left_out(self, label: str | None = None) -> tuple[str, ...]:
        """Describe each shape that has another label, in a phrase."""
        others = [shape.get("label") for shape in self.shapes if label is not None and shape.get("label") != label]
        return tuple(f"region labelled {other}" for other in others)


def labelme_document(image: Annotated) -> bytes:
    """Write the LabelMe file of an image whose picture NAME.png lies beside it (raises `ImageError`)."""
    document: dict[str, Any] = {
        "version": _VERSION,
        "flags": {},
        "shapes": [_shape(annotation) for annotation in image.annotations()],
        "imagePath": f"{PurePosixPath(image.name).name}.png",
        "imageData": None,
        "imageHeight": image.shape[0],
        "imageWidth": image.shape[1],
    }
    return json.dumps(document, indent=2).encode()


def read_labelme(path: Path) -> LabelMeFile:
    """Read a LabelMe file, without the picture that may be in it.

    Raises:
        ImageError: It cannot be read, is damaged, or is another kind of JSON.
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
    return LabelMeFile(path, width, height, shapes, image_path if isinstance(image_path, str) else "")


def draw_shapes(file: LabelMeFile, shape: tuple[int, int], label: str | None = None) -> Mask:
    """Draw all shapes of a file, by LabelMe's own rules, on an image of ``(H, W)``.

    Args:
        file: With polygons, rectangles (by two corners, or all four where they are turned), circles and masks.
        shape: Of the image.
        label: Only shapes with this one, if given.

    Returns:
        ``(H, W)`` bool.

    Raises:
        ImageError: A shape has no area, is damaged, or covers no pixel of the image.
    """
    canvas = Image.fromarray(np.zeros(shape, np.uint8))
    draw = ImageDraw.Draw(canvas)
    mask = np.zeros(shape, np.bool_)
    for number, drawn in enumerate(file.shapes, 1):
        if label is not None and drawn.get("label") != label:
            continue
        kind, points = _kind(drawn), _points(drawn, file.path, number)
        if kind == "rectangle" and (len(points) == 2 or _is_upright(points)):
            (left, right), (top, bottom) = ((min(axis), max(axis)) for axis in zip(*points, strict=True))
            draw.rectangle((left, top, right, bottom), outline=1, fill=1)
        elif kind in _RECTANGLES and len(points) == 4:
            draw.polygon(_around(points), outline=1, fill=1)
        elif kind in _POLYGONS and len(points) >= 3:
            draw.polygon(points, outline=1, fill=1)
        elif kind == "circle" and len(points) == 2:
            (x, y), radius = points[0], math.dist(*points)
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=1, fill=1)
        elif kind == "mask" and len(points) == 2:
            part = _mask(drawn, points, shape, file.path, number)
            canvas.paste(Image.fromarray(part.crop.astype(np.uint8)), (part.x, part.y))
        else:
            reason = f"has as shape {number} a {kind} of {len(points)} points, which has no area"
            raise ImageError(file.path, reason, "draw polygons, rectangles, circles or masks")
        box = canvas.getbbox()
        if box is None:
            reason = f"has a shape, number {number}, that covers no pixel of its image of {shape[1]}x{shape[0]}"
            raise ImageError(file.path, reason, "redraw or delete the shape")
        x0, y0, x1, y1 = box
        mask[y0:y1, x0:x1] |= np.asarray(canvas.crop(box), np.bool_)
        canvas.paste(0, box)
    return mask


def _shape(annotation: Annotation) -> dict[str, Any]:
    part = annotation.part
    polygon = _polygon(part)
    height, width = part.crop.shape
    corners = [[part.x, part.y], [part.x + width - 1, part.y + height - 1]]
    crop = None if polygon else base64.b64encode(encode_png(part.crop.astype(np.uint8))).decode()
    return {
        "label": LABEL,
        "points": polygon or [[float(x), float(y)] for x, y in corners],
        "group_id": None,
        "description": _description(annotation),
        "shape_type": "polygon" if polygon else "mask",
        "flags": {},
        "mask": crop,
    }


def _description(annotation: Annotation) -> str:
    """Class and severity, for the annotator."""
    if annotation.region is None:
        return "drawn by a person"
    numbers = (
        f"severity {annotation.region['severity']:.1f}, mean similarity {annotation.region['mean_similarity']:.3f}"
    )
    return f"{annotation.class_name}, {numbers}" if annotation.class_name else numbers


def _polygon(part: Part) -> list[list[float]]:
    """The outline of a part, if drawing it gives the part back; else nothing."""
    outlines, _ = cv2.findContours(part.crop.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    points = [(int(x), int(y)) for x, y in outlines[0][:, 0]]
    if len(points) < 3:
        return []
    canvas = Image.fromarray(np.zeros(part.crop.shape, np.uint8))
    ImageDraw.Draw(canvas).polygon(points, outline=1, fill=1)
    if not np.array_equal(np.asarray(canvas, np.bool_), part.crop):
        return []
    return [[float(part.x + x), float(part.y + y)] for x, y in points]


def _kind(drawn: dict[str, Any]) -> str:
    return str(drawn.get("shape_type") or "polygon")


def _is_upright(points: Sequence[tuple[float, float]]) -> bool:
    """Whether points are the four corners of a rectangle that is not turned."""
    return len(points) == len(set(points)) == 4 and all(len(set(axis)) == 2 for axis in zip(*points, strict=True))


def _around(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The corners of a rectangle in the order of its outline."""
    x, y = (sum(axis) / len(points) for axis in zip(*points, strict=True))
    return sorted(points, key=lambda point: math.atan2(point[1] - y, point[0] - x))


def _points(drawn: dict[str, Any], path: Path, number: int) -> list[tuple[float, float]]:
    points = drawn.get("points")
    try:
        found = [(float(x), float(y)) for x, y in points or ()]
    except (ValueError, TypeError, OverflowError):
        found = [(math.nan, math.nan)]
    if not all(abs(value) < _FAR for point in found for value in point):
        raise ImageError(path, f"has a shape, number {number}, whose points are not numbers on the image", _SAVE_AGAIN)
    return found


def _mask(
    drawn: dict[str, Any], points: Sequence[tuple[float, float]], shape: tuple[int, int], path: Path, number: int
) -> Part:
    """The mask that a shape holds, at its place."""
    where = path.with_name(f"{path.name}, shape {number}")
    encoded = drawn.get("mask")
    try:
        data = base64.b64decode(encoded, validate=True) if isinstance(encoded, str) else b""
    except ValueError:
        data = b""
    if not data:
        raise ImageError(where, "holds no mask", _SAVE_AGAIN)
    crop: Mask = np.asarray(decode(data, where).pixels.any(axis=2))
    (x, y), (right, bottom) = ((int(x), int(y)) for x, y in points)
    height, width = crop.shape
    on_image = min(x, y) >= 0 and x + width <= shape[1] and y + height <= shape[0]
    if (right - x + 1, bottom - y + 1) != (width, height) or not on_image:
        box = f"({x}, {y}) to ({right}, {bottom})"
        raise ImageError(where, f"is a mask of {width}x{height} in the box {box} of an image of {shape[1]}x{shape[0]}",
                         _SAVE_AGAIN)  # fmt: skip
    return Part(x, y, crop, int(crop.sum()))
