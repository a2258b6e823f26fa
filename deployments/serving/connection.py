"""Set the address, key and proxies with which this process and its child processes reach a Prefect server.

Functions import httpx themselves: that takes a tenth of a second, which commands without a server do without.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from desra_core.errors import TransientError, UsageError, printable, without_password
from desra_core.workspace import Workspace
from tasks.logs import say

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

# The environment variable with the key, which Prefect's clients send to the server; other users cannot read it.
KEY = "PREFECT_API_AUTH_STRING"
UNREACHED = "Failed to reach API at"  # the text of the RuntimeError that Prefect raises for a silent server
# The environment variable with the lowest level of the lines that Prefect and Dask print.
CONSOLE = "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"
# The environment variable with the pid of the run for which a server was started.
RUN = "DESRA_SERVER_RUN"
# Set when a command has restarted itself after it lost its Prefect server; a command does so only once.
AGAIN = "DESRA_BEGUN_AGAIN"

# The host names of our servers. An attacker may point another name to this machine, so others are refused.
HOSTS = ["127.0.0.1", "localhost"]
# The page of our Prefect server where a browser stores the key.
ENTRANCE = "/enter"

_PROXIES = ("http_proxy", "https_proxy", "all_proxy")
# A server that does not answer must not keep desra serve from stopping.
_ANSWER_SECONDS, _MOST_RETRIES = 20, 1
_ARRIVAL_SECONDS = 20
_RETURN_SECONDS = 300  # such as a server needs to be updated


def configure(workspace: Workspace, url: str, key: str | None) -> None:
    """Make Prefect use the API at ``url`` and a home in the workspace, in this process and in its child processes.

    ``key`` is the key of a server that desra has started. For any other server, None keeps the environment's key.
    """
    _heed_proxies()
    if key is not None:
        os.environ[KEY] = key
    os.environ.update(
        PREFECT_HOME=str(workspace.prefect_home),
        PREFECT_API_URL=url,
        PREFECT_SERVER_ANALYTICS_ENABLED="false",
        PREFECT_SERVER_LOGGING_LEVEL="WARNING",
        PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT="false",
        DO_NOT_TRACK="1",
    )
    if "prefect" in sys.modules:  # it has read its settings when it was imported, for another server
        from prefect.context import refresh_global_settings_context

        refresh_global_settings_context()


def forget(key: str | None) -> None:
    """Unset the address and the key of `configure`, so that a command that starts anew looks for a server again."""
    os.environ.pop("PREFECT_API_URL", None)
    if key is not None:
        os.environ.pop(KEY, None)


def _heed_proxies() -> None:
    """Use the proxies of the environment only for other machines, in this process and in its child processes."""
    import httpx

    # httpx, which Prefect uses, makes a transport for every proxy, needed or not, and fails if it cannot read one.
    for name in [name for name in os.environ if name.lower() in _PROXIES and os.environ[name].strip()]:
        value = os.environ[name].strip()
        # Desktops write socks:// for SOCKS version 5.
        address = (value if "://" in value else f"http://{value}").replace("socks://", "socks5://", 1)
        try:
            httpx.Proxy(address)
            os.environ[name] = address
        except (ValueError, httpx.InvalidURL):  # the errors are not shown: they contain the password
            del os.environ[name]
            say(f"warning: {name} is no proxy of the kinds http, https, socks5 and socks5h, and is left out")
    given = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    direct = dict.fromkeys([*filter(_is_readable, map(str.strip, given.split(","))), *HOSTS, "::1"])  # each once
    hosts = "*" if "*" in direct else ",".join(direct)  # many tools accept the star only alone
    os.environ.update(no_proxy=hosts, NO_PROXY=hosts)


def _is_readable(host: str) -> bool:
    """Check whether httpx understands a host of ``no_proxy``: it rejects ranges of IPv6 addresses."""
    import httpx

    with contextlib.suppress(ValueError):
        return bool(ipaddress.IPv6Address(host))
    with contextlib.suppress(httpx.InvalidURL):
        return bool(host and httpx.URL(host if "://" in host else f"all://*{host}"))
    return False


def check_server(url: str) -> None:
    """Check that a configured server answers; wait for it where this command has restarted itself after it lost it.

    Raises:
        TransientError: The server does not answer again within five minutes.
        UsageError: The server does not answer.
    """
    import httpx

    _heed_proxies()
    again, waiting = AGAIN in os.environ, False
    deadline = time.monotonic() + (_RETURN_SECONDS if again else 0)
    while True:
        try:
            httpx.get(f"{url}/health", timeout=10)  # any answer will do, even a demand for a key
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            if time.monotonic() >= deadline:
                kind = TransientError if again else UsageError
                reason = f"no Prefect server answers ({error})"
                raise kind(f"PREFECT_API_URL={url}", reason, "start it, or unset the variable") from None
        else:
            return
        if not waiting:
            say(f"waiting for the Prefect server to answer again, at most {_RETURN_SECONDS / 60:.0f} minutes")
            waiting = True
        time.sleep(1)


def key_file(workspace: Workspace) -> Path:
    """Return the file with the key of a workspace's own server, which only its owner can read."""
    return workspace.prefect_home / "key"


