"""Spread images over the workers of a Dask cluster, or follow one long call on a worker.

Only this module and `tasks.dask_connection` (connecting a run), `tasks.dask_cluster` (workers on this machine),
`tasks.lost_workers`, `tasks.admission` and `tasks.question` (workers of others) know Dask.
"""

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
from tasks.dask_cluster import BYTES_PER_PIXEL, Share, image_bytes
from tasks.logs import configure, record
from tasks.lost_workers import Watch, call_on_worker, error_of

_RETRIES = 2


class ImageJob(NamedTuple):
    """A function of two arguments, an image and something small about it; and the Dask resources of each call."""

    name: str
    function: Callable[[ImageRef, Any], Any]
    resources: dict[str, float]


class Dask:
    """A connected cluster.

    Args:
        client: The client of the cluster.
        machine: Level and format of the log of workers.
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
        """Start a job on every image, in this order; yield each image with its result or `ImageError` once it is there.

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
                    # The result of a call that raised is a tuple: type, error and traceback.
                    result = error_of(image.path, result[1] if isinstance(result, tuple) else result)
                future.release()  # or finished work would be repeated when its worker ends
                yield image, result

    def _admitted(self, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> Calls:
        """Make each call of a function ask its worker first, if the workers were started elsewhere."""
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
    """Call a job's function on an image, and log the outcome.

    A failure that would repeat is returned. Any other is raised, so that Dask tries again.
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
