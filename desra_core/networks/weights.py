"""Read the weights of a checkpoint file, without running any code in it, or say why not.

Needs torch, which is imported where it is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from desra_core.errors import UsageError
from desra_core.files.hashing import LOAD_ERRORS, content_key, load_checkpoint, load_failure
from desra_core.third_party import mend_torchvision

# Tools put these before the names of a network's tensors: dicts of a checkpoint, which safetensors have as prefixes;
# torch.compile, DataParallel and AveragedModel; the network in a Lightning module or a trainer.
_EMA_WRAPPERS = (
    "params_ema.", "params-ema.", "net_g_ema.", "netG_ema.", "generator_ema.", "model_ema.", "ema_model.",
    "ema_state_dict.", "ema_model_state_dict.", "model_ema_state_dict.", "ema.",
)  # fmt: skip
_WRAPPERS = (
    *_EMA_WRAPPERS, "model_state_dict.", "state_dict.", "params.", "_orig_mod.", "module.", "net_g.", "netG.",
    "generator.", "model.", "net.", "network.",
)  # fmt: skip


def read_weights(path: Path) -> dict[str, Any]:
    """Read the tensors of a checkpoint by name, onto the CPU.

    Args:
        path: A file of ``torch.save`` or of safetensors, whatever its suffix. Weights may lie in it bare, or below the
            names that other tools, Lightning and torch.compile give them, nested in any order. Those below
            ``params_ema`` and other names of averaged ones go first.

    Raises:
        UsageError: The file is no checkpoint, only a part of one, would run code, holds several networks, or values
            that are not finite.
    """
    content = _read(path)
    kinds = _kinds(content, path)
    weights = kinds.get("ema") or kinds.get("raw") or _without_common_wrappers(content)
    if not weights:
        raise UsageError(path, "holds no weights", "give a checkpoint of a super-resolution network")
    _check_finite(weights, path)
    return weights


def read_kinds(path: Path) -> dict[str, dict[str, Any]]:
    """Read both kinds of weights that a training tool saves, ``raw`` and ``ema``; one of them where they are equal.

    Raises:
        UsageError: As `read_weights`.
    """
    import torch

    kinds = _kinds(_read(path), path)
    if len(kinds) < 2:
        return {"raw": read_weights(path)}
    for weights in kinds.values():
        _check_finite(weights, path)
    raw, ema = kinds["raw"], kinds["ema"]
    same = raw.keys() == ema.keys() and all(torch.equal(raw[name], ema[name]) for name in raw)
    return {"raw": raw} if same else kinds


def _read(path: Path) -> Mapping[Any, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    content_key(path)  # raises where there is no such file
    with path.open("rb") as file:
        is_safetensors = file.read(9)[8:] == b"{"  # after eight bytes with the length of its JSON header
    way = "" if is_safetensors else "load it with torch.load(path, weights_only=False) and torch.save its weights alone"
    try:
        content = load_file(path) if is_safetensors else load_checkpoint(path)
    except (*LOAD_ERRORS, SafetensorError) as error:
        if "TorchScript" in str(error):
            remedy = "load it with torch.jit.load where you trust it, and torch.save its state_dict()"
            raise UsageError(path, "is a TorchScript program, not a checkpoint", remedy) from None
        raise load_failure(path, error, way) from None
    if not isinstance(content, Mapping):
        remedy = "give a checkpoint of a super-resolution network"
        raise UsageError(path, f"holds a {type(content).__name__} instead of named weights", remedy)
    return content


def _kinds(content: Mapping[Any, Any], path: Path) -> dict[str, dict[str, Any]]:
    """Find the tensors of the network that spandrel knows, by its own names: ``raw`` and ``ema`` where there are."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for wrappers, tensors in _networks(_flattened(content)):
        kind = "ema" if any(f".{wrapper}" in f".{wrappers}" for wrapper in _EMA_WRAPPERS) else "raw"
        other, _ = found.setdefault(kind, (wrappers, tensors))
        if other != wrappers:
            reason = f"holds two networks, {other.rstrip('.')} and {wrappers.rstrip('.')}"
            raise UsageError(path, reason, "torch.save the weights of one of them alone")
    return {kind: found[kind][1] for kind in ("raw", "ema") if kind in found}


def _networks(tensors: dict[str, Any], wrappers: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Find every network that spandrel knows, with the wrappers around it. Old ESRGAN's own names begin with one."""
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
    """Unwrap the tensors of another network, such as a discriminator, from the dicts and prefixes around all."""
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


def _check_finite(weights: Mapping[str, Any], path: Path) -> None:
    for name, value in weights.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise UsageError(path, f"has values in {name} that are not finite", "copy or train it again")
