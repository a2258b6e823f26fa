"""Fixtures of the tests of commands: a running `desra serve`, a small disk."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.served import Served, marked, until


@pytest.fixture
def serve(make_models, tmp_path) -> Iterator[Callable[..., Served]]:
    """Start `desra serve`, of TMP/photos into TMP/ws, and wait until it is up."""
    mse, gan = make_models(tmp_path / "models")
    started: list[Served] = []

    def start(**given: object) -> Served:
        settings = {"photos": tmp_path / "photos", "workspace": tmp_path / "ws", "mse-model": mse, "gan-model": gan,
                    "mine-at": "never", "cycle-at": "never", "finetune-after": 0, "port": 0, "workers": 1}  # fmt: skip
        lines = [
            f"{key} = {value if isinstance(value, int) else json.dumps(str(value))}"
            for key, value in (settings | given).items()
        ]
        config = tmp_path / "serve.toml"
        config.write_text("\n".join(lines))
        started.append(Served(tmp_path, config))
        until(started[-1].is_up)
        return started[-1]

    yield start
    for served in started:
        if served.process.poll() is None:
            served.stop()
        for left in marked(served.token):
            left.kill()


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A real disk of 700 KB; it can be made larger."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield disk
    subprocess.run(["umount", disk], check=True)


PROXY_NAMES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture
def environment() -> Iterator[None]:
    """No proxies; and what a server sets in this process goes when the test ends."""
    before = dict(os.environ)
    for name in [name for name in os.environ if name.lower() in PROXY_NAMES]:
        del os.environ[name]
    yield
    os.environ.clear()
    os.environ.update(before)
