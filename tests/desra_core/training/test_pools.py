"""The pools of a workspace: the images to train on, and the images to judge by."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest

from desra_core.annotations.export import select_images
from desra_core.errors import UsageError
from desra_core.planning.plan import load_settings, prepare
from desra_core.settings import Detection, Mining
from desra_core.training import pools
from desra_core.training.pools import Pools
from desra_core.workspace import Workspace
from tests.in_process import process

PHOTOS = 15


@pytest.fixture(scope="module")
def mined(make_models, make_photos, tmp_path_factory) -> SimpleNamespace:
    root = tmp_path_factory.mktemp("pools")
    mse, gan = make_models(root / "models")
    names = make_photos(root / "photos", PHOTOS)
    marked = {name for index, name in enumerate(names) if index % 3}
    process(Mining(photos=root / "photos", mse_model=mse, gan_model=gan, workspace=root / "ws"))
    return SimpleNamespace(root=root, photos=root / "photos", mse=mse, gan=gan, marked=marked,
                           clean=set(names) - marked)  # fmt: skip


@pytest.fixture
def workspace(mined, tmp_path) -> Workspace:
    return Workspace(Path(shutil.copytree(mined.root / "ws", tmp_path / "ws")))


def images_of(workspace: Workspace, **options: Any) -> Pools:
    with workspace.locked():
        return Pools(workspace, *load_settings(workspace), **({"group_by": "duplicates"} | options))


def test_each_image_is_in_one_pool(mined, workspace) -> None:
    images = images_of(workspace)
    training, held_out = list(images.with_artifacts("training")), list(images.with_artifacts("held_out"))
    names = [marked.image.names[0] for marked in (*training, *held_out)]
    assert sorted(names) == sorted(mined.marked)
    assert len(training) > len(held_out) > 0
    for pool in (training, held_out):
        assert [marked.severity for marked in pool] == sorted((marked.severity for marked in pool), reverse=True)
    regions = pq.read_table(workspace.regions).to_pylist()
    for marked in training:
        of_image = [region["severity"] for region in regions if region["id"] == marked.image.id]
        assert marked.severity == pytest.approx(sum(of_image))
    clean = {pool: images.clean(pool, PHOTOS) for pool in ("training", "held_out")}
    assert sorted(image.names[0] for pool in clean.values() for image in pool) == sorted(mined.clean)
    assert images.clean("training", 2) == clean["training"][:2]
    again = images_of(workspace)
    assert (list(again.with_artifacts("held_out")), again.clean("held_out", 99)) == (held_out, clean["held_out"])


def test_only_as_many_photos_are_read_as_are_asked_for(workspace, monkeypatch) -> None:
    read: list[str] = []
    real = pools._signature
    monkeypatch.setattr(pools, "_signature", lambda image: read.append(image.id) or real(image))
    monkeypatch.setattr(pools, "_AT_ONCE", 2)
    images = images_of(workspace)
    worst = next(images.with_artifacts("training"))
    asked = len(read)
    assert asked < len(images.ids_with_artifacts())
    assert asked % 2 == 0
    (judge,) = images.held_out_judges(1)
    every = [found.image.id for pool in ("training", "held_out") for found in images.with_artifacts(pool)]
    assert sorted(read) == sorted(every)
    assert worst.image.id in every
    held_out = {found.image.id for found in images.with_artifacts("held_out")}
    assert judge.id == min(held_out)
    assert [image.id for image in images.held_out_judges(99)] == sorted(held_out)


def test_the_held_out_images_that_are_missing(workspace) -> None:
    images = images_of(workspace)
    assert images.lacking() is None
    judges = [image.id for image in images.clean("held_out", 99)]
    images._clean_ids = [key for key in images._clean_ids if key not in judges]
    left = len(images._clean_ids)
    assert images.lacking() == (
        f"the gate will be undecided: none of the {left} photos without artifacts is held out; at least 1 of them must "
        "be held out, so add 4 or more: about 30 % of them will be"
    )
    images = images_of(workspace)
    images._clean_ids = []
    images._marked = images._marked.slice(0, 0)
    assert images.lacking() == (
        "the gate will be undecided: there is no photo with artifacts and there is no photo without artifacts; "
        "at least 1 of each must be held out, so add 4 or more: about 30 % of them will be"
    )


def test_only_images_that_are_done_under_the_latest_settings_count(mined, workspace) -> None:
    mining = Mining(photos=mined.photos, mse_model=mined.mse, gan_model=mined.gan, workspace=workspace.root)
    process(mining.model_copy(update={"threshold": 0.69, "limit": 6}))
    images = images_of(workspace)
    marked = {marked.image.names[0] for pool in ("training", "held_out") for marked in images.with_artifacts(pool)}
    first = set(sorted(mined.marked | mined.clean)[:6])
    assert marked == mined.marked & first
    # A clean image is one for the model that it was found with.
    process(mining.model_copy(update={"window": 9, "limit": 6}))
    images = images_of(workspace)
    clean = {image.names[0] for pool in ("training", "held_out") for image in images.clean(pool, 99)}
    assert clean == mined.clean & first


def test_a_run_that_was_killed_at_its_start_has_no_clean_images(mined, workspace) -> None:
    """New settings may mark an image that was clean under the old ones."""
    mining = Mining(photos=mined.photos, mse_model=mined.mse, gan_model=mined.gan, workspace=workspace.root)
    with workspace.locked():
        plan = prepare(mining.model_copy(update={"threshold": 0.9})).plan
    assert plan.done == 0
    images = images_of(workspace)
    for pool in ("training", "held_out"):
        assert list(images.with_artifacts(pool)) == images.clean(pool, PHOTOS) == []
    assert select_images(workspace, plan.target, everything=True, worst=None) == []


def test_vanished_and_failed_images_are_left_out(mined, workspace, tmp_path) -> None:
    photos = Path(shutil.copytree(mined.photos, tmp_path / "photos"))
    gone, broken = sorted(mined.marked)[:2]
    (photos / f"{gone}.png").unlink()
    (photos / f"{broken}.png").write_bytes(b"no photo")
    process(Mining(photos=photos, mse_model=mined.mse, gan_model=mined.gan, workspace=workspace.root))
    images = images_of(workspace)
    marked = {marked.image.names[0] for pool in ("training", "held_out") for marked in images.with_artifacts(pool)}
    assert marked == mined.marked - {gone, broken}


def test_photos_of_results_in_files_come_from_another_folder(mined, tmp_path) -> None:
    dataset, ws = mined.root / "ws/dataset", tmp_path / "ws"
    workspace = process(Detection(mse_sr=dataset / "mse_sr", gan_sr=dataset / "gan_sr", workspace=ws))
    with pytest.raises(UsageError, match="records no LR photos; give --lr"):
        images_of(workspace)
    with pytest.raises(UsageError, match=r"models: holds no images, but 2 \.pth"):
        images_of(workspace, lr=mined.gan.parent)
    photos = Path(shutil.copytree(mined.photos, tmp_path / "photos"))
    missing = sorted(mined.marked)[0]
    (photos / f"{missing}.png").unlink()
    images = images_of(workspace, lr=photos)
    found = [marked.image for pool in ("training", "held_out") for marked in images.with_artifacts(pool)]
    assert {image.names[0] for image in found} == mined.marked - {missing}
    assert all(image.lr.path == photos / f"{image.names[0]}.png" for image in found)
    assert images.clean("held_out", 9) == []


def test_pools_stay_when_the_models_change(mined, workspace, make_models, tmp_path) -> None:
    before = {marked.image.id for marked in images_of(workspace).with_artifacts("held_out")}
    newer = make_models(tmp_path / "newer", strength=1.2)[1]
    process(Mining(photos=mined.photos, mse_model=mined.mse, gan_model=newer, workspace=workspace.root))
    after = list(images_of(workspace).with_artifacts("held_out"))
    assert {marked.image.id for marked in after} == before
    assert all(dataclasses.asdict(marked.image)["lr"] for marked in after)
