"""Finetune, compare and cycle from the command line: plan first, start servers only where there is something to do."""

from __future__ import annotations

import shlex
from pathlib import Path

import typer

from deployments.commands.runs import prepare_corpus, renew_report, serving, sum_up, wait_for
from deployments.serving.server import ServerLostError, end_leftover_server
from desra_core.errors import UsageError, printable
from desra_core.evaluation.table import as_text
from desra_core.gate.comparison import Comparison, conclude, plan_comparison, verdict_of
from desra_core.gate.cycle import check_training, comparing_of, finetuning_of, is_to_promote, mining_of
from desra_core.gate.model_registry import current_model, rollback
from desra_core.gate.score_table import score_rows
from desra_core.gate.verdict import Verdict
from desra_core.planning.tables import publish_tables
from desra_core.settings import Machine
from desra_core.settings.models import Comparing, Cycling, Finetuning
from desra_core.training.plan import FinetunePlan, check_networks, plan_finetune
from desra_core.training.run_folder import read_json
from desra_core.workspace import Workspace
from desra_core.workspace.human_masks import resting_in_words
from tasks.logs import say

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
        if plan.ended:
            typer.echo("nothing to do: this finetune has ended before")
        else:
            check_networks(plan.gan_model, plan.training)
            with serving(workspace):
                from flows.finetune import finetune

                finetuned = finetune(settings, machine)
                wait_for(finetuned.flow_run, finetuned.task_runs)
        _tell_finetune(plan)
        typer.echo(f"next     {_compare_command(settings.model_copy(update={'output': plan.run.root}))}")
    return 0


def run_compare(settings: Comparing, machine: Machine) -> int:
    """Run the flow, or tell the verdict that is there; returns the exit code."""
    workspace = _existing(settings.workspace)
    with workspace.locked():
        end_leftover_server(workspace)
        comparison = plan_comparison(settings)
        failures = 0
        promoted: Path | None = None
        if comparison.missing() or (settings.promote and verdict_of(comparison).passed):
            with serving(workspace):
                from flows.compare import compare

                compared = compare(settings, machine)
                wait_for(compared.flow_run, compared.task_runs)
            verdict, failures, promoted = compared.verdict, compared.failures, compared.promoted
        else:
            typer.echo("nothing to do: all was judged before")
            verdict = conclude(comparison)
            renew_report(workspace)
        _tell_verdict(workspace, verdict, promoted, comparison)
    return int(failures > 0) if verdict.passed else GATE_FAILED


def run_cycle(settings: Cycling, machine: Machine) -> int:
    """Run the flow, or say that there is nothing to do; returns the exit code."""
    workspace = Workspace(settings.workspace)
    with workspace.opened():
        end_leftover_server(workspace)
        mining = mining_of(settings)
        which = "the workspace's current model" if mining.gan_model != settings.gan_model else "--gan-model"
        say(f"finding the artifacts of {which}, {mining.gan_model}")
        prepared = prepare_corpus(mining)
        broken: tuple[str, ...] = ()
        promoted: Path | None = None
        lost: ServerLostError | None = None
        failures = 0
        finetuning = None if prepared.plan.pending else finetuning_of(settings, mining)
        idle = not prepared.plan.pending and (finetuning is None or _is_done(settings, finetuning))
        if idle:
            publish_tables(workspace, prepared.plan.target)
            renew_report(workspace)
        else:
            check_training(settings, mining)
            before = current_model(workspace)
            try:
                with serving(workspace):
                    from flows.cycle import cycle

                    cycled = cycle(settings, machine, rescan=False)
                    for part in (cycled.mined, cycled.finetuned, cycled.compared, cycled):
                        if part is not None:
                            wait_for(part.flow_run, part.task_runs)
                broken, promoted = cycled.mined.broken_shards, cycled.promoted
                failures = cycled.compared.failures if cycled.compared else 0
            except ServerLostError as error:
                current = current_model(workspace)
                if current is None or current == before:
                    raise
                lost, promoted = error, current.parent  # all is done, and the command anew would begin the next turn
        code = sum_up(prepared, mining, broken)
        finetuning = finetuning or finetuning_of(settings, mining)
        if finetuning is None:
            typer.echo("no artifact in the training pool: nothing to train on, and nothing was trained")
            return code
        _tell_finetune(plan_finetune(finetuning))
        comparison = plan_comparison(comparing_of(settings, mining, finetuning))
        verdict = conclude(comparison)
        _tell_verdict(workspace, verdict, promoted, comparison)
        if settings.promote and verdict.passed and not promoted:
            again = f"{_compare_command(finetuning)} --promote"
            typer.echo(f"not promoted: it was, and was rolled back; {again} brings it back")
            return GATE_FAILED
    code = max(code, int(failures > 0)) if verdict.passed else GATE_FAILED
    if lost is not None:
        lost.code = code
        raise lost
    return code


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
    if not root.is_dir():
        raise UsageError(root, "does not exist", "name the workspace of desra mine, detect or cycle")
    if not workspace.exists():
        raise UsageError(root, "is no workspace", "name that of desra mine, detect or cycle")
    workspace.create()
    return workspace


