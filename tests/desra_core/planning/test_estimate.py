"""What a mine is estimated to take: measured by real networks, and the arithmetic by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from desra_core.images.census import PHOTOS, take_census
from desra_core.networks.checkpoints import Model, load_model, load_pair
from desra_core.networks.super_resolution import inferred_pixels, super_resolve
from desra_core.planning import estimate as planning_estimate
from desra_core.planning.estimate import Measured, estimate, measure
from desra_core.settings import Mining
from desra_core.workspace.arrays import stored_bytes, write_array
from tests.conftest import MODELS
from tests.in_process import process


@pytest.fixture(scope="module")
def models() -> tuple[Model, Model]:
    return load_pair(MODELS / "mse.pth", MODELS / "gan.pth")


def photos_of(*sizes: tuple[int, int]) -> pa.Table:
    rows = [{"path": f"{index}.png", "height": height, "width": width} for index, (height, width) in enumerate(sizes)]
    return pa.Table.from_pylist(rows, PHOTOS)


def test_the_arithmetic(models: tuple[Model, Model]) -> None:
    """Photos that fit into a window: all is as the pixels, which are 0.25 MP against 0.05 MP in the crops."""
    photos = photos_of((100, 200), (100, 200), (210, 1000))
    measured = Measured(
        photos=2, megapixels=0.5, decoding=1.0, crops=2, crop_megapixels=0.05, inferred_megapixels=(0.05, 0.1),
        inference=(3.0, 4.0), comparison=0.5, keeping=0.25, mask=10, kept=1000, png=300, jpeg=20,
    )  # fmt: skip
    mse, gan = (sum(inferred_pixels(model, *size) for size in ((100, 200), (100, 200), (210, 1000))) / 1e6
                for model in models)  # fmt: skip
    made = estimate(measured, photos, models, workers=2)
    inference = 3.0 / 0.05 * mse + 4.0 / 0.1 * gan
    assert made.decoding == pytest.approx(1.0 / 0.5 * 0.25)
    assert made.inference == pytest.approx(inference)
    assert (made.comparison, made.keeping) == (pytest.approx(0.5 * 5), pytest.approx(0.25 * 5))
    assert made.seconds == (pytest.approx((0.5 + inference + 2.5) / 2), pytest.approx((0.5 + inference + 3.75) / 2))
    assert (made.mine, made.png, made.jpeg) == ((pytest.approx(50), pytest.approx(5050)), pytest.approx(1500),
                                                pytest.approx(100))  # fmt: skip
    on_gpus = estimate(measured, photos, models, workers=2, gpus=4)
    assert on_gpus.seconds is not None
    assert on_gpus.seconds[0] == pytest.approx(inference / 4 + 1.5)
    assert estimate(measured, photos, None, workers=2) == (made.decoding, *[None] * 7)


@pytest.mark.parametrize("size", [(5, 30), (100, 200), (700, 900)])
def test_the_pixels_that_networks_get_are_counted(size: tuple[int, int]) -> None:
    model = load_model(MODELS / "gan.pth")
    got = []
    hook = model.network.register_forward_pre_hook(
        lambda _, given: got.append(given[0].shape[0] * given[0].shape[2] * given[0].shape[3])
    )
    super_resolve(model, np.zeros((*size, 3), np.uint8))
    hook.remove()
    assert sum(got) == inferred_pixels(model, *size)
    if size == (700, 900):
        assert sum(got) > 1.02 * 700 * 900, "windows overlap"


def test_a_sample_is_measured(tmp_path: Path, models: tuple[Model, Model], make_photos: Any) -> None:
    """The bytes are those of a real mine, as far as photos are no larger than a crop."""
    make_photos(tmp_path / "photos", 4)
    census = take_census(tmp_path / "photos")
    assert max(census.extremes()[1][side] for side in ("width", "height")) <= 160
    measured, failures = measure(tmp_path / "photos", census.photos, models, 1)
    assert not failures
    assert (measured.photos, measured.crops) == (4, 4)
    assert measured.megapixels == pytest.approx(census.megapixels.sum())
    assert measured.crop_megapixels == pytest.approx(measured.megapixels)
    assert min(measured.decoding, *measured.inference, measured.comparison, measured.keeping) > 0
    made = estimate(measured, census.photos, models, workers=1)
    mined = process(
        Mining(photos=tmp_path / "photos", workspace=tmp_path / "ws", mse_model=str(MODELS / "mse.pth"),
               gan_model=MODELS / "gan.pth", keep="all")
    )  # fmt: skip
    kept = [mined.maps, mined.masks, mined.dataset_manifest.parent]
    real = sum(path.stat().st_size for folder in kept for path in folder.rglob("*") if path.is_file())
    assert made.mine is not None
    assert made.mine[1] == pytest.approx(real, rel=0.05)
    assert measured.png == pytest.approx(made.png)


def test_after_a_while_only_decoding_is_measured(
    tmp_path: Path, models: tuple[Model, Model], make_photos: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_photos(tmp_path, 3)
    monkeypatch.setattr(planning_estimate, "_SECONDS", 0)
    census = take_census(tmp_path)
    measured, _ = measure(tmp_path, census.photos, models, 1)
    assert (measured.photos, measured.crops) == (3, 1)
    made = estimate(measured, census.photos, models, 1)
    assert made.png == pytest.approx(measured.png / measured.crop_megapixels * census.megapixels.sum())


def test_a_photo_of_the_sample_that_is_damaged_is_named(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8)
    for name in "ab":
        Image.fromarray(noise).save(tmp_path / f"{name}.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    census = take_census(tmp_path)
    assert (census.photos.num_rows, census.unreadable) == (2, []), "the headers are whole"
    measured, failures = measure(tmp_path, census.photos, None, 1)
    assert (measured.photos, measured.crops, len(failures)) == (1, 0, 1)
    assert failures[0].subject == str(tmp_path / "a.png")
    assert estimate(measured, census.photos, None, 1).decoding == pytest.approx(2 * measured.decoding)


@pytest.mark.parametrize("memory", [False, True])
def test_photos_of_the_sample_that_cannot_be_upscaled_are_named(tmp_path: Path, memory: bool) -> None:
    """A network that overflows on bright photos or finds no memory for them, and another photo that it takes."""
    for name, level in (("bright", 255), ("dark", 20)):
        Image.new("L", (40, 40), level).save(tmp_path / f"{name}.png")

    def fails_on_bright(_: Any, given: tuple[Any, ...], values: Any) -> Any:
        if given[0].mean() < 0.5:
            return values
        if memory:
            raise MemoryError
        return values * float("inf")

    pair = load_model(MODELS / "mse.pth"), load_model(MODELS / "gan.pth")
    hook = pair[1].network.register_forward_hook(fails_on_bright)
    try:
        measured, failures = measure(tmp_path, take_census(tmp_path).photos, pair, 1)
    finally:
        hook.remove()
    assert (measured.photos, measured.crops, len(failures)) == (1, 1, 1)
    assert failures[0].subject == str(tmp_path / "bright.png")
    reason = "needs more memory than there is" if memory else "gives values that are not finite"
    assert reason in failures[0].reason


def test_a_sample_is_spread_over_the_sizes(tmp_path: Path) -> None:
    for index in range(40):
        Image.new("L", (20 + index, 20)).save(tmp_path / f"{index:02d}.png")
    census = take_census(tmp_path)
    told: list[tuple[int, int]] = []
    measured, _ = measure(tmp_path, census.photos, None, 1, lambda *each: told.append(each))
    assert measured.photos == 12
    assert told[-1] == (12, 12)
    assert measured.megapixels * 1e6 == sum(20 * (20 + round(39 * step / 11)) for step in range(12))


def test_bytes_of_an_array_are_those_of_its_files(tmp_path: Path) -> None:
    from desra_core.workspace import Workspace

    workspace = Workspace(tmp_path / "ws")
    workspace.create()
    array = np.random.default_rng(0).integers(0, 9, (700, 600, 3), np.uint8)
    with workspace.locked() as held:
        write_array(held, "0" * 32, "gan_sr", array, key="k")
    folder = workspace.group("0" * 32) / "gan_sr"
    real = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert stored_bytes(array) == pytest.approx(real, rel=0.01)
