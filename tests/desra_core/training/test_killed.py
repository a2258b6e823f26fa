"""Finetunes and a twin that are killed again and again, and end with the same weights as an undisturbed one."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from desra_core.files import read_json
from desra_core.settings.models import Training, Twinning
from desra_core.third_party import mend_basicsr
from desra_core.training.plan import RunFolder
from desra_core.training.twin import freeze_photos, plan_twin

mend_basicsr()

from basicsr.archs.swinir_arch import SwinIR  # noqa: E402

CASES: dict[str, dict[str, Any]] = {
    "l1": {"gan_weight": 0, "iterations": 14, "checkpoint_every": 5},
    "gan": {"warmup": 4, "iterations": 11, "checkpoint_every": 5, "accumulate": 2},
    "swinir": {"gan_weight": 0, "iterations": 11, "checkpoint_every": 5},
    "twin": {"iterations": 11, "checkpoint_every": 5, "patch": 32, "batch": 2, "ema": 0.5},
}
MODELS = {"l1": [5, 10, 14], "gan": [5, 10, 11], "swinir": [5, 10, 11], "twin": [5, 10, 11]}
SLOW = pytest.mark.slow


class Runs(NamedTuple):
    """A run that was killed many times, an undisturbed run, and the steps (warmed, iteration) at each kill."""

    case: str
    killed: RunFolder
    whole: RunFolder
    moments: list[tuple[int, int]]


def swinir(path: Path) -> Path:
    """Make a model that skips random layers in training."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about torch.meshgrid
        network = SwinIR(img_size=8, window_size=4, depths=[2, 2], embed_dim=12, num_heads=[2, 2], mlp_ratio=2,
                         upscale=4, upsampler="pixelshuffledirect")  # fmt: skip
    with torch.no_grad():
        network.upsample[0].weight.mul_(0.1)
    torch.save({"params": network.state_dict()}, path)
    return path


@pytest.fixture(scope="module", params=["gan", *(pytest.param(name, marks=SLOW) for name in ("l1", "swinir", "twin"))])
def runs(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    prepared: Callable[[Path], RunFolder],
    training: Callable[..., Training],
    sharp_photos: Callable[..., Path],
    gan_model: Path,
) -> Runs:
    case, folder = request.param, tmp_path_factory.mktemp("killed")
    model = swinir(folder / "swinir.pth") if case == "swinir" else gan_model
    if case == "twin":
        photos = sharp_photos(folder / "photos")
        twinnings = [
            Twinning(photos=photos, gan_model=model, output=folder / f"{name}.pth", **CASES[case])
            for name in ("killed", "whole")
        ]
        for plan in map(plan_twin, twinnings):
            freeze_photos(plan, 4)
        killed, whole = (plan_twin(twinning).run for twinning in twinnings)
        settings = twinnings[0].model_dump(mode="json")
    else:
        killed, whole = prepared(folder / "killed"), prepared(folder / "whole")
        settings = training(**CASES[case]).model_dump(mode="json")
    asked = json.dumps([str(whole.root), str(killed.root), str(model), settings])
    command = [sys.executable, str(Path(__file__).with_name("killing.py")), asked]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return Runs(case, killed, whole, [tuple(moment) for moment in json.loads(result.stdout)])


def test_killed_runs_end_with_the_same_weights(runs: Runs) -> None:
    case, killed, whole, _ = runs
    assert whole.models() == [whole.model(iteration) for iteration in MODELS[case]]
    files = sorted(path.name for path in (whole.root / "models").iterdir())
    assert sorted(path.name for path in (killed.root / "models").iterdir()) == files
    for name in (name for name in files if name.endswith(".pth")):
        found, wanted = (torch.load(run.root / "models" / name, weights_only=True) for run in (killed, whole))
        assert list(found) == list(wanted)
        for kind, weights in wanted.items():
            assert list(found[kind]) == list(weights)
            for key, value in weights.items():
                assert torch.equal(found[kind][key], value), (name, kind, key)


def test_killed_runs_have_the_same_events(runs: Runs) -> None:
    case, killed, whole, _ = runs
    assert killed.read_losses() == whole.read_losses()
    assert [row["iteration"] for row in killed.read_losses()] == list(range(10, CASES[case]["iterations"], 10))
    assert read_json(killed.progress) == read_json(whole.progress)
    assert events(killed) == events(whole)
    assert not list(killed.root.rglob("*.unfinished"))


def test_the_runs_were_killed_before_their_end(runs: Runs) -> None:
    assert len(set(runs.moments)) >= 2
    assert all(warmed <= 4 and iteration <= CASES[runs.case]["iterations"] for warmed, iteration in runs.moments)
    if runs.case == "gan":
        assert any(0 < warmed < 4 for warmed, _ in runs.moments)
        assert any(iteration > 0 for _, iteration in runs.moments)


def events(run: RunFolder) -> list[tuple[int, float]]:
    """Read the pixel losses of a run as TensorBoard shows them."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(run.tensorboard)).Reload()
    return [(event.step, event.value) for event in found.Scalars("loss/pixel")]
