"""How long the embedded Prefect server keeps runs and results."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect.settings import Settings

from deployments.serving.retention import compact, forget_results, server_settings
from deployments.serving.server import Server
from tests.conftest import keyed


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
