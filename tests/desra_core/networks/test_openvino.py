"""OpenVINO in the place of PyTorch: the same results in windows of any size, under keys of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage
import torch

from desra_core.networks.checkpoints import load_model
from desra_core.networks.openvino import Compiled
from desra_core.networks.super_resolution import super_resolve
from desra_core.planning.plan import result_key
from desra_core.settings import Mining
from tests.conftest import MODELS

Checkpoint = Callable[[str], Path]
COMPILED = ["SRVGGNetCompact x4", "SRVGGNetCompact x2", "RRDBNet x4", "RRDBNet x2"]


def levels(values: Any) -> Any:
    return values.astype(np.float64)


@pytest.mark.parametrize("name", COMPILED)
def test_results_are_those_of_pytorch(checkpoint: Checkpoint, name: str) -> None:
    photo = np.ascontiguousarray(skimage.data.chelsea()[40:137, 60:191])
    model = load_model(checkpoint(name), engine="openvino-float32")
    assert [type(module) for module in model.network.modules()].count(Compiled) == (2 if "RRDB" in name else 1)
    exact = levels(super_resolve(load_model(checkpoint(name)), photo).pixels)
    one, many = model, replace(model, traits=model.traits._replace(tile=2 * model.traits.halo + 32))
    for windows in (one, many):
        assert np.abs(levels(super_resolve(windows, photo).pixels) - exact).max() <= 1
    fast = super_resolve(load_model(checkpoint(name), engine="openvino-bfloat16"), photo).pixels
    error = np.square(levels(fast) - exact).mean()
    assert error < 255**2 / 10**4.5  # 45 dB
    cpu_lacks_it = not torch.cpu._is_avx512_bf16_supported()
    assert cpu_lacks_it or error > 0
    with_weights = load_model(checkpoint(name))
    assert 0 < model.kept_bytes <= with_weights.kept_bytes


def test_other_architectures_stay_with_pytorch(checkpoint: Checkpoint) -> None:
    photo = skimage.data.chelsea()[:48, :64]
    for precision in ("float32", "bfloat16"):
        pair = [load_model(checkpoint("SPAN"), engine=engine) for engine in (precision, f"openvino-{precision}")]  # type: ignore[arg-type]
        first, second = (super_resolve(model, np.ascontiguousarray(photo)).pixels for model in pair)
        assert np.array_equal(first, second)


def test_each_engine_has_keys_of_its_own(tmp_path: Path) -> None:
    places = {"photos": tmp_path, "gan_model": MODELS / "gan.pth", "workspace": tmp_path / "ws"}
    choices = [{"precision": precision, "backend": backend}
               for backend in ("torch", "openvino") for precision in ("float32", "bfloat16")]  # fmt: skip
    engines = [Mining(**places | choice).engine for choice in choices]  # type: ignore[arg-type]
    assert engines == ["float32", "bfloat16", "openvino-float32", "openvino-bfloat16"]
    assert Mining(**places).engine == "float32"  # type: ignore[arg-type]
    assert len({result_key(MODELS / "gan.pth", engine) for engine in engines}) == 4
