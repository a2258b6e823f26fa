"""All benchmarks in one run, or those named: ``python tests/benchmarks/run.py [similarity orchestration ...]``.

Nothing is asserted about time. Each comparison holds its baseline in the same run, because machines differ.
"""

import importlib
import os
import platform
import sys
import time
from collections.abc import Callable

TITLES = {
    "decode": "Decoding against Pillow and OpenCV",
    "similarity": "Similarity and fidelity against OpenCV's and scikit-image's float64 filters",
    "orchestration": "Orchestration and commits per image",
    "inference": "Super-resolution against the plain loop, and its share of desra mine",
    "agreement": "Real pairs of results, and wrong ones",
    "windows": "Windows, precision and memory of trained networks",
    "checksums": "Reading with the check of its bytes, against the reader alone",
    "memory": "Peak memory for a 16 MP pair",
    "detect": "The whole of desra detect",
    "training": "Steps of a finetune against the plain loop, and its loader",
    "gate": "The gate in rounds, against all candidates on all images",
    "scale": "How time and memory grow with names and megapixels",
    "review": "A hundred regions in desra review, and tiles of 16 MP",
    "planning": "From the command to the first stage, with 100,000 photos",
    "many_runs": "A hundred runs of a thousand images on one Prefect server",
    "long_run": "What grows in a single run of 100,000 images",
}


def benchmark(name: str) -> Callable[[], None]:
    """The function of a benchmark. What it imports is its own affair and does not weigh on the others."""
    function: Callable[[], None] = importlib.import_module(f"bench_{name}").run
    return function


def main(names: list[str]) -> int:
    if unknown := sorted(set(names) - set(TITLES)):
        print(f"no benchmark is called {unknown[0]}: there are {', '.join(TITLES)}", file=sys.stderr)
        return 2
    load = os.getloadavg()[0]
    cores = len(os.sched_getaffinity(0))
    print(f"# Benchmarks\n\nPython {platform.python_version()}, {cores} cores, load {load:.1f} at the start", end="")
    print(" (not a quiet machine: times are too long)" if load > 0.5 else "")
    for name in names or TITLES:
        print(f"\n## {TITLES[name]}\n", flush=True)
        started = time.perf_counter()
        benchmark(name)()
        print(f"\n({time.perf_counter() - started:.0f} s, load {os.getloadavg()[0]:.1f} at the end)", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
