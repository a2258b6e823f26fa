"""Connect a run to Dask workers: of a given scheduler or cluster, of desra serve, or workers for this run alone.

This module starts the workers on this machine, for one run or for desra serve, and sets their number, memory and GPUs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from dask import config as dask_config
from dask.system import cpu_count
from dask.utils import parse_bytes
from distributed import Client, Nanny, Scheduler, SpecCluster
from distributed.comm.core import connect
from distributed.core import Status, send_recv
from distributed.security import Security
from distributed.system import MEMORY_LIMIT
from distributed.utils import LoopRunner
from distributed.versions import VersionMismatchWarning
from pydantic import BaseModel
from tornado.routing import PathMatches, Rule
from tornado.web import HTTPError, RequestHandler

from desra_core.errors import AbsentError, TransientError, UsageError, described
from desra_core.files import write_secret
from desra_core.settings import Machine
from desra_core.workspace.products import PRODUCTS
from tasks import question
from tasks.cluster_file import Reached, opened_cluster
from tasks.dask_map import Admission, Dask, Share
from tasks.logs import configure, say

# The memory in bytes that any stage takes per pixel of a 16-bit colour pair: measured by `make bench`, with a margin.
BYTES_PER_PIXEL = 40
# The memory of a worker without an image, in bytes; with networks, also PyTorch, weights and a batch of windows.
WORKER_BYTES = 300_000_000
NETWORK_WORKER_BYTES = 1_600_000_000
# What OpenVINO takes more than PyTorch, most of it for a window of RRDBNet.
OPENVINO_BYTES = 900_000_000

# A worker with a GPU has at least so many threads, unless images are large: one image is on the device, the others are
# read, compared and written. With more cores, the workers with GPUs share half of them.
GPU_THREADS = 3

_MEMORY_SHARE = 0.8  # of this machine's memory, for all workers together
# The share of its memory limit that a worker may plan to use: Dask pauses a worker at 80 % of the limit.
_USABLE_SHARE = 0.75
# By default only so many workers start that each has memory for an image of at least this many pixels.
USUAL_PIXELS = 2**24
_MOST_GPUS = 64

_CONNECT_SECONDS = 10
_GIVE_UP_SECONDS = 10
_RESTART_SECONDS = 60
_AWAIT_SECONDS = 60
# Workers that start together come within such a time of each other.
_NEXT_WORKER_SECONDS = 2


class ServedCluster(BaseModel):
    """The cluster of desra serve, given to each run as JSON in its environment, since deployments outlive a cluster."""

    VARIABLE: ClassVar[str] = "DESRA_SCHEDULER"

    address: str  # of the scheduler
    gpus: int  # a run waits until all of them have a worker
    machine: Machine  # its limits hold also for workers that a run starts for itself
    key: str  # the file with the key of the cluster
    dashboard: str

    @property
    def security(self) -> Security:
        """The certificates of a client."""
        return Security(require_encryption=True, tls_ca_file=self.key, tls_client_cert=self.key)

    @classmethod
    def find(cls) -> ServedCluster | None:
        """Read the environment of this process; None for a run that desra serve did not start."""
        return cls.model_validate_json(given) if (given := os.environ.get(cls.VARIABLE)) else None


@contextlib.contextmanager
def open_dask(
    machine: Machine,
    *,
    folder: Path | None = None,
    networks: bool = False,
    openvino: bool = False,
    gpus: int = 0,
    device: str | None = None,
    alone: bool = False,
    most_pixels: Callable[[], int] = lambda: 0,
    files: Callable[[], Iterable[Path]] = tuple,
) -> Iterator[Dask]:
    """Connect to a given scheduler or that of desra serve, or start workers for the run and stop them at the end.

    Args:
        machine: Number and memory of the workers; ignored where a scheduler or a cluster is given.
        folder: The folder that workers write to, if they do.
        networks: Whether workers will run networks, and need memory for that beside their images.
        openvino: Whether these networks run by OpenVINO.
        gpus: Number of additional local workers that own one GPU each and declare the resource ``GPU: 1`` per thread.
        device: The one GPU to use, of `visible_gpus`, for one task at a time, which may use all cores.
        alone: Start workers for this run even where desra serve has a cluster.
        most_pixels: Returns the pixels of the largest image to come; not called where a scheduler or cluster is given.
            For large images, fewer workers with more memory each are started. If that image does not fit into a worker
            of desra serve, the workers of desra serve restart, which frees memory, and the run starts its own workers.
        files: Returns files that workers read, some of many; not called where workers are started for this run.

    Raises:
        AbsentError: The scheduler does not answer, or it has no workers, no worker that `Admission` admits, or fewer
            GPUs than desra serve has started.
        UsageError: Workers have too little memory.
    """
    configure(machine.log_level, machine.log_format)
    base_bytes = NETWORK_WORKER_BYTES + openvino * OPENVINO_BYTES if networks else WORKER_BYTES
    pixels = 0 if machine.elsewhere else most_pixels()
    served = None if machine.elsewhere or alone else ServedCluster.find()
    if served:  # the limits of desra serve hold where the run sets none
        bounds = {name: getattr(machine, name) or getattr(served.machine, name) for name in ("workers", "memory")}
        machine = machine.model_copy(update=bounds)
    with contextlib.ExitStack() as stack:
        if reached := _reached(machine, served, stack):
            client = stack.enter_context(contextlib.closing(connected(reached.address, reached.security)))
            uses_gpus = networks and machine.device != "cpu"
            admission = stack.enter_context(contextlib.closing(Admission(client, folder, files, gpu=uses_gpus)))
            if served:
                executing = client.run(lambda dask_worker: len(dask_worker.state.executing))
                if any(executing.values()):  # a killed run left this work: the workers serve one run at a time
                    _restart(client)
                _await_workers(client, served.gpus)
            if reached.patience is not None:
                _await_first(client, machine, reached.patience)
            admission.ask()
            dask = _described(reached, client, machine, base_bytes, admission, served)
            # They take the largest image, or workers of this run alone could not take a larger one either.
            if not served or dask.max_pixels >= min(pixels, share_of(machine, base_bytes, gpus, pixels).max_pixels):
                stack.enter_context(contextlib.closing(dask))
                yield dask
                return
            _restart(client)  # frees memory for the run's own workers, which can take larger images
    share = share_of(machine, base_bytes, gpus, pixels)
    if (usual := share_of(machine, base_bytes, gpus)) != share:
        threads = f" and {share.gpu_threads} threads per GPU" if gpus else ""
        instead = f" instead of {usual.workers}{f' and {usual.gpu_threads}' if gpus else ''}"
        say(f"{share.workers} workers{threads}{instead}, for images of up to {pixels / 1e6:.0f} megapixels")
    if device is not None:
        share = share._replace(threads=threads_of(1))
    with (
        _local_cluster(share, visible_gpus()[:gpus] if device is None else [device], networks=networks) as (_, client),
        contextlib.closing(Dask(client, machine, share, gpus=gpus)) as dask,
    ):
        yield dask


class Opening:
    """Open Dask on another thread while this one does something else; a ``with`` block waits for it and closes it.

    Args:
        open_context: Returns a context manager as `open_dask` does; its errors are those of the block.
    """

    def __init__(self, open_context: Callable[[], AbstractContextManager[Dask]]) -> None:
        self._stack = contextlib.ExitStack()
        self._dask: Future[Dask] = Future()
        # A daemon, so that a process that is stopped need not wait for it.
        threading.Thread(target=self._open, args=[open_context], name="dask", daemon=True).start()

    def _open(self, open_context: Callable[[], AbstractContextManager[Dask]]) -> None:
        try:
            self._dask.set_result(self._stack.enter_context(open_context()))
        except BaseException as error:  # noqa: BLE001 - raised by the block
            self._dask.set_exception(error)

    def __enter__(self) -> Dask:
        return self._dask.result()

    def __exit__(self, *stopped: Any) -> None:
        """Close Dask, where that has not been done; give up waiting for it after some seconds."""
        if wait([self._dask], timeout=_GIVE_UP_SECONDS).done:
            self._stack.__exit__(*stopped)  # close() would cut what stopped the block from an error of the closing


def _reached(machine: Machine, served: ServedCluster | None, stack: contextlib.ExitStack) -> Reached | None:
    """Find the scheduler of a run that starts no workers of its own; the stack stops a cluster."""
    if machine.cluster:
        return stack.enter_context(opened_cluster(machine.cluster))
    if machine.scheduler:
        return Reached(machine.scheduler, None, None)
    return Reached(served.address, served.security, None) if served else None


def _described(
    reached: Reached,
    client: Client,
    machine: Machine,
    base_bytes: int,
    admission: Admission,
    served: ServedCluster | None,
) -> Dask:
    """Describe the workers of a cluster that was started elsewhere or by desra serve; raises as `open_dask`."""
    known = client.scheduler_info(n_workers=-1)["workers"]
    known = {name: worker for name, worker in known.items() if name in admission.admitted}
    workers = known.values()
    if not workers:
        raise AbsentError(reached.address, "has no workers", "start some with dask worker")
    unlimited = [name for name, worker in known.items() if not worker["memory_limit"]]
    # Workers without a limit share the memory of their machine.
    granted = client.run(granted_memory, workers=unlimited) if unlimited else {}
    hosts = Counter(worker["host"] for worker in workers)
    memory = min(
        (worker["memory_limit"] or granted[name] // hosts[worker["host"]]) // worker["nthreads"]
        for name, worker in known.items()
    )
    slots = [worker["resources"]["GPU"] for worker in workers if "GPU" in worker["resources"]]
    most = max((worker["nthreads"] for worker in workers if "GPU" not in worker["resources"]), default=1)
    if most > 1:
        share_in_words = f"a worker has {most} threads, each with 1/{most} of its memory; one thread each is safer"
        say(f"warning: {machine.cluster or reached.address}: {share_in_words}")
    without_gpu = len(workers) - len(slots)
    threads = threads_of(without_gpu + int(sum(slots))) if served else 1
    share = Share(without_gpu, threads, memory, min(slots, default=0), _largest_image(memory, base_bytes))
    dask = Dask(client, machine, share, gpus=len(slots), admission=admission, patience=reached.patience)
    if served:
        dask.dashboard = served.dashboard
    return dask


def release_served() -> None:
    """Restart the workers of desra serve, if there are any, so that they free their memory, on GPUs too."""
    if served := ServedCluster.find():
        with connected(served.address, served.security) as client:
            _restart(client)


def _await_workers(client: Client, gpus: int) -> None:
    """Wait up to a minute for a worker and for ``gpus`` workers with a GPU, while dead workers are being restarted."""
    deadline = time.monotonic() + _AWAIT_SECONDS
    while True:
        workers = client.scheduler_info(n_workers=-1)["workers"].values()
        there = ["GPU" in worker["resources"] for worker in workers]
        if there and sum(there) >= gpus:
            return
        if time.monotonic() >= deadline:
            if not there:
                return  # `_described` raises where there are no workers
            reason = f"are {sum(there)}, where desra serve has started {gpus}"
            raise AbsentError("the workers with a GPU", reason, "see nvidia-smi, and start desra serve again")
        time.sleep(1)


def _await_first(client: Client, machine: Machine, patience: float) -> None:
    """Wait for the first worker of a cluster that was started for this run, and a little for the others."""
    if not client.nthreads():
        say(f"waiting for the workers of {machine.cluster}")
    try:
        client.wait_for_workers(1, timeout=patience)
    except TimeoutError:
        reason = f"none of its workers has come for {timedelta(seconds=patience)}"
        raise AbsentError(machine.cluster, reason, "look at their logs, or raise wait in the file") from None
    there = 0
    while there < (there := len(client.nthreads())):
        time.sleep(_NEXT_WORKER_SECONDS)


def _restart(client: Client) -> None:
    try:
        client.restart(timeout=_RESTART_SECONDS)
    except TimeoutError:
        raise TransientError("the Dask workers", "do not restart", "run again, or start desra serve again") from None


def connected(address: str, security: Security | None = None) -> Client:
    """Connect to a scheduler, with some certificates or with those of Dask's configuration.

    Try the connection before a client is made: a client without a connection prints errors when Python ends.
    """
    runner = LoopRunner()
    runner.start()
    try:
        runner.run_sync(_try_connection, address, security or Security())
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise _unanswered(address, error) from None
    finally:
        runner.stop()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VersionMismatchWarning)  # `Admission` names workers of other versions
        return Client(address, timeout=_CONNECT_SECONDS, security=security)


async def _try_connection(address: str, security: Security) -> None:
    comm = await connect(address, timeout=_CONNECT_SECONDS, **security.get_connection_args("client"))
    there = await send_recv(comm, op="identity", close=True)
    if "workers" not in there:
        remedy = "give that of the scheduler that it connects to"
        raise UsageError(address, f"is the address of a {there['type'].lower()}, not of a scheduler", remedy)


def _unanswered(address: str, error: Exception) -> UsageError:
    """Make the error for a scheduler that does not answer; TLS on one side only shows as several kinds of errors."""
    if isinstance(error, ValueError) and not address.startswith("tls://"):
        return UsageError(address, f"is no address of a scheduler ({error})", "give one such as tcp://HOST:8786")
    remedy = (
        "start it, give tls:// or tcp:// as it has, with certificates in Dask's configuration or in the file of "
        "--cluster, or leave both out to compute on this machine"
    )
    return AbsentError(address, f"no Dask scheduler answers ({described(error)})", remedy)


def share_of(machine: Machine, base_bytes: int, gpus: int, pixels: int = 0) -> Share:
    """Divide this machine among workers: fewer of them where images are large.

    Args:
        machine: Number and memory of the workers, where given.
        base_bytes: Bytes that each worker holds without an image.
        gpus: Number of additional workers with a GPU.
        pixels: Pixels of the largest image to come.

    Raises:
        UsageError: The workers have too little memory.
    """
    all_memory = MEMORY_LIMIT * _MEMORY_SHARE
    # The number of images that fit into memory together. Each needs a worker, or a thread of a worker with a GPU.
    images = int(all_memory * _USABLE_SHARE / (base_bytes + max(pixels, USUAL_PIXELS) * BYTES_PER_PIXEL))
    # Memory for one worker without a GPU stays free.
    gpu_threads = GPU_THREADS
    if gpus:
        gpu_threads = max(1, min(max(GPU_THREADS, _cores() // (2 * gpus)), (images - 1) // gpus))
    on_gpus = gpu_threads * gpus
    workers = machine.workers or max(1, min(_cores() - on_gpus, images - on_gpus))
    memory = parse_bytes(machine.memory) if machine.memory else int(all_memory / (workers + on_gpus))
    return Share(workers, threads_of(workers + on_gpus), memory, gpu_threads, _largest_image(memory, base_bytes))


def _largest_image(memory: int, base_bytes: int) -> int:
    """Return the pixels of the largest image that fits into ``memory`` bytes beside a worker's ``base_bytes``."""
    usable = int(_USABLE_SHARE * memory)
    if usable <= base_bytes:
        remedy = f"it needs more than {int(base_bytes / _USABLE_SHARE) // 10**6} MB; raise it or use fewer --workers"
        raise UsageError("--memory", f"is {memory // 10**6} MB for a worker or a thread of it", remedy)
    return (usable - base_bytes) // BYTES_PER_PIXEL


