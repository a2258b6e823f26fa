"""The MSE twin of a GAN model: crops, refusals, the verdict, and what is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from desra_core import load_model
from desra_core.errors import UsageError
from desra_core.files import content_key, read_json, write_json
from desra_core.networks.checkpoints import read_kinds, read_weights
from desra_core.settings.models import Cycling, Twinning
from desra_core.training.loop import finetune
from desra_core.training.twin import (
    TwinVerdict,
    delete_training,
    draw_degraded,
    freeze_photos,
    open_crops,
    plan_twin,
    publish_twin,
    twinning_of,
)


@pytest.fixture
def twinning(tmp_path: Path, gan_model: Path, sharp_photos: Callable[..., Path]) -> Twinning:
    return Twinning(photos=sharp_photos(tmp_path / "photos"), gan_model=gan_model, output=tmp_path / "twin.pth",
                    preset="cpu", iterations=6, checkpoint_every=3, patch=32, batch=2)  # fmt: skip


def changed(twinning: Twinning, **values: Any) -> Twinning:
    return twinning.model_copy(update=values)


def test_held_out_photos_are_not_trained_on(twinning: Twinning) -> None:
    plan = plan_twin(twinning)
    assert plan.verdict is None
    read: list[tuple[int, int]] = []
    count, errors = freeze_photos(plan, 4, lambda *numbers: read.append(numbers))
    assert (count, errors) == (4, [])
    assert read == [(number, 5) for number in range(5)]
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
    crops, none = open_crops(plan.run.data, "training")
    assert none is None
    plain = changed(twinning, degradation="bicubic", batch=8)
    batch = draw_degraded(crops, None, plain, 4, (0, 0, 1))
    assert [part.shape for part in batch] == [(8, 3, 8, 8), (8, 3, 32, 32), (8, 1, 32, 32)]
    for lr, sharp in zip(batch.lr, batch.pseudo_gt, strict=True):
        shrunk = cv2.resize(sharp.transpose(1, 2, 0), (8, 8), interpolation=cv2.INTER_AREA)
        assert np.abs(shrunk - lr.transpose(1, 2, 0)).mean() < 0.03
    again = draw_degraded(crops, None, plain, 4, (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(batch, again, strict=True))
    assert not np.array_equal(draw_degraded(crops, None, plain, 4, (0, 0, 2)).lr, batch.lr)


def test_a_twin_is_trained_judged_and_written(twinning: Twinning) -> None:
    plan = plan_twin(twinning)
    freeze_photos(plan, 4)
    assert finetune(plan.run, plan.gan_model, plan.training, "cpu", 1, twinning) == 6
    verdict = publish_twin(plan)
    assert plan_twin(twinning).verdict == verdict
    assert verdict.psnr.keys() == verdict.ssim.keys() == {"twin", "gan", "bicubic"}
    assert 0 < verdict.similarity <= 1
    document = read_json(twinning.output.with_suffix(".json"))
    assert document["verdict"] == verdict._asdict()
    assert document["iteration"] in (3, 6)
    assert document["parent"]["path"] == str(twinning.gan_model)
    assert load_model(twinning.output).scale == 4
    weights = torch.load(twinning.output, weights_only=True)
    assert weights["params"].keys() == torch.load(twinning.gan_model, weights_only=True)["params"].keys()


def test_the_best_checkpoint_is_chosen_and_the_rest_is_deleted(twinning: Twinning) -> None:
    plan = plan_twin(twinning)
    plan.run.data.mkdir(parents=True)
    (plan.run.data / ".1.unfinished").touch()  # of a killed run
    freeze_photos(plan, 4)
    assert sorted(path.name for path in plan.run.data.glob("*.npy")) == ["held_out.npy", "training.npy"]
    finetune(plan.run, plan.gan_model, plan.training, "cpu", 1, twinning)
    first = plan.run.model(3).with_suffix(".json")
    write_json(first, read_json(first) | {"loss": 0.0})
    wanted = read_kinds(plan.run.model(3))["ema"]
    publish_twin(plan)
    assert read_json(twinning.output.with_suffix(".json"))["iteration"] == 3
    assert all(torch.equal(values, wanted[name]) for name, values in read_weights(twinning.output).items())
    assert not plan.run.data.exists()
    assert not plan.run.models()
    assert not plan.run.state.exists()


def test_copies_of_a_photo_are_in_one_pool(twinning: Twinning) -> None:
    for path in list(twinning.photos.iterdir()):
        photo = cv2.imread(str(path))
        assert cv2.imwrite(str(path.with_name(f"copy-of-{path.stem}.jpg")), photo)
    plan = plan_twin(twinning)
    assert freeze_photos(plan, 4) == (8, [])
    pools = {Path(row["path"]).stem: row["pool"] for row in read_json(plan.run.document)["photos"]}
    assert sorted(pools.values()) == ["held_out"] * 2 + ["training"] * 8
    assert all(pools[f"photo{index}"] == pools[f"copy-of-photo{index}"] for index in range(5))


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
    twinning: Twinning,
    sharp_photos: Callable[..., Path],
    tmp_path: Path,
    count: int,
    side: int,
    blur: float,
    reason: str,
) -> None:
    other = changed(twinning, photos=sharp_photos(tmp_path / "others", count, side, blur))
    with pytest.raises(UsageError, match=reason):
        freeze_photos(plan_twin(other), 4)
    assert not list(other.output.parent.rglob("run.json"))


def test_another_twin_in_its_place_is_refused(twinning: Twinning) -> None:
    freeze_photos(plan_twin(twinning), 4)
    plan_twin(changed(twinning, patience=9, accumulate=2))
    with pytest.raises(
        UsageError, match="holds a training with --degradation real, not mild; give the same again, name"
    ):
        plan_twin(changed(twinning, degradation="mild"))


def test_a_cycle_trains_a_twin_of_its_own_model(twinning: Twinning, tmp_path: Path) -> None:
    """Parts of a batch are those of the finetune's batch, if they divide the twin's too."""
    cycling = Cycling(photos=twinning.photos, gan_model=twinning.gan_model, workspace=tmp_path / "ws", preset="cpu",
                      accumulate=2, twin_photos=twinning.photos)  # fmt: skip
    asked = twinning_of(cycling)
    assert asked is not None
    assert (asked.batch, asked.accumulate) == (3, 1)
    given = cycling.model_dump(include={"photos", "gan_model", "workspace", "twin_photos"})
    for preset, parts, of_twin in (("cpu", 8, 1), ("paper", 4, 4), ("paper", 12, 12)):
        other = twinning_of(Cycling(**given | {"preset": preset, "accumulate": parts}))
        assert other is not None
        assert other.accumulate == of_twin
    asked.output.parent.mkdir(parents=True)
    asked.output.touch()
    for key, fits in ((content_key(twinning.gan_model), True), ("of another one", False), (None, True)):
        write_json(asked.output.with_suffix(".json"), {"parent": {"key": key}} if key else {})
        if fits:
            assert twinning_of(cycling) is None
        else:
            with pytest.raises(UsageError, match=r"is the twin of another GAN model; delete .*/ws/twin and train one"):
                twinning_of(cycling)
            # What is named is taken as it is.
            assert twinning_of(Cycling(**given | {"mse_model": asked.output})) is None


def test_photos_are_left_out_by_globs_as_in_mining(twinning: Twinning) -> None:
    first, second, *others = sorted(twinning.photos.iterdir())
    rough = twinning.photos / "rough"
    rough.mkdir()
    for path in (first, second):
        path.rename(rough / path.name)
    for glob in ("rough", "rough/*", str(rough), f"{rough}/*"):
        with pytest.raises(UsageError, match=f"has {len(others)} different photos to train on"):
            freeze_photos(plan_twin(changed(twinning, exclude=(glob,))), 4)


def test_a_twin_that_is_no_better_than_the_gan_model_is_not_written(twinning: Twinning) -> None:
    """Here the parent is an MSE model, and the steps are too small."""
    bad = changed(twinning, gan_model=twinning.gan_model.with_name("mse.pth"), learning_rate=1e-12)
    plan = plan_twin(bad)
    freeze_photos(plan, 4)
    finetune(plan.run, plan.gan_model, plan.training, "cpu", 1, bad)
    verdict = publish_twin(plan)
    assert not verdict.passed
    assert verdict.psnr["twin"] <= verdict.psnr["gan"]
    assert not bad.output.exists()
    assert not bad.output.with_suffix(".json").exists()
    assert plan_twin(bad).verdict == verdict
    # A kill has left all of it.
    [kept] = plan.run.models()
    plan.run.state.touch()
    plan.run.data.mkdir(exist_ok=True)
    delete_training(plan, verdict)
    assert plan.run.models() == [kept]
    assert not plan.run.state.exists()
    assert not plan.run.data.exists()


def test_equal_scores_are_no_better() -> None:
    scores = {"twin": 24.0, "gan": 24.0, "bicubic": 20.0}
    assert not TwinVerdict(scores, scores, 0.7).passed
    assert TwinVerdict(scores | {"twin": 24.1}, scores, 0.7).passed


def test_real_pairs_are_cut_at_one_place(twinning: Twinning, tmp_path: Path) -> None:
    """LR photos of other pixels than the degraded ones; one is missing, one has another size, one is small."""
    (tmp_path / "lr").mkdir()
    for path in twinning.photos.iterdir():
        shrunk = cv2.resize(cv2.imread(str(path)), (30, 30), interpolation=cv2.INTER_AREA)
        assert cv2.imwrite(str(tmp_path / "lr" / path.name), shrunk // 2 + 40)
    small = cv2.imread(str(twinning.photos / "photo0.png"))[:60, :70]
    for name, lr in (("small", (17, 15)), ("other", (16, 15)), ("alone", None)):
        assert cv2.imwrite(str(twinning.photos / f"{name}.png"), small)
        small = 255 - small[:, ::-1]
        if lr:
            whole = cv2.imread(str(twinning.photos / f"{name}.png"))[:, :68]
            shrunk = cv2.resize(whole, lr, interpolation=cv2.INTER_AREA)
            assert cv2.imwrite(str(tmp_path / "lr" / f"{name}.png"), shrunk // 2 + 40)
    paired = changed(twinning, lr=tmp_path / "lr", batch=8)
    plan = plan_twin(paired)
    count, errors = freeze_photos(plan, 4)
    assert count == 5  # and one is held out
    assert {str(error).partition("; ")[0] for error in errors} == {
        f"{twinning.photos / 'alone.png'}: has no LR photos of its name in {tmp_path / 'lr'}",
        f"{tmp_path / 'lr/other.png'}: is 16x15, and its sharp photo 70x60",
    }
    for pool in ("training", "held_out"):
        crops, lr_crops = open_crops(plan.run.data, pool)
        assert lr_crops is not None
        assert (len(crops), crops.shape[1:], lr_crops.shape[1:]) == (len(lr_crops), (96, 96, 3), (24, 24, 3))
        batch = draw_degraded(crops, lr_crops, paired, 4, (0, 0, 1))
        for lr, sharp in zip(batch.lr, batch.pseudo_gt, strict=True):
            shrunk = cv2.resize(sharp.transpose(1, 2, 0), (8, 8), interpolation=cv2.INTER_AREA)
            assert np.abs(shrunk / 2 + 40 / 255 - lr.transpose(1, 2, 0)).max() < 0.01
    assert finetune(plan.run, plan.gan_model, plan.training, "cpu", 1, paired) == 6
    assert publish_twin(plan).psnr["gan"] < 20  # the GAN model is judged on the LR photos that were given


def test_photos_of_the_corpus_itself_are_shrunk_and_the_sharpest_are_taken(
    twinning: Twinning, sharp_photos: Callable[..., Path], tmp_path: Path
) -> None:
    photos = sharp_photos(tmp_path / "corpus", 6, 240, 2.0)
    for index, path in enumerate(sorted(sharp_photos(tmp_path / "sharp", 6, 240).iterdir())):
        path.rename(photos / f"sharp{index}.png")
    plan = plan_twin(changed(twinning, photos=photos, self=True))
    count, errors = freeze_photos(plan, 4)
    assert (count, errors) == (5, [])
    used = [Path(row["path"]) for row in read_json(plan.run.document)["photos"]]
    assert sorted(path.name for path in used) == [f"sharp{index}.png" for index in range(6)]
    halved = [cv2.resize(cv2.imread(str(path)), (120, 120), interpolation=cv2.INTER_AREA) for path in used]
    for pool in ("training", "held_out"):
        for crop in open_crops(plan.run.data, pool)[0]:
            assert any(is_part(crop, photo[:, :, ::-1]) for photo in halved)


def test_settings_that_contradict_each_other(twinning: Twinning) -> None:
    with pytest.raises(ValueError, match="--lr is given, too"):
        Twinning(**(twinning.model_dump() | {"lr": twinning.photos, "self": True}))
