"""A run's connection to Dask, and images spread over the workers.

Only this module, `tasks.dask_cluster` (workers on this machine), `tasks.admission` and `tasks.question` (of others)
know Dask.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from functools import partial
from pathlib import Path
from ssl import SSLError
from typing import Any, NamedTuple
from uuid import uuid4

from distributed import Client, Future, KilledWorker, Worker, as_completed, get_worker
from distributed.comm.core import CommClosedError, connect
from distributed.core import Status, send_recv
from distributed.security import Security
from distributed.system import MEMORY_LIMIT
from distributed.utils import LoopRunner
from prefect.runtime import flow_run

from desra_core.errors import AbsentError, DesraError, ImageError, TooLargeError, TransientError, UsageError, printable
from desra_core.gpu import is_broken
from desra_core.settings import Machine
from desra_core.workspace.manifest import ImageRef
from tasks.admission import Admission, Calls
from tasks.dask_cluster import (
    BYTES_PER_PIXEL,
    EMBEDDED_DASHBOARD,
    EMBEDDED_GPUS,
    EMBEDDED_KEY,
    EMBEDDED_MACHINE,
    EMBEDDED_SCHEDULER,
    GPU_THREADS,
    NETWORK_WORKER_BYTES,
    WORKER_BYTES,
    image_bytes,
    local_cluster,
    share_of,
    threads_of,
    visible_gpus,
)
from tasks.logs import configure, record, say

_RETRIES = 2
_CONNECT_SECONDS = 10
_RESTART_SECONDS = 60
_AWAIT_SECONDS = 60
_LOST_SECONDS = 20
_END_SECONDS = 10
# A worker's message about an ended task reaches the scheduler within this time.
_MESSAGE_SECONDS = 0.2

# An image, with its result or the `ImageError` that it failed by.
Result = tuple[ImageRef, Any]


class ImageJob(NamedTuple):
    """A function of an image and something small about it, and the Dask resources that it needs."""

    name: str
    function: Callable[[ImageRef, Any], Any]
    resources: dict[str, float]


class Records(NamedTuple):
    """The settings of the log of workers: level, format and the name of the run."""

    level: str
    form: str
    run: str | None


class Dask:
    """A connected cluster.

    Attributes
    ----------
    threads
        Threads that the work on one image may use.
    max_pixels
        The largest image that fits into a worker's share of memory.
    workers
        Number of workers in all.
    gpus
        Number of those with a GPU of their own.
    gpu_slots
        The resource ``GPU`` of such a worker: a task that takes all of it runs there alone.
    dashboard
        Address of Dask's own page about the cluster.
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
        self._records = Records(machine.log_level, machine.log_format, flow_run.name)
        self.threads = threads
        self.max_pixels = image_bytes // BYTES_PER_PIXEL
        self.workers = workers
        self.gpus = gpus
        self.gpu_slots = gpu_slots
        self.dashboard: str = client.dashboard_link
        self._ended = threading.Event()
        self._lock = threading.Lock()
        # The thread that waits, and the futures that it waits for.
        self._live: list[tuple[int, list[Future[Any]]]] = []

    def end(self) -> None:
        """Cancel the work in progress; its images do not count as failures."""
        with self._lock:
            self._ended.set()
            live = list(self._live)
        for _, futures in live:
            self._client.cancel(futures)
        # The client wakes the waiting threads, so it must not close before they have ended.
        deadline = time.monotonic() + _END_SECONDS
        while any(waiting != threading.get_ident() for waiting, _ in self._live) and time.monotonic() < deadline:
            time.sleep(0.01)

    def map(self, job: ImageJob, work: Sequence[tuple[ImageRef, Any]]) -> Iterator[Result]:
        """Run a job on every image, in this order; results come as they are ready, failures as errors that name theirs.

        Raises
        ------
        CancelledError
            The run has ended meanwhile.
        """
        run = uuid4().hex[:8]
        function, calls = self._admitted(partial(_recorded, job.name, job.function, self._records), work)
        futures = self._client.map(
            function,
            *([call[index] for call in calls] for index in range(2)),
            # Dask computes in the order of the keys what nothing else puts in order.
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

        with self._watched(futures, job.resources):
            for future, result in self._done(futures, job.resources, pass_on):
                image = work[places[future.key]][0]
                failed = future.status != "finished" or isinstance(result, DesraError)
                ended = _error(image.path, result) if failed else result
                future.release()  # or finished work would be repeated when its worker ends
                yield image, ended

    def _done(
        self,
        futures: list[Future[Any]],
        resources: dict[str, float],
        pass_on: Callable[[Future[Any], dict[str, Any]], Future[Any]],
    ) -> Iterator[tuple[Future[Any], Any]]:
        """Futures as they are done, with their results or errors; what a worker may not do goes to others."""
        coming = as_completed(futures, with_results=True, raise_errors=False)
        for batch in coming.batches():
            for future, result in batch:
                if self._ended.is_set():
                    raise CancelledError
                if self._admission is None or future.status != "finished":
                    yield future, result
                elif others := self._admission.others(result, resources):
                    futures.append(pass_on(future, others))
                    coming.add(futures[-1])
                    future.release()
                else:
                    yield future, result[1]

    def _admitted(self, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> Calls:
        """A function and the arguments of its calls, or what asks the workers of others first."""
        return self._admission.before(function, calls) if self._admission else (function, calls)

    def _submit(
        self, function: Callable[..., Any], call: tuple[Any, ...], resources: dict[str, float], **options: Any
    ) -> Future[Any]:
        return self._client.submit(function, *call, resources=resources or None, pure=False, **options)

    @contextlib.contextmanager
    def _watched(self, futures: list[Future[Any]], resources: dict[str, float]) -> Iterator[None]:
        """Cancel futures when the run ends, or when all workers have been gone for 20 s: Dask waits without end."""
        with self._lock:
            if self._ended.is_set():
                raise CancelledError
            entry = (threading.get_ident(), futures)
            self._live.append(entry)
        ended = threading.Event()

        def watch() -> None:
            alone = 0
            while not ended.wait(_LOST_SECONDS / 2):
                with contextlib.suppress(OSError, AttributeError):  # a scheduler that has gone, a client that is closed
                    alone = -1 if self._any_able(resources) else alone
                alone += 1
                if alone >= 2:  # at each look, for work passed on to another worker is a new future
                    self._client.cancel(futures)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            self._live.remove(entry)
            ended.set()
            watcher.join()

    def _any_able(self, resources: dict[str, float]) -> bool:
        """Say whether there are workers for what needs these resources; those that get no work are asked again."""
        if self._admission is None:
            return bool(self._client.nthreads())
        if not self._admission.able(resources):
            self._admission.ask_again()
        return bool(self._admission.able(resources))

    def call(self, function: Callable[..., Any], *arguments: Any, resources: dict[str, float]) -> None:
        """Call a function on one worker, leave its result there, and raise what it raises."""
        without_result = partial(_without_result, function)
        self.follow(without_result, *arguments, resources=resources, on_second=lambda: None)

    def follow(
        self, function: Callable[..., Any], *arguments: Any, resources: dict[str, float], on_second: Callable[[], None]
    ) -> Any:
        """Call a function on one worker, call ``on_second`` each second meanwhile, and return its small result.

        A worker that dies is replaced, and the function called again.

        Raises
        ------
        TransientError
            All workers have gone, or it took down several of them.
        Exception
            What the function raises.
        """
        called, [call] = self._admitted(partial(_picklable, function), [arguments])
        futures = [self._submit(called, call, resources)]
        try:
            with self._watched(futures, resources):
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
            raise _error("the computation", error) from None


@contextlib.contextmanager
def open_dask(
    machine: Machine,
    *,
    folder: Path | None = None,
    networks: bool = False,
    gpus: int = 0,
    device: str | None = None,
    alone: bool = False,
    most_pixels: Callable[[], int] = lambda: 0,
) -> Iterator[Dask]:
    """Connect to the scheduler of a run or of desra serve, or start workers on this machine and stop them at the end.

    Parameters
    ----------
    machine
        How many workers and how large; ignored by a scheduler that runs elsewhere.
    folder
        Where workers write, if they do.
    networks
        Whether workers will run networks, and need memory for that beside their images.
    gpus
        Number of additional local workers that own one GPU each and declare the resource ``GPU: 1`` per thread.
    device
        The one GPU to use, of `visible_gpus`.
    alone
        Start workers for this alone even where desra serve has a cluster.
    most_pixels
        Returns the pixels of the largest image to come; not called where a scheduler runs elsewhere. For large images
        this machine gets fewer and larger workers. If the image does not fit into those of desra serve, these are
        restarted to free their memory, and workers of the run's own do the work.

    Raises
    ------
    AbsentError
        The scheduler does not answer, has no workers, none with this version of desra that sees the folder, or fewer
        GPUs than desra serve has.
    UsageError
        Workers have too little memory.
    """
    configure(machine.log_level, machine.log_format)
    own = NETWORK_WORKER_BYTES if networks else WORKER_BYTES
    pixels = 0 if machine.scheduler else most_pixels()
    embedded = None if machine.scheduler or alone else os.environ.get(EMBEDDED_SCHEDULER)
    if address := machine.scheduler or embedded:
        key = os.environ.get(EMBEDDED_KEY) if embedded else None
        with _connected(address, key) as client, contextlib.ExitStack() as stack:
            admission = stack.enter_context(contextlib.closing(Admission(client, folder)))
            admission.ask()
            if embedded:
                machine = _as_served(machine)
                _stop_leftovers(client)
                _await_workers(client, int(os.environ.get(EMBEDDED_GPUS, 0)))
            dask = _elsewhere(address, client, machine, own, admission, embedded=bool(embedded))
            if machine.scheduler or dask.max_pixels >= min(pixels, _own_pixels(machine, own, gpus, pixels)):
                with _ending(dask):
                    yield dask
                return
            _restart(client)
    share = share_of(machine, own, gpus, pixels)
    if (usual := share_of(machine, own, gpus)) != share:
        threads = f" and {share.gpu_threads} threads per GPU" if gpus else ""
        instead = f" instead of {usual.workers}{f' and {usual.gpu_threads}' if gpus else ''}"
        say(f"{share.workers} workers{threads}{instead}, for images of up to {pixels / 1e6:.0f} megapixels")
    with local_cluster(share, visible_gpus()[:gpus] if device is None else [device]) as (_, client):
        dask = Dask(
            client,
            machine,
            threads=share.threads,
            image_bytes=image_bytes(share.memory, own),
            workers=share.workers + gpus,
            gpus=gpus,
            gpu_slots=share.gpu_threads,
        )
        with _ending(dask):
            yield dask


def _as_served(machine: Machine) -> Machine:
    """Fill in the workers and the memory that a run leaves open with those of desra serve."""
    said = Machine.model_validate_json(os.environ.get(EMBEDDED_MACHINE, "{}"))
    own = {"workers": machine.workers or said.workers, "memory": machine.memory or said.memory}
    return machine.model_copy(update=own)


def _own_pixels(machine: Machine, own: int, gpus: int, pixels: int) -> int:
    """The largest image that workers of a run's own have memory for."""
    return image_bytes(share_of(machine, own, gpus, pixels).memory, own) // BYTES_PER_PIXEL


def _elsewhere(
    address: str, client: Client, machine: Machine, own: int, admission: Admission, *, embedded: bool
) -> Dask:
    """Use the workers of a cluster that others, or desra serve, have started; raises as `open_dask`."""
    workers = [worker for name, worker in _workers(client).items() if name not in admission.refused]
    if not workers:
        raise AbsentError(address, "has no workers", "start some with dask worker")
    memory = min((worker["memory_limit"] or MEMORY_LIMIT) // worker["nthreads"] for worker in workers)
    slots = [worker["resources"]["GPU"] for worker in workers if "GPU" in worker["resources"]]
    dask = Dask(
        client,
        machine,
        threads=threads_of(len(workers) - len(slots)) if embedded else 1,
        image_bytes=image_bytes(memory, own),
        workers=len(workers),
        gpus=len(slots),
        gpu_slots=min(slots, default=0),
        admission=admission,
    )
    if embedded:
        dask.dashboard = os.environ.get(EMBEDDED_DASHBOARD, dask.dashboard)
    return dask


def release_embedded() -> None:
    """Restart the workers of desra serve, if there are any, so that they free their memory, on GPUs too."""
    if address := os.environ.get(EMBEDDED_SCHEDULER):
        with _connected(address, os.environ.get(EMBEDDED_KEY)) as client:
            _restart(client)


def _stop_leftovers(client: Client) -> None:
    """Stop the tasks of a killed run on the workers of desra serve, which serve one run at a time."""
    if any(client.run(_executing).values()):
        _restart(client)


def _await_workers(client: Client, gpus: int) -> None:
    """Wait up to a minute for any worker and so many with a GPU: one that died is being restarted."""
    deadline = time.monotonic() + _AWAIT_SECONDS
    while True:
        there = ["GPU" in worker["resources"] for worker in _workers(client).values()]
        if there and sum(there) >= gpus:
            return
        if time.monotonic() >= deadline:
            if not there:
                return  # `_elsewhere` raises for any cluster
            reason = f"are {sum(there)}, where desra serve has started {gpus}"
            raise AbsentError("the workers with a GPU", reason, "see nvidia-smi, and start desra serve again")
        time.sleep(1)


def _workers(client: Client) -> dict[str, dict[str, Any]]:
    """Return the scheduler's record of each worker, by its address."""
    return dict(client.scheduler_info(n_workers=-1)["workers"])


def _restart(client: Client) -> None:
    try:
        client.restart(timeout=_RESTART_SECONDS)
    except TimeoutError:
        raise TransientError("the Dask workers", "do not restart", "run again, or start desra serve again") from None


def _executing(dask_worker: Worker) -> int:
    return len(dask_worker.state.executing)


@contextlib.contextmanager
def _ending(dask: Dask) -> Iterator[Dask]:
    try:
        yield dask
    finally:
        dask.end()


def _picklable(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function; drop the causes of what it raises, which Dask would pickle too, and often cannot."""
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
    """End this worker, whose GPU is broken for this process; its nanny starts another one."""
    worker = get_worker()

    async def leave() -> None:
        if worker.status != Status.running:
            return
        worker.status = Status.closing_gracefully  # so it gets no more tasks, nor a retry of the failed one
        deadline = time.monotonic() + _END_SECONDS
        while worker.state.executing and time.monotonic() < deadline:
            await asyncio.sleep(_MESSAGE_SECONDS)
        await asyncio.sleep(_MESSAGE_SECONDS)
        # As an expected end: else the scheduler would blame the tasks that waited here for the death of the worker.
        await worker.scheduler.unregister(address=worker.address, expected=True, close=False, stimulus_id="leave")
        await worker.close(nanny=False)

    worker.loop.add_callback(leave)


def _recorded(
    name: str, function: Callable[[ImageRef, Any], Any], records: Records, image: ImageRef, about: Any
) -> Any:
    """Call a job's function on an image, and log how that went.

    A failure that would repeat is returned: what is raised, Dask tries again.
    """
    configure(records.level, records.form)
    log = partial(record, logging.DEBUG, run=records.run, shard=f"{image.shard:05d}", image=image.id, stage=name)
    started = time.perf_counter()
    try:
        result = _picklable(function, image, about)
    except DesraError as error:
        log(f"failed: {printable(error)}")
        if isinstance(error, TransientError) and not isinstance(error, TooLargeError):
            raise
        return error
    log(f"done: {printable(image.names[0])}", seconds=round(time.perf_counter() - started, 3))
    return result


def _without_result(function: Callable[..., Any], *arguments: Any) -> None:
    function(*arguments)


def _connected(address: str, key: str | None = None) -> Client:
    """Connect to a scheduler, by Dask's own settings, or by the key file of a cluster of desra serve.

    It is asked once before: a client that never got a connection prints errors when Python ends.
    """
    security = Security(require_encryption=True, tls_ca_file=key, tls_client_cert=key) if key else None
    runner = LoopRunner()
    runner.start()
    try:
        runner.run_sync(_try_connection, address, security or Security())
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise _unanswered(address, error) from None
    finally:
        runner.stop()
    return Client(address, timeout=_CONNECT_SECONDS, security=security)


async def _try_connection(address: str, security: Security) -> None:
    comm = await connect(address, timeout=_CONNECT_SECONDS, **security.get_connection_args("client"))
    there = await send_recv(comm, op="identity", close=True)
    if "workers" not in there:
        remedy = "give that of the scheduler that it connects to"
        raise UsageError(address, f"is the address of a {there['type'].lower()}, not of a scheduler", remedy)


def _unanswered(address: str, error: Exception) -> UsageError:
    """Say why a scheduler does not answer; TLS on one side alone raises several kinds of errors."""
    tls = address.startswith("tls://")
    if tls and isinstance(error, TypeError):
        remedy = "set DASK_DISTRIBUTED__COMM__TLS__CA_FILE, …__TLS__CLIENT__KEY and …__TLS__CLIENT__CERT"
        return AbsentError(address, "asks for TLS, and no certificates are configured here", remedy)
    if tls and isinstance(error, ValueError | SSLError | CommClosedError):
        reason = f"no connection by TLS ({type(error).__name__})"
        return AbsentError(address, reason, "give its tcp:// address if it has no TLS, or certificates that it trusts")
    if isinstance(error, CommClosedError):
        remedy = "give its tls:// address, with certificates in Dask's configuration"
        return AbsentError(address, "what is there closes the connection, as a scheduler with TLS does", remedy)
    if isinstance(error, RuntimeError):
        return AbsentError(address, f"is not asked ({error})", "give its tls:// address, or change that configuration")
    if isinstance(error, ValueError):
        return UsageError(address, f"is no address of a scheduler ({error})", "give one such as tcp://HOST:8786")
    reason = f"no Dask scheduler answers ({type(error).__name__})"
    return AbsentError(address, reason, "start it, or leave --scheduler out to compute on this machine")


def _error(name: object, raised: Any) -> ImageError:
    error = raised[1] if isinstance(raised, tuple) else raised
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
