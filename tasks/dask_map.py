"""Spread images over the workers of a Dask cluster, or follow one long call on a worker.

Only this module and `tasks.dask_connection` (connecting a run), `tasks.dask_cluster` (workers on this machine),
`tasks.admission` and `tasks.question` (workers of others) know Dask.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from functools import partial
from typing import Any, NamedTuple
from uuid import uuid4

from distributed import Client, Future, KilledWorker, as_completed, get_worker
from distributed.core import Status
from prefect.runtime import flow_run

from desra_core.errors import DesraError, ImageError, TooLargeError, TransientError, printable
from desra_core.gpu import is_broken
from desra_core.settings import Machine
from desra_core.workspace.manifest import ImageRef
from tasks.admission import Admission, Calls
from tasks.dask_cluster import BYTES_PER_PIXEL, Share, image_bytes
from tasks.logs import configure, record

# Work is given up when no worker could do it at two looks, half of this time apart.
LOST_SECONDS = 20
_END_SECONDS = 10
# A worker's message about an ended task reaches the scheduler within this time.
_MESSAGE_SECONDS = 0.2


class Watch:
    """Futures in progress: cancelled when the run ends, or when no worker has been able to compute them for 20 s.

    Args:
        client: The client of the cluster.
        is_any_able: Returns whether a worker has the given resources now.
    """

    def __init__(self, client: Client, is_any_able: Callable[[dict[str, float]], bool]) -> None:
        self._client = client
        self._is_any_able = is_any_able
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._live: list[tuple[int, list[Future[Any]]]] = []  # threads, and the futures that each waits for

    def end(self) -> None:
        """Cancel all futures, and wait up to 10 s for the threads that wait for them."""
        with self._lock:
            self._ended.set()
            live = list(self._live)
        for _, futures in live:
            self._client.cancel(futures)
        # The client wakes the waiting threads, so it must not close before they have ended.
        deadline = time.monotonic() + _END_SECONDS
        while any(waiting != threading.get_ident() for waiting, _ in self._live) and time.monotonic() < deadline:
            time.sleep(0.01)

    def check(self) -> None:
        """Raise `CancelledError` where the run has ended."""
        if self._ended.is_set():
            raise CancelledError

    @contextlib.contextmanager
    def over(self, futures: list[Future[Any]], resources: dict[str, float]) -> Iterator[None]:
        """Watch futures, which need these resources, for the block; the list may grow meanwhile.

        Raises:
            CancelledError: The run has ended.
        """
        entry = (threading.get_ident(), futures)
        with self._lock:
            self.check()
            self._live.append(entry)
        ended = threading.Event()

        def watch() -> None:
            alone = 0
            while not ended.wait(LOST_SECONDS / 2):
                able = False
                with contextlib.suppress(OSError, AttributeError):  # a scheduler that has gone, a client that is closed
                    able = self._is_any_able(resources)
                alone = 0 if able else alone + 1
                if alone >= 2:  # at each look, for a call that is resubmitted is a new future
                    self._client.cancel(futures)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            self._live.remove(entry)
            ended.set()
            watcher.join()


def call_on_worker(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function on this worker, and end the worker if its GPU is broken.

    The causes of errors are dropped: Dask would pickle them too, and often cannot.
    """
    try:
        return function(*arguments)
    except DesraError as error:
        error.__cause__ = error.__context__ = None
        raise
    except RuntimeError as error:
        if is_broken(error):
            _leave()
        raise


def _leave() -> None:
    """End this worker, whose GPU is broken for its process; the nanny starts another worker."""
    worker = get_worker()

    async def leave() -> None:
        if worker.status != Status.running:
            return
        worker.status = Status.closing_gracefully  # it gets no more tasks, nor a retry of the failed task
        deadline = time.monotonic() + _END_SECONDS
        while worker.state.executing and time.monotonic() < deadline:
            await asyncio.sleep(_MESSAGE_SECONDS)
        await asyncio.sleep(_MESSAGE_SECONDS)
        # As an expected end: else the scheduler would blame the tasks that waited here for the death of the worker.
        await worker.scheduler.unregister(address=worker.address, expected=True, close=False, stimulus_id="leave")
        await worker.close(nanny=False)

    worker.loop.add_callback(leave)


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


_RETRIES = 2


class ImageJob(NamedTuple):
    """A function of an image and something small about the image, and the Dask resources of each call."""

    name: str
    function: Callable[[ImageRef, Any], Any]
    resources: dict[str, float]


