"""Prefect's own server, open only to holders of its key, and a page by which a browser gets that key.

`deployments.serving.server` has uvicorn start it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastapi import FastAPI

# A request for another host comes by a name that an attacker has led to this machine.
HOSTS = ["127.0.0.1", "localhost"]
ENTRANCE = "/enter"

# Prefect's UI looks there for the key. What is behind the # of an address is never sent.
_PAGE = """<!doctype html><title>desra</title>
<form><label>Key, from the file that desra named: <input type="password"></label> <button>Enter</button></form>
<script>
function enter(key) {
  if (key) { localStorage.setItem("prefect-password", btoa(key)); location.replace("/"); }
}
document.querySelector("form").onsubmit = event => {
  event.preventDefault();
  enter(document.querySelector("input").value.trim());
};
(onhashchange = () => enter(location.hash.slice(1)))();
</script>"""


def create_app() -> FastAPI:
    """Make Prefect's application, as its settings in the environment say."""
    from prefect.server.api.server import create_app as create_prefect
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import HTMLResponse
    from starlette.routing import Route

    def enter(_: Request) -> HTMLResponse:
        return HTMLResponse(_PAGE, headers={"Cache-Control": "no-store", "Referrer-Policy": "no-referrer"})

    app = create_prefect(final=True)
    app.router.routes.insert(0, Route(ENTRANCE, enter))  # before the UI, which answers all that is left
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=HOSTS)
    return app
