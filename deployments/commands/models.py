"""``desra finetune``, ``compare`` and ``cycle``: plan first, start servers only where there is something to do."""

import shlex
from dataclasses import asdict
from pathlib import Path

import typer

from deployments.commands import runs
from deployments.serving.server import ServerLostError, end_leftover_server
from desra_core.errors import printable
from desra_core.evaluation.table import as_text, counted
from desra_core.files import read_document
from desra_core.gate import comparison as gate
from desra_core.gate.comparison import Comparison, comparing_of, plan_comparison
from desra_core.gate.criteria import Verdict, score_rows
from desra_core.gate.model_registry import current_model
from desra_core.planning.doubts import stored_doubts
from desra_core.planning.plan import load_settings
from desra_core.settings import Machine
from desra_core.settings.models import Comparing, Cycling, Finetuning, Serving, Twinning
from desra_core.training.plan import RunFolder, check_networks, iteration_of, plan_finetune
from desra_core.training.twin import delete_training, plan_twin, twinning_of
from desra_core.workspace import Workspace
from desra_core.workspace.matching import match
from tasks.logs import say

GATE_FAILED = 3

_NOTHING_TO_TRAIN_ON = "no artifact in the training pool: nothing to train on, and nothing was trained"


def run_finetune(settings: Finetuning, machine: Machine) -> int:
    """Finetune, if there is anything to do, and print how it went; return the exit code."""
    workspace = runs.existing_workspace(settings.workspace)
    with workspace.locked() as workspace:
        end_leftover_server(workspace)
        plan = plan_finetune(settings)
        if plan.empty:
            typer.echo(_NOTHING_TO_TRAIN_ON)
            return 0
        if plan.ended:
            typer.echo("nothing to do: this finetune has ended before")
        else:
            for doubt in stored_doubts(workspace, *load_settings(workspace)):
                say(f"warning: the pseudo ground truths may be of no real pair: {printable(doubt)}")
            check_networks(plan.gan_model, plan.training)
            runs.run_flow(workspace, settings, machine, (settings, plan))
        _show_finetune(plan.run, settings.iterations)
        typer.echo(f"next     {_compare_command(settings, plan.run.root)}")
    return 0


def run_twin(settings: Twinning, machine: Machine) -> int:
    """Train a twin, if there is anything to do, and print its scores; return the exit code."""
    plan = plan_twin(settings)
    workspace = Workspace(plan.run.root.parent)
    verdict = plan.verdict
    if verdict:
        typer.echo("nothing to do: this twin was trained before")
        delete_training(plan, verdict)
    else:
        check_networks(plan.gan_model, plan.training)
        with workspace.opened():
            end_leftover_server(workspace)
            verdict = runs.run_flow(workspace, settings, machine).verdict
    rows = [
        {"model": model, "PSNR dB": f"{verdict.psnr[model]:.2f}", "SSIM": f"{verdict.ssim[model]:.4f}"}
        for model in verdict.psnr
    ]
    typer.echo(as_text(rows))
    typer.echo(f"texture  mean similarity of twin and sharp photo {verdict.similarity:.3f}")
    if not verdict.passed:
        typer.echo(f"failed   the twin is no better than the GAN model in PSNR, so {settings.output} is not written")
        typer.echo(f"next     delete {workspace.root}, and train longer (desra twin --iterations) or on more photos")
        return GATE_FAILED
    typer.echo(f"twin     {settings.output}")
    if settings.output.parent.name == "twin":
        corpus, model = (shlex.quote(str(path)) for path in (settings.output.parents[1], settings.gan_model))
        typer.echo(f"next     desra mine PHOTOS --gan-model {model} --workspace {corpus}")
    return 0


def twin_first(settings: Cycling, machine: Machine) -> int:
    """Train the workspace's own twin where no other MSE model is given and there is none; return the exit code."""
    twinning = twinning_of(settings)
    if twinning is None:
        return 0
    if not isinstance(settings, Serving):  # desra serve has checked all of it
        mining = gate.mining_of(settings)
        match(mining.sources, settings.workspace)  # refuses folders without photos, or without labels of them
        gate.check_mining(settings)
        gate.check_training(settings, mining)
    say(f"training the MSE twin of {settings.gan_model} first, since there is none")
    return run_twin(twinning, machine)


def run_compare(settings: Comparing, machine: Machine, *, as_json: bool = False) -> int:
    """Judge, if anything is not judged yet, and print the verdict, in words or as JSON; return the exit code."""
    workspace = runs.existing_workspace(settings.workspace)
    with workspace.locked() as workspace:
        end_leftover_server(workspace)
        comparison = plan_comparison(settings)
        failures = 0
        promoted: Path | None = None
        if comparison.missing() or (settings.promote and gate.verdict_of(comparison).passed):
            ended = runs.run_flow(workspace, settings, machine, (settings, comparison))
            verdict, failures, promoted = ended.verdict, ended.failures, ended.promoted
        else:
            if not as_json:
                typer.echo("nothing to do: all was judged before")
            verdict = gate.decide_and_publish(comparison)
            runs.renew_report(workspace)
        if as_json:
            about = {"workspace": workspace.root, "before": comparison.before, "after": settings.after}
            counts = {"human_masks": comparison.human_masks, "failures": failures, "promoted": promoted}
            runs.show_json(about | {"outcome": verdict.outcome} | asdict(verdict) | counts)
        else:
            _show_verdict(workspace, verdict, promoted, comparison)
    return int(failures > 0) if verdict.passed else GATE_FAILED


