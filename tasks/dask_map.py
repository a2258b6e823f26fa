"""Spread images over the workers of a Dask cluster, or follow one long call on one of them.

Only this module and `tasks.dask_connection` (connecting a run), `tasks.dask_cluster` (workers on this machine),
`tasks.lost_workers`, `tasks.admission` and `tasks.question` (workers of others) know Dask.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from functools import partial
from typing import Any, NamedTuple
from uuid import uuid4

from distributed import Client, Future, KilledWorker, as_completed
from prefect.runtime import flow_run

from desra_core.errors import DesraError, TooLargeError, TransientError, printable
from desra_core.gpu import is_broken
from desra_core.settings import Machine
from desra_core.workspace.manifest import ImageRef
from tasks.admission import Admission, Calls
from tasks.dask_cluster import BYTES_PER_PIXEL, GPU_THREADS
from tasks.logs import configure, record
from tasks.lost_workers import Watch, call_on_worker, error_of

_RETRIES = 2

# An image, with its result or the `ImageError` that it failed by.
Result = tuple[ImageRef, Any]


class ImageJob(NamedTuple):
    """A function of an image and something small about it, and the Dask resources that it needs."""

    name: str
    function: Callable[[ImageRef, Any], Any]
    resources: dict[str, float]


class Dask:
    """A connected cluster.

    Attributes:
        threads: Threads that the work on one image may use.
        max_pixels: The largest image that fits into a worker's share of memory.
        workers: Number of workers in all.
        gpus: Number of those with a GPU of their own.
        gpu_slots: The resource ``GPU`` of such a worker: a task that takes all of it runs there alone.
        dashboard: Address of Dask's own page about the cluster.
    """

    def __init__(
        self,
        client: Client,
        machine: Machine,
        *,
        threads: int,
        image_bytes: int,
        workers: int,
        gpus: int,
        gpu_slots: float = GPU_THREADS,
        admission: Admission | None = None,
    ) -> None:
        self._client = client
        self._admission = admission
        self._machine = machine
        self.threads = threads
        self.max_pixels = image_bytes // BYTES_PER_PIXEL
        self.workers = workers
        self.gpus = gpus
        self.gpu_slots = gpu_slots
        self.dashboard: str = client.dashboard_link
        self._watch = Watch(client, self._is_any_able)

    def close(self) -> None:
        """Cancel the work in progress; its images do not count as failures."""
        self._watch.end()

    def map(self, job: ImageJob, work: Sequence[tuple[ImageRef, Any]]) -> Iterator[Result]:
        """Run a job on every image, started in this order; yields results as they are ready, or an `ImageError`.

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
        places = {future.key: index for index, future in enumerate(futures)}

        def pass_on(future: Future[Any], others: dict[str, Any]) -> Future[Any]:
            place = places[future.key]
            again = self._submit(function, calls[place], job.resources, retries=_RETRIES, **others)
            places[again.key] = place
            return again

        with self._watch.over(futures, job.resources):
            for future, result in self._done(futures, job.resources, pass_on):
                image = work[places[future.key]][0]
                if future.status != "finished" or isinstance(result, DesraError):
                    # Of a call that raised there is a tuple: type, error and traceback.
                    result = error_of(image.path, result[1] if isinstance(result, tuple) else result)
                future.release()  # or finished work would be repeated when its worker ends
                yield image, result

    def _done(
        self,
        futures: list[Future[Any]],
        resources: dict[str, float],
        pass_on: Callable[[Future[Any], dict[str, Any]], Future[Any]],
    ) -> Iterator[tuple[Future[Any], Any]]:
        """Yield futures as they are done, with results or errors; resubmit to others what a worker refused."""
        coming = as_completed(futures, with_results=True, raise_errors=False)
        for batch in coming.batches():
            for future, result in batch:
                self._watch.check()
                if self._admission is None or future.status != "finished":
                    yield future, result
                elif others := self._admission.others(result, resources):
                    futures.append(pass_on(future, others))
                    coming.add(futures[-1])
                    future.release()
                else:
                    yield future, result[1]

    def _admitted(self, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> Calls:
        """Wrap a function and the arguments of its calls in the question to workers of others, if there is one."""
        return self._admission.before(function, calls) if self._admission else (function, calls)

    def _submit(
        self, function: Callable[..., Any], call: tuple[Any, ...], resources: dict[str, float], **options: Any
    ) -> Future[Any]:
        return self._client.submit(function, *call, resources=resources or None, pure=False, **options)

    def _is_any_able(self, resources: dict[str, float]) -> bool:
        """Say whether there are workers for what needs these resources; those that get no work are asked again."""
        if self._admission is None:
            return bool(self._client.nthreads())
        if not self._admission.able(resources):
            self._admission.ask_again()
        return bool(self._admission.able(resources))

    def call(self, function: Callable[..., Any], *arguments: Any, resources: dict[str, float]) -> None:
        """Call a function on one worker, leave its result there, and raise what it raises."""
        self.follow(partial(_without_result, function), *arguments, resources=resources, on_second=lambda: None)

    def follow(
        self, function: Callable[..., Any], *arguments: Any, resources: dict[str, float], on_second: Callable[[], None]
    ) -> Any:
        """Call a function on one worker, call ``on_second`` each second meanwhile, and return its small result.

        A worker that dies is replaced, and the function called again.

        Raises:
            TransientError: All workers have gone, or it took down several of them.
            Exception: What the function raises.
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
    """Call a job's function on an image, and log how that went.

    A failure that would repeat is returned: what is raised, Dask tries again.
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
