"""Patches of images whose pixels hold their own position: aligned, flipped alike, as often masked as asked for."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from desra_core.errors import ImageError, TransientError, UsageError
from desra_core.images.codec import encode_mask, encode_png
from desra_core.settings.models import Training
from desra_core.training.patches import (
    Batch,
    Sample,
    TrainingPair,
    draw_batch,
    freeze,
    least_side,
    open_frozen,
    read_sample,
)

SCALES = st.sampled_from([2, 3, 4])


def batch_of(
    pairs: list[TrainingPair], *, size: int, patch: int, mask_share: float, scale: int, seed: tuple[int, ...]
) -> Batch:
    training = Training.model_construct(batch=size, patch=patch, mask_share=mask_share)
    return draw_batch(pairs, training, scale, seed)


def told(height: int, width: int, image: int) -> np.ndarray:
    """Make pixels ``(H, W, 3)`` uint16 of row, column and the number of the image."""
    rows, columns = np.mgrid[:height, :width]
    return np.dstack([rows, columns, np.full_like(rows, image)]).astype(np.uint16)


def pair(height: int, width: int, scale: int, mask: np.ndarray | None = None, image: int = 0) -> TrainingPair:
    """Make an image whose pixels are coordinates; without a mask, no pixel is masked."""
    mask = np.zeros((height * scale, width * scale), bool) if mask is None else mask
    cells = mask.reshape(height, scale, width, scale).any(axis=(1, 3))
    return TrainingPair(told(height, width, image), told(*mask.shape, image), mask, np.flatnonzero(cells))


def values(part: np.ndarray) -> np.ndarray:
    """Convert an input to ``(N, s, s, C)`` integers."""
    return np.rint(part.astype(np.float64) * 65535).astype(int).transpose(0, 2, 3, 1)


class Case(NamedTuple):
    pairs: list[TrainingPair]
    scale: int
    patch: int
    mask_share: float
    seed: tuple[int, int]

    def batch(self) -> Batch:
        return batch_of(
            self.pairs, size=6, patch=self.patch, mask_share=self.mask_share, scale=self.scale, seed=self.seed
        )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw one to three images, some hardly larger than the smallest patch, with masks of any shape."""
    scale = draw(SCALES)
    sides = st.integers(least_side(scale), least_side(scale) + 24)
    pairs = []
    for image in range(draw(st.integers(1, 3))):
        height, width = draw(sides), draw(sides)
        rng = np.random.default_rng(draw(st.integers(0, 99)))
        mask = rng.random((height * scale, width * scale)) < draw(st.sampled_from([0, 0.0002, 0.01, 1]))
        pairs.append(pair(height, width, scale, mask, image))
    return Case(
        pairs,
        scale,
        patch=draw(st.integers(32, 160)),
        mask_share=draw(st.sampled_from([0.0, 0.5, 1.0])),
        seed=(draw(st.integers(0, 99)), 0),
    )


