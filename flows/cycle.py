"""Cycle: photos and two models in, a better model out: mine, finetune, gate, promote."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from prefect.runtime import flow_run

from desra_core.gate.cycle import check_training, comparing_of, finetuning_of, is_to_promote, mining_of
from desra_core.settings import Machine
from desra_core.settings.models import Cycling
from desra_core.training.plan import FinetunePlan, plan_finetune
from flows.compare import compare
from flows.corpus import opened_workspace
from flows.corpus_flow import corpus_flow, corpus_name
from flows.finetune import finetune
from flows.mine import mine
from tasks.artifacts import Summary, tag_run
from tasks.comparison import Compared, promote_best, publish_report
from tasks.finetuning import Finetuned
from tasks.handover import handed_over, handing_over
from tasks.retry_policy import runs_by_itself


class Cycled(NamedTuple):
    """The end of a cycle; without artifacts in the training pool it ends with mining."""

    flow_run: str
    task_runs: int
    mined: Summary
    finetuned: Finetuned | None
    compared: Compared | None
    promoted: Path | None

    @property
    def lacking(self) -> bool:
        """Say whether a person should look at how it ended."""
        return self.mined.lacking or (self.compared is not None and self.compared.lacking)

    @property
    def in_one_line(self) -> str:
        """Say in a line how it ended."""
        if self.compared is None:
            return f"{self.mined.in_one_line}; no artifact in the training pool: nothing was trained"
        return f"{self.compared.in_one_line}" + (f", promoted as {self.promoted.name}" if self.promoted else "")


@corpus_flow("cycle")
def cycle(cycling: Cycling, machine: Machine = Machine(), rescan: bool = True) -> Cycled:  # noqa: B008
    """Mine artifacts with the current model, finetune it on them, judge it on held-out images, and promote the best.

    Args:
        cycling: Photos, models, and settings of all steps.
        machine: Where and how wide to compute.
        rescan: Look for new and changed photos first.
    """
    workspace = opened_workspace(cycling.workspace)
    tag_run("cycle", corpus_name(cycling), workspace.root.name)
    with workspace.locked():
        mining = mining_of(cycling)
        if runs_by_itself():
            check_training(cycling, mining)
        mined = mine(mining, machine, rescan)
        finetuning = finetuning_of(cycling, mining)
        plan = handed_over(finetuning, FinetunePlan) or plan_finetune(finetuning)
        if plan.empty:
            cycled = Cycled(str(flow_run.id), 1, mined, None, None, None)
            publish_report(workspace, cycled.in_one_line)
            return cycled
        finetuning = finetuning.model_copy(update={"output": plan.run.root})
        with handing_over(finetuning, plan):
            finetuned = finetune(finetuning, machine)
        compared = compare(comparing_of(cycling, mining, plan.run.root), machine)
        promoted: Path | None = None
        comparison = compared.comparison
        if is_to_promote(cycling, comparison, compared.verdict):
            promoted = promote_best(comparison, compared.verdict)
        cycled = Cycled(str(flow_run.id), 1 + bool(promoted), mined, finetuned, compared, promoted)
        publish_report(workspace, cycled.in_one_line)
    return cycled