def _cores() -> int:
    """Return the cores that this process may use: those of its affinity, or fewer where a container has a quota."""
    return cpu_count()


def threads_of(workers: int) -> int:
    """Return the cores for each of so many workers; a thread of a worker with a GPU counts as a worker."""
    return max(1, _cores() // max(1, workers))


def granted_memory() -> int:
    """Return the bytes of memory that the machine, the control group and the limits of this process grant it."""
    return MEMORY_LIMIT


def visible_gpus() -> list[str]:
    """List the GPUs of this machine as ``CUDA_VISIBLE_DEVICES`` names them; without that variable, list 0 to 63.

    The machine may have fewer GPUs.
    """
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(index) for index in range(_MOST_GPUS)] if given is None else [part for part in given.split(",") if part]


def gpus_wanted(networks: bool, machine: Machine) -> int:
    """Return the number of GPUs that a run uses: all of this machine, if it runs networks and may use them.

    Raises:
        UsageError: ``--device cuda`` on a machine where PyTorch sees no GPU.
    """
    if not networks or machine.device == "cpu" or machine.elsewhere:
        return 0
    import torch

    count = torch.cuda.device_count()
    if machine.device == "cuda" and not count:
        raise UsageError("--device", "cuda, but PyTorch sees no GPU here", "use --device auto or cpu")
    return count


