"""Bicubic enlargement against OpenCV in float64, and against itself in windows, to the bit."""

import dataclasses
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data

from desra_core.errors import UsageError
from desra_core.networks.checkpoints import load_pair, load_reference
from desra_core.networks.super_resolution import super_resolve

PHOTO = skimage.data.chelsea()
NOISE = np.random.default_rng(0).integers(0, 256, (77, 130, 3), np.uint8)
PHOTOS = {
    "photo": PHOTO[50:150, 60:201],
    "noise": NOISE,
    "16 bits": NOISE.astype(np.uint16) * 256 + NOISE[::-1, ::-1],
    "gray": NOISE[:, :, :1],
    "one pixel": NOISE[:1, :1],
    "a row": NOISE[:1],
}


@pytest.mark.parametrize("case", PHOTOS)
@pytest.mark.parametrize("scale", [2, 3, 4, 7])
def test_results_are_opencvs(scale, case):
    pixels = PHOTOS[case]
    height, width, channels = pixels.shape
    size = width * scale, height * scale
    values = cv2.resize(pixels.astype(np.float64), size, interpolation=cv2.INTER_CUBIC)
    expected = values.reshape(*size[::-1], channels).clip(0, np.iinfo(pixels.dtype).max)
    result = super_resolve(load_reference("bicubic", scale), pixels).pixels
    assert result.dtype == pixels.dtype
    # OpenCV computes places and weights as float32.
    assert np.abs(result - expected).max() <= 0.5 + 2e-5 * np.iinfo(pixels.dtype).max


@pytest.mark.parametrize("scale", [2, 3, 4, 5])
@pytest.mark.parametrize("case", ["photo", "noise", "16 bits", "gray"])
def test_windows_do_not_change_a_bit(scale, case):
    """At scales that are no powers of two, a few values halfway between two levels are rounded otherwise."""
    model = load_reference("bicubic", scale)
    whole = super_resolve(model, PHOTOS[case]).pixels
    for tile in (9, 32, 50):
        windowed = dataclasses.replace(model, traits=model.traits._replace(tile=tile))
        change = np.abs(super_resolve(windowed, PHOTOS[case]).pixels.astype(int) - whole)
        assert change.max() <= 1
        assert change.mean() <= (0 if scale in (2, 4) else 1e-3)


def test_it_has_the_scale_of_the_gan_model(checkpoint):
    for name, scale in (("SRVGGNetCompact x4", 4), ("SRVGGNetCompact x2", 2)):
        reference, gan = load_pair("bicubic", checkpoint(name), engine="bfloat16")
        assert (reference.path, reference.architecture, reference.scale) == (Path("bicubic"), "bicubic", gan.scale)
        assert reference.scale == scale
    with pytest.raises(UsageError, match="nowhere"):
        load_pair("bicubic", checkpoint(name).with_name("nowhere.pth"))


def test_a_file_of_that_name_is_a_checkpoint(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("bicubic").write_bytes(checkpoint("SPAN").read_bytes())
    for path in (Path("bicubic"), "./bicubic", tmp_path / "bicubic"):
        assert load_reference(path, 4).architecture == "SPAN"
    assert load_reference("bicubic", 4).architecture == "bicubic"
