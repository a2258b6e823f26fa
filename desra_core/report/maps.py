"""Read what a workspace stores of an image, window by window. Nothing is mended or deleted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from desra_core.detection.class_weights import CLASS_COUNT
from desra_core.detection.detectors import AppliedDetector, applied
from desra_core.errors import ImageError, LostError
from desra_core.files.hashing import read_bytes
from desra_core.images.codec import Labels, Pixels, decode, decode_labels
from desra_core.images.tiling import Rectangle
from desra_core.workspace.arrays import StoredArray

# A larger picture is not decoded for a part of it; 800 MB as RGB.
MAX_PIXELS = 2**28


@dataclass(frozen=True)
class StoredImage:
    """Where the pictures and maps of an image are stored. Its methods raise an `ImageError` that says what is wrong.

    The files are those of mse_sr, gan_sr and mask, and as far as there are any of lr, pseudo_gt, human and labels.
    The array called similarity holds minus the scores of the run's detector, ``measure``.
    """

    files: Mapping[str, Path]
    group: Path  # the folder of the zarr arrays: similarity (or minus a detector's score), and perhaps labels
    shape: tuple[int, int]  # (H, W) of the results; 0 where it is unknown, because the image has failed since
    measure: AppliedDetector = applied()  # noqa: RUF009 frozen; the detector of the run, whose scores the array holds

    def picture(self, kind: str) -> Pixels:
        """Read a whole picture as its file holds it; all but the LR photo must have the size of the results."""
        path = self.files.get(kind)
        if path is None:
            raise ImageError("LR photo" if kind == "lr" else kind, "none of this name", "add it to its folder")
        pixels = decode(read_bytes(path), path, max_pixels=MAX_PIXELS).pixels
        if kind != "lr" and pixels.shape[:2] != self.shape:
            raise ImageError(path, _another_size(pixels.shape, self.shape), "run again")
        return pixels

    def scores(self, window: Rectangle) -> npt.NDArray[np.float32]:
        """Read a window of the scores, NaN in the frame; other chunks are not read."""
        stored = np.full((window.height, window.width), np.nan, np.float32)
        return -self._read("similarity", self.measure.axis, window, stored, -self.measure.limit)

    def label_reader(self) -> Callable[[Rectangle], Labels]:
        """Give a function that reads the classes of a window, from the label file if there is one, else as stored.

        Both may raise an `ImageError`.
        """
        file = self.files.get("labels")
        if file is None:
            return self._stored_labels
        labels = _checked(decode_labels(read_bytes(file), file, max_pixels=MAX_PIXELS), file)
        if labels.shape != self.shape:
            raise ImageError(file, _another_size(labels.shape, self.shape), "run again")
        return lambda window: labels[window.slices]

    def _stored_labels(self, window: Rectangle) -> Labels:
        labels = np.zeros((window.height, window.width), np.uint8)
        return _checked(self._read("labels", "label map", window, labels, -1), "label map")

    def _read(
        self, array: str, name: str, window: Rectangle, values: npt.NDArray[Any], lowest: float
    ) -> npt.NDArray[Any]:
        """Fill ``values`` with the part of a window that is not in the frame; all of it must lie above ``lowest``."""
        path, shape = self.group / array, self.shape
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


def _another_size(found: tuple[int, ...], shape: tuple[int, int]) -> str:
    return f"is {found[1]}x{found[0]} now, and was {shape[1]}x{shape[0]}"


def _checked(labels: Labels, subject: object) -> Labels:
    if labels.max() >= CLASS_COUNT:
        raise ImageError(subject, f"holds the label {labels.max()}", "labels are ADE20K indices 0..149")
    return labels
