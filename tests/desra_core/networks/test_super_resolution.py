"""Results in windows against the plain way: the whole image through the network at once, rounded by NumPy."""

import dataclasses
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data
import torch

from desra_core import gpu
from desra_core.errors import UsageError
from desra_core.networks.architectures import Traits
from desra_core.networks.checkpoints import Model, load_model
from desra_core.networks.super_resolution import resize_alpha, super_resolve

NAMES = ["SRVGGNetCompact x4", "SRVGGNetCompact x2", "RRDBNet x4", "RRDBNet x2", "SwinIR M", "SwinIR L", "SPAN"]
PHOTO = skimage.data.chelsea()


def tiled(model, tile):
    """The model with windows of another side."""
    return dataclasses.replace(model, traits=model.traits._replace(tile=tile))


@pytest.fixture(scope="session")
def model(checkpoint):
    return lambda name, **options: load_model(checkpoint(name), **options)


@pytest.fixture(scope="session")
def golden(network, plain):
    """The result of a photo by the plain way, for one of the small networks."""

    def make(name, pixels):
        height, width, channels = pixels.shape
        multiple = {"RRDBNet x2": 2}.get(name, 1)  # basicsr's refuses odd sizes
        margins = ((0, -height % multiple), (0, -width % multiple), (0, 0))
        source = np.pad(pixels, margins, mode="reflect")
        values = plain(network(name), np.repeat(source, 3 // channels, axis=2)).clip(0, 1)
        if channels == 1:
            values = (values @ np.array([0.299, 0.587, 0.114], np.float32))[:, :, None]
        scale = values.shape[0] // source.shape[0]
        return np.rint(values * np.iinfo(pixels.dtype).max)[: height * scale, : width * scale]

    return make


def difference(result, expected):
    assert result.shape == expected.shape
    return np.abs(result.astype(np.int64) - expected.astype(np.int64))


PHOTOS = {
    "even": PHOTO[100:140, 100:148],
    "odd": PHOTO[100:137, 100:151],
    "narrow": PHOTO[100:103, 100:160],
    "gray": PHOTO[100:125, 100:130, :1],
    "16 bits": PHOTO[100:125, 100:130].astype(np.uint16) * 257 + 93,
    "16 bits gray": PHOTO[100:125, 100:130, 1:2].astype(np.uint16) * 257 + 93,
}


@pytest.mark.parametrize("case", PHOTOS)
@pytest.mark.parametrize("name", NAMES)
def test_results_are_those_of_the_plain_way(name, case, model, golden):
    pixels = PHOTOS[case]
    if name.startswith("SwinIR") and case == "narrow":
        pytest.skip("the plain way refuses it")
    result, tile = super_resolve(model(name), pixels)
    assert tile is None
    assert result.dtype == pixels.dtype
    error = difference(result, golden(name, pixels))
    # Layouts and threads change the last bits of a float, which rarely, and mostly of 16 bits, shows.
    assert error.max() <= (1 if pixels.dtype == np.uint8 else 4)
    if pixels.dtype == np.uint8:
        assert (error > 0).mean() < 1e-3


SIDES = [(97, 71), (130, 30), (41, 250)]
SLOW = [("SwinIR L", sides) for sides in SIDES[:2]]  # SwinIR M and other networks have windows in them, too


@pytest.mark.parametrize(("name", "sides"), [
    pytest.param(name, sides, marks=[pytest.mark.slow] * ((name, sides) in SLOW)) for name in NAMES for sides in SIDES
])  # fmt: skip
def test_windows_do_not_show(name, sides, model, golden):
    whole = model(name)
    small = tiled(whole, -(-(2 * whole.traits.halo + 24) // whole.traits.multiple) * whole.traits.multiple)
    pixels = PHOTO[: sides[0], : sides[1]]
    result = super_resolve(small, pixels).pixels
    error = difference(result, golden(name, pixels))
    assert error.max() <= 1
    assert (error > 0).mean() < 1e-3
    assert len(np.unique(result)) > 100


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sides", [(1, 1), (1, 9), (7, 2), (15, 16)])
def test_tiny_photos(name, sides, model):
    pixels = PHOTO[100 : 100 + sides[0], 100 : 100 + sides[1]]
    scale = model(name).scale
    assert super_resolve(model(name), pixels).pixels.shape == (sides[0] * scale, sides[1] * scale, 3)


def test_gray_stays_gray_and_is_that_of_equal_channels(model):
    gray = PHOTO[50:90, 50:90, :1]
    replicated = super_resolve(model("SwinIR M"), np.repeat(gray, 3, axis=2)).pixels
    result = super_resolve(model("SwinIR M"), gray).pixels
    assert difference(result, replicated @ np.array([0.299, 0.587, 0.114])[:, None]).max() <= 1


def test_strided_photos_are_as_good(model):
    result = super_resolve(model("SPAN"), PHOTO[20:60, 30:90][::-1, ::2]).pixels
    np.testing.assert_array_equal(result, super_resolve(model("SPAN"), PHOTO[20:60, 30:90][::-1, ::2].copy()).pixels)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_same_photo_gives_the_same_bytes(precision, model):
    chosen = tiled(model("SRVGGNetCompact x4", engine=precision), 48)
    results = [super_resolve(chosen, PHOTO[:90, :90]).pixels for _ in range(3)]
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def psnr(result, reference):
    return 10 * np.log10(255**2 / np.mean((result.astype(float) - reference.astype(float)) ** 2))


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_stays_close(name, model):
    pixels = PHOTO[100:150, 100:160]
    exact = super_resolve(model(name), pixels).pixels
    assert psnr(super_resolve(model(name, engine="bfloat16"), pixels).pixels, exact) > 45


REAL = [
    "realesr-general-x4v3",
    pytest.param("realesr-general-wdn-x4v3", marks=pytest.mark.slow),
    "realesr-animevideov3",
]


@pytest.mark.parametrize("name", REAL)
def test_real_networks_in_windows(name, shared_data, plain):
    """Of the rounded values of this photo, all are equal with windows and with the whole image."""
    whole = load_model(shared_data / "weights" / f"{name}.pth")
    pixels = PHOTO[60:160, 80:210]
    expected = np.rint(plain(whole.network, pixels).clip(0, 1) * 255)
    error = difference(super_resolve(tiled(whole, 92), pixels).pixels, expected)
    assert error.max() <= 1
    assert (error > 0).mean() < 1e-4
    rounded = super_resolve(load_model(whole.path, engine="bfloat16"), pixels).pixels
    assert psnr(rounded, expected) > 45


class Nearest(torch.nn.Module):
    """Enlarges by 2, runs out of memory above a number of pixels, and records its calls."""

    def __init__(self, limit, error):
        super().__init__()
        self.limit, self.error, self.calls = limit, error, []

    def forward(self, x):
        self.calls.append(tuple(x.shape))
        if x.shape[0] * x.shape[2] * x.shape[3] > self.limit:
            raise self.error
        return torch.nn.functional.interpolate(x, scale_factor=2, mode="nearest")


def nearest(limit, error=None, tile=64, halo=4, multiple=1):
    error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return Model(
        path=Path("model.pth"),
        network=Nearest(limit, error),
        architecture="Nearest",
        scale=2,
        traits=Traits(halo, tile, multiple, minimum=multiple),
        device="cpu",
        dtype=torch.float32,
    )


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    MemoryError(),
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed ..."),
]
TWICE = np.repeat(np.repeat(PHOTO[:150, :170], 2, axis=0), 2, axis=1)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_without_memory_first_the_batch_shrinks_and_then_the_window(error):
    model = nearest(10**9, error)
    np.testing.assert_array_equal(super_resolve(model, PHOTO[:150, :170]).pixels, TWICE)
    assert model.network.calls == [(1, 3, 56, 62)] * 9

    model = nearest(50 * 50, error)
    result, tile = super_resolve(model, PHOTO[:150, :170])
    assert tile == 40  # not 32: 2 * halo + 32
    np.testing.assert_array_equal(result, TWICE)
    assert model.network.calls[:2] == [(1, 3, 56, 62), (1, 3, 37, 35)]

    narrow = nearest(2000, error, tile=200)
    result, tile = super_resolve(narrow, PHOTO[:20, :400])
    assert tile == 100
    assert [call[0] for call in narrow.network.calls[:6]] == [3, 1, 5, 2, 1, 1]


def test_a_window_shrinks_from_the_size_of_the_photo_and_stays_a_multiple():
    model = nearest(60 * 60, tile=512, multiple=8, halo=8)
    result, tile = super_resolve(model, PHOTO[:101, :101])
    assert tile == 48
    assert result.shape == (202, 202, 3)
    assert all(call[2] % 8 == call[3] % 8 == 0 for call in model.network.calls)


def test_when_no_window_fits():
    model = nearest(100)
    with pytest.raises(MemoryError, match="a window of 40 pixels a side does not fit"):
        super_resolve(model, PHOTO[:150, :170])
    with pytest.raises(MemoryError, match="a window of 20 pixels"):
        super_resolve(model, PHOTO[:20, :20])


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    with pytest.raises(RuntimeError, match="illegal"):
        super_resolve(nearest(100, RuntimeError("an illegal memory access")), PHOTO[:50, :50])


class Gpu(str):
    """A CPU with the name of a GPU."""

    def startswith(self, *_):
        return True


def test_a_batch_has_the_gpu_for_itself_until_its_results_are_read(monkeypatch):
    """It does not use TF32, even where the process allows TF32."""
    seen = []

    def note(*_):
        seen.append((torch.backends.cudnn.conv.fp32_precision, gpu._GPU._is_owned()))

    model = dataclasses.replace(nearest(10**9), device=Gpu("cpu"))
    model.network.register_forward_hook(note)
    read = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda results: note() or read(results))
    super_resolve(model, PHOTO[:50, :50])
    assert seen == [("ieee", True)] * 2
    assert torch.backends.cudnn.conv.fp32_precision == "tf32"


def failing(*_, **__):
    raise torch.AcceleratorError("CUDA error: device-side assert triggered")


@pytest.mark.parametrize("part", ["moved", "tried out"])
def test_a_broken_gpu_is_no_misfit(part, network, save, monkeypatch, tmp_path):
    """Otherwise the gate would record a candidate as unusable."""
    path = save(network("SPAN"), tmp_path / "model.pth", "params")
    to = torch.nn.Module.to
    if part == "moved":
        monkeypatch.setattr(
            torch.nn.Module, "to", lambda *given, **how: (failing if "memory_format" in how else to)(*given, **how)
        )
    else:
        monkeypatch.setattr(Model, "__call__", failing)
    with pytest.raises(torch.AcceleratorError):
        load_model(path)


def test_values_that_are_not_finite(checkpoint, tmp_path):
    weights = torch.load(checkpoint("SRVGGNetCompact x4"))["params_ema"]
    weights["body.0.weight"] = torch.full_like(weights["body.0.weight"], 3e38)
    torch.save(weights, tmp_path / "huge.pth")
    with pytest.raises(UsageError) as caught:
        super_resolve(load_model(tmp_path / "huge.pth"), PHOTO[:20, :20])
    assert str(caught.value).startswith(f"{tmp_path}/huge.pth: gives values that are not finite; ")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_alpha_is_enlarged_bilinearly(dtype):
    alpha = (PHOTO[:13, :9, 0].astype(np.float64) / 255 * np.iinfo(dtype).max).astype(dtype)
    result = resize_alpha(alpha, 4)
    assert result.dtype == dtype
    expected = cv2.resize(alpha.astype(np.float64), (36, 52), interpolation=cv2.INTER_LINEAR)
    assert difference(result, np.rint(expected)).max() <= 1
    assert (resize_alpha(np.full((5, 5), np.iinfo(dtype).max, dtype), 4) == np.iinfo(dtype).max).all()
