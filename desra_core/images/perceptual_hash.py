"""Find re-encoded, resized or lightly edited copies of a photo by a perceptual hash."""

import cv2
import numpy as np

from desra_core.images.bit_depth import bgr8
from desra_core.images.codec import Pixels

# Up to so many differing bits, of 256, two photos are duplicates. Unrelated photos differ in about half of the bits.
MAX_DISTANCE = 24

_SIDE = 16
_WORDS = 4

Signature = bytes


def signature(pixels: Pixels) -> Signature:
    """Hash a photo to 256 bits, which say for a 16x17 grid of cells where brightness rises from left to right.

    Args:
        pixels: ``(H, W, 1 or 3)`` uint8 or uint16.

    Returns:
        32 bytes. Another scale, contrast or compression, or gray instead of colour, changes few bits.
    """
    gray = cv2.cvtColor(bgr8(pixels), cv2.COLOR_BGR2GRAY).astype(np.float32)
    cells = cv2.resize(gray, (_SIDE + 1, _SIDE), interpolation=cv2.INTER_AREA)
    return np.packbits(cells[:, 1:] > cells[:, :-1]).tobytes()


class Duplicates:
    """Find the group of a photo: that of its nearest duplicate among the signatures added before.

    A photo is compared with all others: with 100,000, that takes far less time than decoding it.
    """

    def __init__(self) -> None:
        self._signatures = bytearray()
        self._groups: list[str] = []

    def add(self, found: Signature, group: str) -> None:
        """Remember a photo."""
        self._signatures += found
        self._groups.append(group)

    def group(self, wanted: Signature) -> str | None:
        """Return the group of the nearest photo (in a tie, the first added); None if none is within `MAX_DISTANCE`."""
        if not self._groups:
            return None
        known = np.frombuffer(self._signatures, np.uint64).reshape(-1, _WORDS)
        distances = np.bitwise_count(known ^ np.frombuffer(wanted, np.uint64)).sum(axis=1)
        nearest = int(distances.argmin())
        return self._groups[nearest] if distances[nearest] <= MAX_DISTANCE else None