def _is_done(settings: Cycling, finetuning: Finetuning) -> bool:
    """Whether this finetune has ended, been judged, and been promoted as far as it is to be."""
    mining = mining_of(settings)
    if not plan_finetune(finetuning).ended:
        return False
    comparison = plan_comparison(comparing_of(settings, mining, finetuning))
    return not comparison.missing() and not is_to_promote(settings, comparison, verdict_of(comparison))


def _compare_command(settings: Finetuning) -> str:
    """What judges a finetune."""
    flags = {"workspace": settings.workspace, "after": settings.output, "before": settings.gan_model, "lr": settings.lr,
             "group-by": None if settings.group_by == "duplicates" else settings.group_by}  # fmt: skip
    given = [f"--{name} {shlex.quote(str(value))}" for name, value in flags.items() if value]
    return " ".join(["desra compare", *given])


def _tell_finetune(plan: FinetunePlan) -> None:
    document, losses = read_json(plan.run.document) or {}, read_json(plan.run.losses) or []
    models = plan.run.models()
    last = int(models[-1].stem.rpartition("_")[2]) if models else 0
    early = ", and stopped early: the pixel loss had stopped falling" if last < plan.training.iterations else ""
    images = document.get("images", [])
    typer.echo(f"{last} iterations on {len(images)} images{early}")
    typer.echo(f"people   {resting_in_words(sum(image.get('mask_by') == 'person' for image in images))}")
    if losses:
        typer.echo(f"pixel loss {losses[0]['pixel']:.4f} at first, {losses[-1]['pixel']:.4f} at last")
    typer.echo(f"models   {plan.run.root / 'models'}\nlosses   tensorboard --logdir {plan.run.tensorboard}")


def _tell_verdict(workspace: Workspace, verdict: Verdict, promoted: Path | None, comparison: Comparison) -> None:
    control = verdict.control
    clean = f"{control.clean_images} of them clean"
    typer.echo(f"judged by {control.images} held-out images, {clean}, with {control.regions} artifact regions")
    typer.echo(f"people   {resting_in_words(comparison.by_people)}")
    typer.echo(as_text(score_rows(verdict)))
    if verdict.passed:
        typer.echo(f"passed   {verdict.best}")
    for reason in verdict.reasons:
        typer.echo(f"{verdict.outcome:8} {printable(reason)}")
    if promoted:
        typer.echo(f"promoted {promoted / 'model.pth'}; desra rollback --workspace {workspace.root} undoes it")
    typer.echo(f"verdict  {workspace.verdict}")
    if workspace.report.exists():
        typer.echo(f"report   {workspace.report}")
