"""The paper's D (Eq. 7): how alike the local textures of two super-resolution results are.

The paper calls D a distance. D is 1 where the textures agree and falls towards 0 where they differ, so it is called a
similarity here.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar

import numba
import numpy as np
import numpy.typing as npt

from desra_core.detection.mask import WINDOW, SimilarityMap
from desra_core.errors import ArgumentError
from desra_core.images.parts import grid

Samples = npt.NDArray[np.uint8] | npt.NDArray[np.uint16] | npt.NDArray[np.float32] | npt.NDArray[np.float64]

SIGMA = 1.5
# One filtered row of a tile needs 11 rows of samples, which fit into a 1 MiB L2 cache. Smaller tiles have more halo.
TILE = 256

_EPSILON = 1e-8
_STABILISER = (0.03 * 255) ** 2  # C of Eq. 7, for samples in 0..255
_Kernel = TypeVar("_Kernel", bound=Callable[..., Any])
_DTYPES = tuple(np.dtype(name) for name in ("uint8", "uint16", "float32", "float64"))


def variance_similarity(
    mse_sr: Samples,
    gan_sr: Samples,
    *,
    window: int = WINDOW,
    sigma: float = SIGMA,
    tile: int = TILE,
    threads: int = 1,
) -> SimilarityMap:
    """Compute D (Eq. 7): compare the local variances of two images by channel, and average over the channels.

    Args:
        mse_sr, gan_sr: ``(H, W)`` or ``(H, W, C)``: uint8, uint16 (divided by 257), or floats already in 0..255. Of 2
            or 4 channels the last is alpha, which is ignored. Gray is compared with each colour. The dtypes may differ.
        window, sigma: Side and standard deviation of the Gaussian window, in pixels.
        tile: Side of the squares that are computed at a time. Bounds the extra memory; does not change the result.
        threads: How many tiles are computed at the same time; does not change the result.

    Returns:
        SimilarityMap: ``(H - window + 1, W - window + 1)`` in (0, 1]: only where the window lies inside the image.

    Raises:
        ArgumentError: The images differ in size, are smaller than the window or hold something else than samples in
            0..255, or a setting is out of range.

    Examples:
        >>> flat = np.zeros((11, 12), np.uint8)
        >>> variance_similarity(flat, flat)
        SimilarityMap([[1., 1.]], dtype=float32)
    """
    if window < 1 or window % 2 == 0:
        raise ArgumentError("window", f"is {window}", "give an odd number of pixels, such as 11")
    if not (math.isfinite(sigma) and sigma > 0):
        raise ArgumentError("sigma", f"is {sigma}", "give a positive number of pixels, such as 1.5")
    if tile < 1 or threads < 1:
        raise ArgumentError("tile and threads", f"are {tile} and {threads}", "give at least 1")
    x, y = _colours(mse_sr, "mse_sr"), _colours(gan_sr, "gan_sr")
    height, width = x.shape[:2]
    if y.shape[:2] != (height, width):
        reason = f"is {y.shape[1]}x{y.shape[0]} pixels, but mse_sr is {width}x{height}"
        raise ArgumentError("gan_sr", reason, "give two results of one photo")
    if min(height, width) < window:
        reason = f"has {width}x{height} pixels, which are fewer than the {window}x{window} window"
        raise ArgumentError("mse_sr", reason, "give a larger image, or a smaller window")

    channels = max(x.shape[2], y.shape[2])
    halo = window // 2
    taps = gaussian(halo, sigma)
    similarity = np.empty((height - 2 * halo, width - 2 * halo), np.float32)

    def fill_share(thread: int) -> None:
        for part in islice(grid(height - 2 * halo, width - 2 * halo, tile), thread, None, threads):
            source = part.source(halo).slices
            rows_x, rows_y = _rows(x[source], channels), _rows(y[source], channels)
            similarity[part.slices] = _filtered(rows_x, rows_y, taps, channels)

    # This thread takes the first share, so that its time is that of the caller where there is one. A task per thread:
    # the memory of a task per tile would grow with the image.
    with ThreadPoolExecutor(threads) as pool:
        others = pool.map(fill_share, range(1, threads))
        fill_share(0)
        list(others)
    return SimilarityMap(similarity, halo)


def gaussian(radius: int, sigma: float) -> tuple[float, ...]:
    """Make the normalised Gaussian window, from its centre outwards to ``radius``."""
    half = [math.exp(-0.5 * (k / sigma) * (k / sigma)) for k in range(radius + 1)]
    total = half[0] + 2 * math.fsum(half[1:])
    return tuple(value / total for value in half)


def _colours(image: Samples, name: str) -> Samples:
    """View an image as ``(H, W, 1 or 3)``, without alpha."""
    if image.dtype not in _DTYPES:
        remedy = "give uint8, uint16, float32 or float64"
        raise ArgumentError(name, f"is of dtype {image.dtype}", remedy)
    if not (image.ndim == 2 or (image.ndim == 3 and 1 <= image.shape[2] <= 4)):
        raise ArgumentError(name, f"is of shape {image.shape}", "give (H, W) or (H, W, 1 to 4)")
    if image.ndim == 2:
        image = image[:, :, np.newaxis]
    colours = image[:, :, : image.shape[2] - (image.shape[2] in (2, 4))]
    # Only min and max, because comparing every sample would take memory of the image's size. NaN fails the check too.
    if colours.dtype.kind == "f" and colours.size and not (colours.min() >= 0 and colours.max() <= 255):
        raise ArgumentError(name, "holds samples that are not finite or lie outside of 0..255", "scale its floats")
    return colours


def _rows(part: Samples, channels: int) -> npt.NDArray[np.float64]:
    """Copy a tile's samples to contiguous float64 ``(H, W * channels)`` in 0..255, the only input of the kernel."""
    height, width, _ = part.shape
    rows = np.broadcast_to(part, (height, width, channels)).astype(np.float64, order="C")
    if part.dtype == np.uint16:
        rows /= 257.0
    return rows.reshape(height, width * channels)


