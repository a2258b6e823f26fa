"""Spread images over the workers of a Dask cluster, or follow one long call on a worker.

Workers that were started elsewhere work only if they have the desra of the run, its packages, its files and the folder
that it writes to.

Only this module, `tasks.dask_cluster` (starts workers, or connects to them), `tasks.cluster_file` (starts clusters of
any kind), `tasks.lost_workers` and `tasks.question` (checks workers that were started elsewhere) know Dask.
"""

import contextlib
import logging
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import cloudpickle
from distributed import Client, Future, KilledWorker, as_completed
from prefect.runtime import flow_run

from desra_core.errors import AbsentError, DesraError, TooLargeError, TransientError, UsageError, described, printable
from desra_core.files import content_key, scratch_in, storage_errors
from desra_core.gpu import is_broken
from desra_core.planning.plan import PACKAGES
from desra_core.remote import Remote
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
# Workers evaluate these, since their own desra may be of another version. The first two come with the source of
# `tasks.question`: exec defines its functions and returns None, so that "or" goes on to the call.
_SOURCE = Path(question.__file__).read_text("utf-8")
_INTRODUCE = "exec(source) or introduce(**question)"
_ADMIT = "exec(source) or admit(**question)"
# A worker that was not admitted pauses, else it would take and return all work while other workers are busy.
_STRANGER = (
    'lambda *_: __import__("time").sleep(1) or ((__import__("distributed").get_worker().contact_address, "", ""), None)'
)
_WORK = (
    f'getattr(__import__("sys").modules.get("desra_question"), "runs", {{}}).get(run, {_STRANGER})(function, arguments)'
)
_ASK_AGAIN_SECONDS = 10


