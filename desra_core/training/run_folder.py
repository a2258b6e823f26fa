"""The folder of a finetune: its files, which are written whole or not at all, and the patches of its images.

The patches of a step depend on a seed and on the step alone, so that a run that goes on gets the same ones.

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
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from desra_core.detection.mask import assemble_pseudo_gt
from desra_core.errors import ImageError, LockedError, TransientError, UsageError
from desra_core.files.content import locked, read_bytes, replace_file, storage_errors, sweep
from desra_core.images.codec import Mask, Pixels, decode
from desra_core.networks.checkpoints import LOAD_ERRORS
from desra_core.settings.models import Training

if TYPE_CHECKING:
    import torch

Floats = npt.NDArray[np.float32]

_PICTURES = 4
# The U-Net discriminator halves a patch three times.
_DISCRIMINATOR_MULTIPLE = 8
_LEAST_LR_SIDE = 16
# If so many patches drawn from one image all have masked pixels, the last of them is taken.
_TRIES = 20
_ANEW = "delete the run's folder and start anew"


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


class Sample(NamedTuple):
    """The files of a training image.

    ``results`` is the file of the pseudo-GT, or those of MSE and GAN result, from which it is assembled. ``human`` is
    the content hash of the mask if that is a human mask, else None.
    """

    name: str
    id: str
    severity: float
    lr: Path
    mask: Path
    results: tuple[Path, ...]
    human: str | None = None


class TrainingPair(NamedTuple):
    """An image to train on, with ``(H, W) = (h * scale, w * scale)``.

    ``lr`` is ``(h, w, C)`` and ``pseudo_gt`` ``(H, W, C)``, uint8 or uint16; ``mask`` is ``(H, W)`` bool; ``marked``
    has the flat indices of the LR pixels with a masked SR pixel.
    """

    lr: Pixels
    pseudo_gt: Pixels
    mask: Mask
    marked: npt.NDArray[np.intp]


class Batch(NamedTuple):
    """Patches of one step, float32.

    ``lr`` is ``(N, 3, s, s)`` and ``pseudo_gt`` ``(N, 3, S, S)`` in 0..1, ``mask`` ``(N, 1, S, S)`` 0 or 1.
    """

    lr: Floats
    pseudo_gt: Floats
    mask: Floats


def read_sample(sample: Sample, scale: int) -> tuple[Pixels, Pixels, Mask]:
    """Read LR photo, pseudo-GT and mask of an image (raises `ImageError`: unreadable, or of sizes that do not fit)."""
    lr = decode(read_bytes(sample.lr), sample.lr).pixels
    mask: Mask = decode(read_bytes(sample.mask), sample.mask).pixels[:, :, 0] > 0
    results = [decode(read_bytes(file), file).pixels for file in sample.results]
    height, width = lr.shape[:2]
    for part in (mask, *results):
        if part.shape[:2] != (height * scale, width * scale):
            sizes = f"is {width}x{height} and its results are {part.shape[1]}x{part.shape[0]}"
            raise ImageError(sample.lr, f"{sizes}, but the model enlarges by {scale}",
                             "give the photos that the results were made from, and a model of their scale")  # fmt: skip
    if min(height, width) < least_side(scale):
        reason = f"is {width}x{height}, smaller than the smallest patch of {least_side(scale)} px"
        raise ImageError(sample.lr, reason, "it is left out")
    pseudo_gt = results[0] if len(results) == 1 else assemble_pseudo_gt(results[0], results[1], mask)
    return lr, pseudo_gt, mask


def least_side(scale: int) -> int:
    """Compute the smallest side of an LR photo to train on, in pixels."""
    return _floored(_LEAST_LR_SIDE + _step(scale) - 1, scale)


def freeze(folder: Path, images: tuple[Pixels, Pixels, Mask]) -> None:
    """Write an image as arrays, of which patches can be read without the rest (raises `TransientError`)."""
    for name, array in zip(("lr", "pseudo_gt", "mask"), images, strict=True):
        replace_file(folder / f"{name}.npy", lambda file, array=array: np.save(file, array))  # type: ignore[misc]


def open_frozen(folder: Path) -> list[TrainingPair]:
    """Open the images that `freeze` wrote to the subfolders of a folder, by name (raises `UsageError`)."""
    pairs = []
    for part in sorted(folder.glob("*/")):
        try:
            lr, pseudo_gt, mask = (np.load(part / f"{name}.npy", mmap_mode="r") for name in ("lr", "pseudo_gt", "mask"))
            scale = mask.shape[0] // lr.shape[0]
            cells = mask.reshape(lr.shape[0], scale, lr.shape[1], scale).any(axis=(1, 3))
        except (EOFError, OSError, ValueError) as error:
            raise UsageError(part, f"is damaged ({error})", _ANEW) from None
        pairs.append(TrainingPair(lr, pseudo_gt, mask, np.flatnonzero(cells)))
    if not pairs:
        raise UsageError(folder, "holds no images", _ANEW)
    return pairs


def draw_batch(pairs: Sequence[TrainingPair], training: Training, scale: int, seed: Sequence[int]) -> Batch:
    """Cut out the patches of a step: aligned, each mirrored left to right or not.

    Args:
        pairs: The images, each drawn with the same probability.
        training: With the number of patches (``batch``), their side in SR pixels (``patch``), which is lowered to the
            smallest image of the batch and to a multiple of 8 and of ``scale``, and the probability that a patch
            overlaps a mask (``mask_share``). Other patches overlap none, where such a place is found.
        scale: SR pixels per LR pixel and side.
        seed: The same seed gives the same patches.
    """
    rng = np.random.default_rng(list(seed))
    chosen = [pairs[index] for index in rng.integers(len(pairs), size=training.batch)]
    smallest = min(min(pair.lr.shape[:2]) for pair in chosen)
    side = _floored(min(max(training.patch // scale, _step(scale)), smallest), scale)
    cuts = []
    for pair in chosen:
        top, left = _place(pair, side, scale, rng, marked=rng.random() < training.mask_share)
        sr = (slice(top * scale, (top + side) * scale), slice(left * scale, (left + side) * scale))
        parts = pair.lr[top : top + side, left : left + side], pair.pseudo_gt[sr], pair.mask[sr]
        step = -1 if rng.random() < 0.5 else 1
        cuts.append([part[:, ::step] for part in parts])
    lr, pseudo_gt, mask = zip(*cuts, strict=True)
    return Batch(_colour(lr), _colour(pseudo_gt), np.stack(mask)[:, np.newaxis].astype(np.float32))


def _place(pair: TrainingPair, side: int, scale: int, rng: np.random.Generator, *, marked: bool) -> tuple[int, int]:
    """Draw the top and left of a patch, in LR pixels."""
    height, width = pair.lr.shape[:2]
    if marked and pair.marked.size:
        row, column = divmod(int(rng.choice(pair.marked)), width)
        top = rng.integers(max(0, row - side + 1), min(row, height - side) + 1)
        left = rng.integers(max(0, column - side + 1), min(column, width - side) + 1)
        return int(top), int(left)
    for _ in range(_TRIES):
        top, left = (int(rng.integers(extent - side + 1)) for extent in (height, width))
        if not pair.mask[top * scale : (top + side) * scale, left * scale : (left + side) * scale].any():
            break
    return top, left


def _colour(patches: Sequence[Pixels]) -> Floats:
    """Stack ``(s, s, C)`` pixels to ``(N, 3, s, s)`` float32 in 0..1."""
    values = [patch.astype(np.float32) / np.float32(np.iinfo(patch.dtype).max) for patch in patches]
    stacked = np.stack([np.broadcast_to(value, (*value.shape[:2], 3)) for value in values])
    return np.ascontiguousarray(stacked.transpose(0, 3, 1, 2))


def _step(scale: int) -> int:
    """Compute the least number of LR pixels that gives a multiple of 8 SR pixels, as the discriminator needs."""
    return _DISCRIMINATOR_MULTIPLE // math.gcd(_DISCRIMINATOR_MULTIPLE, scale)


def _floored(side: int, scale: int) -> int:
    return side // _step(scale) * _step(scale)


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
