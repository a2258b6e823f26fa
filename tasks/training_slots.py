"""Hold one GPU, or the CPU, per finetune on a machine."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from desra_core.files.locks import locked

_POLL_SECONDS = 1.0


@contextlib.contextmanager
def training_slot(devices: Sequence[str], on_wait: Callable[[str], None]) -> Iterator[str]:
    """Hold one of several devices for a finetune; wait while there is a finetune on each of them.

    The system frees what a process held, however it dies.

    Parameters
    ----------
    devices
        Names of GPUs, or ``cpu``.
    on_wait
        Called with a line for people, once, when all of them are taken.

    Yields
    ------
    The device.
    """
    announced = False
    while True:
        for device in devices:
            with contextlib.ExitStack() as held:
                if held.enter_context(locked(_lock_file(device), read_only=True)) is None:
                    yield device
                    return
        if not announced:
            on_wait(f"another finetune is on {', '.join(devices)}: waiting until it has ended")
            announced = True
        time.sleep(_POLL_SECONDS)


def _lock_file(device: str) -> Path:
    """Return the lock file of a device, the same for all users; it is never deleted, or two could hold it."""
    path = Path(tempfile.gettempdir()) / f"desra-finetune-{device.replace('/', '-')}.lock"
    with contextlib.suppress(FileExistsError):
        file = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL)
        os.fchmod(file, 0o644)  # whatever the umask
        os.close(file)
    return path
