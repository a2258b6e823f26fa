"""Inject artifacts of known place, kind and strength into a clean result, in forms that occur in practice.

All kinds are computed on values in 0..255 (uint16 / 257) in float64 and rounded once. Textures fade towards the border
of their place, so that a detector sees the texture and not its outline. The name of an image and a seed determine its
artifacts. Places are laid out on cells of 4x4 px. An image with injected artifacts is called a sheet.
"""

import hashlib
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from desra_core.detection.mask import valid
from desra_core.images.codec import LUMINANCE, Mask, Pixels, grey_levels, luminance

KINDS = ("blotches", "checkerboard", "worms", "colour_shift", "ringing", "flattening")

STRENGTHS = (0.25, 0.5, 1.0)
SIZES = (64**2, 128**2, 256**2)

# The RMS contrast of strength 1, in grey levels of 255.
FULL_CONTRAST = 40.0

_FADE = 4  # px over which textures fade
# With this width a tint of full strength grows by 2.5 grey levels per pixel, a ramp in which D sees no edge.
_COLOUR_FADE = 16
_HALO = 24  # px around a place that its pattern depends on
# A larger gain would amplify rounding in flat areas in place of edges.
_MAX_RINGING_GAIN = 12.0
_PAINTERLY_RADIUS = 5

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
_ROOM = np.ones((15, 15), np.uint8)  # px in which colours need room for a tint
_DISC = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * math.ceil(_GAP / _CELL) + 3,) * 2)  # the gap, in cells

Levels = npt.NDArray[np.float64]
Cells = npt.NDArray[np.float64]  # whole numbers, so that sums are exact
Pattern = Callable[[Levels, np.random.Generator], Levels]


def inject(gan_sr: Pixels, kind: str, place: Mask, *, strength: float, rng: np.random.Generator) -> Pixels:
    """Put an artifact into a result.

    Args:
        gan_sr: ``(H, W, 1 or 3)`` uint8 or uint16.
        kind: One of `KINDS`; a colour shift needs three channels:

            - blotches: patches of some 10 to 20 px in other colours, with sharp borders;
            - checkerboard: the grid that a transposed convolution leaves, with a period of 4 or 8 px;
            - worms: bent, band-limited stripes 7 to 12 px apart;
            - colour_shift: another tint at the same luminance (BT.601), fading over 16 px;
            - ringing: halos along the image's edges with a wavelength of 5 to 8 px, as from over-sharpening;
            - flattening: texture removed between edges, as in an oil painting (Kuwahara's filter, 11x11 px).
        place: ``(H, W)`` bool: the artifact's pixels, at least one. No other pixel changes.
        strength: Above 0, at most 1. The change has an RMS of ``40 * strength`` grey levels over the pixels and
            channels of the place, before it is clipped to the range of the dtype. Ringing stays weaker where the image
            has no edges, a colour shift where colours leave no room. Flattening has no such RMS: it moves each value
            towards the filtered image by the share ``strength`` of their difference.
        rng: Makes the pattern; the same state gives the same artifact.

    Returns:
        An image of the same shape and dtype.
    """
    box = _box(place)
    inside, levels = place[box], grey_levels(gan_sr[box])
    if kind == "flattening":
        change = strength * (_painterly(levels) - levels) * _fade(inside, _FADE)
    elif kind == "colour_shift":
        change = _colour_shift(levels, inside, FULL_CONTRAST * strength, rng)
    else:
        pattern, width, max_gain = _PATTERNS[kind]
        change = pattern(levels, rng) * _fade(inside, width)
        change *= min(FULL_CONTRAST * strength / max(_rms(change[inside]), 1e-9), max_gain)
    white = np.iinfo(gan_sr.dtype).max
    result = gan_sr.copy()
    result[box][inside] = np.clip(np.rint((levels + change) * (white / 255)), 0, white)[inside].astype(gan_sr.dtype)
    return result


def contrast(before: Pixels, after: Pixels, place: Mask) -> float:
    """Measure the contrast of an injected artifact: RMS change of the samples in its place, in grey levels of 255."""
    return _rms(grey_levels(after[place]) - grey_levels(before[place]))


def texture(pixels: Pixels, place: Mask) -> float:
    """Measure the texture that hides artifacts in a place: the mean local deviation, in grey levels of 255.

    The local deviation is taken in the window of D (a Gaussian of 11x11 px, sigma 1.5). Channels count alike.
    """
    box = _box(place)
    levels = grey_levels(pixels[box])
    mean, mean_square = (cv2.GaussianBlur(x, (11, 11), 1.5).reshape(levels.shape) for x in (levels, levels**2))
    return float(np.sqrt(np.maximum(mean_square - mean**2, 0)[place[box]].mean()))


