"""The memory of this process."""

import resource
import sys
from pathlib import Path

MEGABYTE = 2**20


def peak_memory() -> int:
    """The most memory that this process ever had resident, in bytes.

    Linux lets ``ru_maxrss`` begin with the memory of the parent, so its own account of the process is read where
    there is one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
