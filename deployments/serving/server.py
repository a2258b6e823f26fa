"""A real Prefect server, for the length of a run or of desra serve, where no other is configured.

Prefect's own ephemeral server loses task runs and survives a killed driver. This one is a child process on a loopback
port, with its database in the workspace; the next run ends one that a killed run left behind. One that ends in mid-run
is started again, and the work goes on with or without it: the workspace knows what is done.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from importlib import import_module
from pathlib import Path

import httpx
import psutil

from deployments.serving.guarded import ENTRANCE, HOSTS
from deployments.serving.interrupted import mark_killed
from deployments.serving.retention import HISTORY, compact, forget_results, server_settings
from deployments.serving.standing import (
    MARK,
    elsewhere,
    end_leftovers,
    end_marked,
    history_of,
    new_mark,
    served_at,
    start_again,
)
from deployments.serving.worker import CONSOLE
from desra_core.errors import DesraError, TransientError, UsageError, printable
from desra_core.files.atomic import storage_errors, write_secret
from desra_core.workspace import Workspace
from tasks.logs import say

# Prefect's clients send it to the server, and read it from their environment, which nobody else on a machine can.
_KEY = "PREFECT_API_AUTH_STRING"
# Set when a command has restarted itself after losing its Prefect server; it does so once.
AGAIN = "DESRA_BEGUN_AGAIN"

_STARTS = 2
_START_SECONDS = 600  # a busy machine may take minutes
_PATIENCE_SECONDS = 30
_LOOK_SECONDS = 1.0
_STOP_SECONDS = 15
_ARRIVAL_SECONDS = 20
# What an empty database takes.
_DATABASE_BYTES = 2_000_000
_ERROR = re.compile(r"[\w.]*(Error|Exception)\b|ERROR: +\[Errno")
_PROXIES = ("http_proxy", "https_proxy", "all_proxy")
_THIS_MACHINE = (*HOSTS, "::1")


@contextlib.contextmanager
def prefect_server(workspace: Workspace) -> Iterator[str]:
    """Make sure that Prefect has a server, and yield the address of its API.

    That is the one that is configured, or that of desra serve for this workspace, or one for the length of this run.
    Sets environment variables that Prefect reads when it is imported; call it before. The workspace must be locked.

    Raises
    ------
    TransientError
        The disk is full, or the configured server does not answer any more.
    UsageError
        The configured server does not answer, none can be started, or the key of that of desra serve is not ours.
    """
    if configured := os.environ.get("PREFECT_API_URL"):
        check_server(configured)
        yield configured
        return
    if served := served_at(workspace):
        key = _read_key(workspace) if served.own else None
        try:
            configure(workspace, served.url, key)
            yield served.url
        finally:
            _forget(key)
        return
    server = Server(workspace, history=history_of(workspace) or HISTORY)
    try:
        server.start()
        _tell_killed(workspace, server.url)
        with _kept_up(server):
            yield server.url
    finally:
        server.stop()


class ServerLostError(TransientError):
    """The Prefect server does not answer any more. What was done is not lost, but its history may be.

    Attributes
    ----------
    code
        The exit code of a command that has nothing left to do; None where it has.
    """

    code: int | None = None


class Server:
    """A Prefect server on this machine, with its home in a workspace, for the one who can read its key there.

    Parameters
    ----------
    workspace
        Must be locked when the server is first started.
    port
        To listen on; any free one by default.
    history
        How long it keeps runs.
    mark
        Environment variables of its process, by which it is known.

    Attributes
    ----------
    url
        Address of its API.
    log
        What it prints.
    unwanted
        Set when it is not to be started any more.

    Raises
    ------
    UsageError
        Somebody else listens on the port.
    """

    name = "the Prefect server"

    def __init__(
        self,
        workspace: Workspace,
        *,
        port: int = 0,
        history: timedelta,
        mark: dict[str, str] | None = None,
    ) -> None:
        self._workspace = workspace
        self._home = workspace.prefect_home
        self.log = self._home / "server.log"
        self._history = history
        self._mark = mark or new_mark()
        self._key = f"desra:{secrets.token_urlsafe(32)}"
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0
        self.unwanted = threading.Event()
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that has just ended may linger
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                raise UsageError(f"--port {port}", f"cannot be had ({error.strerror})", "give another one") from None
            self._port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}/api"

    @property
    def exit_code(self) -> int | None:
        """That of the process, which is below zero where a signal ended it; None while it runs."""
        return self._process.poll() if self._process else None

    def start(self) -> None:
        """Start it, or start it again, and wait until it answers. One that ends meanwhile is started once more.

        Raises
        ------
        TransientError
            The disk is full.
        UsageError
            It does not answer, though it was started twice and given ten minutes.
        """
        with storage_errors(self._home):
            self._home.mkdir(parents=True, exist_ok=True)
        if _is_full(self._home):
            raise self._without_room(self._home)
        compact(self._home)
        forget_results(self._home, self._history)
        write_secret(_key_file(self._workspace), self._key)
        configure(self._workspace, self.url, self._key)
        late: list[bool] = []
        for _ in range(_STARTS):
            if self.unwanted.is_set():
                return
            with storage_errors(self._home):
                self._launch()
            import_module("prefect")  # takes a second, while the server starts
            if self._answers() or self.unwanted.is_set():
                return
            late.append(self.exit_code is None)
            self._end()
        error = self._last_error()
        if late[-1]:
            error = f"it did not answer within {_START_SECONDS // 60} minutes" + ", twice" * all(late)
        if _is_full(self._home) or "disk is full" in error or "No space left" in error:
            raise self._without_room(self._home if _is_full(self._home) else f"{self._home} or {_temporary()}")
        raise UsageError(self.log, f"the Prefect server did not start ({error})", "read that log")

    def stop(self) -> None:
        """Stop it, when it has got all that this process has to tell."""
        if "prefect" in sys.modules and self._process is not None and self.exit_code is None:
            _drain()
        _forget(self._key)
        self._end()
        for path in (self._home / "server.json", _key_file(self._workspace)):
            path.unlink(missing_ok=True)

    def _end(self) -> None:
        if self._process is not None:
            end_process(self._process.pid)
            self._process.poll()

    def _answers(self) -> bool:
        """Wait until it answers; False where it ends instead, or takes too long."""
        began = told = time.monotonic()
        while (
            self.exit_code is None and not self.unwanted.is_set() and (now := time.monotonic()) - began < _START_SECONDS
        ):
            with contextlib.suppress(httpx.HTTPError, psutil.Error):
                if self._listens():
                    httpx.get(f"{self.url}/health", timeout=10).raise_for_status()
                    return True
            if now - told >= _PATIENCE_SECONDS:
                told = now
                say(f"{self.name} does not answer yet after {now - began:.0f} s; its process lives, and is waited for")
            time.sleep(0.05)
        return False

    def _listens(self) -> bool:
        """Whether its own process has the port: another one that took it meanwhile is not to get the key."""
        assert self._process is not None
        connections = psutil.Process(self._process.pid).net_connections("tcp")
        return any(one.status == psutil.CONN_LISTEN and one.laddr.port == self._port for one in connections)

    def _without_room(self, where: object) -> TransientError:
        reason = f"the disk is full, and {self.name} has no room for its database"
        return TransientError(where, reason, "free some space and run again")

    def _last_error(self) -> str:
        """The last error that it has told in its log since it was started, in a line."""
        with self.log.open("rb") as log:
            log.seek(self._log_start)
            lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if _ERROR.match(line)]
        return printable((errors or lines or [f"exit code {self.exit_code}, and nothing in its log"])[-1].strip())

    def _launch(self) -> None:
        command = [sys.executable, "-m", "uvicorn", "--factory", "deployments.serving.guarded:create_app",
                   "--app-dir", str(Path(__file__).resolve().parents[2]), "--host", "127.0.0.1",
                   "--port", str(self._port), "--log-level", "warning"]  # fmt: skip
        ours = {
            "PREFECT_SERVER_API_AUTH_STRING": self._key,
            "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": ",".join(f"http://{host}:{self._port}" for host in HOSTS),
            CONSOLE: "WARNING",  # into its log, also where this process keeps what Prefect prints from a terminal
        }
        # Who knows better has the last word, but on who may enter and on what its log tells.
        environment = server_settings(self._history) | os.environ | elsewhere() | self._mark | ours
        with self.log.open("ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                command,
                env=environment,
                cwd=self._home,  # the folder of the command may go meanwhile
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        (self._home / "server.json").write_text(json.dumps({"pid": self._process.pid, "token": self._mark[MARK]}))


def watch_at(workspace: Workspace, url: str) -> str:
    """Where a person watches a server, for a line on stderr.

    A terminal shows the key of a server of ours, behind the ``#``, which is never sent. A file or the journal, which
    others may read, gets the place of the key instead.

    Parameters
    ----------
    workspace
        That of the run.
    url
        Of the API.
    """
    page = url.removesuffix("/api")
    with contextlib.suppress(OSError):
        path = _key_file(workspace)
        if os.environ.get(_KEY) == (key := path.read_text()):
            return f"{page}{ENTRANCE}#{key}" if sys.stderr.isatty() else f"{page}{ENTRANCE} (key in {path})"
    return page


@contextlib.contextmanager
def _kept_up(server: Server) -> Iterator[None]:
    """Start a server again that ends by itself; where that fails, the work goes on without one."""
    starts: list[float] = []

    def keep_up() -> None:
        while not server.unwanted.wait(_LOOK_SECONDS):
            if server.exit_code is None:
                continue
            try:
                start_again(server, starts, time.monotonic(), server.unwanted.wait)
            except (DesraError, OSError) as error:  # a workspace that has vanished, for instance
                say(f"warning: {printable(error)}; the work goes on without it")
                _ask_once()
                return

    thread = threading.Thread(target=keep_up, name="server", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.unwanted.set()
        thread.join()


def _ask_once() -> None:
    """Make Prefect fail at once in all that it has to tell: its server has gone for good."""
    from prefect.settings import get_current_settings

    get_current_settings().client.max_retries = 0


def check_temporary() -> None:
    """See that temporary files find room: databases and workers need them.

    Raises
    ------
    TransientError
        The disk is full.
    """
    if _is_full(folder := _temporary()):
        reason = "the disk is full, and temporary files find no room there"
        raise TransientError(folder, reason, "free some space, or name another folder by TMPDIR, and run again")


def _temporary() -> Path:
    """Where temporary files go; Python would take the next best folder where that is full, and others would not."""
    return Path(os.environ.get("TMPDIR") or "/tmp")  # noqa: S108


def _is_full(folder: Path) -> bool:
    """Whether not even an empty database fits into a folder; False where there is no such folder."""
    with contextlib.suppress(OSError):
        disk = os.statvfs(folder)
        room = disk.f_bavail * disk.f_frsize >= _DATABASE_BYTES or not disk.f_blocks  # of which some disks say nothing
        return not room or (disk.f_files > 0 and disk.f_favail == 0)
    return False


def configure(workspace: Workspace, url: str, key: str | None) -> None:
    """Tell Prefect, in this process and in those that it starts, of the server that serves a workspace.

    Parameters
    ----------
    workspace
        Where Prefect has its home.
    url
        Of the API.
    key
        That of a server of ours; None leaves what the environment has for another one.
    """
    heed_proxies()
    if key is not None:
        os.environ[_KEY] = key
    os.environ.update(
        PREFECT_HOME=str(workspace.prefect_home),
        PREFECT_API_URL=url,
        PREFECT_SERVER_ANALYTICS_ENABLED="false",
        PREFECT_SERVER_LOGGING_LEVEL="WARNING",
        PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT="false",
        DO_NOT_TRACK="1",
    )


def _forget(key: str | None) -> None:
    """Take a server that `configure` has told of from the environment: a command that starts anew looks again."""
    os.environ.pop("PREFECT_API_URL", None)
    if key is not None:
        os.environ.pop(_KEY, None)


def heed_proxies() -> None:
    """Leave the proxies of the environment to what is elsewhere, in this process and in those that it starts.

    httpx, and with it Prefect, makes a transport for every proxy before it looks whether one is to be asked: what it
    cannot read is left out, with a warning, for it could not be used anyway.
    """
    for name in [name for name in os.environ if name.lower() in _PROXIES and os.environ[name].strip()]:
        value = os.environ[name].strip()
        # Desktops write socks:// and mean version 5.
        address = (value if "://" in value else f"http://{value}").replace("socks://", "socks5://", 1)
        try:
            httpx.Proxy(address)
            os.environ[name] = address
        except (ValueError, httpx.InvalidURL):  # which name the password
            del os.environ[name]
            say(f"warning: {name} is no proxy of the kinds http, https, socks5 and socks5h, and is left out")
    given = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    direct = [host for host in map(str.strip, given.split(",")) if _is_readable(host)]
    direct += [host for host in _THIS_MACHINE if host not in direct]
    told = "*" if "*" in direct else ",".join(direct)  # only alone do all tools know it
    os.environ.update(no_proxy=told, NO_PROXY=told)


def _is_readable(host: str) -> bool:
    """Whether httpx understands an entry: it rejects ranges of IPv6 addresses; nothing else here reads them."""
    with contextlib.suppress(ValueError):
        return bool(ipaddress.IPv6Address(host))
    with contextlib.suppress(httpx.InvalidURL):
        return bool(host and httpx.URL(host if "://" in host else f"all://*{host}"))
    return False


def wait_for_task_runs(flow_run_id: str, expected: int) -> bool:
    """Wait until the server knows how each task run of a flow run ended.

    Returns
    -------
    False when they have not all arrived in good time.
    """
    from prefect.client.orchestration import get_client

    _drain()
    query = {
        "flow_runs": {"id": {"any_": [flow_run_id]}},
        "task_runs": {"state": {"type": {"any_": ["COMPLETED", "FAILED", "CRASHED", "CANCELLED"]}}},
    }
    deadline = time.monotonic() + _ARRIVAL_SECONDS
    with get_client(sync_client=True) as client:  # it knows of keys and passwords
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError):
                if client.request("POST", "/task_runs/count", json=query).json() >= expected:
                    return True
            time.sleep(0.1)
    return False


def check_server(url: str) -> None:
    """See that a configured server answers.

    Raises
    ------
    TransientError
        It does not any more: this command has lost it before.
    UsageError
        It does not.
    """
    heed_proxies()
    try:
        httpx.get(f"{url}/health", timeout=10)  # any answer will do: some servers want a key first
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        reason = f"no Prefect server answers ({error})"
        kind = TransientError if AGAIN in os.environ else UsageError
        raise kind(f"PREFECT_API_URL={url}", reason, "start it, or unset the variable") from None


def end_leftover_server(workspace: Workspace) -> None:
    """Stop the server that a killed run left behind. The workspace must be locked."""
    if served_at(workspace):
        return
    end_leftovers(workspace)
    left = workspace.prefect_home / "server.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        end_marked({MARK: json.loads(left.read_bytes())["token"]})
    left.unlink(missing_ok=True)


def end_process(pid: int) -> None:
    """Stop a process and its children."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        family = [*process.children(recursive=True), process]
        for member in family:
            with contextlib.suppress(psutil.Error):
                member.terminate()
        _, alive = psutil.wait_procs(family, timeout=_STOP_SECONDS)
        for member in alive:
            with contextlib.suppress(psutil.Error):
                member.kill()
        psutil.wait_procs(alive, timeout=_STOP_SECONDS)


