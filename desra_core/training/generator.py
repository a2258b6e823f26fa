"""The network that is finetuned, and how to save it under the names that its checkpoint used."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from desra_core.errors import UsageError
from desra_core.networks.architectures import ARCHITECTURES
from desra_core.networks.checkpoints import read_weights, recognised

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True, eq=False)
class Generator:
    """A super-resolution network in training: spandrel's module, float32.

    ``scale`` is SR pixels per LR pixel and side; ``weights`` are all tensors of the parent checkpoint by their names
    there, and ``names`` the name in ``network`` of each of them that the network holds.
    """

    network: nn.Module
    scale: int
    architecture: str
    weights: dict[str, torch.Tensor]
    names: dict[str, str]

    def checkpoint_weights(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Rename a state dict of the network to the parent checkpoint's names, so that the usual tools load it."""
        return {
            name: state[self.names[name]].detach().cpu().clone() if name in self.names else value
            for name, value in self.weights.items()
        }


def load_generator(path: Path) -> Generator:
    """Load a network to be finetuned, on the CPU.

    Raises `UsageError` as `desra_core.networks.load_model` does, and where the architecture cannot be finetuned.
    """
    descriptor = recognised(path)
    entry = ARCHITECTURES.get(str(descriptor.architecture.id))
    if entry is None or entry.trainable is None:
        known = ", ".join(sorted(known.trainable for known in ARCHITECTURES.values() if known.trainable))
        name = descriptor.architecture.name
        raise UsageError(path, f"is a network that cannot be finetuned here ({name})", f"those that can are {known}")
    weights = read_weights(path)
    return Generator(
        network=descriptor.model.float().train().requires_grad_(True),
        scale=int(descriptor.scale),
        architecture=entry.trainable,
        weights=weights,
        names=_names(weights),
    )


def _names(weights: dict[str, torch.Tensor]) -> dict[str, str]:
    """Map the names of a checkpoint's tensors to spandrel's, by loading numbered tensors in their place."""
    import torch
    from spandrel import ModelLoader

    ordered = list(weights)
    numbered = {name: torch.full_like(weights[name], index, dtype=torch.float32) for index, name in enumerate(ordered)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of SwinIR, about torch.meshgrid
        state = ModelLoader().load_from_state_dict(numbered).model.state_dict()
    found = {ordered[int(value.flatten()[0])]: name for name, value in state.items() if value.is_floating_point()}
    return {name: found[name] for name in ordered if name in found}
