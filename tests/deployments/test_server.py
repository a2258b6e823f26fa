"""The Prefect server of a run: proxies, starts that fail, a server that ends before its run."""

from __future__ import annotations

import os
import socketserver
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

from deployments.server import check_server, configure
from desra_core.workspace import Workspace
from flows.alarm import tell_webhook

DEAD = "127.0.0.1:9"
PROXIES = (f"http://{DEAD}", DEAD, f"https://{DEAD}", f"socks5://u:p@{DEAD}", f"socks5h://{DEAD}", f"socks://{DEAD}/",
           f"socks4://{DEAD}", f"socks4a://{DEAD}", "http://nowhere:port", "http://[::1", "direct://")  # fmt: skip
DIRECT = (None, "", "intern.example", "127.0.0.1", "*", "::1/128,[::1],fe80::/10", "localhost:port, 10.0.0.0/8")
NAMES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture
def environment() -> Iterator[None]:
    """No proxies; and what a server sets in this process goes when the test ends."""
    before = dict(os.environ)
    for name in [name for name in os.environ if name.lower() in NAMES]:
        del os.environ[name]
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize(
    ("proxy", "direct"), [*((proxy, None) for proxy in PROXIES), *((PROXIES[0], direct) for direct in DIRECT[1:])]
)
def test_no_proxy_is_asked_for_this_machine(proxy, direct, prefect_environment, environment, tmp_path, capsys) -> None:
    """Whatever stands in the environment, in small letters or in capitals; neither by us nor by Prefect's client."""
    url = prefect_environment["PREFECT_API_URL"]
    given = {name: proxy for name in NAMES[:3]} | ({} if direct is None else {"no_proxy": direct})
    for spelt in (str.lower, str.upper):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in given.items():
                patch.setenv(spelt(name), value)
            check_server(url)  # one that somebody has configured
            configure(Workspace(tmp_path), url)  # one of our own
            with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:
                assert client.api_healthcheck() is None
            assert httpx.get(f"{url.replace('127.0.0.1', 'localhost')}/health").status_code == 200
    told = capsys.readouterr().err
    usable = proxy in PROXIES[:6]
    assert told.count("is left out") == (0 if usable else 6)
    assert DEAD not in told  # there may be a password in it


def test_hosts_that_go_without_a_proxy_still_do(environment, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("NO_PROXY", " intern.example,::1/128, 10.0.0.7")
    for _ in range(2):  # as often as a server is started again
        configure(Workspace(tmp_path), "http://127.0.0.1:1/api")
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == "intern.example,10.0.0.7,127.0.0.1,localhost,::1"


class HttpProxy(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def log_message(self, *_: object) -> None:
        pass


class SocksProxy(socketserver.StreamRequestHandler):
    """As much of SOCKS5 as one request needs; answers in place of whom it is asked for."""

    def handle(self) -> None:
        self.rfile.read(2 + self.rfile.peek()[1])
        self.wfile.write(b"\x05\x00")
        self.rfile.read(4)
        host = self.rfile.read(self.rfile.read(1)[0]).decode()
        self.rfile.read(2)
        self.wfile.write(b"\x05\x00\x00\x01" + bytes(6))
        self.server.asked.append(f"http://{host}{self.rfile.readline().split()[1].decode()}")
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
@pytest.mark.parametrize(("scheme", "handler"), [("http", HttpProxy), ("socks5", SocksProxy), ("socks", SocksProxy)])
def test_what_is_elsewhere_is_asked_for_by_its_proxy(scheme, handler, name, environment, monkeypatch) -> None:
    """A server that somebody has configured, and the webhook."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as proxy:
        proxy.asked = []
        threading.Thread(target=proxy.serve_forever, args=[0.01], daemon=True).start()
        monkeypatch.setenv(name, f"{scheme}://127.0.0.1:{proxy.server_port}")
        check_server("http://prefect.example/api")
        assert tell_webhook("http://hook.example/x", {"text": "hello"}) is None
        proxy.shutdown()
    assert proxy.asked == ["http://prefect.example/api/health", "http://hook.example/x"]
