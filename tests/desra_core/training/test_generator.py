"""Saved weights have the parent's names: the usual classes load them, and compute what the trained network does."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from desra_core.errors import UsageError
from desra_core.networks.architectures import ARCHITECTURES
from desra_core.networks.checkpoints import load_model, read_weights, recognised
from desra_core.third_party import mend_basicsr
from desra_core.training.networks import Generator, load_generator

mend_basicsr()

from basicsr.archs.rrdbnet_arch import RRDBNet  # noqa: E402
from basicsr.archs.srvgg_arch import SRVGGNetCompact  # noqa: E402
from basicsr.archs.swinir_arch import SwinIR  # noqa: E402
from spandrel.architectures.DAT import DAT  # noqa: E402
from spandrel.architectures.ESRGAN import ESRGAN  # noqa: E402
from spandrel.architectures.SPAN import SPAN  # noqa: E402

SWINIR = {"img_size": 16, "window_size": 8, "depths": [2, 2], "embed_dim": 12, "num_heads": [2, 2], "mlp_ratio": 2}
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "SRVGGNetCompact x4": lambda: SRVGGNetCompact(num_feat=8, num_conv=3),
    "SRVGGNetCompact x2": lambda: SRVGGNetCompact(num_feat=8, num_conv=2, upscale=2),
    "RRDBNet x4": lambda: RRDBNet(3, 3, scale=4, num_feat=8, num_block=2),
    "RRDBNet x2": lambda: RRDBNet(3, 3, scale=2, num_feat=8, num_block=2),
    "ESRGAN x4, old names": lambda: ESRGAN(num_filters=8, num_blocks=2, scale=4),
    "SwinIR x4, real world": lambda: SwinIR(**SWINIR, upscale=4, upsampler="nearest+conv"),
    "SwinIR x2, classical": lambda: SwinIR(**SWINIR, upscale=2, upsampler="pixelshuffle"),
    "SwinIR x3, light": lambda: SwinIR(**SWINIR, upscale=3, upsampler="pixelshuffledirect"),
    "SwinIR x4, 3conv": lambda: SwinIR(**SWINIR, upscale=4, upsampler="nearest+conv", resi_connection="3conv"),
}
BUFFERS = ("attn_mask", "relative_position_index")


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of SwinIR, about torch.meshgrid
        return NETWORKS[name]().eval()


def copied(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=name)


def trained(generator: Generator) -> nn.Module:
    """Return the network after every parameter has changed in a different way."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in generator.network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return generator.network.eval()


def enlarged(network: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return network(torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(2)))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_untouched_network_is_the_parent(name: str, tmp_path: Path) -> None:
    weights = copied(built(name))
    torch.save({"params_ema": weights}, tmp_path / "parent.pth")
    generator = load_generator(tmp_path / "parent.pth")
    assert_equal(generator.checkpoint_weights(generator.network.state_dict()), weights)
    assert_equal(generator.weights, weights)
    assert all(parameter.requires_grad for parameter in generator.network.parameters())
    assert generator.network.training


@pytest.mark.parametrize("name", NETWORKS)
def test_trained_weights_load_into_the_class_that_they_came_from(name: str, tmp_path: Path) -> None:
    own = built(name)
    torch.save({"params": copied(own)}, tmp_path / "parent.pth")
    generator = load_generator(tmp_path / "parent.pth")
    before, after = enlarged(own), enlarged(trained(generator))
    torch.save({"params": generator.checkpoint_weights(generator.network.state_dict())}, tmp_path / "child.pth")
    own.load_state_dict(torch.load(tmp_path / "child.pth", weights_only=True)["params"], strict=True)
    model = load_model(tmp_path / "child.pth")
    assert model.scale == generator.scale == int(name.partition(" x")[2][0])
    assert not torch.allclose(after, before, atol=0.01)
    torch.testing.assert_close(enlarged(own), after, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(enlarged(model.network), after, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in NETWORKS if name.startswith("SwinIR")])
def test_buffers_stay_as_they_were(name: str, tmp_path: Path) -> None:
    weights = copied(built(name))
    buffers = [key for key in weights if key.endswith(BUFFERS)]
    assert {key.rpartition(".")[2] for key in buffers} == set(BUFFERS)
    torch.save({"params": weights}, tmp_path / "parent.pth")
    generator = load_generator(tmp_path / "parent.pth")
    trained(generator)
    saved = generator.checkpoint_weights(generator.network.state_dict())
    assert_equal({key: saved[key] for key in buffers}, {key: weights[key] for key in buffers})
    moved = [key for key in weights if key not in buffers]
    assert not any(torch.equal(saved[key], weights[key]) for key in moved)


