"""How a Prefect server is reached: proxies, keys, servers that do not answer."""

from __future__ import annotations

import os
import socket
import socketserver
import threading
from http.server import ThreadingHTTPServer

import httpx
import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

from deployments.serving import connection
from deployments.serving.connection import AGAIN, check_server, configure, connected
from desra_core.errors import TransientError, UsageError
from desra_core.workspace import Workspace
from flows.desra_flow import post_to_webhook
from tests.served import DEAD, HttpProxy

PROXIES = (f"http://{DEAD}", DEAD, f"https://{DEAD}", f"socks5://u:p@{DEAD}", f"socks5h://{DEAD}", f"socks://{DEAD}/",
           f"socks4://{DEAD}", f"socks4a://{DEAD}", "http://nowhere:port", "http://[::1", "direct://")  # fmt: skip


DIRECT = (None, "", "intern.example", "127.0.0.1", "*", "::1/128,[::1],fe80::/10", "localhost:port, 10.0.0.0/8")


GIVEN = [*((proxy, None) for proxy in PROXIES), *((PROXIES[0], direct) for direct in DIRECT[1:])]


@pytest.mark.parametrize(
    ("proxy", "direct", "spelt"),
    [
        *((*given, str.lower) for given in GIVEN),
        (*GIVEN[0], str.upper),
        *(pytest.param(*given, str.upper, marks=pytest.mark.slow) for given in GIVEN[1:]),
    ],
)
def test_no_proxy_is_asked_for_this_machine(
    proxy, direct, spelt, prefect_environment, environment, monkeypatch, tmp_path, capsys
) -> None:
    """Whatever stands in the environment, in small letters or in capitals; neither by us nor by Prefect's client."""
    url = prefect_environment["PREFECT_API_URL"]
    given = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), proxy) | (
        {} if direct is None else {"no_proxy": direct}
    )
    for name, value in given.items():
        monkeypatch.setenv(spelt(name), value)
    check_server(url)  # one that somebody has configured
    configure(Workspace(tmp_path), url, "desra:key")  # one of our own
    with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:
        assert client.api_healthcheck() is None
    assert httpx.get(f"{url.replace('127.0.0.1', 'localhost')}/health").status_code == 200
    told = capsys.readouterr().err
    usable = proxy in PROXIES[:6]
    assert told.count("is left out") == (0 if usable else 3)
    assert DEAD not in told  # there may be a password in it


def test_hosts_that_go_without_a_proxy_still_do(environment, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("NO_PROXY", " intern.example,::1/128, 10.0.0.7")
    for _ in range(2):  # as often as a server is started again
        configure(Workspace(tmp_path), "http://127.0.0.1:1/api", "desra:key")
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == "intern.example,10.0.0.7,127.0.0.1,localhost,::1"


def test_a_server_that_stays_away_in_the_second_start_leaves_work_to_do(environment, monkeypatch) -> None:
    """The command was right: it ends with 1, not as one of a wrong setting."""
    with pytest.raises(UsageError, match="no Prefect server answers"):
        check_server(f"http://{DEAD}/api")
    monkeypatch.setenv(AGAIN, "1")
    monkeypatch.setattr(connection, "_RETURN_SECONDS", 2)
    with pytest.raises(TransientError, match="no Prefect server answers"):
        check_server(f"http://{DEAD}/api")


def test_a_second_start_waits_for_a_server_that_is_away(environment, monkeypatch, capsys) -> None:
    """It may be restarting, and what is left to do needs it."""
    monkeypatch.setenv(AGAIN, "1")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with ThreadingHTTPServer(("127.0.0.1", port), HttpProxy, bind_and_activate=False) as back:
        back.asked = []

        def start() -> None:
            back.server_bind()
            back.server_activate()
            back.serve_forever()

        started = threading.Timer(1.5, start)
        started.start()
        check_server(f"http://127.0.0.1:{port}/api")
        back.shutdown()
        started.join()
    assert back.asked == ["/api/health"]
    assert capsys.readouterr().err == "waiting for the Prefect server to answer again, at most 5 minutes\n"


def test_no_proxy_at_all_stays_that(environment, tmp_path, monkeypatch) -> None:
    """Many tools know the star only where it stands alone."""
    monkeypatch.setenv("NO_PROXY", "*")
    configure(Workspace(tmp_path), "http://127.0.0.1:1/api", "desra:key")
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == "*"


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
def test_other_hosts_are_reached_by_their_proxy(scheme, handler, name, environment, monkeypatch) -> None:
    """A configured server, and the webhook."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as proxy:
        proxy.asked = []
        threading.Thread(target=proxy.serve_forever, args=[0.01], daemon=True).start()
        monkeypatch.setenv(name, f"{scheme}://127.0.0.1:{proxy.server_port}")
        check_server("http://prefect.example/api")
        assert post_to_webhook("http://hook.example/x", {"text": "hello"}) is None
        proxy.shutdown()
    assert proxy.asked == ["http://prefect.example/api/health", "http://hook.example/x"]


def test_a_silent_server_does_not_hold_up_a_command(monkeypatch) -> None:
    monkeypatch.setattr(connection, "_ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(connection, "_MOST_RETRIES", 0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/api"
        monkeypatch.setenv("PREFECT_API_URL", url)
        with (
            temporary_settings({PREFECT_API_URL: url}),
            pytest.raises(
                UsageError, match=rf"{url}: the Prefect server does not do what it is asked \(.+\); see its log"
            ),
            connected() as client,
        ):
            client.hello()


@pytest.mark.parametrize("address", ["http://me:secret@127.0.0.1:9/api", "https://me:s@cret@[::1]:9/api"])
def test_the_password_in_an_address_stays_unsaid(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", address)
    with pytest.raises(UsageError, match="no Prefect server answers") as silent:
        check_server(address)
    with pytest.raises(UsageError, match="does not do what it is asked") as asked, connected() as client:
        client.hello()
    for text in (str(silent.value), str(asked.value), *silent.value.failure, *asked.value.args):
        assert "cret" not in text
        assert "me:" not in text
    assert "127.0.0.1:9" in str(silent.value) or "[::1]:9" in str(silent.value)
