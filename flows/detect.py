"""Detect: two folders of super-resolution results in, artifact masks out."""

from desra_core.settings import Detection, Machine
from flows.corpus import process_corpus, shard_runner
from flows.corpus_flow import corpus_flow
from tasks.run_end import Summary


@corpus_flow("detect", task_runner=shard_runner())
def detect(detection: Detection, machine: Machine = Machine(), rescan: bool = True) -> Summary:  # noqa: B008
    """Find the artifacts in every pair of two folders.

    Args:
        detection: The folders, and how to compare.
        machine: Where and how wide to compute.
        rescan: Look for new and changed files first.
    """
    return process_corpus(detection, machine, rescan=rescan)
