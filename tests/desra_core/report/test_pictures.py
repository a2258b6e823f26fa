"""Crops: every pixel comes from its place, and each missing file is an error."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from desra_core.detection.mask import Components
from desra_core.errors import ImageError
from desra_core.images.codec import encode_mask, encode_png
from desra_core.images.parts import window_around
from desra_core.report.pictures import OUTLINE, Crops, StoredImage
from desra_core.workspace import Workspace
from desra_core.workspace.arrays import write_array

RNG = np.random.default_rng(5)
SHAPE = (300, 400)
BOX = (200, 120, 60, 50)
MSE_SR = RNG.integers(0, 256, (*SHAPE, 3), dtype=np.uint8)
GAN_SR = RNG.integers(0, 256, (*SHAPE, 3), dtype=np.uint8)
SIMILARITY = RNG.uniform(0.1, 1, (290, 390)).astype(np.float32)
WINDOW = window_around(*BOX, SHAPE)


def mask() -> np.ndarray:
    marked = np.zeros(SHAPE, np.bool_)
    marked[120:170, 200:260] = True
    marked[100:104, 150:160] = True
    return marked


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    contents = {"mse_sr": encode_png(MSE_SR), "gan_sr": encode_png(GAN_SR), "mask": encode_mask(mask())}
    for kind, content in contents.items():
        (tmp_path / f"{kind}.png").write_bytes(content)
    return {kind: tmp_path / f"{kind}.png" for kind in contents}


@pytest.fixture
def similarity(tmp_path: Path) -> Path:
    workspace = Workspace(tmp_path / "ws")
    write_array(workspace, "ab" * 16, "similarity", SIMILARITY, key="key")
    return workspace.group("ab" * 16) / "similarity"


@pytest.fixture
def crops(files: dict[str, Path], similarity: Path) -> Crops:
    return crops_of(files, similarity)


def crops_of(
    files: dict[str, Path], similarity: Path, shape: tuple[int, int] = SHAPE, box: tuple[int, int, int, int] = BOX
) -> Crops:
    return Crops(StoredImage(files, similarity.parent, shape), box)


def cut(image: np.ndarray) -> np.ndarray:
    return image[WINDOW.slices]


@given(
    st.integers(1, 5000).flatmap(lambda side: st.tuples(st.just(side), st.integers(0, side - 1))),
    st.integers(1, 5000).flatmap(lambda side: st.tuples(st.just(side), st.integers(0, side - 1))),
    st.integers(1, 5000),
    st.integers(1, 5000),
)
def test_a_window_holds_its_region_and_lies_in_the_image(
    rows: tuple[int, int], columns: tuple[int, int], width: int, height: int
) -> None:
    shape, x, y = (rows[0], columns[0]), columns[1], rows[1]
    width, height = min(width, shape[1] - x), min(height, shape[0] - y)
    window = window_around(x, y, width, height, shape)
    assert 0 <= window.x <= x
    assert x + width <= window.x + window.width <= shape[1]
    assert 0 <= window.y <= y
    assert y + height <= window.y + window.height <= shape[0]


def test_results_and_their_composition(crops: Crops) -> None:
    assert np.array_equal(crops.make("mse_sr"), cut(MSE_SR))
    assert np.array_equal(crops.make("gan_sr"), cut(GAN_SR))
    assert np.array_equal(crops.make("pseudo_gt"), cut(np.where(mask()[..., None], MSE_SR, GAN_SR)))


def test_a_stored_pseudo_gt_is_shown_as_it_is(files: dict[str, Path], similarity: Path) -> None:
    files["pseudo_gt"] = files["mse_sr"]
    assert np.array_equal(crops_of(files, similarity).make("pseudo_gt"), cut(MSE_SR))


def test_a_region_is_brighter_than_its_neighbours(crops: Crops) -> None:
    overlay, gan_sr = crops.make("mask"), cut(GAN_SR)
    marked = cut(mask())
    assert np.array_equal(overlay[~marked], gan_sr[~marked])
    assert tuple(overlay[120 - WINDOW.y, 220 - WINDOW.x]) == OUTLINE
    neighbour = (100 - WINDOW.y, 155 - WINDOW.x)
    assert tuple(overlay[neighbour]) not in (OUTLINE, tuple(gan_sr[neighbour]))


def test_a_region_unlike_the_table_tints_all_of_the_mask(files: dict[str, Path], similarity: Path) -> None:
    overlay = crops_of(files, similarity, box=(201, 120, 58, 50)).make("mask")
    assert (overlay == OUTLINE).all(axis=2).sum() > 2 * (60 + 50) - 4


@pytest.mark.parametrize("scale", [4, 3.7])
def test_lr_pixels_lie_under_the_result(files: dict[str, Path], similarity: Path, tmp_path: Path, scale: float) -> None:
    low = RNG.integers(0, 256, (round(SHAPE[0] / scale), round(SHAPE[1] / scale), 3), dtype=np.uint8)
    (tmp_path / "lr.png").write_bytes(encode_png(low))
    crop = crops_of(files | {"lr": tmp_path / "lr.png"}, similarity).make("lr")
    assert crop.shape == (WINDOW.height, WINDOW.width, 3)
    for y, x in RNG.integers(0, 192, (50, 2)):
        row = (WINDOW.y + y) * low.shape[0] // SHAPE[0]
        column = (WINDOW.x + x) * low.shape[1] // SHAPE[1]
        assert np.array_equal(crop[y, x], low[row, column])


def test_the_difference_map_lies_at_the_place_of_d(files: dict[str, Path], similarity: Path) -> None:
    values = np.full(SIMILARITY.shape, 1.0, np.float32)
    values[20, 30] = 0.1
    shutil.rmtree(similarity)
    write_array(Workspace(similarity.parents[3]), "ab" * 16, "similarity", values, key="key")
    crop = crops_of(files, similarity, box=(0, 0, 50, 50)).make("difference")
    brightest = np.unravel_index(crop.sum(axis=2, dtype=int)[5:, 5:].argmax(), (187, 187))
    assert brightest == (20, 30)
    assert (crop[:5] == 128).all()
    assert (crop[:, :5] == 128).all()


def test_large_regions_are_scaled_down(tmp_path: Path, similarity: Path) -> None:
    wide = np.zeros((900, 3000, 3), np.uint8)
    marked = np.zeros(wide.shape[:2], np.bool_)
    marked[100:800, 50:2900] = True
    for kind in ("mse_sr", "gan_sr"):
        (tmp_path / f"{kind}.png").write_bytes(encode_png(wide))
    (tmp_path / "mask.png").write_bytes(encode_mask(marked))
    files = {kind: tmp_path / f"{kind}.png" for kind in ("mse_sr", "gan_sr", "mask")}
    crops = crops_of(files, similarity, (900, 3000), (50, 100, 2850, 700))
    assert {crops.make(kind).shape for kind in ("mse_sr", "gan_sr", "mask", "pseudo_gt")} == {(120, 400, 3)}
    assert (crops.make("mask") == OUTLINE).all(axis=2).sum() > 600  # the line is not scaled away


@pytest.mark.parametrize("kind", ["lr", "difference", "mask", "pseudo_gt", "gan_sr"])
def test_a_missing_file_is_an_error(tmp_path: Path, kind: str) -> None:
    files = {role: tmp_path / f"{role}.png" for role in ("mse_sr", "gan_sr", "mask")}
    with pytest.raises(ImageError, match=r"no such file|none of this name|not kept"):
        crops_of(files, tmp_path / "none").make(kind)


def test_a_damaged_map_is_not_shown_and_not_mended(crops: Crops, similarity: Path) -> None:
    chunk = next(path for path in (similarity / "c").rglob("*") if path.is_file())
    content = bytearray(chunk.read_bytes())
    chunk.unlink()
    with pytest.raises(ImageError, match="D: is damaged"):
        crops.make("difference")
    content[len(content) // 3 : len(content) // 2] = b"\xff" * (len(content) // 2 - len(content) // 3)
    chunk.write_bytes(content)
    with pytest.raises(ImageError, match="D: is damaged"):
        crops.make("difference")
    (similarity / "zarr.json").write_text("{}")
    with pytest.raises(ImageError, match="D: is damaged"):
        crops.make("difference")
    assert chunk.read_bytes() == content


def test_a_map_of_another_size_is_not_shown(files: dict[str, Path], similarity: Path) -> None:
    with pytest.raises(ImageError, match="another size"):
        crops_of(files, similarity, (300, 401)).make("difference")


@given(st.integers(0, 10**6), st.floats(0.05, 0.6))
def test_no_two_regions_of_a_mask_have_one_box(seed: int, share: float) -> None:
    mask = np.random.default_rng(seed).random((60, 70)) < share
    boxes = Components(mask).boxes.tolist()
    assert len(boxes) == len(set(map(tuple, boxes)))
