"""Fixtures shared by the end-to-end tests: small real pairs, the real command line, one real Prefect server."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read by PyTorch's threads: they would spin on busy cores

import contextlib
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from deployments import cli
from deployments.serving.server import prefect_server
from desra_core.settings import Machine
from desra_core.workspace import Workspace
from tasks.dask_cluster import standing_cluster
from tasks.logs import configure
from tests.fork_server import ForkServer

STALE_KEY = "desra:of one that was killed"
# A trained pair, small enough to be quick: mse.pth, gan.pth and the discriminator.pth that gan.pth was trained with.
MODELS = Path(__file__).parent / "models"

Desra = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The data beside the checkout; tests that need it skip without it."""
    folder = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data beside the checkout")
    return folder


@pytest.fixture(scope="session")
def prefect_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a command that uses one Prefect server for the whole session.

    A killed server has left its key in the home, and the environment has settings of another server: both are ignored.
    """
    workspace = Workspace(tmp_path_factory.mktemp("prefect"))
    workspace.prefect_home.mkdir()
    (workspace.prefect_home / "key").write_text(STALE_KEY)
    before = dict(os.environ)
    os.environ |= {"PREFECT_API_AUTH_STRING": "of:another server", "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": "*"}
    with prefect_server(workspace) as url:
        environment = dict(os.environ, PREFECT_API_URL=url)
        os.environ.clear()
        os.environ.update(before)
        yield environment


def keyed(environment: Mapping[str, str]) -> str:
    """Return the address of a Prefect server's API with its key, as httpx takes it."""
    return environment["PREFECT_API_URL"].replace("//", f"//{environment['PREFECT_API_AUTH_STRING']}@")


@contextlib.contextmanager
def client_of(environment: Mapping[str, str]) -> Iterator[None]:
    """Connect Prefect's clients in this process to the server of an environment."""
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

    settings = {setting: environment[setting.name] for setting in (PREFECT_API_URL, PREFECT_API_AUTH_STRING)}
    with temporary_settings(settings):
        yield


@pytest.fixture(scope="session")
def standing_workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Start a Dask worker that serves one run after another; yields the environment of such runs."""
    key = tmp_path_factory.mktemp("dask") / "key"
    with standing_cluster(Machine(workers=1, memory="4GB"), gpus=0, key=key) as dask:
        yield dask.environment


@pytest.fixture(scope="session")
def fork_server(prefect_environment: dict[str, str], standing_workers: dict[str, str]) -> Iterator[ForkServer]:
    """Start the server that runs ``desra`` commands."""
    server = ForkServer(prefect_environment | standing_workers)
    yield server
    server.close()


@pytest.fixture(scope="session")
def desra(fork_server: ForkServer) -> Desra:
    """Run ``desra`` in a fork of a process that has imported everything, with the session's Prefect server and Dask."""
    return lambda *arguments: fork_server.run(*map(str, arguments))


@pytest.fixture(scope="session")
def desra_alone(prefect_environment: dict[str, str]) -> Desra:
    """Run ``desra`` as a user would, in a new process and with workers of its own."""

    def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            desra_command(*arguments),
            env=prefect_environment | environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )

    return run