@contextlib.contextmanager
def _local_cluster(
    share: Share, gpus: list[str], *, networks: bool, dashboard_port: int = 0
) -> Iterator[tuple[SpecCluster, Client]]:
    """Start workers on this machine, also one for each of the ``gpus``; yield the cluster and a connection to it."""
    # Other users of this machine must reach neither the scheduler, which would run any code, nor the dashboard.
    tls: dict[str, Any] = {"security": Security.temporary(), "protocol": "tls://"}
    hidden = secrets.token_urlsafe(32)
    dashboard = {"dashboard_address": f"127.0.0.1:{dashboard_port}", "http_prefix": f"/{hidden}"}
    # These replace the variables that Dask sets. With Dask's malloc trim threshold, the system maps every buffer
    # anew, and computing takes half as long again.
    libraries = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OPENCV_FOR_THREADS_NUM")
    environment = dict.fromkeys(libraries, str(share.threads))
    # Let PyTorch ask for huge pages: else the page faults of its large buffers take longer than some convolutions.
    environment["THP_MEM_ALLOC_ENABLE"] = "1"
    configured = {
        "distributed.nanny.pre-spawn-environ": environment,
        # Else Dask gives up a worker that is away 15 s after any of its deaths, though its nanny starts it again.
        "distributed.deploy.lost-worker-timeout": "1 day",
        # Samples of each worker's stack, which only Dask's profile page shows, take 50 MB a worker after 17 minutes.
        "distributed.worker.profile.enabled": False,
        "distributed.dashboard.link": f"{{scheme}}://{{host}}:{{port}}/{hidden}/status",
    }
    with (
        dask_config.set(configured),
        _started(
            workers=_local_workers(share, gpus, tls),
            scheduler={"cls": Scheduler, "options": {"host": "127.0.0.1"} | dashboard | tls},
            silence_logs=logging.CRITICAL,
            security=tls["security"],
        ) as cluster,
        contextlib.closing(Client(cluster)) as client,  # which as a context manager could not end on another thread
    ):
        # Without this rule, the scheduler's other pages would redirect to the hidden path and so reveal it.
        other_paths = Rule(PathMatches(rf"/(?!{hidden}/).*"), _Nothing)
        cluster.scheduler.http_application.default_router.rules.insert(0, other_paths)
        client.register_worker_callbacks(question.prepare_worker)
        client.run(_import_stages, networks, wait=False, on_error="ignore")
        yield cluster, client


