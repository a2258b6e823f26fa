"""What many runs leave on one Prefect server: how soon it still answers, and what a task run costs its database.

Every run is one of ``flows.detect`` over a thousand images, whole but for its stages, which do nothing.
Run it with ``python tests/benchmarks/run.py many_runs``; RUNS in the environment for another number of runs than 100.
"""

import os
import sqlite3
import tempfile
import time
from contextlib import closing, redirect_stderr
from functools import partial
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

import httpx
from bench_orchestration import WORKERS, mask_stage, no_op_job, similarity_stage
from markdown import print_table
from pairs import write_tiny_pairs

from deployments.serving.connection import wait_for_task_runs
from deployments.serving.server import prefect_server
from desra_core.settings import Detection, Machine
from desra_core.stages import Stage
from desra_core.workspace import Workspace
from desra_core.workspace.products import Target

if TYPE_CHECKING:
    from tasks.shards import StageSpec

IMAGES = 1000
SIDE = 16
# What the pages of the UI ask for.
QUESTIONS = {
    "latest flow runs": ("/flow_runs/filter", {"sort": "EXPECTED_START_TIME_DESC", "limit": 50}),
    "counts of states": ("/flow_runs/count", {"flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}}),
    "latest task runs": ("/task_runs/filter", {"sort": "EXPECTED_START_TIME_DESC", "limit": 50}),
    "latest artifacts": ("/artifacts/latest/filter", {"limit": 50}),
    "logs of all": ("/logs/filter", {"sort": "TIMESTAMP_DESC", "limit": 200}),
    "events": ("/events/filter", {"limit": 50}),
}


def run() -> None:
    with tempfile.TemporaryDirectory(prefix="desra-bench-") as name, patch.dict(os.environ):
        os.environ.pop("PREFECT_API_URL", None)
        os.environ["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] = "CRITICAL"
        folder = Path(name)
        write_tiny_pairs(folder, IMAGES, SIDE)
        workspace = Workspace(folder / "workspace")
        workspace.create()
        detection = Detection(mse_sr=folder / "mse_sr", gan_sr=folder / "gan_sr", workspace=workspace.root)
        with workspace.locked(), prefect_server(workspace):
            url = os.environ["PREFECT_API_URL"].replace("//", f"//{os.environ['PREFECT_API_AUTH_STRING']}@")
            _run_many(detection, url, int(os.environ.get("RUNS", "100")))


def _run_many(detection: Detection, url: str, runs: int) -> None:
    from flows.detect import detect
    from tasks.dask_cluster import standing_cluster

    machine, workspace = Machine(workers=WORKERS), Workspace(detection.workspace)
    rows = []
    _, empty = database_of(workspace)
    key = workspace.prefect_home / "dask.pem"
    with standing_cluster(machine, gpus=0, key=key) as cluster, patch.dict(os.environ, cluster.environment):
        for number in range(1, runs + 1):
            started = time.perf_counter()
            with patch("flows.desra_flow.stages_of", partial(_no_ops, number)), redirect_stderr(StringIO()):
                summary = detect(detection, machine)
            seconds = time.perf_counter() - started
            assert (summary.computed, summary.failures, summary.broken_shards) == (IMAGES, 0, ())
            assert wait_for_task_runs(summary.flow_run, summary.task_runs)
            if number in (1, 10, runs // 2, runs):
                rows.append(_row(workspace, url, number, seconds, empty))
    print_table(list(rows[0]), [list(row.values()) for row in rows])


def _no_ops(number: int, settings: Detection, target: Target, *_: object) -> "list[StageSpec]":
    """As many stages as a run can have. They publish no mask, so that there is all to do again for the next run."""
    from tasks.shards import StageSpec

    def stage(name: str, function: Stage, key: str) -> StageSpec:
        return StageSpec(name, function, no_op_job(settings, target, f"{key} {number}", b""), {})

    return [
        stage("similarity", similarity_stage, "similarity"),
        stage("mask", similarity_stage, "segmentation"),
        stage("mask", mask_stage, "mask"),
    ]


def _row(workspace: Workspace, url: str, runs: int, seconds: float, empty: int) -> dict[str, str]:
    slowest = {question: max(_answer(url, *QUESTIONS[question]) for _ in range(3)) for question in QUESTIONS}
    worst = max(slowest, key=lambda question: slowest[question])
    task_runs, size = database_of(workspace)
    return {
        "runs": str(runs),
        "task runs": str(task_runs),
        "task runs per 1000 images": f"{task_runs / runs:.1f}",
        "database MB": f"{size / 1e6:.1f}",
        "kB per task run": f"{(size - empty) / task_runs / 1e3:.1f}",
        "slowest answer s": f"{slowest[worst]:.3f} ({worst})",
        "last run s": f"{seconds:.1f}",
    }


def database_of(workspace: Workspace) -> tuple[int, int]:
    """Task runs in the server's database, and the bytes of its pages."""
    with closing(sqlite3.connect(f"file:{workspace.prefect_home / 'prefect.db'}?mode=ro", uri=True)) as database:
        return tuple(
            database.execute(query).fetchone()[0]
            for query in (
                "select count(*) from task_run",
                "select (page_count - freelist_count) * page_size"
                " from pragma_page_count, pragma_freelist_count, pragma_page_size",
            )
        )


def _answer(url: str, path: str, query: dict[str, object]) -> float:
    started = time.perf_counter()
    httpx.post(url + path, json=query, timeout=60).raise_for_status()
    return time.perf_counter() - started
