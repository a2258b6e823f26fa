"""One turn of the cycle: what of its settings goes to mining, to the finetune and to the gate."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from desra_core.errors import UsageError
from desra_core.evaluation.perceptual import load_lpips
from desra_core.files.hashing import content_key
from desra_core.gate.comparison import Comparison, best_of
from desra_core.gate.model_registry import current_model, rolled_back
from desra_core.gate.verdict import Verdict
from desra_core.planning.keys import load_settings
from desra_core.settings import Mining
from desra_core.settings.models import Comparing, Cycling, Finetuning
from desra_core.training.plan import check_networks, plan_finetune, run_key
from desra_core.training.run_folder import read_json
from desra_core.workspace import Workspace

Part = TypeVar("Part", bound=BaseModel)


def mining_of(cycling: Cycling) -> Mining:
    """Mine with the workspace's current model where one was promoted, else with the one that was given."""
    return mining_with_current(_part(Mining, cycling))


def mining_with_current(mining: Mining) -> Mining:
    """The same, with the workspace's current model where one was promoted."""
    current = current_model(Workspace(mining.workspace))
    return mining.model_copy(update={"gan_model": current}) if current else mining


def finetuning_with_current(finetuning: Finetuning) -> Finetuning:
    """The same, from the workspace's current model and its own discriminator where one was promoted.

    Raises
    ------
    UsageError
        The workspace holds the artifacts of another model.
    """
    workspace = Workspace(finetuning.workspace)
    current = current_model(workspace)
    if current is None:
        return finetuning
    mined: Path | None = getattr(load_settings(workspace)[0], "gan_model", None)
    if mined and content_key(mined) != content_key(current):
        reason = f"holds the artifacts of {mined}, which is not the current model"
        raise UsageError(workspace.root, reason, "mine with the current one first")
    own = {"gan_model": current, "discriminator": _discriminator_of(current, finetuning)}
    return finetuning.model_copy(update=own)


def finetuning_of(cycling: Cycling, mining: Mining) -> Finetuning | None:
    """Finetune the model that mined, in a folder named after all that goes into it.

    Returns
    -------
    None where the training pool has no artifact.
    """
    workspace = Workspace(mining.workspace)
    models = {"gan_model": mining.gan_model, "discriminator": discriminator_of(cycling, mining)}
    finetuning = _part(Finetuning, cycling, **models, output=workspace.finetune("new"))
    plan = plan_finetune(finetuning)
    if not plan.samples:
        return None
    return finetuning.model_copy(update={"output": workspace.finetune(run_key(plan))})


def comparing_of(cycling: Cycling, mining: Mining, finetuning: Finetuning) -> Comparing:
    """Judge all that the finetune saved; whether the best is promoted is for the cycle to say, last."""
    models = {"before": mining.gan_model, "mse_model": mining.mse_model}
    return _part(Comparing, cycling, **models, after=finetuning.output, promote=False)


def check_training(cycling: Cycling, mining: Mining) -> None:
    """See that all networks can be used before hours of mining, unlike after them.

    Raises
    ------
    UsageError
        One cannot.
    """
    training = cycling.model_copy(update={"discriminator": discriminator_of(cycling, mining)})
    check_networks(mining.gan_model, training)
    if cycling.lpips:
        load_lpips(cycling.lpips)


def is_to_promote(cycling: Cycling, comparison: Comparison, verdict: Verdict) -> bool:
    """Whether the best candidate is to become current: it passes, and nobody has rolled it back."""
    best = best_of(comparison, verdict)
    if not cycling.promote or not verdict.passed or best is None or best.candidate.model is None:
        return False
    return not rolled_back(Workspace(cycling.workspace), best.candidate.model)


def discriminator_of(cycling: Cycling, mining: Mining) -> Path | None:
    """The discriminator that the model that mined was trained with, if it is still there."""
    return _discriminator_of(mining.gan_model, cycling)


def _discriminator_of(model: Path, given: Cycling | Finetuning) -> Path | None:
    """The given one belongs to the given model; that of a finetuned model lies where the finetune saved it."""
    if given.gan_model and content_key(model) == content_key(given.gan_model):
        return given.discriminator
    source = (read_json(model.with_name("model.json")) or {}).get("source", "")
    path = Path(source).with_suffix(".discriminator.pth") if source else None
    return path if path and path.exists() else None


def _part(kind: type[Part], cycling: Cycling, **other: object) -> Part:
    """The fields of a cycle that are also those of one of its parts."""
    shared = {name: getattr(cycling, name) for name in kind.model_fields if hasattr(cycling, name)}
    return kind(**(shared | other))
