"""Run a Prefect server for the length of a run or of desra serve, where no server is configured.

Prefect's own ephemeral server loses task runs and survives a killed driver. This server is a child process on a
loopback port, with its database in the workspace; the next run ends a server that a killed run has left. A server that
ends in mid-run is started again, and the work goes on with or without it: the workspace holds what is done.
"""

import contextlib
import json
import os
import re
import secrets
import socket
import sqlite3
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import psutil

from deployments.serving import connection, processes
from deployments.serving.schedules import mark_killed
from desra_core.errors import DesraError, TransientError, UsageError, printable
from desra_core.files import replace_file, scratch_in, storage_errors, write_secret
from desra_core.workspace import Workspace
from tasks.logs import say

HISTORY = timedelta(days=90)

# How long events are kept if the user's environment turns their storage on.
_EVENTS = timedelta(days=3)
# The share of free space above which the database is written anew. Freed space is used again, so this is rare.
_FREE_SHARE = 0.5
_LOG_BYTES = 10_000_000
_STARTS = 2
_START_SECONDS = 600  # a busy machine may take minutes
_PATIENCE_SECONDS = 30
_LOOK_SECONDS = 1.0
# The size of an empty database.
_DATABASE_BYTES = 2_000_000
_ERROR = re.compile(r"[\w.]*(Error|Exception)\b|ERROR: +\[Errno")


class ServerLostError(TransientError):
    """The Prefect server does not answer any more: the history of the run may be lost, but no work.

    ``code`` is the exit code of a command that has nothing left to do, else None.
    """

    code: int | None = None


@contextlib.contextmanager
def prefect_server(workspace: Workspace, meanwhile: Callable[[], object] = lambda: None) -> Iterator[str]:
    """Make sure that Prefect has a server, and yield the address of its API.

    The server is the configured one, or that of desra serve for this workspace, or a new one for this run alone. Call
    this before Prefect is imported, which reads environment variables set here. The workspace must be locked.
    ``meanwhile`` is called once the address is known: while a new server starts, which takes seconds.

    Raises:
        TransientError: The disk is full, or the configured server does not answer any more.
        UsageError: The configured server does not answer, no server can be started, or the key of the server of desra
            serve cannot be read.
    """
    if configured := os.environ.get("PREFECT_API_URL"):
        connection.check_server(configured)
        meanwhile()
        yield configured
    elif served := processes.served_at(workspace):
        key = connection.read_key(workspace) if served.own else None
        try:
            connection.configure(workspace, served.url, key)
            meanwhile()
            yield served.url
        finally:
            connection.forget(key)
    else:
        history = processes.history_of(workspace) or HISTORY
        with Server(workspace, history=history, meanwhile=meanwhile).running() as server:
            # Mark killed runs that people started, unless the server has ended meanwhile.
            with contextlib.suppress(UsageError), connection.connected() as client:
                mark_killed(workspace.root, client)
            from prefect.settings import get_current_settings

            # Heartbeats serve automations only, and their thread delays the end of every flow by up to a second.
            get_current_settings().flows.heartbeat_frequency = None
            with _kept_up(server):
                yield server.url


