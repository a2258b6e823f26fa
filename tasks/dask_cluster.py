"""Dask workers on this machine: how many, how large, with which GPUs; for one run, or for all of desra serve."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dask import config as dask_config
from dask.utils import parse_bytes
from distributed import Client, Nanny, Scheduler, SpecCluster, Worker, WorkerPlugin
from distributed.security import Security
from distributed.system import MEMORY_LIMIT
from tornado.routing import PathMatches, Rule
from tornado.web import HTTPError, RequestHandler

from desra_core.errors import UsageError
from desra_core.files.atomic import write_secret
from desra_core.settings import Machine
from tasks import question

# The largest memory of any stage per pixel of a 16-bit colour pair, measured by `make bench`, with a margin.
BYTES_PER_PIXEL = 40
# The memory of a worker without an image, and of one that runs networks: PyTorch, weights, a batch of windows.
WORKER_BYTES = 300_000_000
NETWORK_WORKER_BYTES = 1_600_000_000

# The most threads of a worker with a GPU: while one image is on the device, others are read, compared and written.
GPU_THREADS = 3

# The environment variable by which a run that names no scheduler finds the cluster of desra serve. It lives as long as
# that cluster, unlike the parameters of a deployment.
EMBEDDED_SCHEDULER = "DESRA_SCHEDULER"
# The number of its GPUs: a run waits for a GPU worker that is restarting, instead of computing on the CPU.
EMBEDDED_GPUS = "DESRA_SCHEDULER_GPUS"
# The --workers and --memory of desra serve: they also bound the workers that a run starts in place of these.
EMBEDDED_MACHINE = "DESRA_SCHEDULER_MACHINE"
# The file with the key of that cluster, and the address of its dashboard.
EMBEDDED_KEY = "DESRA_SCHEDULER_KEY"
EMBEDDED_DASHBOARD = "DESRA_SCHEDULER_DASHBOARD"

_MEMORY_SHARE = 0.8
# Of a worker's limit: Dask pauses a worker at 80 %.
_USABLE_SHARE = 0.75
# The image size that workers get memory for where neither their number nor the size of images is known.
USUAL_PIXELS = 2**24
_MOST_GPUS = 64


class Share(NamedTuple):
    """The share of this machine that each of its workers gets.

    Attributes:
        workers: How many there are, beside those with a GPU.
        threads: That the work on one image may use.
        memory: Of a worker, or of one thread on a GPU, in bytes.
        gpu_threads: Of each worker with a GPU.
    """

    workers: int
    threads: int
    memory: int
    gpu_threads: int


def share_of(machine: Machine, own: int, gpus: int, pixels: int = 0) -> Share:
    """Divide this machine among workers: fewer of them where images are large.

    Args:
        machine: Number and memory of the workers, where given.
        own: Bytes that each holds without an image.
        gpus: Number of additional workers with a GPU.
        pixels: Of the largest image to come.

    Raises:
        UsageError: They have too little memory.
    """
    all_memory = MEMORY_LIMIT * _MEMORY_SHARE
    # How many of the largest images there is memory for at a time.
    at_once = int(all_memory * _USABLE_SHARE / (own + max(pixels, USUAL_PIXELS) * BYTES_PER_PIXEL))
    gpu_threads = max(1, min(GPU_THREADS, (at_once - 1) // gpus)) if gpus else GPU_THREADS
    workers = machine.workers or max(1, min(_cores(), at_once - gpu_threads * gpus))
    memory = parse_bytes(machine.memory) if machine.memory else int(all_memory / (workers + gpu_threads * gpus))
    image_bytes(memory, own)
    return Share(workers, threads_of(workers), memory, gpu_threads)


def image_bytes(memory: int, own: int) -> int:
    """Return the bytes of a worker's memory that are left for an image.

    Args:
        memory: Of a worker, or of one of its threads.
        own: Bytes that it holds without an image.

    Raises:
        UsageError: It leaves nothing.
    """
    usable = int(_USABLE_SHARE * memory)
    if usable <= own:
        remedy = f"it needs more than {int(own / _USABLE_SHARE) // 10**6} MB; raise it or use fewer --workers"
        raise UsageError("--memory", f"is {memory // 10**6} MB for a worker or a thread of it", remedy)
    return usable - own


def threads_of(workers: int) -> int:
    """Return the threads that each of so many workers on this machine may use."""
    return max(1, _cores() // max(1, workers))


def visible_gpus() -> list[str]:
    """List the GPUs of this machine as ``CUDA_VISIBLE_DEVICES`` names them; without it, the numbers 0 to 63.

    The machine may have fewer.
    """
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(index) for index in range(_MOST_GPUS)] if given is None else [part for part in given.split(",") if part]


def gpus_wanted(networks: bool, machine: Machine) -> int:
    """Return the number of GPUs that a run uses: all of this machine, if it runs networks and may use them.

    Raises:
        UsageError: ``--device cuda`` on a machine where PyTorch sees no GPU.
    """
    if not networks or machine.device == "cpu" or machine.scheduler:
        return 0
    import torch

    count = torch.cuda.device_count()
    if machine.device == "cuda" and not count:
        raise UsageError("--device", "cuda, but PyTorch sees no GPU here", "use --device auto or cpu")
    return count


@contextlib.contextmanager
def local_cluster(share: Share, gpus: list[str], dashboard_port: int = 0) -> Iterator[tuple[SpecCluster, Client]]:
    """Start workers on this machine for the block; yields the cluster and a connection to it.

    Other users of this machine reach neither the scheduler, which would run any code, nor the dashboard.

    Args:
        share: The share of each.
        gpus: Those that get a worker of their own, which declares the resource ``GPU: 1`` per thread; of
            `visible_gpus`.
        dashboard_port: As for `standing_cluster`.
    """
    tls: dict[str, Any] = {"security": Security.temporary(), "protocol": "tls://"}
    hidden = secrets.token_urlsafe(32)
    dashboard = {"dashboard_address": f"127.0.0.1:{dashboard_port}", "http_prefix": f"/{hidden}"}
    configured = {
        "distributed.nanny.pre-spawn-environ": _environment(share.threads),
        "distributed.dashboard.link": f"{{scheme}}://{{host}}:{{port}}/{hidden}/status",
    }
    with (
        dask_config.set(configured),
        SpecCluster(
            workers=_local_workers(share, gpus, tls),
            scheduler={"cls": Scheduler, "options": {"host": "127.0.0.1"} | dashboard | tls},
            silence_logs=logging.CRITICAL,
            security=tls["security"],
        ) as cluster,
        Client(cluster) as client,
    ):
        # Other pages of the scheduler would redirect to the hidden path.
        elsewhere = Rule(PathMatches(rf"/(?!{hidden}/).*"), _Nothing)
        cluster.scheduler.http_application.default_router.rules.insert(0, elsewhere)
        client.register_plugin(_Prepared())
        yield cluster, client


class StandingCluster:
    """Workers on this machine that outlive single runs.

    Attributes:
        address: Of the scheduler.
        workers: Number of workers in all.
        gpus: Number of those with a GPU of their own.
    """

    def __init__(self, cluster: SpecCluster, machine: Machine, gpus: int, key: Path) -> None:
        self._cluster = cluster
        self._said = machine.model_dump_json(include={"workers", "memory"}, exclude_none=True)
        self._key = key
        self.address = str(cluster.scheduler_address)
        self.workers = len(cluster.worker_spec)
        self.gpus = gpus

    @property
    def environment(self) -> dict[str, str]:
        """Return the environment variables by which a run finds these workers."""
        return {
            EMBEDDED_SCHEDULER: self.address,
            EMBEDDED_GPUS: str(self.gpus),
            EMBEDDED_MACHINE: self._said,
            EMBEDDED_KEY: str(self._key),
            EMBEDDED_DASHBOARD: str(self._cluster.dashboard_link),
        }

    def keep_up(self) -> None:
        """Start workers again whose nanny has ended too; Dask itself restarts those that died."""
        self._cluster.scale(len(self._cluster.worker_spec))


@contextlib.contextmanager
def standing_cluster(machine: Machine, *, gpus: int, key: Path, dashboard_port: int = 0) -> Iterator[StandingCluster]:
    """Start workers on this machine that outlive single runs; runs find them by `StandingCluster.environment`.

    Args:
        machine: Number and memory of the workers.
        gpus: As for `open_dask`.
        key: File to keep the key of the cluster in, for this user alone; gone at the end.
        dashboard_port: Of Dask's own page about them; another one where it is taken, and by default any.
    """
    share = share_of(machine, NETWORK_WORKER_BYTES, gpus)
    with local_cluster(share, visible_gpus()[:gpus], dashboard_port) as (cluster, _):
        security: Any = cluster.security
        write_secret(key, f"{security.tls_client_key}{security.tls_client_cert}")
        try:
            yield StandingCluster(cluster, machine, gpus, key)
        finally:
            key.unlink(missing_ok=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _environment(threads: int) -> dict[str, str]:
    """Variables that libraries read when a worker starts.

    They replace Dask's own, among which is a trim threshold that makes malloc map and fault in every buffer anew: half
    as much computing time again.
    """
    libraries = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OPENCV_FOR_THREADS_NUM")
    # PyTorch asks for huge pages: else the page faults of its large buffers take longer than some convolutions.
    return dict.fromkeys(libraries, str(threads)) | {"THP_MEM_ALLOC_ENABLE": "1"}


def _local_workers(share: Share, gpus: list[str], tls: dict[str, Any]) -> dict[str, dict[str, Any]]:
    options = {
        "host": "127.0.0.1",
        "dashboard": False,
        "silence_logs": logging.CRITICAL,
    } | tls

    def worker(threads: int, resources: dict[str, float], visible: str) -> dict[str, Any]:
        own = {"nthreads": threads, "memory_limit": threads * share.memory, "resources": resources}
        return {"cls": Nanny, "options": options | own | {"env": {"CUDA_VISIBLE_DEVICES": visible} if gpus else {}}}

    cpu = {f"cpu-{index}": worker(1, {}, "") for index in range(share.workers)}
    slots = {"GPU": float(share.gpu_threads)}
    return cpu | {f"gpu-{gpu}": worker(share.gpu_threads, slots, gpu) for gpu in gpus}


class _Nothing(RequestHandler):
    """Answers 404."""

    def prepare(self) -> None:
        """Raise 404; Tornado calls this before any method."""
        raise HTTPError(404)


class _Prepared(WorkerPlugin):
    """Let a worker ignore Ctrl-C, which is for the driver, and fingerprint its code before that is updated."""

    def setup(self, worker: Worker) -> None:  # noqa: ARG002
        """Do so; Dask calls this when the worker starts."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        question.own()
