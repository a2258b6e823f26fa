"""Load super-resolution networks from checkpoint files."""

from __future__ import annotations

import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cachetools import LRUCache, cached

from desra_core import third_party
from desra_core.errors import UsageError
from desra_core.files.hashing import content_key
from desra_core.gpu import exact_on, is_broken, is_unusable

if TYPE_CHECKING:
    import torch
    from torch import nn

Precision = Literal["float32", "bfloat16"]

# The networks that a process keeps may take so much together: 12 models like RRDBNet.
KEPT_BYTES = 800_000_000
# A worker's threads that need a model at the same time wait for one of them to load it.
_LOADING = threading.Lock()
# GPUs have the memory for larger windows, which lose less to halos; where one does not, windows shrink by themselves.
_GPU_TILE_FACTOR = 2
_REMEDY = "give the checkpoint of a super-resolution network, such as RRDBNet, SRVGGNetCompact or SwinIR"
# spandrel and the networks raise these where weights look like those of an architecture, but do not fit it.
_MISFIT_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True, eq=False)
class Model:
    """A super-resolution network and how to run it on windows of an image. Lengths are in LR pixels."""

    path: Path
    network: nn.Module
    """In evaluation mode, its weights float32 and in channels-last format."""
    architecture: str
    scale: int
    halo: int
    """The context that a result pixel needs around it."""
    multiple: int
    """Windows start at multiples of it, and their sizes are multiples of it."""
    minimum: int
    """The least side of a window."""
    tile: int
    """The largest default side of a window."""
    device: str
    dtype: torch.dtype
    """The number format in which the network computes."""

    @property
    def kept_bytes(self) -> int:
        """The size that counts among the networks that are kept: its weights, but at most a third of all."""
        tensors = (*self.network.parameters(), *self.network.buffers())
        return min(KEPT_BYTES // 3, sum(tensor.nbytes for tensor in tensors))

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        """Run the network on ``(N, 3, h, w)`` values in 0..1; returns ``(N, 3, h * scale, w * scale)``, not clamped.

        Both are float32. On a GPU float32 means just that, not TF32, and what it gives can be reproduced.
        """
        import torch

        computing = torch.autocast(batch.device.type, self.dtype, enabled=self.dtype != torch.float32)
        with torch.inference_mode(), computing, exact_on(batch.device.type):
            output: torch.Tensor = self.network(batch)
            return output.float()


def load_model(path: Path, device: str = "cpu", precision: Precision = "float32") -> Model:
    """Load a network, once per process for the same content, device and precision.

    The latest ones are kept, as many as fit into `KEPT_BYTES` and at least three: the pair of a run and one more.

    Args:
        path: Weights of a 3-channel SR network that spandrel knows, as torch or safetensors saves them. Cannot run
            code.
        device: A torch device, such as ``cpu`` or ``cuda:0``.
        precision: The number format in which it computes. On a CPU with AVX512-BF16, bfloat16 takes about half the time
            of float32, and the three networks of Real-ESRGAN with SRVGG layers then gave results at 49 to 65 dB of
            those in float32 (six photos; 12 levels of 255 at most). Casting whole networks took as long and gave 0.3 to
            6 dB less.

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

    from desra_core.networks.architectures import traits_of

    descriptor = recognised(path, precision)
    network = descriptor.model.eval().requires_grad_(False).float()
    requirements = descriptor.size_requirements
    traits = traits_of(descriptor.architecture.id, network, requirements.multiple_of, requirements.minimum)
    if precision == "bfloat16" and traits.last is not None:
        _keep_float32(traits.last)
    try:
        network.to(device, memory_format=torch.channels_last)
    except (AssertionError, RuntimeError) as error:
        if is_broken(error):
            raise
        raise _no_device(device, error) from None
    model = Model(
        path=path,
        network=network,
        architecture=str(descriptor.architecture.name),
        scale=int(descriptor.scale),
        halo=traits.halo,
        multiple=traits.multiple,
        minimum=traits.minimum,
        tile=traits.tile * (1 if device == "cpu" else _GPU_TILE_FACTOR),
        device=device,
        dtype=getattr(torch, precision),
    )
    _try_out(model)
    return model


def recognised(path: Path, precision: Precision = "float32") -> Any:
    """Recognise the network that the weights of a file are for; returns spandrel's descriptor with that network.

    Raises:
        UsageError: As `load_model`, but for the device.
    """
    third_party.mend_torchvision()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of SwinIR, about torch.meshgrid
        from spandrel import ModelLoader, UnsupportedModelError

        from desra_core.networks.weights import read_weights

        weights = read_weights(path)
        try:
            descriptor = ModelLoader().load_from_state_dict(weights)
        except UnsupportedModelError:
            raise UsageError(path, "is of no architecture that spandrel knows", _REMEDY) from None
        except _MISFIT_ERRORS as error:
            reason = f"does not fit the architecture that it looks like ({type(error).__name__}: {error})"
            raise UsageError(path, " ".join(reason.split())[:300], _REMEDY) from None
    _check_purpose(descriptor, path, precision)
    return descriptor


def _check_purpose(descriptor: Any, path: Path, precision: Precision) -> None:
    name = descriptor.architecture.name
    if descriptor.purpose != "SR":
        raise UsageError(path, f"is a network for {descriptor.purpose.lower()} ({name})", _REMEDY)
    channels = descriptor.input_channels, descriptor.output_channels
    if channels != (3, 3):
        remedy = "give a network for colour images: it gets gray ones as three equal channels"
        raise UsageError(path, f"maps {channels[0]} channels to {channels[1]} ({name})", remedy)
    if int(descriptor.scale) != descriptor.scale or descriptor.scale < 2:
        raise UsageError(path, f"enlarges by {descriptor.scale} ({name})", "give a network of scale 2, 3, 4 or so")
    if precision == "bfloat16" and not descriptor.supports_bfloat16:
        raise UsageError(path, f"is a network that cannot compute in bfloat16 ({name})", "use float32")


def _keep_float32(module: Any) -> None:
    """Exempt the last module from autocast: in bfloat16, results above 0.5 are multiples of 1/256."""
    import torch

    forward = module.forward

    def in_float32(values: torch.Tensor) -> torch.Tensor:
        with torch.autocast(values.device.type, enabled=False):
            return forward(values.float())  # type: ignore[no-any-return]

    module.forward = in_float32


def _no_device(device: str, error: Exception) -> UsageError:
    return UsageError(f"device {device!r}", f"cannot be used ({' '.join(str(error).split())[:200]})",
                      "use cpu, or cuda with a driver and a torch for it")  # fmt: skip


def _try_out(model: Model) -> None:
    """Run the network on a small image: it must map it to one of `scale` times its size (raises `UsageError`)."""
    import torch

    side = -(-max(16, model.minimum) // model.multiple) * model.multiple
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            shape = tuple(model(torch.zeros((1, 3, side, side), device=model.device)).shape)
    except _MISFIT_ERRORS as error:
        if is_broken(error):
            raise
        if is_unusable(error):
            raise _no_device(model.device, error) from None
        problem = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UsageError(model.path, f"cannot be run ({model.architecture}: {problem})", _REMEDY) from None
    if shape != (1, 3, side * model.scale, side * model.scale):
        raise UsageError(model.path, f"does not enlarge images by {model.scale} ({model.architecture})",
                         _REMEDY)  # fmt: skip
