"""Calibrate: artifact-free pairs in, class weights out."""

from __future__ import annotations

from typing import NamedTuple

from prefect.runtime import flow_run

from desra_core.calibration.counting import Exclusion, corpus_of, plan_counting
from desra_core.calibration.results import CalibratedWeights, derive_calibration
from desra_core.errors import TransientError
from desra_core.settings import Machine
from desra_core.settings.models import Calibrating
from flows import FLOWS
from flows.corpus import opened_workspace
from flows.corpus_flow import corpus_flow, corpus_name
from tasks.artifacts import Summary, tag_run
from tasks.calibration import count_shard, publish_weights
from tasks.dask_connection import open_dask
from tasks.progress import RunProgress


class Calibrated(NamedTuple):
    """The end of a calibration: its Prefect ids, the result of the run before it, and the weights."""

    flow_run: str
    task_runs: int
    found: Summary
    weights: CalibratedWeights

    @property
    def in_one_line(self) -> str:
        """Say in a line how it ended."""
        calibrated = sum(row.state == "calibrated" for row in self.weights.rows)
        return f"{calibrated} classes calibrated from {self.weights.histogram.seen} images; {self.found.in_one_line}"

    @property
    def lacking(self) -> bool:
        """Say whether a person should look at how it ended."""
        return self.found.lacking

    @property
    def problem(self) -> TransientError | None:
        """Give the reason why a run that ended is not complete, or None."""
        return self.found.problem


@corpus_flow("calibrate")
def calibrate(calibrating: Calibrating, machine: Machine = Machine(), rescan: bool = True) -> Calibrated:  # noqa: B008
    """Compare all pairs, count their similarity by class, and derive weights and thresholds from that.

    Args:
        calibrating: The pairs, and how weights are derived.
        machine: Where and how wide to compute.
        rescan: Look for new and changed files first.
    """
    corpus = corpus_of(calibrating)
    workspace = opened_workspace(corpus.workspace)
    tag_run("calibrate", corpus_name(corpus), workspace.root.name)
    with workspace.locked():
        found = FLOWS[type(corpus)](corpus, machine, rescan)
        counting = plan_counting(corpus, Exclusion(calibrating.exclude))
        missing = counting.missing()
        if missing:
            with (
                open_dask(machine, folder=workspace.root, most_pixels=counting.most_pixels) as dask,
                RunProgress("count", sum(missing.values()), 1) as progress,
            ):
                for number in missing:
                    count_shard(number, counting, dask, progress)
        calibrated = derive_calibration(calibrating, corpus, counting)
        publish_weights(calibrated, calibrating.output)
    return Calibrated(str(flow_run.id), len(missing) + 1, found, calibrated)
