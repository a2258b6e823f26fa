"""Read the weights of a checkpoint file without running code in it. torch is imported where it is used."""

from __future__ import annotations

import pickle
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from desra_core.errors import UsageError
from desra_core.files.hashing import content_key
from desra_core.third_party import mend_torchvision

# Raised by torch.load, safetensors, spandrel and mmcv for files that are damaged, or no checkpoint or config, and by
# networks that do not fit the weights or the config.
LOAD_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError, NameError, OSError,
    RuntimeError, SyntaxError, TypeError, ValueError, pickle.UnpicklingError, struct.error,
)  # fmt: skip

# Tools put these before the names of a network's tensors: the names of dicts in a checkpoint, which are prefixes in
# safetensors; those of torch.compile, DataParallel and AveragedModel; the network in a Lightning module or a trainer.
_EMA_WRAPPERS = (
    "params_ema.", "params-ema.", "net_g_ema.", "netG_ema.", "generator_ema.", "model_ema.", "ema_model.",
    "ema_state_dict.", "ema_model_state_dict.", "model_ema_state_dict.", "ema.",
)  # fmt: skip
_WRAPPERS = (
    *_EMA_WRAPPERS, "model_state_dict.", "state_dict.", "params.", "_orig_mod.", "module.", "net_g.", "netG.",
    "generator.", "model.", "net.", "network.",
)  # fmt: skip

_WAY = "load it with torch.load(path, weights_only=False) and torch.save its weights alone"


def read_weights(path: Path) -> dict[str, Any]:
    """Read the tensors of a checkpoint by name, onto the CPU.

    Args:
        path: A file of ``torch.save`` or of safetensors, whatever its suffix. Weights may lie in it bare, or below the
            names that other tools, Lightning and torch.compile give them, nested in any order. Averaged weights, such
            as those below ``params_ema``, go before raw ones.

    Raises:
        UsageError: The file is no checkpoint, only a part of one, would run code, holds several networks, or values
            that are not finite.
    """
    kinds = _kinds(path)
    return _finite(kinds["ema" if "ema" in kinds else "raw"], path)


def read_kinds(path: Path) -> dict[str, dict[str, Any]]:
    """Read both kinds of weights that a training tool saves, ``raw`` and ``ema``; only ``raw`` where they are equal.

    Raises:
        UsageError: As `read_weights`.
    """
    import torch

    kinds = {kind: _finite(weights, path) for kind, weights in _kinds(path).items()}
    raw, ema = next(iter(kinds.values())), kinds.get("ema", {})
    same = raw.keys() == ema.keys() and all(torch.equal(raw[name], ema[name]) for name in raw)
    return {"raw": raw} if same or len(kinds) == 1 else kinds


def load_checkpoint(path: Path, way: str) -> Any:
    """Read a file of ``torch.save`` onto the CPU, without running code in it.

    mmengine's training log, which it saves beside weights and which needs the classes of mmengine and NumPy, is left
    out.

    Args:
        path: The file.
        way: How to save the weights of a trusted file alone, for the error about an object that could run code.

    Raises:
        UsageError: The file is no checkpoint, only a part of one, or would run code.
    """
    import torch

    torch.serialization.add_safe_globals([*_stand_ins(), *_numpy_classes()])
    try:
        with path.open("rb") as file:  # by its path, torch judges a file by its suffix
            return torch.load(file, map_location="cpu", weights_only=True)
    except LOAD_ERRORS as error:
        if "TorchScript" in str(error):
            remedy = "load it with torch.jit.load where you trust it, and torch.save its state_dict()"
            raise UsageError(path, "is a TorchScript program, not a checkpoint", remedy) from None
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            reason = f"holds an object of {refused[1]} beside its weights, and loading such objects can run code"
            remedy = f"if you trust it, and where {refused[1].partition('.')[0]} is installed, {way}"
            raise UsageError(path, reason, remedy) from None
        raise _damaged(path) from None


def _damaged(path: Path) -> UsageError:
    return UsageError(path, "is not a checkpoint, or only a part of one", "download or copy the checkpoint again")


class _TrainingLog:
    """In place of mmengine's HistoryBuffer; holds nothing."""

    def __setstate__(self, state: object) -> None:
        """Called by the unpickler."""


def _nothing(*_: object) -> None:
    """In place of ``getattr``, by which a HistoryBuffer looks up its methods."""


