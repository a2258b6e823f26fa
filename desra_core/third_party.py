"""Import torchvision, mmcv and basicsr in environments where a plain ``import`` of them fails, and name lacking extras.

Call a package's function before the package, or anything that imports the package, is first imported in a process.
Each function leaves environments alone that do not need it, and calling it again does nothing.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from desra_core.errors import UsageError

if TYPE_CHECKING:
    import torch


def require(package: str, extra: str, setting: str) -> None:
    """Check that the package of an extra is installed, which a setting needs (raises `UsageError`)."""
    if find_spec(package) is None:
        remedy = f"pip install 'desra[{extra}]', or leave {setting} out"
        raise UsageError(setting, f"needs the package {package}, which is not installed", remedy)


def mend_torchvision() -> None:
    """Let torchvision be imported beside a torch, such as a CPU-only one, that cannot load torchvision's compiled ops.

    At import, torchvision registers shape functions for ``nms`` and ``qnms``. That fails where the ops have no schema,
    so schemas are declared, without an implementation: models and transforms work, these ops raise ``RuntimeError``.
    """
    import torch

    if "torchvision" in sys.modules or hasattr(torch.ops.torchvision, "nms"):
        return
    spec = find_spec("torchvision")
    for folder in (spec and spec.submodule_search_locations) or ():
        for extension in sorted(Path(folder).glob("_C.*")):
            with contextlib.suppress(OSError):  # raised by ops that do not fit this torch
                torch.ops.load_library(str(extension))  # type: ignore[no-untyped-call]
                return
    _declare_nms()


def mend_mmcv() -> None:
    """Let mmcv-full be imported without compiled ops, and import it without its warnings.

    ``mmcv.ops``, which MMSegmentation imports, imports the extension module ``mmcv._ext``. Where that is missing, a
    stand-in takes its place. Ops of the stand-in raise ``NotImplementedError`` when called; SegFormer calls none.
    """
    mend_torchvision()
    _import_yapf()
    with warnings.catch_warnings():
        expected = "On January 1, 2023, MMCV will release v2.0.0|``MultiScaleDeformableAttention`` has been moved"
        warnings.filterwarnings("ignore", message=expected)
        if find_spec("mmcv._ext") is None:
            stand_in = ModuleType("mmcv._ext")
            stand_in.__spec__ = ModuleSpec("mmcv._ext", loader=None)
            vars(stand_in)["__getattr__"] = _missing_op
            sys.modules["mmcv._ext"] = stand_in
        import_module("mmcv.cnn.bricks.transformer")
        import_module("mmcv.ops")


def _import_yapf() -> None:
    """Import yapf, which mmcv needs, with a cache of its own: it may read a shared cache that is half-written."""
    before = os.environ.get("XDG_CACHE_HOME")
    with TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        try:
            import_module("yapf")
        finally:
            del os.environ["XDG_CACHE_HOME"]
            if before is not None:
                os.environ["XDG_CACHE_HOME"] = before


def mend_basicsr() -> None:
    """Let basicsr 1.4.2 be imported beside torchvision >= 0.17, and import it without its warnings.

    basicsr imports ``torchvision.transforms.functional_tensor``, whose functions have moved to ``functional``.
    """
    mend_torchvision()
    name = "torchvision.transforms.functional_tensor"
    if find_spec(name) is None:
        sys.modules[name] = import_module("torchvision.transforms.functional")
    with warnings.catch_warnings(), np.errstate():  # basicsr changes how NumPy handles errors
        warnings.filterwarnings("ignore", message="Please import `convolve` from the `scipy.ndimage` namespace")
        import_module("basicsr")


@functools.cache
def _declare_nms() -> torch.library.Library:
    """Declare the schemas of both ops. The cache keeps the library: schemas live only as long as their library."""
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name in ("nms", "qnms"):
        schema = f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        library.define(schema)  # type: ignore[no-untyped-call]
    return library


def _missing_op(name: str) -> Callable[..., Any]:
    if name.startswith("__"):  # attributes that Python itself looks up
        raise AttributeError(name)

    def op(*_: object, **__: object) -> Any:
        raise NotImplementedError(f"mmcv-full was installed without compiled ops, and {name} is one of them")

    return op