class Server(processes.Child):
    """A Prefect server on this machine, with its home in a workspace; it answers only to the key in that home.

    The workspace must be locked when the server is first started.

    Args:
        workspace: The workspace.
        port: The port to listen on; 0 for any free port.
        history: How long to keep runs.
        mark: The environment by which the process is known; None for a server that ends with this process.
        meanwhile: Called while the server starts for the first time.

    Raises:
        UsageError: Another process has the port.
    """

    name = "the Prefect server"

    def __init__(
        self,
        workspace: Workspace,
        *,
        port: int = 0,
        history: timedelta,
        mark: dict[str, str] | None = None,
        meanwhile: Callable[[], object] = lambda: None,
    ) -> None:
        super().__init__(workspace.prefect_home / "server.log")
        self._workspace, self._home = workspace, workspace.prefect_home
        self._history = history
        self._mark = mark or processes.new_mark() | {connection.RUN: str(os.getpid())}
        self._key = f"desra:{secrets.token_urlsafe(32)}"
        self._while_it_starts: Callable[[], object] | None = meanwhile  # None once it was called
        self._log_start = 0
        self.unwanted = threading.Event()  # once set, the server is not started any more
        try:
            with socket.create_server(("127.0.0.1", port)) as probe:
                self._port = probe.getsockname()[1]
        except OSError as error:
            reason = f"cannot be had ({os.strerror(error.errno or 0)})"
            raise UsageError(f"--port {port}", reason, "give another one") from None
        self.url = f"http://127.0.0.1:{self._port}/api"  # address of the API

    def start(self) -> None:
        """Start the server, or start it again, and wait until it answers; try twice.

        Raises:
            TransientError: The disk is full.
            UsageError: The server ends, or does not answer within ten minutes.
        """
        with storage_errors(self._home):
            self._home.mkdir(parents=True, exist_ok=True)
        if is_full(self._home):
            raise self._without_room(self._home)
        compact(self._home)
        forget_results(self._home, self._history)
        write_secret(connection.key_file(self._workspace), self._key)
        connection.configure(self._workspace, self.url, self._key)
        new = not (database := self._home / "prefect.db").exists()
        copied = new and self._copy_cached(database)
        late = False
        for _ in range(_STARTS):
            if self.unwanted.is_set():
                return
            with storage_errors(self._home):
                self._launch()
            import_module("prefect")  # takes a second, while the server starts
            if self._while_it_starts:
                first, self._while_it_starts = self._while_it_starts, None
                first()
            if self._answers() or self.unwanted.is_set():
                if new and not copied:
                    _store_in_cache(database)
                return
            late = self.exit_code is None
            self._end()
            if copied and "sqlite3." in self._written():  # the copy is damaged
                copied = False
                _delete(_cached_database(), *_files_of(database))
        lines = [line for line in self._written().splitlines() if line.strip()]
        errors = [line for line in lines if _ERROR.match(line)]
        error = printable((errors or lines or [f"exit code {self.exit_code}, and nothing in its log"])[-1].strip())
        if late:
            error = f"it did not answer within {_START_SECONDS // 60} minutes"
        if is_full(self._home) or "disk is full" in error or "No space left" in error:
            raise self._without_room(self._home if is_full(self._home) else f"{self._home} or {temporary_folder()}")
        raise UsageError(self.log, f"the Prefect server did not start ({error})", "read that log")

    def _copy_cached(self, database: Path) -> bool:
        """Copy the database of the user's cache to its place, unless there is none or another server is set."""
        if any("DATABASE" in name for name in os.environ if name.startswith("PREFECT_")):
            return False
        content = _read_owned(_cached_database())
        if content is None:
            return False
        _delete(*_files_of(database))  # what an earlier database may have left
        replace_file(database, content)
        return True

    def _written(self) -> str:
        """Return what the process has written to its log since its start."""
        return self.log.read_bytes()[self._log_start :].decode(errors="replace")

    def stop(self) -> None:
        """Send the events and logs that Prefect has not sent yet, and stop the server."""
        if "prefect" in sys.modules and self._process is not None and self.exit_code is None:
            connection.drain()
        connection.forget(self._key)
        self._end()
        for path in (self._home / "server.json", connection.key_file(self._workspace)):
            path.unlink(missing_ok=True)

    def _end(self) -> None:
        if self._process is not None:
            processes.end_process(self._process.pid)
            self._process.poll()

    def _answers(self) -> bool:
        """Wait until the server answers; return False where it ends instead, or takes too long."""
        import httpx

        began = said = now = time.monotonic()
        while self.exit_code is None and not self.unwanted.is_set() and now - began < _START_SECONDS:
            with contextlib.suppress(httpx.HTTPError, psutil.Error):
                # Another process may have taken the port meanwhile, and must not get the key.
                assert self._process is not None
                open_ports = psutil.Process(self._process.pid).net_connections("tcp")
                if any(port.status == psutil.CONN_LISTEN and port.laddr.port == self._port for port in open_ports):
                    httpx.get(f"{self.url}/health", timeout=10).raise_for_status()
                    return True
            if now - said >= _PATIENCE_SECONDS:
                said = now
                say(f"{self.name} does not answer yet after {now - began:.0f} s; its process is still running")
            time.sleep(0.05)
            now = time.monotonic()
        return False

    def _without_room(self, where: object) -> TransientError:
        reason = f"the disk is full, and {self.name} has no room for its database"
        return TransientError(where, reason, "free some space and run again")

    def _launch(self) -> None:
        command = [sys.executable, "-m", "uvicorn", "--factory", "deployments.serving.guarded:create_app",
                   "--app-dir", str(Path(__file__).resolve().parents[2]), "--host", "127.0.0.1",
                   "--port", str(self._port), "--log-level", "warning"]  # fmt: skip
        ours = {
            "PREFECT_SERVER_API_AUTH_STRING": self._key,
            "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": ",".join(f"http://{host}:{self._port}" for host in connection.HOSTS),
            connection.CONSOLE: "WARNING",  # into the log of the server, even where this process silences Prefect
        }
        # Prefect would make this file for its owner alone, whatever the umask.
        if not (memo := self._home / "memo_store.toml").exists():
            memo.touch()
        self._log_start = self.log.stat().st_size if self.log.exists() else 0
        # The user's environment wins over the settings of retention, but not over those of access and of the log.
        defaults = server_settings(self._history) | _place_of_pages(self._home)
        environment = defaults | os.environ | processes.for_other_folder() | self._mark | ours
        process = self._spawn(command, environment)
        (self._home / "server.json").write_text(json.dumps({"pid": process.pid, "token": self._mark[processes.MARK]}))


