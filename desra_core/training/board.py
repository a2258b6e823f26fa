"""TensorBoard: losses as scalars, and at each checkpoint the same patches as pictures."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import torch
from torch import nn
from torch.nn import functional

_PICTURES = 4


class Board:
    """Event files of a run; what was written after the state it goes on from is purged."""

    def __init__(self, folder: Path, iteration: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=iteration + 1)

    def __enter__(self) -> Board:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

    def scalars(self, losses: dict[str, float], iteration: int) -> None:
        """Add the means of some losses."""
        for name, value in losses.items():
            self._writer.add_scalar(f"loss/{name}", value, iteration)

    def pictures(self, network: nn.Module, batch: list[torch.Tensor], iteration: int) -> None:
        """Add rows of LR, result and pseudo-GT."""
        lr, pseudo_gt = batch[0][:_PICTURES], batch[1][:_PICTURES]
        network.eval()
        with torch.no_grad():
            sr = network(lr).float().clamp(0, 1)
        network.train()
        enlarged = functional.interpolate(lr, size=pseudo_gt.shape[-2:], mode="nearest")
        rows = torch.cat([enlarged, sr, pseudo_gt], dim=3)
        panel = torch.cat(list(rows), dim=1)
        self._writer.add_image("lr, result, pseudo-GT", panel, iteration)
