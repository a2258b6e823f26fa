"""Bicubic enlargement in the form of a network: a reference that needs no checkpoint."""

from __future__ import annotations

import math

import torch
from torch import nn

_SHARPNESS = -0.75  # as OpenCV and torch have it; Pillow and MATLAB have -0.5
REACH = 2  # source pixels to each side that a result depends on


class Bicubic(nn.Module):
    """Map ``(N, C, h, w)`` to ``(N, C, h * scale, w * scale)`` by Keys' cubic convolution with a = -0.75.

    Pixels have their centres at halves, and those at the border are repeated outwards: `cv2.resize` with INTER_CUBIC,
    and torch's ``bicubic`` with ``align_corners=False``, mean the same. Each result is the sum of the same products in
    the same order, in float64, wherever it lies in an image. So windows, threads and devices do not change a bit.
    """

    def __init__(self, scale: int) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Enlarge images."""
        values = image.double()
        for axis in (2, 3):
            values = self._stretched(values, axis)
        return values.float()

    def _stretched(self, values: torch.Tensor, axis: int) -> torch.Tensor:
        length = values.shape[axis]
        places = torch.arange(-REACH, length + REACH, device=values.device).clamp_(0, length - 1)
        source, phases = values.index_select(axis, places), []
        for phase in range(self.scale):
            place = (phase + 0.5) / self.scale - 0.5  # between source pixels, seen from the pixel of this phase
            first = math.floor(place) - 1
            terms = [
                source.narrow(axis, REACH + pixel, length) * _weight(abs(place - pixel))
                for pixel in range(first, first + 4)
            ]
            phases.append(terms[0] + terms[1] + terms[2] + terms[3])
        return torch.stack(phases, axis + 1).flatten(axis, axis + 1)


def _weight(distance: float) -> float:
    """Compute the weight of a pixel at a distance of 0 to 2 pixels."""
    a = _SHARPNESS
    if distance <= 1:
        return ((a + 2) * distance - (a + 3)) * distance**2 + 1
    return a * (((distance - 5) * distance + 8) * distance - 4)
