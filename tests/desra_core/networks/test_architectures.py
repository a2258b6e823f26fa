"""The reach of a network: how much the border of a window changes results that lie a halo away."""

import numpy as np
import pytest
import skimage.data
import torch

from desra_core.networks.checkpoints import load_model
from desra_core.networks.super_resolution import super_resolve

PHOTO = skimage.data.chelsea()
EXACT = ["SRVGGNetCompact x4", "SRVGGNetCompact x2", "SPAN"]
OTHERS = ["RRDBNet x4", "RRDBNet x2", "SwinIR M", "SwinIR L"]


@pytest.mark.parametrize("name", EXACT)
def test_an_exact_halo_is_the_radius_of_influence(name, checkpoint):
    model = load_model(checkpoint(name))
    reached = influence(model, edge=60)
    assert 60 - model.traits.halo <= reached < 60


@pytest.mark.parametrize("name", ["realesr-general-x4v3", "realesr-animevideov3"])
def test_the_halo_of_real_networks_is_exact(name, shared_data):
    model = load_model(shared_data / "weights" / f"{name}.pth")
    assert 60 - model.traits.halo <= influence(model, edge=60)


def influence(model, edge):
    """The first column of a photo whose result changes at all when the photo changes from a column on."""
    pixels = torch.from_numpy(PHOTO[100:124, 100 : 100 + edge + 20] / np.float32(255)).permute(2, 0, 1)[None]
    changed = pixels.clone()
    changed[..., edge:] = 1 - changed[..., edge:]
    differs = (model(pixels) != model(changed)).any(dim=(0, 1, 2))
    return int(differs.nonzero()[0, 0]) // model.scale


@pytest.mark.parametrize("name", OTHERS)
def test_a_border_beyond_the_halo_does_not_show(name, network, save, tmp_path):
    assert border_error(load_model(save(network(name), tmp_path / "model.pth"))) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_a_border_beyond_the_halo_does_not_show_at_full_size(name, full_size_network, save, tmp_path):
    assert border_error(load_model(save(full_size_network(name), tmp_path / "model.pth"))) < 1e-5


def border_error(model):
    """The largest change, in 0..1, of results a halo away from the right half when that half is cut off."""
    edge = model.traits.halo + 16
    pixels = torch.from_numpy(PHOTO[100:148, 100 : 100 + 2 * edge] / np.float32(255)).permute(2, 0, 1)[None]
    whole, part = model(pixels), model(pixels[..., :edge])
    assert whole.std() > 0.1
    assert (whole[..., : edge * model.scale] - part).abs().max() > 0.01
    kept = slice(0, (edge - model.traits.halo) * model.scale)
    return float((whole[..., kept] - part[..., kept]).abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_full_size_networks_come_back(name, full_size_network, save, plain, tmp_path):
    network = full_size_network(name)
    pixels = PHOTO[100:124, 200:232]
    result = super_resolve(load_model(save(network, tmp_path / "model.pth")), pixels).pixels
    expected = np.rint(plain(network, pixels).clip(0, 1) * 255)
    assert np.abs(result - expected).max() <= 1