def _started(**options: Any) -> SpecCluster:
    """Start a cluster on this machine; raise `TransientError` where a worker ends while it starts."""
    try:
        return SpecCluster(**options)
    except RuntimeError as error:
        reason = f"do not start ({described(error)})"
        raise TransientError(
            "the Dask workers", reason, "run again; if it stays, raise --memory or see dmesg"
        ) from None


async def _import_stages(networks: bool) -> None:
    """Import what the first image would have to wait for, once, on a worker that has nothing to do yet.

    The worker takes no images meanwhile, so that no other thread imports at the same time.
    """
    with contextlib.suppress(Exception):  # the first image will tell
        for product in PRODUCTS:
            import_module(f"desra_core.stages.{product.name}")
        if networks:
            import_module("torch")


class _Nothing(RequestHandler):
    """Answer every request with 404."""

    def prepare(self) -> None:
        """Raise 404 before any HTTP method is called. Dask skips Tornado's own `ErrorHandler`."""
        raise HTTPError(404)


class StandingCluster(NamedTuple):
    """Workers on this machine that outlive single runs; ``served`` describes the workers to the runs."""

    cluster: SpecCluster
    served: ServedCluster

    @property
    def environment(self) -> dict[str, str]:
        """The environment variable by which a run finds these workers."""
        return {ServedCluster.VARIABLE: self.served.model_dump_json(exclude_defaults=True)}

    def keep_up(self) -> None:
        """Replace the workers whose nanny has ended; a living nanny restarts its dead worker itself."""
        for name, nanny in list(self.cluster.workers.items()):
            if nanny.status in (Status.closed, Status.failed):
                del self.cluster.workers[name]
        self.cluster.scale(len(self.cluster.worker_spec))


