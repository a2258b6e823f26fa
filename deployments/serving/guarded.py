"""Serve web pages to the owner alone: Prefect's UI behind a key, and the report at a secret address.

`deployments.serving.server` starts uvicorn with `create_app`, which makes Prefect's server.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from deployments.serving.connection import ENTRANCE, HOSTS, RUN
from deployments.serving.metrics import metrics_text
from desra_core.errors import UsageError
from desra_core.files import write_secret
from desra_core.workspace import Workspace

if TYPE_CHECKING:
    from fastapi import FastAPI

_END_SECONDS = 2
_LOOK_SECONDS = 1.0

_PAGE = Path(__file__).with_name("enter.html")


def create_app() -> FastAPI:
    """Make Prefect's application from the settings in the environment, with a page where a browser stores the key."""
    from prefect.server.api.server import create_app as create_prefect

    def enter(_: Request) -> HTMLResponse:
        return HTMLResponse(_PAGE.read_text(), headers={"Cache-Control": "no-store", "Referrer-Policy": "no-referrer"})

    if run := os.environ.get(RUN):
        threading.Thread(target=_end_with, args=[int(run)], name="parent", daemon=True).start()
    app = create_prefect(final=True)
    app.router.routes.insert(0, Route(ENTRANCE, enter))  # before the UI, which answers every other path
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=HOSTS)
    return app


def _end_with(run: int) -> None:
    """End this process once the run that has started it is gone.

    The next run may be on another host, which shares the database but cannot end a process here.
    """
    while os.getppid() == run:
        time.sleep(_LOOK_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)  # a server that ends as asked waits for its clients; SQLite bears a kill


def report_secret(workspace: Workspace) -> Path:
    """Return the file with the secret of a workspace's report and metrics, which only its owner can read."""
    return workspace.prefect_home / "report"


@contextlib.contextmanager
def report_server(workspace: Workspace, port: int, queue: Callable[[], Mapping[str, int]] = dict) -> Iterator[str]:
    """Serve the report, its pages about single images, and metrics, and nothing else of the workspace.

    Yield the address of the report; that of the metrics is ``/metrics``, with the secret of the report's address as
    bearer token.

    Other users of this machine cannot guess the address. It stays the same, so that links in older runs work.

    Args:
        workspace: The workspace.
        port: The port to listen on; 0 for any free port.
        queue: Returns the number of runs by state, at once.

    Raises:
        UsageError: Another process listens on the port.
    """
    path = report_secret(workspace)
    secret = ""
    with contextlib.suppress(OSError):
        secret = path.read_text()
    if not secret:
        write_secret(path, secret := secrets.token_urlsafe(32))
    try:
        listener = socket.create_server(("127.0.0.1", port))
    except OSError as error:
        cause = os.strerror(error.errno or 0)
        reason = f"the port beside it, {port}, where the report would be, cannot be had ({cause})"
        raise UsageError(f"--port {port - 1}", reason, "give another one") from None
    # Each run writes the report and its pages anew, so browsers must ask whether their copies are current.
    with serving(_pages(workspace, secret, queue), listener, [("Cache-Control", "no-cache")]):
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/{secret}/{workspace.report.name}"


@contextlib.contextmanager
def serving(app: Starlette, listener: socket.socket, headers: list[tuple[str, str]]) -> Iterator[None]:
    """Serve an application in a thread for as long as the block lasts, then close the socket.

    Args:
        app: The application.
        listener: The socket on which it listens: early requests wait for the thread.
        headers: Of every answer.
    """
    with listener:
        config = uvicorn.Config(
            app, log_config=None, lifespan="off", timeout_graceful_shutdown=_END_SECONDS, headers=headers
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],), name="pages", daemon=True)
        thread.start()
        try:
            yield
        finally:
            server.should_exit = True
            thread.join(2 * _END_SECONDS)  # a browser may still be loading a page


def _pages(workspace: Workspace, secret: str, queue: Callable[[], Mapping[str, int]]) -> Starlette:
    from desra_core.report.workspace_page import FOLDER

    def report(_: Request) -> Response:
        if workspace.report.is_file():
            return FileResponse(workspace.report)
        return PlainTextResponse("There is no report yet: the first run writes it.", 404)

    def metrics(request: Request) -> Response:
        given = request.headers.get("Authorization", "")
        if not secrets.compare_digest(given.encode(), f"Bearer {secret}".encode()):
            return PlainTextResponse("The bearer token is missing or wrong.", 401, {"WWW-Authenticate": "Bearer"})
        return Response(metrics_text(workspace, queue()), headers={"Content-Type": CONTENT_TYPE_LATEST})

    pages = StaticFiles(directory=workspace.root / FOLDER, check_dir=False)
    routes = [Route(f"/{workspace.report.name}", report), Mount(f"/{FOLDER}", pages)]
    guard = Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS)
    return Starlette(routes=[Mount(f"/{secret}", routes=routes), Route("/metrics", metrics)], middleware=[guard])