@pytest.mark.parametrize("name", NETWORKS)
def test_architectures_have_their_usual_names(name: str, tmp_path: Path) -> None:
    torch.save(copied(built(name)), tmp_path / "parent.pth")
    usual = name.partition(" ")[0].replace("ESRGAN", "RRDBNet")
    architecture = recognised(tmp_path / "parent.pth").architecture
    assert ARCHITECTURES[architecture.id].trainable == usual


def test_old_esrgan_names_really_are_other_ones() -> None:
    assert "model.0.weight" in built("ESRGAN x4, old names").state_dict()
    assert "conv_first.weight" in built("RRDBNet x4").state_dict()


@pytest.mark.parametrize("name", ["SRVGGNetCompact x4", "RRDBNet x2", "SwinIR x4, real world"])
@pytest.mark.parametrize("wrapped", ["params", "params_ema", "both", "bare", "module.", "float16"])
def test_every_usual_container_is_read(name: str, wrapped: str, tmp_path: Path) -> None:
    weights = copied(built(name))
    content: dict[str, object] = {
        "params": {"params": weights},
        "params_ema": {"params_ema": weights},
        "both": {"params": {key: value + 1 for key, value in weights.items()}, "params_ema": weights},
        "bare": weights,
        "module.": {"params": {f"module.{key}": value for key, value in weights.items()}},
        "float16": {"params": {key: value.half() if value.is_floating_point() else value
                               for key, value in weights.items()}},
    }[wrapped]  # fmt: skip
    torch.save(content, tmp_path / "parent.pth")
    generator = load_generator(tmp_path / "parent.pth")
    saved = generator.checkpoint_weights(generator.network.state_dict())
    if wrapped == "float16":
        # Trained in float32, and saved so: rounding would undo small steps.
        assert {saved[key].dtype for key in generator.names} == {torch.float32}
        saved = {key: value.to(generator.weights[key].dtype) for key, value in saved.items()}
        weights = content["params"]  # type: ignore[index, assignment]
    assert_equal(saved, weights)
    assert all(parameter.dtype == torch.float32 for parameter in generator.network.parameters())
    own = built(name)
    own.load_state_dict(saved, strict=True)


def test_saved_weights_do_not_move_with_the_network(gan_model: Path) -> None:
    generator = load_generator(gan_model)
    saved = generator.checkpoint_weights(generator.network.state_dict())
    trained(generator)
    assert_equal(saved, read_weights(gan_model))


def test_a_parent_is_loaded_anew_each_time(gan_model: Path) -> None:
    trained(load_generator(gan_model))
    generator = load_generator(gan_model)
    assert_equal(generator.checkpoint_weights(generator.network.state_dict()), read_weights(gan_model))


def test_the_real_checkpoint(shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "weights" / "realesr-general-x4v3.pth"
    generator = load_generator(path)
    assert_equal(generator.checkpoint_weights(generator.network.state_dict()), read_weights(path))


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "SPAN": lambda: SPAN(num_in_ch=3, num_out_ch=3, feature_channels=12),
    "DAT": lambda: DAT(img_size=16, in_chans=3, embed_dim=12, split_size=[4, 8], depth=[1], num_heads=[2], upscale=2),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_are_refused_by_name(name: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = OTHERS[name]()
    torch.save({"params": copied(network)}, tmp_path / "other.pth")
    with pytest.raises(UsageError) as caught:
        load_generator(tmp_path / "other.pth")
    assert str(caught.value) == (
        f"{tmp_path}/other.pth: is a network that cannot be finetuned here ({name}); "
        "those that can are RRDBNet, SRVGGNetCompact, SwinIR"
    )


def test_files_that_are_no_checkpoint(tmp_path: Path, demo_discriminator: Path) -> None:
    (tmp_path / "text.pth").write_text("weights")
    for path, reason in ((tmp_path / "text.pth", "is not a checkpoint"), (tmp_path / "no.pth", "does not exist"),
                         (demo_discriminator, "is of no architecture that spandrel knows")):  # fmt: skip
        with pytest.raises(UsageError, match=f"{path}: {reason}") as caught:
            load_generator(path)
        assert "\n" not in str(caught.value)
