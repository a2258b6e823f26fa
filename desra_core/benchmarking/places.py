"""Places, kinds, strengths and sizes of the artifacts that are injected into an image: fixed by its name and a seed.

Everything is laid out on cells of 4x4 px. An image with injected artifacts is called a sheet.
"""

import hashlib
import itertools
import math
from collections.abc import Sequence
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
# DeSRA's windows and morphology join regions less than 18 px apart.
_GAP = 40
_EXCLUDED_MARGIN = 20
_FRAME = 8
# Share of injected pixels per sheet: most of a sheet stays as clean as it was.
_SHARE = 0.2
# Share of a sheet that artifacts and their gaps can fill: irregular shapes cannot be packed more densely.
_PACKED = 0.5
# An artifact goes to one of the best positions for its kind: this share of all positions with room.
_SUITABLE = 0.25
_ROOM = np.ones((15, 15), np.uint8)
_DISC = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * math.ceil(_GAP / _CELL) + 3,) * 2)

# Whole numbers, so that sums are exact.
Cells = npt.NDArray[np.float64]


class Case(NamedTuple):
    """One artifact to inject, by `desra_core.benchmarking.injection.inject`.

    ``size`` is the wanted area in pixels, ``sheet`` the number of the injected image, ``y`` and ``x`` the top left
    pixel of the box around its place, ``seed`` the seed of its shape and pattern.
    """

    kind: str
    strength: float
    size: int
    sheet: int
    y: int
    x: int
    seed: int

    def place(self, shape: tuple[int, ...]) -> Mask:
        """Mark the pixels of the artifact in an image of this shape: ``(H, W)`` bool."""
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

    Artifacts on one sheet are at least 40 px apart, and cover a fifth of the sheet on average at most. There are as
    many sheets as the artifacts need: some 8 MP for an image of any size, and at least one sheet. Ringing and
    flattening go where the image has detail, a colour shift where its colours have room: to the quarter of the
    positions that suits the kind best.

    Args:
        name, seed: The name of the image, and a seed. Another name or seed draws other places and patterns.
        gan_sr: ``(H, W, 1 or 3)``. A gray image gets no colour shift.
        strengths, sizes: Strengths in 0..1, and areas in pixels.
        exclude: ``(H, W)`` bool, True at pixels that are kept free, as are 20 px around them.

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
    # The area that each artifact takes up, with the gap around small ones.
    area = sum(max(size / _SHARE, (math.sqrt(size) + _GAP) ** 2 / _PACKED) for *_, size in wanted)
    guides = _guides(gan_sr)
    blocked = [1 - free for _ in range(math.ceil(area / (free.size * _CELL**2)))]
    used = [0] * len(blocked)
    drawn = []
    for one in sorted(wanted, key=lambda one: (-one[2], seeds[one])):
        cells = _cells(blob(one[2], seeds[one]))
        for sheet in sorted(range(len(used)), key=used.__getitem__):
            spot = _spot(blocked[sheet], cells, guides.get(one[0]), np.random.default_rng(seeds[one]))
            if spot is not None:
                row, column = spot
                used[sheet] += int(cells.sum())
                taken = np.zeros_like(free)
                taken[row : row + cells.shape[0], column : column + cells.shape[1]] = cells
                np.maximum(blocked[sheet], cv2.dilate(taken, _DISC), out=blocked[sheet])
                drawn.append(Case(*one, sheet, row * _CELL, column * _CELL, seeds[one]))
                break
    return drawn


def blob(size: int, seed: int) -> Mask:
    """Draw an irregular region without holes, of about ``size`` pixels, cut to its box; fixed by the seed."""
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


def _spot(blocked: Cells, cells: Cells, guide: Cells | None, rng: np.random.Generator) -> tuple[int, int] | None:
    """Draw a position of a shape where no cell is blocked: row and column, None where there is no room."""
    spots = np.argwhere(_sums(blocked, cells) == 0)
    if not len(spots):
        return None
    if guide is not None:
        merit = _sums(guide, cells)[tuple(spots.T)]
        best = np.argsort(-merit, kind="stable")[: math.ceil(_SUITABLE * len(spots))]
        spots = spots[np.sort(best)]
    row, column = spots[rng.integers(len(spots))]
    return int(row), int(column)


def _free(shape: tuple[int, ...], exclude: Mask | None) -> Cells:
    """Set the cells that may hold injected pixels to 1, without incomplete cells at the right and lower edge."""
    height, width = shape[0] // _CELL, shape[1] // _CELL
    taken = np.ones(shape[:2], np.uint8)
    valid(taken, _FRAME)[...] = 0
    if exclude is not None:
        side = 2 * _EXCLUDED_MARGIN + 1
        margin = cv2.dilate(exclude.astype(np.uint8), np.ones((side, side), np.uint8))
        np.maximum(taken, np.asarray(margin, np.uint8), out=taken)
    return 1 - _cells(taken[: height * _CELL, : width * _CELL])


def _cells(values: npt.NDArray[Any]) -> Cells:
    """Take the maximum of each cell; cells at the end of a side may be incomplete."""
    rows, columns = (np.arange(0, side, _CELL) for side in values.shape)
    peaks = np.maximum.reduceat(np.maximum.reduceat(values, rows, axis=0), columns, axis=1)
    return np.asarray(peaks.astype(np.float64))


def _sums(values: Cells, cells: Cells) -> Cells:
    """Sum the values below a shape at each of its positions within the image; empty where the shape does not fit."""
    rows, columns = values.shape[0] - cells.shape[0] + 1, values.shape[1] - cells.shape[1] + 1
    if rows <= 0 or columns <= 0:
        return np.ones((0, 0))
    sums = cv2.filter2D(values, cv2.CV_64F, cells, anchor=(0, 0), borderType=cv2.BORDER_CONSTANT)
    return np.asarray(np.rint(sums[:rows, :columns]))


def _guides(gan_sr: Pixels) -> dict[str, Cells]:
    """Measure how well each cell suits the kinds that depend on the image's content."""
    height, width = (side // _CELL * _CELL for side in gan_sr.shape[:2])
    levels = gan_sr[:height, :width].astype(np.float32) / (np.iinfo(gan_sr.dtype).max / 255)

    def means(values: npt.NDArray[Any]) -> Cells:
        small = cv2.resize(values, None, fx=1 / _CELL, fy=1 / _CELL, interpolation=cv2.INTER_AREA)
        return np.asarray(np.rint(small.astype(np.float64)))

    luminance = levels.mean(axis=2)
    detail = means(np.abs(luminance - cv2.blur(luminance, (11, 11))))
    room = means(cv2.erode(np.minimum(levels, 255 - levels).min(axis=2), _ROOM))
    return {"ringing": detail, "flattening": detail, "colour_shift": room}
