"""How a machine is divided among workers, with machines of any size."""

from __future__ import annotations

import pytest

from desra_core.settings import Machine
from tasks import dask_cluster
from tasks.dask_cluster import GPU_THREADS, NETWORK_WORKER_BYTES, Share, share_of

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
    assert 1 <= large.gpu_threads <= usual.gpu_threads == GPU_THREADS
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
