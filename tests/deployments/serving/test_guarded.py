"""Who may talk to the Prefect server of a workspace, and how a browser gets in."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import httpx
import psutil
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from deployments.serving.connection import watch_at
from deployments.serving.guarded import report_server
from deployments.serving.processes import Served, serving_alone
from deployments.serving.server import HISTORY, Server, prefect_server
from desra_core.errors import UsageError
from desra_core.files import write_secret
from desra_core.workspace import Workspace
from tests.browser import opened
from tests.conftest import STALE_KEY, keyed


class Guarded(NamedTuple):
    workspace: Workspace
    url: str
    key: str
    keyed: str


@pytest.fixture
def guarded(prefect_environment: dict[str, str]) -> Guarded:
    workspace = Workspace(Path(prefect_environment["PREFECT_HOME"]).parent)
    url, key = prefect_environment["PREFECT_API_URL"], (workspace.prefect_home / "key").read_text()
    return Guarded(workspace, url, key, keyed(prefect_environment))


def test_the_key_is_new_and_for_its_owner_alone(guarded: Guarded) -> None:
    assert (guarded.workspace.prefect_home / "key").stat().st_mode & 0o777 == 0o600
    assert len(guarded.key) > 40
    assert guarded.key != STALE_KEY
    told = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    assert any("deployments.serving.guarded" in line for line in told)
    assert not any(guarded.key.partition(":")[2] in line for line in told)


@pytest.mark.parametrize("key", [None, STALE_KEY, "of:another server"])
def test_requests_without_the_key_are_refused(guarded: Guarded, key: str | None) -> None:
    auth = httpx.BasicAuth(*key.split(":")) if key else None
    for method, path in (("POST", "flow_runs/filter"), ("POST", "flows/"), ("GET", "admin/version"), ("GET", "docs")):
        answer = httpx.request(method, f"{guarded.url}/{path}", auth=auth, json={"name": "f"})
        assert answer.status_code == 401, path
    assert httpx.post(f"{guarded.keyed}/flows/filter", json={}).status_code == 200


def test_live_updates_need_the_key(guarded: Guarded) -> None:
    def is_let_in(path: str, key: str | None) -> bool:
        try:
            with connect(f"{guarded.url.replace('http', 'ws')}/{path}", subprotocols=key and ["prefect"]) as socket:
                socket.send(json.dumps({"type": "auth", "token": key}))
                return json.loads(socket.recv(timeout=30))["type"] == "auth_success"
        except (ConnectionClosed, InvalidStatus):
            return False

    for path in ("events/out", "events/in", "logs/out"):
        assert not is_let_in(path, None)
        assert not is_let_in(path, STALE_KEY)
        assert is_let_in(path, guarded.key)


def test_pages_of_others_are_kept_out(guarded: Guarded) -> None:
    """A name that an attacker leads to 127.0.0.1 is another host; any other page is another origin."""
    port = guarded.url.removesuffix("/api").rpartition(":")[2]
    for path in ("/api/flows/filter", "/api/health", "/", "/ui-settings", "/enter"):
        method = "POST" if "filter" in path else "GET"
        for host, expected in ((f"rebound.example:{port}", 400), (f"127.0.0.1:{port}", 200), ("localhost", 200)):
            answer = httpx.request(
                method,
                guarded.keyed.removesuffix("/api") + path,
                headers={"Host": host},
                json={},
                follow_redirects=True,
            )
            assert answer.status_code == expected, (path, host)
    ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    origins = {"http://evil.example": 400, "null": 400, f"http://127.0.0.1:{int(port) - 1}": 400}
    for origin, expected in (origins | {f"http://{host}:{port}": 200 for host in ("127.0.0.1", "localhost")}).items():
        answer = httpx.options(f"{guarded.url}/flows/filter", headers=ask | {"Origin": origin})
        assert answer.status_code == expected, origin
        assert (answer.headers.get("access-control-allow-origin") == origin) == (expected == 200)


@pytest.fixture
def on_a_terminal(guarded: Guarded, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where to watch, as a person at a terminal reads it."""
    leader, terminal = os.openpty()
    with os.fdopen(leader), os.fdopen(terminal, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        monkeypatch.setenv("PREFECT_API_AUTH_STRING", guarded.key)
        told = watch_at(guarded.workspace, guarded.url)
        monkeypatch.undo()
        yield told


def test_only_a_terminal_shows_the_key(guarded: Guarded, on_a_terminal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that stderr goes to may be read by others."""
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", guarded.key)
    entrance = guarded.url.removesuffix("/api") + "/enter"
    assert on_a_terminal == f"{entrance}#{guarded.key}"
    assert watch_at(guarded.workspace, guarded.url) == f"{entrance} (key in {guarded.workspace.prefect_home / 'key'})"


def test_a_browser_gets_in_by_the_page_that_is_printed(guarded: Guarded, on_a_terminal: str, tmp_path: Path) -> None:
    with opened(on_a_terminal, tmp_path / "browser") as page:
        page.wait_for("Dashboard")
        assert not any(guarded.key.partition(":")[2] in request for request in page.requests)


@pytest.mark.slow
def test_a_browser_gets_in_by_the_key_and_stays_in(guarded: Guarded, on_a_terminal: str, tmp_path: Path) -> None:
    httpx.post(f"{guarded.keyed}/flows/", json={"name": "0-flow"}).raise_for_status()
    ui = guarded.url.removesuffix("/api")
    with opened(f"{ui}/flows", tmp_path / "browser") as page:
        page.wait_for("Login")
        page.go(f"{ui}/enter")
        page.wait_for("Key, from the file that desra named:")
        for press in (
            f"document.querySelector('input').value = '{guarded.key}\\n'",
            "document.forms[0].requestSubmit()",
        ):
            page.evaluate(press)
        page.wait_for("Dashboard")
        page.evaluate("localStorage.clear()")
        page.go(on_a_terminal)
        page.wait_for("Dashboard")
        for flows in (f"{ui}/flows", f"{ui}/v2/flows"):
            page.go(flows)
            page.wait_for("0-flow")  # first of all names
        assert not any(guarded.key.partition(":")[2] in request for request in page.requests)


def test_a_key_of_another_user_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = Workspace(tmp_path / "ws")
    workspace.create()
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    (workspace.prefect_home / "key").mkdir(parents=True)  # root may read any file
    with serving_alone(workspace) as own, workspace.locked():
        own.announce(Served("http://127.0.0.1:9/api", own=True), timedelta(days=1))
        told = r"prefect/key: the key of the Prefect server cannot be read \(.+\); run as the one who has started desra"
        with pytest.raises(UsageError, match=told), prefect_server(workspace):
            pass


@pytest.mark.parametrize("own", [True, False])
def test_a_served_workspace_tells_its_server_for_the_length_of_a_run(
    own: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that starts anew looks again; another server never gets a key of ours."""
    workspace = Workspace(tmp_path / "ws")
    workspace.create()
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "of:another server")
    write_secret(workspace.prefect_home / "key", STALE_KEY)
    served = Served("http://prefect.example/api", own)
    with serving_alone(workspace) as standing_, workspace.locked():
        standing_.announce(served, timedelta(days=1))
        with prefect_server(workspace) as url:
            assert url == os.environ["PREFECT_API_URL"] == served.url
            assert os.environ["PREFECT_API_AUTH_STRING"] == (STALE_KEY if own else "of:another server")
    assert "PREFECT_API_URL" not in os.environ
    assert os.environ.get("PREFECT_API_AUTH_STRING") == (None if own else "of:another server")


def test_a_server_of_ones_own_is_watched_without_our_key(guarded: Guarded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "of:another server")
    assert watch_at(guarded.workspace, "https://prefect.example/api") == "https://prefect.example"


def test_the_key_goes_with_its_server(tmp_path: Path) -> None:
    servers = [Server(Workspace(tmp_path), history=HISTORY) for _ in range(2)]
    assert servers[0]._key != servers[1]._key
    key = tmp_path / "prefect" / "key"
    write_secret(key, servers[0]._key)
    servers[0].stop()
    assert not key.exists()


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    workspace = Workspace(tmp_path / "ws")
    workspace.create()
    return workspace


def test_the_report_and_its_pages_as_they_are_now(workspace: Workspace) -> None:
    with report_server(workspace, 0) as address:
        early = httpx.get(address)
        assert (early.status_code, early.text) == (404, "There is no report yet: the first run writes it.")
        for text in ("<p>größer", "<p>new"):
            workspace.report.write_text(text, "utf-8")
            answer = httpx.get(address)
            assert (answer.text, answer.headers["Cache-Control"]) == (text, "no-cache")
        page = workspace.root / "pages" / "set 0" / "a#1.html"
        page.parent.mkdir(parents=True)
        page.write_text("one image", "utf-8")
        assert httpx.get(address.replace("report.html", "pages/set%200/a%231.html")).text == "one image"
    with pytest.raises(httpx.ConnectError):
        httpx.get(address)


def test_nothing_else_is_shown(workspace: Workspace) -> None:
    workspace.report.write_text("report", "utf-8")
    workspace.settings.write_text("{}", "utf-8")
    (workspace.root / "pages").mkdir()
    with report_server(workspace, 0) as address:
        port, _, secret = address.removesuffix("/report.html").rpartition(":")[2].partition("/")
        inside = ("", "settings.json", "masks/", "pages/", "pages/../settings.json", "pages/%2e%2e/settings.json")
        for path in (
            *(f"{secret}/{path}" for path in inside),
            "",
            "report.html",
            "pages/",
            f"{secret[:-1]}/report.html",
        ):
            assert asked(int(port), path) == 404, path


def asked(port: int, path: str, host: str = "localhost") -> int:
    """The status of an answer to just this path, which clients would mend."""
    with socket.create_connection(("127.0.0.1", port)) as raw:
        raw.sendall(f"GET /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        with raw.makefile("rb") as answer:
            return int(answer.readline().split()[1])


def test_the_report_is_at_a_secret_address(workspace: Workspace) -> None:
    """Others have accounts on this machine, or lead a browser here by a name of their own."""
    workspace.report.write_text("report", "utf-8")
    addresses = []
    for _ in range(2):
        with report_server(workspace, 0) as address:
            port, _, path = address.rpartition(":")[2].partition("/")
            assert asked(int(port), path) == asked(int(port), path, f"127.0.0.1:{port}") == 200
            assert asked(int(port), path, f"rebound.example:{port}") == 400
            addresses.append(path)
    [secret] = [path for path in workspace.prefect_home.iterdir() if path.read_text() in address]
    assert secret.stat().st_mode & 0o777 == 0o600
    assert addresses[0] == addresses[1]  # links of older runs lead there still


def test_a_port_that_is_taken_is_told(workspace: Workspace) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        told = rf"^--port {port - 1}: the port beside it, {port}, where the report would be, cannot be had \(Address "
        with pytest.raises(UsageError, match=told), report_server(workspace, port):
            pass
