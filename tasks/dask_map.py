"""Spread images over the workers of a Dask cluster, or follow one long call on a worker.

Workers that were started elsewhere work only if they have the desra of the run and see the folder that it writes to.

Only this module, `tasks.dask_cluster` (starts workers, or connects to them), `tasks.lost_workers` and `tasks.question`
(checks workers that were started elsewhere) know Dask.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import cloudpickle
from distributed import Client, Future, KilledWorker, as_completed
from prefect.runtime import flow_run

from desra_core.errors import AbsentError, DesraError, TooLargeError, TransientError, printable
from desra_core.files import scratch_in, storage_errors
from desra_core.gpu import is_broken
from desra_core.settings import Machine
from desra_core.workspace.manifest import ImageRef
from tasks import question
from tasks.logs import configure, record, say
from tasks.lost_workers import Watch, call_on_worker, error_of

# Takes an image and a value that belongs to it. Dask pickles the value and the result, so both must be small.
ImageFunction = Callable[[ImageRef, Any], Any]
# Dask's resources, such as {"GPU": 1}.
Resources = dict[str, float]
# The arguments of each call of a function.
Calls = Sequence[tuple[Any, ...]]

_RETRIES = 2
# Workers evaluate these with the source of `tasks.question`, since their own desra may be of another version. exec
# defines the functions of the source and returns None, so that "or" goes on to the call.
_SOURCE = Path(question.__file__).read_text("utf-8")
_ASK = "exec(source) or refusal(*question)"
_WORK = "exec(source) or work(question, function, arguments)"


class Admission:
    """Ask the workers of a cluster, at the beginning and before each call, whether they may work for the run.

    Args:
        client: The client of the cluster.
        folder: The folder that workers write to, if they do.
    """

    def __init__(self, client: Client, folder: Path | None) -> None:
        self._client = client
        self._sign = scratch_in(folder.absolute()) if folder else None
        self._question = (question.running_code(), str(self._sign) if self._sign else None, uuid4().hex)
        self.refused: set[str] = set()  # addresses of workers that may not work; a warning was printed for each
        self._lock = threading.Lock()

    def ask(self) -> None:
        """Ask all present workers.

        Raises:
            AbsentError: None of them may work.
            TransientError: The folder cannot be written to.
        """
        if self._sign:
            with storage_errors(self._sign.parent):
                self._sign.write_text(self._question[2])
        answers = self._refusals(None)
        failed = {address: answer for address, answer in answers.items() if answer is not None}
        if failed and failed.keys() == answers.keys():
            address, (reason, remedy) = next(iter(failed.items()))
            raise AbsentError(address, reason, remedy)
        for address, (reason, remedy) in failed.items():
            self.refuse(address, reason, remedy)

    def ask_again(self) -> None:
        """Ask the refused workers again: a folder may be back, or a new worker may have the same address."""
        answers = self._refusals([*self._client.nthreads().keys() & self.refused])
        with self._lock:
            self.refused -= {address for address, answer in answers.items() if answer is None}

    def refuse(self, address: str, reason: str, remedy: str) -> None:
        """Give a worker no more work; print a warning, once."""
        with self._lock:
            known = address in self.refused
            self.refused.add(address)
        if not known:
            say(f"warning: {address}: {reason}; {remedy}")

    def before(self, function: Callable[..., Any], calls: Calls) -> tuple[Callable[..., Any], Calls]:
        """Wrap the calls of a function: each first asks its worker, and returns a `question.Answer`."""
        asked = {"source": _SOURCE, "question": self._question, "function": cloudpickle.dumps(function)}
        return eval, [(_WORK, asked | {"arguments": cloudpickle.dumps(call)}) for call in calls]

    def close(self) -> None:
        """Delete the file that workers had to find in the folder."""
        if self._sign:
            self._sign.unlink(missing_ok=True)

    def _refusals(self, workers: list[str] | None) -> dict[str, tuple[str, str] | None]:
        """Return reason and remedy of each refusal by address of the worker; None for a worker that may work."""
        asked = {"source": _SOURCE, "question": self._question}
        answers = self._client.run(eval, _ASK, asked, workers=workers, on_error="return")
        for address, answer in answers.items():
            if isinstance(answer, Exception):
                reason = f"this worker cannot be asked ({type(answer).__name__}: {answer})"
                answers[address] = (reason, "start it again")
        return dict(answers)


class Share(NamedTuple):
    """The division of a machine among its workers."""

    workers: int  # number of workers, beside those with a GPU
    threads: int  # threads that the work on one image may use
    memory: int  # bytes of a worker, or of one thread of a worker with a GPU
    gpu_threads: int  # threads of each worker with a GPU
    max_pixels: int  # pixels of the largest image that fits into ``memory``


class Dask:
    """A connected cluster.

    Args:
        client: The client of the cluster.
        machine: Level and format of the log of workers.
        share: The division of the machine among the workers.
        gpus: Number of workers with a GPU.
        admission: The check of workers that were started elsewhere.
    """

    def __init__(
        self, client: Client, machine: Machine, share: Share, *, gpus: int, admission: Admission | None = None
    ) -> None:
        self.client = client
        self.admission = admission
        self._machine = machine
        self.threads = share.threads  # that the work on one image may use
        self.max_pixels = share.max_pixels  # of the largest image that fits into a worker's share of memory
        self.workers = share.workers + gpus  # number of workers in all
        self.gpus = gpus
        self.gpu_slots = share.gpu_threads  # the resource GPU of a worker: a task that takes all of it runs alone
        self.dashboard: str = client.dashboard_link  # address of Dask's own page about the cluster
        self._watch = Watch(client, self._is_any_able)

    def close(self) -> None:
        """Cancel the work in progress; its images do not count as failures."""
        self._watch.end()

    def map(
        self, name: str, function: ImageFunction, resources: Resources, work: Sequence[tuple[ImageRef, Any]]
    ) -> Iterator[tuple[ImageRef, Any]]:
        """Call a function on every image, in the order of ``work``; yield each image with its result once it is there.

        A result may be an `ImageError`. The log shows ``name``; each call needs ``resources``.

        Raises:
            CancelledError: The run has ended meanwhile.
        """
        run = uuid4().hex[:8]
        recorded, calls = self._asking(partial(_recorded, name, function, self._machine, flow_run.name), work)
        futures = self.client.map(
            recorded,
            *([call[index] for call in calls] for index in range(2)),
            # Dask computes tasks of equal priority in the order of their keys.
            key=[f"{name}-{index:06d}-{image.id}-{run}" for index, (image, _) in enumerate(work)],
            retries=_RETRIES,
            resources=resources or None,
            pure=False,
        )
        waiting = {future.key: (image, call) for future, (image, _), call in zip(futures, work, calls, strict=True)}
        with self._watch.over(futures, resources):
            coming = as_completed(futures, with_results=True, raise_errors=False)
            for future, returned in (done for batch in coming.batches() for done in batch):
                self._watch.check()
                image, call = waiting.pop(future.key)
                if future.status == "error":
                    _, result, _ = returned  # the type of the error, the error, the traceback
                elif future.status != "finished":  # cancelled, perhaps after it had finished
                    result = CancelledError()
                else:
                    refused, result = returned if self.admission else (None, returned)
                    if refused:
                        again = self._passed_on(refused, recorded, call, resources, retries=_RETRIES)
                        waiting[again.key] = image, call
                        futures.append(again)
                        coming.add(again)
                        future.release()
                        continue
                future.release()  # else Dask repeats finished work when its worker ends
                yield image, error_of(image.path, result) if isinstance(result, BaseException) else result

    def call(self, function: Callable[..., Any], *arguments: Any, resources: Resources) -> None:
        """Call a function on one worker, leave its result there, and raise what the function raises."""

        def without_result() -> None:
            function(*arguments)

        self.follow(without_result, resources=resources, on_second=lambda: None)

    def follow(
        self, function: Callable[..., Any], *arguments: Any, resources: Resources, on_second: Callable[[], None]
    ) -> Any:
        """Call a function on one worker, call ``on_second`` each second meanwhile, and return its small result.

        When the worker dies, another worker calls the function again.

        Raises:
            TransientError: All workers have gone, or the function took down several of them.
            Exception: Any error of the function.
        """
        called, [call] = self._asking(partial(call_on_worker, function), [arguments])
        futures = [self._submit(called, call, resources)]
        try:
            with self._watch.over(futures, resources):
                while True:
                    while not futures[-1].done():
                        with contextlib.suppress(TimeoutError):
                            futures[-1].result(timeout=1)
                        on_second()
                    result = futures[-1].result()
                    if self.admission is None:
                        return result
                    refused, result = result
                    if not refused:
                        return result
                    futures.append(self._passed_on(refused, called, call, resources))
        except (CancelledError, KilledWorker, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not is_broken(error):
                raise
            raise error_of("the computation", error) from None

    def _asking(self, function: Callable[..., Any], calls: Calls) -> tuple[Callable[..., Any], Calls]:
        """Make each call of a function ask its worker first, if the workers were started elsewhere."""
        return self.admission.before(function, calls) if self.admission else (function, calls)

    def _submit(
        self, function: Callable[..., Any], call: tuple[Any, ...], resources: Resources, **options: Any
    ) -> Future[Any]:
        return self.client.submit(function, *call, resources=resources or None, pure=False, **options)

    def _passed_on(
        self,
        refused: tuple[str, str, str],
        function: Callable[..., Any],
        call: tuple[Any, ...],
        resources: Resources,
        **options: Any,
    ) -> Future[Any]:
        """Submit a call again, to other workers, because a worker has refused it, for example one that joined later."""
        assert self.admission is not None
        self.admission.refuse(*refused)
        able = self._able(resources)
        # Work that needs resources must stay on these workers: others that Dask would choose may lack the resource.
        others = {"workers": able or None, "allow_other_workers": bool(able) and not resources}
        return self._submit(function, call, resources, **others, **options)

    def _able(self, resources: Resources) -> list[str]:
        """List the addresses of the workers that may do work which needs these resources."""
        there = self.client.nthreads().keys() - (self.admission.refused if self.admission else set())
        known = self.client.scheduler_info(n_workers=-1)["workers"]
        return [name for name in there & known.keys() if resources.keys() <= known[name]["resources"].keys()]

    def _is_any_able(self, resources: Resources) -> bool:
        """Check whether a worker may do work which needs these resources; if none, first ask refused workers again."""
        able = self._able(resources)
        if not able and self.admission:
            self.admission.ask_again()
            able = self._able(resources)
        return bool(able)


def device_of(machine: Machine, dask: Dask) -> str:
    """Choose where the networks of a run compute: ``cuda`` or ``cpu``.

    Raises:
        AbsentError: ``--device cuda``, but no worker has a GPU.
    """
    if machine.device == "cuda" and not dask.gpus:
        raise AbsentError("--device", "cuda, but no worker declares a GPU", "start one with --resources GPU=1")
    return "cuda" if dask.gpus and machine.device != "cpu" else "cpu"


def _recorded(
    name: str, function: ImageFunction, machine: Machine, run: str | None, image: ImageRef, about: Any
) -> Any:
    """Call a function on an image, and log the outcome.

    Return an error that would come again; raise any other error, so that Dask tries again.
    """
    configure(machine.log_level, machine.log_format)
    log = partial(record, logging.DEBUG, run=run, shard=f"{image.shard:05d}", image=image.id, stage=name)
    started = time.perf_counter()
    try:
        result = call_on_worker(function, image, about)
    except DesraError as error:
        log(f"failed: {printable(error)}")
        if isinstance(error, TransientError) and not isinstance(error, TooLargeError):
            raise
        return error
    log(f"done: {printable(image.names[0])}", seconds=round(time.perf_counter() - started, 3))
    return result
