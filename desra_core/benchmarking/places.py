"""Places, kinds, strengths and sizes of the artifacts that are injected into an image: fixed by its name and a seed.

Everything is laid out on cells of 4x4 px. An image with injected artifacts is called a sheet.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from desra_core.benchmarking.injection import KINDS
from desra_core.detection.mask import valid
from desra_core.images.codec import Mask, Pixels

STRENGTHS = (0.25, 0.5, 1.0)
SIZES = (64**2, 128**2, 256**2)

_CELL = 4
# Windows and morphology of DeSRA join what is less than 18 px apart.
_GAP = 40
_EXCLUDED_MARGIN = 20
_FRAME = 8
# Injected pixels per sheet: most of a sheet stays as clean as it was.
_SHARE = 0.2
# Share that they can fill together with their gaps, because shapes are irregular.
_PACKED = 0.5
# Of the positions with room, the share that suits a kind best.
_SUITABLE = 0.25
_ROOM = np.ones((15, 15), np.uint8)
_DISC = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * math.ceil(_GAP / _CELL) + 3,) * 2)

# Whole numbers, so that sums are exact.
Cells = npt.NDArray[np.float64]


class Case(NamedTuple):
    """All that it takes to inject an artifact again, by `desra_core.benchmarking.injection.inject`.

    ``size`` is the wanted area in pixels, ``sheet`` the number of the injected image, ``y`` and ``x`` the top left
    pixel of the box around its place, ``seed`` that of its shape and pattern.
    """

    kind: str
    strength: float
    size: int
    sheet: int
    y: int
    x: int
    seed: int

    def place(self, shape: tuple[int, ...]) -> Mask:
        """``(H, W)`` bool, the pixels of the artifact in an image of that shape."""
        shaped = blob(self.size, self.seed)
        placed = np.zeros(shape[:2], np.bool_)
        placed[self.y : self.y + shaped.shape[0], self.x : self.x + shaped.shape[1]] = shaped
        return placed


def cases(
    name: str,
    gan_sr: Pixels,
    *,
    strengths: Sequence[float] = STRENGTHS,
    sizes: Sequence[int] = SIZES,
    seed: int = 0,
    exclude: Mask | None = None,
) -> list[Case]:
    """Draw the artifacts to inject into an image: each kind in each strength and size once, as far as there is room.

    Artifacts on one sheet are at least 40 px apart, and on average cover a fifth of it at most. As many sheets are used
    as that takes, so that an image of any size costs some 8 MP of sheets, and at least one. Ringing and flattening go
    where the image has detail, a colour shift where its colours have room: to the quarter of the positions that suit
    them best.

    Args:
        name, seed: Of the image; another name or seed draws other places and patterns.
        gan_sr: ``(H, W, 1 or 3)``. A gray image gets no colour shift.
        strengths, sizes: In 0..1, and areas in pixels.
        exclude: ``(H, W)`` bool, kept free together with 20 px around it.

    Returns:
        Cases by size, the largest first; none if nothing has room.
    """
    if min(gan_sr.shape[:2]) <= 2 * _FRAME:
        return []
    free = _free(gan_sr.shape, exclude)
    kinds = [kind for kind in KINDS if gan_sr.shape[2] == 3 or kind != "colour_shift"]
    wanted = list(itertools.product(kinds, map(float, strengths), map(int, sizes)))
    digests = {one: hashlib.blake2b(repr((name, seed, one)).encode(), digest_size=8).digest() for one in wanted}
    seeds = {one: int.from_bytes(digest) for one, digest in digests.items()}
    # The area that each takes up, with the gap around it if it is small.
    area = sum(max(size / _SHARE, (math.sqrt(size) + _GAP) ** 2 / _PACKED) for *_, size in wanted)
    count = math.ceil(area / (free.size * _CELL**2))
    sheets = _Sheets(free, count, _guides(gan_sr))
    drawn = []
    for one in sorted(wanted, key=lambda one: (-one[2], seeds[one])):
        spot = sheets.place(one[0], blob(one[2], seeds[one]), np.random.default_rng(seeds[one]))
        if spot is not None:
            drawn.append(Case(*one, *spot, seeds[one]))
    return drawn


def blob(size: int, seed: int) -> Mask:
    """Draw an irregular region without holes, of about so many pixels, in its box; the same for the same seed."""
    rng = np.random.default_rng(seed)
    radius = math.sqrt(size / math.pi)
    half = math.ceil(2 * radius)
    y, x = np.mgrid[-half : half + 1, -half : half + 1] / radius
    angle, stretch = rng.uniform(0, np.pi), rng.uniform(1, 1.3)
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    # Smooth over a quarter of the radius.
    noise = cv2.GaussianBlur(rng.standard_normal((48, 48)), (0, 0), 3)
    noise = cv2.resize(noise / noise.std(), x.shape, interpolation=cv2.INTER_CUBIC)
    height = 0.5 * noise - np.hypot(along / stretch, across * stretch) ** 2
    raised = height >= np.partition(height.ravel(), -size)[-size]
    _, components, stats, _ = cv2.connectedComponentsWithStats(raised.astype(np.uint8), connectivity=4)
    largest = components == 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))
    contours, _ = cv2.findContours(largest.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    filled = cv2.drawContours(np.zeros(largest.shape, np.uint8), contours, -1, 1, cv2.FILLED)
    left, top, wide, high = cv2.boundingRect(filled)
    return np.asarray(filled[top : top + high, left : left + wide] > 0)


class _Sheets:
    """The cells that are taken on each sheet."""

    def __init__(self, free: Cells, count: int, guides: Mapping[str, Cells]) -> None:
        self._blocked = [1 - free for _ in range(count)]
        self._used = [0] * count
        self._guides = guides

    def place(self, kind: str, shaped: Mask, rng: np.random.Generator) -> tuple[int, int, int] | None:
        """Find room for a shape on the emptiest sheet that has any: sheet, y and x, or None."""
        cells = _cells(shaped)
        for sheet in sorted(range(len(self._used)), key=self._used.__getitem__):
            spots = np.argwhere(_sums(self._blocked[sheet], cells) == 0)
            if not len(spots):
                continue
            if kind in self._guides:
                merit = _sums(self._guides[kind], cells)[tuple(spots.T)]
                best = np.argsort(-merit, kind="stable")[: math.ceil(_SUITABLE * len(spots))]
                spots = spots[np.sort(best)]
            row, column = map(int, spots[rng.integers(len(spots))])
            self._used[sheet] += int(cells.sum())
            taken = np.zeros_like(self._blocked[sheet])
            taken[row : row + cells.shape[0], column : column + cells.shape[1]] = cells
            np.maximum(self._blocked[sheet], cv2.dilate(taken, _DISC), out=self._blocked[sheet])
            return sheet, row * _CELL, column * _CELL
        return None


def _free(shape: tuple[int, ...], exclude: Mask | None) -> Cells:
    """1 for each cell that may hold injected pixels; the right and lower rest of the image is none."""
    height, width = shape[0] // _CELL, shape[1] // _CELL
    taken = np.ones(shape[:2], np.uint8)
    valid(taken, _FRAME)[...] = 0
    if exclude is not None:
        side = 2 * _EXCLUDED_MARGIN + 1
        margin = cv2.dilate(exclude.astype(np.uint8), np.ones((side, side), np.uint8))
        np.maximum(taken, np.asarray(margin, np.uint8), out=taken)
    return 1 - _cells(taken[: height * _CELL, : width * _CELL])


def _cells(values: npt.NDArray[Any]) -> Cells:
    """The maximum of each cell; at the end of a side, what there is of it."""
    rows, columns = (np.arange(0, side, _CELL) for side in values.shape)
    peaks = np.maximum.reduceat(np.maximum.reduceat(values, rows, axis=0), columns, axis=1)
    return np.asarray(peaks.astype(np.float64))


def _sums(values: Cells, cells: Cells) -> Cells:
    """At each position of a shape within the image, the sum of the values below it; empty where it does not fit."""
    rows, columns = values.shape[0] - cells.shape[0] + 1, values.shape[1] - cells.shape[1] + 1
    if rows <= 0 or columns <= 0:
        return np.ones((0, 0))
    sums = cv2.filter2D(values, cv2.CV_64F, cells, anchor=(0, 0), borderType=cv2.BORDER_CONSTANT)
    return np.asarray(np.rint(sums[:rows, :columns]))


def _guides(gan_sr: Pixels) -> dict[str, Cells]:
    """How well each cell suits a kind that depends on what the image shows."""
    height, width = (side // _CELL * _CELL for side in gan_sr.shape[:2])
    levels = gan_sr[:height, :width].astype(np.float32) / (np.iinfo(gan_sr.dtype).max / 255)

    def means(values: npt.NDArray[Any]) -> Cells:
        small = cv2.resize(values, None, fx=1 / _CELL, fy=1 / _CELL, interpolation=cv2.INTER_AREA)
        return np.asarray(np.rint(small.astype(np.float64)))

    luminance = levels.mean(axis=2)
    detail = means(np.abs(luminance - cv2.blur(luminance, (11, 11))))
    room = means(cv2.erode(np.minimum(levels, 255 - levels).min(axis=2), _ROOM))
    return {"ringing": detail, "flattening": detail, "colour_shift": room}
