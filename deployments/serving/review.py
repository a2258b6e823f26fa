"""The page of `desra review`: what it shows, and where its answers go. Its script and style lie beside this module."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route

from deployments.serving.connection import HOSTS
from deployments.serving.guarded import serving
from desra_core.annotations.export import MaskedImage
from desra_core.annotations.review import Key, Place, Review, StaleError
from desra_core.detection.class_weights import class_name
from desra_core.errors import DesraError, TransientError, UsageError, printable
from desra_core.report.pictures import StoredImage
from desra_core.report.tiles import Tile, TiledPictures, mask_tile, outline_tile
from desra_core.settings import detector_of
from desra_core.workspace.answers import Stroke

_FILES = {"": ("review.html", "text/html"), "review.js": ("review.js", "text/javascript"),
          "review.css": ("review.css", "text/css")}  # fmt: skip
_HEADERS = [
    ("Content-Security-Policy", "default-src 'none'; img-src data:; script-src 'self'; style-src 'self'; "
     "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"),
    ("Referrer-Policy", "no-referrer"),
    ("X-Content-Type-Options", "nosniff"),
]  # fmt: skip
_PICTURES = ("lr", "mse_sr", "gan_sr", "heat")
_RETRY_SECONDS = 2.0
_MOST_BYTES = 2_000_000  # of what the page sends at once
_CODES = {StaleError: 409, TransientError: 507, UsageError: 400}


@contextlib.contextmanager
def review_server(review: Review, port: int, seconds: float | None) -> Iterator[str]:
    """Serve the page of a review on this machine, and import masks in the background, while the block lasts.

    Args:
        review: The review.
        port: The port to listen on; 0 for any free one.
        seconds: For how long a region is shown before its rating is asked for; None where regions are not rated.

    Yields:
        The address of the page. Others on this machine cannot guess it.

    Raises:
        UsageError: Another process listens on the port.
    """
    try:
        listener = socket.create_server(("127.0.0.1", port))
    except OSError as error:
        raise UsageError(
            f"--port {port}", f"cannot be had ({os.strerror(error.errno or 0)})", "give another one"
        ) from None
    token = secrets.token_urlsafe(32)
    importing = _Importing(review)
    with serving(review_app(review, token, seconds, importing.wake.set), listener, _HEADERS), importing.running():
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/{token}/"


class _Importing:
    """A thread that imports the masks of a review, soon after answers have come."""

    def __init__(self, review: Review) -> None:
        self._review = review
        self._ended = threading.Event()
        self.wake = threading.Event()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        thread = threading.Thread(target=self._run, name="import", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            self.wake.set()
            thread.join()

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                waiting = self._review.bring().waiting
            except DesraError:  # the page says why, which asks for the same
                waiting = 1
            self.wake.wait(_RETRY_SECONDS if waiting else None)
            self.wake.clear()


def review_app(review: Review, token: str, seconds: float | None, on_answer: Callable[[], object]) -> Starlette:
    """Make the application of a review; whoever does not know the token gets nothing but a 403.

    ``on_answer`` is called after each answer.
    """
    page = _Page(review, seconds, on_answer)
    routes = [
        *(Route(f"/{path}", _file(*file)) for path, file in _FILES.items()),
        Route("/state", page.state),
        Route("/{action:str}", page.act, methods=["POST"]),
        Route("/tiles/{image:str}/{kind:str}/{level:int}/{column:int}/{row:int}", page.tile),
    ]

    def refuse(_: Request) -> Response:
        return PlainTextResponse("This address lacks its key: take the one that desra review has printed.", 403)

    everything = Route("/{path:path}", refuse, methods=["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
    guard = Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS)
    mounted = [Mount(f"/{token}", routes=[*routes, everything]), everything]
    return Starlette(routes=mounted, middleware=[guard], exception_handlers={DesraError: page.refused})


def _file(name: str, kind: str) -> Callable[[Request], Response]:
    def respond(_: Request) -> Response:
        content = Path(__file__).with_name(name).read_bytes()
        return Response(content, media_type=kind, headers={"Cache-Control": "no-store"})

    return respond


class _Page:
    """What the page asks for."""

    def __init__(self, review: Review, seconds: float | None, on_answer: Callable[[], object]) -> None:
        self._review, self._seconds, self._on_answer = review, seconds, on_answer
        self._pictures = TiledPictures()
        self._measure = detector_of(review.settings)

    def state(self, _: Request) -> Response:
        """Say what is asked, and how far the masks are imported and the raters agree."""
        # Not in response to each answer, since this looks at all regions and masks.
        agreed, imported = self._review.agreement(), self._review.imported()
        about = {"agreement": agreed._asdict(),
                 "imported": imported._asdict() | {"failed": sorted(self._review.failed.values())}}  # fmt: skip
        return JSONResponse(self._state() | about)

    async def act(self, request: Request) -> Response:
        """Write an answer or a stroke, undo, or go on; the response says what is next."""
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > _MOST_BYTES:
                return _refused(UsageError("request", "is too large", "draw shorter strokes"), 413)
        return await run_in_threadpool(self._act, request.path_params["action"], body)

    def _act(self, action: str, body: bytes) -> Response:
        with _reading():
            said = self._carry_out(action, json.loads(body))
        self._on_answer()
        return JSONResponse(self._state() | said)

    def refused(self, _: Request, error: Exception) -> Response:
        """Say in a line why a request was refused; a page that is behind also gets what is next."""
        assert isinstance(error, DesraError)
        now = None
        if isinstance(error, StaleError):
            try:
                now = self._state()
            except DesraError as other:
                error = other
        return _refused(error, next((code for kind, code in _CODES.items() if isinstance(error, kind)), 404), now)

    def _carry_out(self, action: str, given: dict[str, Any]) -> dict[str, Any]:
        review, state = self._review, int(given["state"])
        if action == "undo":
            undone = review.undo(state)
            return {"said": f"undone: {undone.answer}, {undone.name}" if undone else "there is nothing to undo"}
        key = _key(given["key"])
        if action == "answer":
            review.answer(key, str(given["answer"]), state)
        elif action == "stroke":
            points = tuple((int(x), int(y)) for x, y in given["points"])
            review.draw(key, Stroke(points, int(given["radius"]), bool(given["erase"])), state)
        elif action == "next":
            review.skip(key)
        else:
            raise ValueError(action)
        return {}

    def _state(self) -> dict[str, Any]:
        """Say what is asked, and how far the rater is."""
        review = self._review
        shown, following = review.current(), review.following()
        return {
            "state": review.state(),
            "answers": review.answers_key(),
            "rater": review.rater,
            "workspace": str(review.workspace.root),
            "seconds": self._seconds,
            "place": self._described(shown) if shown else None,
            "following": self._described(following) if following else None,
            "counts": review.counts(),
        }

    def _described(self, place: Place) -> dict[str, Any]:
        image, region = place.image, place.region
        about = {"id": image.id, "name": printable(image.name), "height": image.shape[0], "width": image.shape[1]}
        stored = self._stored(image)
        about["lacks"] = {kind: str(lacking) for kind in ("lr", "heat") if (lacking := stored.lacks(kind))}
        if self._seconds is not None or region is None:  # numbers would tell what the detector thinks
            return about | {"box": place.key[1]}
        numbers = {name: region[name] for name in ("area", "severity", "mean_similarity")}
        return about | {"box": place.key[1], "class": class_name(region["dominant_class"])} | numbers

    def tile(self, request: Request) -> Response:
        """Draw a tile; pictures never change while a page is open, masks change with the query of their address."""
        given = request.path_params
        image = self._review.find_image(given["image"])
        tile = Tile(given["level"], given["column"], given["row"])
        if given["kind"] in _PICTURES:
            data = self._pictures.tile(self._stored(image), given["kind"], tile)
        else:
            data = self._mask_tile(image, given["kind"], tile, request.query_params.get("box", ""))
        return Response(data, media_type="image/png", headers={"Cache-Control": "private, max-age=3600"})

    def _mask_tile(self, image: MaskedImage, kind: str, tile: Tile, box: str) -> bytes:
        draw = {"mask": mask_tile, "outline": outline_tile}.get(kind)
        if draw is None:
            raise UsageError("tile", f"of the kind {kind!r} does not exist", "load the page again")
        window = tile.window(image.shape)
        with _reading():
            key = image.id, _box(json.loads(box or "null"))
        place = self._review.place(key)
        region, detected = self._review.region_masks(place, window)
        return draw(tile, self._review.mask(image)[window.slices], region, detected)

    def _stored(self, image: MaskedImage) -> StoredImage:
        return StoredImage(image.files, self._review.workspace.group(image.id), image.shape, self._measure)


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """Turn what is no request of the page into an error of one line."""
    try:
        yield
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise UsageError("request", "is not one of this page", "load the page again") from None


def _refused(error: DesraError, code: int, state: dict[str, Any] | None = None) -> Response:
    return JSONResponse({"error": printable(error)} | ({"now": state} if state else {}), code)


def _key(given: Any) -> Key:
    image_id, box = given
    return str(image_id), _box(box)


def _box(given: Any) -> tuple[int, int, int, int] | None:
    if given is None:
        return None
    x, y, width, height = map(int, given)
    return x, y, width, height
