"""Flags and TOML files: in every path that they take, ``~`` is the home folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, get_args

import cv2
import numpy as np
import pytest
import typer
from pydantic import BaseModel
from typer.testing import CliRunner

from deployments import cli
from deployments.commands.flags import paths_at_home, with_flags
from desra_core.settings import Detection, Machine, Mining
from desra_core.settings.models import (
    Benchmarking,
    Calibrating,
    Comparing,
    Cycling,
    Finetuning,
    Inspecting,
    Serving,
    SyntheticBenchmarking,
)
from tests.conftest import refusal

KINDS: dict[type[BaseModel], dict[str, Any]] = {
    Mining: {"argument": "photos"},
    Detection: {},
    Finetuning: {},
    Comparing: {},
    Cycling: {"argument": "photos"},
    Inspecting: {"argument": "photos"},
    Calibrating: {},
    Benchmarking: {"argument": "dataset"},
    SyntheticBenchmarking: {},
    Serving: {"config_argument": True},
}
# Text that holds paths; all other text is known to hold none.
TEXTS = {
    "segmenter": "mmseg:~/config.py,~/checkpoint.pth",
    "weights": "~/weights.toml",
    "method": "~/detector.py",
    "methods": "desra,~/detector.py",
    "perceptual": "~/vgg.pth",
    "mse_model": "~/mse.pth",
    "reference": "rlfn=~/rlfn",
}
NO_PATHS = {"group_by", "min_area", "name", "mine_at", "cycle_at", "timezone", "webhook", "history", "exclude",
            "include", "image_column", "mask_column", "prominence_column"}  # fmt: skip
DETECTOR = """class Own:
    threshold, smallest, inputs = 0.1, 1, ()

    def __call__(self, mse_sr, gan_sr, lr, labels, /):
        return mse_sr


detector = Own()
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home/detector.py").write_text(DETECTOR)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def paths_of(kind: type[BaseModel]) -> dict[str, str]:
    """A path in the home folder for each setting that takes one."""
    given = {}
    for name, field in kind.model_fields.items():
        if Path in (field.annotation, *get_args(field.annotation)):
            given[name] = "~/weights.toml" if (kind, name) == (Calibrating, "output") else f"~/{name}"
        elif str in (field.annotation, *get_args(field.annotation)):
            assert (name in TEXTS) != (name in NO_PATHS), f"does {name} hold a path?"
            given |= {name: TEXTS[name]} if name in TEXTS else {}
    return given


def run(kind: type[BaseModel], *arguments: str) -> str:
    """Return the settings of a command with these flags, as JSON."""
    asked: list[BaseModel] = []

    def command(settings: BaseModel, machine: Machine) -> None:
        asked.append(settings)

    app = typer.Typer()
    app.command()(with_flags(command, kind, **KINDS[kind]))
    ended = CliRunner().invoke(app, arguments)
    assert ended.exit_code == 0, ended.output
    return asked[0].model_dump_json()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["command line", "TOML file"])
def test_every_path_may_begin_with_the_home_folder(home: Path, kind: type[BaseModel], where: str) -> None:
    given, argument = paths_of(kind), KINDS[kind].get("argument")
    assert len(given) > (2 if kind is Inspecting else 3)
    if where == "command line":
        flags = [f"--{name.replace('_', '-')}={path}" for name, path in given.items() if name != argument]
        asked = run(kind, *flags, *([given[argument]] if argument else []))
    else:
        values = {name: [path] if name == "reference" else path for name, path in given.items()}
        (home / "run.toml").write_text("\n".join(f"{name} = {json.dumps(value)}" for name, value in values.items()))
        config = ["~/run.toml"] if KINDS[kind].get("config_argument") else ["--config=~/run.toml"]
        asked = run(kind, *config)
    assert "~" not in asked
    assert asked.count(f"{home}/") == sum(path.count("~") for path in given.values())


def test_labels_may_lie_in_the_home_folder(home: Path) -> None:
    asked = json.loads(run(Detection, "--mse-sr=a", "--gan-sr=b", "--workspace=ws", "--labels=~/labels"))
    assert asked["segmenter"] == f"labels:{home}/labels"
    assert asked["gan_sr"] == str(Path.cwd() / "b")


