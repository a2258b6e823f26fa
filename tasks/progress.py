"""Show how far a run is: a bar for a terminal, plain lines for a log file, an artifact for the Prefect UI."""

from __future__ import annotations

import math
import threading
import time
from concurrent.futures import wait
from datetime import timedelta
from functools import cache
from typing import Any, cast
from uuid import UUID

import httpx
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.futures import PrefectConcurrentFuture, PrefectFuture
from prefect.settings import get_current_settings
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, Task, TaskID, TaskProgressColumn, TextColumn

from desra_core.errors import DesraError, ImageError, TransientError, may_pass, printable
from tasks.logs import LINE_SECONDS, SHOWN_FAILURES, is_json, say

_REFRESH_SECONDS = 1.0
# The pause before the next call of a server that does not answer, since a call by Prefect's client takes a minute.
_SILENT_SECONDS = 60.0


@cache
def _usual_retries() -> int:
    """Return the number of retries that Prefect's client is set to, before `RunProgress` changes it."""
    return get_current_settings().client.max_retries


def _left(task: Task) -> str | None:
    """Return the time until a task of rich is done, such as ``0:00:29``; None before its first step."""
    return None if task.time_remaining is None else str(timedelta(seconds=task.time_remaining))


class RunProgress:
    """Count images as they pass their stages, and show the counts. The threads of several shards may call this.

    Args:
        verb: Name of the run, such as ``mine``.
        images: Number of images to compute.
        stages: Number of stages of each image.
        unit: Plural noun for the things that are counted.
    """

    def __init__(self, verb: str, images: int, stages: int, unit: str = "images") -> None:
        self._unit = unit
        self._note = ""
        self._images = images
        self._steps = images * stages
        self._steps_done = self._finished = self._failed = self._failure_lines = 0
        self._worth_a_retry: list[TransientError] = []
        self._lock = threading.Lock()
        self._last_line = time.monotonic()
        self._console = Console(stderr=True, soft_wrap=True, highlight=False)
        self._drawn = self._console.is_terminal and not is_json()
        self._bar = Progress(
            TextColumn(verb),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.description}"),
            console=self._console,
            disable=not self._drawn,
            get_time=time.monotonic,
            speed_estimate_period=math.inf,
        )
        self._task = self._bar.add_task("", total=self._steps)
        self._bar.advance(self._task, 0)  # the speed is measured from now on
        self._preparing: TaskID | None = None
        self._artifact = cast(UUID, create_progress_artifact(0.0, key="progress", description=self.line()))
        self._silent_until = 0.0
        _usual_retries()  # caches the setting before `show` changes it

    def __enter__(self) -> RunProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.show(final=True)
        self._bar.stop()

    def passed(self, steps: int, *, finished: int = 0) -> None:
        """Add steps (each takes an image through one stage) and the number of images that have passed all stages."""
        with self._lock:
            self._finished += finished
            self._step(steps)

    def _step(self, count: int) -> None:
        self._steps_done += count
        self._bar.update(self._task, completed=self._steps_done)

    def reached(self, count: int, note: str) -> None:
        """Set the number of things that have passed their only stage; the speed is measured from the first call."""
        with self._lock:
            if not self._finished or count < self._finished:
                self._bar.reset(self._task, completed=count)
                self._bar.advance(self._task, 0)
            self._bar.update(self._task, completed=count)
            self._steps_done = self._finished = count
            self._note = note

    def preparing(self, what: str, done: int, total: int) -> None:
        """Show the steps done of a preparation, before the first step that counts."""
        with self._lock:
            if self._preparing is None:
                self._preparing = self._bar.add_task("", total=total, completed=done, visible=False)
                self._bar.advance(self._preparing, 0)
            self._bar.update(self._preparing, completed=done)
            left = _left(self._bar.tasks[self._preparing])
            self._note = f"{what} {done} of {total} steps" + (f", {left} of that left" if left else "")

    def failed(self, error: DesraError, names: int, stages_left: int) -> None:
        """Count an image as failed, once for each of its names.

        ``stages_left`` are the stages that count as passed now, the failed one included.
        """
        with self._lock:
            self._failed += names
            if isinstance(error, TransientError) and may_pass(error):
                self._worth_a_retry.append(error)
            self._step(names * stages_left)
            self._failure_lines += 1
            lines = self._failure_lines
        if lines <= SHOWN_FAILURES:
            self._print(f"failed: {printable(error)}", style="red")
        elif lines == SHOWN_FAILURES + 1:
            self._print("more failures: see desra status --failures", style="red")

    def warn(self, line: str) -> None:
        """Print a warning, above the bar where there is one."""
        self._print(f"warning: {line}", style="yellow")

    @property
    def failures(self) -> tuple[int, list[TransientError]]:
        """Return the number of failed images, and the errors of those worth a retry."""
        with self._lock:
            return self._failed, list(self._worth_a_retry)

    def follow(self, shards: list[PrefectFuture[Any]]) -> tuple[str, ...]:
        """Show the progress until all shards have ended; return the error of each shard that could not finish."""
        # Prefect's own wait() sets an alarm, which a signal at the wrong moment leaves to go off later.
        waiting = {cast(PrefectConcurrentFuture[Any], shard).wrapped_future for shard in shards}
        while waiting:
            waiting = wait(waiting, timeout=_REFRESH_SECONDS).not_done
            self.show()
        results = [shard.result(raise_on_failure=False) for shard in shards]
        return tuple(printable(result) for result in results if isinstance(result, BaseException))

    def ended(self, result: object) -> bool:
        """Count an image whose only stage has ended, and show it; returns whether its result is an error."""
        if isinstance(result, ImageError):
            self.failed(result, 1, 1)
        else:
            self.passed(1, finished=1)
        self.show()
        return isinstance(result, ImageError)

    def show(self, *, final: bool = False) -> None:
        """Refresh the bar and the artifact, and now and then print a line where there is no terminal.

        The work goes on where the server does not answer.
        """
        line = self.line()
        self._bar.update(self._task, description=line)
        now = time.monotonic()
        if now >= self._silent_until:
            client = get_current_settings().client
            try:
                update_progress_artifact(self._artifact, 100.0 * self._share(), line)
                client.max_retries = _usual_retries()
            except httpx.HTTPError:
                self._silent_until = time.monotonic() + _SILENT_SECONDS
                client.max_retries = 0  # so that no other call of this run waits a minute for the server
                self._print("warning: the Prefect server does not answer; the work goes on")
        if not self._drawn and (final or now - self._last_line >= LINE_SECONDS):
            self._last_line = now
            self._print(line)

    def _print(self, line: str, style: str | None = None) -> None:
        """Print a line, above the bar where there is one."""
        if self._drawn:
            self._console.print(escape(line), style=style)
        else:
            say(line)

    def line(self) -> str:
        """Return the progress: ``812 of 2000 images, 3 failed, 41.2 images/s, 0:00:29 left``."""
        parts = [f"{self._finished} of {self._images} {self._unit}"]
        parts += [f"{self._failed} failed"] if self._unit == "images" else []
        parts += [self._note] if self._note else []
        if self._images < self._steps and 0 < self._steps_done < self._steps:
            parts.append(f"{self._share():.0%} of the work")  # images count as done only after the last stage
        task = self._bar.tasks[self._task]
        if task.speed:
            rate = task.speed / self._steps * self._images
            parts.append(f"{rate:.1f} {self._unit}/s" if rate >= 1 else f"{1 / rate:.1f} s per {self._unit[:-1]}")
            parts.append(f"{_left(task)} left")
        return ", ".join(parts)

    def _share(self) -> float:
        return self._steps_done / self._steps if self._steps else 1.0
