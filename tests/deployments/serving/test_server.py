"""The Prefect server of a run: proxies, starts that fail, a server that ends before its run."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import psutil
import pytest
from prefect import flow
from prefect.settings import (
    PREFECT_API_AUTH_STRING,
    PREFECT_API_URL,
    Settings,
    get_current_settings,
    temporary_settings,
)

from deployments.commands.runs import server_for_run
from deployments.serving import server as servers
from deployments.serving.connection import CONSOLE
from deployments.serving.processes import Child
from deployments.serving.server import HISTORY, Server, ServerLostError, compact, forget_results, server_settings
from desra_core.errors import TransientError, UsageError
from desra_core.workspace import Workspace
from tests.conftest import desra_command, keyed
from tests.served import DEAD, HttpProxy, until


def pid_of(workspace: Workspace) -> int | None:
    """The process of the server of a workspace."""
    try:
        return int(json.loads((workspace.prefect_home / "server.json").read_bytes())["pid"])
    except (OSError, ValueError):
        return None


@pytest.fixture
def server(environment, tmp_path) -> Iterator[Server]:
    workspace = Workspace(tmp_path / "ws")
    workspace.create()
    server = Server(workspace, history=HISTORY)
    yield server
    server.stop()


def test_a_slow_start_is_awaited_and_a_failed_start_is_repeated(server, tmp_path, monkeypatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(servers, "say", said.append)
    monkeypatch.setattr(servers, "_PATIENCE_SECONDS", 0.2)

    def hold_up_and_kill() -> None:
        first = until(lambda: pid_of(Workspace(tmp_path / "ws")))
        os.kill(first, signal.SIGSTOP)
        until(lambda: len(said) >= 2)
        os.kill(first, signal.SIGKILL)

    killer = threading.Thread(target=hold_up_and_kill)
    killer.start()
    server.start()
    killer.join()
    assert said[0].startswith("the Prefect server does not answer yet after ")
    assert said[0].endswith(" s; its process is still running")
    assert httpx.get(f"{server.url}/health").status_code == 200


def started(root: Path) -> None:
    """Start and stop a server in a new workspace."""
    workspace = Workspace(root)
    workspace.create()
    server = Server(workspace, history=HISTORY)
    server.start()
    assert httpx.get(f"{server.url}/health").status_code == 200
    server.stop()


@pytest.fixture
def cached(environment, tmp_path, monkeypatch) -> Path:
    """The place of the cached database in a cache of this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return servers._cached_database()


def test_the_database_of_a_new_workspace_is_a_copy(cached, tmp_path) -> None:
    started(tmp_path / "first")
    assert rows(cached, "flow_run", "alembic_version") == {"flow_run": 0, "alembic_version": 1}
    with contextlib.closing(sqlite3.connect(cached)) as database:
        database.execute("CREATE TABLE mark (column)")
    second = Workspace(tmp_path / "second")
    second.create()
    second.prefect_home.mkdir()
    kept = tmp_path / "second" / "prefect" / "prefect.db.bak"
    kept.touch()
    (tmp_path / "second" / "prefect" / "prefect.db-wal").write_bytes(b"of an earlier database")
    started(tmp_path / "second")
    assert rows(tmp_path / "second" / "prefect" / "prefect.db", "mark") == {"mark": 0}
    assert kept.exists()
    assert [path.name for path in cached.parent.iterdir()] == [cached.name]


@pytest.mark.slow
def test_a_damaged_copy_of_the_database_is_made_anew(cached, tmp_path) -> None:
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"damaged" * 1000)
    started(tmp_path / "ws")
    assert rows(cached, "flow_run", "alembic_version") == {"flow_run": 0, "alembic_version": 1}


def test_only_an_own_database_is_copied(cached, tmp_path) -> None:
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"content")
    cached.chmod(0o600)
    assert servers._read_owned(cached) == b"content"
    cached.chmod(0o660)
    assert servers._read_owned(cached) is None
    cached.rename(tmp_path / "real")
    assert servers._read_owned(cached) is None
    cached.symlink_to(tmp_path / "real")
    assert servers._read_owned(cached) is None