def run_cycle(settings: Cycling, machine: Machine) -> int:
    """Mine, finetune, judge and promote, as far as it is not done, and print how it went; return the exit code."""
    workspace = Workspace(settings.workspace)
    broken: tuple[str, ...] = ()
    unjudged = 0
    promoted: Path | None = None
    lost: ServerLostError | None = None
    is_new = not workspace.exists()
    with workspace.opened() as workspace:
        end_leftover_server(workspace)
        if code := twin_first(settings, machine):
            return code
        mining = gate.mining_of(settings)
        which = "the workspace's current model" if mining.gan_model != settings.gan_model else "--gan-model"
        if is_new:  # before photos are read, so that a refused command leaves no workspace
            gate.check_training(settings, mining)
        say(f"finding the artifacts of {which}, {mining.gan_model}")
        prepared = runs.prepare_corpus(mining)
        finetuning = gate.finetuning_of(settings, mining)
        # Plan as far as it is known: a finetune when all artifacts are found, a comparison when the finetune has ended.
        plan = None if prepared.plan.pending else plan_finetune(finetuning)
        comparison = plan_comparison(comparing_of(settings, mining, plan.run.root)) if plan and plan.ended else None
        if comparison:
            judged = not comparison.missing()
            nothing_to_do = judged and not gate.is_to_promote(settings, comparison, gate.verdict_of(comparison))
        else:
            nothing_to_do = plan is not None and plan.empty
        if nothing_to_do:
            runs.renew_results(prepared)
        else:
            gate.check_training(settings, mining)
            before = current_model(workspace)
            try:
                plans = (mining, prepared), (finetuning, plan)
                cycled = runs.run_flow(workspace, settings, machine, *plans, rescan=False)
                broken, promoted = cycled.mined.broken_shards, cycled.promoted
                comparison = cycled.compared.comparison if cycled.compared else None
                unjudged = cycled.compared.failures if cycled.compared else 0
            except ServerLostError as error:
                current = current_model(workspace)
                if current is None or current == before:
                    raise
                # The model was promoted, so this cycle has ended. To start anew would begin the next cycle.
                lost, promoted = error, current.parent
                comparison = plan_comparison(comparing_of(settings, mining, plan_finetune(finetuning).run.root))
        code = runs.sum_up(prepared, mining, broken)
        if comparison is None:
            typer.echo(_NOTHING_TO_TRAIN_ON)
            return code
        finetuned = comparison.settings.after
        _show_finetune(RunFolder(finetuned), settings.iterations)
        verdict = gate.decide_and_publish(comparison)
        _show_verdict(workspace, verdict, promoted, comparison)
        if settings.promote and verdict.passed and not promoted:
            again = f"{_compare_command(finetuning, finetuned)} --promote"
            typer.echo(f"not promoted again, because it was rolled back; {again} promotes it")
            return GATE_FAILED
    code = max(code, int(unjudged > 0)) if verdict.passed else GATE_FAILED
    if lost is not None:
        lost.code = code
        raise lost
    return code


def _compare_command(settings: Finetuning, output: Path) -> str:
    """Return the command that judges a finetune."""
    flags = {"workspace": settings.workspace, "after": output, "before": settings.gan_model, "lr": settings.lr,
             "group-by": None if settings.group_by == "duplicates" else settings.group_by}  # fmt: skip
    given = [f"--{name} {shlex.quote(str(value))}" for name, value in flags.items() if value]
    return " ".join(["desra compare", *given])


def _show_finetune(run: RunFolder, iterations: int) -> None:
    for lost in run.lost_models():
        say(f"warning: {printable(lost)}")
    document, losses = read_document(run.document), run.read_losses()
    models = run.models()
    last = iteration_of(models[-1]) if models else 0
    early = ", and stopped early: the pixel loss had stopped falling" if last < iterations else ""
    images = document.get("images", [])
    typer.echo(f"{counted(last, 'iteration')} on {counted(len(images), 'image')}{early}")
    runs.show_people(sum(image.get("mask_by") == "person" for image in images))
    if losses:
        typer.echo(f"pixel loss {losses[0]['pixel']:.4f} at first, {losses[-1]['pixel']:.4f} at last")
    typer.echo(f"models   {run.root / 'models'}\nlosses   tensorboard --logdir {run.tensorboard}")


def _show_verdict(workspace: Workspace, verdict: Verdict, promoted: Path | None, comparison: Comparison) -> None:
    control = verdict.control
    images, regions = counted(control.images, "held-out image"), counted(control.regions, "artifact region")
    typer.echo(f"judged by {images}, {control.clean_images} of them clean, with {regions}")
    runs.show_people(comparison.human_masks)
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
