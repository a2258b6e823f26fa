"""Distances of images as people see them, in the features of a network: LPIPS and DISTS.

LPIPS (Zhang et al. 2018) has its heads from the package ``lpips``, DISTS (Ding et al. 2020) from ``DISTS_pytorch``. The
weights of AlexNet and VGG16 come from files of the user; nothing is downloaded.
"""

from __future__ import annotations

import threading
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from desra_core import third_party
from desra_core.errors import UsageError
from desra_core.images.codec import Pixels
from desra_core.images.parts import Rectangle, windows
from desra_core.networks.checkpoints import read_weights

# The smallest side, in pixels, that AlexNet's two poolings do not reduce to nothing.
_LEAST = 31
# Larger images are cut into windows of this side, because the features of a pair take about 200 bytes per pixel.
_WINDOW = 1024
_ALEXNET = "give the AlexNet weights of torchvision, alexnet-owt-7be5be79.pth"
_BUILDING = threading.Lock()
_VGG16 = "give the VGG16 weights of torchvision, vgg16-397923af.pth"


def load_lpips(path: Path, *, spatial: bool = False) -> nn.Module:
    """Build LPIPS (version 0.1, AlexNet) on the CPU, for the distance of two images or (``spatial``) of their pixels.

    ``path`` is the state dict of torchvision's AlexNet, as torch or safetensors saves it. The classifier in the file is
    not read, and no code in the file can run. Raises `UsageError` where the file cannot be used.
    """
    third_party.require("lpips", "lpips", "--lpips")
    third_party.mend_torchvision()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision warns of an outdated argument that lpips passes
        import lpips

        model = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False, spatial=spatial)
    # lpips calls features.3.weight slice2.3.weight
    names = {name: "features." + name.partition(".")[2] for name in model.net.state_dict()}
    _fill(model.net, names, path, "AlexNet", _ALEXNET)
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
    if before.shape != after.shape:
        raise ValueError(f"images of the shapes {before.shape} and {after.shape} cannot be compared")
    parts = [window.source for window in windows(*before.shape[:2], side=_WINDOW, halo=0)]
    with torch.inference_mode():
        distances = [float(model(_batch(before, part), _batch(after, part))) for part in parts]
    return float(np.mean(distances))


def load_dists(path: Path) -> nn.Module:
    """Build DISTS (Ding et al. 2020) on the CPU, with the alpha and beta of its package.

    ``path`` is the state dict of torchvision's VGG16; see `load_lpips`.
    """
    third_party.require("DISTS_pytorch", "dists", "dists")
    third_party.mend_torchvision()
    from DISTS_pytorch import DISTS_pt

    # The package would download VGG16: let it take one without trained weights instead.
    with _BUILDING:
        own = DISTS_pt.models
        DISTS_pt.models = SimpleNamespace(vgg16=lambda **_: own.vgg16(weights=None))
        try:
            model = DISTS_pt.DISTS(load_weights=False)
        finally:
            DISTS_pt.models = own
    # The package calls features.5.weight stage2.5.weight
    stages = [name for name in model.state_dict() if name.startswith("stage") and not name.endswith("filter")]
    _fill(model, {name: "features." + name.partition(".")[2] for name in stages}, path, "VGG16", _VGG16)
    heads = torch.load(Path(DISTS_pt.__file__).with_name("weights.pt"), weights_only=True)
    model.load_state_dict(heads, strict=False)
    network: nn.Module = model.eval().requires_grad_(False)
    return network


def _fill(model: nn.Module, names: dict[str, str], path: Path, network: str, remedy: str) -> None:
    """Fill tensors of a model from those of a file: ``names`` has the file's name of each (raises `UsageError`)."""
    try:
        weights = read_weights(path)
    except UsageError as error:
        raise UsageError(path, error.reason, remedy) from None
    state = model.state_dict()
    for name, source in names.items():
        if source not in weights:
            raise UsageError(path, f"has no {source}, so it is no {network}", remedy)
        if weights[source].shape != state[name].shape:
            sizes = f"{tuple(weights[source].shape)} where {network} has {tuple(state[name].shape)}"
            raise UsageError(path, f"has {source} of {sizes}", remedy)
        state[name] = weights[source]
    model.load_state_dict(state)


def _batch(pixels: Pixels, part: Rectangle) -> torch.Tensor:
    """Convert a part of an image to ``(1, 3, h, w)`` float32 in -1..1."""
    missing = [(0, max(0, _LEAST - side)) for side in (part.height, part.width)]
    samples = np.pad(pixels[part.slices], [*missing, (0, 0)], mode="edge")
    values = samples.astype(np.float32) / np.float32(np.iinfo(pixels.dtype).max / 2) - 1
    return torch.from_numpy(values).permute(2, 0, 1).expand(3, -1, -1)[None]
