import subprocess
import sys
from pathlib import Path

import pytest

from deployments import check

MADE_UP = check.Library("libmade-up.so.7", "opencv-python", "libmade-up7", "made-up-libs")


def test_nothing_is_missing_here(capsys):
    assert check.main([]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    assert err == ""


def test_a_missing_library_is_named_with_its_packages():
    (problem,) = check.library_problems([*check.LIBRARIES, MADE_UP])
    assert problem.startswith("libmade-up.so.7, which opencv-python needs, is missing: ")
    assert "libmade-up7 (Debian, Ubuntu)" in problem
    assert "made-up-libs (Fedora)" in problem


def test_each_problem_is_one_line_and_the_exit_code_is_two(monkeypatch, capsys):
    monkeypatch.setattr(check, "platform_problems", lambda: check.library_problems([MADE_UP, MADE_UP]))
    assert check.main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 2
    assert err.count("error: libmade-up.so.7") == 2


@pytest.mark.parametrize("version", [(3, 10, 14), (3, 13, 0)])
def test_another_python_is_refused_in_one_line(monkeypatch, capsys, version):
    monkeypatch.setattr(sys, "version_info", version)
    assert check.main(["--interpreter"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert ".".join(map(str, version)) in err
    assert "PYTHON=" in err


def test_a_python_without_ensurepip_is_refused(monkeypatch):
    find_spec = check.importlib.util.find_spec
    monkeypatch.setattr(
        check.importlib.util, "find_spec", lambda name: None if name == "ensurepip" else find_spec(name)
    )
    (problem,) = check.interpreter_problems()
    assert "ensurepip" in problem
    assert "-venv" in problem


def test_it_runs_as_a_script_without_any_installed_package():
    script = Path(check.__file__)
    done = subprocess.run([sys.executable, "-I", "-S", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
