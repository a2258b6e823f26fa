"""Workers that others have started: real ones, of this desra, of another one, and without our disk."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import cloudpickle
import pytest
from distributed import Client, get_worker

import desra_core
import tasks
from desra_core.errors import AbsentError, TransientError, UsageError
from desra_core.files import is_unfinished
from desra_core.settings import Machine
from desra_core.workspace import Workspace
from tasks import lost_workers
from tasks.dask_cluster import open_dask
from tasks.dask_map import device_of
from tests.conftest import refusal
from tests.served import until
from tests.tasks.jobs import images

cloudpickle.register_pickle_by_value(sys.modules[__name__])

WORKER = ["-m", "distributed.cli.dask_worker"]
# One that cannot find desra, as in an environment without it.
BARE = ["-c", "import sys; sys.modules['desra_core'] = None; from distributed.cli.dask_worker import main; main()"]


class Elsewhere:
    """A scheduler and its workers, each a process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        told = folder / "scheduler.json"
        self._start("scheduler", ["-m", "distributed.cli.dask_scheduler", "--scheduler-file", told])
        until(lambda: told.exists() and told.read_text().endswith("}"))
        self.client = Client(scheduler_file=str(told))
        self.address = str(self.client.scheduler.address)

    def _start(self, name: str, arguments: list[object], before: tuple[str, ...] = (), **environment: str) -> None:
        options = ["--host", "127.0.0.1", "--port", "0", "--no-dashboard"] if name == "scheduler" else []
        with (self._folder / f"{name}.log").open("wb") as log:
            self._processes[name] = subprocess.Popen(
                [*before, sys.executable, *map(str, [*arguments, *options])],
                env=os.environ | environment, stdout=log, stderr=log, cwd=self._folder,
            )  # fmt: skip

    def worker(
        self,
        name: str,
        kind: list[str] = WORKER,
        before: tuple[str, ...] = (),
        gpus: int = 0,
        memory: str = "1GB",
        **environment: str,
    ) -> str:
        """Start a worker; returns its address."""
        options = [self.address, "--nthreads", 1, "--memory-limit", memory, "--no-dashboard", "--no-nanny",
                   "--host", "127.0.0.1", "--name", name, "--resources", f"GPU={gpus}" if gpus else ""]  # fmt: skip
        self._start(name, [*kind, *options], before, **environment)
        return str(until(lambda: self.addresses().get(name)))

    def addresses(self) -> dict[str, str]:
        known = self.client.scheduler_info(n_workers=-1)["workers"]
        return {worker["name"]: address for address, worker in known.items()}

    def kill(self, name: str) -> None:
        self._processes[name].kill()
        self._processes[name].wait()

    def close(self) -> None:
        self.client.close()
        for name in self._processes:
            self.kill(name)


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Elsewhere]:
    cluster = Elsewhere(tmp_path)
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Elsewhere]:
    """A cluster whose two workers have our desra and our disk."""
    cluster = Elsewhere(tmp_path_factory.mktemp("elsewhere"))
    for name in ("one", "two"):
        cluster.worker(name)
    yield cluster
    cluster.close()


