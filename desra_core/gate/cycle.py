"""One turn of the cycle: the settings of its mining, of its finetune and of its gate."""

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from desra_core.errors import UsageError
from desra_core.evaluation.fidelity import load_lpips
from desra_core.files.hashing import content_key
from desra_core.gate.comparison import Comparison
from desra_core.gate.criteria import Verdict
from desra_core.gate.model_registry import current_model, rolled_back
from desra_core.planning.keys import load_settings
from desra_core.settings import Mining
from desra_core.settings.models import Comparing, Cycling, Finetuning
from desra_core.training.plan import check_networks
from desra_core.training.run_folder import read_json
from desra_core.workspace import Workspace

Settings = TypeVar("Settings", bound=BaseModel)


def mining_of(cycling: Cycling) -> Mining:
    """Make the settings of mining: with the workspace's current model, or the given one where none was promoted."""
    return mining_with_current(_part(Mining, cycling))


def mining_with_current(mining: Mining) -> Mining:
    """Replace the GAN model by the workspace's current model, where one was promoted."""
    current = current_model(Workspace(mining.workspace))
    return mining.model_copy(update={"gan_model": current}) if current else mining


def finetuning_of(cycling: Cycling, mining: Mining) -> Finetuning:
    """Make the settings of the finetune: of the model that mined, in a folder named after all that goes into it."""
    discriminator = _discriminator_of(mining.gan_model, cycling)
    return _part(Finetuning, cycling, gan_model=mining.gan_model, discriminator=discriminator)


def finetuning_with_current(finetuning: Finetuning) -> Finetuning:
    """Replace the GAN model by the workspace's current model and its discriminator, where a model was promoted.

    Raises `UsageError` where the workspace holds the artifacts of another model.
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


def comparing_of(cycling: Cycling, mining: Mining, after: Path) -> Comparing:
    """Make the settings of the gate: it judges all saved models; the cycle itself promotes the best one at its end."""
    models = {"before": mining.gan_model, "mse_model": mining.mse_model}
    return _part(Comparing, cycling, **models, after=after, promote=False)


def check_training(cycling: Cycling, mining: Mining) -> None:
    """Check, before hours of mining, that all networks can be used (raises `UsageError`)."""
    check_networks(mining.gan_model, finetuning_of(cycling, mining))
    if cycling.lpips:
        load_lpips(cycling.lpips)


def is_to_promote(cycling: Cycling, comparison: Comparison, verdict: Verdict) -> bool:
    """Decide whether the best candidate becomes current: it passes, and it was not rolled back before."""
    best = comparison.best(verdict)
    if not cycling.promote or not verdict.passed or best is None or best.model is None:
        return False
    return not rolled_back(Workspace(cycling.workspace), best.model)


def _discriminator_of(model: Path, given: Cycling | Finetuning) -> Path | None:
    """Find the discriminator of a model: the given one for the given model, else the one saved beside the model."""
    if given.gan_model and content_key(model) == content_key(given.gan_model):
        return given.discriminator
    source = (read_json(model.with_name("model.json")) or {}).get("source", "")
    path = Path(source).with_suffix(".discriminator.pth") if source else None
    return path if path and path.exists() else None


def _part(kind: type[Settings], cycling: Cycling, **other: object) -> Settings:
    """Make the settings of a part of the cycle from the fields of the same name."""
    shared = {name: getattr(cycling, name) for name in kind.model_fields if hasattr(cycling, name)}
    return kind(**(shared | other))
