"""Detect: two folders of super-resolution results in, artifact masks out."""

from desra_core.settings import Detection, Machine
from flows.desra_flow import desra_flow, process_corpus
from tasks.run_end import Summary


@desra_flow
def detect(detection: Detection, machine: Machine = Machine(), rescan: bool = True) -> Summary:  # noqa: B008
    """Find the artifacts in every pair of two folders.

    Args:
        detection: The folders, and how to compare.
        machine: Where and how wide to compute.
        rescan: Look for new and changed files first.
    """
    return process_corpus(detection, machine, rescan=rescan)
