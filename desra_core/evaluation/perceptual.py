"""Measure LPIPS (Zhang et al. 2018): a distance of two images in the features of AlexNet, close to people's judgement.

The heads come with the package ``lpips``, the weights of AlexNet from a file of the user; nothing is downloaded.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from desra_core import third_party
from desra_core.errors import UsageError
from desra_core.images.codec import Pixels
from desra_core.images.parts import Rectangle, windows

if TYPE_CHECKING:
    import torch
    from torch import nn

# The smallest side, in pixels, that AlexNet's two poolings do not reduce to nothing.
_LEAST = 31
# Larger images are measured by windows of this side: the features of a pair take about 200 bytes per pixel.
_WINDOW = 1024
_REMEDY = "give the AlexNet weights of torchvision, alexnet-owt-7be5be79.pth"


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
        raise UsageError(path, error.reason, _REMEDY) from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision warns of the way in which lpips asks for AlexNet
        import lpips

        model = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    _fill_backbone(model.net, weights, path)
    network: nn.Module = model.eval().requires_grad_(False)
    return network


def lpips_distance(model: nn.Module, before: Pixels, after: Pixels) -> float:
    """Measure the perceptual distance of two images.

    Args:
        model: The network that `load_lpips` returns.
        before, after: ``(H, W, 1 or 3)`` uint8 or uint16, of one shape. Gray counts as three equal channels.

    Returns:
        0 for equal images, about 1 for unrelated ones. Images larger than 1024 px a side are cut into windows of one
        size, whose mean is taken; images smaller than 31 px are extended by their border pixels.

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


def _fill_backbone(backbone: nn.Module, weights: dict[str, Any], path: Path) -> None:
    """Load AlexNet's convolutions, whose ``features.3.weight`` is called ``slice2.3.weight`` in lpips."""
    state = backbone.state_dict()
    for name, value in state.items():
        source = "features." + name.partition(".")[2]
        if source not in weights:
            raise UsageError(path, f"has no {source}, so it is no AlexNet", _REMEDY)
        if weights[source].shape != value.shape:
            sizes = f"{tuple(weights[source].shape)} where AlexNet has {tuple(value.shape)}"
            raise UsageError(path, f"has {source} of {sizes}", _REMEDY)
        state[name] = weights[source]
    backbone.load_state_dict(state)


def _batch(pixels: Pixels, part: Rectangle) -> torch.Tensor:
    """Convert a part of an image to ``(1, 3, h, w)`` float32 in -1..1."""
    import torch

    missing = [(0, max(0, _LEAST - side)) for side in (part.height, part.width)]
    samples = np.pad(pixels[part.slices], [*missing, (0, 0)], mode="edge")
    values = samples.astype(np.float32) / np.float32(np.iinfo(pixels.dtype).max / 2) - 1
    return torch.from_numpy(values).permute(2, 0, 1).expand(3, -1, -1)[None]
