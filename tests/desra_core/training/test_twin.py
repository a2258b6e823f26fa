"""The MSE twin of a GAN model: crops, refusals, the verdict, and what is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from desra_core.errors import UsageError
from desra_core.files import read_json
from desra_core.networks import load_model
from desra_core.settings.models import Twinning
from desra_core.training.loop import finetune
from desra_core.training.twin import Verdict, draw_degraded, freeze_photos, plan_twin, publish_twin


def write_photos(folder: Path, count: int = 5, side: int = 120, blur: float = 0.0) -> Path:
    """Write photos with edges and texture."""
    folder.mkdir(exist_ok=True)
    for index in range(count):
        rng = np.random.default_rng(index)
        coarse = cv2.resize(
            rng.integers(0, 256, (8, 8, 3), dtype=np.uint8), (side, side), interpolation=cv2.INTER_CUBIC
        )
        photo = np.clip(coarse + rng.normal(0, 12, (side, side, 3)), 0, 255).astype(np.uint8)
        cv2.rectangle(photo, (20, 20), (60, 90), (250, 20, 20), 2)
        photo = cv2.GaussianBlur(photo, (0, 0), blur) if blur else photo
        assert cv2.imwrite(str(folder / f"photo{index}.png"), photo)
    return folder


@pytest.fixture
def twinning(tmp_path: Path, gan_model: Path) -> Twinning:
    return Twinning(photos=write_photos(tmp_path / "photos"), gan_model=gan_model, output=tmp_path / "twin.pth",
                    preset="cpu", iterations=6, checkpoint_every=3, patch=32, batch=2)  # fmt: skip


def changed(twinning: Twinning, **values: Any) -> Twinning:
    return twinning.model_copy(update=values)


def test_held_out_photos_are_not_trained_on(twinning: Twinning) -> None:
    plan = plan_twin(twinning)
    assert not plan.ended
    count, errors = freeze_photos(plan, 4)
    assert (count, errors) == (5, [])
    training, held_out = (np.load(plan.run.data / f"{pool}.npy") for pool in ("training", "held_out"))
    assert training.shape[1:] == held_out.shape[1:] == (96, 96, 3)
    document = read_json(plan.run.document)
    pools = [row["pool"] for row in document["photos"]]
    assert sorted(pools) == ["held_out"] + ["training"] * 4
    photos = {row["path"]: cv2.imread(row["path"])[:, :, ::-1] for row in document["photos"]}
    for row in document["photos"]:
        crops = held_out if row["pool"] == "held_out" else training
        others = training if row["pool"] == "held_out" else held_out
        assert any(is_part(crop, photos[row["path"]]) for crop in crops)
        assert not any(is_part(crop, photos[row["path"]]) for crop in others)


def is_part(crop: np.ndarray, photo: np.ndarray) -> bool:
    found = cv2.matchTemplate(photo, crop, cv2.TM_SQDIFF)
    top, left = np.unravel_index(found.argmin(), found.shape)
    return np.array_equal(photo[top : top + crop.shape[0], left : left + crop.shape[1]], crop)


def test_patches_show_one_place(twinning: Twinning) -> None:
    """Bicubic LR patches, enlarged, are near the sharp patches, mirrored together."""
    plan = plan_twin(twinning)
    freeze_photos(plan, 4)
    crops = np.load(plan.run.data / "training.npy")
    plain = changed(twinning, degradation="bicubic", batch=8)
    batch = draw_degraded(crops, plain, 4, (0, 0, 1))
    assert [part.shape for part in batch] == [(8, 3, 8, 8), (8, 3, 32, 32), (8, 1, 32, 32)]
    for lr, sharp in zip(batch.lr, batch.pseudo_gt, strict=True):
        shrunk = cv2.resize(sharp.transpose(1, 2, 0), (8, 8), interpolation=cv2.INTER_AREA)
        assert np.abs(shrunk - lr.transpose(1, 2, 0)).mean() < 0.03
    again = draw_degraded(crops, plain, 4, (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(batch, again, strict=True))
    assert not np.array_equal(draw_degraded(crops, plain, 4, (0, 0, 2)).lr, batch.lr)


def test_a_twin_is_trained_judged_and_written(twinning: Twinning) -> None:
    plan = plan_twin(twinning)
    freeze_photos(plan, 4)
    assert finetune(plan.run, plan.gan_model, plan.training, "cpu", 1, twinning) == 6
    assert plan_twin(twinning).ended
    verdict = publish_twin(plan)
    assert verdict.psnr.keys() == verdict.ssim.keys() == {"twin", "gan", "bicubic"}
    assert 0 < verdict.similarity <= 1
    document = read_json(twinning.output.with_suffix(".json"))
    assert document["verdict"] == verdict._asdict() | {"psnr": verdict.psnr, "ssim": verdict.ssim}
    assert document["iterations"] == 6
    assert document["parent"]["path"] == str(twinning.gan_model)
    assert load_model(twinning.output).scale == 4
    weights = torch.load(twinning.output, weights_only=True)
    assert weights["params"].keys() == torch.load(twinning.gan_model, weights_only=True)["params"].keys()


@pytest.mark.parametrize(
    ("count", "side", "blur", "reason"),
    [
        (3, 120, 0, "has 3 different photos to train on; give at least 4"),
        (5, 120, 8, "has 0 different photos to train on, and 5 cannot be used, the first: .*is blurred"),
        (5, 30, 0, "5 cannot be used, the first: .*is 30x30, smaller than a patch of 32 px"),
        (0, 120, 0, "holds no images"),
    ],
)
def test_photos_that_are_of_no_use(
    twinning: Twinning, tmp_path: Path, count: int, side: int, blur: float, reason: str
) -> None:
    other = changed(twinning, photos=write_photos(tmp_path / "others", count, side, blur))
    with pytest.raises(UsageError, match=reason):
        freeze_photos(plan_twin(other), 4)
    assert not plan_twin(other).run.document.exists()


def test_another_twin_in_its_place_is_refused(twinning: Twinning) -> None:
    freeze_photos(plan_twin(twinning), 4)
    plan_twin(changed(twinning, patience=9, accumulate=2))
    with pytest.raises(UsageError, match="holds the training of another twin"):
        plan_twin(changed(twinning, degradation="mild"))


def test_a_twin_must_beat_the_gan_model() -> None:
    scores = {"twin": 24.0, "gan": 24.0, "bicubic": 20.0}
    assert not Verdict(scores, scores, 0.7).passed
    assert Verdict(scores | {"twin": 24.1}, scores, 0.7).passed