def test_a_cache_that_cannot_be_used_is_no_matter(tmp_path, monkeypatch) -> None:
    """Nor a database without tables, which is not stored."""
    database = tmp_path / "prefect.db"
    with contextlib.closing(sqlite3.connect(database)) as opened:
        opened.execute("CREATE TABLE flow_run (id)")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    servers._store_in_cache(database)
    assert list((tmp_path / "cache" / "desra").iterdir()) == []
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    servers._store_in_cache(database)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert servers._cached_database().parent == Path.home() / ".cache" / "desra"


def test_a_failed_start_names_the_reason(server, monkeypatch) -> None:
    server.log.parent.mkdir()
    server.log.write_text("OlderError: that of an earlier run\n")
    monkeypatch.setattr(servers, "_STARTS", 1)
    monkeypatch.setenv(CONSOLE, "CRITICAL")  # as desra serve sets it for itself
    monkeypatch.setenv("PREFECT_API_DATABASE_CONNECTION_URL", "sqlite+aiosqlite:////nowhere/prefect.db")
    with pytest.raises(UsageError) as told:
        server.start()
    assert told.value.subject == str(server.log)
    assert told.value.reason == (
        "the Prefect server did not start (sqlalchemy.exc.OperationalError: (sqlite3.OperationalError) unable to open "
        "database file)"
    )


def test_a_server_that_never_answers_is_an_error(server, monkeypatch) -> None:
    """Not by the signal that has ended it for that."""
    monkeypatch.setattr(servers, "_START_SECONDS", 0)
    with pytest.raises(UsageError, match=r"did not start \(it did not answer within 0 minutes\); read that log"):
        server.start()


def test_another_process_at_the_port_does_not_get_the_key(server, monkeypatch) -> None:
    """Another user may have taken it since it was found free, and would get the key."""
    monkeypatch.setattr(servers, "_START_SECONDS", 0.3)
    with ThreadingHTTPServer(("127.0.0.1", server._port), HttpProxy) as other, subprocess.Popen(["sleep", "60"]) as own:
        other.asked = []
        threading.Thread(target=other.serve_forever, args=[0.01], daemon=True).start()
        server._process = own
        assert not server._answers()
        assert not other.asked
        own.kill()
        other.shutdown()


