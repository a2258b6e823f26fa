"""Measure how much two results of one photo differ outside of a mask, and how sharp a result is.

Measures are taken on values in 0..255 (uint16 / 257), in float64, strip by strip of rows to bound the memory.
"""

import math

import cv2
import numpy as np
import numpy.typing as npt

from desra_core.images.codec import Mask, Pixels, grey_levels, luminance
from desra_core.images.parts import row_strips

# Pixels around a pixel that its SSIM depends on, with the Gaussian of Wang et al. (2004).
_SSIM_HALO = 5
# Keeps the similarity of gradients defined where both are 0; for values in 0..255.
_GRADIENT_STABILISER = 170.0
# Pixels of a strip: bounds the extra memory to some 50 MB; larger strips are not faster.
_STRIP = 2**18
_DERIVATIVE = np.array([1.0, 0.0, -1.0])
_MEAN = np.full(3, 1 / 3)

Levels = npt.NDArray[np.float64]


def squared_error(before: Pixels, after: Pixels, outside: Mask) -> float:
    """Sum up the squared differences over the pixels outside, each the mean over its channels.

    Args:
        before, after: ``(H, W, 1 or 3)`` uint8 or uint16, of one shape.
        outside: ``(H, W)`` bool, the pixels that count.

    Returns:
        Squared grey levels of 255. The sums of several images may be added up for `psnr`.

    Raises:
        ValueError: The shapes differ, or no pixel is outside.
    """
    _check_shapes(before, after, outside)
    total = 0.0
    for rows in row_strips(before.shape, _STRIP):
        difference = grey_levels(before[rows][outside[rows]]) - grey_levels(after[rows][outside[rows]])
        total += float(np.square(difference, out=difference).sum())
    return total / int(before.shape[2])


def psnr(squared_error_sum: float, pixels: int) -> float:
    """Compute the peak signal-to-noise ratio in dB from a `squared_error` over so many pixels; infinite for 0."""
    if squared_error_sum == 0:
        return math.inf
    return 10 * math.log10(255**2 * pixels / squared_error_sum)


def structural_similarity(before: Pixels, after: Pixels, outside: Mask) -> float:
    """Average the SSIM map (Wang et al. 2004) of luminance over the pixels outside.

    Gaussian window of sigma 1.5, population covariance, K1 = 0.01 and K2 = 0.03, borders reflected. The window of a
    pixel outside may reach inside. Parameters and errors are those of `squared_error`; images have at least 11 px a
    side. Returns -1..1, exactly 1 for equal images.
    """
    from skimage.metrics import structural_similarity as ssim

    pixels = _check_shapes(before, after, outside)
    total = 0.0
    for rows in row_strips(outside.shape, _STRIP):
        source, kept = _with_halo(rows, len(outside), _SSIM_HALO, 2 * _SSIM_HALO + 1)
        x, y = (luminance(grey_levels(image[source])) for image in (before, after))
        _, similarity = ssim(  # type: ignore[no-untyped-call]
            x, y, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255, full=True
        )
        total += float(similarity[kept][outside[rows]].sum())
    return total / pixels


def gradient_similarity(before: Pixels, after: Pixels, outside: Mask) -> float:
    """Average the similarity of the gradient magnitudes of luminance over the pixels outside (Xue et al. 2014, GMSD).

    ``(2 g h + c) / (g^2 + h^2 + c)`` with c = 170 and Prewitt gradients g and h. Unlike in the paper, images are not
    halved first, because finetuning may cost finer texture, and the mean is taken in place of the deviation. Parameters
    and errors are those of `squared_error`. Returns 0..1, exactly 1 for equal images.
    """
    pixels = _check_shapes(before, after, outside)
    total = 0.0
    for rows in row_strips(outside.shape, _STRIP):
        g, h = (_gradient_magnitude(image, rows)[outside[rows]] for image in (before, after))
        similarity = (2 * g * h + _GRADIENT_STABILISER) / (g * g + h * h + _GRADIENT_STABILISER)
        total += float(similarity.sum())
    return total / pixels


def sharpness(pixels: Pixels) -> float:
    """Average the gradient magnitude of luminance, in grey levels of 255 per pixel."""
    height, width = map(int, pixels.shape[:2])
    total = sum(float(_gradient_magnitude(pixels, rows).sum()) for rows in row_strips((height, width), _STRIP))
    return total / (2 * height * width)  # Prewitt's differences span two pixels


def _check_shapes(before: Pixels, after: Pixels, outside: Mask) -> int:
    """Check the shapes, and count the pixels outside."""
    if before.shape != after.shape or before.shape[:2] != outside.shape:
        raise ValueError(f"the shapes {before.shape}, {after.shape} and {outside.shape} do not belong together")
    pixels = int(np.count_nonzero(outside))
    if pixels == 0:
        raise ValueError("no pixel lies outside")
    return pixels


def _with_halo(rows: slice, height: int, halo: int, least: int = 1) -> tuple[slice, slice]:
    """Find the rows (``least`` or more) that a filter reads to fill a strip, and the strip's place in these rows."""
    first = max(0, min(rows.start - halo, height - least))
    last = min(height, max(rows.stop + halo, least))
    return slice(first, last), slice(rows.start - first, min(rows.stop, height) - first)


def _gradient_magnitude(pixels: Pixels, rows: slice) -> Levels:
    """Compute ``sqrt(gx^2 + gy^2)`` of a strip of rows, by Prewitt's filters divided by 3, border pixels repeated."""
    source, kept = _with_halo(rows, len(pixels), 1)
    grey = luminance(grey_levels(pixels[source]))
    across = cv2.sepFilter2D(grey, cv2.CV_64F, _DERIVATIVE, _MEAN, borderType=cv2.BORDER_REPLICATE)
    down = cv2.sepFilter2D(grey, cv2.CV_64F, _MEAN, _DERIVATIVE, borderType=cv2.BORDER_REPLICATE)
    return np.asarray(np.hypot(across, down)[kept])