@given(cases())
@settings(deadline=None, max_examples=60)
def test_patches_show_the_same_place_and_are_flipped_alike(case: Case) -> None:
    batch = case.batch()
    lr, pseudo_gt, masks = values(batch.lr), values(batch.pseudo_gt), batch.mask[:, 0]
    for low, high, mask in zip(lr, pseudo_gt, masks, strict=True):
        rows, columns, images = np.moveaxis(high, 2, 0)
        assert len(np.unique(images)) == 1
        assert (low[:, :, 2] == images[0, 0]).all()
        np.testing.assert_array_equal(rows // case.scale, np.kron(low[:, :, 0], np.ones((case.scale,) * 2, int)))
        np.testing.assert_array_equal(columns // case.scale, np.kron(low[:, :, 1], np.ones((case.scale,) * 2, int)))
        assert (np.diff(rows, axis=0) == 1).all()
        assert np.unique(np.diff(columns, axis=1)).tolist() in ([1], [-1])
        np.testing.assert_array_equal(mask, case.pairs[images[0, 0]].mask[rows, columns])


@given(cases())
@settings(deadline=None, max_examples=40)
def test_patches_are_as_large_as_asked_for_and_fit_images_and_networks(case: Case) -> None:
    batch = case.batch()
    size, channels, side, width = batch.pseudo_gt.shape
    assert (size, channels, width) == (6, 3, side)
    assert batch.lr.shape == (6, 3, side // case.scale, side // case.scale)
    assert batch.mask.shape == (6, 1, side, side)
    assert side % 8 == side % case.scale == 0
    step = math.lcm(8, case.scale)
    used = {int(image) for image in np.unique(values(batch.lr)[..., 2])}
    bound = min(case.patch, *(min(case.pairs[image].mask.shape) for image in used))
    assert side <= bound < side + step
    for array in batch:
        assert array.dtype == np.float32
        assert array.flags.c_contiguous
        assert array.min() >= 0
        assert array.max() <= 1


@given(cases())
@settings(deadline=None, max_examples=40)
def test_patches_overlap_a_mask_or_not_as_asked_for(case: Case) -> None:
    batch = case.batch()
    side = batch.mask.shape[-1]
    for number, mask in enumerate(batch.mask):
        image = case.pairs[int(values(batch.lr)[number, 0, 0, 2])]
        if case.mask_share == 1 and image.mask.any():
            assert mask.any()
        if case.mask_share == 0 and not image.mask.any():
            assert not mask.any()
        if image.mask.all() or side == min(image.mask.shape) == max(image.mask.shape):
            assert mask.any() == image.mask.any()


@given(cases())
@settings(deadline=None, max_examples=20)
def test_the_same_seed_gives_the_same_patches(case: Case) -> None:
    for array, again in zip(case.batch(), case.batch(), strict=True):
        np.testing.assert_array_equal(array, again)


def large(mask: tuple[slice, slice] | None = None, image: int = 0) -> TrainingPair:
    marked = np.zeros((480, 480), bool)
    if mask:
        marked[mask] = True
    return pair(120, 120, 4, marked, image)


def drawn(pairs: list[TrainingPair], mask_share: float, size: int = 300, seed: int = 0) -> Batch:
    return batch_of(pairs, size=size, patch=64, mask_share=mask_share, scale=4, seed=(seed,))


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_the_share_of_masked_patches(share: float) -> None:
    """A tenth of all places overlap the mask, so patches without a mask have to be searched for."""
    batch = drawn([large((slice(200, 260), slice(100, 130)))], share)
    found = batch.mask.any(axis=(1, 2, 3)).mean()
    assert abs(found - share) <= 4 * math.sqrt(share * (1 - share) / 300)


def test_a_single_masked_pixel_is_seen_from_everywhere() -> None:
    place = slice(203, 204), slice(301, 302)
    batch = drawn([large(place)], 1.0)
    assert (batch.mask.sum(axis=(1, 2, 3)) == 1).all()
    corners = values(batch.pseudo_gt)[:, :, :, :2].min(axis=(1, 2))
    assert set(corners[:, 0]) == set(range(140, 204, 4))
    assert set(corners[:, 1]) == set(range(240, 304, 4))


def test_a_mask_in_the_corner_is_seen_from_there() -> None:
    batch = drawn([large((slice(479, 480), slice(0, 1)))], 1.0, size=20)
    corners = values(batch.pseudo_gt)[:, :, :, :2].min(axis=(1, 2))
    assert set(map(tuple, corners)) == {(416, 0)}


def test_all_places_are_seen_without_a_mask() -> None:
    corners = values(drawn([large()], 0.5, size=3000).lr)[:, :, :, :2].min(axis=(1, 2))
    assert set(corners[:, 0]) == set(corners[:, 1]) == set(range(105))


def test_images_and_flips_come_evenly() -> None:
    batch = drawn([large(image=image) for image in range(3)], 0.5, size=600)
    counts = np.bincount(values(batch.lr)[:, 0, 0, 2])
    assert len(counts) == 3
    assert counts.min() > 150
    columns = values(batch.lr)[:, 0, :, 1]
    assert 230 < (columns[:, 0] > columns[:, -1]).sum() < 370


def test_other_seeds_give_other_patches() -> None:
    first, second, third = (
        batch_of([large()], size=4, patch=64, mask_share=0.5, scale=4, seed=seed) for seed in ((1, 0), (1, 1), (2, 0))
    )
    assert not np.array_equal(first.lr, second.lr)
    assert not np.array_equal(first.lr, third.lr)


@pytest.mark.parametrize("scale", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("patch", [32, 33, 256])
def test_every_scale_has_patches(scale: int, patch: int) -> None:
    side = least_side(scale)
    assert side >= 16
    batch = batch_of([pair(side, side, scale)], size=2, patch=patch, mask_share=0.5, scale=scale, seed=(0,))
    assert batch.lr.shape[-1] * scale == batch.mask.shape[-1] > 0
    assert batch.mask.shape[-1] % 8 == 0


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 3])
def test_gray_and_deep_pixels(dtype: type, channels: int) -> None:
    top = np.iinfo(dtype).max
    rng = np.random.default_rng(0)
    lr, pseudo_gt = (rng.integers(0, top, (side, side, channels), dtype, endpoint=True) for side in (16, 64))
    image = TrainingPair(lr, pseudo_gt, np.zeros((64, 64), bool), np.array([], np.intp))
    batch = batch_of([image], size=1, patch=64, mask_share=0.5, scale=4, seed=(0,))
    for array, pixels in ((batch.lr, lr), (batch.pseudo_gt, pseudo_gt)):
        upright = min((array, array[..., ::-1]), key=lambda part: np.abs(part[0, 0] - pixels[:, :, 0] / top).max())
        expected = np.broadcast_to(pixels / top, (*pixels.shape[:2], 3)).transpose(2, 0, 1)
        np.testing.assert_allclose(upright[0], expected, atol=1e-7)


def test_mixed_kinds_of_images_make_one_batch() -> None:
    rng = np.random.default_rng(0)
    images = []
    for dtype, channels in ((np.uint8, 1), (np.uint16, 3)):
        lr, pseudo_gt = (rng.integers(0, 200, (side, side, channels)).astype(dtype) for side in (16, 64))
        images.append(TrainingPair(lr, pseudo_gt, np.zeros((64, 64), bool), np.array([], np.intp)))
    assert batch_of(images, size=8, patch=64, mask_share=0.5, scale=4, seed=(0,)).lr.shape == (8, 3, 16, 16)


class Files:
    """The files of a training image."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        rng = np.random.default_rng(0)
        self.lr = rng.integers(0, 256, (20, 24, 3), np.uint8)
        self.mse_sr, self.gan_sr = rng.integers(0, 256, (2, 80, 96, 3), np.uint8)
        self.mask = np.zeros((80, 96), bool)
        self.mask[10:30, 40:60] = True

    def sample(self, *, with_pseudo_gt: bool) -> Sample:
        for name in ("lr", "mse_sr", "gan_sr"):
            (self.folder / f"{name}.png").write_bytes(encode_png(getattr(self, name)))
        (self.folder / "mask.png").write_bytes(encode_mask(self.mask))
        results = self.folder / "mse_sr.png", self.folder / "gan_sr.png"
        if with_pseudo_gt:
            results = (self.folder / "pseudo_gt.png",)
            results[0].write_bytes(encode_png(np.where(self.mask[:, :, None], self.mse_sr, self.gan_sr)))
        return Sample("name", "id", 1.0, self.folder / "lr.png", self.folder / "mask.png", results)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@pytest.mark.parametrize("with_pseudo_gt", [True, False])
def test_samples_are_read_or_assembled(files: Files, with_pseudo_gt: bool) -> None:
    lr, pseudo_gt, mask = read_sample(files.sample(with_pseudo_gt=with_pseudo_gt), 4)
    np.testing.assert_array_equal(lr, files.lr)
    np.testing.assert_array_equal(mask, files.mask)
    np.testing.assert_array_equal(pseudo_gt[~files.mask], files.gan_sr[~files.mask])
    np.testing.assert_array_equal(pseudo_gt[files.mask], files.mse_sr[files.mask])
    assert mask.dtype == bool


def refused(sample: Sample, scale: int) -> str:
    with pytest.raises(ImageError) as caught:
        read_sample(sample, scale)
    assert "\n" not in str(caught.value)
    assert caught.value.subject == str(sample.lr)
    return caught.value.reason


@pytest.mark.parametrize("with_pseudo_gt", [True, False])
@pytest.mark.parametrize("scale", [2, 3])
def test_a_model_of_another_scale(files: Files, with_pseudo_gt: bool, scale: int) -> None:
    reason = refused(files.sample(with_pseudo_gt=with_pseudo_gt), scale)
    assert reason == f"is 24x20 and its results are 96x80, but the model enlarges by {scale}"


@pytest.mark.parametrize("name", ["mse_sr", "gan_sr", "mask"])
def test_results_of_different_sizes(files: Files, name: str) -> None:
    setattr(files, name, getattr(files, name)[:76, :92])
    assert "its results are 92x76" in refused(files.sample(with_pseudo_gt=False), 4)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_a_photo_without_room_for_a_patch(files: Files, scale: int) -> None:
    side = least_side(scale)
    files.lr = np.zeros((side - 1, side, 3), np.uint8)
    files.mse_sr = files.gan_sr = np.zeros(((side - 1) * scale, side * scale, 3), np.uint8)
    files.mask = np.zeros(files.mse_sr.shape[:2], bool)
    expected = f"is {side}x{side - 1}, smaller than the smallest patch of {side} px"
    assert refused(files.sample(with_pseudo_gt=False), scale) == expected


def test_a_file_that_has_gone_or_is_no_image(files: Files) -> None:
    sample = files.sample(with_pseudo_gt=False)
    sample.results[0].write_text("no image")
    with pytest.raises(ImageError, match=f"{sample.results[0]}: is not an image"):
        read_sample(sample, 4)
    sample.mask.unlink()
    with pytest.raises(TransientError, match=f"{sample.mask}: there is no such file"):
        read_sample(sample, 4)


def frozen(folder: Path, count: int = 3) -> list[TrainingPair]:
    pairs = []
    for index in range(count):
        mask = np.zeros((64 + 8 * index, 80), bool)
        mask[4 * index + 2, 4 : 4 + 8 * index] = True
        pairs.append(pair(16 + 2 * index, 20, 4, mask, index))
        freeze(folder / f"{index:04d}", (pairs[-1].lr, pairs[-1].pseudo_gt, mask))
    return pairs


def test_frozen_images_come_back(tmp_path: Path) -> None:
    written = frozen(tmp_path)
    found = open_frozen(tmp_path)
    assert len(found) == 3
    for image, before in zip(found, written, strict=True):
        for array, wanted in zip(image, before, strict=True):
            assert array.dtype == wanted.dtype
            np.testing.assert_array_equal(array, wanted)
        assert isinstance(image.pseudo_gt, np.memmap)
    arrays = [batch_of(pairs, size=8, patch=64, mask_share=0.5, scale=4, seed=(3,)) for pairs in (written, found)]
    for first, second in zip(*arrays, strict=True):
        np.testing.assert_array_equal(first, second)


def test_other_files_in_the_folder_are_left_out(tmp_path: Path) -> None:
    frozen(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    assert len(open_frozen(tmp_path)) == 3


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "only its header": lambda path: path.write_bytes(path.read_bytes()[:40]),
    "zeros": lambda path: path.write_bytes(bytes(500)),
    "text": lambda path: path.write_text("an array"),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["lr", "pseudo_gt", "mask"])
def test_a_damaged_file(tmp_path: Path, name: str, damage: str) -> None:
    frozen(tmp_path)
    DAMAGES[damage](tmp_path / f"0001/{name}.npy")
    with pytest.raises(UsageError, match=r"is damaged .*; delete the run's folder and start anew") as caught:
        open_frozen(tmp_path)
    assert caught.value.subject == str(tmp_path / f"0001/{name}.npy")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["data", "nowhere"])
def test_no_images(tmp_path: Path, name: str) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(UsageError, match="holds no images; delete the run's folder and start anew"):
        open_frozen(tmp_path / name)
