"""How time and memory grow: with the names of a workspace that is done, with those of a plan, and with megapixels.

An exponent of 1 is linear; it is fitted between a row and the one above it. In a workspace with names, what the
smallest one takes is taken off first: Python, imports. Run it with ``python tests/benchmarks/run.py scale``; NAMES in
the environment for other numbers than 1000 10000 100000, PICTURE for a file with the curves.
"""

import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from bench_planning import _environment, _fill, _mine, _peak, _template, _write_photos
from markdown import print_table
from memory import MEGABYTE, peak_memory
from pairs import large_pair

from desra_core.files import digest
from desra_core.workspace import Workspace
from desra_core.workspace.manifest import read_manifest
from desra_core.workspace.products import SCHEMA, read_records

NAMES = (1000, 10_000, 100_000)
PLANNED = (1000, 10_000, 100_000, 1_000_000)
SIDES = (512, 1024, 2048, 4096, 8192, 10_240)
SHARD = 1000
REPEATS = 2


class Cost(NamedTuple):
    """Seconds, and the peak of the resident memory in bytes."""

    seconds: float
    memory: float


Costs = dict[int, Cost]


def run() -> None:
    sizes = [int(size) for size in os.environ.get("NAMES", "").split()] or list(NAMES)
    curves: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="desra-bench-") as name:
        commands: dict[str, Costs] = {}
        for size in sizes:
            folder = Path(name) / str(size)
            _write_photos(folder / "photos", size)
            _fill(folder, _template(folder / "template"), size)
            for what, command in _commands(folder).items():
                commands.setdefault(what, {})[size] = _of_command(command)
        for what, costs in commands.items():
            print(f"\n{what}: all is done, a tenth has artifacts.\n")
            _print(costs, "names", fixed=costs[sizes[0]].seconds)
            curves[what] = [(size, cost.seconds) for size, cost in costs.items()]
        print("\nThe plan alone, half of the names with a record, none with a picture.\n")
        planned = {size: _in_a_process("plan", str(Path(name) / str(sizes[0]) / "ws"), str(size)) for size in PLANNED}
        _print(planned, "names", fixed=planned[PLANNED[0]].seconds)
    print("\nSimilarity and mask of one pair, one thread; the memory includes the pair and Python.\n")
    pixels = {side**2: _in_a_process("pixels", str(side)) for side in SIDES}
    _print(pixels, "pixels")
    if picture := os.environ.get("PICTURE"):
        from desra_core.report.charts import line_chart, save

        save(line_chart(curves, xlabel="names in the workspace", ylabel="seconds"), Path(picture))


def _commands(folder: Path) -> dict[str, list[str]]:
    place = ["--workspace", str(folder / "ws")]
    desra = [sys.executable, "-m", "deployments.cli"]
    return {
        "desra mine": _mine(folder / "photos", folder / "ws"),
        "desra status": [*desra, "status", *place],
        "desra status --sizes": [*desra, "status", "--sizes", *place],
        "desra report": [*desra, "report", *place],
        "desra gc": [*desra, "gc", *place],
    }


def _of_command(command: list[str]) -> Cost:
    """The least seconds and peak memory of some runs, after one that writes what was not there."""
    costs = []
    for _ in range(1 + REPEATS):
        started = time.perf_counter()
        with subprocess.Popen(
            command, env=_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as desra:
            memory = 0.0
            while desra.poll() is None:
                # What the system tells at its end would include this process, from which it was forked.
                with contextlib.suppress(OSError, StopIteration):
                    memory = max(memory, _peak(desra.pid) * MEGABYTE)
                time.sleep(0.01)
        assert desra.returncode == 0, command
        costs.append(Cost(time.perf_counter() - started, memory))
    return Cost(*(min(values) for values in zip(*costs[1:], strict=True)))


def _print(costs: Costs, unit: str, fixed: float = 0.0) -> None:
    rows: list[list[str | float]] = []
    for count, cost, exponent in _with_exponents(costs, fixed):
        rows.append([f"{count:,}", cost.seconds, exponent, cost.memory / MEGABYTE])
    print_table([unit, "seconds", "exponent", "peak MB"], rows)


def _with_exponents(costs: Costs, fixed: float) -> Iterator[tuple[int, Cost, str]]:
    before: tuple[int, float] | None = None
    for count, cost in costs.items():
        own = cost.seconds - fixed
        exponent = ""
        if before and own > 0 and before[1] > 0:
            exponent = f"{math.log(own / before[1]) / math.log(count / before[0]):.2f}"
        yield count, cost, exponent
        before = count, own


def _in_a_process(*arguments: str) -> Cost:
    done = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, check=True)
    return Cost(*json.loads(done.stdout))


def plan(template: Path, count: int) -> Cost:
    """Plan a run over a manifest of many names, in a workspace of its own that is made from a small one."""
    from desra_core.planning.plan import load_settings, make_plan

    _, target = load_settings(Workspace(template))
    with tempfile.TemporaryDirectory(prefix="desra-bench-") as name:
        workspace = Workspace(Path(name))
        subprocess.run([sys.executable, __file__, "write", str(template), name, str(count)], check=True)
        started = time.perf_counter()
        pending = make_plan(workspace, read_manifest(workspace), target).pending
        seconds = time.perf_counter() - started
    assert pending == count
    return Cost(seconds, peak_memory())


def write(template: Path, folder: Path, count: int) -> None:
    """Write a manifest, and records for half of it, with the values of a template."""
    small, known = read_manifest(Workspace(template)), read_records(Workspace(template))
    ids = [digest(str(index).encode()) for index in range(count)]
    names = [f"{index // SHARD:05d}/{index:08d}" for index in range(count)]
    own = {"id": ids, "lr_hash": ids, "name": names, "lr_path": [f"{name}.png" for name in names],
           "shard": [index // SHARD for index in range(count)]}  # fmt: skip
    table = small.take(np.arange(count) % small.num_rows)
    for column, values in own.items():
        index = table.schema.get_field_index(column)
        table = table.set_column(index, table.schema.field(index), pa.array(values, table.schema.field(index).type))
    workspace = Workspace(folder)
    pq.write_table(table, workspace.manifest)
    workspace.records.mkdir()
    for shard in range(max(1, count // SHARD // 2)):
        within = ids[shard * SHARD : min((shard + 1) * SHARD, count // 2)]
        records = known.take(np.arange(len(within)) % known.num_rows)
        index = SCHEMA.get_field_index("id")
        pq.write_table(records.set_column(index, SCHEMA.field("id"), [within]), workspace.shard_records(shard))


def pixels(side: int) -> Cost:
    """Compute similarity and mask of a pair of photos of this side."""
    import cv2
    import numba

    from desra_core import artifact_mask, variance_similarity

    cv2.setNumThreads(1)
    numba.set_num_threads(1)
    mse_sr, gan_sr = large_pair(side, depth=8, alpha=False, patch=min(side, 1024))
    artifact_mask(variance_similarity(mse_sr[:256, :256], gan_sr[:256, :256]))  # compiles
    started = time.perf_counter()
    artifact_mask(variance_similarity(mse_sr, gan_sr))
    return Cost(time.perf_counter() - started, peak_memory())


def _main(what: str, *arguments: str) -> None:
    if what == "write":
        write(Path(arguments[0]), Path(arguments[1]), int(arguments[2]))
        return
    print(json.dumps(plan(Path(arguments[0]), int(arguments[1])) if what == "plan" else pixels(int(arguments[0]))))


if __name__ == "__main__":
    _main(*sys.argv[1:])
