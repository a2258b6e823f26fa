"""Finetune: the artifacts of a workspace in, a model that no longer makes them out."""

from __future__ import annotations

from prefect.runtime import flow_run

from desra_core.gate.cycle import finetuning_with_current
from desra_core.planning.keys import load_settings
from desra_core.settings import Machine
from desra_core.settings.models import Finetuning
from desra_core.training.plan import FinetunePlan, plan_finetune
from desra_core.training.pools import note_trained
from desra_core.workspace import Workspace
from flows.corpus_flow import corpus_flow, corpus_name
from tasks.artifacts import tag_run
from tasks.finetuning import Finetuned, freeze_images, show_losses, train
from tasks.handover import handed_over


@corpus_flow("finetune")
def finetune(
    finetuning: Finetuning,
    machine: Machine = Machine(),  # noqa: B008
    current_model: bool = False,
) -> Finetuned:
    """Train a GAN model on the pseudo ground truths of its worst images; an interrupted finetune goes on.

    Args:
        finetuning: On what to train, and how.
        machine: Where to compute: one GPU, or all cores of the CPU.
        current_model: Start from the workspace's current GAN model, where one was promoted, instead of the given one.
    """
    workspace = Workspace(finetuning.workspace)
    tag_run("finetune", corpus_name(finetuning))
    load_settings(workspace)  # raises where the workspace has vanished
    if current_model:
        finetuning = finetuning_with_current(finetuning)
    with workspace.locked():
        plan = handed_over(finetuning, FinetunePlan) or plan_finetune(finetuning)
        if plan.empty:
            return Finetuned(str(flow_run.id), 0, images=0, iteration=0, early=False)
        images = freeze_images(plan)
        finetuned = show_losses(plan, images, train(plan, machine), workspace)
        note_trained(workspace, plan.training.group_by)  # at the end, so that a finetune that dies is started again
    return finetuned
