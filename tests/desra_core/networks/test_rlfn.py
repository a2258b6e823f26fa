"""RLFN against a plain formulation of the published network, whose values lie in 0..255."""

import cv2
import numpy as np
import pytest
import skimage.data
import torch
from torch.nn import functional

from desra_core.evaluation.fidelity import measure_fidelity
from desra_core.evaluation.metrics import psnr
from desra_core.networks.checkpoints import load_model, read_weights
from desra_core.networks.super_resolution import super_resolve

PHOTO = skimage.data.chelsea()
NTIRE = {"conv_1": "fea_conv", "conv_2": "LR_conv", "block_": "B"}


def weights(features, inner, blocks, scale=4, names=None):
    """Random weights under the names of the authors, or under other ``names``."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"conv_1": (features, 3, 3), "conv_2": (features, features, 3), "upsampler.0": (3 * scale**2, features, 3)}
    for number in range(1, blocks + 1):
        block = {"c1_r": (inner, features, 3), "c2_r": (inner, inner, 3), "c3_r": (features, inner, 3),
                 "c5": (features, features, 1), "esa.conv1": (16, features, 1), "esa.conv_f": (16, 16, 1),
                 "esa.conv2": (16, 16, 3), "esa.conv3": (16, 16, 3), "esa.conv4": (features, 16, 1)}  # fmt: skip
        shapes |= {f"block_{number}.{name}": shape for name, shape in block.items()}
    made = {}
    for name, (rows, columns, side) in shapes.items():
        for own, other in (names or {}).items():
            name = name.replace(own, other)
        spread = (columns * side**2) ** -0.5
        made[f"{name}.weight"] = torch.randn((rows, columns, side, side), generator=generator) * spread
        made[f"{name}.bias"] = torch.randn(rows, generator=generator)
    return made


def plain(state, pixels, names=None):
    """The published network on a whole ``(H, W, 3)`` uint8 photo; returns float values in 0..255."""
    own = {"conv_1": "conv_1", "conv_2": "conv_2", "block_": "block_"} | (names or {})

    def convolved(values, name, **how):
        return functional.conv2d(values, state[f"{name}.weight"].float(), state[f"{name}.bias"].float(), **how)

    first = values = convolved(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float(), own["conv_1"], padding=1)
    number = 1
    while f"{own['block_']}{number}.c5.weight" in state:
        block, inside = f"{own['block_']}{number}", values
        for name in ("c1_r", "c2_r", "c3_r"):
            inside = convolved(inside, f"{block}.{name}", padding=1)
            inside = torch.where(inside > 0, inside, 0.05 * inside)
        values = convolved(inside + values, f"{block}.c5")
        small = convolved(values, f"{block}.esa.conv1")
        coarse = functional.max_pool2d(convolved(small, f"{block}.esa.conv2", stride=2), 7, 3)
        coarse = convolved(coarse, f"{block}.esa.conv3", padding=1)
        wide = functional.interpolate(coarse, values.shape[2:], mode="bilinear")
        values = values * torch.sigmoid(convolved(wide + convolved(small, f"{block}.esa.conv_f"), f"{block}.esa.conv4"))
        number += 1
    sums = convolved(convolved(values, own["conv_2"], padding=1) + first, "upsampler.0", padding=1)
    scale = int((sums.shape[1] // 3) ** 0.5)
    return functional.pixel_shuffle(sums, scale)[0].permute(1, 2, 0).numpy()


def check(path, state, pixels, names, share):
    result = super_resolve(load_model(path), pixels).pixels
    expected = np.rint(plain(state, pixels, names).clip(0, 255))
    error = np.abs(result - expected)
    assert error.max() <= 1
    assert (error > 0).mean() < share
    assert len(np.unique(expected)) > 50


@pytest.mark.parametrize(("names", "features", "inner", "blocks", "scale"), [
    (NTIRE, 46, 48, 4, 4), (None, 46, 48, 4, 4), (None, 52, 52, 6, 4), (None, 52, 52, 6, 2), (None, 20, 12, 11, 3),
])  # fmt: skip
def test_both_ways_to_name_the_tensors(names, features, inner, blocks, scale, tmp_path):
    state = weights(features, inner, blocks, scale, names)
    state["upsampler.0.weight"] *= float(60 / plain(state, PHOTO[100:131, 200:240], names).std())
    torch.save({"params": state}, tmp_path / "rlfn.pth")
    model = load_model(tmp_path / "rlfn.pth")
    assert (model.architecture, model.scale, model.traits.minimum) == ("RLFN", scale, 15)
    check(model.path, state, PHOTO[100:131, 200:240], names, share=0.05)  # random weights amplify rounding


def test_the_wider_kind_has_the_published_size(tmp_path):
    state = weights(52, 52, 6)
    assert (len(state), sum(value.numel() for value in state.values())) == (114, 543_740)


def test_the_winner_of_ntire_is_better_than_bicubic_enlargement(shared_data):
    """Fed with values in 0..1, it would be 1.5 to 3 dB worse than bicubic enlargement."""
    path = shared_data / "weights" / "rlfn-ntire2022-x4.pth"
    state = read_weights(path)
    assert (len(state), sum(value.numel() for value in state.values())) == (78, 317_218)
    sharp = PHOTO[80:240, 100:260]
    lr = torch.from_numpy(sharp.copy()).permute(2, 0, 1)[None].float()
    lr = functional.interpolate(lr, scale_factor=0.25, mode="bicubic", antialias=True).clamp(0, 255).round()
    lr = lr[0].permute(1, 2, 0).numpy().astype(np.uint8)
    check(path, state, lr, NTIRE, share=1e-3)
    everywhere = np.ones(sharp.shape[:2], np.bool_)
    results = (super_resolve(load_model(path), lr).pixels, cv2.resize(lr, (160, 160), interpolation=cv2.INTER_CUBIC))
    network, bicubic = (
        psnr(measure_fidelity(sharp, result, everywhere).squared_error, everywhere.sum()) for result in results
    )
    assert network > bicubic + 0.5


@pytest.mark.parametrize("sides", [(1, 1), (15, 3), (14, 40)])
def test_photos_smaller_than_the_attention_takes(sides, shared_data):
    model = load_model(shared_data / "weights" / "rlfn-ntire2022-x4.pth")
    result = super_resolve(model, PHOTO[100 : 100 + sides[0], 100 : 100 + sides[1]]).pixels
    assert result.shape == (4 * sides[0], 4 * sides[1], 3)
