"""The container files and the systemd unit: they pass their linters, and what they name exists in desra and Prefect."""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

import cv2
import pytest
import typer
import yaml
from prefect import settings as prefect_settings

from deployments import check, cli
from deployments.serving.server import HISTORY, server_settings
from desra_core.settings import Machine
from desra_core.settings.models import Serving
from flows.desra_flow import WEBHOOK
from tests.conftest import MODELS, photo

ROOT = Path(__file__).resolve().parents[2]
CONTAINER = ROOT / "deployments/container"
COMPOSE = [CONTAINER / "compose.yaml", CONTAINER / "compose.gpu.yaml"]
UNIT = ROOT / "deployments/systemd/desra-serve@.service"
PAGE = ROOT / "docs/how-to/containers.md"
PROGRAMS = Path(sys.executable).parent

# The user is a number without a home, and may read all that root may read.
LOCKED_IN = """
mount --bind "$1" "$1" && mount -o remount,bind,ro / && cd "$1" && mkdir -m 1777 tmp && shift &&
exec setpriv --reuid 54321 --regid 54321 --clear-groups --no-new-privs --bounding-set -all,+dac_read_search \
    --inh-caps +dac_read_search --ambient-caps +dac_read_search env -u HOME -u XDG_CACHE_HOME TMPDIR="$PWD/tmp" "$@"
"""


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that everyone may reach and write, unlike those of pytest."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        yield Path(name)


