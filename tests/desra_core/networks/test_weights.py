"""Weights as other tools save them: below wrappers of any kind and nesting, and beside mmengine's objects."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from spandrel.architectures.ESRGAN import ESRGAN
from torch import nn

from desra_core.errors import UsageError
from desra_core.files import content_key
from desra_core.networks.checkpoints import load_checkpoint, load_model, read_kinds, read_weights
from desra_core.training.networks import load_generator

Weights = dict[str, torch.Tensor]


def below(*prefixes: str) -> Callable[[Weights], Weights]:
    return lambda weights: {f"{''.join(prefixes)}{name}": value for name, value in weights.items()}


def averaged(weights: Weights) -> Weights:
    return {"n_averaged": torch.tensor(7)} | below("module.")(weights)


def lightning(*names: str) -> Callable[[Weights], dict[str, Any]]:
    """A checkpoint of a Lightning module with a discriminator and a loss network beside the generator."""
    other = {"discriminator.body.0.weight": torch.zeros(8, 3, 3, 3), "loss.vgg.features.0.weight": torch.zeros(4, 3)}
    optimizer = [{"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]}]
    return lambda weights: {
        "epoch": 3, "pytorch-lightning_version": "2.5", "optimizer_states": optimizer,
        "state_dict": other | below(*names)(weights),
    }  # fmt: skip


WRAPPED: dict[str, Callable[[Weights], Any]] = {
    "torch.compile": below("_orig_mod."),
    "DataParallel": below("module."),
    "DataParallel of torch.compile": below("module.", "_orig_mod."),
    "torch.compile of DataParallel": below("_orig_mod.", "module."),
    "net_g": below("net_g."),
    "AveragedModel": averaged,
    "AveragedModel of torch.compile": lambda weights: averaged(below("_orig_mod.")(weights)),
    "AveragedModel in params_ema": lambda weights: {"params_ema": averaged(weights)},
    "torch.compile in params": lambda weights: {"params": below("_orig_mod.")(weights)},
    "Lightning, model": lightning("model."),
    "Lightning, generator": lightning("generator."),
    "Lightning, net_g, compiled": lightning("net_g.", "_orig_mod."),
    "Lightning, the module": lightning("generator.", "module."),
    "a trainer": lambda weights: {"net_g": weights, "net_d": {"a": torch.zeros(2)}, "iter": 9},
    "prefixes of params_ema": below("params_ema."),
    "prefixes of params": below("params."),
    "one name of its own": below("upscaler."),
    "one dict of its own": lambda weights: {"upscaler": weights},
}
FLAT = [
    name for name in WRAPPED if all(isinstance(v, torch.Tensor) for v in WRAPPED[name]({"a": torch.ones(1)}).values())
]


def old_esrgan() -> nn.Module:
    """The names of its tensors begin with ``model.``."""
    torch.manual_seed(0)
    return ESRGAN(num_filters=8, num_blocks=2, scale=4).eval()


@pytest.fixture(params=["SRVGGNetCompact x4", "RRDBNet x4", "ESRGAN, old names"])
def weights(request, network) -> Weights:
    made = old_esrgan() if request.param == "ESRGAN, old names" else network(request.param)
    return {name: value.clone() for name, value in made.state_dict().items()}


def assert_same(found: Weights, wanted: Weights) -> None:
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_wrapped_weights_are_read_like_plain_ones(weights: Weights, wrapper: str, tmp_path: Path) -> None:
    torch.save(WRAPPED[wrapper](weights), tmp_path / "model.pth")
    assert_same(read_weights(tmp_path / "model.pth"), weights)


@pytest.mark.parametrize("wrapper", FLAT)
def test_wrapped_weights_in_safetensors(weights: Weights, wrapper: str, tmp_path: Path) -> None:
    save_file(WRAPPED[wrapper](weights), tmp_path / "model.safetensors")
    assert_same(read_weights(tmp_path / "model.safetensors"), weights)


@pytest.mark.parametrize("wrapper", ["DataParallel of torch.compile", "AveragedModel", "Lightning, generator"])
def test_wrapped_networks_run_and_are_finetuned_under_plain_names(network, wrapper: str, tmp_path: Path) -> None:
    weights = network("SRVGGNetCompact x4").state_dict()
    torch.save(WRAPPED[wrapper](weights), tmp_path / "model.pth")
    assert load_model(tmp_path / "model.pth").scale == 4
    generator = load_generator(tmp_path / "model.pth")
    assert_same(generator.checkpoint_weights(generator.network.state_dict()), weights)


def test_a_real_checkpoint_in_every_wrapper(shared_data: Path, tmp_path: Path) -> None:
    """The case ``13-prefixed-keys``, whose files are made here."""
    path = shared_data / "weights" / "realesr-animevideov3.pth"
    plain = read_weights(path)
    for number, wrap in enumerate(WRAPPED.values()):
        wrapped = tmp_path / f"{number}.pth"
        torch.save(wrap(plain), wrapped)
        assert_same(read_weights(wrapped), plain)
        wrapped.unlink()


def test_both_kinds_of_weights_in_safetensors(network, tmp_path: Path) -> None:
    ema = network("SRVGGNetCompact x4").state_dict()
    raw = {name: value + 1 for name, value in ema.items()}
    both = below("params.")(raw) | below("params_ema.")(ema)
    save_file(both, tmp_path / "both.safetensors")
    assert_same(read_weights(tmp_path / "both.safetensors"), ema)
    kinds = read_kinds(tmp_path / "both.safetensors")
    assert_same(kinds["raw"], raw)
    assert_same(kinds["ema"], ema)


@pytest.mark.parametrize(
    ("raw", "ema"),
    [
        ("params", "params_ema"), ("params", "params-ema"), ("net_g", "net_g_ema"), ("netG", "net_g_ema"),
        ("generator", "generator_ema"), ("model", "model_ema"), ("model", "ema"), ("model", "ema_model"),
        ("model_state_dict", "ema_state_dict"), ("model_state_dict", "ema_model_state_dict"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("around", [dict, lambda content: {"state_dict": content}, lambda content: {"net_g": content}])
def test_averaged_weights_go_first(network, raw: str, ema: str, around: Callable[[Any], Any], tmp_path: Path) -> None:
    weights = network("SRVGGNetCompact x4").state_dict()
    mean = {name: value + 1 for name, value in weights.items()}
    torch.save(around({raw: weights, ema: averaged(mean)}), tmp_path / "model.pth")
    assert_same(read_weights(tmp_path / "model.pth"), mean)
    kinds = read_kinds(tmp_path / "model.pth")
    assert_same(kinds["raw"], weights)
    assert_same(kinds["ema"], mean)


def test_a_file_with_two_networks_is_refused(network, tmp_path: Path) -> None:
    weights = network("SRVGGNetCompact x4").state_dict()
    torch.save({"state_dict": below("net.")(weights) | below("generator.")(weights)}, tmp_path / "model.pth")
    told = r"model\.pth: holds two networks, state_dict\.generator and state_dict\.net; torch\.save the weights of one"
    for read in (read_weights, read_kinds):
        with pytest.raises(UsageError, match=told):
            read(tmp_path / "model.pth")


DISCRIMINATOR = {"conv0.weight": torch.ones(4, 3, 3, 3), "conv0.bias": torch.ones(4), "net.weight": torch.ones(2)}


@pytest.mark.parametrize(
    "wrap",
    [dict, below("_orig_mod."), below("module.", "_orig_mod."), below("params."), lambda weights: {"params": weights}],
)
def test_weights_of_other_networks_are_read_whole(wrap: Callable[[Weights], Any], tmp_path: Path) -> None:
    torch.save(wrap(DISCRIMINATOR), tmp_path / "d.pth")
    assert_same(read_weights(tmp_path / "d.pth"), DISCRIMINATOR)


HISTORY_BUFFER = """
from collections import OrderedDict
import numpy as np

