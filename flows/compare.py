"""Compare: a model and its finetuned models in, a verdict on held-out images out."""

from __future__ import annotations

from pathlib import Path

from prefect.runtime import flow_run

from desra_core.gate.comparison import Comparison, plan_comparison
from desra_core.planning.keys import load_settings
from desra_core.settings import Machine
from desra_core.settings.models import Comparing
from desra_core.workspace import Workspace
from flows.corpus_flow import corpus_flow, corpus_name
from tasks.artifacts import tag_run
from tasks.comparison import Compared, decide_verdict, judge_images, promote_best, publish_report
from tasks.handover import handed_over


@corpus_flow("compare")
def compare(comparing: Comparing, machine: Machine = Machine()) -> Compared:  # noqa: B008
    """Judge finetuned models on held-out images, and promote the best if it passes and that was asked for.

    Args:
        comparing: What to compare, and what a model has to show.
        machine: Where and how wide to compute.
    """
    workspace = Workspace(comparing.workspace)
    tag_run("compare", corpus_name(comparing))
    load_settings(workspace)  # raises where the workspace has vanished
    with workspace.locked():
        comparison = handed_over(comparing, Comparison) or plan_comparison(comparing)
        refresh = bool(comparison.missing())
        failures = judge_images.with_options(refresh_cache=refresh)(comparison.key, comparison, machine)
        verdict = decide_verdict(comparison)
        promoted: Path | None = None
        if comparing.promote and verdict.passed:
            promoted = promote_best(comparison, verdict)
        compared = Compared(str(flow_run.id), 3 + bool(promoted), comparison, verdict, failures, promoted)
        publish_report(workspace, compared.in_one_line)
    return compared
