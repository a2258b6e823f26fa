"""Trains a model once undisturbed and once killed again and again. For a process of its own, which forks.

It takes JSON: the folder of the whole run, that of the killed one, the model and the settings. It prints JSON: the
steps (warmed up, iterations) that were saved whenever the run was killed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

# Imported before forking, so that no child takes time for them.
import tensorboard.summary.writer.record_writer  # type: ignore[import-untyped]  # noqa: F401
import torch
import torch._dynamo
import torch.utils.tensorboard

from desra_core.settings.models import Training, Twinning
from desra_core.third_party import mend_basicsr, mend_torchvision
from desra_core.training import loop
from desra_core.training.plan import RunFolder

mend_torchvision()
mend_basicsr()

import basicsr.archs.discriminator_arch  # noqa: E402, F401
import spandrel  # noqa: E402, F401


def start(run: RunFolder, model: Path, settings: Training | Twinning, save_seconds: float) -> int:
    """Train in a fork; returns its process id. This process never computes itself, so that forks can."""
    pid = os.fork()
    if pid:
        return pid
    loop.SAVE_SECONDS, loop.PROGRESS_SECONDS = save_seconds, 0.02
    status = 1
    try:
        if isinstance(settings, Twinning):
            loop.finetune(run, model, settings.training, "cpu", 1, settings)
        else:
            loop.finetune(run, model, settings, "cpu", 1)
        status = 0
    finally:
        if status:
            traceback.print_exc()
        os._exit(status)


def saved(run: RunFolder) -> int | None:
    """Identify the state that is saved now."""
    return run.state.stat().st_ino if run.state.exists() else None


def kill_again_and_again(run: RunFolder, model: Path, settings: Training | Twinning) -> list[tuple[int, int]]:
    """Kill a finetune a while after some saves, until one ends by itself; returns what was saved each time."""
    moments: list[tuple[int, int]] = []
    while True:
        # The first two times after one save, the first as soon as it is there: quick as a step is, some are left.
        save_seconds, saves = (0.0, 1) if len(moments) < 2 else (random.choice([0, 0.02]), random.randint(1, 3))
        delay = random.expovariate(100) if moments else 0.0
        before, pid = saved(run), start(run, model, settings, save_seconds)
        ended = (0, 0)
        for _ in range(saves):
            while saved(run) == before and not ended[0]:
                ended = os.waitpid(pid, os.WNOHANG)
                time.sleep(0.002)
            before = saved(run)
        if not ended[0]:
            time.sleep(delay)
            os.kill(pid, signal.SIGKILL)
            ended = os.waitpid(pid, 0)
        if os.WIFEXITED(ended[1]):
            assert ended[1] == 0
            return moments
        state = torch.load(run.state, weights_only=True)
        moments.append((state["warmed"], state["iteration"]))


def main(whole: str, killed: str, model: str, values: dict[str, Any]) -> list[tuple[int, int]]:
    """Run both; returns the steps that were saved at each kill."""
    random.seed(0)
    settings = Twinning(**values) if "photos" in values else Training(**values)
    assert os.waitpid(start(RunFolder(Path(whole)), Path(model), settings, 60), 0)[1] == 0
    return kill_again_and_again(RunFolder(Path(killed)), Path(model), settings)


if __name__ == "__main__":
    print(json.dumps(main(*json.loads(sys.argv[1]))))
