"""Super-resolution: checkpoints to networks, photos to results of a bounded amount of memory."""

from desra_core.sr.checkpoints import Model, load_model, load_pair
from desra_core.sr.inference import Result, resize_alpha, super_resolve

__all__ = ["Model", "Result", "load_model", "load_pair", "resize_alpha", "super_resolve"]
