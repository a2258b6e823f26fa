"""A headless Chromium for tests of pages: what it showed, what it asked the network for, what it complained about."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import connect
from websockets.sync.connection import Connection

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_SECONDS = 30.0
_KEYS = {"Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
_FLAGS = (
    "--headless=new", "--remote-debugging-port=0", "--no-first-run", "--disable-gpu", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
)  # fmt: skip


class Page:
    """A page that has loaded.

    Attributes:
        requests: Addresses that the page asked for, other than itself and data it holds.
        complaints: Errors and warnings of scripts and of the browser.
    """

    def __init__(self, connection: Connection) -> None:
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._connection = connection
        self._number = 0
        self._session: str | None = None
        self._loaded = False

    def open(self, address: str) -> None:
        """Have a tab, go there and wait until everything has loaded."""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self._call(f"{domain}.enable")
        self.visit(address)

    def visit(self, address: str, *, width: int | None = None, height: int = 1000) -> None:
        """Go there, in a window of another size where one is given; nothing is told of pages before."""
        self.go("about:blank")
        if width:
            self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                       mobile=False)  # fmt: skip
        self.requests, self.complaints = [], []
        self.go(address)
        self.requests = [url for url in self.requests if url != address and not url.startswith("data:")]

    def go(self, address: str) -> None:
        """Go there in the same tab, and wait until what the page itself asks for has loaded."""
        self._loaded = False
        self._call("Page.navigate", url=address)
        while not self._loaded:
            self._receive()

    def text(self) -> str:
        """All that can be read."""
        return str(self.evaluate("document.body?.innerText ?? ''"))  # on its way elsewhere, a page has no body

    def wait_for(self, text: str) -> None:
        """Wait until something can be read: pages that are drawn by scripts have loaded long before."""
        deadline = time.monotonic() + _SECONDS
        while text not in self.text():
            assert time.monotonic() < deadline, f"no {text!r} in:\n{self.text()}"
            time.sleep(0.2)

    def click(self, text: str) -> None:
        """Click on the last thing that is labelled so."""
        boxes = f"""[...document.querySelectorAll('*')]
            .filter(e => !e.children.length && e.innerText?.trim() === {json.dumps(text)})
            .map(e => e.getBoundingClientRect()).filter(box => box.width)
            .map(box => [box.x + box.width / 2, box.y + box.height / 2])"""
        x, y = self.evaluate(boxes)[-1]
        for kind in ("mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def link(self, text: str) -> str:
        """Where a link of these words leads."""
        return str(
            self.evaluate(f"[...document.links].find(link => link.innerText.trim() === {json.dumps(text)}).href")
        )

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, which may be a promise."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """Press and release a key: a character, Enter, Escape or an arrow."""
        code = _KEYS.get(key) or ord(key.upper())
        for kind in ("rawKeyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def drag(self, *points: tuple[float, float]) -> None:
        """Press the left button of the mouse at the first point of the window, move along, and release it."""
        for index, (x, y) in enumerate(points):
            kind = "mouseMoved" if index else "mousePressed"
            self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)
        x, y = points[-1]
        self._call("Input.dispatchMouseEvent", type="mouseReleased", x=x, y=y, button="left", clickCount=1)

    def wheel(self, x: float, y: float, down: float) -> None:
        """Turn the wheel of the mouse at a point of the window."""
        self._call("Input.dispatchMouseEvent", type="mouseWheel", x=x, y=y, deltaX=0, deltaY=down)

    def wait_until(self, condition: str) -> None:
        """Wait until a JavaScript expression is true."""
        deadline = time.monotonic() + _SECONDS
        while not self.evaluate(condition):
            assert time.monotonic() < deadline, f"{condition} stays false:\n{self.text()}"
            time.sleep(0.02)

    def cut_off(self, offline: bool) -> None:
        """Take the network away, or give it back."""
        self._call("Network.emulateNetworkConditions", offline=offline, latency=0, downloadThroughput=-1,
                   uploadThroughput=-1)  # fmt: skip

    def screenshot(self) -> bytes:
        """What is in view, as PNG."""
        return base64.b64decode(self._call("Page.captureScreenshot")["data"])

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        self._connection.send(json.dumps(message | ({"sessionId": self._session} if self._session else {})))
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return dict(answer["result"])

    def _receive(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self._connection.recv(timeout=_SECONDS))
        method, parameters = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(parameters["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
            self.complaints.append(json.dumps(parameters["args"]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.complaints.append(parameters["entry"]["text"])
        elif method == "Page.loadEventFired":
            self._loaded = True
        return message


@contextlib.contextmanager
def opened(address: str, profile: Path, *, width: int = 1400, height: int = 1000) -> Iterator[Page]:
    """Open an address in a browser of its own; skips the test where there is none.

    Args:
        address: Such as ``path.as_uri()``.
        profile: An empty folder for the browser's files.
        width, height: Of the window, in pixels.
    """
    binary = next(filter(None, map(shutil.which, _NAMES)), None)
    if binary is None:
        pytest.skip("no Chromium here: make browser installs one")
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # root cannot have one
    command = [binary, *_FLAGS, *sandbox, f"--user-data-dir={profile}", f"--window-size={width},{height}"]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as browser:
        try:
            debugger = _debugger(profile, browser)
            # No pings: while a test does something else, nobody reads what answers them.
            with connect(debugger, max_size=None, open_timeout=_SECONDS, ping_interval=None) as connection:
                page = Page(connection)
                page.open(address)
                yield page
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(browser.pid, signal.SIGKILL)


def _debugger(profile: Path, browser: subprocess.Popen[bytes]) -> str:
    """Wait for the file in which the browser says where it listens."""
    file = profile / "DevToolsActivePort"
    until = time.monotonic() + _SECONDS
    while time.monotonic() < until and browser.poll() is None:
        if file.exists() and len(lines := file.read_text().split("\n")) >= 2:
            return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
        time.sleep(0.05)
    raise AssertionError(f"Chromium did not start (exit code {browser.poll()})")
