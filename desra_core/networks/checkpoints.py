"""Read checkpoint files without running code in them, write them, and load super-resolution networks.

torch is imported where it is used.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import struct
import threading
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from cachetools import LRUCache, cached

from desra_core.errors import TransientError, UsageError, described
from desra_core.files import content_key, replace_file
from desra_core.gpu import exact_on, is_broken, is_unusable
from desra_core.networks.architectures import ARCHITECTURES, Traits, traits_of

if TYPE_CHECKING:
    import torch
    from torch import nn

Precision = Literal["float32", "bfloat16"]
# How a network computes: in which number format, by PyTorch or by OpenVINO. On a GPU, and for architectures without a
# compiled form in `ARCHITECTURES`, OpenVINO gives way to PyTorch.
Engine = Literal["float32", "bfloat16", "openvino-float32", "openvino-bfloat16"]

# The word for a reference without a checkpoint: bicubic enlargement by the scale of the GAN model.
BICUBIC = "bicubic"

# Memory for all networks that a process keeps: about 12 networks like RRDBNet.
KEPT_BYTES = 800_000_000
# Threads of a worker that need the same model wait until one thread has loaded it.
_LOADING = threading.Lock()
_REMEDY = "give the checkpoint of a super-resolution network, such as RRDBNet, SRVGGNetCompact or SwinIR"

# Raised by torch.load, safetensors, spandrel and mmcv for files that are damaged, or no checkpoint or config, and by
# networks that do not fit the weights or the config.
LOAD_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError, MemoryError, NameError,
    OSError, RuntimeError, SyntaxError, TypeError, ValueError, pickle.UnpicklingError, struct.error,
    zipfile.BadZipFile,
)  # fmt: skip

# Tools put these prefixes before the names of a network's tensors. They come from nested dicts in a checkpoint, from
# torch.compile, DataParallel and AveragedModel, and from the attribute of a trainer that holds the network.
_EMA_WRAPPERS = (
    "params_ema.", "params-ema.", "net_g_ema.", "netG_ema.", "generator_ema.", "model_ema.", "ema_model.",
    "ema_state_dict.", "ema_model_state_dict.", "model_ema_state_dict.", "ema.",
)  # fmt: skip
_WRAPPERS = (
    *_EMA_WRAPPERS, "model_state_dict.", "state_dict.", "params.", "_orig_mod.", "module.", "net_g.", "netG.",
    "generator.", "model.", "net.", "network.",
)  # fmt: skip

# What checkpoints hold beside weights and Python's own types: values of NumPy 1 and 2, and mmengine's training log with
# the ``getattr`` by which its pickle finds methods.
_LEFT_OUT = (
    "mmengine.logging.history_buffer.HistoryBuffer", "builtins.getattr", "__builtin__.getattr", "numpy.ndarray",
    "numpy.dtype",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *(f"numpy.dtypes.{type(np.dtype(kind)).__name__}" for kind in np.typecodes["AllInteger"] + "?efdg"),
)  # fmt: skip
# The largest sum of an archive's records, as a multiple of the file's size.
_MOST_UNPACKED = 4
# The largest number of names in a checkpoint; the networks here have up to a few thousand.
_MOST_NAMES = 100_000

_RESAVE = "load it with torch.load(path, weights_only=False) and torch.save its weights alone"


@dataclass(frozen=True, eq=False)
class Model:
    """A super-resolution network, and how to run it on windows of an image.

    Attributes:
        path: The checkpoint; of bicubic enlargement the word.
        network: In evaluation mode, its weights float32 and in channels-last format.
        architecture: spandrel's name of the architecture.
        scale: By how much the network enlarges.
        traits: The sizes of windows.
        device: The torch device.
        dtype: The number format in which the network computes.
    """

    path: Path
    network: nn.Module = field(repr=False)
    architecture: str
    scale: int
    traits: Traits = field(repr=False)
    device: str
    dtype: torch.dtype

    @property
    def kept_bytes(self) -> int:
        """The bytes that count towards `KEPT_BYTES`: those of the weights, at most a third, so three models fit."""
        tensors = (*self.network.parameters(), *self.network.buffers())
        compiled = sum(getattr(module, "weight_bytes", 0) for module in self.network.modules())
        return min(KEPT_BYTES // 3, sum(tensor.nbytes for tensor in tensors) + compiled)

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        """Run the network on ``(N, 3, h, w)`` values in 0..1; returns ``(N, 3, h * scale, w * scale)``, not clamped.

        Input and output are float32. On a GPU the network computes exactly, as `desra_core.gpu.exact_on` says.
        """
        import torch

        computing = torch.autocast(batch.device.type, self.dtype, enabled=self.dtype != torch.float32)
        with torch.inference_mode(), computing, exact_on(batch.device.type):
            output: torch.Tensor = self.network(batch)
            return output.float()


def load_model(path: Path | str, device: str = "cpu", engine: Engine = "float32") -> Model:
    """Load a network, once per process for the same content, device and engine.

    A process keeps the latest networks, as many as fit into `KEPT_BYTES` and at least three: a run's pair and one more.

    Args:
        path: Weights of a 3-channel SR network that spandrel knows, saved by torch or safetensors. Code in the file is
            not run.
        device: A torch device, such as ``cpu`` or ``cuda:0``.
        engine: How the network computes: see `Engine`. OpenVINO's need the extra ``openvino``. On a CPU with
            AVX512-BF16, bfloat16 takes about half the time of float32, with AMX a fifth. The results of Real-ESRGAN's
            three SRVGG networks then had a PSNR of 49 to 65 dB against those in float32 (six photos; at most 12 levels
            of 255 apart); docs/design.md has those of RRDBNet.

    Raises:
        UsageError: The file or the device cannot be used, or OpenVINO is not installed.
    """
    with _LOADING:
        return _loaded(Path(path), content_key(Path(path)), device, engine)


def load_pair(
    mse_model: Path | str, gan_model: Path | str, device: str = "cpu", engine: Engine = "float32"
) -> tuple[Model, Model]:
    """Load a GAN-trained network and the reference that it is compared with, in the order reference, GAN.

    Args:
        mse_model: A checkpoint, best of the GAN model's MSE-trained twin; or the word `BICUBIC`.
        gan_model, device, engine: As for `load_model`.

    Raises:
        UsageError: As `load_model`, or their scales differ.
    """
    gan = load_model(gan_model, device, engine)
    mse = load_reference(mse_model, gan.scale, device, engine)
    if mse.scale != gan.scale:
        reason = f"enlarges by {gan.scale}, but {mse_model} by {mse.scale}"
        raise UsageError(gan_model, reason, "give two models of the same scale")
    return mse, gan


def load_reference(mse_model: Path | str, scale: int, device: str = "cpu", engine: Engine = "float32") -> Model:
    """Load the reference of a GAN model of this scale; otherwise as `load_pair`, but scales are not compared."""
    if mse_model != BICUBIC:
        return load_model(Path(mse_model), device, engine)
    import torch

    from desra_core.networks.bicubic import REACH, Bicubic

    return Model(Path(BICUBIC), Bicubic(scale), BICUBIC, scale, Traits(REACH, tile=512), device, torch.float32)


@cached(LRUCache(KEPT_BYTES, getsizeof=lambda model: model.kept_bytes), info=True)
def _loaded(path: Path, _key: str, device: str, engine: Engine) -> Model:
    import torch

    precision: Precision = "bfloat16" if "bfloat16" in engine else "float32"
    descriptor = recognised(path, precision)
    network = descriptor.model.eval().requires_grad_(False).float()
    requirements = descriptor.size_requirements
    traits = traits_of(descriptor.architecture.id, network, requirements.multiple_of, requirements.minimum)
    known = ARCHITECTURES.get(descriptor.architecture.id)
    if engine.startswith("openvino") and device == "cpu" and known and known.compiled:
        from desra_core.networks.openvino import Compiled

        network = known.compiled(network, partial(Compiled, bfloat16=precision == "bfloat16"))
        precision = "float32"  # of all that PyTorch still does
    elif precision == "bfloat16" and traits.last is not None:
        _keep_float32(traits.last)
    if device != "cpu":
        traits = traits._replace(tile=traits.tile * traits.on_gpu)
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


def spandrel() -> Any:
    """Import spandrel, and add the architectures of this package that it lacks."""
    import_module("desra_core.networks.rlfn")
    return import_module("spandrel")


def recognised(path: Path, precision: Precision = "float32") -> Any:
    """Find the network that the weights of a file are for; returns spandrel's descriptor with that network.

    Raises:
        UsageError: As for `load_model`, except about the device.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SwinIR warns about torch.meshgrid
        weights = read_weights(path)
        numbers = re.findall(r"\d+", " ".join(weights))
        if max(map(len, numbers), default=0) > 9 or max(map(int, numbers), default=0) > max(1000, 10 * len(weights)):
            raise UsageError(path, "numbers its layers higher than it has any", _REMEDY)
        try:
            _check_shapes(weights)
            descriptor = spandrel().ModelLoader().load_from_state_dict(weights)
        except spandrel().UnsupportedModelError:
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


