"""From the command to the first stage, where there is much to plan: 100,000 photos, half of them done.

Measured from outside, by what a run says and by what it writes, so that figures of different versions compare. What a
done image leaves is taken from a real run over two photos and repeated. The command is ``desra mine`` with the small
models; it is killed as soon as an image has been through its first stage, so there is one inference in the last row.
Run it with ``python tests/benchmarks/run.py planning``; IMAGES in the environment for another number than 100,000.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from markdown import print_table

from deployments.commands.demo import make_photos

IMAGES = 100_000
FOLDER = 1000  # photos in one
SIDE = 8
# Of the images that are done, one of so many has artifacts: with arrays and dataset.
ARTIFACTS = 10
REPEATS = 2
DATASET = ("lr", "mse_sr", "gan_sr", "mask", "pseudo_gt")
MODELS = Path(__file__).resolve().parents[1] / "models"
# What the driver says in between.
PLANNED, SERVED = "starting Prefect", "watch at"
# Tells each look into one of the top folders, of the driver alone: the audit event comes before any folder is listed.
COUNTING = """
import os, sys
_log = os.environ.pop("DESRA_BENCH_SCANS", None)  # not for the processes that it starts
if _log:
    _file = os.open(_log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    _roots = os.environ.pop("DESRA_BENCH_ROOTS").split(":")
    def _told(event, arguments):
        if event == "os.scandir" and str(arguments[0]) in _roots:
            os.write(_file, (str(arguments[0]) + "\\n").encode())
    sys.addaudithook(_told)
"""


class Moment(NamedTuple):
    """Of the command so far: seconds, CPU seconds of its process (less moved by a busy machine), peak RSS (MB)."""

    seconds: float
    cpu: float
    memory: float


def run() -> None:
    with tempfile.TemporaryDirectory(prefix="desra-bench-") as name:
        folder = Path(name)
        count = int(os.environ.get("IMAGES", str(IMAGES)))
        started = time.perf_counter()
        _write_photos(folder / "photos", count)
        _fill(folder, _template(folder / "template"), count // 2)
        status = _desra("status", "--workspace", folder / "ws")
        assert f"done       {count // 2}\npending    {count - count // 2}\n" in status, status
        print(f"{count:,} photos, {count // 2:,} of them done (made in {time.perf_counter() - started:.0f} s).\n")
        for number in range(1, REPEATS + 1):
            load = os.getloadavg()[0]
            moments, looks = _measured(folder)
            print_table([f"run {number}, load {load:.1f}: until", "s", "CPU s of the driver", "its peak RSS, MB"],
                        [[what, *moment] for what, moment in moments.items()])  # fmt: skip
            told = ", ".join(f"{times} of {what}" for what, times in looks.items())
            print(f"\nLooks into the whole of a folder until then: {told}.\n", flush=True)


def _measured(folder: Path) -> tuple[dict[str, Moment], Counter[str]]:
    """Start the command and kill it at the first stage."""
    workspace, scans = folder / "ws", folder / "scans"
    for left in (workspace / "journal", workspace / "tmp"):
        shutil.rmtree(left, ignore_errors=True)
    scans.unlink(missing_ok=True)
    (folder / "site").mkdir(exist_ok=True)
    (folder / "site/sitecustomize.py").write_text(COUNTING)
    roots = {str(folder / "photos"): "photos", str(workspace / "masks"): "masks", str(workspace / "maps"): "maps"}
    environment = _environment() | {
        "PYTHONPATH": os.pathsep.join([str(folder / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "DESRA_BENCH_SCANS": str(scans),
        "DESRA_BENCH_ROOTS": ":".join(roots),
    }
    moments: dict[str, Moment] = {}
    started = time.perf_counter()
    with subprocess.Popen(_mine(folder / "photos", workspace), env=environment, stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE, text=True) as driver:  # fmt: skip

        def note(what: str) -> None:
            times = psutil.Process(driver.pid).cpu_times()
            moments[what] = Moment(time.perf_counter() - started, times.user + times.system, _peak(driver.pid))

        def listen() -> None:
            assert driver.stderr is not None
            for line in driver.stderr:
                if line.startswith(PLANNED):
                    note("planned, nothing started")
                elif line.startswith(SERVED):
                    note("the Prefect server answers")

        listener = threading.Thread(target=listen)
        listener.start()
        while next(_journaled(workspace), None) is None:
            assert driver.poll() is None, "it has ended before the first stage"
            time.sleep(0.01)
        note("the first image is through the first stage")
        looks = Counter(roots[line] for line in scans.read_text().splitlines())
        _kill(psutil.Process(driver.pid))
        listener.join()
    assert len(moments) == 3, moments
    return moments, looks


def _journaled(workspace: Path) -> Iterator[Path]:
    return (workspace / "journal").glob("*/*.json")


def _peak(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def _kill(driver: psutil.Process) -> None:
    """SIGKILL it and all that it has started: servers and workers."""
    family = [driver, *driver.children(recursive=True)]
    for process in family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family[1:], timeout=10)


def _mine(photos: Path, workspace: Path) -> list[str]:
    models = [f"--{kind}-model={MODELS / kind}.pth" for kind in ("mse", "gan")]
    return [sys.executable, "-m", "deployments.cli", "mine", str(photos), *models, f"--workspace={workspace}"]


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}


def _desra(*arguments: object) -> str:
    command = [sys.executable, "-m", "deployments.cli", *map(str, arguments)]
    return subprocess.run(command, env=_environment(), capture_output=True, text=True, check=True).stdout


def _write_photos(folder: Path, count: int) -> None:
    """Small noise in folders of a thousand; no two files are alike."""
    for start in range(0, count, FOLDER):
        noise = np.random.default_rng(start).integers(0, 256, (min(FOLDER, count - start), SIDE, SIDE, 3), np.uint8)
        part = folder / f"{start // FOLDER:04d}"
        part.mkdir(parents=True)
        for index, pixels in enumerate(noise):
            assert cv2.imwrite(str(part / f"{start + index:07d}.png"), pixels, [cv2.IMWRITE_PNG_COMPRESSION, 1])


def _template(folder: Path) -> Path:
    """The workspace of a real run: one photo is clean, the other has artifacts."""
    make_photos(folder / "demo")
    (folder / "photos").mkdir()
    shutil.copy(folder / "demo/motorcycle_shelf.jpg", folder / "photos/marked.jpg")
    assert cv2.imwrite(str(folder / "photos/clean.png"), np.full((SIDE, SIDE, 3), 90, np.uint8))
    subprocess.run(_mine(folder / "photos", folder / "ws"), env=_environment(), capture_output=True, check=True)
    return folder / "ws"


def _fill(folder: Path, template: Path, done: int) -> None:
    """Have a run scan all photos, and give the first of them what those of the template have: records and files."""
    workspace = folder / "ws"
    with subprocess.Popen(_mine(folder / "photos", workspace), env=_environment(), stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE, text=True) as driver:  # fmt: skip
        assert driver.stderr is not None
        assert any(line.startswith(PLANNED) for line in driver.stderr)
        _kill(psutil.Process(driver.pid))
    shutil.rmtree(workspace / "journal", ignore_errors=True)
    manifest = pq.read_table(workspace / "manifest.parquet", columns=["name", "id", "shard"]).slice(0, done)
    known = {row["name"]: row["id"] for row in pq.read_table(template / "manifest.parquet").to_pylist()}
    [table] = (template / "outcomes").glob("*.parquet")
    records = {row["id"]: row for row in pq.read_table(table).to_pylist()}
    schema = pq.read_schema(table)
    clean, marked = records[known["clean"]], records[known["marked"]]
    assert marked["artifact_pixels"]
    assert not clean["artifact_pixels"]
    rows = manifest.to_pylist()
    has_artifacts = [index % ARTIFACTS == 0 for index in range(done)]
    (workspace / "outcomes").mkdir(exist_ok=True)
    for shard in sorted({row["shard"] for row in rows}):
        filled = [(marked if flag else clean) | {"id": row["id"]}
                  for row, flag in zip(rows, has_artifacts, strict=True) if row["shard"] == shard]  # fmt: skip
        filled.sort(key=lambda record: record["id"])
        pq.write_table(pa.Table.from_pylist(filled, schema), workspace / f"outcomes/{shard:08d}.parquet")

    def give(row: dict[str, str], flag: bool) -> None:
        name = "marked" if flag else "clean"
        _link(template / f"masks/{name}.png", workspace / f"masks/{row['name']}.png")
        if flag:
            for kind in DATASET:
                _link(template / f"dataset/{kind}/marked.png", workspace / f"dataset/{kind}/{row['name']}.png")
            groups = [base / f"maps/{one[:2]}/{one}.zarr" for base, one in
                      ((template, known["marked"]), (workspace, row["id"]))]  # fmt: skip
            shutil.copytree(*groups, copy_function=_share)

    with ThreadPoolExecutor() as pool:
        flagged = iter(zip(rows, has_artifacts, strict=True))
        while batch := list(islice(flagged, 10_000)):
            list(pool.map(lambda pair: give(*pair), batch))


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    _share(source, target)


def _share(source: str | Path, target: str | Path) -> None:
    """Link, or copy where a disk has no more links to a file."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
