"""Finetune: the artifacts of a workspace in, a model that no longer makes them out."""

from __future__ import annotations

from prefect import flow
from prefect.runtime import flow_run

from desra_core.model_settings import Finetuning
from desra_core.settings import Machine
from desra_core.training.plan import plan_finetune
from desra_core.workspace import Workspace
from flows.names import corpus_name, run_name
from tasks.finetuning import Finetuned, freeze_images, show_losses, train
from tasks.overview import tag_run


@flow(name="finetune", flow_run_name=run_name)
def finetune(finetuning: Finetuning, machine: Machine = Machine()) -> Finetuned:  # noqa: B008
    """Train a GAN model on the pseudo ground truths of its worst images; what was begun goes on.

    Parameters
    ----------
    finetuning
        On what to train, and how.
    machine
        Where to compute: one GPU, or all cores of the CPU.
    """
    tag_run("finetune", corpus_name(finetuning))
    with Workspace(finetuning.workspace).locked():
        plan = plan_finetune(finetuning)
        if not plan.begun and not plan.samples:
            return Finetuned(str(flow_run.id), 0, images=0, iteration=0, early=False)
        images = freeze_images(plan)
        return show_losses(plan, images, train(plan, machine))
