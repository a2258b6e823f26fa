"""Checkpoints of real networks in every usual form, and unusable checkpoints of every kind."""

import os
import resource
import threading
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from basicsr.archs.srvgg_arch import SRVGGNetCompact
from spandrel.architectures.DnCNN import DnCNN
from spandrel.architectures.MMRealSR import MMRealSR

from desra_core.errors import UsageError
from desra_core.networks import checkpoints
from desra_core.networks.checkpoints import load_model, load_pair
from desra_core.networks.super_resolution import super_resolve

NAMES = {
    "SRVGGNetCompact x4": ("RealESRGAN Compact", 4, 8, 1),
    "SRVGGNetCompact x2": ("RealESRGAN Compact", 2, 5, 1),
    "RRDBNet x4": ("ESRGAN", 4, 64, 1),
    "RRDBNet x2": ("ESRGAN", 2, 128, 2),
    "SwinIR M": ("SwinIR", 4, 48, 8),
    "SwinIR L": ("SwinIR", 4, 48, 8),
    "SPAN": ("SPAN", 4, 21, 1),
}


@pytest.mark.parametrize("name", NAMES)
def test_networks_are_recognised_by_their_weights(name, checkpoint):
    model = load_model(checkpoint(name))
    assert (model.architecture, model.scale, model.traits.halo, model.traits.multiple) == NAMES[name]
    assert model.traits.tile % model.traits.multiple == 0
    assert model.traits.tile >= 4 * model.traits.halo
    assert not model.network.training
    assert not any(parameter.requires_grad for parameter in model.network.parameters())
    assert model.dtype == torch.float32


@pytest.mark.parametrize("content", ["params_ema", "params", "bare", "state_dict", "safetensors"])
@pytest.mark.parametrize("name", NAMES)
def test_weights_come_back_from_every_container(name, content, network, save, plain, tmp_path):
    path = save(network(name), tmp_path / "model", content)
    pixels = skimage.data.chelsea()[100:117, 200:224]
    expected = np.rint(plain(network(name), padded(pixels, name)).clip(0, 1) * 255)
    scale = NAMES[name][1]
    result = super_resolve(load_model(path), pixels).pixels
    assert np.abs(result - expected[: 17 * scale, : 24 * scale]).max() <= 1


def padded(pixels, name):
    """Odd sizes are refused by basicsr's x2 network."""
    return np.pad(pixels, ((0, 1), (0, 0), (0, 0)), mode="reflect") if name == "RRDBNet x2" else pixels


def test_ema_weights_go_before_raw_ones(network, tmp_path, checkpoint):
    ema = network("SRVGGNetCompact x4").state_dict()
    torch.save({"params": {name: value + 1 for name, value in ema.items()}, "params_ema": ema}, tmp_path / "both")
    weights = load_model(tmp_path / "both").network.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in ema.items())


def test_the_real_checkpoints(shared_data):
    sizes = {}
    for name in ("realesr-general-x4v3", "realesr-general-wdn-x4v3", "realesr-animevideov3"):
        model = load_model(shared_data / "weights" / f"{name}.pth")
        assert model.scale == 4
        sizes[name] = model.traits.halo
    assert sizes == {"realesr-general-x4v3": 34, "realesr-general-wdn-x4v3": 34, "realesr-animevideov3": 18}


def test_half_precision_weights_load_as_float32(network, tmp_path):
    weights = {name: value.half() for name, value in network("RRDBNet x4").state_dict().items()}
    torch.save(weights, tmp_path / "half.pth")
    model = load_model(tmp_path / "half.pth")
    assert {value.dtype for value in model.network.parameters()} == {torch.float32}


