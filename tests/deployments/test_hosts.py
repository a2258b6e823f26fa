"""One run on several hosts: network namespaces with addresses of their own, above one disk.

Each host has its own name, network and identity. All share the disk and its file locks, as on NFS.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import psutil
import pytest

from desra_core.settings import Mining
from desra_core.workspace import Workspace
from tests.conftest import desra_command, photo
from tests.in_process import process
from tests.served import until

pytestmark = pytest.mark.timeout(900)

PHOTOS = 16
THRESHOLD, OTHER_THRESHOLD = 0.7, 0.3
PORT = 8786
# Seconds without a word from a worker after which its scheduler gives its work to others.
TTL = 30
# Nobody tells of a host that is cut off, so these are how long it takes to notice.
DASK = {
    "DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": f"{TTL}s",
    "DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP": "30s",
    "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "30s",
}


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class Host:
    """A host in the network of the tests, and its processes."""

    def __init__(self, name: str, address: str, bridge: str, folder: Path) -> None:
        self.name, self.address = name, address
        self._netns, self._link, self._folder = f"{bridge}-{name}", f"{bridge}{name[:1]}{name[-1:]}", folder
        self._machine = folder / f"{name}.machine"
        self._machine.write_text(f"machine-{name}\n")
        self._logs = (folder / f"{name}-{number:03d}.log" for number in itertools.count())
        self.processes: list[subprocess.Popen[bytes]] = []
        ip("netns", "add", self._netns)
        ip("link", "add", self._link, "type", "veth", "peer", "name", "eth0", "netns", self._netns)
        ip("link", "set", self._link, "master", bridge, "up")
        for command in (f"addr add {address}/24 dev eth0", "link set eth0 up", "link set lo up"):
            ip("-n", self._netns, *command.split())

    def start(self, *arguments: object, log: Path | None = None, **environment: str) -> subprocess.Popen[bytes]:
        """Start a process there; `log` has what it writes, unless another file is given."""
        enter = 'hostname "$1" && mount --bind "$0" /proc/sys/kernel/random/boot_id && shift && exec "$@"'
        inside = ["unshare", "--uts", "sh", "-c", enter, self._machine, self.name, *arguments]
        command = ["ip", "netns", "exec", self._netns, *map(str, inside)]
        known = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "DESRA_"))}
        with (log or next(self._logs)).open("wb") as file:
            process = subprocess.Popen(
                command, env=known | DASK | environment, stdout=file, stderr=file, cwd=self._folder
            )
        self.processes.append(process)
        return process

    def log(self) -> str:
        """Return what its scheduler and its workers have written."""
        return "".join(path.read_text(errors="replace") for path in sorted(self._folder.glob(f"{self.name}-*.log")))

    def done(self) -> int:
        """Count the stages of images that its workers have done."""
        return self.log().count(" done: ")

    def cut_off(self) -> None:
        """Pull the cable: nothing says goodbye."""
        ip("link", "set", self._link, "down")

    def bring_back(self) -> None:
        ip("link", "set", self._link, "up")

    def kill(self) -> None:
        """End all its processes, frozen ones too."""
        for started in self.processes:
            started.kill()
            started.wait()
        self.processes.clear()

    @property
    def worker(self) -> subprocess.Popen[bytes]:
        """The latest process that was started here."""
        return self.processes[-1]

    def close(self) -> None:
        self.kill()
        ip("netns", "delete", self._netns)  # and its link with it


class Network:
    """Hosts, and a Dask cluster on them; the scheduler has a host of its own, `driver` and the workers have others."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._bridge = folder, f"dr{os.getpid()}"
        self._numbers = itertools.count(1)
        self.hosts: dict[str, Host] = {}
        ip("link", "add", self._bridge, "type", "bridge")
        ip("link", "set", self._bridge, "up")

    def __getitem__(self, name: str) -> Host:
        """Return a host; make it where there is none of this name."""
        if name not in self.hosts:
            address = f"10.213.77.{next(self._numbers)}"
            self.hosts[name] = Host(name, address, self._bridge, self._folder)
        return self.hosts[name]

    @property
    def scheduler(self) -> str:
        return f"tcp://{self['scheduler'].address}:{PORT}"

    def start_scheduler(self) -> None:
        self._start("scheduler", "Scheduler at", "distributed.cli.dask_scheduler", "--port", PORT)

    def start_worker(self, name: str, *options: object) -> None:
        self._start(name, "Registered to", "distributed.cli.dask_worker", self.scheduler, "--name", name, "--nthreads",
                    1, "--memory-limit", "3GB", "--no-nanny", *options)  # fmt: skip

    def _start(self, name: str, sign: str, module: str, *arguments: object) -> None:
        host = self[name]
        before = host.log().count(sign)
        options = ["--host", host.address, "--no-dashboard"]
        process = host.start(sys.executable, "-m", module, *arguments, *options)
        until(lambda: host.log().count(sign) > before or process.poll() is not None)
        assert process.poll() is None, host.log()

    def make_ready(self) -> None:
        """Bring back what an earlier test has broken: a scheduler, and the workers cpu1 and cpu2."""
        names = ["scheduler", "cpu1", "cpu2"]
        for name in set(self.hosts) - set(names):
            self.hosts.pop(name).close()
        alive = {name: bool(self[name].processes) and self[name].worker.poll() is None for name in names}
        if not alive["scheduler"]:
            self.start_scheduler()
        for name in names[1:]:
            self[name].bring_back()
            if not (alive[name] and alive["scheduler"]):
                self[name].kill()
                self.start_worker(name)

    def close(self) -> None:
        for host in self.hosts.values():
            host.close()
        ip("link", "delete", self._bridge)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    try:
        subprocess.run(["unshare", "--uts", "--mount", "true"], check=True, capture_output=True)
        network = Network(tmp_path_factory.mktemp("network"))
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("network namespaces are not permitted here")
    yield network
    network.close()


