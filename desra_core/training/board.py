"""TensorBoard: losses as scalars, and at each checkpoint the same patches as pictures."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from desra_core.files.atomic import storage_errors

_PICTURES = 4


class Board:
    """An event file of a run; what others hold beyond the state that it goes on from is purged.

    Not torch's own writer, whose thread dies with events that it has not written, and noisily of a full disk.

    Raises
    ------
    TransientError
        From all methods: the disk is full or failed.
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
        """Add rows of LR, result and pseudo-GT."""
        from torch.utils.tensorboard import summary

        enlarged = functional.interpolate(lr, size=pseudo_gt.shape[-2:], mode="nearest")
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