def read_key(workspace: Workspace) -> str:
    """Read the key of the server that desra serve has started for a workspace.

    Raises:
        UsageError: The key cannot be read, usually because another user has started that server.
    """
    try:
        return key_file(workspace).read_text()
    except OSError as error:
        reason = f"the key of the Prefect server cannot be read ({error.strerror})"
        raise UsageError(key_file(workspace), reason, "run as the one who has started desra serve") from None


def watch_at(workspace: Workspace, url: str) -> str:
    """Return the page where a person watches the server with an API at ``url``, for a line on stderr.

    On a terminal, the page ends with ``#`` and the key, a part that browsers never send. Elsewhere stderr may go to a
    file or to the journal, which others may read: there the line has the path of the key file instead of the key.
    """
    page, path = without_password(url.removesuffix("/api")), key_file(workspace)
    with contextlib.suppress(OSError):
        if os.environ.get(KEY) == (key := path.read_text()):
            return f"{page}{ENTRANCE}#{key}" if sys.stderr.isatty() else f"{page}{ENTRANCE} (key in {path})"
    return page


@contextlib.contextmanager
def connected() -> Iterator[SyncPrefectClient]:
    """Connect to the server that the environment names, with a short timeout and few retries.

    Raises:
        UsageError: The server does not answer, or refuses a request.
    """
    import httpx
    from prefect import settings
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectException

    # Prefect may have been imported before the environment was set.
    named = {name: os.environ[name] for name in ("PREFECT_API_URL", KEY) if name in os.environ}
    changed = {getattr(settings, name): value for name, value in named.items()} | {
        settings.PREFECT_API_REQUEST_TIMEOUT: _ANSWER_SECONDS,
        settings.PREFECT_CLIENT_MAX_RETRIES: _MOST_RETRIES,
    }
    try:
        with settings.temporary_settings(changed), get_client(sync_client=True) as client:
            yield client
    # ValueError: a proxy answers with a page that is no JSON.
    except (httpx.HTTPError, PrefectException, ValueError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and UNREACHED not in str(error):
            raise
        reason = f"the Prefect server does not do what it is asked ({printable(error) or type(error).__name__})"
        raise UsageError(os.environ.get("PREFECT_API_URL"), reason, "see its log, and whether it wants a key") from None


def drain() -> None:
    """Send the events and logs that Prefect has not sent yet."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    EventsWorker.drain_all(timeout=_ARRIVAL_SECONDS)
    APILogWorker.drain_all(timeout=_ARRIVAL_SECONDS)


def wait_for_task_runs(flow_run_id: str, expected: int) -> bool:
    """Wait until the server knows how each task run of a flow run ended; return False after 20 s."""
    import httpx
    from prefect.client.orchestration import get_client

    drain()
    query = {
        "flow_runs": {"id": {"any_": [flow_run_id]}},
        "task_runs": {"state": {"type": {"any_": ["COMPLETED", "FAILED", "CRASHED", "CANCELLED"]}}},
    }
    deadline = time.monotonic() + _ARRIVAL_SECONDS
    with get_client(sync_client=True) as client:  # this client sends the key
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError):
                if client.request("POST", "/task_runs/count", json=query).json() >= expected:
                    return True
            time.sleep(0.1)
    return False
