"""One function over many images, some of which come in several turns."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest

from desra_core.errors import ImageError
from desra_core.settings import Machine
from desra_core.workspace.manifest import File, ImageRef
from tasks import judging as module
from tasks import progress as progress_module
from tasks.judging import each_image


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines of the UI after each turn; the cluster is this process, and there is no Prefect server."""
    shown: list[str] = []
    monkeypatch.setattr(progress_module, "create_progress_artifact", lambda *_, **__: uuid4())
    monkeypatch.setattr(progress_module, "update_progress_artifact", lambda _, share, line: shown.append(line))

    def here(
        _: str, function: Callable[[ImageRef, Any], Any], __: dict[str, float], work: list[tuple[ImageRef, Any]]
    ) -> Iterator[tuple[ImageRef, Any]]:
        for image, about in work:
            try:
                yield image, function(image, about)
            except ImageError as error:
                yield image, error

    @contextlib.contextmanager
    def opened(*_: object, most_pixels: Callable[[], int], **__: object) -> Iterator[SimpleNamespace]:
        most_pixels()
        yield SimpleNamespace(gpus=0, map=here)

    monkeypatch.setattr(module, "open_dask", opened)
    return shown


def image(name: str) -> ImageRef:
    """An image with two names: it has a copy."""
    return ImageRef(name, 0, (name, f"copy of {name}"), None, File(Path(name), ""), None, None)


def judging(_: object, __: str) -> Callable[[ImageRef, str], str]:
    def judge(image: ImageRef, about: str) -> str:
        if image.id == "broken":
            raise ImageError(image.id, "is broken", "mend it")
        return f"{image.id} {about}"

    return judge


def test_an_image_counts_once_when_all_its_turns_are_over(lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(module, "most_pixels", lambda files: asked.extend(files) or 0)
    work = [(image(name), turn) for turn in "12" for name in ("a", "broken", "b") if (name, turn) != ("b", "1")]
    machine = Machine(device="cpu")
    made = each_image("judge", judging, work, machine, networks=False, folder=Path())
    results = [result for _, result in made]
    assert [result for result in results if isinstance(result, str)] == ["a 1", "a 2", "b 2"]
    counts = [line.partition(" failed")[0].rpartition(" of 3 images, ") for line in lines]
    assert [(done, failed) for done, _, failed in counts] == [
        ("0", "0"), ("0", "1"), ("1", "1"), ("1", "1"), ("2", "1"), ("2", "1")
    ]  # fmt: skip
    assert lines[-1].endswith("0:00:00 left")
    assert sorted(asked) == [Path("a"), Path("b"), Path("broken")]