def _check_shapes(weights: dict[str, Any]) -> None:
    """Raise `RuntimeError` for weights that do not fit their network, where it can be built without memory for it.

    A small file may describe a network that is larger than the machine's memory.
    """
    import torch

    try:
        with torch.device("meta"):
            spandrel().ModelLoader().load_from_state_dict(dict(weights))
    except LOAD_ERRORS as error:  # the architectures that compute values as they are built cannot be built so
        if "loading state_dict" in str(error):
            raise


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
    """Run the network on a small picture, to see whether it can be run, enlarges by its scale and sees anything."""
    import torch

    side = model.traits.rounded_up(max(16, model.traits.minimum))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = model(torch.from_numpy(trial_picture(side)).to(model.device))
    except LOAD_ERRORS as error:
        if is_broken(error):
            raise
        if is_unusable(error):
            raise _no_device(model.device, error) from None
        raise UsageError(model.path, f"cannot be run ({model.architecture}: {described(error)})", _REMEDY) from None
    if tuple(result.shape) != (1, 3, side * model.scale, side * model.scale):
        reason = f"does not enlarge images by {model.scale} ({model.architecture})"
        raise UsageError(model.path, reason, _REMEDY)
    values = result.float().cpu().numpy()
    if not np.isfinite(values).all():
        raise UsageError(model.path, "gives values that are not finite", "copy or train it again, or use float32")
    if (values.max((2, 3)) == values.min((2, 3))).all():
        raise UsageError(model.path, "gives one colour for any picture", "copy or train it again")


