"""Windows of what a workspace stores of an image: read as far as it is needed, and never mended."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from desra_core.detection.class_weights import CLASS_COUNT
from desra_core.errors import ImageError, LostError
from desra_core.files.hashing import read_bytes
from desra_core.images.codec import Labels, decode_labels
from desra_core.images.tiling import Rectangle
from desra_core.report.measure import Measure
from desra_core.workspace.arrays import StoredArray

# A larger picture is not decoded for a part of it; 800 MB as RGB.
MAX_PIXELS = 2**28


def read_map(path: Path, shape: tuple[int, int], window: Rectangle, measure: Measure) -> npt.NDArray[np.float32]:
    """The similarity of a window as it is stored, NaN in the frame.

    Parameters
    ----------
    path
        The zarr array.
    shape
        ``(H, W)`` of the image.
    window
        Only the chunks under it are read.
    measure
        What is stored.

    Raises
    ------
    ImageError
        It is not kept, damaged or of an image of another size. Nothing is mended or deleted.
    """
    name = "score map" if measure.is_score else "D"
    return _read(path, shape, window, name, np.full((window.height, window.width), np.nan, np.float32), measure.lowest)


def label_reader(file: Path | None, stored: Path, shape: tuple[int, int]) -> Callable[[Rectangle], Labels]:
    """A function that gives the classes of a window, from a label file where there is one, else from a zarr array.

    Both may raise an `ImageError`.
    """
    if file is None:

        def read(window: Rectangle) -> Labels:
            labels = np.zeros((window.height, window.width), np.uint8)
            return _checked(_read(stored, shape, window, "label map", labels, -1), "label map")

        return read
    labels = _checked(decode_labels(read_bytes(file), file, max_pixels=MAX_PIXELS), file)
    if labels.shape != shape:
        raise ImageError(file, another_size(labels.shape, shape), "run again")
    return lambda window: labels[window.slices]


def another_size(found: tuple[int, ...], shape: tuple[int, int]) -> str:
    """What is wrong with a picture that has been replaced."""
    return f"is {found[1]}x{found[0]} now, and was {shape[1]}x{shape[0]}"


def _checked(labels: Labels, subject: object) -> Labels:
    if labels.max() >= CLASS_COUNT:
        raise ImageError(subject, f"holds the label {labels.max()}", "labels are ADE20K indices 0..149")
    return labels


def _read(
    path: Path, shape: tuple[int, int], window: Rectangle, name: str, values: npt.NDArray[Any], lowest: float
) -> npt.NDArray[Any]:
    """Fill ``values`` with the part of a window that is not in the frame."""
    if not path.exists():
        raise ImageError(name, "is not kept", "run again with --keep maps")
    try:
        stored = StoredArray(path)
        frame = (shape[0] - stored.shape[0]) // 2
        if frame < 0 or (stored.shape[0] + 2 * frame, stored.shape[1] + 2 * frame) != shape:
            raise ImageError(name, "is of an image of another size", "run again")
        left, top = max(window.x, frame), max(window.y, frame)
        right = min(window.x + window.width, shape[1] - frame)
        bottom = min(window.y + window.height, shape[0] - frame)
        inside = (slice(top - window.y, bottom - window.y), slice(left - window.x, right - window.x))
        values[inside] = stored.window(slice(top - frame, bottom - frame), slice(left - frame, right - frame))
    except (LostError, ValueError, IndexError):
        raise ImageError(name, "is damaged", "run again") from None
    if not (values[inside] > lowest).all():
        raise ImageError(name, "is damaged", "run again")
    return values