@pytest.fixture
def desra_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Desra:
    """Run ``desra`` in this process, quickly, where no Prefect server answers: for commands that need none."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["desra", *map(str, arguments)])
        monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
        handler = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(SystemExit) as ended:
                cli.main()
        finally:
            signal.signal(signal.SIGTERM, handler)
            configure("warning", "text")
        stdout, stderr = capsys.readouterr()
        return subprocess.CompletedProcess(sys.argv, int(ended.value.code or 0), stdout, stderr)

    return run


def refusal(run: subprocess.CompletedProcess[str], *, server: bool = False) -> str:
    """Return the one error line of a refused command; ``server``: whether a Prefect server was started before."""
    errors = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert run.returncode == 2, run.stderr
    assert len(errors) == 1, run.stderr
    assert "Traceback" not in run.stderr
    assert ("starting Prefect" in run.stderr) == server, run.stderr
    return errors[0]


def assert_told_in_help(desra: Desra, verb: str, keys: Iterable[str]) -> None:
    """Check that the help of a command names the keys of what it prints with --json."""
    told = set(re.findall(r"\w+", desra(verb, "--help").stdout))
    assert set(keys) <= told, set(keys) - told


@contextlib.contextmanager
def in_one_thread() -> Iterator[None]:
    """Small as the images are, threads only wait for each other, for long where other processes run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Let PyTorch use one thread during a test."""
    with in_one_thread():
        yield


@contextlib.contextmanager
def held(workspace: Workspace) -> Iterator[int]:
    """Lock a workspace in another process; yield the pid of that process."""
    script = "import sys\nfrom pathlib import Path\nfrom desra_core.workspace import Workspace\n" \
        "with Workspace(Path(sys.argv[1])).locked():\n    print('held', flush=True)\n    sys.stdin.read()"  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-c", script, workspace.root], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        yield holder.pid
        holder.stdin.close()


def desra_command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "deployments.cli", *map(str, arguments)]


@pytest.fixture(scope="session")
def make_pairs() -> Callable[[Path, int], list[str]]:
    """Write pairs of results to FOLDER/mse_sr and FOLDER/gan_sr; two of three have an artifact."""

    def make(folder: Path, count: int) -> list[str]:
        names = [f"set{index % 2}/photo{index:03d}" for index in range(count)]
        for index, name in enumerate(names):
            rng = np.random.default_rng(index)
            smooth = cv2.GaussianBlur(rng.integers(0, 256, (200, 240, 3)).astype(np.float32), (0, 0), 6)
            mse_sr = np.clip(128 + 6 * (smooth - 128), 0, 255)
            gan_sr = mse_sr.copy()
            if index % 3:
                gan_sr[40:140, 60:180] += rng.normal(0, 40, (100, 120, 3))
            for role, pixels in (("mse_sr", mse_sr), ("gan_sr", np.clip(gan_sr, 0, 255))):
                path = folder / role / f"{name}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                assert cv2.imwrite(str(path), pixels.astype(np.uint8))
        return names

    return make


@pytest.fixture(scope="session")
def make_models() -> Callable[..., tuple[Path, Path]]:
    """Write a small real pair: the MSE model repeats pixels, the GAN model adds texture where a photo is bright."""

    def weights(strength: float, scale: int) -> dict[str, torch.Tensor]:
        pattern = torch.from_numpy(np.random.default_rng(0).choice([-1.0, 1.0], 3 * scale**2)).float()
        pick, keep, add = torch.zeros(4, 3, 3, 3), torch.zeros(4, 4, 3, 3), torch.zeros(3 * scale**2, 4, 3, 3)
        pick[0, :, 1, 1], keep[0, 0, 1, 1], add[:, 0, 1, 1] = 1 / 3, 1, strength * pattern
        bias = torch.tensor([-0.7, 0, 0, 0])
        layers = [(pick, bias), (torch.zeros(4),), (keep, torch.zeros(4)), (torch.zeros(4),), (add, 0 * pattern)]
        return {
            f"body.{index}.{name}": value
            for index, layer in enumerate(layers)
            for name, value in zip(("weight", "bias"), layer, strict=False)
        }

    def make(folder: Path, scale: int = 4, strength: float = 1.5) -> tuple[Path, Path]:
        folder.mkdir(parents=True, exist_ok=True)
        paths = folder / "mse.pth", folder / "gan.pth"
        for path, texture in zip(paths, (0.0, strength), strict=True):
            torch.save({"params": weights(texture, scale)}, path)
        return paths

    return make


@pytest.fixture(scope="session")
def make_photos() -> Callable[[Path, int], list[str]]:
    """Write low-resolution photos to a folder; two of three are bright somewhere."""

    def make(folder: Path, count: int) -> list[str]:
        names = [f"set{index % 2}/photo{index:03d}" for index in range(count)]
        for index, name in enumerate(names):
            path = folder / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            assert cv2.imwrite(str(path), photo(index, bright=bool(index % 3)))
        return names

    return make


@pytest.fixture(scope="session")
def sharp_photos() -> Callable[..., Path]:
    """Write photos with edges and texture."""

    def make(folder: Path, count: int = 5, side: int = 120, blur: float = 0.0) -> Path:
        folder.mkdir(exist_ok=True)
        for index in range(count):
            rng = np.random.default_rng(index)
            coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            smooth = cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC)
            photo = np.clip(smooth + rng.normal(0, 12, (side, side, 3)), 0, 255).astype(np.uint8)
            cv2.rectangle(photo, (20, 20), (60, 90), (250, 20, 20), 2)
            photo = cv2.GaussianBlur(photo, (0, 0), blur) if blur else photo
            assert cv2.imwrite(str(folder / f"photo{index}.png"), photo)
        return folder

    return make


def photo(seed: int, *, bright: bool, height: int = 50, width: int = 60) -> np.ndarray:
    """Make a photo, ``(H, W, 3)`` uint8: dark and smooth, with a bright patch where asked for."""
    rng = np.random.default_rng(seed)
    smooth = cv2.GaussianBlur(rng.integers(0, 256, (height, width, 3)).astype(np.float32), (0, 0), 4)
    pixels = np.clip(90 + 3 * (smooth - 128), 20, 160)
    if bright:
        pixels[10:40, 15:45] += 0.6 * (250 - pixels[10:40, 15:45]) + 20
    return np.clip(pixels, 0, 255).astype(np.uint8)
