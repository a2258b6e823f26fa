"""Super-resolution, and the mask stage of mined photos: results that are inferred, stored, exported and dropped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

import desra_core.stages as module
from desra_core.detection.class_weights import load_weights
from desra_core.errors import ImageError, TransientError, UsageError
from desra_core.files import digest
from desra_core.images.codec import decode, encode_png
from desra_core.networks.checkpoints import load_pair
from desra_core.planning.plan import result_key
from desra_core.settings import Mining
from desra_core.stages import StageJob, run_stage
from desra_core.stages.mask import mask_stage
from desra_core.stages.super_resolution import super_resolution_stage
from desra_core.workspace import DATASET, Workspace
from desra_core.workspace.manifest import File, ImageRef
from desra_core.workspace.products import Record, Target
from tests.conftest import photo

BRIGHT, DARK = photo(1, bright=True), photo(2, bright=False)


class Lab:
    """One photo, a workspace and a pair of models."""

    def __init__(self, root: Path, make_models: Callable[..., tuple[Path, Path]]) -> None:
        self.root = root
        self.workspace = Workspace(root / "ws")
        self.workspace.create()
        self.models = make_models(root / "models")
        self.inferred: list[str] = []

    def job(self, max_pixels: int = 10**6, **changes: object) -> StageJob:
        """The job of a run with the models, for a target with some changes."""
        mse, gan = self.models
        target = Target(
            "similarity-key", "none", "weighting-key", 1.0, 0.7, "4000", "artifacts", "mask-key",
            mse_sr_key=result_key(mse, "float32"), gan_sr_key=result_key(gan, "float32"),
        )  # fmt: skip
        mining = Mining(photos=self.root, mse_model=mse, gan_model=gan, workspace=self.workspace.root)
        return StageJob(
            mining, replace(target, **changes), load_weights("none"), "", "cpu", 256, 1, max_pixels=max_pixels
        )

    def image(self, pixels: np.ndarray | bytes, names: tuple[str, ...] = ("a",)) -> ImageRef:
        data = pixels if isinstance(pixels, bytes) else encode_png(pixels)
        path = self.root / "photo.png"
        path.write_bytes(data)
        return ImageRef("ab" * 16, 0, names, None, None, File(path, digest(data)), None)

    def infer(self, image: ImageRef, record: Record | None = None, **changes: object) -> Record:
        record = record or Record(image.id)
        return run_stage(super_resolution_stage, image, record, self.workspace, self.job(**changes))

    def mask(self, image: ImageRef, record: Record, **changes: object) -> Record:
        return run_stage(mask_stage, image, record, self.workspace, self.job(**changes))

    def arrays(self) -> set[str]:
        return {path.name for path in self.workspace.group("ab" * 16).glob("*") if path.is_dir()}

    def picture(self, kind: str, name: str = "a") -> np.ndarray:
        return cv2.imread(str(self.workspace.dataset(kind, name)), cv2.IMREAD_UNCHANGED)


@pytest.fixture
def lab(tmp_path: Path, make_models, monkeypatch) -> Lab:
    made = Lab(tmp_path, make_models)

    def counted(model, pixels):
        made.inferred.append(model.path.stem)
        return module_super_resolve(model, pixels)

    module_super_resolve = module.super_resolve
    monkeypatch.setattr(module, "super_resolve", counted)
    return made


def test_a_photo_with_an_artifact_becomes_part_of_the_dataset(lab: Lab) -> None:
    image = lab.image(BRIGHT, names=("a", "sub/b"))
    record = lab.infer(image)
    assert lab.inferred == ["mse", "gan"]
    assert lab.arrays() == {"mse_sr", "gan_sr", "similarity"}
    assert record.seconds.keys() == {"inference", "super_resolution"}
    record = lab.mask(image, record)
    assert record.artifact_pixels
    for name in image.names:
        pictures = {kind: lab.picture(kind, name) for kind in DATASET}
        mask = pictures["mask"] > 0
        assert mask.sum() == record.artifact_pixels
        assert np.array_equal(pictures["lr"][:, :, ::-1], BRIGHT)
        assert np.array_equal(pictures["mse_sr"][:, :, ::-1], BRIGHT.repeat(4, axis=0).repeat(4, axis=1))
        assert np.array_equal(pictures["pseudo_gt"][mask], pictures["mse_sr"][mask])
        assert np.array_equal(pictures["pseudo_gt"][~mask], pictures["gan_sr"][~mask])
        assert not np.array_equal(pictures["gan_sr"][mask], pictures["mse_sr"][mask])
        assert lab.workspace.dataset("mask", name).read_bytes() == lab.workspace.mask(name).read_bytes()


def test_a_clean_photo_leaves_an_empty_mask_and_nothing_else(lab: Lab) -> None:
    image = lab.image(DARK)
    record = lab.mask(image, lab.infer(image))
    assert record.artifact_pixels == 0
    assert not lab.arrays()
    assert lab.workspace.mask("a").exists()
    assert not any(lab.workspace.dataset(kind, "a").exists() for kind in DATASET)


@pytest.mark.parametrize(
    ("keep", "arrays", "exported"),
    [("artifacts", set(), False), ("maps", {"similarity"}, False), ("all", {"similarity", "mse_sr", "gan_sr"}, True)],
)
def test_arrays_and_pictures_that_are_kept_of_a_clean_photo(
    lab: Lab, keep: str, arrays: set[str], exported: bool
) -> None:
    image = lab.image(DARK)
    record = lab.mask(image, lab.infer(image, keep=keep), keep=keep)
    assert lab.arrays() == arrays
    assert lab.workspace.dataset("pseudo_gt", "a").exists() == exported
    if exported:
        assert np.array_equal(lab.picture("pseudo_gt"), lab.picture("gan_sr"))
    lab.mask(image, lab.infer(image, record))
    assert not lab.workspace.dataset("lr", "a").exists()


def test_the_gan_result_is_kept_where_all_images_are_labelled(lab: Lab) -> None:
    lab.infer(lab.image(DARK), keep="maps", segmentation_key="mmseg:x")
    assert lab.arrays() == {"similarity", "gan_sr"}


def test_only_the_missing_result_is_inferred(lab: Lab, make_models) -> None:
    image = lab.image(BRIGHT)
    record = lab.mask(image, lab.infer(image))
    lab.models = lab.models[0], make_models(lab.root / "newer", strength=1.0)[1]
    lab.inferred.clear()
    record = lab.infer(image, record)
    assert lab.inferred == ["gan"]
    lab.inferred.clear()
    before = lab.picture("gan_sr")
    lab.mask(image, record)
    assert not np.array_equal(lab.picture("gan_sr"), before)
    lab.infer(image, record)
    assert lab.inferred == []


def test_a_stored_map_that_proves_a_photo_clean_spares_inference(lab: Lab) -> None:
    image = lab.image(DARK)
    record = lab.mask(image, lab.infer(image, keep="maps"), keep="maps")
    lab.inferred.clear()
    assert lab.infer(image, record, keep="maps", threshold=0.8).threshold == 0.8
    assert lab.inferred == []
    lab.infer(image, record, keep="maps", threshold=0.8, segmentation_key="mmseg:x")
    lab.infer(image, record, keep="maps", similarity_key="of another window")
    lab.infer(image, record, keep="all")
    assert lab.inferred == ["mse", "gan", "mse", "mse"]  # the GAN result was stored for its labels


@pytest.mark.parametrize("alpha", [False, True], ids=["opaque", "alpha"])
@pytest.mark.parametrize("channels", [1, 3], ids=["gray", "colour"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_exports_have_the_form_of_the_photo(lab: Lab, dtype: type, channels: int, alpha: bool) -> None:
    pixels = BRIGHT[:, :, 3 - channels :].astype(dtype) * (257 if dtype == np.uint16 else 1)
    if alpha:
        ramp = np.linspace(0, np.iinfo(dtype).max, pixels.shape[1]).astype(dtype)
        pixels = np.dstack([pixels, np.broadcast_to(ramp, pixels.shape[:2])])
    image = lab.image(pixels)
    lab.mask(image, lab.infer(image))
    for kind in ("lr", "mse_sr", "gan_sr", "pseudo_gt"):
        path = lab.workspace.dataset(kind, "a")
        exported = decode(path.read_bytes(), path)
        factor = 1 if kind == "lr" else 4
        assert exported.pixels.shape == (50 * factor, 60 * factor, channels)
        assert exported.pixels.dtype == dtype
        assert (exported.alpha is not None) == alpha
        if alpha and kind != "lr":
            ramp = exported.alpha[0].astype(np.int64)
            assert (np.diff(ramp) >= 0).all()
            assert np.ptp(ramp) == np.iinfo(dtype).max


def test_a_photo_that_is_too_small_or_too_large(lab: Lab) -> None:
    record = lab.infer(lab.image(DARK[:2, :2]))
    assert "has results of 8x8, smaller than the 11 px window" in record.reason
    with pytest.raises(TransientError, match="more than fit into a worker's memory"):
        lab.infer(lab.image(DARK), max_pixels=16 * 50 * 60 - 1)
    assert not lab.infer(lab.image(DARK), max_pixels=16 * 50 * 60).failed


def test_smaller_windows_are_recorded(lab: Lab, monkeypatch) -> None:
    monkeypatch.setattr(module, "super_resolve", lambda model, pixels: (np.zeros((200, 240, 3), np.uint8), 64))
    assert lab.infer(lab.image(DARK)).tile == 64


def test_weights_that_overflow_cost_one_photo(lab: Lab, monkeypatch) -> None:
    def overflow(model, pixels):
        raise UsageError(model.path, "gives values that are not finite", "use float32")

    monkeypatch.setattr(module, "super_resolve", overflow)
    image = lab.image(DARK)
    record = lab.infer(image)
    assert isinstance(record.error, ImageError)
    assert record.subject == str(image.path)
    assert "mse.pth gives values that are not finite" in record.reason


def test_a_checkpoint_that_changes_during_a_run(lab: Lab, make_models) -> None:
    job = lab.job()
    make_models(lab.root / "models", strength=1.0)
    with pytest.raises(TransientError, match=r"gan\.pth: changed after the run had started"):
        super_resolution_stage(lab.image(BRIGHT), Record("ab" * 16), lab.workspace, job)


def test_results_are_those_of_the_models(lab: Lab) -> None:
    image = lab.image(BRIGHT)
    lab.mask(image, lab.infer(image))
    import torch

    values = torch.from_numpy(BRIGHT).permute(2, 0, 1)[None].float() / 255
    for model, kind in zip(load_pair(*lab.models), ("mse_sr", "gan_sr"), strict=True):
        with torch.inference_mode():
            expected = (model.network(values)[0].clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()
        assert np.array_equal(lab.picture(kind)[:, :, ::-1], expected)
