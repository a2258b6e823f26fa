"""Who computes on a GPU: a worker there has several threads, but memory for the networks of one image at a time."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

_GPU = threading.Lock()


@contextlib.contextmanager
def alone_on(device: str) -> Iterator[None]:
    """Hold the GPU, if the torch device is one, while others of this process wait."""
    with _GPU if device.startswith("cuda") else contextlib.nullcontext():
        yield
