"""What a wheel brings along, and what a type checker outside of this repository sees of it."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests.conftest import MODELS

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import desra_core
from desra_core.planning.plan import prepare
reveal_type(desra_core.artifact_mask)
prepare("photos")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a copy of this checkout's files, so that nothing is written here."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("no git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        if not name.startswith(("tests/", "docs/")) and (ROOT / name).is_file():
            copy = folder / "copy" / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes((ROOT / name).read_bytes())
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, folder], cwd=folder / "copy", check=True, capture_output=True)
    return next(folder.glob("desra-*.whl"))


def test_a_wheel_has_all_that_the_packages_read(wheel: Path) -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    packages = ("desra_core/", "tasks/", "flows/", "deployments/")
    left_out = ("deployments/container/", "deployments/systemd/")  # of the checkout alone: docs/how-to/containers.md
    names = {name for name in listed.split("\0") if name.startswith(packages) and not name.startswith(left_out)}
    expected = {name for name in names if (ROOT / name).exists()}
    assert expected <= set(zipfile.ZipFile(wheel).namelist())


@pytest.mark.slow
def test_a_wheel_in_an_empty_environment_does_the_work(wheel: Path, make_pairs, tmp_path: Path) -> None:
    """Without any extra, and without a variable that the user would have to set."""
    venv.create(tmp_path / "env", with_pip=True)
    programs = tmp_path / "env" / "bin"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_CON", "PIP_BUILD"))}

    def done(*command: object) -> subprocess.CompletedProcess[str]:
        words = [*map(str, command)]
        return subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    installed = done(programs / "pip", "install", "--no-input", "-c", ROOT / "constraints.txt", wheel)
    assert installed.returncode == 0, installed.stdout + installed.stderr
    assert not set(done(programs / "pip", "list").stdout.split()) & {"mmcv-full", "mmsegmentation", "lpips", "openvino"}
    make_pairs(tmp_path, 2)
    detect = (programs / "desra", "detect", "--mse-sr", "mse_sr", "--gan-sr", "gan_sr", "--workspace", "ws")
    found = done(*detect)
    assert found.returncode == 0, found.stderr
    assert len(list((tmp_path / "ws" / "masks").iterdir())) == 2
    refused = done(*detect, "--segmenter", "mmseg:config.py,model.pth")
    assert (refused.returncode, refused.stdout) == (2, "")
    prepared = done(programs / "desra", "demo", "--prepare", "--output", ".")
    assert prepared.returncode == 0, prepared.stderr
    twin = (programs / "desra", "twin", "photos", "--gan-model", MODELS / "gan.pth", "--output", "twin.pth")
    trained = done(*twin, "--preset", "cpu", "--iterations", "10")
    assert trained.returncode in (0, 3), trained.stderr


@pytest.mark.slow
def test_a_type_checker_outside_sees_the_types(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env")
    python = tmp_path / "env" / "bin" / "python"
    [site] = (tmp_path / "env" / "lib").glob("python*/site-packages")
    zipfile.ZipFile(wheel).extractall(site)
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--python-executable",
        python,
        "--cache-dir",
        tmp_path / "cache",
        "program.py",
    ]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "missing library stubs or py.typed" not in run.stdout
    assert 'Revealed type is "def (' in run.stdout
    assert 'Argument 1 to "prepare" has incompatible type "str"' in run.stdout
