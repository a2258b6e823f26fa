"""How a machine is divided among workers, with machines of any size; and how a run is connected to workers."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import cloudpickle
import pytest
from dask import config as dask_config
from distributed import Scheduler, Security, SpecCluster
from distributed.system import MEMORY_LIMIT

from desra_core.errors import AbsentError, UsageError
from desra_core.settings import Machine
from desra_core.workspace.manifest import ImageRef
from desra_core.workspace.products import Record
from tasks import dask_cluster
from tasks.dask_cluster import (
    BYTES_PER_PIXEL,
    GPU_THREADS,
    NETWORK_WORKER_BYTES,
    WORKER_BYTES,
    Opening,
    Share,
    open_dask,
    share_of,
)
from tests.tasks.jobs import done, images, job

GIB = 2**30
# A photo of 12 megapixels, four times as large.
PHOTO = 12_000_000 * 16


def share(monkeypatch: pytest.MonkeyPatch, cores: int, memory: int, gpus: int, pixels: int = 0) -> Share:
    monkeypatch.setattr(dask_cluster, "MEMORY_LIMIT", memory * GIB)
    monkeypatch.setattr(dask_cluster, "_cores", lambda: cores)
    return share_of(Machine(), NETWORK_WORKER_BYTES, gpus, pixels)


MACHINES = {"a CPU": (16, 128, 0), "a GPU": (16, 128, 1), "eight GPUs": (64, 512, 8), "a small one": (4, 32, 1)}


@pytest.mark.parametrize("machine", MACHINES)
def test_an_ordinary_photo_fits_where_there_is_memory_for_it(monkeypatch: pytest.MonkeyPatch, machine: str) -> None:
    cores, memory, gpus = MACHINES[machine]
    usual, large = share(monkeypatch, cores, memory, gpus), share(monkeypatch, cores, memory, gpus, PHOTO)
    assert usual.max_pixels < PHOTO <= large.max_pixels
    assert 1 <= large.workers <= usual.workers
    assert 1 <= large.gpu_threads <= usual.gpu_threads == max(GPU_THREADS, cores // (2 * gpus) if gpus else 0)
    busy = usual.workers + gpus * usual.gpu_threads
    assert busy * usual.threads <= max(cores, 1 + gpus * GPU_THREADS)
    used = (large.workers + gpus * large.gpu_threads) * large.memory
    assert used <= 0.8 * memory * GIB
    assert share(monkeypatch, cores, memory, gpus, 1000) == usual, "small ones change nothing"


@pytest.mark.parametrize("gpus", [0, 1, 8])
def test_an_image_too_large_for_this_machine_gets_all_its_memory(monkeypatch: pytest.MonkeyPatch, gpus: int) -> None:
    found = share(monkeypatch, 16, 128, gpus, 10**11)
    assert (found.workers, found.gpu_threads) == (1, GPU_THREADS if not gpus else 1)
    assert found.memory * (1 + gpus) <= 0.8 * 128 * GIB


def test_given_numbers_of_workers_and_memory_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask_cluster, "MEMORY_LIMIT", 128 * GIB)
    assert share_of(Machine(workers=12), NETWORK_WORKER_BYTES, 0, PHOTO).workers == 12
    assert share_of(Machine(memory="5GB"), NETWORK_WORKER_BYTES, 0, PHOTO).memory == 5_000_000_000


cloudpickle.register_pickle_by_value(sys.modules[__name__])


def test_a_scheduler_that_does_not_answer_is_named(monkeypatch) -> None:
    """And no sizes are read: its workers are as they are, and a million headers take minutes to read."""

    def unwanted() -> int:
        raise AssertionError

    monkeypatch.setattr(dask_cluster, "_CONNECT_SECONDS", 0.1)
    with (
        pytest.raises(AbsentError, match=r"tcp://127\.0\.0\.1:9: no Dask scheduler answers"),
        open_dask(Machine(scheduler="tcp://127.0.0.1:9"), most_pixels=unwanted),
    ):
        pass


def test_large_images_get_fewer_workers(capfd) -> None:
    """Half of what all workers have together is more than one of them has."""
    pixels = int(0.8 * MEMORY_LIMIT * 0.75 / 2 / BYTES_PER_PIXEL)
    usual, _, _, _, usual_pixels = share_of(Machine(), WORKER_BYTES, 0)
    assert usual_pixels < pixels or usual == 1
    with open_dask(Machine(), most_pixels=lambda: pixels) as cluster:
        assert cluster.workers == 1
        assert cluster.max_pixels >= pixels
        [(_, result)] = cluster.map(*job(done), images("photo"))
    assert result == Record("photo", mask_key="done")
    if usual > 1:
        assert f"1 workers instead of {usual}, for images of up to" in capfd.readouterr().err


@contextlib.contextmanager
def scheduler(security: Security | None) -> Iterator[str]:
    """The address of a scheduler without workers, less its scheme."""
    options: dict[str, Any] = {
        "host": "tls://127.0.0.1" if security else "127.0.0.1",
        "dashboard_address": "127.0.0.1:0",
    }
    specification = {"cls": Scheduler, "options": options | ({"security": security} if security else {})}
    with SpecCluster(workers={}, scheduler=specification, security=security, silence_logs=logging.CRITICAL) as cluster:
        yield str(cluster.scheduler_address).partition("//")[2]


def certificates(folder: Path, security: Security) -> dict[str, str]:
    """Dask's configuration of a client with these certificates."""
    config = {}
    for name in ("ca_file", "client_key", "client_cert"):
        (folder / name).write_text(getattr(security, f"tls_{name}"))
        config[f"distributed.comm.tls.{name.replace('client_', 'client.').replace('_', '-')}"] = str(folder / name)
    return config


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # sockets that Dask leaves open
def test_tls_on_one_side_alone_is_one_line(tmp_path: Path) -> None:
    security = Security.temporary()
    config = certificates(tmp_path, security)
    (tmp_path / "others").mkdir()
    others = certificates(tmp_path / "others", Security.temporary())
    unanswered = (
        r"no Dask scheduler answers \(\w+(: .*)?\); start it, "
        "give tls:// or tcp:// as it has, with certificates in"
    )
    with scheduler(security) as encrypted, scheduler(None) as plain:
        cases: list[tuple[str, dict[str, str], str]] = [
            (f"tcp://{encrypted}", {}, unanswered),
            (f"tls://{encrypted}", {}, unanswered),
            (f"tls://{encrypted}", others, unanswered),
            (f"tls://{plain}", {}, unanswered),
            (f"tls://{plain}", config, unanswered),
            (f"tls://{encrypted}", config, "has no workers"),
            (f"tcp://{plain}", {}, "has no workers"),
            (
                f"tcp://{plain}",
                {"distributed.comm.require-encryption": True},
                r"no Dask scheduler answers \(RuntimeError: encryption required by",
            ),
            ("tcp://127.0.0.1", {}, r"is no address of a scheduler \(missing port number .*; give one such as tcp://"),
        ]
        for address, client, reason in cases:
            with (
                dask_config.set(client),
                pytest.raises(UsageError, match=f"^{address}: {reason}"),
                open_dask(Machine(scheduler=address)),
            ):
                pass
    gc.collect()  # or the next test would be blamed for those sockets


