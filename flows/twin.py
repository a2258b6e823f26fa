"""Twin: sharp photos and a GAN model in, the MSE twin of the model out."""

from dataclasses import dataclass

from desra_core.settings import Machine
from desra_core.settings.models import Twinning
from desra_core.training.twin import TwinVerdict, plan_twin
from desra_core.workspace import Workspace
from flows.desra_flow import desra_flow
from tasks.finetuning import freeze_sharp_photos, judge_and_publish_twin, train
from tasks.run_end import RunEnd


@dataclass(frozen=True, kw_only=True)
class Twinned(RunEnd):
    """How the training of a twin ended."""

    verdict: TwinVerdict


@desra_flow
def twin(twinning: Twinning, machine: Machine = Machine()) -> Twinned:  # noqa: B008
    """Train the MSE twin of a GAN model on degraded photos; an interrupted training goes on.

    Args:
        twinning: The photos and the GAN model, and how to train.
        machine: Where to compute: on one GPU, or on all cores of the CPU.
    """
    plan = plan_twin(twinning)
    workspace = Workspace(plan.run.root.parent)
    workspace.create()
    with workspace.locked():
        ended = plan.verdict
        if ended is None:
            freeze_sharp_photos(plan)
            train(plan, machine)
        verdict = ended or judge_and_publish_twin(plan)
    line = f"{verdict.psnr['twin']:.2f} dB on held-out photos, the GAN model {verdict.psnr['gan']:.2f} dB"
    return Twinned(in_one_line=line, task_runs=0 if ended else 3, to_look_at=not verdict.passed, verdict=verdict)
