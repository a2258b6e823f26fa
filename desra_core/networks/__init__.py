"""Load SR and segmentation networks from checkpoints, enlarge photos, and label the pixels of results.

Gives `load_model`, `load_pair` and `Model`, `super_resolve`, `resize_alpha` and `Result`.
"""

from desra_core.networks.checkpoints import Model, load_model, load_pair
from desra_core.networks.super_resolution import Result, resize_alpha, super_resolve

__all__ = ["Model", "Result", "load_model", "load_pair", "resize_alpha", "super_resolve"]
