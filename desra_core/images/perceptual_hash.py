"""Find re-encoded, resized or lightly edited copies of a photo by a perceptual hash."""

from __future__ import annotations

import cv2
import numpy as np

from desra_core.images.bit_depth import bgr8
from desra_core.images.codec import Pixels

# Of 256 bits. Pictures with other content differ in about half of them.
MAX_DISTANCE = 24

_SIDE = 16
_WORDS = 4

Signature = bytes


def signature(pixels: Pixels) -> Signature:
    """Hash what a photo shows to 256 bits: whether brightness rises from each cell of a 16x17 grid to the next.

    Args:
        pixels: ``(H, W, 1 or 3)`` uint8 or uint16.

    Returns:
        32 bytes. Scale, contrast, gray or colour and compression change few bits.
    """
    gray = cv2.cvtColor(bgr8(pixels), cv2.COLOR_BGR2GRAY).astype(np.float32)
    cells = cv2.resize(gray, (_SIDE + 1, _SIDE), interpolation=cv2.INTER_AREA)
    return np.packbits(cells[:, 1:] > cells[:, :-1]).tobytes()


class Duplicates:
    """Signatures of photos with the group of each.

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
        """Return the group of the nearest photo within `MAX_DISTANCE`, of several as near the first; None without."""
        if not self._groups:
            return None
        known = np.frombuffer(self._signatures, np.uint64).reshape(-1, _WORDS)
        distances = np.bitwise_count(known ^ np.frombuffer(wanted, np.uint64)).sum(axis=1)
        nearest = int(distances.argmin())
        return self._groups[nearest] if distances[nearest] <= MAX_DISTANCE else None
