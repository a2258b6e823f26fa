"""Work for the Dask clusters of tests."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
from distributed import get_worker

from desra_core.errors import TransientError, UsageError
from desra_core.workspace.manifest import File, ImageRef
from desra_core.workspace.products import Record
from tasks.dask_map import Dask

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def job(function: Callable[[ImageRef, Record], Record], resources: dict[str, float] | None = None) -> tuple[Any, ...]:
    """The first arguments of `Dask.map`.

    Workers cannot import a test module; what only cloudpickle can pickle travels by value.
    """
    return function.__name__, lambda image, outcome: function(image, outcome), resources or {}


def images(*names: str) -> list[tuple[ImageRef, Record]]:
    return [
        (ImageRef(name, 0, (name,), File(Path(name), ""), File(Path(f"gan/{name}"), ""), None, None), Record(name))
        for name in names
    ]


def done(image: ImageRef, outcome: Record) -> Record:
    return Record(image.id, mask_key="done")


def leaves(image: ImageRef, outcome: Record) -> Record:
    get_worker().io_loop.add_callback(get_worker().close, nanny=True, executor_wait=False)
    time.sleep(60)
    return done(image, outcome)


def counted(folder: Path, fate: str) -> int:
    """The number of calls so far, at most at the third of which all is well."""
    calls = len(list(folder.iterdir())) + 1
    (folder / str(calls)).touch()
    if fate == "killed" or (fate == "killed once" and calls == 1):
        os.kill(os.getpid(), signal.SIGKILL)
    if fate in ERRORS:
        raise ERRORS[fate]
    time.sleep(1.2)
    return calls


ERRORS = {
    "refused": UsageError("--learning-rate", "is too high", "lower it"),
    "unlucky": TransientError("disk", "the disk is full", "free some space"),
    "late": TimeoutError("too late"),
    "surprised": ZeroDivisionError("a bug"),
}


def follow(dask: Dask, folder: Path, fate: str) -> tuple[int, int]:
    """Return the result of the function, and the number of calls of ``on_second``."""
    folder.mkdir()
    seconds: list[float] = []
    result = dask.follow(
        lambda *arguments: counted(*arguments), folder, fate, resources={}, on_second=lambda: seconds.append(0)
    )
    return result, len(seconds)
