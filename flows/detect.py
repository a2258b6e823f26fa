"""Detect: two folders of super-resolution results in, artifact masks out."""

from desra_core.settings import Detection, Machine
from flows.corpus_flow import corpus_flow, process_corpus
from tasks.run_end import Summary


@corpus_flow
def detect(detection: Detection, machine: Machine = Machine(), rescan: bool = True) -> Summary:  # noqa: B008
    """Find the artifacts in every pair of two folders.

    Args:
        detection: The folders, and how to compare.
        machine: Where and how wide to compute.
        rescan: Look for new and changed files first.
    """
    return process_corpus(detection, machine, rescan=rescan)
