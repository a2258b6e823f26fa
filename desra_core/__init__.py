"""The science of DeSRA: plain functions on arrays and files. Knows neither Prefect nor Dask.

The names below are the public library; the packages may change. Pictures are arrays of ``(H, W)`` or
``(H, W, 1 or 3)``, uint8 or uint16, in RGB. Errors are `DesraError`, one line each.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from desra_core.detection.artifacts import Result, detect_artifacts
    from desra_core.detection.class_weights import load_weights
    from desra_core.detection.mask import Region, artifact_mask, assemble_pseudo_gt, find_regions
    from desra_core.detection.similarity import variance_similarity
    from desra_core.errors import ArgumentError, DesraError
    from desra_core.images.codec import read_image
    from desra_core.networks.checkpoints import Model, load_model, load_pair
    from desra_core.networks.super_resolution import Enlarged, super_resolve

# The module of each public name, which is imported at the first use: the version alone needs no PyTorch.
_MODULES = {
    "detection.artifacts": ("Result", "detect_artifacts"),
    "detection.class_weights": ("load_weights",),
    "detection.mask": ("Region", "artifact_mask", "assemble_pseudo_gt", "find_regions"),
    "detection.similarity": ("variance_similarity",),
    "errors": ("ArgumentError", "DesraError"),
    "images.codec": ("read_image",),
    "networks.checkpoints": ("Model", "load_model", "load_pair"),
    "networks.super_resolution": ("Enlarged", "super_resolve"),
}

__all__ = [
    "ArgumentError",
    "DesraError",
    "Enlarged",
    "Model",
    "Region",
    "Result",
    "artifact_mask",
    "assemble_pseudo_gt",
    "detect_artifacts",
    "find_regions",
    "load_model",
    "load_pair",
    "load_weights",
    "read_image",
    "super_resolve",
    "variance_similarity",
]


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"desra_core.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