@contextlib.contextmanager
def standing_cluster(machine: Machine, *, gpus: int, key: Path, dashboard_port: int = 0) -> Iterator[StandingCluster]:
    """Start workers on this machine that outlive single runs, which find them by `StandingCluster.environment`.

    Args:
        machine: Number and memory of the workers.
        gpus: As for `open_dask`.
        key: File for the key of the cluster, which only this user may read; it is deleted at the end.
        dashboard_port: Port of Dask's page; if it is 0 or taken, any free port.
    """
    share = share_of(machine, NETWORK_WORKER_BYTES, gpus)
    with _local_cluster(share, visible_gpus()[:gpus], networks=True, dashboard_port=dashboard_port) as (cluster, _):
        security: Any = cluster.security
        write_secret(key, f"{security.tls_client_key}{security.tls_client_cert}")
        try:
            bounds = Machine(workers=machine.workers, memory=machine.memory)
            found = {"address": cluster.scheduler_address, "dashboard": cluster.dashboard_link}
            yield StandingCluster(cluster, ServedCluster(gpus=gpus, machine=bounds, key=str(key), **found))
        finally:
            key.unlink(missing_ok=True)


def _local_workers(share: Share, gpus: list[str], tls: dict[str, Any]) -> dict[str, dict[str, Any]]:
    options = {"host": "127.0.0.1", "dashboard": False, "silence_logs": logging.CRITICAL} | tls

    def worker(threads: int, resources: dict[str, float], visible: str) -> dict[str, Any]:
        own = {"nthreads": threads, "memory_limit": threads * share.memory, "resources": resources}
        return {"cls": Nanny, "options": options | own | {"env": {"CUDA_VISIBLE_DEVICES": visible} if gpus else {}}}

    cpu = {f"cpu-{index}": worker(1, {}, "") for index in range(share.workers)}
    slots = {"GPU": float(share.gpu_threads)}
    return cpu | {f"gpu-{gpu}": worker(share.gpu_threads, slots, gpu) for gpu in gpus}