def trial_picture(side: int) -> npt.NDArray[np.float32]:
    """Make a picture to try networks on, ``(1, 3, side, side)`` in 0..1: from dark to bright, with noise."""
    ramp = np.linspace(0, 1, side)
    noise = np.random.default_rng(0).uniform(-0.1, 0.1, (3, side, side))
    picture = np.stack([np.add.outer(0 * ramp, ramp), np.add.outer(ramp, ramp) / 2, np.add.outer(ramp, 0 * ramp)])
    return np.clip(picture + noise, 0, 1)[None].astype(np.float32)


def check_pair(mse: Model, gan: Model) -> None:
    """Check that a GAN model does something else than its reference, and than to repeat pixels.

    Args:
        mse, gan: From `load_pair`.

    Raises:
        UsageError: It gives the very results of the reference, or the pixels of a picture as they are.
    """
    import torch

    traits = [mse.traits, gan.traits]
    least = max(16, *(each.minimum for each in traits))
    side = math.lcm(*(each.multiple for each in traits))
    picture = torch.from_numpy(trial_picture(-(-least // side) * side)).to(gan.device)
    result = gan(picture)
    if torch.equal(result, mse(picture)):
        raise UsageError(gan.path, f"gives the very results of {mse.path}", "give the GAN model and its MSE twin")
    if torch.equal(result, picture.repeat_interleave(gan.scale, 2).repeat_interleave(gan.scale, 3)):
        raise UsageError(gan.path, "gives back the pixels of a picture as they are", "copy or train it again")


def read_weights(path: Path) -> dict[str, Any]:
    """Read the tensors of a checkpoint by name, onto the CPU.

    Args:
        path: A file of ``torch.save`` or of safetensors, whatever its suffix. Names of tensors may have the prefixes
            of other tools, Lightning and torch.compile, in any order. Averaged weights, such as those below
            ``params_ema``, are preferred to raw ones.

    Raises:
        UsageError: The file is no checkpoint, only a part of one, would run code, holds several networks, or values
            that are not finite.
    """
    weights = list(_kinds(path).values())[-1]
    _check_values(path, weights)
    return weights


def read_kinds(path: Path) -> dict[str, dict[str, Any]]:
    """Read both kinds of weights that a training tool saves, ``raw`` and ``ema``; only ``raw`` where they are equal.

    Raises:
        UsageError: As `read_weights`.
    """
    import torch

    kinds = _kinds(path)
    for weights in kinds.values():
        _check_values(path, weights)
    raw, *rest = kinds.values()
    alike = (ema.keys() == raw.keys() and all(torch.equal(raw[name], ema[name]) for name in raw) for ema in rest)
    return {"raw": raw} if all(alike) else kinds


def load_checkpoint(path: Path, resave: str) -> Any:
    """Read a file of ``torch.save`` onto the CPU, without running code in it.

    Values of NumPy, and the training log that mmengine saves beside weights, are left out.

    Args:
        path: The file.
        resave: How to save the weights of a trusted file alone, for the error about code in the file.

    Raises:
        UsageError: The file is no checkpoint, only a part of one, or would run code.
    """
    import torch

    # NumPy's own classes would let a file write anywhere into memory, so nothing of NumPy is made.
    torch.serialization.add_safe_globals([(_LeftOut, name) for name in _LEFT_OUT])
    try:
        with path.open("rb") as file, warnings.catch_warnings(action="ignore"):  # about old forms of pickles
            _check_archive(file)
            # Given a path, torch would judge the file by its suffix.
            return torch.load(file, map_location="cpu", weights_only=True)
    except LOAD_ERRORS as error:
        if "TorchScript" in str(error):
            remedy = "load it with torch.jit.load where you trust it, and torch.save its state_dict()"
            raise UsageError(path, "is a TorchScript program, not a checkpoint", remedy) from None
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            reason = f"holds an object of {refused[1]} beside its weights, and loading such objects can run code"
            remedy = f"if you trust it, and where {refused[1].partition('.')[0]} is installed, {resave}"
            raise UsageError(path, reason, remedy) from None
        raise _damaged(path) from None


def _damaged(path: Path) -> UsageError:
    return UsageError(path, "is not a checkpoint, or only a part of one", "download or copy the checkpoint again")


def save_torch(path: Path, content: dict[str, Any]) -> None:
    """Write tensors durably; after a failure the file is as it was before (raises `TransientError`)."""
    import torch

    try:
        replace_file(path, lambda file: torch.save(content, file), durable=True)
    except RuntimeError as error:  # raised by torch's writer where a write fails
        raise TransientError(path, "could not be written", "free some space, check the disk and run again") from error


def _check_archive(file: IO[bytes]) -> None:
    """Check that an archive, which torch.save does not compress, does not unpack to much more, and its checksums.

    torch does not check them: it reads weights with a flipped bit as other weights.
    """
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            unpacked = sum(record.file_size for record in archive.infolist())
            if unpacked > _MOST_UNPACKED * file.seek(0, io.SEEK_END) or archive.testzip():
                raise ValueError
    file.seek(0)


class _LeftOut:
    """Stand in for an object that is no part of a network; hold nothing."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        """Ignore the state that the unpickler restores."""


def _kinds(path: Path) -> dict[str, dict[str, Any]]:
    """Find the network's tensors in a file, by the names in the network: ``raw``, ``ema`` or both, in this order."""
    content = _content(path)
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    try:
        networks = list(_networks(_flattened(content)))
    except RecursionError:
        raise UsageError(path, f"nests its names without end, or holds more than {_MOST_NAMES}", _REMEDY) from None
    for wrappers, tensors in networks:
        kind = "ema" if any(f".{wrapper}" in f".{wrappers}" for wrapper in _EMA_WRAPPERS) else "raw"
        other, _ = found.setdefault(kind, (wrappers, tensors))
        if other != wrappers:
            reason = f"holds two networks, {other.rstrip('.')} and {wrappers.rstrip('.')}"
            raise UsageError(path, reason, "torch.save the weights of one of them alone")
    kinds: dict[str, dict[str, Any]] = {kind: found[kind][1] for kind in ("raw", "ema") if kind in found}
    if not kinds:  # another network, such as a discriminator: the wrappers around all of its tensors are removed
        tensors = _flattened(spandrel().canonicalize_state_dict({str(name): value for name, value in content.items()}))
        while wrapper := next((w for w in _WRAPPERS if tensors and all(name.startswith(w) for name in tensors)), None):
            tensors = {name.removeprefix(wrapper): value for name, value in tensors.items()}
        kinds = {"raw": tensors}
    if not all(kinds.values()):
        raise UsageError(path, "holds no weights", _REMEDY)
    return kinds


def _check_values(path: Path, weights: Mapping[str, Any]) -> None:
    """Check that tensors hold as many values as they claim, side by side, and that all of these are finite."""
    import torch

    most = _MOST_UNPACKED * path.stat().st_size
    for name, value in weights.items():
        plain = value.layout is torch.strided and value.device.type == "cpu"
        plain = plain and not (value.is_nested or value.is_quantized or value.is_complex())
        if not plain or value.nbytes > min(value.untyped_storage().nbytes(), most):
            raise UsageError(path, f"holds {name} in another form than all its values side by side", _REMEDY)
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise UsageError(path, f"has values in {name} that are not finite", "copy or train it again")


def _content(path: Path) -> Mapping[Any, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    content_key(path)  # raises where there is no such file
    with path.open("rb") as file:
        is_safetensors = file.read(9)[8:] == b"{"  # after eight bytes with the length of its JSON header
    content: Any
    try:
        content = load_file(path) if is_safetensors else load_checkpoint(path, _RESAVE)
    except (*LOAD_ERRORS, SafetensorError):
        raise _damaged(path) from None
    if not isinstance(content, Mapping):
        raise UsageError(path, f"holds a {type(content).__name__} instead of named weights", _REMEDY)
    return content


def _networks(tensors: dict[str, Any], wrappers: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every network that spandrel knows, with the wrappers around its names.

    The names of old ESRGAN begin with a wrapper themselves, so a network is looked for before wrappers are removed.
    """
    if any(known.detect(tensors) for known in spandrel().MAIN_REGISTRY.architectures("detection")):
        yield wrappers, tensors
        return
    first = f"{next(iter(tensors), '').partition('.')[0]}."
    # A prefix of all names is taken for a wrapper, too, even if no known tool writes it.
    common = () if first in _WRAPPERS or not all(name.startswith(first) for name in tensors) else (first,)
    for wrapper in (*_WRAPPERS, *common):
        inner = {name.removeprefix(wrapper): value for name, value in tensors.items() if name.startswith(wrapper)}
        if inner:
            yield from _networks(inner, f"{wrappers}{wrapper}")


def _flattened(content: Mapping[Any, Any]) -> dict[str, Any]:
    """Collect the tensors of nested dicts by their names, which are prefixed with the names of the dicts.

    Raises `RecursionError` where a dict holds itself, or dicts hold each other so often that names never end.
    """
    import torch

    found: dict[str, Any] = {}
    for number, (name, value) in enumerate(_named(content)):
        if number == _MOST_NAMES:
            raise RecursionError
        if isinstance(value, torch.Tensor):
            found[name] = value
    return found


def _named(content: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        yield f"{prefix}{name}", value
        if isinstance(value, Mapping):
            yield from _named(value, f"{prefix}{name}.")