def test_a_server_that_ends_again_and_again_in_mid_run_is_given_up(environment, monkeypatch, capsys) -> None:
    """The work goes on without it; else a port that is taken would start the server again without end."""

    class Impatient(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            return super().wait(0)

    class Restless(Child):
        name, exit_code, starts = "the Prefect server", 1, 0
        unwanted = Impatient()

        def start(self) -> None:
            self.starts += 1

    client = get_current_settings().client
    monkeypatch.setattr(client, "max_retries", 5)
    server = Restless(Path("server.log"))
    with servers._kept_up(server):
        until(lambda: client.max_retries == 0)
    assert server.starts == 5
    ended = "the Prefect server ends again and again; read that log"
    told = f"warning: server.log: {ended}; the work goes on without the server"
    assert capsys.readouterr().err.splitlines()[-1] == told


@pytest.mark.parametrize("size", ["700k", pytest.param("3m", marks=pytest.mark.slow)])
def test_a_disk_too_small_for_the_database_is_named(size, small_disk, cached) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", small_disk], check=True)
    workspace = Workspace(small_disk / "ws")
    workspace.create()
    server = Server(workspace, history=HISTORY)
    try:
        with pytest.raises(TransientError) as told:
            server.start()
    finally:
        server.stop()
    assert str(workspace.prefect_home) in told.value.subject
    assert told.value.reason == "the disk is full, and the Prefect server has no room for its database"


def run_of(corpus: Path, workspace: Path) -> list[str]:
    inputs = ("--mse-sr", corpus / "mse_sr", "--gan-sr", corpus / "gan_sr")
    return desra_command("detect", *inputs, "--workspace", workspace, "--shard-size", "10", "--workers", "1")


def test_a_full_folder_of_temporary_files_is_named(small_disk, environment, make_pairs, tmp_path) -> None:
    make_pairs(tmp_path, 1)
    (small_disk / "large").write_bytes(bytes(600_000))
    refused = subprocess.run(
        run_of(tmp_path, tmp_path / "ws"), env=os.environ | {"TMPDIR": str(small_disk)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert refused.returncode == 1
    line = f"error: {small_disk}: the disk is full, and has no room for temporary files; free some space, or name "
    assert refused.stderr.splitlines()[-1].startswith(line)
    assert "Traceback" not in refused.stderr


def test_a_vanished_working_folder_is_named(tmp_path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    command = ["sh", "-c", 'cd "$0" && rmdir "$0" && exec "$@"', gone, *desra_command("status", "--workspace", "ws")]
    environment = os.environ | {"PYTHONPATH": str(Path(servers.__file__).parents[2])}
    refused = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    line = "error: the working folder: is gone (No such file or directory); change to another one\n"
    assert (refused.returncode, refused.stderr) == (2, line)


def test_a_server_that_has_gone_before_the_run_is_named(prefect_environment, tmp_path, monkeypatch) -> None:
    """Prefect's own error for that is no one of httpx."""
    monkeypatch.setenv("PREFECT_API_URL", prefect_environment["PREFECT_API_URL"])

    @flow
    def nothing() -> None:
        pass

    workspace = Workspace(tmp_path / "ws")
    with (
        temporary_settings({PREFECT_API_URL: f"http://{DEAD}/api"}),
        pytest.raises(ServerLostError, match="does not answer any more; what was done is not lost"),
        server_for_run(workspace),
    ):
        nothing()
    asked = httpx.Request("GET", "http://prefect.example/api")
    answers = {code: httpx.HTTPStatusError("", request=asked, response=httpx.Response(code)) for code in (404, 503)}
    with pytest.raises(ServerLostError), server_for_run(workspace):
        raise answers[503]
    for error in (UsageError("--x", "is bad", "mend it"), RuntimeError("of another kind"), answers[404]):
        with pytest.raises(type(error)) as raised, server_for_run(workspace):
            raise error
        assert raised.value is error


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_server_with_another_key_is_named(prefect_environment, tmp_path, monkeypatch) -> None:
    """It has not gone, and to start anew would not help."""
    url = prefect_environment["PREFECT_API_URL"]
    monkeypatch.setenv("PREFECT_API_URL", url)

    @flow
    def nothing() -> None:
        pass

    told = r"PREFECT_API_AUTH_STRING: the Prefect server does not take the key of this command \(HTTP 401\); set it to "
    with (
        temporary_settings({PREFECT_API_URL: url, PREFECT_API_AUTH_STRING: "of:another server"}),
        pytest.raises(UsageError, match=told),
        server_for_run(Workspace(tmp_path / "ws")),
    ):
        nothing()
    gc.collect()  # Prefect leaves the connection to it open


@pytest.mark.parametrize(
    "moment", [pytest.param("at its start", marks=pytest.mark.slow), "in mid-run",
               pytest.param("for good", marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_run_whose_server_is_killed_is_done_nevertheless(
    moment, environment, standing_workers, make_pairs, tmp_path
) -> None:
    """In few lines; the exit code is that of the work. No proxy stands in the way of it."""
    make_pairs(tmp_path, 16)
    workspace = Workspace(tmp_path / "ws")
    workspace.create()
    proxies = {"HTTP_PROXY": f"http://{DEAD}", "ALL_PROXY": f"socks5://{DEAD}"}
    command = run_of(tmp_path, workspace.root)
    said = tmp_path / "said"

    def is_moment() -> bool:
        assert run.poll() is None, said.read_text()
        return "watch at" in said.read_text() if moment == "at its start" else any(workspace.masks.rglob("*.png"))

    with said.open("wb") as stderr:
        run = subprocess.Popen(command, env=os.environ | standing_workers | proxies, stderr=stderr)
        until(is_moment)
        if moment == "for good":
            database = workspace.prefect_home / "prefect.db"
            database.rename(tmp_path / "database")
            database.mkdir()
        os.kill(until(lambda: pid_of(workspace)), signal.SIGKILL)
        assert run.wait() == 0, said.read_text()
    told = said.read_text()
    assert "warning: the Prefect server has ended (exit code -9), and is started again in 2 s" in told
    assert "Traceback" not in told
    assert "ERROR" not in told
    assert len(told.splitlines()) <= 14, told
    # A server that is back soon enough has lost nothing of a run that has just begun.
    lost = told.count("; what was done is not lost, but the history of this run is incomplete; going on")
    assert lost == 1 if moment == "for good" else lost <= 1, told
    assert len(list(workspace.masks.rglob("*.png"))) == 16
    assert pid_of(workspace) is None


def check_done(workspace: Workspace, told: str) -> None:
    """Check that a run without its server for a while has done all its work, and said so at most once."""
    assert "Traceback" not in told
    assert "ERROR" not in told
    assert told.count("the Prefect server does not answer; the work goes on") <= 1, told
    assert len(list(workspace.masks.rglob("*.png"))) == 16


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("trouble", ["stands still for a minute", "loses its database"])
def test_a_run_whose_server_has_trouble_is_done_nevertheless(
    trouble, environment, standing_workers, make_pairs, tmp_path
) -> None:
    """The run says so at most once, and ends as its work has ended."""
    make_pairs(tmp_path, 16)
    workspace = Workspace(tmp_path / "ws")
    workspace.create()
    said = tmp_path / "said"
    with said.open("wb") as stderr:
        run = subprocess.Popen(run_of(tmp_path, workspace.root), env=os.environ | standing_workers, stderr=stderr)
        until(lambda: run.poll() is not None or any(workspace.masks.rglob("*.png")))
        server = until(lambda: pid_of(workspace))
        if trouble == "loses its database":
            for path in workspace.prefect_home.glob("prefect.db*"):
                path.unlink()
        else:
            os.kill(server, signal.SIGSTOP)
            with contextlib.suppress(subprocess.TimeoutExpired):
                run.wait(60)
            os.kill(server, signal.SIGCONT)
        assert run.wait() == 0, said.read_text()
    check_done(workspace, said.read_text())
    assert pid_of(workspace) is None


class OwnServer:
    """A Prefect server of the user's own, with its database in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir()
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self._port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}/api"
        self.database = folder / "prefect.db"

    def start(self) -> None:
        command = [sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app",
                   "--host", "127.0.0.1", "--port", str(self._port), "--log-level", "warning"]  # fmt: skip
        environment = os.environ | {"PREFECT_HOME": str(self._folder)}
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        until(self._answers)

    def _answers(self) -> bool:
        assert self._process.poll() is None, (self._folder / "log").read_text()
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"{self.url}/health", timeout=10).is_success
        return False

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture
def own_server(environment, tmp_path) -> Iterator[OwnServer]:
    server = OwnServer(tmp_path / "prefect")
    server.start()
    yield server
    server.kill()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_whose_own_server_is_away_for_a_while_is_done_and_recorded(
    own_server, standing_workers, make_pairs, tmp_path
) -> None:
    """The work goes on meanwhile; what was done then is told to the server when it is back."""
    make_pairs(tmp_path, 120)
    workspace = Workspace(tmp_path / "ws")
    workspace.create()
    said = tmp_path / "said"

    def masks() -> int:
        assert run.poll() is None, said.read_text()
        return len(list(workspace.masks.rglob("*.png")))

    with said.open("wb") as stderr:
        environment = os.environ | standing_workers | {"PREFECT_API_URL": own_server.url}
        run = subprocess.Popen([*run_of(tmp_path, workspace.root), "--shard-size", "4"], env=environment, stderr=stderr)
        until(lambda: masks() > 0)
        own_server.kill()
        before = rows(own_server.database, "task_run")["task_run"]
        until(lambda: masks() >= 60)
        own_server.start()
        assert run.wait() == 0, said.read_text()
    told = said.read_text()
    assert "Traceback" not in told
    assert "ERROR" not in told
    assert told.count("warning: the Prefect server") <= 1, told
    assert len(list(workspace.masks.rglob("*.png"))) == 120
    with contextlib.closing(sqlite3.connect(own_server.database)) as opened:
        assert opened.execute("SELECT state_type FROM flow_run").fetchall() == [("COMPLETED",)], told
        (done,) = opened.execute("SELECT count(*) FROM task_run WHERE state_type = 'COMPLETED'").fetchone()
    assert done >= 60 > before


class Postgres:
    """A PostgreSQL server of this test alone."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # PostgreSQL refuses to run as root.
        self._user = {"user": "postgres", "group": "postgres"} if os.getuid() == 0 else {}
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self._port = probe.getsockname()[1]
        self.url = f"postgresql+asyncpg://desra@127.0.0.1:{self._port}/postgres"
        self._run("initdb", "--username=desra", "--auth=trust", "--no-sync").wait()

    def _run(self, *arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*arguments, "-D", str(self._folder / "data")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            cwd=self._folder, **self._user,
        )  # fmt: skip

    def start(self) -> None:
        places = ("-p", str(self._port), "-c", f"unix_socket_directories={self._folder}", "-c", "fsync=off")
        self._server = self._run("postgres", *places, "-c", "listen_addresses=127.0.0.1")
        until(lambda: self._server.poll() is not None or self.rows("SELECT 1") == [(1,)])

    def stop(self) -> None:
        self._server.send_signal(signal.SIGINT)
        self._server.wait()

    def rows(self, query: str) -> list[tuple[Any, ...]] | None:
        """Return the rows of a query; None where the server does not answer."""

        async def asked() -> list[tuple[Any, ...]]:
            connection = await asyncpg.connect(self.url.replace("+asyncpg", ""))
            try:
                return [tuple(row) for row in await connection.fetch(query)]
            finally:
                await connection.close()

        with contextlib.suppress(OSError, asyncpg.PostgresError):
            return asyncio.run(asked())
        return None


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    if not (shutil.which("postgres") and shutil.which("initdb")):
        pytest.skip("no PostgreSQL is installed here")
    folder = Path(tempfile.mkdtemp(prefix="desra-postgres-"))  # whose user may not enter the folder of the test
    if os.getuid() == 0:
        try:
            shutil.chown(folder, "postgres", "postgres")
        except LookupError:
            pytest.skip("PostgreSQL refuses to run as root, and there is no user postgres")
    database = Postgres(folder)
    database.start()
    yield database
    database.stop()
    shutil.rmtree(folder)


@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_a_run_whose_database_is_away_for_a_while_is_done_nevertheless(
    postgres, environment, standing_workers, make_pairs, tmp_path
) -> None:
    make_pairs(tmp_path, 16)
    workspace = Workspace(tmp_path / "ws")
    workspace.create()
    said = tmp_path / "said"
    settings = {"PREFECT_SERVER_DATABASE_CONNECTION_URL": postgres.url}
    with said.open("wb") as stderr:
        command = run_of(tmp_path, workspace.root)
        run = subprocess.Popen(command, env=os.environ | standing_workers | settings, stderr=stderr)
        until(lambda: run.poll() is not None or any(workspace.masks.rglob("*.png")))
        postgres.stop()
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.wait(20)
        postgres.start()
        assert run.wait() == 0, said.read_text()
    check_done(workspace, said.read_text())
    assert pid_of(workspace) is None
    assert not (workspace.prefect_home / "prefect.db").exists()
    assert postgres.rows("SELECT count(*) > 0 FROM flow_run") == [(True,)]


@pytest.mark.slow
def test_a_server_ends_with_a_run_that_is_killed(environment, tmp_path) -> None:
    """On another host, where the next run may be, nobody could end it."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom deployments.serving.server import HISTORY, Server\n"
        "from desra_core.workspace import Workspace\n"
        "Server(Workspace(Path(sys.argv[1])), history=HISTORY).start()\nprint('up', flush=True)\nsys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "ws")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "up\n"
        server = pid_of(Workspace(tmp_path / "ws"))
        assert server is not None
        run.kill()
    until(lambda: not psutil.pid_exists(server))


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
    forget_results(tmp_path, timedelta(days=90))
    assert [path.name for path in storage.iterdir()] == ["new"]
    assert (tmp_path / "worker.log").stat().st_size == 0
    assert (tmp_path / "server.log").read_bytes() == b"kept"
    forget_results(tmp_path / "nowhere", timedelta(days=90))


def test_the_writer_of_an_emptied_log_goes_on_at_its_beginning(tmp_path) -> None:
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


def test_the_space_of_deleted_rows_is_given_back(tmp_path) -> None:
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
def test_the_server_deletes_old_runs_with_their_tasks_and_logs(workspace, environment, monkeypatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # not used for this machine
    monkeypatch.setenv("PREFECT_SERVER_SERVICES_DB_VACUUM_ORPHAN_CLEANUP_LOOP_SECONDS", "2")  # not once a day
    server = Server(workspace, history=timedelta(days=30))
    database = workspace.prefect_home / "prefect.db"

    def post(path: str, content: object) -> httpx.Response:
        """Ask again while the database is busy, as Prefect's client does."""
        url = f"{keyed(os.environ)}/{path}"
        answer = until(lambda: (said := httpx.post(url, json=content, timeout=60)).status_code != 503 and said)
        return answer.raise_for_status()

    def ask(path: str, **content: object) -> dict[str, Any]:
        answer = post(path, content)
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
        post("logs/", [log])
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
