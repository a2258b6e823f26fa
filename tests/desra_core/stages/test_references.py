"""Mining with references that are no twin of the GAN model: bicubic enlargement, and other architectures."""

from __future__ import annotations

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data

from desra_core import artifact_mask, load_model, read_image, super_resolve, variance_similarity
from desra_core.errors import UsageError
from desra_core.planning.plan import prepare, target_of
from desra_core.settings import Mining
from desra_core.workspace import Workspace
from desra_core.workspace.arrays import find_array
from desra_core.workspace.manifest import read_manifest
from tests.conftest import in_one_thread
from tests.in_process import process


def dataset(workspace: Workspace, kind: str, name: str) -> np.ndarray:
    path = workspace.dataset(kind, name)
    return read_image(path)


def test_bicubic_results_are_compared_and_kept(make_models, make_photos, tmp_path: Path) -> None:
    gan = make_models(tmp_path / "models")[1]
    names = make_photos(tmp_path / "photos", 3)
    mining = Mining(photos=tmp_path / "photos", mse_model="bicubic", gan_model=gan, workspace=tmp_path / "ws",
                    keep_mse=True, min_area="300")  # fmt: skip
    workspace = process(mining)
    marked = [name for name in names if workspace.dataset("mask", name).exists()]
    assert len(marked) == 2
    for name in marked:
        lr = cv2.imread(str(tmp_path / "photos" / f"{name}.png"))[:, :, ::-1]
        expected = cv2.resize(lr.astype(np.float64), None, fx=4, fy=4, interpolation=cv2.INTER_CUBIC).clip(0, 255)
        mse_sr, gan_sr = (dataset(workspace, kind, name) for kind in ("mse_sr", "gan_sr"))
        assert np.abs(mse_sr - expected).max() <= 0.51
        mask = artifact_mask(variance_similarity(mse_sr, gan_sr), min_area=300)
        np.testing.assert_array_equal(dataset(workspace, "mask", name)[:, :, 0] > 0, mask)
    with workspace.locked():
        assert prepare(mining).plan.pending == 0
        # Another scale changes the size of the bicubic results, so they are made anew.
        twice = mining.model_copy(update={"gan_model": make_models(tmp_path / "x2", scale=2)[1]})
        assert prepare(twice).plan.pending == 3
    process(twice)
    target, _ = target_of(twice)
    for image in read_manifest(workspace)["id"].to_pylist():
        assert find_array(workspace, image, "mse_sr", key=target.mse_sr_key).shape == (100, 120, 3)


@pytest.mark.parametrize("gan", [
    "realesr-general-x4v3.pth", pytest.param("RealESRGAN_x4plus.safetensors", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_reference_of_another_architecture(gan, shared_data, tmp_path: Path) -> None:
    rlfn, gan_model = (shared_data / "weights" / name for name in ("rlfn-ntire2022-x4.pth", gan))
    (tmp_path / "photos").mkdir()
    lr = skimage.data.chelsea()[100:148, 100:160]
    assert cv2.imwrite(str(tmp_path / "photos/cat.png"), lr[:, :, ::-1])
    mining = Mining(photos=tmp_path / "photos", mse_model=rlfn, gan_model=gan_model, workspace=tmp_path / "ws",
                    keep="all", min_area="100", threshold=0.9)  # fmt: skip
    workspace = process(mining)
    with in_one_thread():
        mse_sr, gan_sr = (super_resolve(load_model(path), lr).pixels for path in (rlfn, gan_model))
    np.testing.assert_array_equal(dataset(workspace, "mse_sr", "cat"), mse_sr)
    np.testing.assert_array_equal(dataset(workspace, "gan_sr", "cat"), gan_sr)
    mask = artifact_mask(variance_similarity(mse_sr, gan_sr), threshold=0.9, min_area=100)
    assert mask.any()
    np.testing.assert_array_equal(dataset(workspace, "mask", "cat")[:, :, 0] > 0, mask)


def test_a_reference_of_another_scale_is_refused(make_models, make_photos, shared_data, tmp_path: Path) -> None:
    make_photos(tmp_path / "photos", 1)
    gan = make_models(tmp_path / "models", scale=2)[1]
    rlfn = Path(shutil.copy(shared_data / "weights/rlfn-ntire2022-x4.pth", tmp_path / "rlfn.pth"))
    mining = Mining(photos=tmp_path / "photos", mse_model=rlfn, gan_model=gan, workspace=tmp_path / "ws")
    with pytest.raises(UsageError) as caught:
        process(mining)
    told = f"{gan}: enlarges by 2, but {rlfn} by 4; give two models of the same scale"
    assert str(caught.value) == told
