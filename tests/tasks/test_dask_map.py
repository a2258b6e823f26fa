"""Images over a real Dask cluster, and what becomes of those that go wrong."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from dask import config as dask_config
from distributed import Scheduler, Security, SpecCluster, get_worker
from distributed.system import MEMORY_LIMIT

from desra_core.errors import AbsentError, ImageError, TooLargeError, TransientError, UsageError
from desra_core.settings import Machine
from desra_core.workspace.manifest import File, ImageRef
from desra_core.workspace.records import Record
from tasks import dask_map
from tasks.dask_cluster import BYTES_PER_PIXEL, GPU_THREADS
from tasks.dask_map import Dask, ImageJob, open_dask
from tasks.logs import configure

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def job(function: Callable[[ImageRef, Record], Record]) -> ImageJob:
    """Workers cannot import a test module; what only cloudpickle can pickle travels by value."""
    return ImageJob(function.__name__, lambda image, outcome: function(image, outcome), {})


@pytest.fixture(scope="module")
def dask() -> Iterator[Dask]:
    with open_dask(Machine(workers=2, memory="1GB")) as cluster:
        yield cluster


def images(*names: str) -> list[tuple[ImageRef, Record]]:
    return [
        (ImageRef(name, 0, (name,), File(Path(name), ""), File(Path(f"gan/{name}"), ""), None, None), Record(name))
        for name in names
    ]


def done(image: ImageRef, outcome: Record) -> Record:
    return Record(image.id, mask_key="done")


def fails_once(image: ImageRef, outcome: Record) -> Record:
    marker = Path(os.environ["MARKERS"]) / image.id
    if not marker.exists():
        marker.touch()
        raise TransientError(image.id, "failed for now", "try again")
    return done(image, outcome)


def troubled(image: ImageRef, outcome: Record) -> Record:
    if image.id == "killer":
        os.kill(os.getpid(), signal.SIGKILL)
    if image.id == "surprise":
        raise ZeroDivisionError("a\nbug")
    if image.id == "full":
        raise TransientError("disk", "the disk is full", "free some space and run again")
    return done(image, outcome)


def test_every_image_comes_back_once(dask: Dask) -> None:
    work = images(*(f"photo{index}" for index in range(50)))
    results = list(dask.map(job(done), work))
    assert sorted(image.id for image, _ in results) == sorted(image.id for image, _ in work)
    assert all(result == Record(image.id, mask_key="done") for image, result in results)
    assert list(dask.map(job(done), [])) == []


def moment(image: ImageRef, outcome: Record) -> Record:
    return Record(image.id, mask_key=str(time.monotonic_ns()))


def test_images_are_computed_in_the_order_of_the_work() -> None:
    """One that comes twice too: each time with what goes with it."""
    work = images(*"hgfedcba", *"hgfedcba")
    with open_dask(Machine(workers=1, memory="1GB")) as cluster:
        results = sorted(cluster.map(job(moment), work), key=lambda result: int(result[1].mask_key))
    assert "".join(image.id for image, _ in results) == "hgfedcbahgfedcba"


def test_troubles_name_their_image_and_spare_the_others(dask: Dask) -> None:
    work = images("killer", "surprise", "full", *(f"photo{index}" for index in range(10)))
    results = {image.id: result for image, result in dask.map(job(troubled), work)}
    assert len(results) == len(work)
    errors = {name: result for name, result in results.items() if isinstance(result, ImageError)}
    assert set(errors) >= {"killer", "surprise", "full"}
    assert "--memory" in str(errors["killer"])
    assert str(errors["surprise"]).startswith("gan/surprise: failed unexpectedly with ZeroDivisionError (a bug)")
    assert str(errors["full"]) == "disk: the disk is full; free some space and run again"
    assert all(isinstance(error, TransientError) for error in errors.values())
    assert all("took its worker down" in error.reason for name, error in errors.items() if name.startswith("photo"))


REPEATED = {
    "an image that cannot be": ImageError("photo", "is no image", "remove it"),
    "an image that is too large": TooLargeError("photo", "needs more memory", "raise --memory"),
    "a model that has gone": UsageError("model.pth", "does not exist", "check the path"),
}


@pytest.mark.parametrize("failure", REPEATED)
def test_a_failure_that_would_repeat_is_not_tried_again(dask: Dask, tmp_path: Path, failure: str) -> None:
    calls, error = tmp_path / "calls", REPEATED[failure]

    def fails(image: ImageRef, outcome: Record) -> Record:
        with calls.open("a") as file:
            file.write("x")
        raise error

    [(_, result)] = dask.map(ImageJob("fails", fails, {}), images("photo"))
    assert isinstance(result, ImageError)
    assert isinstance(result, TransientError) == (failure != "an image that cannot be")
    assert str(result) == str(error)
    assert calls.read_text() == "x"


def leaves(image: ImageRef, outcome: Record) -> Record:
    get_worker().io_loop.add_callback(get_worker().close, nanny=True)
    time.sleep(60)
    return done(image, outcome)


def test_a_run_whose_workers_have_gone_does_not_wait_for_ever() -> None:
    with open_dask(Machine(workers=1, memory="1GB")) as cluster:
        [(_, result)] = cluster.map(job(leaves), images("photo"))
    assert "the Dask workers have gone" in str(result)


def test_transient_failures_are_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARKERS", str(tmp_path))
    with open_dask(Machine(workers=1, memory="1GB")) as cluster:
        [(_, result)] = cluster.map(job(fails_once), images("photo"))
    assert result == Record("photo", mask_key="done")


def on_a_broken_gpu(image: ImageRef, outcome: Record) -> Record:
    """Once a process has met the image that breaks its GPU, everything fails there; it breaks one GPU only."""
    import torch

    marker = Path(os.environ["MARKERS"]) / image.id
    if image.id == "breaks" and not marker.exists():
        marker.touch()
        os.environ["GPU"] = "broken"
    if "GPU" in os.environ:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might")
    return done(image, outcome)


def test_a_worker_whose_gpu_is_broken_makes_room_for_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what has failed there is computed elsewhere, as is what waits behind it."""
    monkeypatch.setenv("MARKERS", str(tmp_path))
    work = images("breaks", *(f"photo{index}" for index in range(20)))
    with open_dask(Machine(workers=2, memory="1GB")) as cluster:
        before = set(cluster._client.run(os.getpid).values())
        results = {image.id: result for image, result in cluster.map(job(on_a_broken_gpu), work)}
        cluster._client.wait_for_workers(2)
        assert len(before & set(cluster._client.run(os.getpid).values())) == 1
        told = (
            "failed with its GPU \\(CUDA error: device-side assert triggered\\); run again; if it stays, see nvidia-smi"
        )
        with pytest.raises(TransientError, match=f"the computation: {told}"):
            cluster.call(lambda: assert_on_the_device(), resources={})
    assert results == {image.id: Record(image.id, mask_key="done") for image, _ in work}


