"""Finding artifacts without ground truth (Sections 3.2 and 3.3 of the paper), and other detectors beside it.

Gives `variance_similarity` (Eq. 7), `artifact_mask`, `assemble_pseudo_gt`, `find_regions` and `Region`.
"""

from typing import TYPE_CHECKING, Any

from desra_core.detection.mask import Region, artifact_mask, assemble_pseudo_gt, find_regions

if TYPE_CHECKING:
    from desra_core.detection.similarity import variance_similarity

__all__ = ["Region", "artifact_mask", "assemble_pseudo_gt", "find_regions", "variance_similarity"]


def __getattr__(name: str) -> Any:
    """Import the similarity on first use: planning a run needs no numba."""
    if name != "variance_similarity":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from desra_core.detection import similarity

    return similarity.variance_similarity
