"""What a run says of how far it is."""

from __future__ import annotations

from uuid import uuid4

import pytest

from tasks import progress as module
from tasks.progress import RunProgress


class Clock:
    """Seconds that pass when they are told to."""

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
    progress.reached(0, "discriminator warmed up 3 of 200 steps")
    assert progress.line() == "0 of 1000 iterations, discriminator warmed up 3 of 200 steps"
    clock.now += 60  # of which training took nothing
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


def test_a_run_that_goes_on_has_the_speed_of_what_is_new(clock: Clock) -> None:
    progress = RunProgress("train", 1000, 1, unit="iterations")
    clock.now += 30
    progress.reached(900, "")
    assert progress.line() == "900 of 1000 iterations"
    clock.now += 100
    progress.reached(950, "")
    assert progress.line() == "950 of 1000 iterations, 2.0 s per iteration, 0:01:40 left"


def test_a_retry_goes_back(clock: Clock) -> None:
    """To its last saved state, which is behind what it had told."""
    progress = RunProgress("train", 100, 1, unit="iterations")
    progress.reached(50, "")
    clock.now += 10
    progress.reached(40, "")
    assert progress.line() == "40 of 100 iterations"


def test_images(clock: Clock) -> None:
    progress = RunProgress("judge", 6, 1)
    clock.now += 12
    progress.passed(1, last=True)
    assert progress.line() == "1 of 6 images, 0 failed, 12.0 s per image, 0:01:00 left"
