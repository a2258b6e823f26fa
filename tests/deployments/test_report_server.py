"""The report at an address: what browsers get of a workspace, and what they do not."""

from __future__ import annotations

import socket
from pathlib import Path

import httpx
import pytest

from deployments.report_server import report_server
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
        base = address.removesuffix("report.html")
        port = int(base.rstrip("/").rpartition(":")[2])
        for path in ("", "settings.json", "masks/", "pages/", "pages/../settings.json", "pages/%2e%2e/settings.json"):
            with socket.create_connection(("127.0.0.1", port)) as raw:  # clients mend such paths
                raw.sendall(f"GET /{path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
                with raw.makefile("rb") as answer:
                    assert b" 404 " in answer.readline(), path


def test_a_port_that_is_taken_is_told(workspace: Workspace) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        told = rf"^--port {port - 1}: the port beside it, {port}, where the report would be, cannot be had \(Address "
        with pytest.raises(UsageError, match=told), report_server(workspace, port):
            pass
