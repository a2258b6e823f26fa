"""Read image files with Pillow: JPEG, WebP, BMP, and other files that have one of their suffixes.

Only `desra_core.images.codec` uses this.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from desra_core.errors import ImageError

if TYPE_CHECKING:
    from desra_core.images.codec import Pixels

_ORIENTATION_TAG = 0x0112
_READ_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "I;16"})
_NAMED = ("JPEG", "WEBP", "BMP")
_END_OF_JPEG = b"\xff\xd9"
_SAVE_AGAIN = "save it again as PNG, or remove it"

# The size of an image is judged by `desra_core.images.codec`, not by Pillow's fixed number.
Image.MAX_IMAGE_PIXELS = None


class PillowPicture:
    """The picture of a file, the first one of an animated file, not turned yet.

    Raises:
        ImageError: Pillow does not read the file, or it has an unsupported colour model.
    """

    def __init__(self, data: bytes, path: Path) -> None:
        self._data = data
        self._path = path
        self._image = _identified(data, path)
        if self._image.mode not in _READ_MODES:
            raise ImageError(path, f"has the colour model {self._image.mode}", "convert it to RGB or gray")
        self.size = self._image.height, self._image.width
        self.has_icc_profile = "icc_profile" in self._image.info
        self.further_pages = 0
        with _quiet():
            try:
                self.orientation = int(self._image.getexif().get(_ORIENTATION_TAG, 1))
            except (OSError, SyntaxError, ValueError, TypeError):
                self.orientation = 1

    def channels(self, *, indices: bool) -> Pixels:
        """Decode to ``(H, W, C)``, uint8 or uint16, alpha last, palettes expanded unless ``indices`` are asked for.

        Raises:
            ImageError: The file is truncated or damaged.
        """
        image = self._image
        try:
            with _quiet():
                image.load()
        except (OSError, SyntaxError, ValueError, TypeError, OverflowError) as error:
            reason, whole = str(error), None
            if image.format in ("JPEG", "MPO") and not self._data.endswith(_END_OF_JPEG):
                reason, whole = "it stops without an end marker", _whole_without_end(image, self._data)
            if whole is None:
                remedy = "copy it again, or remove it"
                raise ImageError(self._path, f"is truncated or damaged ({reason})", remedy) from None
            image = whole
        if image.mode == "1":
            image = image.convert("L")
        elif image.mode in ("P", "PA") and not indices:
            image = image.convert("RGBA" if "transparency" in image.info or image.mode == "PA" else "RGB")
        elif image.mode == "RGBX":
            image = image.convert("RGB")
        pixels: Pixels = np.asarray(image)
        return pixels.reshape(*pixels.shape[:2], -1)


def stored_size(file: BinaryIO) -> tuple[int, int]:
    """Return ``(H, W)`` of the picture as stored (raises as ``PIL.Image.open``)."""
    with _quiet(), Image.open(file) as image:
        return image.height, image.width


def _identified(data: bytes, path: Path) -> Image.Image:
    try:
        with _quiet():
            return Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        pass
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageError(path, f"is truncated, damaged or of a kind that is not read ({error})", _SAVE_AGAIN) from None
    # Where a file begins like one of a usual kind, the reader of that kind knows what is wrong with it.
    for kind in _NAMED:
        factory, accepts = Image.OPEN[kind]
        if accepts is not None and accepts(data[:16]):
            try:
                with _quiet():
                    factory(io.BytesIO(data), "")
            except (OSError, SyntaxError, ValueError) as error:
                raise ImageError(path, f"is a {kind} file that cannot be read ({error})", _SAVE_AGAIN) from None
    raise ImageError(path, "is not an image", "remove it, or give it the suffix of its kind")


def _whole_without_end(opened: Image.Image, data: bytes) -> Image.Image | None:
    """Return the picture of a JPEG that lacks nothing but its end marker, and None if more is missing.

    Nothing is missing if the pixels stay the same whatever bytes are appended. That holds for a single scan without
    restart markers only.
    """
    start = data.rfind(b"\xff\xda")
    layers = len(opened.getbands())
    one_scan = not opened.info.get("progressive") and data[start + 4 : start + 5] == bytes([layers])
    if not one_scan or b"\xff\xdd\0\4" in data:
        return None
    images = []
    for instead in (b"", b"\x55" * 64, b"\xaa" * 64):
        with _quiet():
            images.append(Image.open(io.BytesIO(data.rstrip(b"\xff") + instead + _END_OF_JPEG), formats=["JPEG"]))
            images[-1].load()
    return images[0] if images[0] == images[1] == images[2] else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence Pillow's warnings about damaged metadata, which sound images have too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
