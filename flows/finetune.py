"""Finetune: the artifacts of a workspace in, a model that no longer makes them out."""

from desra_core.gate.comparison import finetuning_with_current
from desra_core.planning.plan import load_settings
from desra_core.settings import Machine
from desra_core.settings.models import Finetuning
from desra_core.training.plan import FinetunePlan, plan_finetune
from desra_core.training.pools import note_trained
from desra_core.workspace import Workspace
from flows import handed_over
from flows.desra_flow import desra_flow
from tasks.finetuning import freeze_images, show_losses, train
from tasks.run_end import RunEnd


@desra_flow
def finetune(
    finetuning: Finetuning,
    machine: Machine = Machine(),  # noqa: B008
    current_model: bool = False,
) -> RunEnd:
    """Train a GAN model on the pseudo ground truths of its worst images; an interrupted finetune goes on.

    Args:
        finetuning: The images to train on, and how to train.
        machine: Where to compute: on one GPU, or on all cores of the CPU.
        current_model: Start from the workspace's current GAN model instead of the given one, if one was promoted.
    """
    workspace = Workspace(finetuning.workspace)
    load_settings(workspace)  # raises where the workspace has vanished
    if current_model:
        finetuning = finetuning_with_current(finetuning)
    with workspace.locked() as workspace:
        plan = handed_over(finetuning, FinetunePlan) or plan_finetune(finetuning)
        if plan.empty:
            return RunEnd(in_one_line="no artifact in the training pool: nothing was trained", task_runs=0)
        images = freeze_images(plan)
        line = show_losses(plan, images, train(plan, machine), workspace)
        note_trained(workspace, plan.training.group_by)  # at the end, so that a finetune that dies is started again
    return RunEnd(in_one_line=line, task_runs=3)
