"""What a finetune keeps in its folder, and how it gets there: whole or not at all.

::

    RUN/
      run.json            parents, training images and their hash, settings, versions: what makes the run this one
      data/0000/          lr, pseudo_gt and mask of each training image, as arrays
      state.pth           all that it takes to go on
      losses.json         means of the losses since the start
      progress.json       how far the run is
      models/iteration_000250.pth, .json   `params` and `params_ema`, and where they come from
      tensorboard/        scalars and pictures
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from desra_core.errors import LockedError, TransientError, UsageError
from desra_core.files.atomic import replace_file, storage_errors, sweep
from desra_core.files.hashing import LOAD_ERRORS
from desra_core.files.locks import locked


@dataclass(frozen=True)
class RunFolder:
    """The paths below the folder of one finetune."""

    root: Path

    @property
    def document(self) -> Path:
        """What makes the run this one (JSON)."""
        return self.root / "run.json"

    @property
    def data(self) -> Path:
        """Training images (folders of arrays)."""
        return self.root / "data"

    @property
    def state(self) -> Path:
        """All that it takes to go on."""
        return self.root / "state.pth"

    @property
    def losses(self) -> Path:
        """Means of the losses (JSON)."""
        return self.root / "losses.json"

    @property
    def progress(self) -> Path:
        """How far the run is (JSON)."""
        return self.root / "progress.json"

    @property
    def tensorboard(self) -> Path:
        """Event files."""
        return self.root / "tensorboard"

    def model(self, iteration: int) -> Path:
        """The model after so many iterations."""
        return self.root / "models" / f"iteration_{iteration:06d}.pth"

    def models(self) -> list[Path]:
        """All saved models, the oldest first."""
        return sorted((self.root / "models").glob("iteration_??????.pth"))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for one process.

        Raises
        ------
        LockedError
            Another process holds it.
        TransientError
            It cannot be written.
        """
        with contextlib.ExitStack() as stack:
            with storage_errors(self.root):
                self.root.mkdir(parents=True, exist_ok=True)
                other = stack.enter_context(locked(self.root / "lock"))
            if other is not None:
                raise LockedError(self.root, "is in use by another finetune", "wait until it has ended")
            for folder in (self.root, self.root / "models"):
                sweep(folder)
            yield


def write_json(path: Path, document: Any, *, durable: bool = False) -> None:
    """Write a JSON file whole (raises `TransientError`)."""
    replace_file(path, json.dumps(document, indent=2).encode(), durable=durable)


def read_json(path: Path) -> Any:
    """Read a JSON file; None where there is none to be read."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def save_torch(path: Path, content: dict[str, Any]) -> None:
    """Save tensors, whole and durably.

    Raises
    ------
    TransientError
        The disk is full or failed; what was there before is left.
    """
    import torch

    try:
        replace_file(path, lambda file: torch.save(content, file), durable=True)
    except RuntimeError as error:  # torch's writer where a write fails
        raise TransientError(path, "could not be written", "free some space, check the disk and run again") from error


def load_state(path: Path) -> dict[str, Any] | None:
    """The state that a run was left in, on the CPU; None where there is none.

    Raises
    ------
    UsageError
        It is damaged.
    """
    if not path.exists():
        return None
    import torch

    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except LOAD_ERRORS:
        raise UsageError(path, "is damaged", "delete it to start this finetune again") from None
    return state
