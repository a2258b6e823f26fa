"""The patches of a finetune: cut from the training images, which are frozen as arrays in the folder of the run.

The patches of a step depend on a seed and on the step alone, so that a run that goes on gets the same ones.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from desra_core.detection.mask import assemble_pseudo_gt
from desra_core.errors import ImageError, UsageError
from desra_core.files import (
    file_checksum,
    paths_in,
    read_checked,
    read_document,
    replace_file,
    storage_errors,
    write_json,
)
from desra_core.images.codec import Mask, Pixels, decode
from desra_core.settings.models import Training

Floats = npt.NDArray[np.float32]

# The U-Net discriminator halves a patch three times.
_DISCRIMINATOR_MULTIPLE = 8
_LEAST_LR_SIDE = 16
# If this many patches drawn from one image all have masked pixels, the last patch is taken.
_TRIES = 20
_CHECKSUMS = "checksums.json"
_ANEW = "delete the run's folder and start anew"


class Sample(NamedTuple):
    """The files of a training image.

    ``results`` is the file of the pseudo-GT, or the files of mse_sr and gan_sr, from which it is assembled. ``human``
    is the content hash of a human mask, and None for a mask of the detector. ``checksums`` are those of the files that
    runs have written, as far as they are known.
    """

    name: str
    id: str
    severity: float
    lr: Path
    mask: Path
    results: tuple[Path, ...]
    human: str | None = None
    checksums: Mapping[Path, str | None] = {}


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
    files = [sample.lr, sample.mask, *sample.results]
    lr, marked, *results = (decode(read_checked(path, sample.checksums.get(path)), path).pixels for path in files)
    mask: Mask = marked[:, :, 0] > 0
    height, width = lr.shape[:2]
    for part in (mask, *results):
        if part.shape[:2] != (height * scale, width * scale):
            sizes = f"is {width}x{height} and its results are {part.shape[1]}x{part.shape[0]}"
            raise ImageError(sample.lr, f"{sizes}, but the model enlarges by {scale}",
                             "give the photos that the results were made from, and a model of their scale")  # fmt: skip
    if min(height, width) < least_side(scale):
        reason = f"is {width}x{height}, smaller than the smallest patch of {least_side(scale)} px"
        raise ImageError(sample.lr, reason, "finetune on larger photos")
    pseudo_gt = results[0] if len(results) == 1 else assemble_pseudo_gt(results[0], results[1], mask)
    return lr, pseudo_gt, mask


def least_side(scale: int) -> int:
    """Compute the smallest side of an LR photo to train on, in pixels."""
    return _floored(_LEAST_LR_SIDE + _step(scale) - 1, scale)


def freeze(folder: Path, images: tuple[Pixels, Pixels, Mask]) -> None:
    """Write an image as arrays, of which patches can be read without the rest (raises `TransientError`)."""
    for name, array in zip(("lr", "pseudo_gt", "mask"), images, strict=True):
        replace_file(folder / f"{name}.npy", lambda file, array=array: np.save(file, array))  # type: ignore[misc]


def seal_frozen(data: Path) -> None:
    """Write the checksums of all frozen arrays of a run, so that `check_frozen` knows damaged ones."""
    with storage_errors(data):
        found = {str(path.relative_to(data)): file_checksum(path) for path in sorted(data.rglob("*.npy"))}
    write_json(data / _CHECKSUMS, found)


def check_frozen(data: Path) -> None:
    """Check that the frozen arrays of a run are as they were written (raises `UsageError`)."""
    for name, expected in read_document(data / _CHECKSUMS).items():
        found = None
        with contextlib.suppress(OSError):
            found = file_checksum(data / name)
        if found != expected:
            reason = "is damaged or missing: it is not as it was written"
            raise UsageError(data / name, reason, f"delete {data}, and run again: the images are frozen anew")


def open_frozen(folder: Path) -> list[TrainingPair]:
    """Open the images that `freeze` wrote to the subfolders of a folder, sorted by subfolder (raises `UsageError`)."""
    pairs = []
    for part in paths_in(folder, "[0-9]*"):
        lr, pseudo_gt, mask = (open_array(part / f"{name}.npy") for name in ("lr", "pseudo_gt", "mask"))
        try:
            scale = mask.shape[0] // lr.shape[0]
            cells = mask.reshape(lr.shape[0], scale, lr.shape[1], scale).any(axis=(1, 3))
        except (ArithmeticError, LookupError, ValueError) as error:
            raise UsageError(part, f"is damaged ({error})", _ANEW) from None
        pairs.append(TrainingPair(lr, pseudo_gt, mask, np.flatnonzero(cells)))
    if not pairs:
        raise UsageError(folder, "holds no images", _ANEW)
    return pairs


def open_array(path: Path) -> npt.NDArray[Any]:
    """Open the array in a file, of which parts can be read without the rest (raises `UsageError`)."""
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except (EOFError, OSError, ValueError) as error:
        raise UsageError(path, f"is damaged ({error})", _ANEW) from None


def draw_batch(pairs: Sequence[TrainingPair], training: Training, scale: int, seed: Sequence[int]) -> Batch:
    """Cut out the patches of a step: LR, pseudo-GT and mask of the same place, mirrored left to right or not.

    Args:
        pairs: The images, each drawn with the same probability.
        training: ``batch`` is the number of patches. ``patch`` is their side in SR pixels; it is lowered to the
            smallest image of the batch and to a multiple of 8 and of ``scale``. ``mask_share`` is the probability that
            a patch overlaps a mask; the other patches overlap none, where such a place is found.
        scale: The side of an LR pixel in SR pixels.
        seed: The same seed gives the same patches.
    """
    rng = np.random.default_rng(list(seed))
    chosen = [pairs[index] for index in rng.integers(len(pairs), size=training.batch)]
    smallest = min(min(pair.lr.shape[:2]) for pair in chosen)
    side = _floored(min(max(training.patch // scale, _step(scale)), smallest), scale)
    cuts = []
    for pair in chosen:
        height, width = pair.lr.shape[:2]
        if rng.random() < training.mask_share and pair.marked.size:
            row, column = divmod(int(rng.choice(pair.marked)), width)
            top = int(rng.integers(max(0, row - side + 1), min(row, height - side) + 1))
            left = int(rng.integers(max(0, column - side + 1), min(column, width - side) + 1))
        else:
            for _ in range(_TRIES):
                top, left = (int(rng.integers(extent - side + 1)) for extent in (height, width))
                if not pair.mask[top * scale : (top + side) * scale, left * scale : (left + side) * scale].any():
                    break
        sr = (slice(top * scale, (top + side) * scale), slice(left * scale, (left + side) * scale))
        parts = pair.lr[top : top + side, left : left + side], pair.pseudo_gt[sr], pair.mask[sr]
        step = -1 if rng.random() < 0.5 else 1
        cuts.append([part[:, ::step] for part in parts])
    lr, pseudo_gt, mask = zip(*cuts, strict=True)
    return Batch(_colour(lr), _colour(pseudo_gt), np.stack(mask)[:, np.newaxis].astype(np.float32))


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
