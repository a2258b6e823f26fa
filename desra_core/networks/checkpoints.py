"""Load super-resolution networks from checkpoint files."""

from __future__ import annotations

import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cachetools import LRUCache, cached

from desra_core import third_party
from desra_core.errors import UsageError, described
from desra_core.files.hashing import content_key
from desra_core.gpu import exact_on, is_broken, is_unusable
from desra_core.networks.architectures import Traits, traits_of
from desra_core.networks.weights import LOAD_ERRORS, read_weights

if TYPE_CHECKING:
    import torch
    from torch import nn

Precision = Literal["float32", "bfloat16"]

# The networks that a process keeps may take so much together: 12 models like RRDBNet.
KEPT_BYTES = 800_000_000
# Threads of a worker that need the same model wait until one thread has loaded it.
_LOADING = threading.Lock()
# GPUs have the memory for larger windows, which lose less to halos. Where memory runs out, windows become smaller.
_GPU_TILE_FACTOR = 2
_REMEDY = "give the checkpoint of a super-resolution network, such as RRDBNet, SRVGGNetCompact or SwinIR"


@dataclass(frozen=True, eq=False)
class Model:
    """A super-resolution network, and how to run it on windows of an image.

    Attributes:
        path: The checkpoint.
        network: In evaluation mode, its weights float32 and in channels-last format.
        architecture: spandrel's name of the architecture.
        scale: By how much the network enlarges.
        traits: The sizes of windows.
        device: The torch device.
        dtype: The number format in which the network computes.
    """

    path: Path
    network: nn.Module
    architecture: str
    scale: int
    traits: Traits
    device: str
    dtype: torch.dtype

    @property
    def kept_bytes(self) -> int:
        """The size of the weights, but at most a third of `KEPT_BYTES`, to which the sizes of kept networks add up."""
        tensors = (*self.network.parameters(), *self.network.buffers())
        return min(KEPT_BYTES // 3, sum(tensor.nbytes for tensor in tensors))

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        """Run the network on ``(N, 3, h, w)`` values in 0..1; returns ``(N, 3, h * scale, w * scale)``, not clamped.

        Both are float32. On a GPU the network computes exactly, as `desra_core.gpu.exact_on` says.
        """
        import torch

        computing = torch.autocast(batch.device.type, self.dtype, enabled=self.dtype != torch.float32)
        with torch.inference_mode(), computing, exact_on(batch.device.type):
            output: torch.Tensor = self.network(batch)
            return output.float()


def load_model(path: Path, device: str = "cpu", precision: Precision = "float32") -> Model:
    """Load a network, once per process for the same content, device and precision.

    The latest networks are kept, as many as fit into `KEPT_BYTES` and at least three: the pair of a run and a third.

    Args:
        path: Weights of a 3-channel SR network that spandrel knows, saved by torch or safetensors. Code in the file is
            not run.
        device: A torch device, such as ``cpu`` or ``cuda:0``.
        precision: The number format in which the network computes. On a CPU with AVX512-BF16, bfloat16 takes about half
            the time of float32. The results of Real-ESRGAN's three SRVGG networks then had a PSNR of 49 to 65 dB
            against those in float32 (six photos; at most 12 levels of 255 apart).

    Raises:
        UsageError: The file or the device cannot be used.
    """
    with _LOADING:
        return _loaded(path, content_key(path), device, precision)


def load_pair(
    mse_model: Path, gan_model: Path, device: str = "cpu", precision: Precision = "float32"
) -> tuple[Model, Model]:
    """Load an MSE-trained network and its GAN-trained twin; parameters as for `load_model`.

    Raises:
        UsageError: As `load_model`, or their scales differ.
    """
    mse, gan = (load_model(path, device, precision) for path in (mse_model, gan_model))
    if mse.scale != gan.scale:
        reason = f"enlarges by {gan.scale}, but {mse_model} by {mse.scale}"
        raise UsageError(gan_model, reason, "give two models of the same scale")
    return mse, gan


@cached(LRUCache(KEPT_BYTES, getsizeof=lambda model: model.kept_bytes), info=True)
def _loaded(path: Path, _key: str, device: str, precision: Precision) -> Model:
    import torch

    descriptor = recognised(path, precision)
    network = descriptor.model.eval().requires_grad_(False).float()
    requirements = descriptor.size_requirements
    traits = traits_of(descriptor.architecture.id, network, requirements.multiple_of, requirements.minimum)
    if precision == "bfloat16" and traits.last is not None:
        _keep_float32(traits.last)
    if device != "cpu":
        traits = traits._replace(tile=traits.tile * _GPU_TILE_FACTOR)
    try:
        network.to(device, memory_format=torch.channels_last)
    except (AssertionError, RuntimeError) as error:
        if is_broken(error):
            raise
        raise _no_device(device, error) from None
    name, scale = str(descriptor.architecture.name), int(descriptor.scale)
    model = Model(path, network, name, scale, traits, device, getattr(torch, precision))
    _try_out(model)
    return model


def recognised(path: Path, precision: Precision = "float32") -> Any:
    """Find the network that the weights of a file are for; returns spandrel's descriptor with that network.

    Raises:
        UsageError: As `load_model`, but for the device.
    """
    third_party.mend_torchvision()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of SwinIR, about torch.meshgrid
        from spandrel import ModelLoader, UnsupportedModelError

        weights = read_weights(path)
        try:
            descriptor = ModelLoader().load_from_state_dict(weights)
        except UnsupportedModelError:
            raise UsageError(path, "is of no architecture that spandrel knows", _REMEDY) from None
        except LOAD_ERRORS as error:
            reason = f"does not fit the architecture that it looks like ({described(error)})"
            raise UsageError(path, reason, _REMEDY) from None
    name = descriptor.architecture.name
    if descriptor.purpose != "SR":
        raise UsageError(path, f"is a network for {descriptor.purpose.lower()} ({name})", _REMEDY)
    channels = descriptor.input_channels, descriptor.output_channels
    if channels != (3, 3):
        remedy = "give a network for colour images: gray images are given to it as three equal channels"
        raise UsageError(path, f"maps {channels[0]} channels to {channels[1]} ({name})", remedy)
    if int(descriptor.scale) != descriptor.scale or descriptor.scale < 2:
        raise UsageError(path, f"enlarges by {descriptor.scale} ({name})", "give a network of scale 2, 3, 4 or so")
    if precision == "bfloat16" and not descriptor.supports_bfloat16:
        raise UsageError(path, f"is a network that cannot compute in bfloat16 ({name})", "use float32")
    return descriptor


def _keep_float32(module: Any) -> None:
    """Exempt the last module from autocast: in bfloat16, results above 0.5 are multiples of 1/256."""
    import torch

    forward = module.forward

    def in_float32(values: torch.Tensor) -> torch.Tensor:
        with torch.autocast(values.device.type, enabled=False):
            return forward(values.float())  # type: ignore[no-any-return]

    module.forward = in_float32


def _no_device(device: str, error: Exception) -> UsageError:
    remedy = "use cpu, or cuda with a driver and a torch for it"
    return UsageError(f"device {device!r}", f"cannot be used ({described(error)})", remedy)


def _try_out(model: Model) -> None:
    """Run the network on a small image, which shows whether it can be run and enlarges by its scale."""
    import torch

    multiple = model.traits.multiple
    side = -(-max(16, model.traits.minimum) // multiple) * multiple
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            shape = tuple(model(torch.zeros((1, 3, side, side), device=model.device)).shape)
    except LOAD_ERRORS as error:
        if is_broken(error):
            raise
        if is_unusable(error):
            raise _no_device(model.device, error) from None
        raise UsageError(model.path, f"cannot be run ({model.architecture}: {described(error)})", _REMEDY) from None
    if shape != (1, 3, side * model.scale, side * model.scale):
        reason = f"does not enlarge images by {model.scale} ({model.architecture})"
        raise UsageError(model.path, reason, _REMEDY)
