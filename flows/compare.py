"""Compare: a model and its finetuned models in, a verdict on held-out images out."""

from dataclasses import dataclass
from pathlib import Path

from desra_core.gate.comparison import Comparison, plan_comparison
from desra_core.gate.criteria import Verdict
from desra_core.planning.plan import load_settings
from desra_core.settings import Machine
from desra_core.settings.models import Comparing
from desra_core.workspace import Workspace
from flows import handed_over
from flows.desra_flow import desra_flow
from tasks.judging import decide_verdict, judge_images, promote_best, publish_report
from tasks.run_end import RunEnd


@dataclass(frozen=True, kw_only=True)
class Compared(RunEnd):
    """How a gate run ended: its verdict, the number of images not judged, and the entry of a promoted model."""

    comparison: Comparison
    verdict: Verdict
    failures: int
    promoted: Path | None


@desra_flow
def compare(comparing: Comparing, machine: Machine = Machine()) -> Compared:  # noqa: B008
    """Judge finetuned models on held-out images, and promote the best model if it passes and the settings say so.

    Args:
        comparing: The models to compare, and the demands of the gate.
        machine: Where and how wide to compute.
    """
    workspace = Workspace(comparing.workspace)
    load_settings(workspace)  # raises where the workspace has vanished
    with workspace.locked() as workspace:
        comparison = handed_over(comparing, Comparison) or plan_comparison(comparing)
        refresh = bool(comparison.missing())
        failures = judge_images.with_options(refresh_cache=refresh)(comparison.key, comparison, machine)
        verdict = decide_verdict(comparison)
        promoted = promote_best(comparison, verdict) if comparing.promote and verdict.passed else None
        line = f"{verdict.best} passes the gate" + (" and was promoted" if promoted else "")
        if not verdict.passed:
            outcome = "the gate is undecided" if verdict.undecided else "no model passes the gate"
            line = f"{outcome}: {'; '.join(verdict.reasons)}"
        publish_report(workspace, line)
    return Compared(
        in_one_line=line,
        task_runs=3 + bool(promoted),
        to_look_at=bool(failures) or not verdict.passed,
        comparison=comparison,
        verdict=verdict,
        failures=failures,
        promoted=promoted,
    )
