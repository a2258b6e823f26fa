"""The measured SR architectures: the halo that a window needs, and which architectures can be finetuned.

A new architecture is an entry in `ARCHITECTURES`, by spandrel's id. Its function gets the loaded network and may change
it into an equivalent, faster form. spandrel's other architectures run with a generous halo, and cannot be finetuned.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch


class Traits(NamedTuple):
    """How to run a network on windows of an image. Lengths are in LR pixels.

    Attributes:
        halo: The context that a result pixel needs around it.
        tile: The largest default side of a window, with which a network takes less than 1 GB on a CPU.
        multiple: Positions and sizes of windows are multiples of this.
        minimum: The least side of a window.
        last: The last module, which computes in float32 where the others compute in bfloat16.
    """

    halo: int
    tile: int
    multiple: int = 1
    minimum: int = 1
    last: torch.nn.Module | None = None


class Architecture(NamedTuple):
    """A function that returns the traits of a network, and the usual name of an architecture that can be finetuned."""

    traits: Callable[[Any], Traits]
    trainable: str | None = None


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
    halo, minimum, tile = (
        -(-length // traits.multiple) * traits.multiple
        for length in (traits.halo, traits.minimum, max(traits.tile, 4 * traits.halo))
    )
    return traits._replace(halo=halo, minimum=minimum, tile=tile)


def _compact(network: Any) -> Traits:
    """SRVGGNetCompact: a chain of 3x3 convolutions, so a halo of one pixel for each is exact.

    With a halo of 34, windows of 256 pixels compute 1.9 times what they keep, of 768 pixels 1.2 times. But above 352
    (480 in bfloat16) a buffer is more than 32 MB, and malloc has the system map it anew each time. That makes
    float32 1.7 times as slow, unless torch is started with ``THP_MEM_ALLOC_ENABLE=1``: then 1.05 times.
    """
    return Traits(halo=_convolutions(network), tile=768, last=network.body[-1])


def _span(network: Any) -> Traits:
    """SPAN: 3x3 convolutions beside 1x1 ones, so a halo of one pixel for each of them is exact."""
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if hasattr(child, "eval_conv"):
                # Fold three convolutions into one, once: otherwise every call does so.
                child.update_params()
                setattr(module, name, child.eval_conv)
    return Traits(halo=_convolutions(network), tile=384, last=network.upsampler[0])


def _rrdb(network: Any) -> Traits:
    """RRDBNet (ESRGAN, Real-ESRGAN, BSRGAN): 350 convolutions, of which far pixels have next to no weight.

    The largest error by halo, 23 blocks, in levels of 255 where the output's range is four standard deviations:

    ==============================================  ======  ======  ======  ======
    network                                         16 px   20 px   24 px   32 px
    ==============================================  ======  ======  ======  ======
    initialised by basicsr                          0.001   0.001   0.001   0.001
    every dense block adds 1 std of its input       3.3     0.42    0.059   0.002
    the same, all weights of the blocks positive    3.5     0.65    0.067   0.001
    the second, trained for 60 steps                1.4     0.36    0.040   0.002
    ==============================================  ======  ======  ======  ======

    Measured on a photo and on noise whose right half was cut off (float32 itself makes errors of 0.002), without
    trained weights. With pixel-unshuffle, the network works at half the size.
    """
    unshuffle = network.shuffle_factor or 1
    return Traits(halo=32 * unshuffle, tile=320 * unshuffle, multiple=unshuffle, last=network.model[-1])


def _swinir(network: Any) -> Traits:
    """SwinIR: windows lie on the grid of its attention windows.

    The largest error by halo, measured as for RRDBNet, real-world configurations M and L:

    ==============================================  ===========  ===========  ============
    network                                         32 px        40 px        48 px
    ==============================================  ===========  ===========  ============
    initialised (M)                                 0.0003       0.0003       0.0003
    every branch adds 1 std of its input (M, L)     0.10, 0.50   0.02, 0.12   0.003, 0.03
    the same, attention 64 times as sharp (M, L)    0.87, 1.7    0.28, 0.78   0.10, 0.28
    ==============================================  ===========  ===========  ============
    """
    _share_masks(network)
    multiple = network.window_size * network.start_unshuffle
    last = getattr(network, "conv_last", None)
    return Traits(halo=48 * network.start_unshuffle, tile=256, multiple=multiple, last=last)


def _convolutions(network: Any) -> int:
    """Count the 3x3 convolutions of a network."""
    from torch import nn

    return sum(isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) for module in network.modules())


def _share_masks(network: Any) -> None:
    """Let all blocks use the same attention masks.

    Otherwise each block computes its masks on the CPU in every call. With a GPU that takes most of the time: 36 masks
    of 17 MB for a window of 256 pixels.
    """
    blocks = {module.shift_size: module for module in network.modules() if hasattr(module, "calculate_mask")}
    calculate = {shift: block.calculate_mask for shift, block in blocks.items()}

    @lru_cache(maxsize=4)
    def mask(shift: int, size: tuple[int, int]) -> torch.Tensor:
        values: torch.Tensor = calculate[shift](size)
        return values.to(network.conv_first.weight.device)

    for module in network.modules():
        if hasattr(module, "calculate_mask"):
            module.calculate_mask = partial(mask, module.shift_size)


ARCHITECTURES = {
    "Compact": Architecture(_compact, "SRVGGNetCompact"),
    "ESRGAN": Architecture(_rrdb, "RRDBNet"),
    "SPAN": Architecture(_span),
    "SwinIR": Architecture(_swinir, "SwinIR"),
}
