"""Finding artifacts without ground truth (Sections 3.2 and 3.3 of the paper), and other detectors beside it.

Gives `variance_similarity` (Eq. 7), `artifact_mask`, `find_regions` and `Region`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from desra_core.detection.mask import artifact_mask as artifact_mask
    from desra_core.detection.regions import Region as Region
    from desra_core.detection.regions import find_regions as find_regions
    from desra_core.detection.similarity import variance_similarity as variance_similarity

_HOME = {
    "artifact_mask": "mask",
    "Region": "regions",
    "find_regions": "regions",
    "variance_similarity": "similarity",
}

__all__ = ["Region", "artifact_mask", "find_regions", "variance_similarity"]


def __getattr__(name: str) -> Any:
    """Import on first use: planning a run needs the class weights, not numba."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
