"""Losses compared with NumPy and a slow VGG19, and unusable weights of every kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch

from desra_core.errors import UsageError
from desra_core.settings.models import Training
from desra_core.third_party import mend_basicsr
from desra_core.training.networks import PerceptualLoss, keep_loss, load_discriminator, pixel_loss

mend_basicsr()

from basicsr.archs.discriminator_arch import UNetDiscriminatorSN  # noqa: E402


def images(side: int = 32, count: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make two batches and a mask."""
    generator = torch.Generator().manual_seed(0)
    sr, target = torch.rand(2, count, 3, side, side, generator=generator)
    return sr, target, (torch.rand(count, 1, side, side, generator=generator) < 0.3).float()


@pytest.mark.parametrize("pixel", ["l1", "l2"])
@pytest.mark.parametrize("mask_weight", [1.0, 0.25, 7.0])
def test_pixel_loss(pixel: str, mask_weight: float, training: Callable[..., Training]) -> None:
    sr, target, mask = images()
    differences = (sr.double() - target.double()).numpy()
    each = np.abs(differences) if pixel == "l1" else differences**2
    expected = (each * np.where(mask.numpy() > 0, mask_weight, 1)).mean()
    found = pixel_loss(sr, target, mask, training(pixel=pixel, mask_weight=mask_weight))
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_keep_loss() -> None:
    sr, target, mask = images()
    differences = np.abs((sr.double() - target.double()).numpy())
    differences[np.broadcast_to(mask.numpy() > 0, differences.shape)] = 0
    assert keep_loss(sr, target, mask).item() == pytest.approx(differences.mean(), rel=1e-5)
    assert keep_loss(sr, target, torch.ones_like(mask)).item() == 0


def pulls(loss: torch.Tensor, sr: torch.Tensor, mask: torch.Tensor) -> tuple[float, float]:
    """Compute the mean gradient of masked pixels, and of the others."""
    loss.backward()
    assert sr.grad is not None
    pull = sr.grad.abs().mean(1, keepdim=True)
    return pull[mask > 0].mean().item(), pull[mask == 0].mean().item()


def test_where_pixels_pull(training: Callable[..., Training]) -> None:
    sr, target, mask = images()
    inside, outside = pulls(pixel_loss(sr.requires_grad_(), target, mask, training(mask_weight=1e6)), sr, mask)
    assert inside > 1e5 * outside > 0
    sr, target, mask = images()
    inside, outside = pulls(keep_loss(sr.requires_grad_(), target, mask), sr, mask)
    assert inside == 0 < outside


@pytest.fixture(scope="module")
def perceptual(vgg19_file: Path) -> PerceptualLoss:
    return PerceptualLoss(str(vgg19_file))


# VGG19 as its paper has it: so many convolutions, then a maximum of 2x2.
STAGES = (2, 2, 4, 4, 4)
WEIGHTS = {(1, 2): 0.1, (2, 2): 0.1, (3, 4): 1, (4, 4): 1, (5, 4): 1}


