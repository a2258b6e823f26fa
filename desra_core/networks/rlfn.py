"""RLFN, a small network that is trained without a GAN and that spandrel lacks, in spandrel's form.

Kong et al., "Residual Local Feature Network for Efficient Super-Resolution" (2022). Files name their tensors in two
ways: as the winner of NTIRE 2022 (``fea_conv``, ``B1``, ``LR_conv``) or as the authors' first release (``conv_1``,
``block_1``, ``conv_2``).
"""

from __future__ import annotations

import re
from typing import cast

import torch

from desra_core.third_party import mend_torchvision

mend_torchvision()

from spandrel import MAIN_REGISTRY, Architecture, ArchSupport, ImageModelDescriptor, SizeRequirements, StateDict  # noqa: E402
from spandrel.util import KeyCondition, get_scale_and_output_channels  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

_SLOPE = 0.05
# The attention halves an image, and then takes maxima of 7 x 7 pixels.
_LEAST_SIDE = 15


class RLFN(nn.Module):
    """Map ``(N, 3, h, w)`` to ``(N, 3, h * scale, w * scale)``, both in 0..1."""

    def __init__(self, channels: int, features: int, inner: int, attention: int, blocks: int, scale: int) -> None:
        super().__init__()
        self.conv_1 = nn.Conv2d(channels, features, 3, padding=1)
        for number in range(1, blocks + 1):
            self.add_module(f"block_{number}", _Block(features, inner, attention))
        self.blocks = blocks
        self.conv_2 = nn.Conv2d(features, features, 3, padding=1)
        self.upsampler = nn.Sequential(nn.Conv2d(features, channels * scale**2, 3, padding=1), nn.PixelShuffle(scale))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Enlarge images."""
        first = values = self.conv_1(image)
        for number in range(1, self.blocks + 1):
            values = self.get_submodule(f"block_{number}")(values)
        return cast(torch.Tensor, self.upsampler(self.conv_2(values) + first))


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
        first = KeyCondition.has_all("fea_conv.weight", "B1.esa.conv_f.weight", "LR_conv.weight", "upsampler.0.weight")
        second = KeyCondition.has_all(
            "conv_1.weight", "block_1.esa.conv_f.weight", "conv_2.weight", "upsampler.0.weight"
        )
        super().__init__(id="RLFN", detect=KeyCondition.has_any(first, second))

    def load(self, state_dict: StateDict) -> ImageModelDescriptor[RLFN]:
        """Load the network of some weights."""
        names = (("fea_conv.", "conv_1."), ("LR_conv.", "conv_2."), (r"B(\d+)\.", r"block_\1."))
        state = {}
        for name, values in state_dict.items():
            for pattern, own in names:
                name = re.sub(f"^{pattern}", own, name)
            state[name] = values
        features, channels = state["conv_1.weight"].shape[:2]
        scale, _ = get_scale_and_output_channels(state["upsampler.0.weight"].shape[0], channels)
        inner, attention = state["block_1.c1_r.weight"].shape[0], state["block_1.esa.conv1.weight"].shape[0]
        blocks = len({name.partition(".")[0] for name in state if name.startswith("block_")})
        return ImageModelDescriptor(
            RLFN(channels, features, inner, attention, blocks, scale),
            state,
            architecture=self,
            purpose="SR",
            tags=[f"{features}nf", f"{blocks}nb"],
            supports_half=True,
            supports_bfloat16=True,
            scale=scale,
            input_channels=channels,
            output_channels=channels,
            size_requirements=SizeRequirements(minimum=_LEAST_SIDE),
        )


MAIN_REGISTRY.add(ArchSupport.from_architecture(RLFNArch()))