class Dask:
    """A connected cluster.

    Args:
        client: The client of the cluster.
        machine: For the log of workers.
        share: The share of each worker in its machine.
        own: Bytes that a worker holds without an image.
        gpus: Number of workers with a GPU.
        admission: The question to workers that were started elsewhere.

    Attributes:
        threads: Threads that the work on one image may use.
        max_pixels: The largest image that fits into a worker's share of memory.
        workers: Number of workers in all.
        gpus: Number of workers with a GPU of their own.
        gpu_slots: The resource ``GPU`` of such a worker; a task that takes all of it runs alone on the worker.
        dashboard: Address of Dask's own page about the cluster.
    """

    def __init__(
        self,
        client: Client,
        machine: Machine,
        share: Share,
        *,
        own: int,
        gpus: int,
        admission: Admission | None = None,
    ) -> None:
        self._client = client
        self._admission = admission
        self._machine = machine
        self.threads = share.threads
        self.max_pixels = image_bytes(share.memory, own) // BYTES_PER_PIXEL
        self.workers = share.workers + gpus
        self.gpus = gpus
        self.gpu_slots = share.gpu_threads
        self.dashboard: str = client.dashboard_link
        self._watch = Watch(client, self._is_any_able)

    def close(self) -> None:
        """Cancel the work in progress; its images do not count as failures."""
        self._watch.end()

    def map(self, job: ImageJob, work: Sequence[tuple[ImageRef, Any]]) -> Iterator[tuple[ImageRef, Any]]:
        """Run a job on every image, in this order; yield each result or `ImageError` as soon as it is there.

        Raises:
            CancelledError: The run has ended meanwhile.
        """
        run = uuid4().hex[:8]
        function, calls = self._admitted(partial(_recorded, job, self._machine, flow_run.name), work)
        futures = self._client.map(
            function,
            *([call[index] for call in calls] for index in range(2)),
            # Dask computes tasks of equal priority in the order of their keys.
            key=[f"{job.name}-{index:06d}-{image.id}-{run}" for index, (image, _) in enumerate(work)],
            retries=_RETRIES,
            resources=job.resources or None,
            pure=False,
        )
        waiting = {future.key: (image, call) for future, (image, _), call in zip(futures, work, calls, strict=True)}
        with self._watch.over(futures, job.resources):
            coming = as_completed(futures, with_results=True, raise_errors=False)
            for future, result in (done for batch in coming.batches() for done in batch):
                self._watch.check()
                image, call = waiting.pop(future.key)
                if self._admission and future.status == "finished":
                    if others := self._admission.others(result, job.resources):
                        again = self._submit(function, call, job.resources, retries=_RETRIES, **others)
                        waiting[again.key] = image, call
                        futures.append(again)
                        coming.add(again)
                        future.release()
                        continue
                    result = result[1]
                if future.status != "finished" or isinstance(result, DesraError):
                    # Of a call that raised there is a tuple: type, error and traceback.
                    result = error_of(image.path, result[1] if isinstance(result, tuple) else result)
                future.release()  # or finished work would be repeated when its worker ends
                yield image, result

    def _admitted(self, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> Calls:
        """Put the question to workers of others, if any, before the calls of a function."""
        return self._admission.before(function, calls) if self._admission else (function, calls)

    def _submit(
        self, function: Callable[..., Any], call: tuple[Any, ...], resources: dict[str, float], **options: Any
    ) -> Future[Any]:
        return self._client.submit(function, *call, resources=resources or None, pure=False, **options)

    def _is_any_able(self, resources: dict[str, float]) -> bool:
        """Say whether a worker has these resources; ask refused workers again if none has."""
        if self._admission is None:
            return bool(self._client.nthreads())
        if not self._admission.able(resources):
            self._admission.ask_again()
        return bool(self._admission.able(resources))

    def call(self, function: Callable[..., Any], *arguments: Any, resources: dict[str, float]) -> None:
        """Call a function on one worker, leave its result there, and raise what the function raises."""
        self.follow(partial(_without_result, function), *arguments, resources=resources, on_second=lambda: None)

    def follow(
        self, function: Callable[..., Any], *arguments: Any, resources: dict[str, float], on_second: Callable[[], None]
    ) -> Any:
        """Call a function on one worker, call ``on_second`` each second meanwhile, and return its small result.

        When the worker dies, another worker calls the function again.

        Raises:
            TransientError: All workers have gone, or the function took down several of them.
            Exception: Any error of the function.
        """
        called, [call] = self._admitted(partial(call_on_worker, function), [arguments])
        futures = [self._submit(called, call, resources)]
        try:
            with self._watch.over(futures, resources):
                while True:
                    while not futures[-1].done():
                        with contextlib.suppress(TimeoutError):
                            futures[-1].result(timeout=1)
                        on_second()
                    result = futures[-1].result()
                    if self._admission is None:
                        return result
                    if not (others := self._admission.others(result, resources)):
                        return result[1]
                    futures.append(self._submit(called, call, resources, **others))
        except (CancelledError, KilledWorker, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not is_broken(error):
                raise
            raise error_of("the computation", error) from None


def _recorded(job: ImageJob, machine: Machine, run: str | None, image: ImageRef, about: Any) -> Any:
    """Call a job's function on an image, and log the outcome; return a failure that would repeat, else raise it.

    Dask tries again after an error that is raised.
    """
    configure(machine.log_level, machine.log_format)
    log = partial(record, logging.DEBUG, run=run, shard=f"{image.shard:05d}", image=image.id, stage=job.name)
    started = time.perf_counter()
    try:
        result = call_on_worker(job.function, image, about)
    except DesraError as error:
        log(f"failed: {printable(error)}")
        if isinstance(error, TransientError) and not isinstance(error, TooLargeError):
            raise
        return error
    log(f"done: {printable(image.names[0])}", seconds=round(time.perf_counter() - started, 3))
    return result


def _without_result(function: Callable[..., Any], *arguments: Any) -> None:
    function(*arguments)
