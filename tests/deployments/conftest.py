"""Fixtures of the tests of `desra serve`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

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
