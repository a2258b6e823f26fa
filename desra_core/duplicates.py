"""Photos that show the same: re-encoded, resized or lightly edited copies are found by a perceptual hash."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

from desra_core.imageio import Pixels, bgr8

# Of 256 bits. Pictures with other content differ in about half of them.
MAX_DISTANCE = 24

_SIDE = 16
_BANDS = 25

Signature = bytes


def signature(pixels: Pixels) -> Signature:
    """Hash what a photo shows to 256 bits: whether brightness rises from each cell of a 16x17 grid to the next.

    Parameters
    ----------
    pixels
        ``(H, W, 1 or 3)`` uint8 or uint16.

    Returns
    -------
    32 bytes. Scale, contrast, gray or colour and compression change few bits.
    """
    gray = cv2.cvtColor(bgr8(pixels), cv2.COLOR_BGR2GRAY).astype(np.float32)
    cells = cv2.resize(gray, (_SIDE + 1, _SIDE), interpolation=cv2.INTER_AREA)
    return np.packbits(cells[:, 1:] > cells[:, :-1]).tobytes()


class Duplicates:
    """Signatures with the group of each; finds the group of a photo in time that hardly grows with their number.

    Two signatures that differ in at most `MAX_DISTANCE` bits agree in one of `MAX_DISTANCE` + 1 bands, so only those
    that share a band are compared.
    """

    def __init__(self) -> None:
        self._signatures: list[npt.NDArray[np.uint8]] = []
        self._groups: list[str] = []
        self._bands: dict[tuple[int, bytes], list[int]] = {}

    def add(self, found: Signature, group: str) -> None:
        """Remember a photo."""
        for band in _bands(found):
            self._bands.setdefault(band, []).append(len(self._groups))
        self._signatures.append(np.frombuffer(found, np.uint8))
        self._groups.append(group)

    def group(self, wanted: Signature) -> str | None:
        """The group of the nearest photo within `MAX_DISTANCE`; of the first one, where several are as near."""
        candidates = sorted({index for band in _bands(wanted) for index in self._bands.get(band, ())})
        if not candidates:
            return None
        stacked = np.stack([self._signatures[index] for index in candidates])
        distances = np.bitwise_count(stacked ^ np.frombuffer(wanted, np.uint8)).sum(axis=1)
        nearest = int(distances.argmin())
        return self._groups[candidates[nearest]] if distances[nearest] <= MAX_DISTANCE else None


def _bands(found: Signature) -> list[tuple[int, bytes]]:
    bits = np.unpackbits(np.frombuffer(found, np.uint8))
    return [(index, part.tobytes()) for index, part in enumerate(np.array_split(bits, _BANDS))]
