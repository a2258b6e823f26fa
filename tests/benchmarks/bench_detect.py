"""How fast ``desra detect`` is as a whole, by where the time goes, and how soon it sees that nothing is left to do.

Run it with ``python tests/benchmarks/run.py detect``.
"""

import os
import resource
import sqlite3
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import pyarrow.compute as pc
import pyarrow.parquet as pq
from markdown import print_table
from pairs import write_photo_pairs, write_tiny_pairs

from desra_core import artifact_mask, variance_similarity
from desra_core.images.codec import decode, encode_mask
from desra_core.workspace import Workspace

PAIRS = 100
SIDE = 1024
WORKERS = 2
MANY = 10_000
TINY = 24


class Ran(NamedTuple):
    """A finished command: when it was started, spoke of its server and ended, in seconds since the epoch.

    ``cpu`` is what all of its processes computed, which other programs hardly change.
    """

    started: float
    server: float
    ended: float
    cpu: float

    @property
    def seconds(self) -> float:
        return self.ended - self.started


def run() -> None:
    with tempfile.TemporaryDirectory(prefix="desra-bench-") as name:
        _whole(Path(name))
    with tempfile.TemporaryDirectory(prefix="desra-bench-") as name:
        _many(Path(name))


def _whole(folder: Path) -> None:
    """A corpus of photos, from nothing to masks, and the same command again."""
    write_photo_pairs(folder, PAIRS, SIDE)
    plain, plain_cpu = _plain_loop(folder)
    first = _detect(folder)
    again = _detect(folder)
    megapixels = PAIRS * SIDE**2 / 1e6
    print(f"{PAIRS} pairs of {SIDE}x{SIDE} px ({megapixels:.0f} MP), a third with an artifact, {WORKERS} workers.\n")

    def row(what: str, seconds: float) -> list[str | float]:
        return [what, seconds, f"{100 * seconds / first.seconds:.0f} %", f"{PAIRS / seconds:.1f}"]

    parts = _parts(Workspace(folder / "workspace"), first)
    shards = parts["similarity"] + parts["mask"] + parts["rest"]
    print_table(
        ["", "seconds", "share", "images/s"],
        [
            row("desra detect", first.seconds),
            row("  Python, scan, plan, Prefect server", parts["server"]),
            row("  import of the flow, its start, Dask cluster", parts["cluster"]),
            row("  computing similarity (sum / workers)", parts["similarity"]),
            row("  computing masks (sum / workers)", parts["mask"]),
            row("  rest of the shard: workers' imports, orchestration, commits", parts["rest"]),
            row("  tables, arrival of task runs, shutdown", parts["end"]),
            row("the shard alone", shards),
            row("plain loop, one process: decode, similarity, mask, PNG", plain),
            row("desra detect again, nothing to do", again.seconds),
        ],
    )
    print(f"\nSpeed, x plain loop: desra detect {plain / first.seconds:.2f}, the shard alone {plain / shards:.2f}.")
    print(f"CPU seconds: desra detect {first.cpu:.1f}, plain loop {plain_cpu:.1f}.")


def _many(folder: Path) -> None:
    """A corpus of very many tiny images, and the same command again."""
    write_tiny_pairs(folder, MANY, TINY)
    first = _detect(folder)
    again = min((_detect(folder) for _ in range(3)), key=lambda ran: ran.seconds)
    imports = _timed([sys.executable, "-c", "import deployments.cli"], dict(os.environ))
    print(f"\n{MANY} pairs of {TINY}x{TINY} px, {WORKERS} workers.\n")
    print_table(
        ["", "seconds", "CPU seconds"],
        [
            ["desra detect", first.seconds, first.cpu],
            ["desra detect again, nothing to do (aim: below 2)", again.seconds, again.cpu],
            ["  of it Python and imports", imports.seconds, imports.cpu],
        ],
    )


def _plain_loop(folder: Path) -> tuple[float, float]:
    """Seconds, and CPU seconds, for the same masks in one process, without a workspace."""
    started, computed = time.perf_counter(), time.process_time()
    for path in sorted((folder / "gan_sr").rglob("*.png")):
        relative = path.relative_to(folder / "gan_sr")
        mse_sr, gan_sr = (decode(file.read_bytes(), file).pixels for file in (folder / "mse_sr" / relative, path))
        mask = folder / "plain" / relative
        mask.parent.mkdir(parents=True, exist_ok=True)
        mask.write_bytes(encode_mask(artifact_mask(variance_similarity(mse_sr, gan_sr))))
    return time.perf_counter() - started, time.process_time() - computed


def _detect(folder: Path) -> Ran:
    command = [sys.executable, "-m", "deployments.cli", "detect", "--workers", str(WORKERS)]
    command += ["--workspace", str(folder / "workspace")]
    command += ["--mse-sr", str(folder / "mse_sr"), "--gan-sr", str(folder / "gan_sr")]
    return _timed(command, {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"})


def _timed(command: list[str], environment: dict[str, str]) -> Ran:
    started = server = time.time()
    before = _children_cpu()
    said = []
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line)
            server = time.time() if line.startswith("watch at") else server
    assert process.returncode == 0, "".join(said)
    return Ran(started, server, time.time(), _children_cpu() - before)


def _children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _parts(workspace: Workspace, ran: Ran) -> dict[str, float]:
    """Seconds by part of a run of a single shard: as Prefect's database and the images' own records tell."""
    with sqlite3.connect(workspace.prefect_home / "prefect.db") as database:
        (times,) = database.execute("SELECT start_time, end_time FROM task_run WHERE name LIKE 'shard-%'").fetchall()
    database.close()
    begun, ended = (datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp() for text in times)
    seconds = pq.read_table(workspace.records, columns=["seconds"])["seconds"].combine_chunks()
    computed = {
        stage: pc.sum(pc.map_lookup(seconds, stage, "first")).as_py() / WORKERS for stage in ("similarity", "mask")
    }
    return computed | {
        "server": ran.server - ran.started,
        "cluster": begun - ran.server,
        "rest": ended - begun - sum(computed.values()),
        "end": ran.ended - ended,
    }