@pytest.fixture
def network(cluster: Network) -> Network:
    """A scheduler on a host of its own, and a worker on each of the hosts cpu1 and cpu2."""
    cluster.make_ready()
    return cluster


@pytest.fixture(scope="module")
def corpus(make_models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    make_models(folder)
    (folder / "photos").mkdir()
    for index in range(PHOTOS):
        pixels = photo(index, bright=bool(index % 3), height=120, width=160)
        assert cv2.imwrite(str(folder / f"photos/photo{index:02d}.png"), pixels)
    return folder


def results(workspace: Path) -> dict[str, bytes]:
    """Read the outputs."""
    folders = [path for name in ("masks", "dataset") for path in workspace.glob(f"{name}/**/*") if path.is_file()]
    paths = [*sorted(folders), workspace / "regions.parquet"]
    return {str(path.relative_to(workspace)): path.read_bytes() for path in paths}


def everything(workspace: Path) -> dict[str, bytes]:
    """Read all files but those of Prefect."""
    paths = {str(path.relative_to(workspace)): path for path in workspace.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in paths.items() if not name.startswith("prefect")}


def mining(corpus: Path, workspace: Path, threshold: float) -> Mining:
    return Mining(
        photos=corpus / "photos", mse_model=corpus / "mse.pth", gan_model=corpus / "gan.pth", workspace=workspace,
        threshold=threshold, shard_size=8,
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, bytes]]:
    """Give the outputs of a single machine, under a threshold."""
    known: dict[float, dict[str, bytes]] = {}

    def outputs(threshold: float = THRESHOLD) -> dict[str, bytes]:
        if threshold not in known:
            workspace = tmp_path_factory.mktemp("alone") / "ws"
            known[threshold] = results(process(mining(corpus, workspace, threshold)).root)
        return known[threshold]

    return outputs


class Run:
    """A run of ``desra mine`` on a host, with a Prefect server of its own."""

    def __init__(
        self, network: Network, host: str, corpus: Path, workspace: Path, threshold: float = THRESHOLD
    ) -> None:
        self.workspace = Workspace(workspace)
        models = ("--mse-model", corpus / "mse.pth", "--gan-model", corpus / "gan.pth")
        command = desra_command(
            "mine", corpus / "photos", *models, "--workspace", workspace, "--shard-size", 8, "--threshold", threshold,
            "--scheduler", network.scheduler, "--device", "cpu", "--log-level", "debug",
        )  # fmt: skip
        self._log = workspace.parent / f"run-{time.monotonic_ns()}.log"
        self.process = network[host].start(*command, log=self._log)

    def wait_for(self, images: int) -> None:
        """Wait until masks of so many images are there."""

        def there() -> bool:
            assert self.process.poll() is None, self.output()
            return len(list(self.workspace.masks.glob("*.png"))) >= images

        until(there)

    def output(self) -> str:
        return self._log.read_text()

    def end(self) -> int:
        return self.process.wait(timeout=600)