@pytest.fixture
def other(tmp_path: Path) -> dict[str, str]:
    """The environment of a worker whose desra differs from ours by one number."""
    for package in (desra_core, tasks):
        folder = Path(package.__file__).parent
        shutil.copytree(folder, tmp_path / "other" / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / "other" / "desra_core" / "detection" / "mask.py"
    path.write_text(path.read_text() + "\nSOMETHING_ELSE = 1\n")
    return {"PYTHONPATH": str(tmp_path / "other")}


def who(image, about) -> str:
    return get_worker().name


def job(function: Callable = who, resources: dict[str, float] | None = None) -> tuple:
    return "who", lambda image, about: function(image, about), resources or {}


def names(count: int) -> list:
    return images(*(f"photo{index}" for index in range(count)))


def warnings(capfd) -> list[str]:
    return [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: ")]


def test_workers_of_others_are_used(one_and_two, tmp_path, capfd) -> None:
    with open_dask(Machine(scheduler=one_and_two.address), folder=tmp_path) as dask:
        assert (dask.workers, dask.max_pixels) == (2, 11_250_000)
        assert {result for _, result in dask.map(*job(), names(40))} == {"one", "two"}
        assert dask.follow(os.getpid, resources={}, on_second=lambda: None) != os.getpid()
        assert list(dask.map(*job(), [])) == []
    assert warnings(capfd) == []
    assert not list(tmp_path.glob(".*"))


def test_a_worker_is_no_scheduler(one_and_two) -> None:
    address = one_and_two.addresses()["one"]
    told = f"{address}: is the address of a worker, not of a scheduler; give that of the scheduler that it connects to"
    with pytest.raises(UsageError, match=told), open_dask(Machine(scheduler=address)):
        pass


def test_a_worker_of_another_version_gets_no_work(elsewhere, other, tmp_path, capfd) -> None:
    bare, old = elsewhere.worker("bare", BARE), elsewhere.worker("old", **other)
    with pytest.raises(AbsentError) as refused, open_dask(Machine(scheduler=elsewhere.address), folder=tmp_path):
        pass
    assert refused.value.subject in (bare, old)
    assert not list(tmp_path.glob(".*"))
    elsewhere.worker("good")
    with open_dask(Machine(scheduler=elsewhere.address), folder=tmp_path) as dask:
        assert dask.workers == 1
        told = sorted(warnings(capfd))
        assert len(told) == 2
        for address, has in ((bare, "no desra"), (old, "desra 0")):
            [line] = [line for line in told if address in line]
            assert f"{address}: this worker has {has}" in line
            assert line.endswith("; install the same there, and start it again")
        assert {result for _, result in dask.map(*job(), names(40))} == {"good"}
        assert dask.follow(lambda: who(None, None), resources={}, on_second=lambda: None) == "good"
    assert warnings(capfd) == []


@pytest.mark.slow
def test_a_worker_that_joins_later_is_asked_too(elsewhere, other, tmp_path, capfd) -> None:
    elsewhere.worker("good")
    workspace = tmp_path / "ws"
    workspace.mkdir()
    results: list[object] = []

    def patient(image, about) -> str:
        while not (Path(about) / "go on").exists():
            pass
        return who(image, about)

    work = [(image, str(tmp_path)) for image, _ in names(30)]
    with open_dask(Machine(scheduler=elsewhere.address), folder=workspace) as dask:

        def run() -> None:
            results.extend(dask.map(*job(patient), work))

        thread = threading.Thread(target=run)
        thread.start()
        old = elsewhere.worker("old", **other)
        read_only = mounted('mount --bind "$1" "$1" && mount -o remount,bind,ro "$1"', workspace)
        unable = elsewhere.worker("read-only", before=read_only)
        said: list[str] = []
        until(lambda: said.extend(warnings(capfd)) or len(said) >= 2)
        later = elsewhere.worker("later")
        (tmp_path / "go on").touch()
        thread.join()
    for address, why in ((old, "this worker has desra 0"), (unable, f"this worker cannot write to {workspace}, where")):
        assert [line for line in said if line.startswith(f"warning: {address}: {why}")]
    assert len(said) == 2
    assert {result for _, result in results} <= {"good", "later"}
    assert len(results) == 30
    assert later in elsewhere.addresses().values()


@pytest.mark.slow
def test_refused_work_for_gpus_goes_to_workers_with_a_gpu(elsewhere, other, tmp_path, capfd, monkeypatch) -> None:
    monkeypatch.setattr(lost_workers, "LOST_SECONDS", 600)  # however long a worker takes to start
    elsewhere.worker("cpu")
    results: list[object] = []
    with open_dask(Machine(scheduler=elsewhere.address), folder=tmp_path) as dask:

        def run() -> None:
            results.extend(result for _, result in dask.map(*job(resources={"GPU": 1}), names(3)))

        elsewhere.worker("old", gpus=1, **other)
        thread = threading.Thread(target=run)
        thread.start()
        until(lambda: warnings(capfd))
        elsewhere.worker("good", gpus=1)
        thread.join()
    assert results == ["good"] * 3


def test_refused_workers_are_asked_again(one_and_two, tmp_path, monkeypatch) -> None:
    """Their disk had a hiccup, or they were started again with the right desra, on the same ports."""
    monkeypatch.setattr(lost_workers, "LOST_SECONDS", 0.2)
    with open_dask(Machine(scheduler=one_and_two.address), folder=tmp_path) as dask:
        for address in one_and_two.addresses().values():
            dask.admission.returned(address, "fails", "wait")
        work = job(lambda image, about: time.sleep(1))
        assert [result for _, result in dask.map(*work, names(1))] == [None]


def test_the_next_run_deletes_what_workers_had_to_find_for_a_killed_one(one_and_two, tmp_path) -> None:
    workspace = Workspace(tmp_path / "ws")
    workspace.create()
    script = f"""import os, signal
from pathlib import Path
from desra_core.settings import Machine
from tasks.dask_cluster import open_dask
with open_dask(Machine(scheduler={one_and_two.address!r}), folder=Path({str(workspace.root)!r})):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (left,) = (path.name for path in workspace.root.iterdir() if is_unfinished(path.name))
    with workspace.locked():
        assert left not in os.listdir(workspace.root)


@pytest.mark.slow
def test_work_that_is_passed_on_late_is_cancelled_too(elsewhere, tmp_path, monkeypatch) -> None:
    """At the moment at which the run gives up."""
    monkeypatch.setattr(lost_workers, "LOST_SECONDS", 1)
    elsewhere.worker("one")
    with open_dask(Machine(scheduler=elsewhere.address), folder=tmp_path) as dask:
        passed_on, cancel, cancelled = dask._passed_on, dask.client.cancel, threading.Event()

        def late(*about: object, **options: object) -> object:
            again = passed_on(*about, **options)
            cancelled.wait()
            return again

        monkeypatch.setattr(dask, "_passed_on", late)
        monkeypatch.setattr(dask.client, "cancel", lambda futures: (cancel(futures), cancelled.set()))
        dask.admission._sign.unlink()  # as on a worker whose disk is gone for good
        [(_, result)] = dask.map(*job(), names(1))
    assert "the Dask workers have gone" in str(result)


def mounted(commands: str, *folders: Path) -> tuple[str, ...]:
    """The beginning of a command that runs where these mounts were made; they name the folders $1, $2 and $3."""
    before = ("unshare", "--mount", "--user", "--map-root-user", "sh", "-c",
              f'{commands} && shift {len(folders)} && exec "$@"', "sh", *map(str, folders))  # fmt: skip
    if subprocess.run([*before, "true"], check=False, capture_output=True).returncode:
        pytest.skip("no such mounts of one's own here")
    return before


@pytest.fixture
def away(tmp_path: Path) -> tuple[Path, tuple[str, ...]]:
    """A workspace, and the beginning of a command that runs where another, empty folder is in its place."""
    workspace = tmp_path / "ws"
    workspace.mkdir()
    return workspace, mounted('mount -t tmpfs none "$1"', workspace)


def test_a_worker_that_could_lose_or_change_results_gets_no_work(elsewhere, tmp_path, capfd) -> None:
    """Each for its own reason, and one that lacks nothing does all the work."""
    workspace, photos, others = tmp_path / "ws", tmp_path / "photos", tmp_path / "others"
    for folder in (workspace, photos, others):
        folder.mkdir()
    (photos / "a.png").write_bytes(b"a photo")
    (others / "a.png").write_bytes(b"another")
    numpy = tmp_path / "site" / "numpy-1.0.dist-info"
    numpy.mkdir(parents=True)
    (numpy / "METADATA").write_text("Name: numpy\nVersion: 1.0\n")
    layer = 'mount -t tmpfs none "$2" && mkdir "$2/new" "$2/work" && mount -t overlay none -o '
    layer += 'lowerdir="$1",upperdir="$2/new",workdir="$2/work" "$1"'
    read_only = mounted('mount --bind "$1" "$1" && mount -o remount,bind,ro "$1"', workspace)
    same_paths = "have photos and models there under the same paths"
    install = "install the same there, and start it again"
    told = {
        elsewhere.worker("read-only", before=read_only): f"this worker cannot write to {workspace}, where the results "
        "go; give it write access there",
        elsewhere.worker("layered", before=mounted(layer, workspace, others)): "what this worker writes to "
        f"{workspace} does not arrive here; have the same folder there under the same path",
        elsewhere.worker("other photos", before=mounted('mount --bind "$1" "$2"', others, photos)): "this worker sees "
        f"another file as {photos / 'a.png'}; {same_paths}",
        elsewhere.worker("no photos", before=mounted('mount -t tmpfs none "$1"', photos)): "this worker cannot read "
        f"{photos / 'a.png'} (No such file or directory); {same_paths}",
        elsewhere.worker("numpy", PYTHONPATH=str(numpy.parent)): "this worker has numpy 1.0, this run "
        f"{version('numpy')}; {install}",
        elsewhere.worker("gpu", gpus=1, CUDA_VISIBLE_DEVICES=""): "this worker declares a GPU, but its PyTorch sees "
        "none; see desra doctor there, or start it without --resources GPU",
    }
    machine = Machine(scheduler=elsewhere.address)
    how = {"folder": workspace, "networks": True, "files": lambda: [photos / "a.png", photos / "vanished.png"]}
    with pytest.raises(AbsentError) as refused, open_dask(machine, **how):
        pass
    assert str(refused.value).removeprefix(f"{refused.value.subject}: ") == told[refused.value.subject]
    elsewhere.worker("good", memory="3GB")
    with open_dask(machine, **how) as dask:
        assert sorted(warnings(capfd)) == sorted(f"warning: {address}: {why}" for address, why in told.items())
        assert (dask.workers, dask.gpus, device_of(machine, dask)) == (1, 0, "cpu")
        assert {result for _, result in dask.map(*job(), names(30))} == {"good"}
    assert warnings(capfd) == []
    assert list(workspace.iterdir()) == []


def test_a_worker_that_does_not_see_the_workspace_gets_no_work(
    elsewhere, away, desra, make_pairs, tmp_path, capfd
) -> None:
    """A run with none but such workers is refused."""
    workspace, before = away
    blind = elsewhere.worker("blind", before=before)
    told = f"this worker does not see {workspace}, where the results go; have that folder there under the same path"
    with pytest.raises(AbsentError) as refused, open_dask(Machine(scheduler=elsewhere.address), folder=workspace):
        pass
    assert str(refused.value) == f"{blind}: {told}"
    make_pairs(tmp_path, 3)
    results = ("--mse-sr", tmp_path / "mse_sr", "--gan-sr", tmp_path / "gan_sr", "--workspace", workspace)
    run = desra("detect", *results, "--scheduler", elsewhere.address)
    assert f"{blind}: {told}" in refusal(run, server=True)
    elsewhere.worker("good")
    with open_dask(Machine(scheduler=elsewhere.address), folder=workspace) as dask:
        assert warnings(capfd) == [f"warning: {blind}: {told}"]
        assert {result for _, result in dask.map(*job(), names(20))} == {"good"}
    # What writes nothing may run there.
    with open_dask(Machine(scheduler=elsewhere.address)) as dask:
        assert dask.workers == 2


@pytest.mark.slow
def test_a_run_does_not_wait_without_end_for_refused_workers(elsewhere, other, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(lost_workers, "LOST_SECONDS", 4)
    elsewhere.worker("good")

    def stuck(image, about) -> None:
        threading.Event().wait()

    with open_dask(Machine(scheduler=elsewhere.address), folder=tmp_path) as dask:
        elsewhere.worker("old", **other)
        threading.Timer(1, elsewhere.kill, ["good"]).start()
        results = [result for _, result in dask.map(*job(stuck), names(3))]
    assert all(isinstance(result, TransientError) for result in results)
    assert "the Dask workers have gone" in str(results[0])