class Admission:
    """Ask the workers of a cluster, at the beginning and when they join, whether they may work for the run.

    Before each call, a worker that was admitted looks only whether it still sees the folder.

    Args:
        client: The client of the cluster.
        folder: The folder that workers write to, if they do.
        files: Returns files that workers read.
        gpu: Whether the run uses the GPUs that workers declare.
    """

    def __init__(
        self,
        client: Client,
        folder: Path | None,
        files: Callable[[], Iterable[Path]] = tuple,
        *,
        gpu: bool = False,
    ) -> None:
        self._client = client
        self._sign = scratch_in(folder.absolute()) if folder else None
        self._run = uuid4().hex
        self._seen = {"file": str(self._sign) if self._sign else None, "content": self._run}
        self._files = cache(files)
        self._gpu = gpu
        self.admitted: set[str] = set()  # addresses of the workers that may work
        self._told: dict[str, str] = {}  # for which reason a worker was refused; a warning was printed
        self._asked: dict[str, float] = {}  # when each worker was asked last
        self._lock = threading.Lock()

    def ask(self) -> None:
        """Ask all present workers.

        Raises:
            AbsentError: None of them may work.
            TransientError: The folder cannot be written to.
        """
        if self._sign:
            with storage_errors(self._sign.parent):
                self._sign.write_text(self._run)
        refused = self._ask(list(self._client.nthreads()))
        if refused and not self.admitted:
            address, (reason, remedy) = next(iter(refused.items()))
            raise AbsentError(address, reason, remedy)
        for address, (reason, remedy) in refused.items():
            self._warn(address, reason, remedy)

    def ask_again(self) -> None:
        """Ask the workers that are not admitted: a folder may be back, or a new worker may have the same address."""
        self._ask([*self._client.nthreads().keys() - self.admitted])

    def returned(self, address: str, reason: str, remedy: str) -> None:
        """Note that a worker has returned a call, and ask it on another thread, unless that was done just now.

        Args:
            address: The worker.
            reason: The reason, which is empty where the worker has not been admitted.
            remedy: The remedy.
        """
        with self._lock:
            now = time.monotonic()
            recently = now - self._asked.get(address, -_ASK_AGAIN_SECONDS) < _ASK_AGAIN_SECONDS
            if reason or not recently:  # else it has returned the call before it was admitted
                self.admitted.discard(address)
            if not recently:
                self._asked[address] = now
        if reason:
            self._warn(address, reason, remedy)
        if not recently:
            threading.Thread(target=self._introduce_late, args=[address], daemon=True).start()

    def _introduce_late(self, address: str) -> None:
        with contextlib.suppress(OSError, AttributeError, RuntimeError, CancelledError):  # the run has ended
            for refused in self._ask([address]).values():
                self._warn(address, *refused)

    def _warn(self, address: str, reason: str, remedy: str) -> None:
        with self._lock:
            known = self._told.get(address) == reason
            self._told[address] = reason
        if not known:
            say(f"warning: {address}: {reason}; {remedy}")

    def before(self, function: Callable[..., Any], calls: Calls) -> tuple[Callable[..., Any], Calls]:
        """Wrap the calls of a function: each first asks its worker, and returns a `question.Answer`."""
        asked = {"run": self._run, "function": cloudpickle.dumps(function)}
        return eval, [(_WORK, asked | {"arguments": cloudpickle.dumps(call)}) for call in calls]

    def close(self) -> None:
        """Delete the file that workers had to find in the folder."""
        if self._sign:
            self._sign.unlink(missing_ok=True)

    def _ask(self, workers: list[str]) -> dict[str, question.Refusal]:
        """Ask workers and admit them; return reason and remedy of each refusal by address of the worker."""
        known = self._client.scheduler_info(n_workers=-1)["workers"]
        with_gpu = [name for name in workers if self._gpu and "GPU" in known.get(name, {}).get("resources", {})]
        asked = self._seen | {
            "code": question.running_code(),
            "versions": question.running_versions(PACKAGES),
            "files": self._hashes() if workers else {},
        }
        answers = self._run_on([name for name in workers if name not in with_gpu], _INTRODUCE, asked | {"gpu": False})
        answers |= self._run_on(with_gpu, _INTRODUCE, asked | {"gpu": True})
        refused: dict[str, question.Refusal] = {}
        for address, answer in answers.items():
            if isinstance(answer, Exception):
                refused[address] = f"this worker cannot be asked ({described(answer)})", "start it again"
            elif answer[0] is not None:
                refused[address] = answer[0]
            elif answer[1] is not None and not self._arrives(Path(answer[1])):
                self._client.run(os.unlink, answer[1], workers=[address], on_error="ignore")
                reason = f"what this worker writes to {Path(answer[1]).parent} does not arrive here"
                refused[address] = reason, "have the same folder there under the same path"
        passed = [address for address in answers if address not in refused]
        begun = self._run_on(passed, _ADMIT, self._seen | {"run": self._run})
        with self._lock:
            for address in (address for address, answer in begun.items() if not isinstance(answer, Exception)):
                self.admitted.add(address)
                self._told.pop(address, None)
        return refused

    def _run_on(self, workers: list[str], expression: str, asked: dict[str, Any]) -> dict[str, Any]:
        if not workers:
            return {}
        sent = {"source": _SOURCE, "question": asked}
        return dict(self._client.run(eval, expression, sent, workers=workers, on_error="return"))

    def _hashes(self) -> dict[str, tuple[str, bytes]]:
        """Hash the files that workers read, less those that have gone: they are no fault of a worker."""
        found = {}
        for path in self._files():
            with contextlib.suppress(UsageError):
                found[str(path)] = content_key(path), pickle.dumps(path) if isinstance(path, Remote) else b""
        return found

    def _arrives(self, written: Path) -> bool:
        """Check whether a file that a worker has written is here; delete it."""
        with contextlib.suppress(OSError):
            arrived = written.read_text() == self._run
            with contextlib.suppress(OSError):  # it may be another user's
                written.unlink()
            return arrived
        return False


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
        patience: For how many seconds work may wait for a worker; by default for a minute.
    """

    def __init__(
        self,
        client: Client,
        machine: Machine,
        share: Share,
        *,
        gpus: int,
        admission: Admission | None = None,
        patience: float | None = None,
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
        self._watch = Watch(client, self._is_any_able, patience)

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
        """Submit a call again, to other workers, because a worker has returned it, such as one that joined later."""
        assert self.admission is not None
        self.admission.returned(*refused)
        able = self._able(resources)
        # Work that needs resources must stay on these workers: others that Dask would choose may lack the resource.
        others = {"workers": able or None, "allow_other_workers": bool(able) and not resources}
        return self._submit(function, call, resources, **others, **options)

    def _able(self, resources: Resources) -> list[str]:
        """List the addresses of the workers that may do work which needs these resources."""
        there = self.client.nthreads().keys()
        if self.admission:
            there &= self.admission.admitted
        known = self.client.scheduler_info(n_workers=-1)["workers"]
        return [name for name in there & known.keys() if resources.keys() <= known[name]["resources"].keys()]

    def _is_any_able(self, resources: Resources) -> bool:
        """Check whether a worker may do work which needs these resources; if none, first ask the others again."""
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
