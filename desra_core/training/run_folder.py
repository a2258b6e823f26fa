"""The folder of a finetune: its files, which are written whole or not at all.

::

    RUN/
      run.json            parents, training images and their hash, settings, versions: the identity of the run
      data/0000/          lr, pseudo_gt and mask of each training image, as arrays
      state.pth           all that a killed run needs to go on
      losses.json         means of the losses since the start
      progress.json       the iterations done, and those asked for
      models/iteration_000250.pth, .json, .discriminator.pth   `params` and `params_ema`, their origin, discriminator
      tensorboard/        losses as scalars, and at each checkpoint pictures of the same patches
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from desra_core.errors import LockedError, TransientError, UsageError
from desra_core.files.content import replace_file, storage_errors, sweep
from desra_core.files.locks import locked
from desra_core.networks.checkpoints import LOAD_ERRORS

if TYPE_CHECKING:
    import torch

_PICTURES = 4


@dataclass
class RunFolder:
    """The paths below the folder of one finetune."""

    root: Path

    def __post_init__(self) -> None:
        self.document = self.root / "run.json"
        self.data = self.root / "data"
        self.state = self.root / "state.pth"
        self.losses = self.root / "losses.json"
        self.progress = self.root / "progress.json"
        self.tensorboard = self.root / "tensorboard"

    def model(self, iteration: int) -> Path:
        """Return the file of the model after some iterations."""
        return self.root / "models" / f"iteration_{iteration:06d}.pth"

    def models(self) -> list[Path]:
        """List all saved models, the oldest first."""
        return sorted((self.root / "models").glob("iteration_??????.pth"))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process, and delete the unfinished files of a killed one.

        Raises `LockedError` where another process holds the folder, `TransientError` where it cannot be written.
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

    def reached(self, iterations: int, patience: int) -> bool:
        """Check whether the model of the last iteration is saved, or the run stopped early."""
        progress = read_json(self.progress) or {}
        return self.model(iterations).exists() or progress.get("worse", 0) >= patience


def write_json(path: Path, document: Any, *, durable: bool = False) -> None:
    """Write a JSON file whole (raises `TransientError`)."""
    replace_file(path, json.dumps(document, indent=2).encode(), durable=durable)


def read_json(path: Path) -> Any:
    """Read a JSON file; None where it is missing or damaged."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def save_torch(path: Path, content: dict[str, Any]) -> None:
    """Save tensors durably; after a failure the file is as it was before (raises `TransientError`)."""
    import torch

    try:
        replace_file(path, lambda file: torch.save(content, file), durable=True)
    except RuntimeError as error:  # torch's writer where a write fails
        raise TransientError(path, "could not be written", "free some space, check the disk and run again") from error


def load_state(path: Path) -> dict[str, Any] | None:
    """Load the saved state of a run onto the CPU; None where there is no state (raises `UsageError`: damaged)."""
    if not path.exists():
        return None
    import torch

    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except LOAD_ERRORS:
        raise UsageError(path, "is damaged", "delete it to start this finetune again") from None
    return state


class Board:
    """Write a TensorBoard event file of a run; TensorBoard drops events of older files after the given iteration.

    The thread of torch's own writer dies and loses events when the disk is full. All methods here raise
    `TransientError` then.
    """

    def __init__(self, folder: Path, iteration: int) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog  # type: ignore[import-untyped]

        # TensorBoard reads the files of a run in the order of their names.
        self._path = folder / f"events.out.tfevents.{time.time_ns():020d}"
        self._add(0, file_version="brain.Event:2")
        self._add(iteration + 1, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, losses: dict[str, float], iteration: int) -> None:
        """Add the means of some losses."""
        from torch.utils.tensorboard import summary

        for name, value in losses.items():
            self._add(iteration, summary=summary.scalar(f"loss/{name}", value))  # type: ignore[no-untyped-call]

    def pictures(self, lr: torch.Tensor, sr: torch.Tensor, pseudo_gt: torch.Tensor, iteration: int) -> None:
        """Add rows of LR, result and pseudo-GT, ``(N, 3, h, w)`` or ``(N, 3, H, W)`` in 0..1."""
        import torch
        from torch.utils.tensorboard import summary

        enlarged = torch.nn.functional.interpolate(lr, size=pseudo_gt.shape[-2:], mode="nearest")
        rows = torch.cat([enlarged, sr.clamp(0, 1), pseudo_gt], dim=3)[:_PICTURES]
        panel = torch.cat(list(rows), dim=1).cpu()
        picture = summary.image("lr, result, pseudo-GT", panel, dataformats="CHW")  # type: ignore[no-untyped-call]
        self._add(iteration, summary=picture)

    def _add(self, iteration: int, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]

        event = Event(wall_time=time.time(), step=iteration, **content)
        with storage_errors(self._path.parent):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab") as file:
                RecordWriter(file).write(event.SerializeToString())