def compiled(kernel: _Kernel) -> _Kernel:
    """Compile a function at its first call, and cache the compiled code on disk where a folder is writable."""
    # No fastmath: with fastmath, the value of a sample could depend on its place in a vector, and thus on the tile.
    try:
        machine_code: Any = numba.njit(nogil=True, error_model="numpy", cache=True)(kernel)
    except RuntimeError:  # neither package nor home folder is writable: every process compiles
        machine_code = numba.njit(nogil=True, error_model="numpy")(kernel)
    return machine_code  # type: ignore[no-any-return]


@compiled
def _filtered(
    x: npt.NDArray[np.float64], y: npt.NDArray[np.float64], taps: tuple[float, ...], channels: int
) -> npt.NDArray[np.float32]:
    """Compute the similarity of one tile from its samples and their halo."""
    # The compiler knows the length of a tuple. So it unrolls loops over the taps, and vectorises loops over samples.
    radius = len(taps) - 1
    samples = x.shape[1]
    height = x.shape[0] - 2 * radius
    width = samples // channels - 2 * radius
    # For one row of the tile: x, x^2, y and y^2 summed over the rows of the window, and the similarity by sample.
    sum_x, sum_xx = np.empty(samples), np.empty(samples)
    sum_y, sum_yy = np.empty(samples), np.empty(samples)
    by_channel = np.empty(width * channels)
    similarity = np.empty((height, width), np.float32)
    for row in range(height):
        centre = row + radius
        for i in range(samples):
            p, q = x[centre, i], y[centre, i]
            m_x, m_xx, m_y, m_yy = taps[0] * p, taps[0] * (p * p), taps[0] * q, taps[0] * (q * q)
            for k in range(1, radius + 1):
                p, p2 = x[centre - k, i], x[centre + k, i]
                q, q2 = y[centre - k, i], y[centre + k, i]
                m_x += taps[k] * (p + p2)
                m_xx += taps[k] * (p * p + p2 * p2)
                m_y += taps[k] * (q + q2)
                m_yy += taps[k] * (q * q + q2 * q2)
            sum_x[i], sum_xx[i], sum_y[i], sum_yy[i] = m_x, m_xx, m_y, m_yy
        for i in range(width * channels):
            # Unsigned: where an index may be negative, the compiled code reads samples singly, three times as slowly.
            c = np.uint64(i + radius * channels)
            m_x, m_xx = taps[0] * sum_x[c], taps[0] * sum_xx[c]
            m_y, m_yy = taps[0] * sum_y[c], taps[0] * sum_yy[c]
            for k in range(1, radius + 1):
                a = np.uint64(i + (radius - k) * channels)
                b = np.uint64(i + (radius + k) * channels)
                m_x += taps[k] * (sum_x[a] + sum_x[b])
                m_xx += taps[k] * (sum_xx[a] + sum_xx[b])
                m_y += taps[k] * (sum_y[a] + sum_y[b])
                m_yy += taps[k] * (sum_yy[a] + sum_yy[b])
            # In a flat region, rounding leaves a variance of about -1e-11. Epsilon is larger, so the root stays real.
            var_x, var_y = m_xx - m_x * m_x, m_yy - m_y * m_y
            root = math.sqrt((var_x + _EPSILON) * (var_y + _EPSILON))
            by_channel[i] = (2.0 * root + _STABILISER) / (var_x + var_y + _STABILISER)
        for i in range(width):
            total = 0.0
            for k in range(channels):
                total += by_channel[np.uint64(i * channels + k)]
            similarity[row, i] = total / channels
    return similarity
