"""Real networks with random weights, small enough to be quick, and their checkpoints."""

import warnings

import numpy as np
import pytest
import skimage.data
import torch
from safetensors.torch import save_file

from desra_core import third_party

third_party.mend_basicsr()

from basicsr.archs.rrdbnet_arch import RRDBNet  # noqa: E402
from basicsr.archs.srvgg_arch import SRVGGNetCompact  # noqa: E402
from spandrel.architectures.SPAN import SPAN  # noqa: E402
from spandrel.architectures.SwinIR import SwinIR  # noqa: E402

REAL_WORLD = {"img_size": 64, "window_size": 8, "mlp_ratio": 2, "upscale": 4, "upsampler": "nearest+conv"}
NETWORKS = {
    "SRVGGNetCompact x4": lambda: SRVGGNetCompact(num_feat=16, num_conv=6),
    "SRVGGNetCompact x2": lambda: SRVGGNetCompact(num_feat=16, num_conv=3, upscale=2),
    "RRDBNet x4": lambda: RRDBNet(3, 3, scale=4, num_feat=16, num_block=2),
    "RRDBNet x2": lambda: RRDBNet(3, 3, scale=2, num_feat=16, num_block=2),
    # The real-world configurations M and L, with fewer blocks and channels.
    "SwinIR M": lambda: SwinIR(**REAL_WORLD, depths=[2, 2], embed_dim=36, num_heads=[6, 6]),
    "SwinIR L": lambda: SwinIR(**REAL_WORLD, depths=[2, 2], embed_dim=48, num_heads=[8, 8], resi_connection="3conv"),
    "SPAN": lambda: SPAN(num_in_ch=3, num_out_ch=3, feature_channels=24),
}
FULL_SIZE = {
    "RRDBNet x4": lambda: RRDBNet(3, 3),
    "RRDBNet x2": lambda: RRDBNet(3, 3, scale=2),
    "SwinIR M": lambda: SwinIR(**REAL_WORLD, depths=[6] * 6, embed_dim=180, num_heads=[6] * 6),
    "SwinIR L": lambda: SwinIR(**REAL_WORLD, depths=[6] * 9, embed_dim=240, num_heads=[8] * 9, resi_connection="3conv"),
}


def build(name, networks):
    """A network whose results are spread over 0..1, like those of a trained network."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of SwinIR, about torch.meshgrid
        network = networks[name]().eval().requires_grad_(False)
        if not isinstance(network, SRVGGNetCompact):  # which adds the enlarged photo
            last = next(module for module in reversed(list(network.modules())) if isinstance(module, torch.nn.Conv2d))
            sample = skimage.data.chelsea()[64:96, 64:96]
            last.weight.mul_(float(0.2 / plain_float(network, sample).std((0, 1)).mean()))
            last.bias.add_(float(0.5 - plain_float(network, sample).mean()))
    return network


def plain_float(network, pixels):
    """A network's values for a whole ``(H, W, 3)`` photo, the plain way: ``(H, W, 3)`` float32."""
    values = torch.from_numpy(pixels.astype(np.float32) / np.float32(np.iinfo(pixels.dtype).max))
    with torch.no_grad():
        return network(values.permute(2, 0, 1)[None].contiguous())[0].permute(1, 2, 0).numpy()


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Use one thread, because the images are small."""


@pytest.fixture(scope="session")
def network():
    """The small network of a name, in evaluation mode."""
    built = {}

    def get(name):
        if name not in built:
            built[name] = build(name, NETWORKS)
        return built[name]

    return get


@pytest.fixture(scope="session")
def full_size_network():
    return lambda name: build(name, FULL_SIZE)


@pytest.fixture(scope="session")
def plain():
    return plain_float


@pytest.fixture(scope="session")
def save():
    """Save a network's weights to a file in one of the usual forms."""

    def write(network, path, content="params_ema"):
        weights = {name: value.clone() for name, value in network.state_dict().items()}
        if content == "safetensors":
            save_file(weights, path)
        else:
            torch.save(weights if content == "bare" else {content: weights}, path)
        return path

    return write


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, network, save):
    """The checkpoint of the small network of a name."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def get(name):
        path = folder / f"{name}.pth"
        return path if path.exists() else save(network(name), path)

    return get
