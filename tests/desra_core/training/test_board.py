"""The event files of a run, also of a killed one, as TensorBoard itself reads them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from desra_core.errors import TransientError
from desra_core.training.loop import Board

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def read(folder: Path):
    found = accumulator.EventAccumulator(str(folder), size_guidance={accumulator.SCALARS: 0, accumulator.IMAGES: 0})
    return found.Reload()


def steps(folder: Path, name: str = "loss/pixel") -> list[int]:
    return [event.step for event in read(folder).Scalars(name)]


def test_scalars(tmp_path: Path) -> None:
    board = Board(tmp_path / "board", 0)
    for iteration in (10, 20):
        board.scalars({"pixel": iteration / 40, "gan": 2.0}, iteration)
    found = read(tmp_path / "board")
    assert found.Tags()["scalars"] == ["loss/pixel", "loss/gan"]
    assert [(event.step, event.value) for event in found.Scalars("loss/pixel")] == [(10, 0.25), (20, 0.5)]
    assert [event.value for event in found.Scalars("loss/gan")] == [2, 2]


def test_pictures_show_patches_in_rows(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 256, (6, 3, side, side), np.uint8) for side in (8, 32, 32)]
    lr, sr, pseudo_gt = (torch.from_numpy(part / np.float32(255)) for part in pixels)
    sr[0, 0, 0, 0], sr[0, 0, 0, 1] = 1.5, -0.5
    pixels[1][0, 0, 0, :2] = 255, 0
    Board(tmp_path, 0).pictures(lr, sr, pseudo_gt, 250)
    found = read(tmp_path)
    (tag,) = found.Tags()["images"]
    (event,) = found.Images(tag)
    assert event.step == 250
    panel = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
    assert panel.shape == (4 * 32, 3 * 32, 3)
    for row in range(4):
        enlarged = np.kron(pixels[0][row], np.ones((1, 4, 4), int))
        expected = np.concatenate([enlarged, pixels[1][row], pixels[2][row]], axis=2).transpose(1, 2, 0)
        assert np.abs(panel[32 * row : 32 * (row + 1)].astype(int) - expected).max() <= 1


def test_events_are_there_at_once(tmp_path: Path) -> None:
    board = Board(tmp_path, 0)
    board.scalars({"pixel": 1.0}, 10)
    assert steps(tmp_path) == [10]
    board.scalars({"pixel": 1.0}, 20)
    assert steps(tmp_path) == [10, 20]


@pytest.mark.parametrize("cut", [0, 1, 20])
def test_a_killed_run_goes_on_without_repeating_itself(tmp_path: Path, cut: int) -> None:
    """A killed run has written events of steps that its state does not hold, and perhaps half an event."""
    first = Board(tmp_path, 0)
    for iteration in (10, 20, 30, 40):
        first.scalars({"pixel": 1.0}, iteration)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[: -cut or None])
    second = Board(tmp_path, 20)
    second.scalars({"pixel": 2.0}, 30)
    third = Board(tmp_path, 30)
    third.scalars({"pixel": 3.0}, 40)
    assert [(event.step, event.value) for event in read(tmp_path).Scalars("loss/pixel")] == [
        (10, 1), (20, 1), (30, 2), (40, 3),
    ]  # fmt: skip


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(TransientError, match="cannot be written"):
        Board(tmp_path / "file" / "board", 0)
