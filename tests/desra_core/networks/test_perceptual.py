"""LPIPS, compared with the package's own class, and unusable weights of every kind. AlexNet is random here."""

from __future__ import annotations

import socket
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch

from desra_core import third_party
from desra_core.errors import UsageError
from desra_core.networks import perceptual
from desra_core.networks.perceptual import load_lpips, lpips_distance

third_party.mend_torchvision()

import lpips  # noqa: E402
import torchvision  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    state = torchvision.models.alexnet(weights=None).state_dict()
    return {name: value for name, value in state.items() if name.startswith("features.")}


@pytest.fixture(scope="module")
def path(weights: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lpips") / "alexnet.pth"
    torch.save(weights, path)
    return path


@pytest.fixture(scope="module")
def model(path: Path) -> torch.nn.Module:
    return load_lpips(path)


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return np.ascontiguousarray(skimage.data.astronaut()[:160, 150:350])


@pytest.fixture(scope="module")
def changed(photo: np.ndarray) -> np.ndarray:
    return np.clip(photo + np.random.default_rng(0).normal(0, 20, photo.shape), 0, 255).astype(np.uint8)


def reference(weights: dict[str, torch.Tensor], before: np.ndarray, after: np.ndarray) -> float:
    """Compute the distance by hand: features after each ReLU, unit length per pixel, the heads of the package."""
    heads = torch.load(Path(lpips.__file__).parent / "weights/v0.1/alex.pth", map_location="cpu")
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    network = torchvision.models.alexnet(weights=None).features.eval()
    network.load_state_dict({name.removeprefix("features."): value for name, value in weights.items()})
    pair = [(torch.from_numpy(image / 127.5 - 1).float() - shift) / scale for image in (before, after)]
    pair = [values.permute(2, 0, 1)[None] for values in pair]
    distance, stage = 0.0, 0
    with torch.no_grad():
        for layer in network:
            pair = [layer(values) for values in pair]
            if not isinstance(layer, torch.nn.ReLU):
                continue
            x, y = (values / values.norm(dim=1, keepdim=True) for values in pair)
            distance += float((heads[f"lin{stage}.model.1.weight"] * (x - y) ** 2).sum(1).mean())
            stage += 1
    assert stage == 5
    return distance


def test_distance_by_hand(model, weights, photo, changed) -> None:
    expected = reference(weights, photo, changed)
    assert expected > 1e-4
    assert lpips_distance(model, photo, changed) == pytest.approx(expected, rel=1e-4)


def test_equal_images_and_symmetry(model, photo, changed) -> None:
    assert lpips_distance(model, photo, photo) == 0
    assert lpips_distance(model, photo, changed) == pytest.approx(lpips_distance(model, changed, photo), rel=1e-6)


def test_16_bits_and_gray(model, photo, changed) -> None:
    wide = [image.astype(np.uint16) * 257 for image in (photo, changed)]
    assert lpips_distance(model, *wide) == pytest.approx(lpips_distance(model, photo, changed), rel=1e-4)
    gray = [image[:, :, :1] for image in (photo, changed)]
    assert lpips_distance(model, *gray) == lpips_distance(model, *(np.repeat(image, 3, axis=2) for image in gray))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (30, 80), (31, 31)])
def test_small_images_are_extended(model, photo, changed, height: int, width: int) -> None:
    small = [image[:height, :width] for image in (photo, changed)]
    extended = [np.pad(image, [(0, 31 - min(31, height)), (0, 31 - min(31, width)), (0, 0)], "edge") for image in small]
    assert lpips_distance(model, *small) == lpips_distance(model, *extended)


def test_large_images_are_measured_in_windows(model, photo, changed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perceptual, "_WINDOW", 100)  # of 160 and 200 px: windows of 80 by 100
    parts = [
        lpips_distance(model, photo[y : y + 80, x : x + 100], changed[y : y + 80, x : x + 100])
        for y in (0, 80)
        for x in (0, 100)
    ]
    assert lpips_distance(model, photo, changed) == pytest.approx(np.mean(parts), rel=1e-6)


def test_images_of_two_shapes(model, photo) -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        lpips_distance(model, photo, photo[1:])


def test_loading_is_silent_and_offline(
    path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    model = load_lpips(path)
    assert capfd.readouterr() == ("", "")
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_backbone_is_that_of_the_file(model, weights) -> None:
    state = model.net.state_dict()
    assert len(state) == 10
    for name, value in state.items():
        assert torch.equal(value, weights["features." + name.split(".", 1)[1]])


def refusal(path: Path) -> UsageError:
    with pytest.raises(UsageError) as caught:
        load_lpips(path)
    assert caught.value.subject == str(path)
    assert "\n" not in str(caught.value)
    return caught.value


def test_unusable_files(weights, tmp_path: Path) -> None:
    assert refusal(tmp_path / "absent.pth").reason == "does not exist"
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"body.0.weight": torch.zeros(3)}, tmp_path / "sr.pth")
    torch.save(weights | {"features.3.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "vgg.pth")
    torch.save(weights | {"features.6.bias": torch.full((384,), torch.nan)}, tmp_path / "nan.pth")
    reasons = {
        "text.pth": "is not a checkpoint",
        "sr.pth": "has no features.0.weight, so it is no AlexNet",
        "vgg.pth": "has features.3.weight of (64, 3, 3, 3) where AlexNet has (192, 64, 5, 5)",
        "nan.pth": "has values in features.6.bias that are not finite",
    }
    for name, reason in reasons.items():
        error = refusal(tmp_path / name)
        assert error.reason.startswith(reason)
        assert "alexnet-owt-7be5be79.pth" in error.remedy
