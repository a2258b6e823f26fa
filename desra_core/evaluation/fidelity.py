"""Measure how much two results of one photo differ: outside of a mask, and in sharpness.

All measures use float64 values in 0..255 (uint16 / 257), and read the images part by part.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from desra_core.detection.mask import WINDOW
from desra_core.detection.similarity import SIGMA, TILE, compiled, gaussian
from desra_core.images.codec import LUMINANCE, Mask, Pixels
from desra_core.images.parts import Rectangle, grid

_HALO = WINDOW // 2
_TAPS = gaussian(_HALO, SIGMA)
# Keep quotients defined where both images are flat; for values in 0..255.
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
_GRADIENT_STABILISER = 170.0


class Fidelity(NamedTuple):
    """Hold the measures of how two results of one photo differ; a level is a 255th of the range."""

    squared_error: float  # in squared levels, the sum over pixels outside of the mask of the mean over channels
    ssim: float  # mean over the pixels outside, -1..1
    gradient_similarity: float  # mean over the pixels outside, 0..1
    sharpness_before: float  # in levels per pixel, mean gradient magnitude of the whole result
    sharpness_after: float


def measure_fidelity(before: Pixels, after: Pixels, outside: Mask) -> Fidelity:
    """Measure how two results differ outside of a mask, and how sharp both are. All but the first is of luminance.

    SSIM is that of Wang et al. (2004): Gaussian window of 11x11 px and sigma 1.5, population covariance, K1 = 0.01 and
    K2 = 0.03. The similarity of gradients is ``(2 g h + c) / (g^2 + h^2 + c)`` with c = 170 and Prewitt gradients g and
    h (Xue et al. 2014, GMSD). Unlike there, images are not halved first, because finetuning may cost fine texture, and
    the result is the mean, not the deviation. Both are 1 for equal images, and they read pixels inside of the mask
    where their window reaches there. Border pixels are reflected.

    Args:
        before, after: ``(H, W, 1 or 3)`` uint8 or uint16, of one shape and dtype, of at least 11 px a side.
        outside: ``(H, W)`` bool, the pixels that count.

    Raises:
        ValueError: The shapes or dtypes differ, a side is too small, or no pixel is outside.
    """
    if before.shape != after.shape or before.shape[:2] != outside.shape or before.dtype != after.dtype:
        raise ValueError(
            f"images of the shapes {before.shape} and {after.shape}, {before.dtype} and {after.dtype}, with a mask of "
            f"{outside.shape} do not belong together"
        )
    height, width = outside.shape
    if min(height, width) < WINDOW:
        raise ValueError(f"{width}x{height} pixels are fewer than the {WINDOW}x{WINDOW} window")
    pixels = int(np.count_nonzero(outside))
    if pixels == 0:
        raise ValueError("no pixel lies outside")
    level = 257.0 if before.dtype == np.uint16 else 1.0
    sums = np.zeros(len(Fidelity._fields))
    for part in grid(height, width, TILE):
        counts = outside[part.slices].view(np.uint8)
        sums += _summed(_with_halo(before, part), _with_halo(after, part), counts, _TAPS, LUMINANCE, level)
    sums /= before.shape[2], pixels, pixels, 2 * height * width, 2 * height * width  # Prewitt's differences span 2 px
    return Fidelity(*sums.tolist())


def _with_halo(pixels: Pixels, part: Rectangle) -> Pixels:
    """Copy a part and the pixels around it that SSIM reads; the image is reflected at its borders."""
    rows, columns = (slice(max(0, each.start - _HALO), each.stop + _HALO) for each in part.slices)
    missing = [
        (max(0, _HALO - each.start), max(0, each.stop + _HALO - side))
        for each, side in zip(part.slices, pixels.shape, strict=False)
    ]
    return np.pad(pixels[rows, columns], [*missing, (0, 0)], mode="symmetric")  # type: ignore[return-value]


@compiled
def _luminance(part: Pixels, weights: tuple[float, ...], level: float) -> npt.NDArray[np.float64]:
    """Convert a part to luminance in levels; ``level`` is the size of one in the part's samples, 1 or 257."""
    height, width, channels = part.shape
    values = np.empty((height, width))
    for row in range(height):
        for column in range(width):
            # Unsigned: where an index may be negative, the compiled code reads samples singly.
            i = np.uint64(column)
            if channels == 1:
                values[row, i] = part[row, i, 0] / level
            else:
                red, green, blue = part[row, i, 0] / level, part[row, i, 1] / level, part[row, i, 2] / level
                values[row, i] = weights[0] * red + weights[1] * green + weights[2] * blue
    return values


