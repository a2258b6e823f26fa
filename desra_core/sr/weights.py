"""Read the weights of a checkpoint file, without running any code in it, or say why not.

Needs torch, which is imported where it is used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from desra_core.compat import mend_torchvision
from desra_core.content import LOAD_ERRORS, content_key
from desra_core.errors import UsageError

_DAMAGED_REMEDY = "download or copy the checkpoint again"


def read_weights(path: Path) -> dict[str, Any]:
    """Read the tensors of a checkpoint by name, onto the CPU.

    Parameters
    ----------
    path
        A file of ``torch.save`` or of safetensors, whatever its suffix. Weights may lie in it bare, or under
        ``params_ema``, which goes before ``params``, or another name that spandrel knows.

    Raises
    ------
    UsageError
        The file is no checkpoint, only a part of one, would run code, or holds values that are not finite.
    """
    content_key(path)  # tells that there is no such file
    content = _read_safetensors(path) if _is_safetensors(path) else _read_pickle(path)
    weights = _unwrapped(content)
    if not weights:
        raise UsageError(path, "holds no weights", "give a checkpoint of a super-resolution network")
    _check_finite(weights, path)
    return weights


def read_kinds(path: Path) -> dict[str, dict[str, Any]]:
    """Read both kinds of weights that a training tool saves, ``raw`` and ``ema``; one of them where they are equal.

    Raises
    ------
    UsageError
        As `read_weights`.
    """
    import torch

    content_key(path)
    content = {} if _is_safetensors(path) else _read_pickle(path)
    if not {"params", "params_ema"} <= content.keys():
        return {"raw": read_weights(path)}
    kinds = {kind: _unwrapped({name: content[name]}) for kind, name in (("raw", "params"), ("ema", "params_ema"))}
    for weights in kinds.values():
        _check_finite(weights, path)
    raw, ema = kinds["raw"], kinds["ema"]
    same = raw.keys() == ema.keys() and all(torch.equal(raw[name], ema[name]) for name in raw)
    return {"raw": raw} if same else kinds


def _is_safetensors(path: Path) -> bool:
    """Such a file begins with the length of its JSON header, in eight bytes."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (*LOAD_ERRORS, SafetensorError):
        raise _damaged(path) from None


def _read_pickle(path: Path) -> Mapping[str, Any]:
    import torch

    try:
        with path.open("rb") as file:  # by its path, torch judges a file by its suffix
            content = torch.load(file, map_location="cpu", weights_only=True)
    except LOAD_ERRORS as error:
        if "TorchScript" in str(error):
            raise UsageError(path, "is a TorchScript program, not a checkpoint",
                             "load it with torch.jit.load where you trust it, and torch.save its state_dict()"
                             ) from None  # fmt: skip
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused is None:
            raise _damaged(path) from None
        raise UsageError(
            path,
            f"holds an object of {refused[1]} beside its weights, and loading such objects can run code",
            "if you trust it, load it with torch.load(path, weights_only=False) and torch.save its weights alone",
        ) from None
    if not isinstance(content, Mapping):
        raise UsageError(path, f"holds a {type(content).__name__} instead of named weights",
                         "give a checkpoint of a super-resolution network")  # fmt: skip
    return content


def _damaged(path: Path) -> UsageError:
    return UsageError(path, "is not a checkpoint, or only a part of one", _DAMAGED_REMEDY)


def _unwrapped(content: Mapping[str, Any]) -> dict[str, Any]:
    mend_torchvision()
    import torch
    from spandrel import canonicalize_state_dict

    weights = canonicalize_state_dict({str(name): value for name, value in content.items()})
    return {str(name): value for name, value in weights.items() if isinstance(value, torch.Tensor)}


def _check_finite(weights: Mapping[str, Any], path: Path) -> None:
    for name, value in weights.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise UsageError(path, f"has values in {name} that are not finite", "copy or train it again")