def _tell_killed(workspace: Workspace, url: str) -> None:
    """Tell the server of a workspace, which must be locked, of runs that people had started and that were killed."""
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

    with (
        contextlib.suppress(httpx.HTTPError, RuntimeError),  # Prefect's own, where the server has ended meanwhile
        # Prefect may have been imported before.
        temporary_settings({PREFECT_API_URL: url, PREFECT_API_AUTH_STRING: os.environ[_KEY]}),
        get_client(sync_client=True) as client,
    ):
        mark_killed(workspace.root, client)


def _key_file(workspace: Workspace) -> Path:
    return workspace.prefect_home / "key"


def _read_key(workspace: Workspace) -> str:
    """The key of the server that stands in a workspace.

    Raises
    ------
    UsageError
        It cannot be read: somebody else has started that server.
    """
    path = _key_file(workspace)
    try:
        return path.read_text()
    except OSError as error:
        reason = f"the key of the Prefect server cannot be read ({error.strerror})"
        raise UsageError(path, reason, "run as the one who has started desra serve") from None


def _drain() -> None:
    """Send the events and logs that Prefect still holds back."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    EventsWorker.drain_all(timeout=_ARRIVAL_SECONDS)
    APILogWorker.drain_all(timeout=_ARRIVAL_SECONDS)
