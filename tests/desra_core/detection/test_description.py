"""Detectors that a TOML file describes, against the packages' own classes patch by patch. All weights are random."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from desra_core import third_party
from desra_core.detection.detectors import DetectorInputs, detector_files, detector_key, load_detector, score_pair
from desra_core.errors import UsageError
from desra_core.networks.perceptual import load_dists
from tests.desra_core.detection.test_detectors import pair

third_party.mend_torchvision()

import lpips  # noqa: E402
import torchvision  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]


class Difference(torch.nn.Module):
    """Two channels at half the size: zeros, and the mean difference of both results."""

    def forward(self, mse_sr: torch.Tensor, gan_sr: torch.Tensor) -> torch.Tensor:
        scores = torch.nn.functional.avg_pool2d((gan_sr - mse_sr).abs().mean(1, keepdim=True), 2)
        return torch.cat([torch.zeros_like(scores), scores], 1)


class Brightness(torch.nn.Module):
    def forward(self, gan_sr: torch.Tensor) -> torch.Tensor:
        return gan_sr.mean(1)


def described(folder: Path, text: str) -> str:
    (folder / "described.toml").write_text(text)
    return str(folder / "described.toml")


def weights_of(network: torch.nn.Module, path: Path) -> dict[str, torch.Tensor]:
    state = {name: value for name, value in network.state_dict().items() if name.startswith("features.")}
    torch.save(state, path)
    return state


def as_tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))[None]).float() / 255


def averaged(shape: tuple[int, int], side: int, stride: int, score) -> np.ndarray:
    """Score patches one at a time, and average each pixel over the patches that hold it."""
    totals, counts = np.zeros(shape), np.zeros(shape)
    for y in sorted({*range(0, shape[0] - side + 1, stride), shape[0] - side}):
        for x in sorted({*range(0, shape[1] - side + 1, stride), shape[1] - side}):
            part = slice(y, y + side), slice(x, x + side)
            totals[part] += score(part)
            counts[part] += 1
    return totals / counts


def test_dists_is_the_package_s_own_on_each_patch(tmp_path) -> None:
    torch.manual_seed(0)
    vgg = torchvision.models.vgg16(weights=None)
    weights_of(vgg, tmp_path / "vgg16.pth")
    method = described(tmp_path, 'kind = "dists"\nfile = "vgg16.pth"\nthreshold = 0.3\n')
    mse_sr, gan_sr = pair(1, (100, 130, 3))
    detector = load_detector(method)
    scores = detector(mse_sr, gan_sr, None, None)

    from DISTS_pytorch import DISTS_pt

    heads = torch.load(Path(DISTS_pt.__file__).with_name("weights.pt"))
    reference = load_dists(tmp_path / "vgg16.pth")
    assert torch.equal(reference.alpha, heads["alpha"])
    assert torch.equal(reference.stage5[1].weight, vgg.features[24].weight)
    expected = averaged((100, 130), 64, 32, lambda part: float(reference(as_tensor(mse_sr[part]),
                                                                         as_tensor(gan_sr[part]))))  # fmt: skip
    assert detector.threshold == 0.3
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert np.abs(detector(gan_sr, gan_sr, None, None)).max() < 1e-5


def test_each_has_the_weights_of_its_own_file(tmp_path) -> None:
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        weights_of(torchvision.models.vgg16(weights=None), tmp_path / f"{seed}.pth")
        models.append(load_dists(tmp_path / f"{seed}.pth"))
    for seed, model in enumerate(models, 1):
        state = torch.load(tmp_path / f"{seed}.pth")
        assert torch.equal(model.stage5[1].weight, state["features.24.weight"])


@pytest.mark.filterwarnings("ignore::UserWarning:torchvision.models")
def test_lpips_maps_are_the_package_s_own(tmp_path) -> None:
    torch.manual_seed(0)
    state = weights_of(torchvision.models.alexnet(weights=None), tmp_path / "alexnet.pth")
    method = described(tmp_path, 'kind = "lpips"\nfile = "alexnet.pth"\nthreshold = 0.1\n')
    mse_sr, gan_sr = pair(2, (256, 300, 3))
    reference = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False, spatial=True)
    names = {name: "features." + name.partition(".")[2] for name in reference.net.state_dict()}
    reference.net.load_state_dict({name: state[source] for name, source in names.items()})
    reference.eval()

    def score(part: tuple[slice, slice]) -> np.ndarray:
        with torch.no_grad():
            return reference(as_tensor(mse_sr[part]), as_tensor(gan_sr[part]), normalize=True)[0, 0].numpy()

    scores = load_detector(method)(mse_sr, gan_sr, None, None)
    np.testing.assert_allclose(scores, averaged((256, 300), 256, 192, score), atol=1e-5)


def network(path: Path, kind: str) -> None:
    module, count = (Difference(), 2) if kind == "pair" else (Brightness(), 1)
    if path.suffix == ".pt":
        torch.jit.save(torch.jit.trace(module, (torch.zeros(1, 3, 32, 32),) * count), str(path))
        return
    helper = onnx.helper
    names = ["mse_sr", "gan_sr"][-count:]
    inputs = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 3, 32, 32]) for name in names]
    if kind == "pair":
        nodes = [
            helper.make_node("Sub", ["gan_sr", "mse_sr"], ["d"]),
            helper.make_node("Abs", ["d"], ["a"]),
            helper.make_node("ReduceMean", ["a"], ["m"], axes=[1], keepdims=1),
            helper.make_node("AveragePool", ["m"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
            helper.make_node("Sub", ["p", "p"], ["z"]),
            helper.make_node("Concat", ["z", "p"], ["out"], axis=1),
        ]
        shape = [1, 2, 16, 16]
    else:
        nodes, shape = [helper.make_node("ReduceMean", ["gan_sr"], ["out"], axes=[1], keepdims=0)], [1, 32, 32]
    output = helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, shape)
    model = helper.make_model(
        helper.make_graph(nodes, "g", inputs, [output]), opset_imports=[helper.make_opsetid("", 13)], ir_version=8
    )
    onnx.save(model, str(path))


@pytest.mark.parametrize("suffix", [".pt", ".onnx"])
def test_a_network_scores_the_gan_result(tmp_path, suffix) -> None:
    network(tmp_path / f"net{suffix}", "gan_sr")
    method = described(tmp_path, f'kind = "network"\nfile = "net{suffix}"\nthreshold = 0.5\nside = 32\n'
                                 "mean = [0.5, 0.5, 0.5]\nstd = [0.25, 0.25, 0.25]\n")  # fmt: skip
    mse_sr, gan_sr = pair(3, (40, 70, 3))
    scores = load_detector(method)(mse_sr, gan_sr, None, None)
    np.testing.assert_allclose(scores, (gan_sr / 255 - 0.5).mean(2) / 0.25, atol=1e-5)
    small = load_detector(method)(mse_sr[:20, :9], gan_sr[:20, :9], None, None)
    np.testing.assert_allclose(small, scores[:20, :9], atol=1e-5)


@pytest.mark.parametrize("suffix", [".pt", ".onnx"])
def test_a_network_scores_the_pair_on_a_channel_and_at_another_size(tmp_path, suffix) -> None:
    network(tmp_path / f"net{suffix}", "pair")
    method = described(tmp_path, f'kind = "network"\nfile = "net{suffix}"\nthreshold = 0.5\nside = 32\ninput = "pair"\n'
                                 "channel = 1\n")  # fmt: skip
    flat = np.zeros((32, 64, 3), np.uint8)
    scores = load_detector(method)(flat, flat + np.uint8(51), None, None)
    np.testing.assert_allclose(scores, 0.2, atol=1e-6)


def test_its_key_holds_both_files(tmp_path) -> None:
    network(tmp_path / "net.pt", "gan_sr")
    text = 'kind = "network"\nfile = "net.pt"\nthreshold = 0.5\nside = 32\n'
    method = described(tmp_path, text)
    keys = {detector_key(method)}
    assert detector_files(method) == [tmp_path / "described.toml", tmp_path / "net.pt"]
    described(tmp_path, text + "channel = 0\n")
    keys.add(detector_key(method))
    (tmp_path / "net.pt").write_bytes(b"other")
    keys.add(detector_key(method))
    assert len(keys) == 3


def test_an_onnx_file_with_its_weights_elsewhere_is_refused(tmp_path) -> None:
    """Its key would not change with the weights."""
    helper, tensor = onnx.helper, np.ones(3, np.float32)
    graph = helper.make_graph(
        [helper.make_node("Mul", ["gan_sr", "w"], ["m"]), helper.make_node("ReduceMean", ["m"], ["out"], axes=[1])],
        "g",
        [helper.make_tensor_value_info("gan_sr", onnx.TensorProto.FLOAT, [1, 3, 32, 32])],
        [helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, [1, 1, 32, 32])],
        [onnx.numpy_helper.from_array(tensor.reshape(3, 1, 1), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    method = described(tmp_path, 'kind = "network"\nfile = "net.onnx"\nthreshold = 0.5\nside = 32\n')
    onnx.save(model, str(tmp_path / "net.onnx"))
    load_detector(method)
    onnx.save(model, str(tmp_path / "net.onnx"), save_as_external_data=True, location="net.data", size_threshold=0)
    with pytest.raises(UsageError, match=r"net.onnx: is no network in ONNX"):
        load_detector(method)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind = 3\n", r"has a wrong kind \(Input should be 'dists', 'lpips' or 'network'\)"),
        ('kind = "dists"\nthreshold = 1\n', r"has a wrong file \(Field required\)"),
        ('kind = "dists"\nfile = "a"\nthreshold = nan\n', r"has a wrong threshold"),
        ('kind = "dists"\nfile = "a"\nthreshold = 1\nsize = 3\n', r"has a wrong size \(Extra inputs"),
        ('kind = "network"\nfile = "a"\nthreshold = 1\nstd = [1, 0, 1]\n', r"has a wrong std .*divides by 0"),
        ('kind = "network"\nfile = "a"\nthreshold = 1\nmean = [1, nan, 1]\n', r"has a wrong mean.1 .*finite"),
        ('kind = "lpips"\nfile = "a"\nthreshold = 1\nside = 64\n', r"describes no detector .*side is for networks"),
        ("kind =", "is no TOML file"),
        ("\xff", "is no TOML file"),
    ],
)
def test_a_wrong_description_is_named(tmp_path, text, message) -> None:
    path = tmp_path / "described.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match=f"described.toml: {message}"):
        load_detector(str(path))


@pytest.mark.parametrize(
    ("name", "content", "more", "message"),
    [
        ("a.pt", b"PK\x03\x04nothing", "", "a.pt: is no network in TorchScript"),
        ("a.onnx", b"nothing", "", "a.onnx: is no network in ONNX"),
        ("net.pt", None, "", r"net.pt: returns float32 of the shape \(1, 5\) for a picture of \(1, 3, 32, 32\)"),
        ("net.pt", None, 'input = "pair"\n', r"net.pt: cannot be run on a picture of \(1, 3, 32, 32\)"),
        ("gone.pt", None, "", "gone.pt: "),
    ],
)
def test_a_network_of_another_kind_is_named_before_anything_is_computed(tmp_path, name, content, more, message) -> None:
    class Five(torch.nn.Module):
        def forward(self, gan_sr: torch.Tensor) -> torch.Tensor:
            return gan_sr.mean(dim=(1, 2, 3)).expand(1, 5)

    torch.jit.save(torch.jit.trace(Five(), torch.zeros(1, 3, 32, 32)), str(tmp_path / "net.pt"))
    if content is not None:
        (tmp_path / name).write_bytes(content)
    method = described(tmp_path, f'kind = "network"\nfile = "{name}"\nthreshold = 0.5\nside = 32\n{more}')
    with pytest.raises(UsageError, match=message):
        load_detector(method)


def test_weights_of_another_network_are_named(tmp_path) -> None:
    weights_of(torchvision.models.alexnet(weights=None), tmp_path / "alexnet.pth")
    method = described(tmp_path, 'kind = "dists"\nfile = "alexnet.pth"\nthreshold = 0.3\n')
    with pytest.raises(UsageError, match=r"alexnet.pth: has features.0.weight of \(64, 3, 11, 11\) where VGG16 has"):
        load_detector(method)


def test_a_picture_smaller_than_a_patch_and_gray_of_16_bits(tmp_path) -> None:
    network(tmp_path / "net.pt", "gan_sr")
    method = described(tmp_path, 'kind = "network"\nfile = "net.pt"\nthreshold = 0.5\nside = 32\n')
    gray = np.full((5, 7, 1), 257 * 51, np.uint16)
    scores = score_pair(load_detector(method), method, "a.png", DetectorInputs(gray, gray))
    np.testing.assert_allclose(scores, np.full((5, 7), 0.2), atol=1e-6)
