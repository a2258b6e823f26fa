"""Mine: a folder of photos and two checkpoints in, artifact masks and a dataset for finetuning out."""

from __future__ import annotations

from prefect import flow

from desra_core.settings import Machine, Mining
from flows.corpus import process_corpus, shard_runner
from flows.names import run_name
from tasks.summary import Summary


@flow(name="mine", flow_run_name=run_name, task_runner=shard_runner())
def mine(mining: Mining, machine: Machine = Machine(), rescan: bool = True) -> Summary:  # noqa: B008
    """Upscale every photo of a folder with both models, find the artifacts and gather them as a dataset.

    Parameters
    ----------
    mining
        What to upscale and compare, and how.
    machine
        Where and how wide to compute.
    rescan
        Look for new and changed files first.
    """
    return process_corpus(mining, machine, rescan=rescan)