def visible_devices(image: ImageRef, outcome: Record) -> Record:
    return Record(image.id, mask_key=os.environ["CUDA_VISIBLE_DEVICES"])


def test_a_worker_with_a_gpu_has_a_slot_for_each_of_its_threads() -> None:
    """The workers are real, the GPU is not: what they declare and may see is all that this machine can show."""
    with open_dask(Machine(workers=1, memory="600MB"), gpus=1) as cluster:
        workers = cluster.client.scheduler_info(n_workers=-1)["workers"].values()
        slots = sorted((worker["nthreads"], worker["resources"].get("GPU", 0)) for worker in workers)
        threads = share_of(Machine(workers=1, memory="600MB"), WORKER_BYTES, 1).gpu_threads
        assert slots == [(1, 0), (threads, threads)]
        on_gpu = cluster.map(*job(visible_devices, {"GPU": 1}), images(*"abcdef"))
        assert {result.mask_key for _, result in on_gpu} == {"0"}
        assert cluster.max_pixels == 3_750_000


def test_what_is_opened_on_another_thread_is_closed_once() -> None:
    """Also where no block has taken it; an error of the opening is one of the block."""
    told: list[str] = []

    @contextlib.contextmanager
    def opened() -> Iterator[Any]:
        told.append(threading.current_thread().name)
        try:
            yield "dask"
        finally:
            told.append("closed")

    with Opening(opened) as dask:
        assert dask == "dask"
    assert told[0] != threading.current_thread().name
    assert told[1:] == ["closed"]
    with contextlib.ExitStack() as stack:
        stack.push(unused := Opening(opened))
        stack.push(unused)
    assert told[3:] == ["closed"]
    failing = Opening(Mock(side_effect=UsageError("--device", "no GPU", "use cpu")))
    with pytest.raises(UsageError, match="no GPU"), failing:
        pass
    with contextlib.ExitStack() as stack:
        stack.push(failing)


@pytest.mark.parametrize("taken", [True, False])
def test_an_error_of_the_closing_does_not_hide_what_stopped_the_block(taken: bool) -> None:
    @contextlib.contextmanager
    def opened() -> Iterator[Any]:
        try:
            yield "dask"
        finally:
            raise TimeoutError("a cluster that does not close")

    def stopped() -> None:
        with contextlib.ExitStack() as stack:
            stack.push(opening := Opening(opened))
            with opening if taken else contextlib.nullcontext():
                raise KeyboardInterrupt

    with pytest.raises(TimeoutError) as raised:
        stopped()
    assert isinstance(raised.value.__context__, KeyboardInterrupt)


def test_the_memory_of_openvino_is_counted() -> None:
    """So that a worker takes smaller images in the same memory."""
    largest = []
    for openvino in (False, True):
        with open_dask(Machine(workers=1, memory="5GB"), networks=True, openvino=openvino) as dask:
            largest.append(dask.max_pixels)
    assert largest[0] - largest[1] == dask_cluster.OPENVINO_BYTES / dask_cluster.BYTES_PER_PIXEL