def _stand_ins() -> list[tuple[Any, str]]:
    methods = [(_nothing, f"{module}.getattr") for module in ("builtins", "__builtin__")]
    return [(_TrainingLog, "mmengine.logging.history_buffer.HistoryBuffer"), *methods]


def _numpy_classes() -> list[Any]:
    """The functions and classes in pickles of NumPy arrays and numbers, under the names of NumPy 1 and 2."""
    import numpy as np

    rebuild, scalar = np.zeros(1).__reduce__()[0], np.float64(0).__reduce__()[0]
    modules = ("numpy.core.multiarray", "numpy._core.multiarray")
    named = [(rebuild, f"{module}._reconstruct") for module in modules]
    named += [(scalar, f"{module}.scalar") for module in modules]
    return [*named, np.ndarray, np.dtype, *{type(np.dtype(kind)) for kind in np.typecodes["AllInteger"] + "?efdg"}]


def _kinds(path: Path) -> dict[str, dict[str, Any]]:
    """Find the tensors of the network in a file, by its own names: ``raw``, ``ema`` or both."""
    content = _content(path)
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for wrappers, tensors in _networks(_flattened(content)):
        kind = "ema" if any(f".{wrapper}" in f".{wrappers}" for wrapper in _EMA_WRAPPERS) else "raw"
        other, _ = found.setdefault(kind, (wrappers, tensors))
        if other != wrappers:
            reason = f"holds two networks, {other.rstrip('.')} and {wrappers.rstrip('.')}"
            raise UsageError(path, reason, "torch.save the weights of one of them alone")
    kinds: dict[str, dict[str, Any]] = {kind: found[kind][1] for kind in ("raw", "ema") if kind in found}
    kinds = kinds or {"raw": _without_common_wrappers(content)}
    if not all(kinds.values()):
        raise UsageError(path, "holds no weights", "give a checkpoint of a super-resolution network")
    return kinds


def _content(path: Path) -> Mapping[Any, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    content_key(path)  # raises where there is no such file
    with path.open("rb") as file:
        is_safetensors = file.read(9)[8:] == b"{"  # after eight bytes with the length of its JSON header
    content: Any
    try:
        content = load_file(path) if is_safetensors else load_checkpoint(path, _WAY)
    except (*LOAD_ERRORS, SafetensorError):
        raise _damaged(path) from None
    if not isinstance(content, Mapping):
        remedy = "give a checkpoint of a super-resolution network"
        raise UsageError(path, f"holds a {type(content).__name__} instead of named weights", remedy)
    return content


def _networks(tensors: dict[str, Any], wrappers: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every network that spandrel knows, with the wrappers around its names.

    The names of old ESRGAN begin with a wrapper themselves, so a network is looked for before wrappers are removed.
    """
    mend_torchvision()
    from spandrel import MAIN_REGISTRY

    if any(known.detect(tensors) for known in MAIN_REGISTRY.architectures("detection")):
        yield wrappers, tensors
        return
    first = f"{next(iter(tensors), '').partition('.')[0]}."
    common = () if first in _WRAPPERS or not all(name.startswith(first) for name in tensors) else (first,)
    for wrapper in (*_WRAPPERS, *common):
        inner = {name.removeprefix(wrapper): value for name, value in tensors.items() if name.startswith(wrapper)}
        if inner:
            yield from _networks(inner, f"{wrappers}{wrapper}")


def _without_common_wrappers(content: Mapping[str, Any]) -> dict[str, Any]:
    """Remove the dicts and prefixes that are around all tensors of another network, such as a discriminator."""
    from spandrel import canonicalize_state_dict

    tensors = _flattened(canonicalize_state_dict({str(name): value for name, value in content.items()}))
    while wrapper := next((w for w in _WRAPPERS if tensors and all(name.startswith(w) for name in tensors)), None):
        tensors = {name.removeprefix(wrapper): value for name, value in tensors.items()}
    return tensors


def _flattened(content: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """List all tensors of nested dicts, the name of a dict before their own names."""
    import torch

    found: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, torch.Tensor):
            found[f"{prefix}{name}"] = value
        elif isinstance(value, Mapping):
            found |= _flattened(value, f"{prefix}{name}.")
    return found


def _finite(weights: dict[str, Any], path: Path) -> dict[str, Any]:
    for name, value in weights.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise UsageError(path, f"has values in {name} that are not finite", "copy or train it again")
    return weights
