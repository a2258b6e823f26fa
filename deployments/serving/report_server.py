"""Serve the report of a workspace at an address, because a page of the Prefect UI may not open files."""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from deployments.serving.guarded import HOSTS
from desra_core.errors import UsageError
from desra_core.files.atomic import write_secret
from desra_core.report.image_page import FOLDER
from desra_core.workspace import Workspace

if TYPE_CHECKING:
    from starlette.applications import Starlette

_END_SECONDS = 2


@contextlib.contextmanager
def report_server(workspace: Workspace, port: int) -> Iterator[str]:
    """Serve the report and its pages about single images, and nothing else of the workspace; yields the address.

    Other users of this machine cannot guess the address. It stays the same, for links of older runs. Port 0 is any free
    one.

    Raises:
        UsageError: Another process listens on the port.
    """
    import uvicorn

    secret = _secret(workspace)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that has just ended may linger
        try:
            listener.bind(("127.0.0.1", port))
            listener.listen()  # who asks before the thread is there waits
        except OSError as error:
            reason = f"the port beside it, {port}, where the report would be, cannot be had ({error.strerror})"
            raise UsageError(f"--port {port - 1}", reason, "give another one") from None
        pages = _pages(workspace, secret)
        server = uvicorn.Server(
            uvicorn.Config(pages, log_config=None, lifespan="off", timeout_graceful_shutdown=_END_SECONDS)
        )
        thread = threading.Thread(target=server.run, args=([listener],), name="report", daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/{secret}/{workspace.report.name}"
        finally:
            server.should_exit = True
            thread.join(2 * _END_SECONDS)  # a browser may not have got all of a page by then


def _secret(workspace: Workspace) -> str:
    """The part of the address that cannot be guessed."""
    path = workspace.prefect_home / "report"
    with contextlib.suppress(OSError):
        if secret := path.read_text():
            return secret
    write_secret(path, secret := secrets.token_urlsafe(32))
    return secret


def _pages(workspace: Workspace, secret: str) -> Starlette:
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import FileResponse, PlainTextResponse, Response
    from starlette.routing import Mount, Route
    from starlette.staticfiles import StaticFiles

    # Each run writes both anew: browsers are to ask.
    headers = {"Cache-Control": "no-cache"}

    def report(_: Request) -> Response:
        if workspace.report.is_file():
            return FileResponse(workspace.report, headers=headers)
        return PlainTextResponse("There is no report yet: the first run writes it.", 404)

    class Pages(StaticFiles):
        def file_response(self, *arguments: Any, **named: Any) -> Response:
            response = super().file_response(*arguments, **named)
            response.headers.update(headers)
            return response

    pages = Pages(directory=workspace.root / FOLDER, check_dir=False)
    routes = [Route(f"/{workspace.report.name}", report), Mount(f"/{FOLDER}", pages)]
    guard = Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS)
    return Starlette(routes=[Mount(f"/{secret}", routes=routes)], middleware=[guard])
