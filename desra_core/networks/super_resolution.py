"""Enlarge photos with a super-resolution network, window by window, in bounded memory."""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np

from desra_core.errors import UsageError
from desra_core.gpu import exact_on, lacks_memory
from desra_core.images.codec import LUMINANCE, Pixels, check_picture
from desra_core.images.parts import Window, windows
from desra_core.networks.checkpoints import Model

# The reason of the error about a network whose values are not finite.
NOT_FINITE = "gives values that are not finite"


class Enlarged(NamedTuple):
    """An enlarged photo.

    Attributes:
        pixels: The photo at ``scale`` times its height and width, of its dtype and number of axes and channels.
        tile: The side of the windows if memory ran out with the default side, else None.
    """

    pixels: Pixels
    tile: int | None


def super_resolve(model: Model, pixels: Pixels) -> Enlarged:
    """Enlarge a photo.

    Args:
        model: From `desra_core.networks.checkpoints.load_model`.
        pixels: ``(H, W)`` or ``(H, W, 1 or 3)`` uint8 or uint16. The network gets gray as three equal
            channels, and the gray result is the luminance of its values.

    Returns:
        The network's values, clamped to 0..1, scaled to the dtype and rounded once, half to even.

    Raises:
        ArgumentError: The photo has another shape or dtype.
        UsageError: The network gives values that are not finite.
        MemoryError: Not even small windows fit into memory.
    """
    check_picture("pixels", pixels)
    if pixels.ndim == 2:
        enlarged = super_resolve(model, pixels[:, :, np.newaxis])
        return enlarged._replace(pixels=enlarged.pixels[:, :, 0])
    (height, width, channels), traits = pixels.shape, model.traits
    sr: Pixels = np.empty((height * model.scale, width * model.scale, channels), pixels.dtype)
    # Extend the photo to the right and below to a size that the network takes.
    margins = [(0, taken - side) for side, taken in zip((height, width), _taken(model, height, width), strict=True)]
    source = pixels
    if any(map(any, margins)):
        source = np.pad(pixels, (*margins, (0, 0)), mode="reflect")  # type: ignore[assignment]
    tile, side = None, traits.tile
    while not _fill(sr, source, model, side):
        side = min(side, max(source.shape[:2]))
        # Half the side, but at least 32 px beside the halos.
        tile = max(side // 2 // traits.multiple * traits.multiple, traits.rounded_up(2 * traits.halo + 32))
        if tile >= side:
            raise MemoryError(f"a window of {side} pixels a side does not fit into the memory of {model.device}")
        side = tile
    return Enlarged(sr, tile)


def inferred_pixels(model: Model, height: int, width: int) -> int:
    """Count the pixels that the network gets for a photo: windows overlap, and small photos are extended."""
    traits = model.traits
    parts = windows(*_taken(model, height, width), side=traits.tile, halo=traits.halo, multiple=traits.multiple)
    return len(parts) * parts[0].source.height * parts[0].source.width


def _taken(model: Model, *sides: int) -> list[int]:
    """Return the sides of a photo after it is extended to a size that the network takes."""
    return [max(model.traits.minimum, model.traits.rounded_up(side)) for side in sides]


def resize_alpha(alpha: Pixels, scale: int) -> Pixels:
    """Enlarge the ``(H, W)`` alpha of a photo, uint8 or uint16, to the size of its result: bilinearly."""
    height, width = alpha.shape
    size = width * scale, height * scale
    return cv2.resize(alpha, size, interpolation=cv2.INTER_LINEAR)  # type: ignore[return-value]


def _fill(sr: Pixels, source: Pixels, model: Model, side: int) -> bool:
    """Write the whole result; return False when memory runs out even with one window at a time."""
    import torch

    todo = windows(*source.shape[:2], side=side, halo=model.traits.halo, multiple=model.traits.multiple)
    # A batch has at most as many pixels as one window of ``side``.
    count = min(len(todo), max(1, side**2 // (todo[0].source.height * todo[0].source.width)))
    while todo:
        fits = True
        try:
            _infer(sr, source, model, todo[:count])
        except (MemoryError, RuntimeError) as error:
            if not lacks_memory(error):
                raise
            fits = False
        if fits:
            todo = todo[count:]
            continue
        # This lies outside of the handler, because in there the traceback still holds the tensors.
        if model.device.startswith("cuda"):
            torch.cuda.empty_cache()
        if count == 1:
            return False
        count //= 2
    return True


def _infer(sr: Pixels, source: Pixels, model: Model, batch: list[Window]) -> None:
    """Enlarge a batch of windows, round the part that each window keeps, and write it to its place in the image."""
    import torch

    scale, largest = model.scale, np.iinfo(source.dtype).max
    stacked = torch.from_numpy(np.stack([source[window.source.slices] for window in batch]))
    # Hold the GPU until the results are in the machine's memory, so that the GPU's is free for the next batch.
    with torch.inference_mode(), exact_on(model.device):
        scaled = stacked.to(model.device).float().div_(largest)  # sent as integers, which are fewer bytes
        values = scaled.expand(-1, -1, -1, 3).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
        results = model(values)
        if not bool(results.isfinite().all()):
            raise UsageError(model.path, NOT_FINITE, "copy or train it again, or use float32")
        for (part, kept), result in zip(batch, results, strict=True):
            top, left = (kept.y - part.y) * scale, (kept.x - part.x) * scale
            target = sr[kept.y * scale : (kept.y + kept.height) * scale, kept.x * scale : (kept.x + kept.width) * scale]
            values = result[:, top : top + target.shape[0], left : left + target.shape[1]].clamp(0, 1)
            if sr.shape[2] == 1:
                red, green, blue = (share * channel for share, channel in zip(LUMINANCE, values, strict=True))
                values = (red + green + blue)[None]
            rounded = values.mul_(largest).round_().to(torch.uint8 if largest == 255 else torch.int32)
            target[:] = rounded.permute(1, 2, 0).contiguous().cpu().numpy()
