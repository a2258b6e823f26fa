"""Workers that outlive single runs: real ones, as desra serve starts them."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from distributed.security import Security

import desra_core
import tasks
from desra_core.errors import AbsentError
from desra_core.settings import Machine
from tasks import dask_cluster
from tasks.dask_cluster import (
    ServedCluster,
    StandingCluster,
    connected,
    open_dask,
    release_served,
    standing_cluster,
    visible_gpus,
)
from tests.browser import opened
from tests.served import knock, until

SMALL = Machine(workers=1, memory="3GB")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[StandingCluster]:
    key = tmp_path_factory.mktemp("prefect") / "dask.pem"
    with standing_cluster(SMALL, gpus=0, key=key) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def served(cluster, monkeypatch) -> None:
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dask_cluster, "_CONNECT_SECONDS", 1)


def worker_of(machine: Machine, **options: Any) -> int:
    """The process that computes for a run."""
    with open_dask(machine, **options) as dask:
        return dask.follow(os.getpid, resources={}, on_second=lambda: None)


def test_runs_share_its_workers_unless_they_want_their_own(monkeypatch) -> None:
    first = worker_of(Machine())
    assert worker_of(Machine()) == first
    assert worker_of(Machine(workers=1), alone=True) != first
    # Who names a scheduler gets that one.
    monkeypatch.setattr(dask_cluster, "_CONNECT_SECONDS", 0.1)
    with (
        pytest.raises(AbsentError, match="no Dask scheduler answers"),
        open_dask(Machine(scheduler="tcp://127.0.0.1:9")),
    ):
        pass


def test_other_users_of_the_machine_are_kept_out(cluster, monkeypatch) -> None:
    """To the cluster of desra serve and to that of a single run, whose schedulers take code and run it."""
    key = Path(cluster.served.key)
    assert key.stat().st_mode & 0o777 == 0o600
    monkeypatch.setattr(logging.getLogger("distributed"), "disabled", True)
    with open_dask(Machine(workers=1, memory="1GB"), alone=True) as own:
        for address in (cluster.served.address, own.client.scheduler.address):
            for stranger, plain in ((None, address.replace("tls://", "tcp://")), (Security.temporary(), address)):
                with pytest.raises((OSError, TypeError)):
                    knock(plain, stranger)
    with connected(cluster.served.address, cluster.served.security) as owner:
        assert owner.submit(os.getpid).result() != os.getpid()


def test_the_dashboard_is_at_a_secret_address(cluster, tmp_path) -> None:
    """The dashboard is read-only, but shows the tasks to every user who knows its address."""
    with open_dask(Machine()) as dask:
        assert dask.dashboard == cluster.served.dashboard
    base, _, hidden = dask.dashboard.removesuffix("/status").rpartition("/")
    assert httpx.get(dask.dashboard).status_code == 200
    assert httpx.get(f"{base}/{hidden}/json/counts.json").json()["workers"] == 1
    beside = ("", "/status", "/sitemap.json", "/health", "/metrics", "/info/main/workers.html",
              f"/{hidden[:-1]}/status",
              "/status/ws", "/json/counts.json", "/individual-workers", "/static/css/base.css")  # fmt: skip
    for path in beside:
        answer = httpx.get(f"{base}{path}")
        assert (answer.status_code, hidden in str(answer.headers)) == (404, False), path
        assert hidden not in answer.text
    with opened(dask.dashboard, tmp_path / "browser") as page:
        page.wait_for("Workers")


def test_the_tasks_of_a_killed_run_are_stopped(cluster, tmp_path) -> None:
    first = worker_of(Machine())
    begun = tmp_path / "begun"
    with connected(cluster.served.address, cluster.served.security) as killed:
        left = killed.submit(lambda: (begun.touch(), time.sleep(60)))
        until(begun.exists)
        assert worker_of(Machine()) != first
        assert left.status != "finished"


@pytest.mark.slow
def test_a_run_waits_for_the_gpus_that_there_are_to_be(cluster, monkeypatch, tmp_path) -> None:
    """It does not take the CPU for a night because a worker is starting again at two."""
    monkeypatch.setattr(dask_cluster, "_AWAIT_SECONDS", 1)
    monkeypatch.setenv(ServedCluster.VARIABLE, cluster.served.model_copy(update={"gpus": 1}).model_dump_json())
    with (
        pytest.raises(AbsentError, match="the workers with a GPU: are 0, where desra serve has started 1; see"),
        open_dask(Machine()),
    ):
        pass
    with standing_cluster(SMALL, gpus=1, key=tmp_path / "dask.pem") as other:
        assert (len(other.cluster.worker_spec), other.served.gpus) == (2, 1)
        for name, value in other.environment.items():
            monkeypatch.setenv(name, value)
        with open_dask(Machine()) as dask:
            assert (dask.workers, dask.gpus) == (2, 1)


def test_its_memory_is_given_back() -> None:
    first = worker_of(Machine())
    release_served()
    assert worker_of(Machine()) != first


@pytest.mark.slow
def test_images_that_are_too_large_for_its_workers_get_others(cluster, monkeypatch) -> None:
    with open_dask(Machine()) as dask:
        standing = dask.max_pixels
    # Workers of its own would be no larger: somebody has said so, to desra serve or to the run.
    for machine in (Machine(), SMALL):
        with open_dask(machine, most_pixels=lambda: 2 * standing) as dask:
            assert dask.max_pixels == standing
        unbound = cluster.served.model_copy(update={"machine": Machine()})
        monkeypatch.setenv(ServedCluster.VARIABLE, unbound.model_dump_json())
    first = worker_of(Machine(), most_pixels=lambda: standing)
    assert worker_of(Machine(), most_pixels=lambda: standing + 1) != first
    with open_dask(Machine(), most_pixels=lambda: standing + 1) as dask:
        assert dask.max_pixels > standing


@pytest.mark.slow
def test_its_workers_have_the_code_that_they_started_with(monkeypatch, tmp_path) -> None:
    """Not that of their files, which may have been updated before the first run asks."""
    for package in (desra_core, tasks):
        folder = Path(package.__file__).parent
        shutil.copytree(folder, tmp_path / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.syspath_prepend(tmp_path)
    with standing_cluster(SMALL, gpus=0, key=tmp_path / "dask.pem") as other:
        for name, value in other.environment.items():
            monkeypatch.setenv(name, value)
        (tmp_path / "tasks" / "new.py").touch()
        assert worker_of(Machine())
        release_served()  # a new process, of the new code
        with pytest.raises(AbsentError, match=r"this worker has desra .*; install the same there, and start it again"):
            worker_of(Machine())


@pytest.mark.slow
def test_a_worker_that_has_ended_for_good_is_replaced(cluster) -> None:
    with connected(cluster.served.address, cluster.served.security) as client:
        client.retire_workers(list(client.scheduler_info(n_workers=-1)["workers"]))
        for _ in range(600):
            cluster.keep_up()
            if client.nthreads():
                break
            time.sleep(0.1)
    assert worker_of(Machine())


def test_a_cluster_of_desra_serve_that_has_gone_is_named(cluster, monkeypatch) -> None:
    gone = cluster.served.model_copy(update={"address": "tls://127.0.0.1:9"})
    monkeypatch.setenv(ServedCluster.VARIABLE, gone.model_dump_json())
    monkeypatch.setattr(dask_cluster, "_CONNECT_SECONDS", 0.1)
    with pytest.raises(AbsentError, match=r"tls://127\.0\.0\.1:9: no Dask scheduler answers"), open_dask(Machine()):
        pass
    monkeypatch.delenv(ServedCluster.VARIABLE)
    release_served()


def test_gpus_are_those_that_may_be_seen(monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-5a")
    assert visible_gpus() == ["2", "GPU-5a"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_gpus()[:2] == ["0", "1"]


@pytest.mark.slow
def test_a_worker_has_the_gpu_that_it_may_see(monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-5a")
    with open_dask(Machine(workers=1, memory="1GB"), gpus=1, device="GPU-5a", alone=True) as dask:
        workers = dask.client.scheduler_info(n_workers=-1)["workers"].values()
        slots = {"GPU": dask.gpu_slots}
        assert {worker["name"]: worker["resources"] for worker in workers} == {"cpu-0": {}, "gpu-GPU-5a": slots}
        assert dask.threads == len(os.sched_getaffinity(0))  # one task at a time, which has all cores
        seen = dask.follow(os.getenv, "CUDA_VISIBLE_DEVICES", resources=slots, on_second=lambda: None)
    assert seen == "GPU-5a"
