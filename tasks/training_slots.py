"""One finetune per GPU: who trains on which, and waits for which, on one machine."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from prefect import get_run_logger

from tasks.lines import say

_POLL_SECONDS = 1.0


@contextlib.contextmanager
def training_slot(devices: Sequence[str]) -> Iterator[str]:
    """Hold one of several devices for a finetune; wait while there is a finetune on each of them.

    The system frees what a process held, however it dies.

    Parameters
    ----------
    devices
        Names of GPUs, or ``cpu``.

    Yields
    ------
    The device.
    """
    told = False
    while True:
        for device in devices:
            with contextlib.ExitStack() as held:
                if held.enter_context(_locked(device)):
                    yield device
                    return
        if not told:
            line = f"another finetune is on {', '.join(devices)}: waiting until it has ended"
            say(line)
            get_run_logger().info(line)
            told = True
        time.sleep(_POLL_SECONDS)


@contextlib.contextmanager
def _locked(device: str) -> Iterator[bool]:
    """Whether this process holds the device."""
    file = os.open(_lock_file(device), os.O_RDONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        held = False
    else:
        held = True
    try:
        yield held
    finally:
        os.close(file)


def _lock_file(device: str) -> Path:
    """The same for all users; it is never deleted, or two could hold it."""
    path = Path(tempfile.gettempdir()) / f"desra-finetune-{device.replace('/', '-')}.lock"
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL, 0o644))
    return path