class HistoryBuffer:
    _statistics_methods = OrderedDict()

    def __init__(self, log_history, count_history):
        self._statistics_methods.setdefault("min", HistoryBuffer.min)
        self.max_length = 1000000
        self._log_history, self._count_history = np.array(log_history), np.array(count_history)

    def min(self, window_size=None):
        return self._log_history.min()

    def __getstate__(self):
        self.__dict__.update(statistics_methods=self._statistics_methods)
        return self.__dict__
"""


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A training log as mmengine pickles it; mmengine cannot be imported afterwards."""
    package = tmp_path / "site" / "mmengine" / "logging"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    (package / "history_buffer.py").write_text(HISTORY_BUFFER)
    monkeypatch.syspath_prepend(tmp_path / "site")
    buffer = importlib.import_module("mmengine.logging.history_buffer").HistoryBuffer
    yield {"log_scalars": {"train/loss": buffer([2.0, 1.0], [1, 1])}, "runtime_info": {"last_loss": buffer.min}}
    assert "mmengine" not in sys.modules


def saved(content: Any, path: Path, *, old: bool) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=not old)
    for name in [name for name in sys.modules if name.partition(".")[0] == "mmengine"]:
        del sys.modules[name]
    sys.path.pop(0)
    return path


@pytest.mark.parametrize("old", [False, True])
def test_a_training_log_of_mmengine_is_left_out(network, log: Any, old: bool, tmp_path: Path) -> None:
    weights = network("SRVGGNetCompact x4").state_dict()
    content = {"meta": {"dataset_meta": {"classes": ["wall"]}}, "state_dict": below("generator.")(weights)}
    path = saved(content | {"message_hub": log}, tmp_path / "model.pth", old=old)
    assert_same(read_weights(path), weights)
    assert load_checkpoint(path, "save it anew")["meta"] == content["meta"]


def test_other_objects_are_refused_with_a_remedy_that_names_their_package(network, tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save({"params": network("SRVGGNetCompact x4").state_dict(), "hook": Path("x")}, path)
    content_key(path)
    with pytest.raises(UsageError, match=r"holds an object of pathlib\.\w+ beside .*, and where pathlib is installed"):
        read_weights(path)