def locked_in(folder: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command as in a container with a read-only root, in a folder that alone can be written."""
    if run("unshare", "--mount", "mount", "-o", "remount,bind,ro", "/").returncode:
        pytest.skip("no read-only root can be made here")
    return run("unshare", "--mount", "sh", "-c", LOCKED_IN, "sh", folder, *command)


@pytest.fixture(scope="module")
def services() -> dict[str, dict]:
    return yaml.safe_load(COMPOSE[0].read_text())["services"]


@pytest.fixture(scope="module")
def containerfile() -> str:
    return (CONTAINER / "Containerfile").read_text()


@pytest.fixture(scope="module")
def config() -> dict[str, object]:
    return tomllib.loads((CONTAINER / "serve.toml").read_text())


@pytest.mark.parametrize("linter", [["hadolint", CONTAINER / "Containerfile"],
                                    ["check-jsonschema", "--builtin-schema", "vendor.compose-spec", *COMPOSE]],
                         ids=lambda linter: linter[0])  # fmt: skip
def test_linters_find_nothing(linter: list[str | Path]) -> None:
    linted = run(PROGRAMS / linter[0], *linter[1:])
    assert linted.returncode == 0, linted.stdout + linted.stderr


def test_variables_exist() -> None:
    files = [*CONTAINER.iterdir(), UNIT, PAGE]
    named = {name for file in files for name in re.findall(r"\b(?:PREFECT|DESRA)_[A-Z_]+\b", file.read_text())}
    assert WEBHOOK in named
    for name in named - {WEBHOOK}:
        assert hasattr(prefect_settings, name), name


def test_the_server_keeps_runs_as_that_of_desra_serve_does(services) -> None:
    assert server_settings(HISTORY).items() <= services["prefect"]["environment"].items()


def test_what_compose_asks_for_is_in_the_example(services) -> None:
    asked = set(re.findall(r"\$\{(\w+)", COMPOSE[0].read_text()))
    assert asked == set(re.findall(r"(?m)^(\w+)=", (CONTAINER / "env.example").read_text()))


def test_no_password_is_written_down() -> None:
    assert all(not value for value in re.findall(r"(?m)^\w*PASSWORD=(.*)$", (CONTAINER / "env.example").read_text()))
    for line in "\n".join(file.read_text() for file in COMPOSE).splitlines():
        if "PASSWORD" in line or "AUTH_STRING" in line:
            assert line.endswith("PASSWORD:?}"), line
    assert run("git", "-C", ROOT, "check-ignore", CONTAINER / ".env").returncode == 0


def test_serve_finds_its_settings_and_folders(services, config) -> None:
    fields = {key.replace("-", "_"): value for key, value in config.items()}
    machine = {name: fields.pop(name) for name in list(fields) if name in Machine.model_fields}
    assert Serving(**fields).name
    assert Machine(**machine)
    command, file = services["desra"]["command"]
    assert command in typer.main.get_command(cli.app).commands
    mounts = {mount["target"]: mount for mount in services["desra"]["volumes"]}
    assert mounts[file]["source"] == "./serve.toml"
    assert not mounts[config["workspace"]].get("read_only")
    for key in ("photos", "gan-model", "mse-model", "perceptual"):
        [mount] = [mounts[each] for each in mounts if Path(config[key]).is_relative_to(each)]
        assert mount["read_only"], key


def test_only_the_workspace_and_temporary_files_can_be_written(services) -> None:
    for service in services.values():
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert "/tmp:mode=1777" in service["tmpfs"]
        assert service["deploy"]["resources"]["limits"].keys() == {"cpus", "memory", "pids"}


def test_the_image_has_what_desra_needs(containerfile) -> None:
    final = containerfile.rpartition("FROM ")[2]
    for library in check.LIBRARIES:
        assert library.debian.split()[0] in final
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    [program] = project["project"]["scripts"]
    assert f'ENTRYPOINT ["{program}"]' in final
    assert re.search(r"(?m)^USER [1-9]\d*:[1-9]\d*$", final)
    assert f"('127.0.0.1', {Serving.model_fields['port'].default + 1})" in final
    kept = set(re.findall(r"(?m)^!(.*)$", (ROOT / ".dockerignore").read_text()))
    packages = {pattern.rstrip("*") for pattern in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    files = {project["project"]["readme"], *project["project"]["license-files"]}
    assert kept == packages | files | {"pyproject.toml", "constraints.txt"}


def test_the_gpu_file_gives_arguments_of_the_image(containerfile) -> None:
    given = yaml.safe_load(COMPOSE[1].read_text())["services"]["desra"]["build"]["args"]
    assert set(given) <= set(re.findall(r"(?m)^ARG (\w+)", containerfile))


def test_systemd_takes_the_unit(tmp_path) -> None:
    unit = tmp_path / "desra-serve@photos.service"
    unit.write_text(UNIT.read_text().replace("/opt/desra", sys.prefix))
    try:
        verified = run("systemd-analyze", "verify", unit)
    except FileNotFoundError:
        pytest.skip("no systemd here")
    assert (verified.returncode, verified.stderr) == (0, "")


def test_the_unit_starts_again_what_may_go_better() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment]
    unit.read_string(UNIT.read_text())
    service = unit["Service"]
    assert service["Restart"] == "on-failure"
    assert service["RestartPreventExitStatus"].split() == ["2", "3"]
    _, command, file = service["ExecStart"].split()
    assert command in typer.main.get_command(cli.app).commands
    assert file == unit["Unit"]["AssertPathExists"]


def test_prefect_can_be_imported_without_a_home(folder) -> None:
    program = "from deployments import cli; cli._name_a_home(); import prefect, desra_core.detection.similarity"
    done = locked_in(folder, sys.executable, "-W", "ignore", "-c", program)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in folder.iterdir()] == ["tmp"]


@pytest.mark.slow
def test_a_run_needs_no_home_and_writes_to_its_workspace_alone(folder) -> None:
    (folder / "photos").mkdir()
    cv2.imwrite(str(folder / "photos/a.png"), photo(0, bright=True))
    done = locked_in(folder, PROGRAMS / "desra", "mine", "photos", "--workspace", "ws", "--workers", "1",
                     "--mse-model", MODELS / "mse.pth", "--gan-model", MODELS / "gan.pth")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {path.name for path in folder.iterdir()} == {"photos", "tmp", "ws"}
    assert (folder / "ws/prefect/server.log").read_text() == ""
    assert list((folder / "ws/prefect/ui").glob("*/index.html"))