class Case(NamedTuple):
    """One artifact to inject, by `inject`."""

    kind: str
    strength: float
    size: int  # the wanted area in pixels
    sheet: int  # the number of the injected image
    y: int  # top of the box around the place
    x: int  # left end of that box
    seed: int  # of shape and pattern

    def place(self, shape: tuple[int, ...]) -> Mask:
        """Mark the pixels of the artifact in an image of this shape: ``(H, W)`` bool."""
        shaped = blob(self.size, self.seed)
        placed = np.zeros(shape[:2], np.bool_)
        placed[self.y : self.y + shaped.shape[0], self.x : self.x + shaped.shape[1]] = shaped
        return placed


def cases(name: str, gan_sr: Pixels, *, seed: int = 0, exclude: Mask | None = None) -> list[Case]:
    """Draw the artifacts to inject into an image: each kind in each strength and size once, as far as there is room.

    Artifacts on one sheet are at least 40 px apart, and cover a fifth of the sheet on average at most. The number of
    sheets is what the artifacts need: sheets of some 8 MP in all, for an image of any size, and at least one sheet.
    Ringing and flattening go where the image has detail, and a colour shift goes where colours have room. Of all
    positions with room for the artifact, they take one of the quarter that suits the kind best.

    Args:
        name, seed: The name of the image, and a seed. Another name or seed draws other places and patterns.
        gan_sr: ``(H, W, 1 or 3)``. A gray image gets no colour shift.
        exclude: ``(H, W)`` bool, True at pixels that are kept free, as are 20 px around them.

    Returns:
        The cases, the largest first; an empty list if nothing has room.
    """
    if min(gan_sr.shape[:2]) <= 2 * _FRAME:
        return []
    free = _free(gan_sr.shape, exclude)
    kinds = [kind for kind in KINDS if gan_sr.shape[2] == 3 or kind != "colour_shift"]
    wanted = list(itertools.product(kinds, STRENGTHS, SIZES))
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
    """Draw an irregular region without holes, of about ``size`` pixels: its box, ``(h, w)`` bool, fixed by the seed."""
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


def _box(place: Mask) -> tuple[slice, slice]:
    """Find the rows and columns of a place and its surroundings."""
    rows, columns = (np.flatnonzero(place.any(axis=axis)) for axis in (1, 0))
    top, left = (max(0, int(used[0]) - _HALO) for used in (rows, columns))
    return slice(top, int(rows[-1]) + 1 + _HALO), slice(left, int(columns[-1]) + 1 + _HALO)


