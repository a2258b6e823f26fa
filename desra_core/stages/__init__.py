"""One small function per stage of mining and image: what Dask runs.

A stage takes an image, its record so far, the workspace and the stage's own settings, commits its files and returns
the new record. It may be run again at any time, by another process too, and then leaves the same files.
"""

from desra_core.stages.mask import MaskSettings, mask_stage
from desra_core.stages.run import Stage, StageJob, failure, run_stage
from desra_core.stages.segmentation import SegmentationSettings, segmentation_stage
from desra_core.stages.similarity import SimilaritySettings, similarity_stage
from desra_core.stages.super_resolution import SuperResolutionSettings, super_resolution_stage

__all__ = [
    "MaskSettings",
    "SegmentationSettings",
    "SimilaritySettings",
    "Stage",
    "StageJob",
    "SuperResolutionSettings",
    "failure",
    "mask_stage",
    "run_stage",
    "segmentation_stage",
    "similarity_stage",
    "super_resolution_stage",
]
