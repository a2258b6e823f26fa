"""Answer Prometheus for desra serve: from the file that runs write, the queue, and the GPUs."""

import shutil
import subprocess
from collections.abc import Mapping

from desra_core.workspace import Workspace
from tasks.metrics import Key, read_samples, render

_SMI_SECONDS = 5
_QUERY = ("--query-gpu=index,memory.used,memory.total", "--format=csv,noheader,nounits")


def metrics_text(workspace: Workspace, queue: Mapping[str, int]) -> bytes:
    """Write the metrics of a workspace, which may have vanished, in Prometheus' text format.

    Args:
        workspace: The workspace.
        queue: Number of runs by state.
    """
    served: dict[Key, float] = {("desra_workspace_in_use", ()): float(workspace.owner() is not None)}
    served |= {("desra_runs", (state,)): count for state, count in queue.items()}
    return render(read_samples(workspace.metrics) | served | gpu_memory(), workspace)


def gpu_memory() -> dict[Key, float]:
    """Ask nvidia-smi for the memory of each GPU, which takes less than to import torch; nothing where it is missing."""
    samples: dict[Key, float] = {}
    if (command := shutil.which("nvidia-smi")) is None:
        return samples
    try:
        told = subprocess.run(
            [command, *_QUERY], capture_output=True, text=True, timeout=_SMI_SECONDS, check=True, errors="replace"
        )
    except (OSError, subprocess.SubprocessError):
        return samples
    for line in told.stdout.splitlines():
        index, *mebibytes = map(str.strip, line.split(","))
        for what, number in zip(("used", "size"), mebibytes, strict=False):
            if number.isdecimal():  # a GPU that is cut in parts has no numbers
                samples[f"desra_gpu_memory_{what}_bytes", (index,)] = int(number) * 2**20
    return samples
