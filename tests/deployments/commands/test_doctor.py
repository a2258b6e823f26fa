"""``desra doctor`` as a user meets it: on this machine, and where something is wrong."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import psutil
import pytest

from deployments.commands import doctor
from deployments.commands.doctor import Finding
from desra_core.workspace import Workspace
from tests.conftest import desra_command, held


def test_this_machine(tmp_path: Path) -> None:
    """Server and worker start, and nothing of them is left, nor in the workspace."""
    workspace, temporary = tmp_path / "ws", tmp_path / "tmp"
    temporary.mkdir()
    Workspace(workspace).create()
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    environment |= {"TMPDIR": str(temporary), "DESRA_TEST": str(tmp_path)}
    run = subprocess.run(
        desra_command("doctor", "--json", "--workspace", workspace),
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stderr == ""
    told = json.loads(run.stdout)
    assert told["problems"] == 0
    by_subject = {found["subject"]: found for found in told["findings"]}
    for subject in ("Prefect server", "Dask worker"):
        assert by_subject[subject] == Finding("ok", subject, "starts and answers")._asdict()
    assert by_subject["lpips"]["fact"].startswith("lpips ")
    assert by_subject.keys() >= {"desra", "Python", "torch", "segmentation", "openvino", "cores", "memory", "cache"}
    assert not by_subject.keys() & {"all", "dev"}
    assert os.listdir(workspace) == ["lock"]
    assert not list(temporary.glob("desra-*"))
    assert not [each for each in psutil.process_iter() if _environment(each).get("DESRA_TEST") == str(tmp_path)]


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}


@pytest.mark.usefixtures("environment")
def test_a_server_that_does_not_answer_is_a_problem(desra_here, tmp_path: Path) -> None:
    run = desra_here("doctor", "--workspace", tmp_path / "ws")
    assert run.returncode == 2
    *_, problem, total = run.stdout.splitlines()
    assert problem.startswith("problem  Prefect server  PREFECT_API_URL=http://127.0.0.1:9/api: no Prefect server ")
    assert problem.endswith("; start it, or unset the variable")
    assert total == "1 problem"
    assert f"note     workspace       {tmp_path / 'ws'} does not exist; a run would make it" in run.stdout
    assert "ok       Dask worker     starts and answers" in run.stdout
    assert not (tmp_path / "ws").exists()


def test_a_configured_server_must_take_the_key(prefect_environment, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING"):
        monkeypatch.setenv(name, prefect_environment[name])
    url = prefect_environment["PREFECT_API_URL"]
    [found] = doctor._carried_out("Prefect server", lambda: doctor._configured_server(url))
    assert (found.level, found.fact[:24]) == ("ok", "PREFECT_API_URL answers,")
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "of:another server")
    [found] = doctor._carried_out("Prefect server", lambda: doctor._configured_server(url))
    assert found.level == "problem"
    assert "401" in found.fact
    assert found.remedy == "see its log, and whether it wants a key"


def of_workspace(root: Path) -> list[Finding]:
    return list(doctor._carried_out("workspace", lambda: doctor._workspace(Workspace(root))))


def test_a_workspace_in_use_is_named(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "ws")
    workspace.create()
    with held(workspace) as pid:
        owner, disk = of_workspace(workspace.root)
        assert owner.level == "note"
        assert f"is in use by process {pid} on " in owner.fact
        assert disk.fact.startswith(f"{workspace.root} can be written and locked, ")
    assert of_workspace(workspace.root)[0] == Finding("ok", "workspace", "no run holds it")


def test_a_workspace_that_cannot_be_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    [other] = of_workspace(tmp_path)
    assert other.line == (
        f"problem  workspace       {tmp_path}: is a folder with other things in it; name a new folder as workspace"
    )
    for root, place in ((tmp_path / "notes" / "ws", tmp_path / "notes"), (Path("/proc/ws"), Path("/proc"))):
        absent, problem = of_workspace(root)
        assert (absent.level, problem.level) == ("note", "problem")
        assert problem.fact.startswith(f"{place}: cannot be written (")


def test_a_full_disk_is_a_problem(small_disk: Path) -> None:
    [found] = doctor._folder("workspace", small_disk)
    assert (found.level, found.remedy) == ("problem", "free some space")
    assert not list(small_disk.iterdir())


def test_a_missing_extra_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The extras are those of the package that is installed."""
    about = tmp_path / "desra-9.dist-info" / "METADATA"
    about.parent.mkdir()
    about.write_text(
        "Metadata-Version: 2.4\nName: desra\nVersion: 9\nRequires-Dist: torch\n"
        'Provides-Extra: night\nRequires-Dist: nonesuch-1==2; extra == "night"\n'
        'Provides-Extra: day\nRequires-Dist: pillow>=1; python_version > "3" and extra == "day"\n'
        'Provides-Extra: all\nRequires-Dist: desra[night]; extra == "all"\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    night, day = doctor._extras()
    assert night == Finding("note", "night", "without nonesuch-1", "to add it: pip install 'desra[night]'")
    assert (day.level, day.fact.split()[0]) == ("ok", "pillow")


def test_a_check_that_fails_is_a_problem() -> None:
    def check() -> Iterator[Finding]:
        yield Finding("ok", "torch", "imported")
        raise ImportError("libcudart.so.13: cannot open shared object file")

    first, second = doctor._carried_out("torch", check)
    assert first.level == "ok"
    assert second.level == "problem"
    assert "the check failed (ImportError: libcudart.so.13: cannot open" in second.fact


def test_a_start_that_takes_too_long_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_PATIENCE_SECONDS", 0)
    [found] = doctor._in_time("Dask worker", Future())
    assert (found.level, found.fact) == ("problem", "has not answered for 0 s")
