"""Who serves a workspace, what a killed one leaves, how long its server remembers."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prefect.settings import Settings

from deployments.serving.processes import MARK, end_marked, new_mark
from deployments.serving.retention import HISTORY, compact, forget_results, server_settings
from deployments.serving.server import Server, end_leftover_server
from deployments.serving.standing import Served, end_leftovers, history_of, served_at, standing
from desra_core.errors import LockedError, UsageError
from desra_core.workspace import Workspace
from tests.conftest import keyed

SLEEP = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]
SERVE = """
import sys, time
from pathlib import Path
from datetime import timedelta

from deployments.serving.standing import Served, standing
from desra_core.workspace import Workspace
with standing(Workspace(Path(sys.argv[1]))) as own:
    own.announce(Served("http://127.0.0.1:1/api", own=True), timedelta(days=1))
    print(own.mark["DESRA_SERVE"], flush=True)
    time.sleep(60)
"""


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    workspace = Workspace(tmp_path / "ws")
    workspace.create()
    return workspace


@pytest.fixture
def environment() -> Iterator[None]:
    """What a server sets in this process goes when the test ends."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


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
    assert served_at(workspace) is history_of(workspace) is None
    with standing(workspace) as own:
        assert served_at(workspace) is None  # it has not said where yet
        served = Served("http://127.0.0.1:4200/api", own=True)
        own.announce(served, timedelta(days=700))
        assert served_at(workspace) == served
        with (
            pytest.raises(LockedError, match=f"served by process {os.getpid()} already; stop that one first"),
            standing(workspace),
        ):
            pass
        assert served_at(workspace) == served
    assert served_at(workspace) is None
    assert history_of(workspace) == timedelta(days=700)  # a run by hand meanwhile is not to shorten it
    with (
        standing(workspace),
        pytest.raises(LockedError, match=f"served by process {os.getpid()} already"),
        standing(workspace),
    ):
        pass


def test_who_only_looks_keeps_nobody_from_serving(workspace) -> None:
    with standing(workspace):
        pass
    with (workspace.prefect_home / "serve.lock").open() as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        looks_away = threading.Timer(0.3, fcntl.flock, [looking, fcntl.LOCK_UN])
        looks_away.start()
        with standing(workspace):
            pass
        looks_away.join()


def test_what_one_leaves_ends_with_it(workspace) -> None:
    with contextlib.suppress(KeyboardInterrupt), standing(workspace) as own:
        left = sleeping(own.mark)
        raise KeyboardInterrupt
    assert is_gone(left)


@contextlib.contextmanager
def serving_again(workspace: Workspace) -> Iterator[None]:
    with standing(workspace):
        yield


@contextlib.contextmanager
def run_by_hand(workspace: Workspace) -> Iterator[None]:
    end_leftover_server(workspace)
    yield


