"""``desra config``: the settings of a workspace as a TOML file, with which the same command has nothing to do."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from desra_core.evaluation.table import as_toml
from desra_core.gate.comparison import decide_and_publish, plan_comparison
from desra_core.settings import Detection, Mining
from desra_core.settings.models import Comparing, Finetuning
from desra_core.workspace import Workspace
from tests.conftest import Desra, refusal
from tests.in_process import judge_all, process, train

TINY = {"preset": "cpu", "iterations": 2, "checkpoint_every": 2, "patch": 256, "batch": 2, "discriminator_features": 4,
        "warmup": 1, "images": 3}  # fmt: skip


@pytest.fixture(scope="module")
def mined(make_models: Callable, make_photos: Callable, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A workspace with a finetune and a verdict."""
    root = tmp_path_factory.mktemp("a 'quoted' \"folder\" of Zoë")
    make_photos(root / "photos", 8)
    mse, gan = make_models(root / "models")
    settings = Mining(photos=root / "photos", mse_model=str(mse), gan_model=gan, workspace=root / "ws",
                      min_area="0.1%", exclude=("*_old.png", "thumbs"), threshold=0.65, keep="maps")  # fmt: skip
    process(settings)
    return SimpleNamespace(root=root, ws=root / "ws", settings=settings, mse=mse, gan=gan)


def written(run: Any, path: Path) -> dict[str, Any]:
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    path.write_text(run.stdout)
    return tomllib.loads(run.stdout)


def test_a_mining_run_has_nothing_to_do_with_its_own_settings(
    mined: SimpleNamespace, desra_here: Desra, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = desra_here("config", "--from-workspace", mined.ws)
    assert written(run, tmp_path / "a.toml") == {
        "photos": str(mined.root / "photos"),
        "mse-model": str(mined.mse),
        "gan-model": str(mined.gan),
        "workspace": str(mined.ws),
        "min-area": "0.1%",
        "exclude": ["*_old.png", "thumbs"],
        "threshold": 0.65,
        "keep": "maps",
    }
    assert "# Checkpoint of the GAN-trained model.\ngan-model = " in run.stdout
    monkeypatch.chdir(tmp_path)
    again = desra_here("mine", "--config", "a.toml")
    assert again.returncode == 0, again.stderr
    assert again.stdout.startswith("nothing to do: 8 of 8 images done")


def test_the_workspaces_own_twin_needs_no_name(
    make_models: Callable, make_photos: Callable, desra_here: Desra, tmp_path: Path
) -> None:
    make_photos(tmp_path / "photos", 2)
    mse, gan = make_models(tmp_path / "models")
    place = Workspace(tmp_path / "ws")
    place.twin.parent.mkdir(parents=True)
    mse.rename(place.twin)
    process(Mining(photos=tmp_path / "photos", gan_model=gan, workspace=place.root))
    found = written(desra_here("config", "--from-workspace", place.root), tmp_path / "a.toml")
    assert found == {"photos": str(tmp_path / "photos"), "gan-model": str(gan), "workspace": str(place.root)}
    assert desra_here("mine", "--config", tmp_path / "a.toml").stdout.startswith("nothing to do")


def test_detect_keeps_the_threshold_of_its_method(make_pairs: Callable, desra_here: Desra, tmp_path: Path) -> None:
    make_pairs(tmp_path, 3)
    given = {"mse_sr": tmp_path / "mse_sr", "gan_sr": tmp_path / "gan_sr", "workspace": tmp_path / "ws"}
    process(Detection(**given, method="ldl"))
    found = written(desra_here("config", "--from-workspace", tmp_path / "ws"), tmp_path / "a.toml")
    assert found == {name.replace("_", "-"): str(path) for name, path in given.items()} | {"method": "ldl"}
    assert desra_here("detect", "--config", tmp_path / "a.toml").stdout.startswith("nothing to do")
    process(Detection(**given, method="ldl", threshold=0.7))
    found = written(desra_here("config", "--from-workspace", tmp_path / "ws"), tmp_path / "a.toml")
    assert found["threshold"] == 0.7
    assert desra_here("detect", "--config", tmp_path / "a.toml").stdout.startswith("nothing to do")
    for verb in ("mine", "cycle"):
        line = refusal(desra_here("config", "--from-workspace", tmp_path / "ws", "--for", verb))
        assert line.endswith(f"ws: belongs to runs of desra detect, not of desra {verb}; leave out --for")


def test_finetune_cycle_and_serve(mined: SimpleNamespace, desra_here: Desra, tmp_path: Path) -> None:
    bare = written(desra_here("config", "--from-workspace", mined.ws, "--for", "finetune"), tmp_path / "a.toml")
    assert bare == {"workspace": str(mined.ws)}
    run = train(Finetuning(workspace=mined.ws, output=mined.root / "run", **TINY))
    with Workspace(mined.ws).locked():
        comparison = plan_comparison(Comparing(workspace=mined.ws, after=run.root, min_removal=0.5))
        judge_all(comparison)
        decide_and_publish(comparison)
    finetuned = written(desra_here("config", "--from-workspace", mined.ws, "--for", "finetune"), tmp_path / "a.toml")
    expected = {name.replace("_", "-"): value for name, value in TINY.items()}
    assert finetuned == expected | {"workspace": str(mined.ws), "output": str(run.root)}
    again = desra_here("finetune", "--config", tmp_path / "a.toml")
    assert again.stdout.startswith("nothing to do: this finetune has ended before"), again.stderr
    mining = written(desra_here("config", "--from-workspace", mined.ws), tmp_path / "b.toml")
    for verb in ("cycle", "serve"):
        cycled = written(desra_here("config", "--from-workspace", mined.ws, "--for", verb), tmp_path / "b.toml")
        assert cycled == mining | expected | {"min-removal": 0.5, "keep-mse": False}


def test_a_folder_without_a_run_is_refused(desra_here: Desra, tmp_path: Path) -> None:
    line = refusal(desra_here("config", "--from-workspace", tmp_path))
    assert line == f"error: {tmp_path}: is no workspace with a run in it; name one, or run desra mine"


@given(st.dictionaries(st.from_regex(r"[a-z_-]+", fullmatch=True), st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])), st.booleans(), st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False), st.lists(st.text(st.characters(exclude_categories=["Cs"]))),
)))  # fmt: skip
def test_toml_is_read_as_it_was(values: dict[str, Any]) -> None:
    assert tomllib.loads("\n".join(as_toml(values))) == values
