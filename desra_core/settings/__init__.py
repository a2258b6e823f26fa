"""Settings of a run: frozen models behind flags, TOML files and flow parameters.

Gives the settings of a corpus; those of models, benchmarks and serving are in modules of their own.
"""

from desra_core.settings.corpus import (
    CorpusSettings,
    Detection,
    Machine,
    MinArea,
    Mining,
    at_home,
    detector_of,
    folder_of,
    min_area_pixels,
    whole_path,
)

__all__ = [
    "CorpusSettings",
    "Detection",
    "Machine",
    "MinArea",
    "Mining",
    "at_home",
    "detector_of",
    "folder_of",
    "min_area_pixels",
    "whole_path",
]
