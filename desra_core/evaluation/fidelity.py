"""Measure how much two results of one photo differ: outside of a mask, in sharpness, and as people see it (LPIPS).

All measures but LPIPS use float64 values in 0..255 (uint16 / 257), and read strips of rows to bound the memory.

LPIPS (Zhang et al. 2018) is a distance of two images in the features of AlexNet, close to people's judgement. Its heads
come with the package ``lpips``. The weights of AlexNet come from a file of the user; nothing is downloaded.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import numpy.typing as npt

from desra_core import third_party
from desra_core.errors import UsageError
from desra_core.images.codec import Mask, Pixels, grey_levels, luminance
from desra_core.images.parts import Rectangle, row_strips, windows

if TYPE_CHECKING:
    import torch
    from torch import nn

# The SSIM of a pixel depends on this many pixels to each side, with the Gaussian of Wang et al. (2004).
_SSIM_HALO = 5
# Keeps the similarity of gradients defined where both are 0; for values in 0..255.
_GRADIENT_STABILISER = 170.0
# The number of pixels of a strip. It bounds the extra memory to some 50 MB; larger strips are not faster.
_STRIP = 2**18
_DERIVATIVE = np.array([1.0, 0.0, -1.0])
_MEAN = np.full(3, 1 / 3)
# The smallest side, in pixels, that AlexNet's two poolings do not reduce to nothing.
_LEAST = 31
# Larger images are cut into windows of this side, because the features of a pair take about 200 bytes per pixel.
_WINDOW = 1024
_ALEXNET = "give the AlexNet weights of torchvision, alexnet-owt-7be5be79.pth"


def squared_error(before: Pixels, after: Pixels, outside: Mask) -> float:
    """Sum up the squared differences over the pixels outside of a mask. A pixel counts with the mean of its channels.

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
    """Compute the peak signal-to-noise ratio in dB from a `squared_error` and its number of pixels; infinite for 0."""
    if squared_error_sum == 0:
        return math.inf
    return 10 * math.log10(255**2 * pixels / squared_error_sum)


def structural_similarity(before: Pixels, after: Pixels, outside: Mask) -> float:
    """Average the SSIM map (Wang et al. 2004) of luminance over the pixels outside.

    Gaussian window of sigma 1.5, population covariance, K1 = 0.01 and K2 = 0.03, borders reflected. The window of a
    pixel outside may reach into the mask. Parameters and errors are those of `squared_error`; images have at least
    11 px a side. Returns -1..1, exactly 1 for equal images.
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
    halved first, because finetuning may cost fine texture, and the result is the mean, not the deviation. Parameters
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


def load_lpips(path: Path) -> nn.Module:
    """Build LPIPS (version 0.1, AlexNet) on the CPU.

    ``path`` is the state dict of torchvision's AlexNet, as torch or safetensors saves it. The classifier in the file is
    not read, and no code in the file can run. Raises `UsageError` where the file cannot be used.
    """
    third_party.mend_torchvision()
    from desra_core.networks.checkpoints import read_weights

    try:
        weights = read_weights(path)
    except UsageError as error:
        raise UsageError(path, error.reason, _ALEXNET) from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision warns of an outdated argument that lpips passes
        import lpips

        model = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    state = model.net.state_dict()
    for name, value in state.items():
        source = "features." + name.partition(".")[2]  # lpips calls features.3.weight slice2.3.weight
        if source not in weights:
            raise UsageError(path, f"has no {source}, so it is no AlexNet", _ALEXNET)
        if weights[source].shape != value.shape:
            sizes = f"{tuple(weights[source].shape)} where AlexNet has {tuple(value.shape)}"
            raise UsageError(path, f"has {source} of {sizes}", _ALEXNET)
        state[name] = weights[source]
    model.net.load_state_dict(state)
    network: nn.Module = model.eval().requires_grad_(False)
    return network


def lpips_distance(model: nn.Module, before: Pixels, after: Pixels) -> float:
    """Measure the perceptual distance of two images.

    Args:
        model: The network that `load_lpips` returns.
        before, after: ``(H, W, 1 or 3)`` uint8 or uint16, of one shape. Gray counts as three equal channels.

    Returns:
        0 for equal images, about 1 for unrelated ones. Images larger than 1024 px a side are cut into windows of one
        size, and the distance is the mean over the windows. Images smaller than 31 px are extended by border pixels.

    Raises:
        ValueError: The shapes differ.
    """
    import torch

    if before.shape != after.shape:
        raise ValueError(f"images of the shapes {before.shape} and {after.shape} cannot be compared")
    parts = [window.source for window in windows(*before.shape[:2], side=_WINDOW, halo=0)]
    with torch.inference_mode():
        distances = [float(model(_batch(before, part), _batch(after, part))) for part in parts]
    return float(np.mean(distances))


def _check_shapes(before: Pixels, after: Pixels, outside: Mask) -> int:
    """Check the shapes, and count the pixels outside."""
    if before.shape != after.shape or before.shape[:2] != outside.shape:
        raise ValueError(f"the shapes {before.shape}, {after.shape} and {outside.shape} do not belong together")
    pixels = int(np.count_nonzero(outside))
    if pixels == 0:
        raise ValueError("no pixel lies outside")
    return pixels


def _with_halo(rows: slice, height: int, halo: int, least: int = 1) -> tuple[slice, slice]:
    """Find the rows that a filter reads to fill a strip (at least ``least``), and the strip's place in these rows."""
    first = max(0, min(rows.start - halo, height - least))
    last = min(height, max(rows.stop + halo, least))
    return slice(first, last), slice(rows.start - first, min(rows.stop, height) - first)


def _gradient_magnitude(pixels: Pixels, rows: slice) -> npt.NDArray[np.float64]:
    """Compute ``sqrt(gx^2 + gy^2)`` of a strip of rows, by Prewitt's filters divided by 3, border pixels repeated."""
    source, kept = _with_halo(rows, len(pixels), 1)
    grey = luminance(grey_levels(pixels[source]))
    across = cv2.sepFilter2D(grey, cv2.CV_64F, _DERIVATIVE, _MEAN, borderType=cv2.BORDER_REPLICATE)
    down = cv2.sepFilter2D(grey, cv2.CV_64F, _MEAN, _DERIVATIVE, borderType=cv2.BORDER_REPLICATE)
    return np.asarray(np.hypot(across, down)[kept])


def _batch(pixels: Pixels, part: Rectangle) -> torch.Tensor:
    """Convert a part of an image to ``(1, 3, h, w)`` float32 in -1..1."""
    import torch

    missing = [(0, max(0, _LEAST - side)) for side in (part.height, part.width)]
    samples = np.pad(pixels[part.slices], [*missing, (0, 0)], mode="edge")
    values = samples.astype(np.float32) / np.float32(np.iinfo(pixels.dtype).max / 2) - 1
    return torch.from_numpy(values).permute(2, 0, 1).expand(3, -1, -1)[None]