def assert_on_the_device() -> None:
    import torch

    raise torch.AcceleratorError("CUDA error: device-side assert triggered")


def test_memory_and_workers_bound_the_image_size() -> None:
    with open_dask(Machine(workers=1, memory="1GB")) as cluster:
        assert cluster.max_pixels == 11_250_000
        assert cluster.gpus == 0


def test_nobody_asks_for_sizes_that_change_nothing(monkeypatch) -> None:
    """Of a scheduler that runs elsewhere: its workers are as they are, and a million headers take minutes to read."""

    def unwanted() -> int:
        raise AssertionError

    monkeypatch.setattr(dask_map, "_CONNECT_SECONDS", 1)
    with pytest.raises(AbsentError), open_dask(Machine(scheduler="tcp://127.0.0.1:9"), most_pixels=unwanted):
        pass


def test_large_images_get_fewer_workers(capfd) -> None:
    """Half of what all workers have together is more than one of them has."""
    pixels = int(0.8 * MEMORY_LIMIT * 0.75 / 2 / BYTES_PER_PIXEL)
    with open_dask(Machine()) as cluster:
        usual = cluster.workers
        assert cluster.max_pixels < pixels or usual == 1
    with open_dask(Machine(), most_pixels=lambda: pixels) as cluster:
        assert cluster.workers == 1
        assert cluster.max_pixels >= pixels
        [(_, result)] = cluster.map(job(done), images("photo"))
    assert result == Record("photo", mask_key="done")
    if usual > 1:
        assert f"1 workers instead of {usual}, for images of up to" in capfd.readouterr().err


def test_a_scheduler_that_does_not_answer_is_named(monkeypatch) -> None:
    monkeypatch.setattr(dask_map, "_CONNECT_SECONDS", 1)
    with (
        pytest.raises(UsageError, match=r"tcp://127\.0\.0\.1:9: no Dask scheduler answers"),
        open_dask(Machine(scheduler="tcp://127.0.0.1:9")),
    ):
        pass


class UnpicklableError(Exception):
    def __reduce__(self) -> str:
        raise TypeError("cannot be pickled")


def refuse(*_: object) -> Record:
    try:
        raise UnpicklableError
    except UnpicklableError:
        raise TransientError("a", "b", "c") from None


def test_what_led_to_an_error_does_not_garble_it(dask: Dask) -> None:
    with pytest.raises(TransientError, match="a: b; c"):
        dask.call(lambda: refuse(), resources={})
    [(_, result)] = dask.map(job(refuse), images("photo"))
    assert isinstance(result, TransientError)
    assert str(result) == "a: b; c"


def counted(folder: Path, fate: str) -> int:
    """The number of calls so far, at most at the third of which all is well."""
    calls = len(list(folder.iterdir())) + 1
    (folder / str(calls)).touch()
    if fate == "killed" or (fate == "killed once" and calls == 1):
        os.kill(os.getpid(), signal.SIGKILL)
    if fate in ERRORS:
        raise ERRORS[fate]
    time.sleep(1.2)
    return calls


