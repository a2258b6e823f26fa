"""Who may reach what desra opens and writes: sockets, permissions and secrets, of real runs and desra serve."""

from __future__ import annotations

import os
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from tests.conftest import MODELS, desra_command
from tests.served import Served, until

pytestmark = pytest.mark.slow

# What an environment may hold that no file and no line may repeat. None of it is of use to a run with its own server.
SECRETS = {
    "PREFECT_API_AUTH_STRING": "user:secret-of-another-server",
    "PREFECT_API_KEY": "secret-key-of-prefect-cloud",
    "DESRA_WEBHOOK": "http://127.0.0.1:9/secret-of-the-webhook",
    "HTTPS_PROXY": "http://user:secret-of-the-proxy@127.0.0.1:9",
    "AWS_SECRET_ACCESS_KEY": "secret-of-a-cloud",
}
# Files that only their owner may read, whatever the umask.
PRIVATE = {"prefect/key", "prefect/report", "prefect/dask.pem"}


class Run(NamedTuple):
    """A run that has ended."""

    code: int
    output: str
    workspace: Path
    listened: dict[str, set[str]]


def listening(root: psutil.Process) -> Iterator[tuple[str, str]]:
    """Yield program and address of each socket that a process or one below it listens on."""
    for process in [root, *root.children(recursive=True)]:
        try:
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN or (connection.laddr and not connection.raddr):
                    yield " ".join(process.cmdline())[-80:], connection.laddr.ip
        except psutil.Error:  # it has ended
            continue


def run(folder: Path, make_photos: Callable[[Path, int], object], umask: int, **environment: str) -> Run:
    """Mine a few photos with a server and workers of its own; see what listens meanwhile."""
    make_photos(folder / "photos", 4)
    command = desra_command(
        "mine", folder / "photos", "--gan-model", MODELS / "gan.pth", "--mse-model", MODELS / "mse.pth",
        "--workspace", folder / "ws", "--workers", 1, "--log-level", "debug",
    )  # fmt: skip
    with (folder / "said").open("wb") as said:
        inherited = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
        process = subprocess.Popen(command, env=inherited | environment, stdout=said, stderr=said, umask=umask)
    seen: dict[str, set[str]] = {}
    root = psutil.Process(process.pid)
    while process.poll() is None:
        for program, address in listening(root):
            seen.setdefault(program, set()).add(address)
        time.sleep(0.2)
    return Run(process.returncode, (folder / "said").read_text(), folder / "ws", seen)


@pytest.fixture(scope="module", params=[0o027, 0o002], ids=["027", "002"])
def mined(request, tmp_path_factory, make_photos) -> tuple[Run, int]:
    folder = tmp_path_factory.mktemp("run")
    ended = run(folder, make_photos, request.param, **SECRETS)
    assert ended.code == 0, ended.output
    return ended, request.param


def files_below(workspace: Path) -> dict[str, Path]:
    found = {path.relative_to(workspace).as_posix(): path for path in workspace.rglob("*") if not path.is_symlink()}
    assert len(found) > 20
    return found


def test_a_run_listens_on_the_loopback_alone(mined: tuple[Run, int]) -> None:
    listened = mined[0].listened
    assert len(listened) >= 2, "the server, and the scheduler with its workers"
    assert {address for addresses in listened.values() for address in addresses} == {"127.0.0.1"}, listened


def test_files_have_the_permissions_of_the_umask(mined: tuple[Run, int]) -> None:
    ended, umask = mined
    wrong = {}
    for name, path in files_below(ended.workspace).items():
        mode = stat.S_IMODE(path.stat().st_mode)
        wanted = 0o600 if name in PRIVATE else (0o777 if path.is_dir() else 0o666) & ~umask
        if mode != wanted:
            wrong[name] = f"{mode:o}, not {wanted:o}"
    assert wrong == {}


def test_no_secret_of_the_environment_is_written(mined: tuple[Run, int]) -> None:
    ended, _ = mined
    words = [value.rpartition("@")[0].rpartition(":")[2] or value for value in SECRETS.values()]
    words = ["secret-of", "secret-key", *words[-1:]]
    assert not any(word in ended.output for word in words)
    holding = [
        name
        for name, path in files_below(ended.workspace).items()
        if path.is_file() and any(word.encode() in path.read_bytes() for word in words)
    ]
    assert holding == []


def test_the_password_of_a_database_stays_unsaid(tmp_path: Path, make_photos: Callable[[Path, int], object]) -> None:
    address = "postgresql+asyncpg://user:secret-of-the-database@127.0.0.1:9/prefect"
    ended = run(tmp_path, make_photos, 0o022, PREFECT_API_DATABASE_CONNECTION_URL=address)
    assert ended.code == 2
    assert "secret-of" not in ended.output
    assert not any(b"secret-of" in path.read_bytes() for path in ended.workspace.rglob("*") if path.is_file())


def test_desra_serve_listens_on_the_loopback_alone(tmp_path: Path, make_photos: Callable[[Path, int], object]) -> None:
    """Its own secrets are in the files that say so, and nowhere else."""
    make_photos(tmp_path / "photos", 4)
    config = tmp_path / "serve.toml"
    config.write_text(
        f'photos = "{tmp_path}/photos"\nworkspace = "{tmp_path}/ws"\ngan-model = "{MODELS}/gan.pth"\n'
        f'mse-model = "{MODELS}/mse.pth"\nport = 0\nworkers = 1\nmemory = "3GB"\nperceptual = "off"\n'
    )
    served = Served(tmp_path, config)
    try:
        until(served.is_up)
        root, seen = psutil.Process(served.process.pid), set()
        served.start("mine")
        until(lambda: seen.update(listening(root)) or served.ended("images computed"))
        assert {address for _, address in seen} == {"127.0.0.1"}
        assert len(seen) >= 4, "Prefect, the report, the dashboard, the workers"
        secrets = {name: (served.workspace.root / name).read_bytes() for name in PRIVATE}
        secrets["prefect/dask.pem"] = secrets["prefect/dask.pem"].splitlines()[1]
        holding = {
            (secret, name.partition(".db")[0])
            for name, path in files_below(served.workspace.root).items()
            for secret, value in secrets.items()
            if path.is_file() and name not in PRIVATE and value in path.read_bytes()
        }
        # The history links to the report. Who reads the database may read report.html, too.
        assert holding <= {("prefect/report", "prefect/prefect")}
        assert secrets["prefect/key"].decode() not in served.said()
    finally:
        served.stop()
