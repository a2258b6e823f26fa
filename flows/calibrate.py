"""Calibrate: artifact-free pairs in, class weights out."""

from collections.abc import Callable
from dataclasses import dataclass

from desra_core.calibration.counting import corpus_of, derive_calibration, plan_counting, read_exclusion
from desra_core.calibration.weights import CalibratedWeights
from desra_core.evaluation.table import counted
from desra_core.settings import Machine, Mining
from desra_core.settings.models import Calibrating
from flows.desra_flow import desra_flow, opened_workspace
from flows.detect import detect
from flows.mine import mine
from tasks.dask_cluster import open_dask
from tasks.judging import count_shard, publish_weights
from tasks.progress import RunProgress
from tasks.run_end import RunEnd, Summary


@dataclass(frozen=True, kw_only=True)
class Calibrated(RunEnd):
    """How a calibration and the run before it ended, and the weights."""

    found: Summary
    weights: CalibratedWeights


@desra_flow
def calibrate(calibrating: Calibrating, machine: Machine = Machine(), rescan: bool = True) -> Calibrated:  # noqa: B008
    """Compare all pairs, count their similarity by class, and derive weights and thresholds from the counts.

    Args:
        calibrating: The pairs, and how weights are derived.
        machine: Where and how wide to compute.
        rescan: Look for new and changed files first.
    """
    corpus = corpus_of(calibrating)
    workspace = opened_workspace(corpus.workspace)
    flow: Callable[..., Summary] = mine if isinstance(corpus, Mining) else detect
    with workspace.locked() as workspace:
        found = flow(corpus, machine, rescan)
        counting = plan_counting(corpus, read_exclusion(calibrating.exclude))
        missing, failures = counting.missing(), 0
        if missing:
            with (
                open_dask(
                    machine, folder=workspace.root, most_pixels=counting.most_pixels, files=counting.some_files
                ) as dask,
                RunProgress("count", sum(missing.values()), 1) as progress,
            ):
                for number in missing:
                    failures += count_shard(number, counting, dask, progress)
        calibrated = derive_calibration(calibrating, corpus, counting)
        publish_weights(calibrated, calibrating.output)
    classes = counted(sum(row.state == "calibrated" for row in calibrated.rows), "class", "classes")
    images = counted(calibrated.histogram.seen, "image")
    return Calibrated(
        in_one_line=f"{classes} calibrated from {images}; {found.in_one_line}",
        task_runs=len(missing) + 1,
        to_look_at=found.to_look_at or failures > 0,
        problem=found.problem,
        found=found,
        weights=calibrated,
    )
