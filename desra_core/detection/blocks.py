"""Features of small blocks of a pair, from which a detector is learned: what differs, and what is usual around it."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

from desra_core.detection.mask import WINDOW
from desra_core.detection.similarity import variance_similarity
from desra_core.images.codec import LUMINANCE, Pixels, rgb_levels
from desra_core.images.parts import row_strips

BLOCK = 8
# Raise it when a feature changes: trained detectors of another version are refused.
VERSION = 1

# Maps of a block. Contrasts are the logarithms of standard deviations of luminance in windows of 3 px (fine) and 11 px.
MAPS = (
    "similarity",  # D
    "ssim",
    "residual",  # logarithm of the absolute difference
    "residual_variance",  # logarithm of its variance in windows of 7 px, as LDL has it
    "fine_contrast",  # of the GAN result, minus that of the MSE result
    "contrast",  # the same
    "gradient",  # the same, of the magnitude of Sobel's gradient
    "texture",  # contrast of the MSE result
    "sharpness",  # fine contrast minus contrast, of the GAN result
    "lightness",  # difference of CIELAB's L
    "absolute_lightness",
    "colour",  # CIEDE2000
    "pattern",  # logarithm of the share that the strongest frequency has in the difference: grids and stripes
    "high_frequencies",  # logarithm of the share of frequencies with periods below 4 px in the difference
)
# Each map is taken of the block, and as the mean over so many blocks around it.
_SIDES = (1, 5)
# What is usual differs much between images, so features are relative to the image: a value minus the image's median,
# and the same in median absolute deviations of the image.
FEATURES = tuple(
    f"{name}, {side}x{side} blocks, {unit}"
    for unit in ("from median", "in deviations")
    for side in _SIDES
    for name in MAPS
)

# The orthonormal cosine transform of BLOCK values (DCT-II).
_COSINES = np.cos(np.pi / BLOCK * np.outer(np.arange(BLOCK), np.arange(BLOCK) + 0.5)) * np.sqrt(2 / BLOCK)
_COSINES[0] /= np.sqrt(2)
_HALO = 16  # pixels around a strip that its maps depend on; a multiple of the block keeps strips independent
_STRIP = 2**18
# Keeps deviations finite where an image is alike all over.
_LEAST_DEVIATION = 1e-3
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2

Map = npt.NDArray[np.float32]


def block_features(mse_sr: Pixels, gan_sr: Pixels) -> Map:
    """Compute the features of every block of 8x8 px of a pair.

    Args:
        mse_sr, gan_sr: ``(H, W, 1 or 3)``, uint8 or uint16.

    Returns:
        ``(ceil(H / 8), ceil(W / 8), len(FEATURES))`` float32. Images are reflected at their borders.
    """
    maps = block_maps(mse_sr, gan_sr)
    values = np.concatenate([maps if side == 1 else _mean(maps, side) for side in _SIDES], axis=2)
    values -= np.median(values, axis=(0, 1))
    deviations = values / (np.median(np.abs(values), axis=(0, 1)) + np.float32(_LEAST_DEVIATION))
    return np.concatenate([values, deviations], axis=2)


def _mean(maps: Map, side: int) -> Map:
    # One at a time, because OpenCV filters few channels only.
    each = (np.ascontiguousarray(one) for one in np.moveaxis(maps, 2, 0))
    return np.stack([cv2.blur(one, (side, side), borderType=cv2.BORDER_REPLICATE) for one in each], axis=2)


def block_maps(mse_sr: Pixels, gan_sr: Pixels) -> Map:
    """Compute the means over blocks of `MAPS`, strip by strip: ``(ceil(H / 8), ceil(W / 8), len(MAPS))``."""
    height, width = gan_sr.shape[:2]
    rows, columns = -(-height // BLOCK), -(-width // BLOCK)
    maps = np.empty((rows, columns, len(MAPS)), np.float32)
    for strip in row_strips((rows, columns), _STRIP // BLOCK**2):
        pair = [_reflected(image, strip, rows, columns) for image in (mse_sr, gan_sr)]
        maps[strip] = np.stack(_strip_maps(*pair), axis=2)
    return maps


def _reflected(image: Pixels, strip: slice, rows: int, columns: int) -> npt.NDArray[np.float64]:
    """Cut out a strip of blocks with its halo, as grey levels ``(h, w, 3)``."""
    height, width = image.shape[:2]
    top, end = strip.start * BLOCK - _HALO, min(strip.stop, rows) * BLOCK + _HALO
    taken = image[max(0, top) : min(end, height)]
    levels = rgb_levels(taken)
    spare = columns * BLOCK - width
    margins = [(max(0, -top), max(0, end - height)), (_HALO, _HALO + spare), (0, 0)]
    return np.pad(levels, margins, mode="symmetric")


def _strip_maps(mse: npt.NDArray[np.float64], gan: npt.NDArray[np.float64]) -> list[Map]:
    from skimage.color import deltaE_ciede2000, rgb2lab

    x, y = (np.ascontiguousarray(image @ np.array(LUMINANCE)) for image in (mse, gan))
    similarity = np.pad(np.asarray(variance_similarity(mse, gan)), WINDOW // 2, mode="edge")
    mean_x, mean_y = _blur(x, WINDOW), _blur(y, WINDOW)
    var_x, var_y = (np.maximum(_blur(v * v, WINDOW) - m * m, 0) for v, m in ((x, mean_x), (y, mean_y)))
    covariance = _blur(x * y, WINDOW) - mean_x * mean_y
    ssim = (2 * mean_x * mean_y + _C1) * (2 * covariance + _C2)
    ssim /= (mean_x**2 + mean_y**2 + _C1) * (var_x + var_y + _C2)
    residual = np.abs(mse - gan).sum(axis=2)
    spread = np.maximum(_blur(residual**2, 7) - _blur(residual, 7) ** 2, 0)
    fine_x, fine_y = (np.sqrt(np.maximum(_blur(v * v, 3) - _blur(v, 3) ** 2, 0)) for v in (x, y))
    steps = [np.hypot(cv2.Sobel(v, cv2.CV_64F, 1, 0), cv2.Sobel(v, cv2.CV_64F, 0, 1)) for v in (x, y)]
    fine_x, fine_y, coarse_x, coarse_y, step_x, step_y = map(
        np.log1p, (fine_x, fine_y, np.sqrt(var_x), np.sqrt(var_y), *steps)
    )
    whole = (similarity, ssim, np.log1p(residual), np.log1p(spread), fine_y - fine_x, coarse_y - coarse_x,
             step_y - step_x, coarse_x, fine_y - coarse_y)  # fmt: skip
    shape = x.shape[1] // BLOCK, x.shape[0] // BLOCK
    blocks = [cv2.resize(one, shape, interpolation=cv2.INTER_AREA) for one in whole]
    labs = [rgb2lab(cv2.resize(image, shape, interpolation=cv2.INTER_AREA) / 255) for image in (mse, gan)]
    lightness = labs[1][:, :, 0] - labs[0][:, :, 0]
    colour = deltaE_ciede2000(*labs)  # type: ignore[no-untyped-call]
    blocks += [lightness, np.abs(lightness), colour, *_frequencies(y - x)]
    inner = slice(_HALO // BLOCK, -(_HALO // BLOCK))
    return [one[inner, inner].astype(np.float32) for one in blocks]


def _frequencies(difference: npt.NDArray[np.float64]) -> list[npt.NDArray[np.float64]]:
    """Compute the last two of `MAPS` from the cosine transform of each block, averaged over 3x3 blocks."""
    rows, columns = (side // BLOCK for side in difference.shape)
    values = difference.reshape(rows, BLOCK, columns, BLOCK)
    power = np.square(np.einsum("ij,rjck,lk->rcil", _COSINES, values, _COSINES, optimize=True))
    power[:, :, 0, 0] = 0
    each = [_blur(np.ascontiguousarray(power[:, :, i, j]), 3) for i in range(BLOCK) for j in range(BLOCK)]
    around = np.stack(each, axis=2)
    total = around.sum(axis=2) + 1
    high = around.reshape(rows, columns, BLOCK, BLOCK)
    fast = high[:, :, BLOCK // 2 :].sum(axis=(2, 3)) + high[:, :, : BLOCK // 2, BLOCK // 2 :].sum(axis=(2, 3))
    return [np.log(around.max(axis=2) / total + _LEAST_DEVIATION), np.log((fast + 1) / total)]


def _blur(values: npt.NDArray[np.float64], side: int) -> npt.NDArray[np.float64]:
    return np.asarray(cv2.blur(values, (side, side), borderType=cv2.BORDER_REFLECT_101))
