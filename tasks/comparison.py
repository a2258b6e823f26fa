"""The tasks of the gate: judge candidates on held-out images, apply the gate, promote the best model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from desra_core.errors import ImageError
from desra_core.evaluation.table import counted
from desra_core.gate.comparison import Comparison, decide_and_publish, judge_settings
from desra_core.gate.criteria import Verdict
from desra_core.gate.judge import judge_stage
from desra_core.gate.model_registry import promote
from desra_core.networks.checkpoints import load_model
from desra_core.planning.keys import target_of
from desra_core.report import write_report
from desra_core.report.finetuning import verdict_markdown
from desra_core.settings import Machine
from desra_core.training.run_folder import read_json
from desra_core.workspace import Workspace
from desra_core.workspace.manifest import ImageRef
from tasks.artifacts import show_outcome, show_overview
from tasks.dask_map import Dask
from tasks.images import each_image
from tasks.shards import explicit_key


@task(task_run_name="judge", cache_key_fn=explicit_key, persist_result=True, result_serializer="json")
def judge_images(cache_key: str, comparison: Comparison, machine: Machine) -> int:  # noqa: ARG001
    """Judge every candidate on every held-out image that lacks its result.

    The caller refreshes the cache where the workspace lacks a result, as for the stages of a shard.

    Returns:
        The number of images that could not be judged.
    """
    workspace = Workspace(comparison.settings.workspace)
    _, weights = target_of(comparison.corpus)
    missing = counted(len(comparison.missing()), "image")

    def judging(dask: Dask, device: str) -> Callable[[ImageRef, Any], Any]:
        models = counted(len(comparison.candidates) - 1, "saved model")
        facts = [
            f"{models}, judged on {counted(len(comparison.images), 'held-out image')}",
            f"{missing} to judge; the others are judged already",
        ]
        title = f"**desra compare** of `{comparison.before}` and its finetuned models"
        show_overview(title, facts, dask)
        settings = judge_settings(
            comparison, weights, device=device, tile=machine.tile, threads=dask.threads, max_pixels=dask.max_pixels
        )
        return partial(judge_stage, workspace=workspace, settings=settings)

    scale = load_model(comparison.before).scale
    work = comparison.work()
    results = each_image("judge", judging, work, machine, networks=True, scale=scale, folder=workspace.root)
    return len({image.id for image, result in results if isinstance(result, ImageError)})


@task(task_run_name="verdict", cache_policy=NO_CACHE)
def decide_verdict(comparison: Comparison) -> Verdict:
    """Decide by the scores whether a candidate passes the gate; publish the verdict in the workspace and in the UI."""
    verdict = decide_and_publish(comparison)
    text = verdict_markdown(Workspace(comparison.settings.workspace))
    create_markdown_artifact(text, key="verdict", description="Verdict of the gate.")
    return verdict


@task(task_run_name="promote", cache_policy=NO_CACHE)
def promote_best(comparison: Comparison, verdict: Verdict) -> Path:
    """Make the best candidate the workspace's current model, by one rename; return its entry in the registry."""
    best = comparison.best(verdict)
    assert best is not None
    assert best.model is not None
    assert best.source is not None
    record = (read_json(best.source.with_suffix(".json")) or {}) | {"source": str(best.source), "weights": best.weights}
    scores = [asdict(score) for score in verdict.scores if score.candidate == verdict.best]
    summary = {"best": verdict.best, "scores": scores}
    workspace = Workspace(comparison.settings.workspace)
    return promote(workspace, best.model, parent=comparison.before, record=record, verdict=summary)


@task(task_run_name="report", cache_policy=NO_CACHE)
def publish_report(workspace: Workspace, line: str) -> None:
    """Write the report of the workspace, with the latest verdict, and show in the UI how the run ended."""
    write_report(workspace)
    show_outcome(workspace, line)
