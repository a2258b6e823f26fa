"""Give up work that no worker can do any more, end a worker whose GPU is broken, and make errors about lost work."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from typing import Any

from distributed import Client, Future, KilledWorker, Worker, get_worker
from distributed.core import Status

from desra_core.errors import DesraError, ImageError, TransientError
from desra_core.gpu import is_broken

# Work is given up when no worker was able to do it for this long: in three checks in a row, half of this time apart.
LOST_SECONDS = 60  # more than a worker takes to start again on a busy machine
_END_SECONDS = 10
# A worker's message about an ended task reaches the scheduler within this time.
_MESSAGE_SECONDS = 0.2


class Watch:
    """Cancel futures in progress when the run ends, or when no worker has been able to compute them for a minute.

    Args:
        client: The client of the cluster.
        is_any_able: Returns whether a worker has the given resources now.
        patience: For how many seconds work may wait for a worker; by default for a minute.
    """

    def __init__(
        self, client: Client, is_any_able: Callable[[dict[str, float]], bool], patience: float | None = None
    ) -> None:
        self._client = client
        self._is_any_able = is_any_able
        self._patience = patience
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._live: list[tuple[int, list[Future[Any]]]] = []  # each thread, and the futures that it waits for

    def end(self) -> None:
        """Cancel all futures, and wait up to 10 s for the threads that wait for them."""
        with self._lock:
            self._ended.set()
            live = list(self._live)
        for _, futures in live:
            self._client.cancel(futures)
        # The client wakes the waiting threads, so it must not close before they have ended.
        deadline = time.monotonic() + _END_SECONDS
        while time.monotonic() < deadline:
            with self._lock:
                # This thread itself may be inside of `over`, which it leaves only later.
                if all(waiting == threading.get_ident() for waiting, _ in self._live):
                    return
            time.sleep(0.01)

    def check(self) -> None:
        """Raise `CancelledError` where the run has ended."""
        if self._ended.is_set():
            raise CancelledError

    @contextlib.contextmanager
    def over(self, futures: list[Future[Any]], resources: dict[str, float]) -> Iterator[None]:
        """Watch futures during the block; give up all of them when no worker has been able to compute any for so long.

        Args:
            futures: The futures that this thread waits for. The caller may add to this list during the block.
            resources: The resources that each of them needs.

        Raises:
            CancelledError: The run has ended.
        """
        entry = (threading.get_ident(), futures)
        with self._lock:
            self.check()
            self._live.append(entry)
        ended = threading.Event()

        def watch() -> None:
            failed_checks = 0
            while not ended.wait((self._patience or LOST_SECONDS) / 2):
                found = False
                with contextlib.suppress(OSError, AttributeError):  # the scheduler has gone, or the client is closed
                    found = self._is_any_able(resources)
                failed_checks = 0 if found else failed_checks + 1
                if failed_checks >= 3:  # at every later check too, since futures may have been added
                    self._client.cancel(futures)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            with self._lock:
                self._live.remove(entry)
            ended.set()
            watcher.join()


def call_on_worker(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function on this worker, and end the worker if its GPU is broken.

    Drop the causes of errors, which Dask would pickle too, and often cannot.
    """
    try:
        return function(*arguments)
    except DesraError as error:
        error.__cause__ = error.__context__ = None
        raise
    except RuntimeError as error:
        if is_broken(error):
            worker = get_worker()
            worker.loop.add_callback(_leave, worker)
        raise


async def _leave(worker: Worker) -> None:
    """End a worker whose process cannot use its GPU any more; the nanny starts another worker."""
    if worker.status != Status.running:
        return
    worker.status = Status.closing_gracefully  # it gets no more tasks, nor a retry of the failed task
    deadline = time.monotonic() + _END_SECONDS
    while worker.state.executing and time.monotonic() < deadline:
        await asyncio.sleep(_MESSAGE_SECONDS)
    await asyncio.sleep(_MESSAGE_SECONDS)
    # An expected end: else the scheduler would blame the tasks that waited here for the death of the worker.
    await worker.scheduler.unregister(address=worker.address, expected=True, close=False, stimulus_id="leave")
    await worker.close(nanny=False)


def error_of(name: object, error: Any) -> ImageError:
    """Make an error about ``name``, a path or a computation, from an error that Dask or a worker has raised."""
    if isinstance(error, ImageError):
        return error
    if isinstance(error, DesraError):  # no fault of the image
        return TransientError(*error.failure)
    if isinstance(error, CancelledError):
        return TransientError(name, "was not computed, because the Dask workers have gone", "start some and run again")
    if isinstance(error, KilledWorker):
        return TransientError(name, "took its worker down, most likely out of memory", "raise --memory and run again")
    if is_broken(error):
        reason = f"failed with its GPU ({str(error).partition(chr(10))[0]})"
        return TransientError(name, reason, "run again; if it stays, see nvidia-smi and dmesg")
    reason = f"failed unexpectedly with {type(error).__name__} ({error})"
    return TransientError(name, " ".join(reason.split()), "run again; if it stays, report it with the file")