@pytest.mark.parametrize("what_comes_then", [serving_again, run_by_hand])
def test_what_a_killed_one_leaves_is_ended(what_comes_then, workspace) -> None:
    process = subprocess.Popen([sys.executable, "-c", SERVE, workspace.root], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    token = process.stdout.readline().strip()
    mine, other = sleeping({MARK: token}), sleeping(new_mark())
    (workspace.prefect_home / "server.json").write_text(json.dumps({"pid": mine.pid, "token": token}))
    end_leftovers(workspace)  # it is on: nothing is left over
    end_leftover_server(workspace)
    assert mine.poll() is None
    (workspace.prefect_home / "server.json").unlink()
    process.kill()
    process.wait()
    assert served_at(workspace) is None
    with what_comes_then(workspace):
        assert is_gone(mine)
        assert not is_gone(other)
    end(other)
    end(process)


def test_a_server_is_known_by_its_mark_and_not_by_its_pid(workspace) -> None:
    workspace.prefect_home.mkdir()
    record = workspace.prefect_home / "server.json"
    mark = new_mark()
    server, other = sleeping(mark), sleeping(new_mark())
    record.write_text(json.dumps({"pid": other.pid, "token": mark[MARK]}))
    end_leftover_server(workspace)
    assert is_gone(server)
    assert not is_gone(other)
    assert not record.exists()
    for damaged in ("", "[]", "{}", '{"token": ""}', '{"token": null}'):
        record.write_text(damaged)
        (workspace.prefect_home / "serve.lock").write_text(damaged)
        end_leftover_server(workspace)
        assert not is_gone(other)
    end(other)


def test_one_that_has_ended_but_is_not_reaped_holds_up_nobody() -> None:
    mark = new_mark()
    parent = subprocess.Popen(
        [sys.executable, "-c", f"import os, subprocess, sys\nsubprocess.Popen([sys.executable, '-c', ''], "
         f"env=os.environ | {mark})\nprint('up', flush=True)\ninput()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert parent.stdout is not None
    parent.stdout.readline()
    deadline = time.monotonic() + 30
    while psutil.Process(parent.pid).children()[0].status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    started = time.monotonic()
    end_marked(mark)
    assert time.monotonic() - started < 5
    parent.communicate(b"\n")


def test_processes_are_known_by_all_of_their_mark() -> None:
    mark = new_mark()
    runs, server = sleeping(mark | {"DESRA_SERVE_PART": "runs"}), sleeping(mark)
    end_marked(mark | {"DESRA_SERVE_PART": "runs"})
    assert is_gone(runs)
    assert not is_gone(server)
    end_marked(mark)
    assert is_gone(server)


def test_who_has_the_mark_himself_goes_on() -> None:
    mark = new_mark()
    told = subprocess.run(
        [sys.executable, "-c", f"from deployments.serving.processes import *; end_marked({mark}); print('on')"],
        env=os.environ | mark, stdout=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    assert told.stdout == "on\n"


def test_a_port_is_free_as_soon_as_its_server_has_ended(workspace) -> None:
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            server.accept()[0].close()
    assert Server(workspace, port=port, history=HISTORY).url == f"http://127.0.0.1:{port}/api"


def test_a_port_that_is_taken_is_told(workspace) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=rf"--port {port}: cannot be had \(.+\); give another one"):
            Server(workspace, port=port, history=HISTORY)


def test_prefect_takes_the_settings_of_the_server(monkeypatch) -> None:
    for name, value in server_settings(timedelta(days=30)).items():
        monkeypatch.setenv(name, value)
    services = Settings().server.services
    assert services.db_vacuum.enabled_vacuum_types == {"events", "flow_runs", "orphans"}
    assert services.db_vacuum.retention_period == timedelta(days=30)
    assert services.event_persister.enabled is False
    assert Settings().server.events.retention_period == timedelta(days=3)
    assert server_settings(timedelta(days=1))["PREFECT_SERVER_EVENTS_RETENTION_PERIOD"] == "PT86400S"


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


def test_who_writes_a_log_goes_on_at_its_new_beginning(tmp_path) -> None:
    path = tmp_path / "worker.log"
    with path.open("ab") as log:
        writer = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=log)
    assert writer.stdin is not None
    writer.stdin.write(b"x" * 11_000_000)
    writer.stdin.flush()
    deadline = time.monotonic() + 30
    while path.stat().st_size < 11_000_000:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    forget_results(tmp_path, timedelta(days=90))
    writer.communicate(b"after")
    assert path.read_bytes() == b"after"


def test_the_space_of_what_is_deleted_is_given_back(tmp_path) -> None:
    database = tmp_path / "prefect.db"
    connection = sqlite3.connect(database)
    connection.execute("CREATE TABLE event (data)")
    connection.executemany("INSERT INTO event VALUES (?)", [(b"x" * 4000,)] * 500)
    connection.commit()
    full = database.stat().st_size
    compact(tmp_path)
    assert database.stat().st_size == full  # nothing is free
    connection.execute("DELETE FROM event WHERE rowid > 300")
    connection.commit()
    compact(tmp_path)
    assert database.stat().st_size == full  # not worth it
    connection.execute("DELETE FROM event WHERE rowid > 10")
    connection.commit()
    connection.close()
    compact(tmp_path)
    assert database.stat().st_size < full / 10
    assert sqlite3.connect(database).execute("SELECT count(*) FROM event").fetchone() == (10,)
    Path(database).write_bytes(b"damaged" * 1000)
    compact(tmp_path)
    compact(tmp_path / "nowhere")


def rows(database: Path, *tables: str) -> dict[str, int]:
    with contextlib.closing(sqlite3.connect(database)) as connection:
        return {table: connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in tables}


KEPT = ("flow_run", "flow_run_state", "task_run", "task_run_state", "log", "artifact", "artifact_collection")


@pytest.mark.slow
def test_the_server_forgets_old_runs_with_all_that_belongs_to_them(workspace, environment, monkeypatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # on this machine, nobody asks it
    monkeypatch.setenv("PREFECT_SERVER_SERVICES_DB_VACUUM_ORPHAN_CLEANUP_LOOP_SECONDS", "2")  # not once a day
    server = Server(workspace, history=timedelta(days=30))
    database = workspace.prefect_home / "prefect.db"

    def ask(path: str, **content: object) -> dict[str, Any]:
        answer = httpx.post(f"{keyed(os.environ)}/{path}", json=content, timeout=60).raise_for_status()
        return answer.json() if answer.content else {}

    def through(what: str, one: str) -> str:
        for kind in ("RUNNING", "COMPLETED"):
            ask(f"{what}/{one}/set_state", state={"type": kind, "name": kind.title()}, force=True)
        return one

    def run(name: str, **of: str) -> str:
        one = ask("flow_runs/", flow_id=flow, name=name, **of)["id"]
        task = ask("task_runs/", flow_run_id=one, task_key="t", dynamic_key="1")["id"]
        ask("artifacts/", key=name, type="markdown", data="d", flow_run_id=one)
        log = {"name": "desra", "level": 20, "message": "m", "timestamp": "2026-01-01T00:00:00Z", "flow_run_id": one}
        httpx.post(f"{keyed(os.environ)}/logs/", json=[log]).raise_for_status()
        if name != "going-on":
            through("task_runs", task)
            through("flow_runs", one)
        return task

    server.start()
    try:
        flow = ask("flows/", name="mine")["id"]
        for name in ("new", "going-on"):
            run(name)
    finally:
        server.stop()
    few = rows(database, *KEPT)
    assert few["artifact_collection"] == few["log"] == few["flow_run"] == 2
    server.start()
    try:
        run("part-of-old", parent_task_run_id=run("old"))
    finally:
        server.stop()
    assert all(count > few[table] for table, count in rows(database, *KEPT).items())
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("UPDATE flow_run SET end_time = datetime('now', '-31 days') WHERE name LIKE '%old'")
        connection.execute("UPDATE flow_run SET end_time = datetime('now', '-29 days') WHERE name = 'new'")
        connection.execute("UPDATE flow_run SET start_time = datetime('now', '-31 days') WHERE name = 'going-on'")
    server.start()
    try:
        deadline = time.monotonic() + 120
        while rows(database, *KEPT) != few:
            assert time.monotonic() < deadline, rows(database, *KEPT)
            time.sleep(0.5)
    finally:
        server.stop()
    assert rows(database, "events") == {"events": 0}
