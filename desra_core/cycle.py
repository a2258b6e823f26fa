"""One turn of the cycle: what of its settings goes to mining, to the finetune and to the gate."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from desra_core.model_settings import Comparing, Cycling, Finetuning
from desra_core.promotion import current_model, history
from desra_core.settings import Mining
from desra_core.training.plan import plan_finetune, run_key
from desra_core.training.run_folder import read_json
from desra_core.workspace import Workspace

Part = TypeVar("Part", bound=BaseModel)


def mining_of(cycling: Cycling) -> Mining:
    """Mine with the workspace's current model where one was promoted, else with the one that was given."""
    current = current_model(Workspace(cycling.workspace))
    return _part(Mining, cycling, gan_model=current or cycling.gan_model)


def finetuning_of(cycling: Cycling, mining: Mining) -> Finetuning | None:
    """Finetune the model that mined, in a folder named after all that goes into it.

    Returns
    -------
    None where the training pool has no artifact.
    """
    workspace = Workspace(mining.workspace)
    discriminator = _own_discriminator(workspace) if mining.gan_model != cycling.gan_model else cycling.discriminator
    finetuning = _part(
        Finetuning, cycling, gan_model=mining.gan_model, discriminator=discriminator, output=workspace.finetune("new")
    )
    plan = plan_finetune(finetuning)
    if not plan.samples:
        return None
    return finetuning.model_copy(update={"output": workspace.finetune(run_key(plan))})


def comparing_of(cycling: Cycling, mining: Mining, finetuning: Finetuning) -> Comparing:
    """Judge all that the finetune saved; whether the best is promoted is for the cycle to say, last."""
    models = {"before": mining.gan_model, "mse_model": mining.mse_model}
    return _part(Comparing, cycling, **models, after=finetuning.output, promote=False)


def _own_discriminator(workspace: Workspace) -> Path | None:
    """The discriminator that the current model was trained with, if it is still there."""
    source = read_json(workspace.current / "model.json") or {}
    if history(workspace)[-1]["kind"] == "origin" or "source" not in source:
        return None
    path = Path(source["source"]).with_suffix(".discriminator.pth")
    return path if path.exists() else None


def _part(kind: type[Part], cycling: Cycling, **other: object) -> Part:
    """The fields of a cycle that are also those of one of its parts."""
    shared = {name: getattr(cycling, name) for name in kind.model_fields if hasattr(cycling, name)}
    return kind(**(shared | other))