def test_every_command_takes_paths_in_this_way() -> None:
    """Those whose flags are their own: `paths_at_home` is around each."""

    def nothing() -> None: ...

    known = {paths_at_home(nothing).__code__, with_flags(lambda settings, machine: None, Mining).__code__}
    commands = [command.callback for command in cli.app.registered_commands]
    assert len(commands) == 26
    assert all(command is not None and command.__code__ in known for command in commands)


def test_a_command_that_is_refused_leaves_no_workspace_behind(tmp_path: Path, desra_here, make_models) -> None:
    mse, gan = make_models(tmp_path / "models")
    for name in ("mse/a.png", "gan/b.png"):
        (tmp_path / name).parent.mkdir()
        assert cv2.imwrite(str(tmp_path / name), np.zeros((20, 20, 3), np.uint8))
    (tmp_path / "empty").mkdir()
    models = ("--mse-model", mse, "--gan-model", gan)
    other = ("--mse-model", mse, "--gan-model", mse)
    pairs = ("--mse-sr", tmp_path / "mse", "--gan-sr", tmp_path / "gan")
    for command in (
        ("mine", tmp_path / "empty", *models),
        ("mine", tmp_path / "mse", *other),
        ("cycle", tmp_path / "empty", *models),
        ("cycle", tmp_path / "mse", *other),
        ("detect", *pairs),
        ("detect", *pairs, "--weights", "published"),
        ("calibrate", *pairs, "--labels", tmp_path / "gan", "--output", tmp_path / "w.toml"),
        ("finetune",), ("compare", "--after", gan), ("rollback",), ("status",), ("report",), ("gc", "--apply"),
        ("export", "--format", "coco", "--output", tmp_path / "out"), ("import", "labelme", tmp_path / "mse"),
    ):  # fmt: skip
        for place in ("new/ws", "empty"):
            run = desra_here(*command, "--workspace", tmp_path / place)
            assert run.returncode == 2, (command, run.stderr)
            assert run.stderr.count("error: ") == 1, (command, run.stderr)
            assert not (tmp_path / "new").exists(), command
            assert not list((tmp_path / "empty").iterdir()), command
    served = desra_here("serve", "--photos", tmp_path / "mse", *other, "--workspace", tmp_path / "new/ws")
    assert "is the same as" in served.stderr
    marked = desra_here("benchmark", tmp_path, *pairs, "--output", tmp_path / "new/ws")
    assert marked.returncode == 2
    assert not (tmp_path / "new").exists()


def test_folders_in_the_home_folder_are_found(home: Path, desra_here) -> None:
    for folder in ("masks", "gt"):
        (home / folder).mkdir()
        assert cv2.imwrite(str(home / folder / "a.png"), np.pad(np.full((20, 20), 255, np.uint8), 20))
    judged = desra_here("evaluate", "--masks=~/masks", "--gt=~/gt", "--output=~/out")
    assert judged.returncode == 0, judged.stderr
    assert (home / "out/evaluation.html").exists()
    assert f"{home}/ws: is no workspace" in desra_here("status", "--workspace=~/ws").stderr
    assert list(home.parent.iterdir()) == [home], "and no folder called ~"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("photos = " + "[" * 3000, "is no TOML"),
        ("limit = " + "1" * 5000, "is no TOML"),
        ('photos = "a\\u0000b"', "holds a null character"),
        ('photos = "~\\u0000"', "holds a null character"),
        ('weights = "~\\u0000"', "holds a null character"),
        ('exclude = ["a\\u0000b"]', "holds a null character"),
        ('segmenter = "labels:a\\u0000b"', "holds a null character"),
    ],
)
def test_a_hostile_file_of_settings_is_refused(text: str, told: str, tmp_path: Path, desra_here) -> None:
    given = {"photos": '"p"', "gan-model": '"g.pth"', "workspace": f'"{tmp_path}/ws"'} | dict([text.split(" = ")])
    (tmp_path / "run.toml").write_text("\n".join(f"{key} = {value}" for key, value in given.items()))
    assert told in refusal(desra_here("mine", "--config", tmp_path / "run.toml"))


def test_settings_are_read_from_files_alone(tmp_path: Path, desra_here) -> None:
    os.mkfifo(tmp_path / "pipe.toml")
    for path in (tmp_path / "pipe.toml", Path("/dev/zero")):
        assert "cannot be read (it is a pipe or a device)" in refusal(desra_here("mine", "--config", path))
