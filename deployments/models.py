"""Finetune, compare and cycle from the command line: plan first, start servers only where there is something to do."""

from __future__ import annotations

import shlex
from pathlib import Path

import typer

from deployments.runs import prepare_corpus, renew_report, serving, sum_up, wait_for
from deployments.server import end_leftover_server
from desra_core.comparison import Comparison, conclude, plan_comparison
from desra_core.cycle import comparing_of, finetuning_of, mining_of
from desra_core.errors import printable
from desra_core.evaluation.gate import Verdict
from desra_core.evaluation.table import as_text, score_rows
from desra_core.model_settings import Comparing, Cycling, Finetuning
from desra_core.promotion import rollback
from desra_core.settings import Machine
from desra_core.tables import publish_tables
from desra_core.training.plan import FinetunePlan, check_networks, plan_finetune
from desra_core.training.run_folder import read_json
from desra_core.workspace import Workspace
from tasks.lines import say

GATE_FAILED = 3


def run_finetune(settings: Finetuning, machine: Machine) -> int:
    """Run the flow, or say that there is nothing to do; returns the exit code."""
    workspace = _existing(settings.workspace)
    with workspace.locked():
        end_leftover_server(workspace)
        plan = plan_finetune(settings)
        if not plan.begun and not plan.samples:
            typer.echo("no artifact in the training pool: nothing to train on, and nothing was trained")
            return 0
        if not plan.ended:
            check_networks(plan)
            with serving(workspace):
                from flows.finetune import finetune

                finetuned = finetune(settings, machine)
                wait_for(finetuned.flow_run, finetuned.task_runs)
        _tell_finetune(plan)
        grouped = "" if settings.group_by == "duplicates" else f" --group-by {shlex.quote(settings.group_by)}"
        typer.echo(f"next     desra compare --workspace {settings.workspace} --after {settings.output}{grouped}")
    return 0


def run_compare(settings: Comparing, machine: Machine) -> int:
    """Run the flow, or tell the verdict that is there; returns the exit code."""
    workspace = _existing(settings.workspace)
    with workspace.locked():
        end_leftover_server(workspace)
        comparison = plan_comparison(settings)
        promoted: Path | None = None
        if comparison.missing() or settings.promote:
            with serving(workspace):
                from flows.compare import compare

                compared = compare(settings, machine)
                wait_for(compared.flow_run, compared.task_runs)
            verdict, failures, promoted = compared.verdict, compared.failures, compared.promoted
        else:
            verdict, failures = conclude(comparison), 0
            renew_report(workspace)
        _tell_verdict(workspace, comparison, verdict, promoted)
    return _exit_code(verdict, failures)


def run_cycle(settings: Cycling, machine: Machine) -> int:
    """Run the flow, or say that there is nothing to do; returns the exit code."""
    workspace = Workspace(settings.workspace)
    workspace.create()
    with workspace.locked():
        end_leftover_server(workspace)
        mining = mining_of(settings)
        which = "the workspace's current model" if mining.gan_model != settings.gan_model else "--gan-model"
        say(f"finding the artifacts of {which}, {mining.gan_model}")
        prepared = prepare_corpus(mining)
        broken: tuple[str, ...] = ()
        promoted: Path | None = None
        finetuning = None if prepared.plan.pending else finetuning_of(settings, mining)
        idle = not prepared.plan.pending and (finetuning is None or _is_done(settings, finetuning))
        if idle:
            publish_tables(workspace, prepared.plan.target)
            renew_report(workspace)
        else:
            with serving(workspace):
                from flows.cycle import cycle

                cycled = cycle(settings, machine, rescan=False)
                for part in (cycled.mined, cycled.finetuned, cycled.compared):
                    if part is not None:
                        wait_for(part.flow_run, part.task_runs)
            broken, promoted = cycled.mined.broken_shards, cycled.promoted
        code = sum_up(prepared, mining, broken)
        finetuning = finetuning or finetuning_of(settings, mining)
        if finetuning is None:
            typer.echo("no artifact in the training pool: nothing to train on, and nothing was trained")
            return code
        _tell_finetune(plan_finetune(finetuning))
        comparison = plan_comparison(comparing_of(settings, mining, finetuning))
        verdict = conclude(comparison)
        _tell_verdict(workspace, comparison, verdict, promoted)
    return code or _exit_code(verdict, 0)


def run_rollback(workspace: Path) -> int:
    """Make the model before the current one current again; returns the exit code."""
    place = _existing(workspace)
    with place.locked():
        entry = rollback(place)
        renew_report(place)
    typer.echo(f"current  {entry / 'model.pth'}")
    return 0


def _existing(root: Path) -> Workspace:
    workspace = Workspace(root)
    workspace.create()
    return workspace


def _is_done(settings: Cycling, finetuning: Finetuning) -> bool:
    """Whether this finetune has ended, been judged, and been promoted as far as it is to be."""
    mining = mining_of(settings)
    if not plan_finetune(finetuning).ended:
        return False
    comparison = plan_comparison(comparing_of(settings, mining, finetuning))
    return not comparison.missing() and not (settings.promote and conclude(comparison).passed)


def _tell_finetune(plan: FinetunePlan) -> None:
    document, losses = read_json(plan.run.document) or {}, read_json(plan.run.losses) or []
    models = plan.run.models()
    last = int(models[-1].stem.rpartition("_")[2]) if models else 0
    early = ", and stopped early: the pixel loss had stopped falling" if last < plan.training.iterations else ""
    typer.echo(f"{last} iterations on {len(document.get('images', []))} images{early}")
    if losses:
        typer.echo(f"pixel loss {losses[0]['pixel']:.4f} at first, {losses[-1]['pixel']:.4f} at last")
    typer.echo(f"models   {plan.run.root / 'models'}\nlosses   tensorboard --logdir {plan.run.tensorboard}")


def _tell_verdict(workspace: Workspace, comparison: Comparison, verdict: Verdict, promoted: Path | None) -> None:
    control = verdict.control
    clean = f"{control.clean_images} of them clean"
    typer.echo(f"judged by {control.images} held-out images, {clean}, with {control.regions} artifact regions")
    typer.echo(as_text(score_rows(verdict)))
    if verdict.passed:
        typer.echo(f"passed   {verdict.best}")
    for reason in verdict.reasons:
        typer.echo(f"failed   {printable(reason)}")
    if promoted:
        typer.echo(f"promoted {promoted / 'model.pth'}; desra rollback --workspace {workspace.root} undoes it")
    elif verdict.passed and comparison.settings.promote:
        typer.echo("it was the current model already")
    typer.echo(f"verdict  {workspace.verdict}")
    if workspace.report.exists():
        typer.echo(f"report   {workspace.report}")


def _exit_code(verdict: Verdict, failures: int) -> int:
    return int(failures > 0) if verdict.passed else GATE_FAILED