@contextlib.contextmanager
def _kept_up(server: Server) -> Iterator[None]:
    """Restart a server that ends by itself; if the restart fails, let the work go on without a server."""

    def keep_up() -> None:
        while not server.unwanted.wait(_LOOK_SECONDS):
            if server.exit_code is None:
                continue
            try:
                server.start_again(time.monotonic(), server.unwanted.wait)
            except (DesraError, OSError) as error:  # a workspace that has vanished, for instance
                from prefect.settings import get_current_settings

                say(f"warning: {printable(error)}; the work goes on without the server")
                get_current_settings().client.max_retries = 0  # so that calls of the lost server fail at once
                return

    thread = threading.Thread(target=keep_up, name="server", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.unwanted.set()
        thread.join()


def end_leftover_server(workspace: Workspace) -> None:
    """Stop the server that a killed run left behind. The workspace must be locked."""
    if processes.served_at(workspace):
        return
    processes.end_leftovers(workspace)
    left = workspace.prefect_home / "server.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        processes.end_marked({processes.MARK: json.loads(left.read_bytes())["token"]})
    left.unlink(missing_ok=True)


def check_temporary() -> None:
    """Check that the disk has room for temporary files, which databases and workers need.

    Raises:
        TransientError: The disk is full.
    """
    if is_full(folder := temporary_folder()):
        reason = "the disk is full, and has no room for temporary files"
        raise TransientError(folder, reason, "free some space, or name another folder by TMPDIR, and run again")


def cache_folder() -> Path:
    """Return the folder of desra in the user's cache."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(given) if given.startswith("/") else Path.home() / ".cache") / "desra"


def _cached_database() -> Path:
    """Return the place, in the user's cache, of an empty database of this version of Prefect.

    Prefect builds its tables by some 200 migrations, which takes seconds; with a copy, a new workspace saves them.
    """
    return cache_folder() / f"prefect-{version('prefect')}.db"


def _read_owned(path: Path) -> bytes | None:
    """Read a file that only this user can have written; None where there is none, or it cannot be read."""
    with contextlib.suppress(OSError), open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        about = os.fstat(file.fileno())
        if about.st_uid == os.getuid() and not about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return file.read()
    return None


def _store_in_cache(database: Path) -> None:
    """Copy the database that a server has just made to the user's cache, where that can be written."""
    place = _cached_database()
    scratch = scratch_in(place.parent)
    try:
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)) as opened:
            (tables,) = opened.execute("SELECT count(*) FROM alembic_version").fetchone()
            opened.execute("VACUUM INTO ?", [str(scratch)])
        scratch.chmod(0o600)
        if tables:
            scratch.replace(place)
    except (OSError, sqlite3.Error):
        pass
    finally:
        _delete(scratch)


