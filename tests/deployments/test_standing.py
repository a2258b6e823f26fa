"""Who serves a workspace, what a killed one leaves, how long its server remembers."""

from __future__ import annotations

import contextlib
import os
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import httpx
import psutil
import pytest
from prefect.settings import Settings

from deployments.retention import compact, forget_results, server_settings
from deployments.server import Server, end_leftover_server
from deployments.standing import MARK, end_leftovers, end_marked, served_at, standing
from desra_core.errors import LockedError, UsageError
from desra_core.workspace import Workspace

SLEEP = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]
SERVE = """
import sys, time
from pathlib import Path
from deployments.standing import standing
from desra_core.workspace import Workspace
with standing(Workspace(Path(sys.argv[1]))) as own:
    own.announce("http://127.0.0.1:1/api")
    print(own.mark["DESRA_SERVE"], flush=True)
    time.sleep(60)
"""


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    workspace = Workspace(tmp_path / "ws")
    workspace.create()
    return workspace


def sleeping(mark: dict[str, str]) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(SLEEP, env=os.environ | mark, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    return process


def is_gone(process: subprocess.Popen[bytes]) -> bool:
    """`end_marked` waits for processes itself, also for those of this test."""
    return not psutil.pid_exists(process.pid) and process.wait() is not None


def end(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    if process.stdout:
        process.stdout.close()


def test_one_serves_and_others_know_where(workspace) -> None:
    assert served_at(workspace) is None
    with standing(workspace) as own:
        assert served_at(workspace) is None  # it has not said where yet
        own.announce("http://127.0.0.1:4200/api")
        assert served_at(workspace) == "http://127.0.0.1:4200/api"
        with (
            pytest.raises(LockedError, match=f"served by process {os.getpid()} already; stop that one first"),
            standing(workspace),
        ):
            pass
        assert served_at(workspace) == "http://127.0.0.1:4200/api"
    assert served_at(workspace) is None


def test_what_a_killed_one_leaves_is_ended(workspace) -> None:
    process = subprocess.Popen([sys.executable, "-c", SERVE, workspace.root], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    token = process.stdout.readline().strip()
    mine, other = sleeping({MARK: token}), sleeping({MARK: "somebody else's"})
    end_leftovers(workspace)  # it is on: nothing is left over
    end_leftover_server(workspace)
    assert mine.poll() is None
    process.kill()
    process.wait()
    assert served_at(workspace) is None
    with standing(workspace) as own:
        assert own.mark[MARK] != token
        assert is_gone(mine)
        assert not is_gone(other)
    end(other)
    end(process)


def test_processes_are_known_by_all_of_their_mark() -> None:
    runs, server = sleeping({MARK: "t", "DESRA_SERVE_PART": "runs"}), sleeping({MARK: "t"})
    end_marked({MARK: "t", "DESRA_SERVE_PART": "runs"})
    assert is_gone(runs)
    assert not is_gone(server)
    end_marked({MARK: "t"})
    assert is_gone(server)


def test_a_port_that_is_taken_is_told(workspace) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=rf"--port {port}: cannot be had \(.+\); give another one"):
            Server(workspace, port=port)


def test_prefect_takes_the_settings_of_the_server(monkeypatch) -> None:
    for name, value in server_settings(timedelta(days=30)).items():
        monkeypatch.setenv(name, value)
    services = Settings().server.services
    assert services.db_vacuum.enabled_vacuum_types == {"events", "flow_runs", "orphans"}
    assert services.db_vacuum.retention_period == timedelta(days=30)
    assert services.event_persister.enabled is False
    assert Settings().server.events.retention_period == timedelta(days=3)


def test_old_results_are_forgotten(tmp_path) -> None:
    storage = tmp_path / "storage"
    storage.mkdir()
    for name, days in (("old", 91), ("older", 400), ("new", 89)):
        (storage / name).write_text("{}")
        moment = time.time() - days * 86400
        os.utime(storage / name, (moment, moment))
    (tmp_path / "worker.log").write_bytes(b"x" * 11_000_000)
    (tmp_path / "server.log").write_bytes(b"kept")
    assert forget_results(tmp_path, timedelta(days=90)) == 2
    assert [path.name for path in storage.iterdir()] == ["new"]
    assert (tmp_path / "worker.log").stat().st_size == 0
    assert (tmp_path / "server.log").read_bytes() == b"kept"
    assert forget_results(tmp_path / "nowhere", timedelta(days=90)) == 0


def test_the_space_of_what_is_deleted_is_given_back(tmp_path) -> None:
    database = tmp_path / "prefect.db"
    connection = sqlite3.connect(database)
    connection.execute("CREATE TABLE event (data)")
    connection.executemany("INSERT INTO event VALUES (?)", [(b"x" * 4000,)] * 500)
    connection.commit()
    full = database.stat().st_size
    compact(tmp_path)
    assert database.stat().st_size == full  # nothing is free
    connection.execute("DELETE FROM event WHERE rowid > 10")
    connection.commit()
    connection.close()
    compact(tmp_path)
    assert database.stat().st_size < full / 10
    assert sqlite3.connect(database).execute("SELECT count(*) FROM event").fetchone() == (10,)
    Path(database).write_bytes(b"damaged" * 1000)
    compact(tmp_path)
    compact(tmp_path / "nowhere")


@pytest.fixture
def environment() -> Iterator[None]:
    """What a server sets in this process goes when the test ends."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.slow
def test_the_server_forgets_old_runs_and_stores_no_events(workspace, environment) -> None:
    server = Server(workspace, history=timedelta(days=30))
    database = workspace.prefect_home / "prefect.db"
    ids = {}
    server.start()
    try:
        flow = httpx.post(f"{server.url}/flows/", json={"name": "mine"}).json()["id"]
        for name in ("old", "new"):
            run = httpx.post(f"{server.url}/flow_runs/", json={"flow_id": flow, "name": name}).json()["id"]
            for kind in ("RUNNING", "COMPLETED"):
                state = {"state": {"type": kind, "name": kind.title()}}
                httpx.post(f"{server.url}/flow_runs/{run}/set_state", json=state).raise_for_status()
            log = {
                "name": "desra",
                "level": 20,
                "message": "m",
                "timestamp": "2026-01-01T00:00:00Z",
                "flow_run_id": run,
            }
            httpx.post(f"{server.url}/logs/", json=[log]).raise_for_status()
            ids[name] = run
    finally:
        server.stop()
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("UPDATE flow_run SET end_time = '2020-01-01 00:00:00' WHERE name = 'old'")
    server.start()
    try:
        deadline = time.monotonic() + 60
        while httpx.get(f"{server.url}/flow_runs/{ids['old']}").status_code == 200:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert httpx.get(f"{server.url}/flow_runs/{ids['new']}").status_code == 200
        left = httpx.post(f"{server.url}/logs/filter", json={}).json()
        assert [log["flow_run_id"] for log in left] == [ids["new"]]
    finally:
        server.stop()
    with contextlib.closing(sqlite3.connect(database)) as connection:
        assert connection.execute("SELECT count(*) FROM events").fetchone() == (0,)
