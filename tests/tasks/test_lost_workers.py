"""Workers that die, leave, or break their GPU, in a real Dask cluster."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import cloudpickle
import psutil
import pytest

from desra_core.errors import ImageError, TransientError
from desra_core.settings import Machine
from desra_core.workspace.manifest import ImageRef
from desra_core.workspace.products import Record
from tasks import lost_workers
from tasks.dask_cluster import open_dask
from tasks.dask_map import Dask
from tests.tasks.jobs import done, follow, images, job, leaves

cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def cluster() -> Iterator[Dask]:
    """Its one worker is followed by another whenever it ends."""
    with open_dask(Machine(workers=1, memory="1GB")) as cluster:
        yield cluster


@pytest.mark.slow
def test_a_worker_that_dies_again_and_again_comes_back(cluster: Dask) -> None:
    """Also where it is away when Dask looks whether it is back, 15 s after an earlier death."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        cluster.client.wait_for_workers(1)
        for process in cluster.client.run(os.getpid).values():
            os.kill(process, signal.SIGKILL)
        while cluster.client.nthreads():
            time.sleep(0.01)
    cluster.client.wait_for_workers(1, timeout=60)
    [(_, result)] = cluster.map(*job(done), images("photo"))
    assert result == Record("photo", mask_key="done")


def killer(image: ImageRef, outcome: Record) -> Record:
    if image.id == "killer":
        os.kill(os.getpid(), signal.SIGKILL)
    return done(image, outcome)


def test_an_image_that_kills_its_workers_is_named(cluster: Dask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images that wait on these workers may be given up with it, since Dask cannot distinguish them."""
    monkeypatch.setattr(cluster.client.cluster.scheduler, "allowed_failures", 1)
    work = images("killer", *(f"photo{index}" for index in range(10)))
    results = {image.id: result for image, result in cluster.map(*job(killer), work)}
    assert len(results) == len(work)
    assert "--memory" in str(results["killer"])
    errors = [result for result in results.values() if isinstance(result, ImageError)]
    assert all(isinstance(error, TransientError) for error in errors)
    assert all("took its worker down" in error.reason for error in errors)


def test_a_run_whose_workers_have_gone_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lost_workers, "LOST_SECONDS", 1)
    with open_dask(Machine(workers=1, memory="1GB")) as doomed:
        [(_, result)] = doomed.map(*job(leaves), images("photo"))
        assert "the Dask workers have gone" in str(result)
        with pytest.raises(TransientError, match="the Dask workers have gone; start some and run again"):
            follow(doomed, tmp_path / "calls", "well")


def test_a_worker_that_is_killed_while_it_starts_is_one_line() -> None:
    before = set(psutil.Process().children(recursive=True))

    def kill() -> None:
        while True:
            for process in set(psutil.Process().children(recursive=True)) - before:
                if any("spawn_main" in part for part in process.cmdline()):
                    process.kill()
                    return
            time.sleep(0.01)

    killer = threading.Thread(target=kill)
    killer.start()
    told = "the Dask workers: do not start .*; run again; if it stays, raise --memory or see dmesg"
    with pytest.raises(TransientError, match=told), open_dask(Machine(workers=1, memory="1GB")):
        pass
    killer.join()


def test_a_worker_has_time_to_start_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work is given up in the third check in a row that finds no worker: two half-times after the first."""
    monkeypatch.setattr(lost_workers, "LOST_SECONDS", 0.02)
    answers = [False, False, True, False, False, False]
    given_up = threading.Event()
    asked: list[int] = []

    def is_any_able(_: dict[str, float]) -> bool:
        asked.append(len(asked))
        return answers[len(asked) - 1] if len(asked) <= len(answers) else False

    def cancel(_: object) -> None:
        cancelled_at.append(len(asked))
        given_up.set()

    cancelled_at: list[int] = []
    watch = lost_workers.Watch(SimpleNamespace(cancel=cancel), is_any_able)  # type: ignore[arg-type]
    with watch.over([], {}):
        given_up.wait()
    assert cancelled_at[0] == len(answers)


def on_a_broken_gpu(markers: Path, image: ImageRef, outcome: Record) -> Record:
    """Once a process has met the image that breaks its GPU, everything fails there; it breaks one GPU only."""
    if image.id == "breaks" and not (markers / image.id).exists():
        (markers / image.id).touch()
        os.environ["GPU"] = "broken"
    if "GPU" in os.environ:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might")
    return done(image, outcome)


def test_a_worker_whose_gpu_is_broken_makes_room_for_another(cluster: Dask, tmp_path: Path) -> None:
    """And what has failed there is computed elsewhere, as is what waits behind it."""
    work = images("breaks", *(f"photo{index}" for index in range(8)))
    [before] = cluster.client.run(os.getpid).values()
    computed = cluster.map(*job(lambda image, outcome: on_a_broken_gpu(tmp_path, image, outcome)), work)
    results = {image.id: result for image, result in computed}
    cluster.client.wait_for_workers(1)
    assert before not in cluster.client.run(os.getpid).values()
    told = "failed with its GPU \\(CUDA error: device-side assert triggered\\); run again; if it stays, see nvidia-smi"
    with pytest.raises(TransientError, match=f"the computation: {told}"):
        cluster.call(lambda: assert_on_the_device(), resources={})
    assert results == {image.id: Record(image.id, mask_key="done") for image, _ in work}


def assert_on_the_device() -> None:
    import torch

    raise torch.AcceleratorError("CUDA error: device-side assert triggered")


@pytest.mark.slow
def test_a_followed_computation_survives_its_worker(cluster: Dask, tmp_path: Path) -> None:
    result, _ = follow(cluster, tmp_path / "calls", "killed once")
    assert result == 2
    with pytest.raises(TransientError, match="took its worker down, most likely out of memory; raise --memory"):
        follow(cluster, tmp_path / "more calls", "killed")
    assert len(list((tmp_path / "more calls").iterdir())) > 2
