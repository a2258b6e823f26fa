"""Inject artifacts of known place, kind and strength into a clean result, in forms that occur in practice.

All kinds are computed on values in 0..255 (uint16 / 257) in float64 and rounded once. Textures fade towards the border
of their place, so that a detector sees the texture and not its outline.
"""

from collections.abc import Callable

import cv2
import numpy as np
import numpy.typing as npt

from desra_core.images.codec import LUMINANCE, Mask, Pixels, grey_levels, luminance

KINDS = ("blotches", "checkerboard", "worms", "colour_shift", "ringing", "flattening")

# The RMS contrast of strength 1, in grey levels of 255.
FULL_CONTRAST = 40.0

_FADE = 4
# At full strength the tint grows by 2.5 grey levels per pixel: a ramp in which D sees no edge.
_COLOUR_FADE = 16
_HALO = 24
# A larger gain would amplify rounding in flat areas in place of edges.
_MAX_RINGING_GAIN = 12.0
_PAINTERLY_RADIUS = 5

Levels = npt.NDArray[np.float64]
Pattern = Callable[[Levels, np.random.Generator], Levels]


def inject(gan_sr: Pixels, kind: str, place: Mask, *, strength: float, rng: np.random.Generator) -> Pixels:
    """Put an artifact into a result.

    Args:
        gan_sr: ``(H, W, 1 or 3)`` uint8 or uint16.
        kind: One of `KINDS`:

            - blotches: patches of some 10 to 20 px in other colours, with sharp borders;
            - checkerboard: the grid that a transposed convolution leaves, with a period of 4 or 8 px;
            - worms: bent, band-limited stripes 7 to 12 px apart;
            - colour_shift: another tint at the same luminance (BT.601), fading over 16 px;
            - ringing: halos along the image's edges with a wavelength of 5 to 8 px, as from over-sharpening;
            - flattening: texture removed between edges, as in an oil painting (Kuwahara's filter, 11x11 px).
        place: ``(H, W)`` bool: the artifact's pixels. No other pixel changes.
        strength: Above 0, at most 1. The change has an RMS of ``40 * strength`` grey levels over the pixels and
            channels of the place, before it is clipped to the range of the dtype. Ringing stays weaker where the image
            has no edges, a colour shift where colours leave no room. Flattening instead moves each value by the share
            ``strength`` of the way to the filtered image.
        rng: Makes the pattern; the same state gives the same artifact.

    Returns:
        An image of the same shape and dtype.

    Raises:
        ValueError: The kind is unknown or cannot be in a gray image, the strength out of range, or the place empty or
            of another size.
    """
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is no kind of artifact; there are {', '.join(KINDS)}")
    if not 0 < strength <= 1:
        raise ValueError(f"a strength of {strength} is not within 0..1")
    if place.shape != gan_sr.shape[:2] or not place.any():
        raise ValueError(f"a place of the shape {place.shape} is empty or not one of an image {gan_sr.shape}")
    if kind == "colour_shift" and gan_sr.shape[2] == 1:
        raise ValueError("a gray image has no colour to shift")
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
    """Measure an injection: RMS of the change over the pixels and channels of its place, in grey levels of 255."""
    return _rms(grey_levels(after[place]) - grey_levels(before[place]))


def texture(pixels: Pixels, place: Mask) -> float:
    """Measure the texture that hides artifacts: RMS deviation around each pixel of a place, in grey levels of 255.

    The window is that of the paper's D: a Gaussian of 11x11 px and sigma 1.5. Channels count alike.
    """
    box = _box(place)
    levels = grey_levels(pixels[box])
    mean, mean_square = (cv2.GaussianBlur(x, (11, 11), 1.5).reshape(levels.shape) for x in (levels, levels**2))
    return float(np.sqrt(np.maximum(mean_square - mean**2, 0)[place[box]].mean()))


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
    # Stripes of this wavelength keep their contrast.
    kernel /= float((kernel * np.cos(2 * np.pi * offsets / wavelength)).sum())
    halo = cv2.filter2D(luminance(levels), cv2.CV_64F, kernel, borderType=cv2.BORDER_REFLECT_101)
    return np.repeat(halo[:, :, np.newaxis], levels.shape[2], axis=2)


def _colour_shift(levels: Levels, inside: Mask, contrast: float, rng: np.random.Generator) -> Levels:
    """Add the tint with the most room among eight; the room varies smoothly, so that the shift makes no texture."""
    # Two directions at right angles to luminance and to each other.
    plane = np.linalg.svd([LUMINANCE])[2][1:]
    fade = _fade(inside, _COLOUR_FADE)
    amplitude = np.sqrt(3) * contrast / max(_rms(fade[inside]), 1e-9)
    best: Levels = np.zeros_like(levels)
    for angle in rng.uniform(0, 2 * np.pi) + np.arange(8) * np.pi / 4:
        tint = amplitude * (np.array([np.cos(angle), np.sin(angle)]) @ plane)
        change = tint * (fade * _room(levels, tint))
        if _rms(change[inside]) > _rms(best[inside]):
            best = change
    return best


def _room(levels: Levels, tint: Levels) -> Levels:
    """Find the share of a tint, ``(h, w, 1)``, with which every colour within 7 px stays within 0..255."""
    limit = np.where(tint > 0, 255 - levels, levels) / np.maximum(np.abs(tint), 1e-9)
    share = np.minimum(1.0, limit.min(axis=2))
    # Each averaged minimum is of a window that holds the pixel, so their mean is at most the pixel's own share.
    least = cv2.erode(share, np.ones((15, 15), np.uint8))
    return np.asarray(cv2.blur(least, (15, 15), borderType=cv2.BORDER_REPLICATE)[:, :, np.newaxis])


def _painterly(levels: Levels) -> Levels:
    """Apply Kuwahara's filter: of the four squares with a corner in a pixel, take the mean of the least varying."""
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


# By kind: the pattern, the pixels over which it fades, and its largest gain.
_PATTERNS: dict[str, tuple[Pattern, int, float]] = {
    "blotches": (_blotches, 1, np.inf),
    "checkerboard": (_checkerboard, _FADE, np.inf),
    "worms": (_worms, _FADE, np.inf),
    "ringing": (_ringing, _FADE, _MAX_RINGING_GAIN),
}
