"""Real photos, and the ways in which the two results of a photo can be no pair, for tests of `agreement`."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from pathlib import Path

import cv2
import numpy as np

from desra_core.images.codec import Pixels, read_image

Change = Callable[[Pixels], Pixels]

_PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")


def real_photos(count: int, side: int = 64) -> list[Pixels]:
    """Cut parts with some contrast out of the photos in scikit-image's wheel, at half their size."""
    photos = [read_image(Path(str(resources.files("skimage") / "data" / name))) for name in _PHOTOS]
    halves = [cv2.resize(photo, (0, 0), fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA) for photo in photos]
    rng = np.random.default_rng(0)
    parts: list[Pixels] = []
    while len(parts) < count:
        photo = halves[len(parts) % len(halves)]
        top, left = (int(rng.integers(extent - side + 1)) for extent in photo.shape[:2])
        part = np.ascontiguousarray(photo[top : top + side, left : left + side])
        coarse = cv2.resize(part, (side // 4, side // 4), interpolation=cv2.INTER_AREA)
        if coarse.std((0, 1)).min() > 10:
            parts.append(part)
    return parts


def _scaled(factor: float) -> Change:
    return lambda pixels: np.clip(pixels * factor, 0, np.iinfo(pixels.dtype).max).astype(pixels.dtype)


def _with_gamma(gamma: float) -> Change:
    def changed(pixels: Pixels) -> Pixels:
        most = np.iinfo(pixels.dtype).max
        return np.rint((pixels / most) ** gamma * most).astype(pixels.dtype)

    return changed


# Whether a run is refused, the words of the doubt, and the change of one result.
LIES: dict[str, tuple[bool, str, Change]] = {
    "one colour": (True, "has practically one colour", lambda pixels: np.full_like(pixels, 77)),
    "values from 0 to 255": (True, "", _scaled(255)),
    "values below 1/255": (True, "has practically one colour", _scaled(1 / 255)),
    "negative": (True, "does not show what", lambda pixels: np.iinfo(pixels.dtype).max - pixels),
    "mirrored": (True, "does not show what", lambda pixels: pixels[:, ::-1]),
    "wrong gamma": (False, "has other colours", _with_gamma(2.2)),
    "wrong gamma back": (False, "has other colours", _with_gamma(1 / 2.2)),
    "too dark": (False, "has other colours", _scaled(0.8)),
    "one pixel to the right": (False, "px to the right", lambda pixels: np.roll(pixels, 1, 1)),
    "one pixel to the left": (False, "px to the left", lambda pixels: np.roll(pixels, -1, 1)),
    "one pixel down": (False, "px below", lambda pixels: np.roll(pixels, 1, 0)),
    "one pixel up": (False, "px above", lambda pixels: np.roll(pixels, -1, 0)),
}