def _rms(values: Levels) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def _fade(inside: Mask, width: int) -> Levels:
    """Make weights ``(h, w, 1)`` that are 0 outside and rise to 1 over ``width`` pixels."""
    distance = cv2.distanceTransform(np.pad(inside, 1).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    # The last bit of OpenCV's distances depends on the array's place in memory; their squares are whole numbers.
    exact = np.sqrt(np.rint(np.square(distance[1:-1, 1:-1, np.newaxis], dtype=np.float64)))
    return np.minimum(1.0, exact / width)


def _smooth_noise(shape: tuple[int, ...], sigma: float, rng: np.random.Generator) -> Levels:
    """Draw Gaussian noise of mean 0 and deviation 1, ``(h, w)`` or ``(h, w, C)``, smooth over sigma pixels."""
    pad = int(3 * sigma)
    raw = rng.standard_normal((shape[0] + 2 * pad, shape[1] + 2 * pad, *shape[2:]))
    smooth = cv2.GaussianBlur(raw, (0, 0), sigma)[pad:-pad, pad:-pad].reshape(shape)
    return np.asarray(smooth * (2 * np.sqrt(np.pi) * sigma))


def _blotches(levels: Levels, rng: np.random.Generator) -> Levels:
    sigma = rng.uniform(4, 7)
    common = _smooth_noise(levels.shape[:2], sigma, rng)[:, :, np.newaxis]
    field = 0.85 * common + 0.5 * _smooth_noise(levels.shape, sigma, rng)
    # Plateaus at -1, 0 and 1 with steep slopes between them.
    return np.asarray(np.tanh(8 * (field - 0.6)) + np.tanh(8 * (field + 0.6))) / 2


def _checkerboard(levels: Levels, rng: np.random.Generator) -> Levels:
    height, width, channels = levels.shape
    period = int(rng.choice((4, 8)))

    def overlap(count: int) -> Levels:
        """Sum up the kernels of neighbouring samples along an axis: a period and its harmonic."""
        phase = 2 * np.pi * np.arange(count) / period
        return np.asarray(np.cos(phase + rng.uniform(0, 2 * np.pi)) + 0.4 * np.cos(2 * phase))

    rows, columns = overlap(height)[:, np.newaxis], overlap(width)
    envelope = np.clip(1 + 0.4 * _smooth_noise((height, width), 20, rng), 0.2, None)
    gains = rng.normal(1, 0.25, channels)
    return np.asarray((envelope * (rows + columns + rows * columns))[:, :, np.newaxis] * gains)


def _worms(levels: Levels, rng: np.random.Generator) -> Levels:
    height, width, channels = levels.shape
    pad = 16
    size = height + 2 * pad, width + 2 * pad
    frequency = 1 / rng.uniform(7, 12)
    fy, fx = np.fft.fftfreq(size[0])[:, np.newaxis], np.fft.rfftfreq(size[1])
    angle = 2 * (np.arctan2(fy, fx) - rng.uniform(0, np.pi))
    band = np.exp(-((np.hypot(fy, fx) - frequency) ** 2) / (2 * (0.15 * frequency) ** 2) + 1.5 * np.cos(angle))
    stripes = np.fft.irfft2(np.fft.rfft2(rng.standard_normal(size)) * band, s=size)
    # Displaced along a smooth field, the stripes bend.
    straight = np.mgrid[pad : pad + height, pad : pad + width]
    y, x = (straight + 6 * _smooth_noise((height, width, 2), 14, rng).transpose(2, 0, 1)).astype(np.float32)
    bent = cv2.remap(stripes, x, y, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)
    worms = np.tanh(1.5 * bent / bent.std())
    return np.asarray(worms[:, :, np.newaxis] * rng.normal(1, 0.15, channels))


def _ringing(levels: Levels, rng: np.random.Generator) -> Levels:
    wavelength = rng.uniform(5, 8)
    offsets = np.arange(-_HALO, _HALO + 1)
    radius = np.hypot(offsets[:, np.newaxis], offsets)
    window = np.exp(-(radius**2) / (2 * wavelength**2))
    wave = np.cos(2 * np.pi * radius / wavelength) * window
    kernel = wave - window * (wave.sum() / window.sum())
    # Scaled so that stripes of this wavelength keep their contrast.
    kernel /= float((kernel * np.cos(2 * np.pi * offsets / wavelength)).sum())
    halo = cv2.filter2D(luminance(levels), cv2.CV_64F, kernel, borderType=cv2.BORDER_REFLECT_101)
    return np.repeat(halo[:, :, np.newaxis], levels.shape[2], axis=2)


def _colour_shift(levels: Levels, inside: Mask, contrast: float, rng: np.random.Generator) -> Levels:
    """Return a change of colour, not of luminance: of eight tints the one that fits best into 0..255.

    The strength of a tint varies smoothly between pixels, so that it makes no texture.
    """
    # Two directions of colour at right angles to luminance and to each other.
    plane = np.linalg.svd([LUMINANCE])[2][1:]
    fade = _fade(inside, _COLOUR_FADE)
    amplitude = np.sqrt(3) * contrast / max(_rms(fade[inside]), 1e-9)
    best: Levels = np.zeros_like(levels)
    for angle in rng.uniform(0, 2 * np.pi) + np.arange(8) * np.pi / 4:
        tint = amplitude * (np.array([np.cos(angle), np.sin(angle)]) @ plane)
        # The share of the tint that each pixel can take. Smoothed by the least share within 7 px and the mean of these
        # within 7 px, it is nowhere above the pixel's own share.
        shares = np.where(tint > 0, 255 - levels, levels) / np.maximum(np.abs(tint), 1e-9)
        least = cv2.erode(np.minimum(1.0, shares.min(axis=2)), _ROOM)
        smooth = cv2.blur(least, _ROOM.shape, borderType=cv2.BORDER_REPLICATE)[:, :, np.newaxis]
        change = tint * (fade * smooth)
        if _rms(change[inside]) > _rms(best[inside]):
            best = change
    return best


def _painterly(levels: Levels) -> Levels:
    """Apply Kuwahara's filter: a pixel becomes the mean of the least varying of four squares with a corner in it."""
    side = _PAINTERLY_RADIUS + 1
    best, least, grey = levels, np.full(levels.shape[:2], np.inf), luminance(levels)
    for anchor in ((0, 0), (0, side - 1), (side - 1, 0), (side - 1, side - 1)):

        def mean(values: Levels, anchor: tuple[int, int] = anchor) -> Levels:
            return np.asarray(cv2.blur(values, (side, side), anchor=anchor, borderType=cv2.BORDER_REFLECT_101))

        variance = mean(grey**2) - mean(grey) ** 2
        chosen = variance < least
        best = np.where(chosen[:, :, np.newaxis], mean(levels).reshape(levels.shape), best)
        least = np.where(chosen, variance, least)
    return best


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
    """Take the maximum of each cell; the last cells of a row or column may be incomplete."""
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

    grey = levels.mean(axis=2)
    detail = means(np.abs(grey - cv2.blur(grey, (11, 11))))
    room = means(cv2.erode(np.minimum(levels, 255 - levels).min(axis=2), _ROOM))
    return {"ringing": detail, "flattening": detail, "colour_shift": room}


# By kind: the pattern, the pixels over which it fades, and its largest gain.
_PATTERNS: dict[str, tuple[Pattern, int, float]] = {
    "blotches": (_blotches, 1, np.inf),
    "checkerboard": (_checkerboard, _FADE, np.inf),
    "worms": (_worms, _FADE, np.inf),
    "ringing": (_ringing, _FADE, _MAX_RINGING_GAIN),
}