def features(weights: dict[str, torch.Tensor], image: torch.Tensor) -> dict[tuple[int, int], torch.Tensor]:
    """The output of each convolution of VGG19, before ReLU, by stage and number."""
    values = (image - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[
        :, None, None
    ]
    found, index = {}, 0
    for stage, convolutions in enumerate(STAGES, start=1):
        for number in range(1, convolutions + 1):
            kernel, bias = weights[f"features.{index}.weight"], weights[f"features.{index}.bias"]
            values = torch.nn.functional.conv2d(values, kernel, bias, padding=1)
            found[stage, number] = values
            values = values.clamp(min=0)
            index += 2
        values = torch.nn.functional.max_pool2d(values, 2)
        index += 1
    return found


def test_perceptual_loss(vgg19: dict[str, torch.Tensor], perceptual: PerceptualLoss) -> None:
    sr, target, _ = images()
    first, second = features(vgg19, sr), features(vgg19, target)
    expected = sum(weight * (first[layer] - second[layer]).abs().mean() for layer, weight in WEIGHTS.items())
    assert perceptual(sr, target).item() == pytest.approx(float(expected), rel=1e-4)
    assert perceptual(sr, sr).item() == 0


def test_layers_are_those_before_relu(vgg19: dict[str, torch.Tensor], perceptual: PerceptualLoss) -> None:
    sr, _, _ = images(count=1)
    expected = features(vgg19, sr)
    for found, layer in zip(perceptual._layers(sr), WEIGHTS, strict=True):
        assert 0.1 < (found < 0).float().mean() < 0.9
        torch.testing.assert_close(found, expected[layer], rtol=1e-4, atol=1e-4)


def test_only_the_result_gets_a_gradient(perceptual: PerceptualLoss) -> None:
    sr, target, _ = images()
    sr.requires_grad_(True)
    target.requires_grad_(True)
    perceptual(sr, target).backward()
    assert target.grad is None
    assert sr.grad is not None
    assert (sr.grad.abs().sum(dim=(1, 2, 3)) > 0).all()
    assert all(parameter.grad is None for parameter in perceptual.parameters())
    assert not any(parameter.requires_grad for parameter in perceptual.parameters())


def test_the_gradient_is_that_of_the_loss(perceptual: PerceptualLoss) -> None:
    sr, target, _ = images(count=1)
    sr.requires_grad_(True)
    perceptual(sr, target).backward()
    assert sr.grad is not None
    direction = sr.grad / sr.grad.norm()
    with torch.no_grad():
        ends = [perceptual(sr + step * direction, target).item() for step in (0.01, -0.01)]
    assert (ends[0] - ends[1]) / 0.02 == pytest.approx(sr.grad.norm().item(), rel=0.05)


@pytest.mark.parametrize(
    "kind", ["bare names", pytest.param("params", marks=pytest.mark.slow), "float16", "with a classifier"]
)
def test_weights_in_other_forms(
    kind: str, vgg19: dict[str, torch.Tensor], perceptual: PerceptualLoss, tmp_path: Path
) -> None:
    content: dict[str, object] = {
        "bare names": {name.removeprefix("features."): value for name, value in vgg19.items()},
        "params": {"params": vgg19},
        "float16": {name: value.half() for name, value in vgg19.items()},
        "with a classifier": vgg19 | {"classifier.0.weight": torch.zeros(4, 4)},
    }[kind]  # type: ignore[assignment]
    torch.save(content, tmp_path / "vgg.pth")
    sr, target, _ = images(count=1)
    found = PerceptualLoss(str(tmp_path / "vgg.pth"))(sr, target).item()
    assert found == pytest.approx(perceptual(sr, target).item(), rel=1e-2 if kind == "float16" else 1e-6)


def refused(weights: object) -> str:
    with pytest.raises(UsageError) as caught:
        PerceptualLoss(str(weights))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_files_that_hold_no_vgg19(vgg19: dict[str, torch.Tensor], tmp_path: Path, gan_model: Path) -> None:
    other = {"features.0.weight": torch.zeros(64, 1, 3, 3)}
    missing = {name: value for name, value in vgg19.items() if name != "features.34.weight"}
    for name, content in (("shape", vgg19 | other), ("missing", missing)):
        torch.save(content, tmp_path / name)
        expected = f"{tmp_path / name}: holds no weights of VGG19; give torchvision's vgg19-dcbb9e9d.pth"
        assert refused(tmp_path / name) == expected
    assert "holds no weights of VGG19" in refused(gan_model)
    (tmp_path / "text").write_text("weights")
    assert "is not a checkpoint" in refused(tmp_path / "text")
    assert "does not exist" in refused(tmp_path / "nowhere.pth")


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


def test_neither_weights_nor_a_network(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise URLError("Name or service\nnot known")

    monkeypatch.setattr("torch.hub.download_url_to_file", fail)
    assert refused("vgg19") == (
        "--perceptual: vgg19, whose weights are not here and cannot be downloaded (<urlopen error Name or service not "
        "known>); give a local vgg19-dcbb9e9d.pth, or --perceptual off"
    )


def test_the_cache_of_torch_is_used(
    empty_cache: Path, vgg19_file: Path, perceptual: PerceptualLoss, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty_cache.mkdir(parents=True)
    (empty_cache / vgg19_file.name).write_bytes(vgg19_file.read_bytes())
    sr, target, _ = images(count=1)
    assert PerceptualLoss("vgg19")(sr, target).item() == perceptual(sr, target).item()
    (empty_cache / vgg19_file.name).write_bytes(vgg19_file.read_bytes()[:1000])
    assert "or --perceptual off" in refused("vgg19")


@pytest.mark.parametrize("width", [4, 12])
def test_a_discriminator_comes_back(width: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    before = load_discriminator(None, width)
    batch = torch.rand(1, 3, 32, 32)
    before(batch)  # moves the vectors of the spectral norm
    torch.save({"params": before.state_dict()}, tmp_path / "discriminator.pth")
    after = load_discriminator(tmp_path / "discriminator.pth", features=99)
    assert isinstance(after, UNetDiscriminatorSN)
    assert after.conv0.out_channels == width
    for name, value in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], value), name
    assert torch.equal(after.eval()(batch), before.eval()(batch))


def test_the_demos_discriminator(demo_discriminator: Path) -> None:
    assert load_discriminator(demo_discriminator, 64).conv0.out_channels == 12


def test_a_new_discriminator_follows_the_seed() -> None:
    made = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        made.append(load_discriminator(None, 4).state_dict()["conv0.weight"])
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def other_discriminators(folder: Path) -> dict[str, str]:
    """Write files that are no such discriminator; returns the fault of each by name."""
    whole = load_discriminator(None, 4).state_dict()
    gray = UNetDiscriminatorSN(1, num_feat=4).state_dict()
    partly = {name: value for name, value in whole.items() if not name.startswith("conv9")}
    for name, content in (("gray", gray), ("partly", partly), ("flat", {"conv0.weight": torch.zeros(4)})):
        torch.save({"params": content}, folder / name)
    (folder / "text").write_text("weights")
    return {
        "gray": "judges images of 1 channels, but the generator makes 3",
        "partly": "does not fit a U-Net discriminator with spectral norm",
        "flat": "is no U-Net discriminator with spectral norm",
        "text": "is not a checkpoint, or only a part of one",
        "nowhere": "does not exist",
    }


def test_other_discriminators_are_refused(tmp_path: Path, gan_model: Path) -> None:
    cases = {tmp_path / name: reason for name, reason in other_discriminators(tmp_path).items()}
    for path, reason in (cases | {gan_model: "is no U-Net discriminator with spectral norm"}).items():
        with pytest.raises(UsageError) as caught:
            load_discriminator(path, 64)
        assert str(caught.value).startswith(f"{path}: {reason}; ")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("saved", [False, True])
def test_spectral_norms_are_computed_in_float32(saved: bool, demo_discriminator: Path) -> None:
    """Only a GPU would compute them in bfloat16 under autocast, so the test checks that autocast is off."""
    from torch.overrides import TorchFunctionMode

    seen = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), options=None):
            if function in (torch.mv, torch.dot):
                seen.append((torch.is_autocast_enabled("cpu"), arguments[0].dtype))
            return function(*arguments, **(options or {}))

    network = load_discriminator(demo_discriminator if saved else None, 4).train()
    with torch.autocast("cpu", torch.bfloat16), Watch():
        logits = network(torch.rand(1, 3, 32, 32))
    assert logits.dtype == torch.bfloat16
    assert len(seen) > 20
    assert set(seen) == {(False, torch.float32)}