def test_a_model_is_loaded_once_until_its_file_changes(checkpoint, tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(checkpoint("SRVGGNetCompact x4").read_bytes())
    models = []
    threads = [threading.Thread(target=lambda: models.append(load_model(path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(models) == 4
    assert len(set(map(id, models))) == 1
    assert load_model(path, engine="bfloat16") is not models[0]
    path.write_bytes(checkpoint("SPAN").read_bytes())
    assert load_model(path).architecture == "SPAN"


def test_the_latest_networks_are_kept_as_far_as_they_fit(checkpoint, monkeypatch):
    cache = checkpoints._loaded.cache
    sizes = {name: load_model(checkpoint(name)).kept_bytes for name in NAMES}
    assert sizes["RRDBNet x4"] == sum(
        value.nbytes for value in load_model(checkpoint("RRDBNet x4")).network.parameters()
    )
    cache.clear()
    monkeypatch.setattr(cache, "_Cache__maxsize", 30)
    monkeypatch.setattr(checkpoints, "KEPT_BYTES", 30)  # so that each counts for a third, large as it is
    for name in (*NAMES, *list(NAMES)[-3:]):
        load_model(checkpoint(name))
        assert cache.currsize <= 30
    assert [key[0] for key in cache] == [checkpoint(name) for name in list(NAMES)[-3:]]
    cache.clear()


def test_a_pair_has_one_scale(checkpoint):
    large, small = checkpoint("SRVGGNetCompact x4"), checkpoint("SRVGGNetCompact x2")
    mse, gan = load_pair(large, checkpoint("RRDBNet x4"))
    assert (mse.path, gan.path) == (large, checkpoint("RRDBNet x4"))
    with pytest.raises(UsageError) as caught:
        load_pair(large, small)
    assert str(caught.value) == f"{small}: enlarges by 2, but {large} by 4; give two models of the same scale"


def refusal(path, **options):
    """Return the line that refuses a file."""
    with pytest.raises(UsageError) as caught:
        load_model(path, **options)
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 700
    assert caught.value.subject == str(path)
    return line


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(UsageError, match=r"none\.pth: does not exist; check the path"):
        load_model(tmp_path / "none.pth")
    with pytest.raises(UsageError, match=r"cannot be read \(Is a directory\); give a readable file"):
        load_model(tmp_path)


def test_files_that_are_no_checkpoint(checkpoint, network, save, tmp_path):
    zip_format = checkpoint("SRVGGNetCompact x4").read_bytes()
    weights = network("SRVGGNetCompact x4").state_dict()
    torch.save(weights, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    old_format = (tmp_path / "old.pth").read_bytes()
    safetensors = save(network("SRVGGNetCompact x4"), tmp_path / "whole.safetensors", "safetensors").read_bytes()
    contents = {
        "truncated.pth": zip_format[: len(zip_format) // 2],
        "truncated in the old format.pth": old_format[: len(old_format) // 2],
        "truncated.safetensors": safetensors[: len(safetensors) // 2],
        "header only.safetensors": safetensors[:64],
        "empty.pth": b"",
        "text.pth": b"hello, I am not a checkpoint\n",
        "page.pth": b"<!DOCTYPE html><html>404</html>",
        "noise.pth": np.random.default_rng(0).bytes(4096),
        "zip.pth": b"PK\x05\x06" + bytes(18),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert "is not a checkpoint, or only a part of one; download" in refusal(tmp_path / name), name


def test_pickle_with_code_is_refused_unexecuted(network, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    for old in (False, True):
        content = {"params": network("SRVGGNetCompact x4").state_dict(), "hook": Bomb()}
        for suffix in ("pth", "pt", "safetensors"):
            path = tmp_path / f"bomb.{suffix}"
            torch.save(content, path, _use_new_zipfile_serialization=not old)
            line = refusal(path)
            assert "posix.mkdir" in line
            assert "run code" in line
            assert not (tmp_path / "exploded").exists()


def test_a_torchscript_program_is_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, its files are still around
        torch.jit.trace(torch.nn.Conv2d(3, 3, 1), torch.zeros(1, 3, 4, 4)).save(tmp_path / "program.pt")
    assert "is a TorchScript program" in refusal(tmp_path / "program.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value, network, tmp_path):
    weights = {name: tensor.clone() for name, tensor in network("SRVGGNetCompact x4").state_dict().items()}
    weights["body.4.weight"][0, 0, 0, 0] = value
    torch.save({"params": weights}, tmp_path / "nan.pth")
    assert "has values in body.4.weight that are not finite; copy or train" in refusal(tmp_path / "nan.pth")


def test_content_that_is_no_network(tmp_path, network):
    full = network("RRDBNet x4").state_dict()
    cases = {
        "is of no architecture that spandrel knows": {"some.weight": torch.zeros(3, 3), "some.bias": torch.zeros(3)},
        "holds no weights": {"epoch": 3},
        "holds a list": [torch.zeros(3)],
        "holds a Tensor": torch.zeros(3),
        "does not fit the architecture that it looks like": {
            name: value for name, value in full.items() if name != "conv_first.bias"
        },
        "does not fit the architecture that it looks like (RuntimeError": {
            name: value[:1] if name == "conv_body.bias" else value for name, value in full.items()
        },
    }
    for reason, content in cases.items():
        torch.save(content, tmp_path / "odd.pth")
        assert reason in refusal(tmp_path / "odd.pth"), reason


OTHER_NETWORKS = {
    "maps 1 channels to 1": lambda: SRVGGNetCompact(num_in_ch=1, num_out_ch=1, num_feat=8, num_conv=2),
    "is a network for restoration": lambda: SRVGGNetCompact(num_feat=8, num_conv=2, upscale=1),
    "is a network for restoration (DnCNN": lambda: DnCNN(in_nc=3, out_nc=3, nc=8, nb=4),
    "cannot be run (MMRealSR": lambda: MMRealSR(num_in_ch=3, num_out_ch=3, scale=4, num_feat=16, num_block=1),
}


@pytest.mark.parametrize("reason", OTHER_NETWORKS)
def test_networks_for_something_else(reason, tmp_path, save):
    assert reason in refusal(save(OTHER_NETWORKS[reason](), tmp_path / "other.pth", "params"))


def test_a_device_that_is_not_there(checkpoint):
    if torch.cuda.is_available():
        pytest.skip("has a GPU")
    for device in ("cuda:0", "gpu"):
        with pytest.raises(UsageError, match=f"device '{device}': cannot be used") as caught:
            load_model(checkpoint("SPAN"), device=device)
        assert "\n" not in str(caught.value)


class Reduced:
    """An object with a given pickle."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


def test_nothing_of_numpy_is_made(network, tmp_path):
    rebuild = np.zeros(1).__reduce__()[0]
    beside = {
        "a dtype that calls its numbers addresses": Reduced(
            np.dtype, ("i8", False, True), (3, "<", None, None, None, -1, -1, 255)
        ),
        "a terabyte": Reduced(rebuild, (np.ndarray, (10**12,), b"b")),
        "an array": np.arange(3.0),
        "a scalar": np.float32(1),
    }
    for name, value in beside.items():
        torch.save({"params": network("SPAN").state_dict(), name: value}, tmp_path / "beside.pth")
        content = checkpoints.load_checkpoint(tmp_path / "beside.pth", "")
        assert type(content[name]) is checkpoints._LeftOut
        assert load_model(tmp_path / "beside.pth").architecture == "SPAN"


def hostile_contents(weights):
    """Contents that claim more than their file holds, or that have no end."""
    one, endless, bomb = torch.zeros(1), {}, {}
    endless["params"] = endless
    for _ in range(40):
        bomb = {"a": bomb, "b": bomb}
    wide = {name: torch.zeros(1).expand(value.shape) for name, value in weights.items()}
    return {
        "holds conv_1.sk.weight in another form": wide,
        "holds w in another form": {"w": one.expand(10**6, 10**6)},
        "holds meta in another form": {"meta": torch.zeros(3, device="meta")},
        "holds sparse in another form": {"sparse": torch.zeros(3, 3).to_sparse()},
        "holds complex in another form": {"complex": torch.zeros(3, dtype=torch.complex64)},
        "nests its names without end": endless,
        "nests its names without end, or": bomb,
        "nests its names without end, or holds more": {"model." * 2000 + "weight": one},
        "numbers its layers": {
            name.replace("body.1.", f"body.{10**9}."): value for name, value in weights.items()
        } | {f"body.{10**12}.weight": one},
        "numbers its layers higher": {f"body.{30_000}.weight": one, f"body.{0}.weight": one},
        "does not fit the architecture that it looks like": {  # its second layer would take 36 GB
            "body.0.weight": torch.zeros(30_000, 3, 3, 3), "body.0.bias": one, "body.1.weight": one,
            "body.2.weight": torch.zeros(48, 30, 3, 3), "body.2.bias": one,
        },
    }  # fmt: skip


def test_a_small_file_takes_little_memory_and_time(network, tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for reason, content in hostile_contents(network("SPAN").state_dict()).items():
        torch.save(content, tmp_path / "odd.pth")
        assert reason in refusal(tmp_path / "odd.pth"), reason
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB


def test_an_archive_that_unpacks_to_far_more_is_refused(checkpoint, tmp_path):
    with zipfile.ZipFile(checkpoint("SPAN")) as file:
        records = {name: file.read(name) for name in file.namelist()}
    for zeros, refused in ((0, False), (30_000_000, True)):
        with zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as file:
            for name, content in records.items():
                file.writestr(name, content)
            file.writestr(f"{next(iter(records)).partition('/')[0]}/data/zeros", bytes(zeros))
        if refused:
            assert "is not a checkpoint" in refusal(tmp_path / "packed.pth")
        else:
            assert load_model(tmp_path / "packed.pth").architecture == "SPAN"


def test_pipes_and_devices_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    for path in (tmp_path / "pipe.pth", Path("/dev/zero")):
        assert "cannot be read (it is a pipe or a device); give a readable file" in refusal(path)
