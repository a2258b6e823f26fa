"""RLFN, a small network that is trained without a GAN and that spandrel lacks, in spandrel's form.

Kong et al., "Residual Local Feature Network for Efficient Super-Resolution" (2022). Files name their tensors in two
ways: as the winner of NTIRE 2022 (``fea_conv``, ``B1``, ``LR_conv``) or as the authors' release (``conv_1``,
``block_1``, ``conv_2``).
"""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import cast

import torch

from desra_core.third_party import mend_torchvision

mend_torchvision()

from spandrel import MAIN_REGISTRY, Architecture, ArchSupport, ImageModelDescriptor, SizeRequirements, StateDict  # noqa: E402
from spandrel.util import KeyCondition, get_scale_and_output_channels  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

LEAST_SIDE = 15  # the attention halves an image, and then takes maxima of 7 x 7 pixels
_RANGE = 255  # of the values that the weights were trained with
_SLOPE = 0.05
# The beginnings of names, and those of this module.
_NAMES = {r"(fea_conv|conv_1)\.": "first.", r"(B|block_)(\d+)\.": r"blocks.\2.", r"(LR_conv|conv_2)\.": "last."}


class RLFN(nn.Module):
    """Map ``(N, C, h, w)`` to ``(N, C, h * scale, w * scale)``, both in 0..1."""

    def __init__(self, channels: int, features: int, inner: int, attention: int, blocks: int, scale: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, features, 3, padding=1)
        numbered = {str(number): _Block(features, inner, attention) for number in range(1, blocks + 1)}
        self.blocks = nn.Sequential(OrderedDict(numbered))
        self.last = nn.Conv2d(features, features, 3, padding=1)
        self.upsampler = nn.Sequential(nn.Conv2d(features, channels * scale**2, 3, padding=1), nn.PixelShuffle(scale))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Enlarge images."""
        values = self.first(image * _RANGE)
        return cast(torch.Tensor, self.upsampler(self.last(self.blocks(values)) + values)) / _RANGE


class _Block(nn.Module):
    """Three convolutions around a shortcut, then attention."""

    def __init__(self, features: int, inner: int, attention: int) -> None:
        super().__init__()
        self.c1_r = nn.Conv2d(features, inner, 3, padding=1)
        self.c2_r = nn.Conv2d(inner, inner, 3, padding=1)
        self.c3_r = nn.Conv2d(inner, features, 3, padding=1)
        self.c5 = nn.Conv2d(features, features, 1)
        self.esa = _Attention(features, attention)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        values = image
        for convolution in (self.c1_r, self.c2_r, self.c3_r):
            values = functional.leaky_relu(convolution(values), _SLOPE)
        return cast(torch.Tensor, self.esa(self.c5(values + image)))


class _Attention(nn.Module):
    """Weigh each pixel of each channel by its wider surroundings (ESA)."""

    def __init__(self, features: int, inner: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(features, inner, 1)
        self.conv_f = nn.Conv2d(inner, inner, 1)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride=2)
        self.conv3 = nn.Conv2d(inner, inner, 3, padding=1)
        self.conv4 = nn.Conv2d(inner, features, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        values = self.conv1(image)
        around = self.conv3(functional.max_pool2d(self.conv2(values), kernel_size=7, stride=3))
        around = functional.interpolate(around, image.shape[2:], mode="bilinear", align_corners=False)
        return image * torch.sigmoid(self.conv4(around + self.conv_f(values)))


class RLFNArch(Architecture[RLFN]):  # type: ignore[misc]
    """Recognise and load RLFN."""

    def __init__(self) -> None:
        kinds = ("fea_conv", "B1.esa.conv_f", "LR_conv"), ("conv_1", "block_1.esa.conv_f", "conv_2")
        names = [[f"{module}.weight" for module in (*kind, "upsampler.0")] for kind in kinds]
        super().__init__(id="RLFN", detect=KeyCondition.has_any(*(KeyCondition.has_all(*kind) for kind in names)))

    def load(self, state_dict: StateDict) -> ImageModelDescriptor[RLFN]:
        """Load the network of some weights."""
        for pattern, own in _NAMES.items():
            state_dict = {re.sub(f"^{pattern}", own, name): values for name, values in state_dict.items()}
        features, channels = state_dict["first.weight"].shape[:2]
        scale, _ = get_scale_and_output_channels(state_dict["upsampler.0.weight"].shape[0], channels)
        inner, attention = (state_dict[f"blocks.1.{name}.weight"].shape[0] for name in ("c1_r", "esa.conv1"))
        blocks = len({name.split(".")[1] for name in state_dict if name.startswith("blocks.")})
        return ImageModelDescriptor(
            RLFN(channels, features, inner, attention, blocks, scale),
            state_dict,
            architecture=self,
            purpose="SR",
            tags=[f"{features}nf", f"{blocks}nb"],
            supports_half=False,
            supports_bfloat16=True,
            scale=scale,
            input_channels=channels,
            output_channels=channels,
            size_requirements=SizeRequirements(minimum=LEAST_SIDE),
        )


MAIN_REGISTRY.add(ArchSupport.from_architecture(RLFNArch()))