ERRORS = {
    "refused": UsageError("--learning-rate", "is too high", "lower it"),
    "unlucky": TransientError("disk", "the disk is full", "free some space"),
    "late": TimeoutError("too late"),
    "surprised": ZeroDivisionError("a bug"),
}


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
    with scheduler(security) as encrypted, scheduler(None) as plain:
        cases: list[tuple[str, dict[str, str], str]] = [
            (f"tcp://{encrypted}", {}, "closes the connection, as a scheduler with TLS does; give its tls:// address"),
            (f"tls://{encrypted}", {}, "asks for TLS, and no certificates are configured here; set DASK_DISTRIBUTED"),
            (f"tls://{encrypted}", others, r"no connection by TLS \(.*; give its tcp:// .* or certificates that"),
            (f"tls://{plain}", {}, "asks for TLS, and no certificates are configured here; set DASK_DISTRIBUTED"),
            (f"tls://{plain}", config, r"no connection by TLS \(.*; give its tcp:// address if it has no TLS"),
            (f"tls://{encrypted}", config, "has no workers"),
            (f"tcp://{plain}", {}, "has no workers"),
            (f"tcp://{plain}", {"distributed.comm.require-encryption": True}, r"is not asked \(encryption required by"),
            ("tcp://127.0.0.1", {}, r"is no address of a scheduler \(missing port number .*; give one such as tcp://"),
        ]
        for address, client, reason in cases:
            with (
                dask_config.set(client),
                pytest.raises(UsageError, match=f"^{address}: (what is there )?{reason}"),
                open_dask(Machine(scheduler=address)),
            ):
                pass
    gc.collect()  # or the next test would be blamed for those sockets


def follow(dask: Dask, folder: Path, fate: str) -> tuple[int, int]:
    """What the function returns, and how often we were told that time passes."""
    folder.mkdir()
    seconds: list[float] = []
    result = dask.follow(
        lambda *arguments: counted(*arguments), folder, fate, resources={}, on_second=lambda: seconds.append(0)
    )
    return result, len(seconds)


def test_a_long_computation_is_followed(dask: Dask, tmp_path: Path) -> None:
    result, seconds = follow(dask, tmp_path / "calls", "well")
    assert result == 1
    assert 2 <= seconds <= 4


@pytest.mark.slow
def test_nobody_follows_for_ever_what_has_no_worker(tmp_path: Path) -> None:
    with open_dask(Machine(workers=1, memory="1GB")) as cluster:
        list(cluster.map(job(leaves), images("photo")))
        with pytest.raises(TransientError, match="the Dask workers have gone; start some and run again"):
            follow(cluster, tmp_path / "calls", "well")


@pytest.mark.parametrize("fate", ERRORS)
def test_what_a_followed_computation_raises_is_raised_at_once(dask: Dask, tmp_path: Path, fate: str) -> None:
    with pytest.raises(type(ERRORS[fate]), match=str(ERRORS[fate])):
        follow(dask, tmp_path / "calls", fate)
    assert len(list((tmp_path / "calls").iterdir())) == 1


def test_a_followed_computation_survives_its_worker(dask: Dask, tmp_path: Path) -> None:
    result, _ = follow(dask, tmp_path / "calls", "killed once")
    assert result == 2
    with pytest.raises(TransientError, match="took its worker down, most likely out of memory; raise --memory"):
        follow(dask, tmp_path / "more calls", "killed")
    assert len(list((tmp_path / "more calls").iterdir())) > 2


def visible_devices(image: ImageRef, outcome: Record) -> Record:
    return Record(image.id, mask_key=os.environ["CUDA_VISIBLE_DEVICES"])


def test_a_worker_with_a_gpu_has_a_slot_for_each_of_its_threads() -> None:
    """The workers are real, the GPU is not: what they declare and may see is all that this machine can show."""
    with open_dask(Machine(workers=1, memory="600MB"), gpus=1) as cluster:
        workers = cluster._client.scheduler_info(n_workers=-1)["workers"].values()
        slots = sorted((worker["nthreads"], worker["resources"].get("GPU", 0)) for worker in workers)
        assert slots == [(1, 0), (GPU_THREADS, GPU_THREADS)]
        on_gpu = cluster.map(job(visible_devices)._replace(resources={"GPU": 1}), images(*"abcdef"))
        assert {result.mask_key for _, result in on_gpu} == {"0"}
        assert cluster.max_pixels == 3_750_000


def test_every_worker_records_its_images(capfd) -> None:
    with open_dask(Machine(workers=2, memory="1GB", log_level="debug", log_format="json")) as cluster:
        list(cluster.map(job(done), images("a", "b")))
    configure("warning", "text")
    records = [json.loads(line) for line in capfd.readouterr().err.splitlines() if '"stage"' in line]
    assert {record["image"] for record in records} == {"a", "b"}
    assert {(record["stage"], record["shard"], record["level"]) for record in records} == {("done", "00000", "debug")}
