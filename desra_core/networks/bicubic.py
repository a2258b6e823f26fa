"""Bicubic enlargement in the form of a network: a reference that needs no checkpoint."""

from __future__ import annotations

import torch
from torch import nn

REACH = 2  # source pixels to each side that a result depends on


class Bicubic(nn.Module):
    """Map ``(N, C, h, w)`` to ``(N, C, h * scale, w * scale)`` by Keys' cubic convolution with a = -0.75.

    Pixels have their centres at halves, and those at the border are repeated outwards, as `cv2.resize` does with
    INTER_CUBIC. Sums are float64, and exact where the scale is a power of two: windows, threads and devices do not
    change a bit then. At other scales they change the last bit of float64.
    """

    def __init__(self, scale: int) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Enlarge images."""
        enlarged = nn.functional.interpolate(
            image.double(), scale_factor=self.scale, mode="bicubic", align_corners=False
        )
        return enlarged.float()
