"""A single run over very many images: what grows with it, in the driver, its cluster and its Prefect server.

A whole ``desra detect`` over tiny pairs, watched from outside. Slopes are fitted by least squares over the samples
after the first tenth of the images. Run it with ``python tests/benchmarks/run.py long_run``; IMAGES in the environment
for another number than 100,000, SAMPLES for a file that gets all samples.
"""

import contextlib
import json
import os
import re
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from bench_many_runs import database_of
from markdown import print_table
from pairs import write_tiny_pairs

from desra_core.workspace import Workspace

IMAGES = 100_000
SIDE = 16
WORKERS = 2
EVERY = 5.0  # seconds between samples
WARM_UP = 0.1  # of the images
PROGRESS = re.compile(rb"(\d+) of \d+ images, ")

# What is sampled, with its unit in the table and the number by which it is divided for that.
KINDS = {
    "driver RSS": ("MB", 2**20),
    "driver USS": ("MB", 2**20),
    "driver threads": ("", 1),
    "driver open files": ("", 1),
    "workers USS": ("MB", 2**20),
    "workers threads": ("", 1),
    "workers open files": ("", 1),
    "server USS": ("MB", 2**20),
    "server open files": ("", 1),
    "temporary files": ("", 1),
    "database": ("MB", 2**20),
    "write-ahead log": ("MB", 2**20),
    "task runs": ("", 1),
}

Sample = dict[str, float]


def run() -> None:
    count = int(os.environ.get("IMAGES", str(IMAGES)))
    with tempfile.TemporaryDirectory(prefix="desra-bench-", dir=os.environ.get("FOLDER")) as name:
        folder = Path(name)
        write_tiny_pairs(folder, count, SIDE)
        started = time.perf_counter()
        samples = _watched(folder, count)
        seconds = time.perf_counter() - started
        if path := os.environ.get("SAMPLES"):
            Path(path).write_text(json.dumps(samples))
    print(f"{count:,} pairs of {SIDE} px in {seconds:.0f} s, {count / seconds:.0f} images/s.\n")
    _print(samples, count)


def _watched(folder: Path, count: int) -> list[Sample]:
    """Run the command; returns the samples until its last image, with the ``seconds`` and ``images`` done by then."""
    (folder / "tmp").mkdir()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
    command = [sys.executable, "-m", "deployments.cli", "detect", "--mse-sr", str(folder / "mse_sr"),
               "--gan-sr", str(folder / "gan_sr"), "--workspace", str(folder / "ws"),
               "--workers", str(WORKERS)]  # fmt: skip
    samples: list[Sample] = []
    with (
        (folder / "said").open("wb") as said,
        subprocess.Popen(command, env=environment | {"TMPDIR": str(folder / "tmp")}, stdout=said, stderr=said) as desra,
    ):
        driver, began = psutil.Process(desra.pid), time.monotonic()
        while desra.poll() is None:
            with contextlib.suppress(psutil.Error, OSError, sqlite3.Error):
                images = [int(number) for number in PROGRESS.findall((folder / "said").read_bytes())]
                if images and images[-1] < count:
                    seconds = time.monotonic() - began
                    samples.append({"seconds": seconds, "images": images[-1]} | _sample(driver, folder))
            time.sleep(EVERY)
    assert desra.returncode == 0, (folder / "said").read_text()[-2000:]
    return samples


def _sample(driver: psutil.Process, folder: Path) -> Sample:
    roles: dict[str, list[psutil.Process]] = {"workers": [], "server": []}
    for process in driver.children(recursive=True):
        roles["server" if "uvicorn" in process.cmdline() else "workers"].append(process)
    memory = driver.memory_full_info()
    sample = {
        "driver RSS": memory.rss,
        "driver USS": memory.uss,
        "driver threads": driver.num_threads(),
        "driver open files": driver.num_fds(),
        "workers threads": sum(worker.num_threads() for worker in roles["workers"]),
    }
    for role, processes in roles.items():
        sample[f"{role} USS"] = sum(process.memory_full_info().uss for process in processes)
        sample[f"{role} open files"] = sum(process.num_fds() for process in processes)
    temporary = [folder / "ws" / "tmp", folder / "tmp"]
    sample["temporary files"] = sum(len(files) for place in temporary for _, _, files in os.walk(place))
    workspace = Workspace(folder / "ws")
    sample["task runs"], sample["database"] = database_of(workspace)
    sample["write-ahead log"] = (workspace.prefect_home / "prefect.db-wal").stat().st_size
    return sample


def _print(samples: list[Sample], count: int) -> None:
    warm = [sample for sample in samples if sample["images"] >= WARM_UP * count]
    images = np.array([sample["images"] for sample in warm])
    rows: list[list[str | float]] = []
    for kind, (unit, divisor) in KINDS.items():
        values = np.array([sample[kind] for sample in warm])
        slope = np.polyfit(images, values, 1)[0]
        grows = f"{slope:.0f} bytes an image" if unit else f"{slope * 1e5:.1f} per 100,000 images"
        rows.append([f"{kind}{f', {unit}' if unit else ''}"]
                    + [f"{value / divisor:.0f}" for value in (values[0], np.median(values), values.max(), values[-1])]
                    + [grows])  # fmt: skip
    print_table([f"{len(warm)} samples after {WARM_UP:.0%} of the images", "first", "median", "most", "last", "slope"],
                rows)  # fmt: skip
