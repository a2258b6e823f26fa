"""Benchmarks and calibrations that leave images out say so, to the server and to the command."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from desra_core.settings.models import Benchmarking, Calibrating
from desra_core.workspace import Workspace
from tests.conftest import client_of


@pytest.fixture(autouse=True)
def server(prefect_environment: dict[str, str]) -> Iterator[None]:
    with client_of(prefect_environment):
        yield


@pytest.mark.parametrize("failures", [(), ("photo.png",)])
def test_a_benchmark_lacks_the_images_that_cannot_be_judged(failures, tmp_path: Path, monkeypatch) -> None:
    module = import_module("flows.benchmark")
    monkeypatch.setattr(module, "plan", MagicMock())
    monkeypatch.setattr(module, "run_detectors", MagicMock())
    monkeypatch.setattr(module, "publish_benchmark", lambda _: SimpleNamespace(judged=3, failures=failures))
    ended = module.benchmark(Benchmarking(dataset=tmp_path / "pairs", output=tmp_path / "out"))
    assert (ended.in_one_line, ended.to_look_at) == ("3 images judged", bool(failures))


@pytest.mark.parametrize(("failed_before", "uncounted"), [(False, 0), (True, 0), (False, 2)])
def test_a_calibration_lacks_the_images_that_cannot_be_compared_or_counted(
    failed_before, uncounted, tmp_path: Path, monkeypatch
) -> None:
    module = import_module("flows.calibrate")
    found = SimpleNamespace(in_one_line="nothing new", to_look_at=failed_before, problem=None)
    weights = SimpleNamespace(rows=[SimpleNamespace(state="calibrated")], histogram=SimpleNamespace(seen=3))
    stand_ins = {
        "corpus_of": SimpleNamespace(workspace=tmp_path / "ws"),
        "detect": found,
        "plan_counting": SimpleNamespace(missing=lambda: {0: 3}, most_pixels=None, some_files=None),
        "open_dask": contextlib.nullcontext(),
        "RunProgress": contextlib.nullcontext(),
        "count_shard": uncounted,
        "derive_calibration": weights,
        "publish_weights": None,
    }
    for name, value in stand_ins.items():
        monkeypatch.setattr(module, name, MagicMock(return_value=value))
    Workspace(tmp_path / "ws").create()
    ended = module.calibrate(Calibrating(workspace=tmp_path / "ws", output=tmp_path / "weights.toml"))
    assert ended.in_one_line == "1 class calibrated from 3 images; nothing new"
    assert ended.to_look_at == (failed_before or uncounted > 0)