@pytest.mark.slow
def test_several_hosts_end_as_one(network: Network, corpus: Path, alone, tmp_path: Path) -> None:
    """One of them declares a GPU; the run is told to compute on CPUs."""
    network.start_worker("gpu1", "--resources", "GPU=1")
    before = {name: network[name].done() for name in ("cpu1", "cpu2", "gpu1")}
    run = Run(network, "driver", corpus, tmp_path / "ws")
    assert run.end() == 0, run.output()
    assert results(tmp_path / "ws") == alone()
    assert all(network[name].done() > known for name, known in before.items())


@pytest.mark.faults
def test_a_host_that_is_cut_off_and_comes_back(network: Network, corpus: Path, alone, tmp_path: Path) -> None:
    """What it goes on with meanwhile, another host has done by then: it reaches the disk, but not the scheduler."""
    run = Run(network, "driver", corpus, tmp_path / "ws")
    run.wait_for(2)
    network["cpu1"].cut_off()
    time.sleep(2 * TTL)
    network["cpu1"].bring_back()
    assert run.end() == 0, run.output()
    assert results(tmp_path / "ws") == alone()


@pytest.mark.faults
def test_a_host_that_dies_and_one_that_joins(network: Network, corpus: Path, alone, tmp_path: Path) -> None:
    run = Run(network, "driver", corpus, tmp_path / "ws")
    run.wait_for(2)
    network["cpu1"].cut_off()  # first, so that nobody hears of its end
    network["cpu1"].kill()
    network.start_worker("cpu3")
    assert run.end() == 0, run.output()
    assert results(tmp_path / "ws") == alone()
    assert network["cpu3"].done()


@pytest.mark.faults
def test_a_scheduler_that_is_killed(network: Network, corpus: Path, alone, tmp_path: Path) -> None:
    """Its images are named, or the run ends with a line; with another scheduler, the same command does the rest."""
    run = Run(network, "driver", corpus, tmp_path / "ws")
    run.wait_for(2)
    network["scheduler"].kill()
    assert run.end() in (1, 2)
    said = run.output()
    assert "Traceback" not in said
    assert "run again" in said or "Dask" in said, said
    network.make_ready()
    again = Run(network, "driver", corpus, tmp_path / "ws")
    assert again.end() == 0, again.output()
    assert results(tmp_path / "ws") == alone()


@pytest.mark.faults
def test_a_driver_that_is_killed_and_started_on_another_host(
    network: Network, corpus: Path, alone, tmp_path: Path
) -> None:
    run = Run(network, "driver", corpus, tmp_path / "ws")
    run.wait_for(2)
    left = psutil.Process(run.process.pid).children(recursive=True)
    run.process.kill()
    run.process.wait()
    _, alive = psutil.wait_procs(left, timeout=60)
    assert not alive, "its Prefect server would go on writing the database that the next run opens"
    again = Run(network, "cpu2", corpus, tmp_path / "ws")
    assert again.end() == 0, again.output()
    assert results(tmp_path / "ws") == alone()


@pytest.mark.faults
def test_a_worker_that_stands_still_within_a_run(network: Network, corpus: Path, alone, tmp_path: Path) -> None:
    worker = network["cpu1"].worker
    run = Run(network, "driver", corpus, tmp_path / "ws")
    run.wait_for(2)
    os.kill(worker.pid, signal.SIGSTOP)
    time.sleep(2 * TTL)
    os.kill(worker.pid, signal.SIGCONT)
    assert run.end() == 0, run.output()
    assert results(tmp_path / "ws") == alone()


@pytest.mark.faults
def test_a_worker_that_wakes_after_a_later_run(network: Network, corpus: Path, alone, tmp_path: Path) -> None:
    """The later run has made its image under other settings, and the worker is in the middle of the older ones."""
    host = network["cpu1"]
    run = Run(network, "driver", corpus, tmp_path / "ws")
    until(lambda: run.process.poll() is not None or host.done())
    os.kill(host.worker.pid, signal.SIGSTOP)
    run.process.kill()
    run.process.wait()
    process(mining(corpus, tmp_path / "ws", OTHER_THRESHOLD))
    assert results(tmp_path / "ws") == alone(OTHER_THRESHOLD)
    before = everything(tmp_path / "ws")
    os.kill(host.worker.pid, signal.SIGCONT)
    until(lambda: "this run has ended, or another one has taken the workspace over" in host.log())
    assert everything(tmp_path / "ws") == before
