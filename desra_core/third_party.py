"""Import torchvision, mmcv and basicsr in environments where a plain ``import`` of them fails.

Call a package's function before the package, or anything that imports it, is first imported in a process.
Each leaves an environment alone that does not need it, and calling it again does nothing.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_MMCV_WARNINGS = (
    "On January 1, 2023, MMCV will release v2.0.0",
    "``MultiScaleDeformableAttention`` has been moved",
)
_BASICSR_WARNINGS = ("Please import `convolve` from the `scipy.ndimage` namespace",)


def mend_torchvision() -> None:
    """Let torchvision be imported beside a torch that cannot load its compiled ops (a CPU-only torch).

    torchvision registers shape functions for ``nms`` and ``qnms`` at import, which fails when no schema of
    that name exists. The schemas are declared without an implementation: models and transforms work,
    calling the ops raises ``RuntimeError``.
    """
    import torch

    if not ("torchvision" in sys.modules or _torchvision_ops_load() or hasattr(torch.ops.torchvision, "nms")):
        _declare_nms()


def mend_mmcv() -> None:
    """Let mmcv-full be imported without compiled ops, and import it without its warnings.

    ``mmcv.ops``, which MMSegmentation imports, asks for the extension module ``mmcv._ext``. It gets a
    stand-in whose ops raise ``NotImplementedError`` when they are called. Nothing that SegFormer runs is one.
    """
    mend_torchvision()
    if not _has_module("mmcv", "_ext"):
        sys.modules.setdefault("mmcv._ext", _stand_in("mmcv._ext", _missing_op))
    _import_quietly(("mmcv.cnn.bricks.transformer", "mmcv.ops"), _MMCV_WARNINGS)


def mend_basicsr() -> None:
    """Let basicsr 1.4.2 be imported beside torchvision >= 0.17, and import it without its warnings.

    It imports ``torchvision.transforms.functional_tensor``, whose functions have moved to ``functional``.
    """
    mend_torchvision()
    name = "torchvision.transforms.functional_tensor"
    if not _has_module("torchvision", "transforms/functional_tensor"):
        functional = "torchvision.transforms.functional"
        sys.modules.setdefault(name, _stand_in(name, lambda name: getattr(importlib.import_module(functional), name)))
    _import_quietly(("basicsr",), _BASICSR_WARNINGS)


def _torchvision_ops_load() -> bool:
    """Load torchvision's compiled ops, as torchvision itself will; False where they do not fit this torch."""
    import torch

    for folder in _package_folders("torchvision"):
        for extension in sorted(folder.glob("_C.*")):
            try:
                torch.ops.load_library(str(extension))  # type: ignore[no-untyped-call]
            except OSError:
                continue
            return True
    return False


@functools.cache
def _declare_nms() -> torch.library.Library:
    """Declare both schemas. They live as long as the returned library, hence the cache."""
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name in ("nms", "qnms"):
        schema = f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        library.define(schema)  # type: ignore[no-untyped-call]
    return library


def _package_folders(package: str) -> list[Path]:
    """Find the folders of a package without importing it; none when it is not installed."""
    spec = importlib.util.find_spec(package)
    return [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]


def _has_module(package: str, name: str) -> bool:
    suffixes = (".py", *EXTENSION_SUFFIXES)
    return any((folder / f"{name}{suffix}").exists() for folder in _package_folders(package) for suffix in suffixes)


def _stand_in(name: str, attribute: Callable[[str], Any]) -> ModuleType:
    """Make a module whose public attributes are ``attribute(name)``."""

    def lookup(attribute_name: str) -> Any:
        if attribute_name.startswith("__"):
            raise AttributeError(attribute_name)
        return attribute(attribute_name)

    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, loader=None)
    vars(module)["__getattr__"] = lookup
    return module


def _missing_op(name: str) -> Callable[..., Any]:
    def op(*_: object, **__: object) -> Any:
        raise NotImplementedError(f"mmcv-full was installed without compiled ops, and {name} is one of them")

    return op


def _import_quietly(modules: tuple[str, ...], messages: tuple[str, ...]) -> None:
    """Import modules with exactly these import-time warnings ignored."""
    with warnings.catch_warnings():
        for message in messages:
            warnings.filterwarnings("ignore", message=message)
        for module in modules:
            importlib.import_module(module)
