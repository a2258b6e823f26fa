"""Cycle: photos and a GAN model in, a better model out: mine, finetune, gate, promote."""

from dataclasses import dataclass
from pathlib import Path

from desra_core.errors import UsageError
from desra_core.gate.comparison import check_training, comparing_of, finetuning_of, is_to_promote, mining_of
from desra_core.settings import Machine
from desra_core.settings.models import Cycling
from desra_core.training.plan import FinetunePlan, plan_finetune
from desra_core.training.twin import twinning_of
from flows import handed_over, handing_over
from flows.compare import Compared, compare
from flows.desra_flow import desra_flow, opened_workspace, runs_by_itself
from flows.finetune import finetune
from flows.mine import mine
from flows.twin import twin
from tasks.judging import promote_best, publish_report
from tasks.run_end import RunEnd, Summary


@dataclass(frozen=True, kw_only=True)
class Cycled(RunEnd):
    """How a cycle and its parts ended; without artifacts in the training pool it ends with mining."""

    mined: Summary
    finetuned: RunEnd | None = None
    compared: Compared | None = None
    promoted: Path | None = None


@desra_flow
def cycle(cycling: Cycling, machine: Machine = Machine(), rescan: bool = True) -> Cycled:  # noqa: B008
    """Mine artifacts with the current model, finetune it on them, judge it on held-out images, and promote the best.

    Args:
        cycling: Photos, models, and settings of all steps.
        machine: Where and how wide to compute.
        rescan: Look for new and changed photos first.
    """
    workspace = opened_workspace(cycling.workspace)
    with workspace.locked() as workspace:
        mining = mining_of(cycling)
        if runs_by_itself():
            check_training(cycling, mining)
        if (twinning := twinning_of(cycling)) and not twin(twinning, machine).verdict.passed:
            raise UsageError(twinning.output, "was not made: its training did not pass", "see desra twin")
        mined = mine(mining, machine, rescan)
        finetuning = finetuning_of(cycling, mining)
        plan = handed_over(finetuning, FinetunePlan) or plan_finetune(finetuning)
        if plan.empty:
            line = f"{mined.in_one_line}; no artifact in the training pool: nothing was trained"
            publish_report(workspace, line)
            return Cycled(in_one_line=line, task_runs=1, to_look_at=mined.to_look_at, mined=mined)
        finetuning = finetuning.model_copy(update={"output": plan.run.root})
        with handing_over((finetuning, plan)):
            finetuned = finetune(finetuning, machine)
        compared = compare(comparing_of(cycling, mining, plan.run.root), machine)
        due = is_to_promote(cycling, compared.comparison, compared.verdict)
        promoted = promote_best(compared.comparison, compared.verdict) if due else None
        line = compared.in_one_line + (f", promoted as {promoted.name}" if promoted else "")
        publish_report(workspace, line)
    return Cycled(
        in_one_line=line,
        task_runs=1 + bool(promoted),
        to_look_at=mined.to_look_at or compared.to_look_at,
        mined=mined,
        finetuned=finetuned,
        compared=compared,
        promoted=promoted,
    )
