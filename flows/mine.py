"""Mine: a folder of photos and a GAN model and its reference in, artifact masks and a dataset for finetuning out."""

from desra_core.gate.comparison import mining_with_current
from desra_core.settings import Machine, Mining
from desra_core.settings.models import FinetuneTrigger
from desra_core.workspace import Workspace
from flows.desra_flow import desra_flow, process_corpus
from tasks.finetuning import start_finetune
from tasks.run_end import Summary


@desra_flow
def mine(
    mining: Mining,
    machine: Machine = Machine(),  # noqa: B008
    rescan: bool = True,
    current_model: bool = False,
    trigger: FinetuneTrigger | None = None,
) -> Summary:
    """Upscale every photo of a folder with both models, find the artifacts and gather them as a dataset.

    Args:
        mining: The photos and models, and how to compare.
        machine: Where and how wide to compute.
        rescan: Look for new and changed files first.
        current_model: Take the workspace's current GAN model instead of the given one, if one was promoted.
        trigger: When to start the finetune deployment of the same name.
    """
    if current_model:
        mining = mining_with_current(mining)
    summary = process_corpus(mining, machine, rescan=rescan)
    if trigger:
        start_finetune(Workspace(mining.workspace), trigger)
    return summary
