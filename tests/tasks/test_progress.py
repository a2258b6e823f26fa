"""Progress of a run: bar, lines and artifact."""

from __future__ import annotations

from uuid import uuid4

import httpx
import pytest
from prefect.settings import get_current_settings

from desra_core.errors import ImageError, TransientError
from tasks import progress as module
from tasks.progress import RunProgress


class Clock:
    """A clock that a test moves."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Time by hand, and no Prefect server."""
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(module, "create_progress_artifact", lambda *_, **__: uuid4())
    monkeypatch.setattr(module, "update_progress_artifact", lambda *_: None)
    return clock


def test_iterations(clock: Clock) -> None:
    progress = RunProgress("train", 1000, 1, unit="iterations")
    assert progress.line() == "0 of 1000 iterations"
    progress.preparing("discriminator warmed up", 3, 200)
    assert progress.line() == "0 of 1000 iterations, discriminator warmed up 3 of 200 steps"
    clock.now += 60  # of which training took nothing
    progress.preparing("discriminator warmed up", 33, 200)
    told = "0 of 1000 iterations, discriminator warmed up 33 of 200 steps, 0:05:34 of that left"
    assert progress.line() == told
    progress.reached(0, "")
    clock.now += 1
    progress.reached(10, "pixel loss 0.0123")
    assert progress.line() == "10 of 1000 iterations, pixel loss 0.0123"
    clock.now += 10
    progress.reached(30, "pixel loss 0.0100")
    assert progress.line() == "30 of 1000 iterations, pixel loss 0.0100, 2.0 iterations/s, 0:08:05 left"
    clock.now += 10
    progress.reached(1000, "")
    assert progress.line() == "1000 of 1000 iterations, 49.5 iterations/s, 0:00:00 left"


def test_images_are_done_at_the_end_of_their_last_stage(clock: Clock) -> None:
    progress = RunProgress("mine", 100, 2)
    assert progress.line() == "0 of 100 images, 0 failed"
    clock.now += 10
    progress.passed(50)
    assert progress.line() == "0 of 100 images, 0 failed, 25% of the work, 2.5 images/s, 0:00:30 left"
    full = TransientError("/ws", "the disk is full", "free some space")
    for error in (full, ImageError("a.png", "is empty", "remove it")):
        progress.failed(error, 1, 2)
    assert progress.failures == (2, [full])
    progress.passed(48)
    progress.passed(98, finished=98)
    assert progress.line() == "98 of 100 images, 2 failed, 10.0 images/s, 0:00:00 left"


def test_a_resumed_run_shows_the_speed_of_its_new_steps(clock: Clock) -> None:
    progress = RunProgress("train", 1000, 1, unit="iterations")
    clock.now += 30
    progress.reached(900, "")
    assert progress.line() == "900 of 1000 iterations"
    clock.now += 100
    progress.reached(950, "")
    assert progress.line() == "950 of 1000 iterations, 2.0 s per iteration, 0:01:40 left"


def test_a_retry_goes_back(clock: Clock) -> None:
    """To its last saved state, which is behind the progress that it had shown."""
    progress = RunProgress("train", 100, 1, unit="iterations")
    progress.reached(50, "")
    clock.now += 10
    progress.reached(40, "")
    assert progress.line() == "40 of 100 iterations"


def test_images(clock: Clock) -> None:
    progress = RunProgress("judge", 6, 1)
    clock.now += 12
    progress.passed(1, finished=1)
    assert progress.line() == "1 of 6 images, 0 failed, 12.0 s per image, 0:01:00 left"


@pytest.mark.parametrize("stages", [1, 2])
def test_the_time_left_does_not_climb_for_lack_of_an_image(clock: Clock, stages: int) -> None:
    """Nor does the speed fall; no time is shown before the first image, however long it takes."""
    progress = RunProgress("mine", 5, stages)
    clock.now += 40
    assert "left" not in progress.line()
    clock.now += 20
    progress.passed(stages, finished=stages)
    seen = []
    for _ in range(120):
        seen.append(progress.line().rpartition(", ")[2])
        clock.now += 1
    assert set(seen) == {"0:04:00 left"}
    assert "60.0 s per image" in progress.line()
    progress.passed(stages, finished=stages)  # the second one took two minutes
    assert progress.line().endswith("90.0 s per image, 0:04:30 left")


def test_the_time_left_of_a_finetune_whose_steps_are_slow(clock: Clock) -> None:
    progress = RunProgress("train", 4, 1, unit="iterations")
    progress.reached(1, "")
    clock.now += 30
    progress.reached(2, "")
    seen = []
    for _ in range(100):
        progress.reached(2, "")
        seen.append(progress.line().rpartition(", ")[2])
        clock.now += 1
    assert seen[0] == "0:01:00 left"
    assert seen == sorted(seen, reverse=True)
    progress.reached(1, "")  # a retry goes on from its last saved state
    assert progress.line() == "1 of 4 iterations"
    clock.now += 10
    progress.reached(2, "")
    assert progress.line().endswith("0:00:20 left")


def test_a_server_that_is_silent_is_waited_for_once(clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """By Prefect's client, for a minute; until it answers again, nothing else waits as long."""

    def refuse(*_: object) -> None:
        raise httpx.ConnectError("refused")

    client = get_current_settings().client
    patience = client.max_retries
    assert patience > 1
    progress = RunProgress("mine", 6, 1)
    answers = module.update_progress_artifact
    monkeypatch.setattr(module, "update_progress_artifact", refuse)
    for _ in range(2):
        progress.show()
        clock.now += 1
    assert capsys.readouterr().err.count("warning: the Prefect server does not answer; the work goes on\n") == 1
    assert client.max_retries == 0
    progress = RunProgress("detect", 6, 1)  # the next stage begins meanwhile
    monkeypatch.setattr(module, "update_progress_artifact", answers)
    clock.now += 60
    progress.show()
    assert client.max_retries == patience
