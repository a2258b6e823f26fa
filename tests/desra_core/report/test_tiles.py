"""Tiles: pictures that are decoded once, by threads that wait for each other, and forgotten."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from desra_core.images.codec import encode_png
from desra_core.report.pictures import StoredImage
from desra_core.report.tiles import Tile, TiledPictures


class Waiting:
    """A lock for which a thread waits while others do something, once."""

    def __init__(self, meanwhile: Callable[[], object]) -> None:
        self.meanwhile: Callable[[], object] | None = meanwhile

    def __enter__(self) -> None:
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile:
            meanwhile()

    def __exit__(self, *_: object) -> None:
        pass


def test_a_picture_may_go_while_a_thread_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("desra_core.report.tiles._BYTES", 0)  # one picture is kept
    images = []
    for name in ("first", "second"):
        path = tmp_path / f"{name}.png"
        path.write_bytes(encode_png(np.zeros((8, 9, 3), np.uint8)))
        images.append(StoredImage({"gan_sr": path}, tmp_path, (8, 9)))
    pictures = TiledPictures()

    def show(image: StoredImage) -> bytes:
        return pictures.tile(image, "gan_sr", Tile(0, 0, 0))

    first, second = images
    lock = Waiting(lambda: (show(first), show(second)))
    pictures._decoding[first.files["gan_sr"]] = lock  # type: ignore[assignment]
    assert show(first) == show(second) == show(first)
