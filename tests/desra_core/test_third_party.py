"""Each mend is needed in this environment, else its test is skipped, and is enough. Each import has a process."""

import re
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from desra_core.errors import UsageError
from desra_core.networks.openvino import Compiled
from desra_core.networks.perceptual import load_lpips
from desra_core.networks.segmentation import MMSegSegmenter

PROJECT = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]

PLAIN_IMPORTS = {
    "torchvision": "import torchvision",
    "mmcv": "third_party.mend_torchvision(); import mmcv.ops",
    "basicsr": "third_party.mend_torchvision(); import basicsr",
}
MENDED_USES = {
    "torchvision": """
        from torchvision.models import vgg19
        from torchvision.transforms import functional
        import torch
        features = vgg19(weights=None).features[:4](torch.zeros(1, 3, 8, 8))
        assert features.shape == (1, 64, 8, 8)
    """,
    "mmcv": """
        import mmcv
        import mmseg.apis
        from mmseg.models import SEGMENTORS
        assert "EncoderDecoder" in SEGMENTORS

        import torch
        from mmcv.ops import nms
        from mmcv.utils.ext_loader import check_ops_exist
        try:
            nms(torch.tensor([[0.0, 0, 1, 1]]), torch.ones(1), 0.5)
        except NotImplementedError as error:
            assert "mmcv-full was installed without compiled ops, and nms is one" in str(error)
            assert not check_ops_exist()
    """,
    "basicsr": """
        import torch
        from basicsr.losses.gan_loss import GANLoss
        from basicsr.losses.basic_loss import L1Loss
        from basicsr.data.degradations import rgb_to_grayscale
        assert rgb_to_grayscale(torch.ones(1, 3, 2, 2)).shape == (1, 1, 2, 2)
        assert float(L1Loss()(torch.zeros(1), torch.ones(1))) == 1
        assert float(GANLoss("vanilla")(torch.full((1,), 50.0), True, is_disc=True)) < 1e-6
    """,
}


def run(code: str) -> subprocess.CompletedProcess[str]:
    script = f"from desra_core import third_party\n{textwrap.dedent(code)}"
    command = [sys.executable, "-W", "error", "-c", script]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("package", PLAIN_IMPORTS)
def test_import_fails_without_the_mend(package):
    # Warnings must not fail this import: only what the mend is for may.
    result = run(f"import warnings; warnings.simplefilter('ignore'); {PLAIN_IMPORTS[package]}")
    if result.returncode == 0:
        pytest.skip(f"{package} needs no mend in this environment")
    reasons = {
        "torchvision": "operator torchvision::nms does not exist",
        "mmcv": "No module named 'mmcv._ext'",
        "basicsr": "No module named 'torchvision.transforms.functional_tensor'",
    }
    assert reasons[package] in result.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("package", MENDED_USES)
def test_mended_package_works_without_a_warning(package):
    result = run(f"third_party.mend_{package}(); third_party.mend_{package}()\n{textwrap.dedent(MENDED_USES[package])}")
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_mend_leaves_working_torchvision_ops_alone():
    if run("import torchvision").returncode != 0:
        pytest.skip("torchvision's compiled ops do not fit this torch")
    result = run("""
        third_party.mend_torchvision()
        import torch, torchvision
        torchvision.ops.nms(torch.tensor([[0.0, 0, 1, 1]]), torch.ones(1), 0.5)
    """)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_mmcv_is_imported_beside_a_half_written_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert run("import yapf").returncode == 0
    cached = list(tmp_path.rglob("*.pickle"))
    assert cached
    for path in cached:
        path.write_bytes(b"")
    assert "EOFError" in run("import yapf").stderr
    result = run("third_party.mend_mmcv(); import os; assert os.environ['XDG_CACHE_HOME']")
    assert result.returncode == 0, result.stderr


def test_importing_it_imports_no_heavy_package():
    result = run("import sys; assert not {'torch', 'torchvision', 'mmcv', 'basicsr'} & set(sys.modules)")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("package", "setting", "use"),
    [
        ("openvino", "--backend openvino", lambda: Compiled(torch.nn.Conv2d(3, 3, 3), bfloat16=False)),
        ("lpips", "--lpips", lambda: load_lpips(Path("alexnet.pth"))),
        ("mmcv", "--segmenter", lambda: MMSegSegmenter(Path("config.py"), Path("model.pth"), "cpu")),
        ("mmseg", "--segmenter", lambda: MMSegSegmenter(Path("config.py"), Path("model.pth"), "cpu")),
    ],
)
def test_without_its_extra_a_setting_is_refused(
    package: str, setting: str, use: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    message = (
        f"{setting}: needs the package {package}, which is not installed; pip install 'desra\\[[a-z]+\\]', or leave"
    )
    with pytest.raises(UsageError, match=message) as refused:
        use()
    (extra,) = re.findall(r"desra\[(.*)\]", refused.value.remedy)
    wanted = {re.split("[=>]", line)[0] for line in EXTRAS[extra]}
    assert {"mmcv": "mmcv-full", "mmseg": "mmsegmentation"}.get(package, package) in wanted
