"""One function over many images, some of which come in several turns."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import cloudpickle
import pytest
from distributed import get_worker

from desra_core.errors import ImageError
from desra_core.settings import Machine
from desra_core.workspace.manifest import File, ImageRef
from tasks import judging as module
from tasks import progress as progress_module
from tasks.dask_cluster import open_dask
from tasks.judging import Steps, _in_two_steps, each_image

cloudpickle.register_pickle_by_value(sys.modules[__name__])


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


def judging(_: object, __: str) -> Steps:
    def judge(image: ImageRef, about: str) -> str:
        if image.id == "broken":
            raise ImageError(image.id, "is broken", "mend it")
        return f"{image.id} {about}"

    return Steps(judge)


def test_an_image_counts_once_when_all_its_turns_are_over(lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(module, "most_pixels", lambda files: asked.extend(files) or 0)
    work = [(image(name), turn) for turn in "12" for name in ("a", "broken", "b") if (name, turn) != ("b", "1")]
    machine = Machine(device="cpu")
    rounds = [("", work)]
    made = each_image("judge", judging, rounds, [image for image, _ in work], machine, networks=False, folder=Path())
    results = [result for _, result in made]
    assert [result for result in results if isinstance(result, str)] == ["a 1", "a 2", "b 2"]
    counts = [line.partition(" failed")[0].rpartition(" of 3 images, ") for line in lines]
    assert [(done, failed) for done, _, failed in counts] == [
        ("0", "0"), ("0", "1"), ("1", "1"), ("1", "1"), ("2", "1"), ("2", "1")
    ]  # fmt: skip
    assert lines[-1].endswith("0:00:00 left")
    assert sorted(asked) == [Path("a"), Path("b"), Path("broken")]


@pytest.mark.usefixtures("lines")
def test_a_round_is_asked_for_when_the_one_before_has_ended(capfd: pytest.CaptureFixture[str]) -> None:
    judged: list[str] = []

    def rounds() -> Iterator[tuple[str, list[tuple[ImageRef, str]]]]:
        yield "all", [(image("a"), "1"), (image("b"), "1")]
        assert judged == ["a 1", "b 1"]
        yield "the best", [(image("b"), "2")]

    for _, result in each_image("judge", judging, rounds(), [], Machine(device="cpu"), networks=False, folder=Path()):
        judged.append(result)
    assert judged == ["a 1", "b 1", "b 2"]
    told = capfd.readouterr().err
    assert told.index("all\n") < told.index("2 of 2 images") < told.index("the best\n") < told.index("1 of 1 images")


JUDGING = 0.5  # seconds


def with_networks(image: ImageRef, about: Path) -> None:
    if image.id == "broken":
        raise ImageError(image.id, "is broken", "mend it")
    (about / image.id).write_text(f"{get_worker().state.total_resources.get('GPU')} {time.monotonic()}")


def without(image: ImageRef, about: Path) -> tuple[float, str, float]:
    began = time.monotonic()
    time.sleep(JUDGING)
    resource, computed = (about / image.id).read_text().split()
    return began, resource, float(computed)


def test_a_gpu_goes_on_to_other_images_while_cpus_judge(tmp_path: Path) -> None:
    """The workers are real, the GPU is not; 3 workers with 5 threads take 6 images at a time."""
    work = [(image("broken" if index == 8 else f"photo{index:02d}"), tmp_path) for index in range(14)]
    with open_dask(Machine(workers=2, memory="1GB"), gpus=1, alone=True) as dask:
        step = lambda *given: with_networks(*given), lambda *given: without(*given)
        results = {image.id: result for image, result in _in_two_steps("judge", *step, {"GPU": 1}, work, dask)}
    assert isinstance(results.pop("broken"), ImageError)
    assert len(results) == 13
    moments = [results[f"photo{index:02d}"] for index in range(14) if index != 8]
    assert {resource for _, resource, _ in moments} == {"3.0"}
    assert all(computed < began for began, _, computed in moments)
    first, second, third = moments[:6], moments[6:11], moments[11:]
    assert min(moment[2] for moment in second) < max(moment[0] + JUDGING for moment in first), "beside the first batch"
    assert min(moment[2] for moment in third) > max(moment[2] for moment in second)
    assert min(moment[2] for moment in third) > min(moment[0] for moment in first), "not far ahead"
