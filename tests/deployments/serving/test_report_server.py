"""The report at an address: what browsers get of a workspace, and what they do not."""

from __future__ import annotations

import socket
from pathlib import Path

import httpx
import pytest

from deployments.serving.report_server import report_server
from desra_core.errors import UsageError
from desra_core.workspace import Workspace


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


def test_it_is_for_who_can_read_the_address_in_the_workspace(workspace: Workspace) -> None:
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
