"""What many runs leave on one Prefect server: how soon it still answers, and what a task run costs its database.

Every run takes a thousand images through stages that do nothing, with the tasks, artifacts and records of a real one.
Run it with ``python tests/benchmarks/run.py many_runs``; RUNS in the environment for another number of runs than 100.
"""

import os
import sqlite3
import tempfile
import time
from contextlib import closing
from pathlib import Path
from unittest.mock import patch

import httpx
from bench_orchestration import WORKERS, flow_seconds, mask_stage, similarity_stage
from markdown import print_table
from pairs import write_tiny_pairs

from deployments.server import prefect_server
from desra_core.plan import prepare
from desra_core.settings import Detection, Machine
from desra_core.workspace import Workspace

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
        with workspace.locked():
            _, plan, _, _ = prepare(detection)
            with prefect_server(workspace) as url:
                _run_many(workspace, plan, url, int(os.environ.get("RUNS", "100")))


def _run_many(workspace, plan, url, runs):  # type: ignore[no-untyped-def]
    from tasks.fanout import open_dask
    from tasks.shards import StageSpec

    functions = {"similarity": similarity_stage, "segmentation": similarity_stage, "mask": mask_stage}
    rows = []
    _, empty = _database(workspace)
    with open_dask(Machine(workers=WORKERS)) as dask:
        for number in range(1, runs + 1):
            specs = [
                StageSpec(name, "mask", function, (f"{name} {number}", b""), f"{name} {number}", {})
                for name, function in functions.items()
            ]
            seconds = flow_seconds(workspace, plan, specs, dask)
            for path in workspace.outcomes.glob("*.parquet"):
                path.unlink()
            if number in (1, 10, runs // 2, runs):
                rows.append(_row(workspace, url, number, seconds, empty))
    print_table(list(rows[0]), [list(row.values()) for row in rows])


def _row(workspace: Workspace, url: str, runs: int, seconds: float, empty: int) -> dict[str, str]:
    slowest = {question: max(_answer(url, *QUESTIONS[question]) for _ in range(3)) for question in QUESTIONS}
    worst = max(slowest, key=lambda question: slowest[question])
    task_runs, size = _database(workspace)
    return {
        "runs": str(runs),
        "task runs": str(task_runs),
        "task runs per 1000 images": f"{task_runs / runs:.1f}",
        "database MB": f"{size / 1e6:.1f}",
        "kB per task run": f"{(size - empty) / task_runs / 1e3:.1f}",
        "slowest answer s": f"{slowest[worst]:.3f} ({worst})",
        "last run s": f"{seconds:.1f}",
    }


def _database(workspace: Workspace) -> tuple[int, int]:
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
