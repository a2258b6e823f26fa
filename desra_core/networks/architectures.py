"""The measured SR architectures: the halo that a window needs, and which architectures can be finetuned.

A new architecture is an entry in `ARCHITECTURES`, by spandrel's id. Its function gets the loaded network and may change
it into an equivalent, faster form. spandrel's other architectures run with a generous halo, and cannot be finetuned.
docs/design.md ("Halos and windows") has the measurements.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch


class Traits(NamedTuple):
    """How to run a network on windows of an image. Lengths are in LR pixels."""

    halo: int  # the context that a result pixel needs around it
    # The largest side of a window, by default. On a CPU, a window of this side takes less than 1 GB.
    tile: int
    multiple: int = 1  # positions and sizes of windows are multiples of this
    minimum: int = 1  # the least side of a window
    # The last module, which computes in float32 where the others compute in bfloat16.
    last: torch.nn.Module | None = None
    # How many times larger windows are on a GPU, which has the memory: they lose less to halos.
    on_gpu: int = 2

    def rounded_up(self, length: int) -> int:
        """Round a length up to a multiple of ``multiple``."""
        return -(-length // self.multiple) * self.multiple


class Architecture(NamedTuple):
    """What is known of an architecture.

    ``traits`` returns the traits of a network. ``trainable`` is the usual name of an architecture that can be
    finetuned. ``compiled`` returns the network with its parts compiled by a function, where that is faster.
    """

    traits: Callable[[Any], Traits]
    trainable: str | None = None
    compiled: Callable[[Any, Callable[[Any], Any]], Any] | None = None


def traits_of(architecture: str, network: Any, multiple: int, minimum: int) -> Traits:
    """Find how to run a network.

    Args:
        architecture: spandrel's id of the network's architecture.
        network: The loaded network, on the CPU, in evaluation mode.
        multiple, minimum: The sizes that the network takes, as spandrel says, in pixels. Used for an architecture
            without an entry in `ARCHITECTURES`.
    """
    if architecture in ARCHITECTURES:
        traits = ARCHITECTURES[architecture].traits(network)
    else:
        window = getattr(network, "window_size", 1)
        multiple = math.lcm(multiple, window if isinstance(window, int) else 1)
        traits = Traits(halo=48, tile=256, multiple=multiple, minimum=minimum)
    lengths = traits.halo, traits.minimum, max(traits.tile, 4 * traits.halo)
    halo, minimum, tile = map(traits.rounded_up, lengths)
    return traits._replace(halo=halo, minimum=minimum, tile=tile)


def _compact(network: Any) -> Traits:
    """SRVGGNetCompact: a chain of 3x3 convolutions, so a halo of one pixel for each is exact."""
    return Traits(halo=_convolutions(network), tile=768, last=network.body[-1])


def _span(network: Any) -> Traits:
    """SPAN: 3x3 convolutions beside 1x1 ones, so a halo of one pixel for each 3x3 convolution is exact."""
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if hasattr(child, "eval_conv"):
                # Fold three convolutions into one, once: otherwise every call does so.
                child.update_params()
                setattr(module, name, child.eval_conv)
    return Traits(halo=_convolutions(network), tile=384, last=network.upsampler[0])


def _rrdb(network: Any) -> Traits:
    """RRDBNet (ESRGAN, Real-ESRGAN, BSRGAN): 350 convolutions, but pixels beyond this halo have little weight.

    The layers after the blocks work at the size of the result and would take most of the memory, so they run strip by
    strip: that leaves room for windows large enough for the halo.
    """
    from torch import nn

    unshuffle, last = network.shuffle_factor or 1, network.model[-1]
    network.model = nn.Sequential(*network.model[:2], _in_strips(network.model[2:]))
    return Traits(halo=64 * unshuffle, tile=608 * unshuffle, multiple=unshuffle, last=last)


def _compiled_rrdb(network: Any, compiled: Callable[[Any], Any]) -> Any:
    """Compile the layers that work at the size of the photo, and those that work strip by strip."""
    from torch import nn

    layers = network.model[-1]
    del layers.forward  # that of `_in_strips`
    network.model = nn.Sequential(compiled(network.model[:-1]), _in_strips(nn.Sequential(compiled(layers))))
    return network


def _in_strips(layers: torch.nn.Sequential) -> torch.nn.Sequential:
    """Have layers, of which a result pixel sees two pixels around it, compute strips of 32 rows."""
    import torch

    forward: Callable[[torch.Tensor], torch.Tensor] = layers.forward
    rows, halo = 32, 2

    def by_strips(values: torch.Tensor) -> torch.Tensor:
        height, strips = values.shape[2], []
        for start in range(0, height, rows):
            top, end = max(0, start - halo), min(height, start + rows)
            part = values[:, :, top : end + halo]
            strip = forward(part)
            scale = strip.shape[2] // part.shape[2]
            strips.append(strip[:, :, (start - top) * scale : (end - top) * scale])
        return torch.cat(strips, dim=2)

    layers.forward = by_strips  # type: ignore[method-assign]
    return layers


def _swinir(network: Any) -> Traits:
    """SwinIR: windows lie on the grid of its attention windows, and all blocks share the same attention masks.

    Otherwise each block would compute its own masks on the CPU in every call. With a GPU, that would take most of the
    time: a window of 256 pixels has 36 masks of 17 MB.
    """
    blocks = [module for module in network.modules() if hasattr(module, "calculate_mask")]
    calculate = {block.shift_size: block.calculate_mask for block in blocks}

    @lru_cache(maxsize=4)
    def mask(shift: int, size: tuple[int, int]) -> torch.Tensor:
        values: torch.Tensor = calculate[shift](size)
        return values.to(network.conv_first.weight.device)

    for block in blocks:
        block.calculate_mask = partial(mask, block.shift_size)
    multiple = network.window_size * network.start_unshuffle
    last = getattr(network, "conv_last", None)
    return Traits(halo=48 * network.start_unshuffle, tile=256, multiple=multiple, last=last)


def _rlfn(network: Any) -> Traits:
    """RLFN: its attention stretches a coarse map over the whole window, so results depend on windows.

    Hence windows are large, and the same on all devices.
    """
    from desra_core.networks.rlfn import LEAST_SIDE

    return Traits(halo=32, tile=832, minimum=LEAST_SIDE, last=network.upsampler[0], on_gpu=1)


def _convolutions(network: Any) -> int:
    """Count the 3x3 convolutions of a network."""
    from torch import nn

    return sum(isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) for module in network.modules())


ARCHITECTURES = {
    "Compact": Architecture(_compact, "SRVGGNetCompact", lambda network, compiled: compiled(network)),
    "ESRGAN": Architecture(_rrdb, "RRDBNet", _compiled_rrdb),
    "RLFN": Architecture(_rlfn),
    "SPAN": Architecture(_span),
    "SwinIR": Architecture(_swinir, "SwinIR"),
}
