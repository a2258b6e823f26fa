from pathlib import Path

import pytest
import torch

from deployments.demo.__main__ import MODELS
from desra_core.third_party import mend_torchvision
from desra_core.training.networks import load_discriminator
from docs import demo_models


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def described(path: Path):
    mend_torchvision()
    from spandrel import ModelLoader

    return ModelLoader(device="cpu").load_from_file(path)


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    params = torch.load(path, map_location="cpu", weights_only=True)["params"]
    return {name: tuple(weights.shape) for name, weights in params.items()}


def assert_is_a_pair(folder: Path) -> None:
    mse, gan = (described(folder / name) for name in ("mse.pth", "gan.pth"))
    assert mse.scale == gan.scale == 4
    assert mse.architecture.id == gan.architecture.id == "Compact"
    assert shapes(folder / "mse.pth") == shapes(folder / "gan.pth")
    lr = torch.rand(1, 3, 12, 10, generator=torch.Generator().manual_seed(1))
    mse_sr, gan_sr = mse(lr), gan(lr)
    assert mse_sr.shape == gan_sr.shape == (1, 3, 48, 40)
    assert not torch.equal(mse_sr, gan_sr)


def test_a_few_iterations_make_a_pair(tmp_path, capsys):
    demo_models.main(output=tmp_path / "models", mse_iterations=3, gan_iterations=2, seed=1)
    assert_is_a_pair(tmp_path / "models")
    said = capsys.readouterr().out
    assert "mse 3/3" in said
    assert "gan 2/2" in said


def test_the_same_seed_makes_the_same_pair_and_the_gan_model_from_the_mse_model_alone(tmp_path):
    results = []
    for mse_iterations in (2, 2, 0):
        demo_models.main(output=tmp_path, mse_iterations=mse_iterations, gan_iterations=2, seed=7)
        results.append(torch.load(tmp_path / "gan.pth", weights_only=True)["params"])
    for name, weights in results[0].items():
        assert all(torch.equal(weights, again[name]) for again in results[1:])


@pytest.mark.parametrize("name", ["mse.pth", "gan.pth", "discriminator.pth"])
def test_the_committed_models_are_small(name):
    assert (MODELS / name).stat().st_size < 3_000_000


def test_the_committed_models_are_a_pair():
    assert_is_a_pair(MODELS)


def test_the_discriminator_of_the_pair_takes_images_as_they_are():
    """But for the border: there, what lies outside is black and not gray."""
    network = load_discriminator(None, 4).eval()
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    first = network.conv0
    wanted = first(demo_models.CONTRAST * (image - 0.5))
    demo_models.with_contrast(network)
    torch.testing.assert_close(first(image)[..., 1:-1, 1:-1], wanted[..., 1:-1, 1:-1], rtol=1e-4, atol=1e-4)


def test_the_committed_discriminator_can_be_finetuned_with():
    logits = load_discriminator(MODELS / "discriminator.pth", 64)(torch.rand(1, 3, 32, 32))
    assert logits.shape == (1, 1, 32, 32)