@compiled
def _gradient(values: npt.NDArray[np.float64], row: int, column: int) -> float:
    """Compute ``sqrt(gx^2 + gy^2)`` of a pixel by Prewitt's filters divided by 3."""
    above, below = row - 1, row + 1
    a, c, b = np.uint64(column - 1), np.uint64(column), np.uint64(column + 1)
    across = values[above, b] - values[above, a] + values[row, b] - values[row, a] + values[below, b] - values[below, a]
    down = (
        values[below, a] - values[above, a] + values[below, c] - values[above, c] + values[below, b] - values[above, b]
    )
    return math.sqrt((across / 3) * (across / 3) + (down / 3) * (down / 3))


@compiled
def _summed(
    before: Pixels,
    after: Pixels,
    outside: npt.NDArray[np.uint8],
    taps: tuple[float, ...],
    weights: tuple[float, ...],
    level: float,
) -> tuple[float, float, float, float, float]:
    """Sum up the measures of a part, whose pixels come with their halo."""
    radius = len(taps) - 1
    height, width = outside.shape
    samples, channels = before.shape[1:]
    x, y = _luminance(before, weights, level), _luminance(after, weights, level)
    # For one row: x, y, x^2, y^2 and xy summed over the rows of the window, and the measures of each pixel.
    sum_x, sum_y = np.empty(samples), np.empty(samples)
    sum_xx, sum_yy, sum_xy = np.empty(samples), np.empty(samples), np.empty(samples)
    errors, similarities, gradients = np.empty(width), np.empty(width), np.empty(width)
    sharp_x, sharp_y = np.empty(width), np.empty(width)
    squared_error, ssim, gradient_similarity, sharpness_x, sharpness_y = 0.0, 0.0, 0.0, 0.0, 0.0
    for row in range(height):
        centre = row + radius
        for i in range(samples):
            p, q = x[centre, i], y[centre, i]
            m_x, m_y = taps[0] * p, taps[0] * q
            m_xx, m_yy, m_xy = taps[0] * (p * p), taps[0] * (q * q), taps[0] * (p * q)
            for k in range(1, radius + 1):
                p, p2 = x[centre - k, i], x[centre + k, i]
                q, q2 = y[centre - k, i], y[centre + k, i]
                m_x += taps[k] * (p + p2)
                m_y += taps[k] * (q + q2)
                m_xx += taps[k] * (p * p + p2 * p2)
                m_yy += taps[k] * (q * q + q2 * q2)
                m_xy += taps[k] * (p * q + p2 * q2)
            sum_x[i], sum_y[i], sum_xx[i], sum_yy[i], sum_xy[i] = m_x, m_y, m_xx, m_yy, m_xy
        for i in range(width):
            c = np.uint64(i + radius)
            m_x, m_y = taps[0] * sum_x[c], taps[0] * sum_y[c]
            m_xx, m_yy, m_xy = taps[0] * sum_xx[c], taps[0] * sum_yy[c], taps[0] * sum_xy[c]
            for k in range(1, radius + 1):
                a, b = np.uint64(i + radius - k), np.uint64(i + radius + k)
                m_x += taps[k] * (sum_x[a] + sum_x[b])
                m_y += taps[k] * (sum_y[a] + sum_y[b])
                m_xx += taps[k] * (sum_xx[a] + sum_xx[b])
                m_yy += taps[k] * (sum_yy[a] + sum_yy[b])
                m_xy += taps[k] * (sum_xy[a] + sum_xy[b])
            var_x, var_y, cov = m_xx - m_x * m_x, m_yy - m_y * m_y, m_xy - m_x * m_y
            # Sums of two equal terms, not products with 2, so that equal images have a quotient of exactly 1.
            top = (m_x * m_y + m_x * m_y + _C1) * (cov + cov + _C2)
            similarities[i] = top / ((m_x * m_x + m_y * m_y + _C1) * (var_x + var_y + _C2))
        for i in range(width):
            g, h = _gradient(x, centre, i + radius), _gradient(y, centre, i + radius)
            sharp_x[i], sharp_y[i] = g, h
            gradients[i] = (g * h + g * h + _GRADIENT_STABILISER) / (g * g + h * h + _GRADIENT_STABILISER)
        for i in range(width):
            c = np.uint64(i + radius)
            red = float(before[centre, c, 0]) - float(after[centre, c, 0])
            errors[i] = red * red
            if channels == 3:
                green = float(before[centre, c, 1]) - float(after[centre, c, 1])
                blue = float(before[centre, c, 2]) - float(after[centre, c, 2])
                errors[i] += green * green + blue * blue
        for i in range(width):
            counts = outside[row, i]
            squared_error += errors[i] * counts
            ssim += similarities[i] * counts
            gradient_similarity += gradients[i] * counts
            sharpness_x += sharp_x[i]
            sharpness_y += sharp_y[i]
    return squared_error / (level * level), ssim, gradient_similarity, sharpness_x, sharpness_y