def _files_of(database: Path) -> list[Path]:
    """List the files of a SQLite database."""
    return [database.with_name(f"{database.name}{ending}") for ending in ("", "-wal", "-shm", "-journal")]


def _delete(*paths: Path) -> None:
    """Delete files, where they exist and can be deleted."""
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()


def temporary_folder() -> Path:
    """Return the folder of temporary files even if it is full; `tempfile` would then name another folder."""
    return Path(os.environ.get("TMPDIR") or "/tmp")  # noqa: S108


def is_full(folder: Path) -> bool:
    """Check whether a folder has no room for an empty database; False where the folder is missing."""
    with contextlib.suppress(OSError):
        disk = os.statvfs(folder)
        no_space = disk.f_blocks > 0 and disk.f_bavail * disk.f_frsize < _DATABASE_BYTES  # some disks have no numbers
        return no_space or (disk.f_files > 0 and disk.f_favail == 0)
    return False


def server_settings(history: timedelta) -> dict[str, str]:
    """Return the environment by which Prefect's server keeps runs for ``history``, with tasks, logs and artifacts.

    Events are not stored: they are three quarters of the cost of a task run, each second of progress makes an event,
    and only the event feed of the UI shows them. Automations and live updates see them nevertheless. The numbers behind
    these settings are in docs/performance.md.
    """
    return {
        "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_ENABLED": "false",
        "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs,orphans",
        "PREFECT_SERVER_SERVICES_DB_VACUUM_RETENTION_PERIOD": str(int(history.total_seconds())),
        "PREFECT_SERVER_EVENTS_RETENTION_PERIOD": f"PT{int(min(history, _EVENTS).total_seconds())}S",
    }


def _place_of_pages(home: Path) -> dict[str, str]:
    """Return the environment by which Prefect's server writes the pages of its UI below ``home``.

    They are written beside Prefect's modules by default. Empty where that folder can be written.
    """
    found = find_spec("prefect")
    assert found is not None
    assert found.origin is not None
    if os.access(Path(found.origin).with_name("server"), os.W_OK):
        return {}
    return {"PREFECT_SERVER_UI_STATIC_DIRECTORY": str(home.absolute() / "ui")}


def forget_results(home: Path, history: timedelta) -> None:
    """Delete cached results older than ``history`` from the server's folder, and empty long logs."""
    oldest = time.time() - history.total_seconds()
    for path in (home / "storage").glob("*"):
        with contextlib.suppress(OSError):  # another process has deleted or writes it
            if path.is_file() and path.stat().st_mtime < oldest:
                path.unlink()
    for path in home.glob("*.log"):
        with contextlib.suppress(OSError):
            if path.stat().st_size > _LOG_BYTES:
                os.truncate(path, 0)  # its writer appends, and so begins anew


def compact(home: Path) -> None:
    """Shrink the server's database if most of it is deleted rows. The server must not run."""
    database = home / "prefect.db"
    if not database.exists():
        return
    # The server itself reports a damaged or locked database.
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(database)) as opened:
        free, pages = (opened.execute(f"PRAGMA {name}").fetchone()[0] for name in ("freelist_count", "page_count"))
        if free > _FREE_SHARE * pages:
            opened.execute("VACUUM")
