"""Connect a run to Dask: to a given scheduler, to the workers of desra serve, or to workers of the run's own."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from ssl import SSLError
from typing import Any

from distributed import Client
from distributed.comm.core import CommClosedError, connect
from distributed.core import send_recv
from distributed.security import Security
from distributed.system import MEMORY_LIMIT
from distributed.utils import LoopRunner

from desra_core.errors import AbsentError, TransientError, UsageError
from desra_core.settings import Machine
from tasks.dask_cluster import (
    NETWORK_WORKER_BYTES,
    WORKER_BYTES,
    Embedded,
    Share,
    largest_image,
    local_cluster,
    share_of,
    threads_of,
    visible_gpus,
)
from tasks.dask_map import Admission, Dask
from tasks.logs import configure, say

_CONNECT_SECONDS = 10
_RESTART_SECONDS = 60
_AWAIT_SECONDS = 60


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

    Args:
        machine: Number and size of the workers; ignored by a scheduler that runs elsewhere.
        folder: The folder that workers write to, if they do.
        networks: Whether workers will run networks, and need memory for that beside their images.
        gpus: Number of additional local workers that own one GPU each and declare the resource ``GPU: 1`` per thread.
        device: The one GPU to use, of `visible_gpus`.
        alone: Start workers for this run even where desra serve has a cluster.
        most_pixels: Returns the pixels of the largest image to come; not called where a scheduler runs elsewhere. For
            large images this machine gets fewer and larger workers. If the image does not fit into the workers of desra
            serve, these are restarted to free their memory, and the run starts workers of its own.

    Raises:
        AbsentError: The scheduler does not answer, or it has no workers, no worker with this version of desra that
            sees the folder, or fewer GPUs than desra serve has started.
        UsageError: Workers have too little memory.
    """
    configure(machine.log_level, machine.log_format)
    own = NETWORK_WORKER_BYTES if networks else WORKER_BYTES
    pixels = 0 if machine.scheduler else most_pixels()
    embedded = None if machine.scheduler or alone else Embedded.find()
    if embedded:  # its bounds hold where the run has none of its own
        bounds = {name: getattr(machine, name) or getattr(embedded.machine, name) for name in ("workers", "memory")}
        machine = machine.model_copy(update=bounds)
    if address := machine.scheduler or (embedded.address if embedded else None):
        with (
            connected(address, embedded.key if embedded else None) as client,
            contextlib.closing(Admission(client, folder)) as admission,
        ):
            admission.ask()
            if embedded:
                executing = client.run(lambda dask_worker: len(dask_worker.state.executing))
                if any(executing.values()):  # left by a killed run, for the workers serve one run at a time
                    _restart(client)
                _await_workers(client, embedded.gpus)
            dask = _elsewhere(address, client, machine, own, admission, embedded)
            if not embedded or dask.max_pixels >= min(pixels, share_of(machine, own, gpus, pixels).max_pixels):
                with contextlib.closing(dask):
                    yield dask
                return
            _restart(client)  # to free their memory for workers of the run's own, which can take larger images
    share = share_of(machine, own, gpus, pixels)
    if (usual := share_of(machine, own, gpus)) != share:
        threads = f" and {share.gpu_threads} threads per GPU" if gpus else ""
        instead = f" instead of {usual.workers}{f' and {usual.gpu_threads}' if gpus else ''}"
        say(f"{share.workers} workers{threads}{instead}, for images of up to {pixels / 1e6:.0f} megapixels")
    with (
        local_cluster(share, visible_gpus()[:gpus] if device is None else [device]) as (_, client),
        contextlib.closing(Dask(client, machine, share, gpus=gpus)) as dask,
    ):
        yield dask


def _elsewhere(
    address: str, client: Client, machine: Machine, own: int, admission: Admission, embedded: Embedded | None
) -> Dask:
    """Describe the workers of a cluster that was started elsewhere or by desra serve; raises as `open_dask`."""
    workers = [worker for name, worker in _workers(client).items() if name not in admission.refused]
    if not workers:
        raise AbsentError(address, "has no workers", "start some with dask worker")
    memory = min((worker["memory_limit"] or MEMORY_LIMIT) // worker["nthreads"] for worker in workers)
    slots = [worker["resources"]["GPU"] for worker in workers if "GPU" in worker["resources"]]
    without_gpu = len(workers) - len(slots)
    threads = threads_of(without_gpu) if embedded else 1
    share = Share(without_gpu, threads, memory, min(slots, default=0), largest_image(memory, own))
    dask = Dask(client, machine, share, gpus=len(slots), admission=admission)
    if embedded:
        dask.dashboard = embedded.dashboard
    return dask


def release_embedded() -> None:
    """Restart the workers of desra serve, if there are any, so that they free their memory, on GPUs too."""
    if embedded := Embedded.find():
        with connected(embedded.address, embedded.key) as client:
            _restart(client)


def _await_workers(client: Client, gpus: int) -> None:
    """Wait up to a minute for a worker and for ``gpus`` workers with a GPU, while dead workers are being restarted."""
    deadline = time.monotonic() + _AWAIT_SECONDS
    while True:
        there = ["GPU" in worker["resources"] for worker in _workers(client).values()]
        if there and sum(there) >= gpus:
            return
        if time.monotonic() >= deadline:
            if not there:
                return  # `_elsewhere` raises where there are no workers
            reason = f"are {sum(there)}, where desra serve has started {gpus}"
            raise AbsentError("the workers with a GPU", reason, "see nvidia-smi, and start desra serve again")
        time.sleep(1)


def _workers(client: Client) -> dict[str, dict[str, Any]]:
    """Return the scheduler's description of each worker, by address."""
    return dict(client.scheduler_info(n_workers=-1)["workers"])


def _restart(client: Client) -> None:
    try:
        client.restart(timeout=_RESTART_SECONDS)
    except TimeoutError:
        raise TransientError("the Dask workers", "do not restart", "run again, or start desra serve again") from None


def connected(address: str, key: str | None = None) -> Client:
    """Connect to a scheduler, by Dask's own settings, or by the key file of a cluster of desra serve.

    The scheduler is asked before a client is made: a client without a connection prints errors when Python ends.
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
    """Make the error for a scheduler that does not answer; TLS on one side alone raises several kinds of errors."""
    tls = address.startswith("tls://")
    if tls and isinstance(error, TypeError):
        remedy = "set DASK_DISTRIBUTED__COMM__TLS__CA_FILE, …__TLS__CLIENT__KEY and …__TLS__CLIENT__CERT"
        return AbsentError(address, "asks for TLS, and no certificates are configured here", remedy)
    if tls and isinstance(error, ValueError | SSLError | CommClosedError):
        reason = f"no connection by TLS ({type(error).__name__})"
        return AbsentError(address, reason, "give its tcp:// address if it has no TLS, or certificates that it trusts")
    if isinstance(error, CommClosedError):
        remedy = "give its tls:// address, with certificates in Dask's configuration"
        return AbsentError(address, "the server there closes the connection, as a scheduler with TLS does", remedy)
    if isinstance(error, RuntimeError):
        return AbsentError(address, f"is refused ({error})", "give its tls:// address, or change that configuration")
    if isinstance(error, ValueError):
        return UsageError(address, f"is no address of a scheduler ({error})", "give one such as tcp://HOST:8786")
    reason = f"no Dask scheduler answers ({type(error).__name__})"
    return AbsentError(address, reason, "start it, or leave --scheduler out to compute on this machine")
