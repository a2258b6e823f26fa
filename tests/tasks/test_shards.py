"""Where the stages of a run are computed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from desra_core.errors import UsageError
from desra_core.planning.plan import target_of
from desra_core.settings import Detection, Machine, Mining
from tasks.shards import StageSpec, stages_of


def specs(settings: Detection | Mining, *, gpus: int, device: str) -> tuple[list[StageSpec], list[Any]]:
    """The stages, and what was loaded in advance: device and resources."""
    loaded: list[Any] = []
    dask = SimpleNamespace(threads=1, max_pixels=100, gpus=gpus,
                           call=lambda *arguments, resources: loaded.append((arguments[3], resources)))  # fmt: skip
    target, weights = target_of(settings)
    return stages_of(settings, target, weights, Machine(device=device), dask), loaded  # type: ignore[arg-type]


@pytest.fixture
def mining(make_models, tmp_path: Path) -> Mining:
    mse, gan = make_models(tmp_path)
    return Mining(photos=tmp_path, mse_model=mse, gan_model=gan, workspace=tmp_path / "ws")


@pytest.mark.parametrize(
    ("gpus", "device", "used"),
    [(0, "auto", "cpu"), (0, "cpu", "cpu"), (2, "auto", "cuda"), (2, "cuda", "cuda"), (2, "cpu", "cpu")],
)
def test_networks_run_on_gpus_unless_the_device_is_the_cpu(mining: Mining, gpus: int, device: str, used: str):
    stages, loaded = specs(mining, gpus=gpus, device=device)
    resources = {"GPU": 1} if used == "cuda" else {}
    assert [(stage.name, stage.resources) for stage in stages] == [("super_resolution", resources), ("mask", {})]
    assert stages[0].job.device == used
    assert loaded == [(used, resources)]


def test_a_gpu_that_is_asked_for_and_not_there(mining: Mining) -> None:
    """No command computes on the CPU instead: all of them ask `device_of`."""
    with pytest.raises(UsageError, match="no worker declares a GPU"):
        specs(mining, gpus=0, device="cuda")


def test_detect_needs_none(tmp_path: Path) -> None:
    detection = Detection(mse_sr=tmp_path, gan_sr=tmp_path, workspace=tmp_path / "ws")
    stages, loaded = specs(detection, gpus=2, device="cuda")
    assert [(stage.name, stage.resources) for stage in stages] == [("similarity", {}), ("mask", {})]
    assert not loaded
