"""A detector that a TOML file describes: DISTS and LPIPS, whose weights are the user's, or any network in a file.

An image is scored in overlapping patches of one size, whose scores are averaged where they overlap.
"""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, field_validator, model_validator

from desra_core.errors import UsageError, described
from desra_core.files import content_key, read_input
from desra_core.images.codec import Labels, Pixels, eight_bits
from desra_core.images.parts import Rectangle

_FORMAT = "write it as docs/how-to/detector.md shows"
_BATCH = 8

Batch = npt.NDArray[np.float32]
# Scores two batches of patches ``(N, 3, side, side)`` in 0..1, of the MSE and of the GAN results.
ScorePatches = Callable[[Batch, Batch], npt.NDArray[Any]]


class Patches(NamedTuple):
    """Side and stride of the patches, in pixels; the last of a row or column ends at the image's border."""

    side: int
    stride: int

    def starts(self, length: int) -> list[int]:
        """Return where patches start along a dimension that is at least as long as a patch."""
        last = length - self.side
        return sorted({*range(0, last + 1, self.stride), last})


class Description(BaseModel):
    """The content of the TOML file."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    patches: ClassVar[dict[str, Patches]] = {"dists": Patches(64, 32), "lpips": Patches(256, 192)}

    kind: Literal["dists", "lpips", "network"]
    file: Path  # weights of VGG16 or AlexNet, or a network in TorchScript or ONNX
    threshold: float = Field(allow_inf_nan=False)
    # The other members are for networks.
    input: Literal["gan_sr", "pair"] = "gan_sr"  # one argument, or the MSE and the GAN result as two
    side: int = Field(512, ge=16, le=4096)  # of the patches, which overlap by a quarter
    mean: tuple[FiniteFloat, FiniteFloat, FiniteFloat] = (0.0, 0.0, 0.0)
    std: tuple[FiniteFloat, FiniteFloat, FiniteFloat] = (1.0, 1.0, 1.0)
    channel: int = Field(0, ge=0)  # which channel of the output has the scores

    @model_validator(mode="after")
    def _used(self) -> Self:
        others = self.model_fields_set - {"kind", "file", "threshold"}
        if self.kind != "network" and others:
            raise ValueError(f"{min(others)} is for networks")
        return self

    @field_validator("std")
    @classmethod
    def _divides(cls, std: tuple[float, ...]) -> tuple[float, ...]:
        if not all(std):
            raise ValueError("divides by 0")
        return std


def read_description(path: Path) -> Description:
    """Read a description; its ``file`` is relative to the description's folder.

    Raises:
        UsageError: The file cannot be read, is no TOML, or does not describe a detector.
    """
    try:
        description = Description.model_validate(tomllib.loads(read_input(path).decode()))
    except OSError as error:
        raise UsageError(path, f"cannot be read ({error.strerror})", "mend the file or its name") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(path, f"is no TOML file ({error})", _FORMAT) from None
    except ValidationError as error:
        wrong = error.errors()[0]
        place = ".".join(map(str, wrong["loc"]))
        reason = f"has a wrong {place} ({wrong['msg']})" if place else f"describes no detector ({wrong['msg']})"
        raise UsageError(path, reason, _FORMAT) from None
    return description.model_copy(update={"file": path.absolute().parent / description.file})


def load_described(path: Path) -> DescribedDetector:
    """Load the detector that a file describes (raises `UsageError`)."""
    description = read_description(path)
    return _kept(description, content_key(description.file))


class DescribedDetector:
    """Scores a pair by patches; an image that is smaller than a patch is extended by its border pixels."""

    smallest: ClassVar[int] = 1
    inputs: ClassVar[tuple[str, ...]] = ()

    def __init__(self, threshold: float, patches: Patches, score: ScorePatches) -> None:
        self.threshold = threshold
        self._patches, self._score = patches, score

    def __call__(
        self, mse_sr: Pixels, gan_sr: Pixels, _lr: Pixels | None = None, _labels: Labels | None = None, /
    ) -> npt.NDArray[np.float32]:
        """Score a pair; there is no frame."""
        side = self._patches.side
        height, width = gan_sr.shape[:2]
        rows, columns = max(height, side), max(width, side)
        extended = [
            np.pad(eight_bits(image), [(0, rows - height), (0, columns - width), (0, 0)], mode="edge")
            for image in (mse_sr, gan_sr)
        ]
        total, count = np.zeros((rows, columns), np.float32), np.zeros((rows, columns), np.float32)
        places = list(itertools.product(self._patches.starts(rows), self._patches.starts(columns)))
        for first in range(0, len(places), _BATCH):
            parts = [Rectangle(y, x, side, side).slices for y, x in places[first : first + _BATCH]]
            scores = np.asarray(self._score(*(_batch(image, parts) for image in extended)), np.float32)
            for part, score in zip(parts, scores, strict=True):
                total[part] += score
                count[part] += 1
        return np.asarray((total / count)[:height, :width])


def _batch(image: Pixels, parts: list[tuple[slice, slice]]) -> Batch:
    values = np.stack([np.broadcast_to(image[part], (*image[part].shape[:2], 3)) for part in parts])
    return np.asarray(values.transpose(0, 3, 1, 2) / np.float32(255), np.float32, order="C")


@lru_cache(maxsize=2)
def _kept(description: Description, _key: str) -> DescribedDetector:
    """Load what a description names, once per process and content."""
    kind = description.kind
    score = {"dists": _dists, "lpips": _lpips, "network": _network}[kind](description)
    patches = Description.patches.get(kind, Patches(description.side, description.side * 3 // 4))
    return DescribedDetector(description.threshold, patches, score)


def _dists(description: Description) -> ScorePatches:
    import torch

    from desra_core.networks.perceptual import load_dists

    model = load_dists(description.file)

    def score(mse_sr: Batch, gan_sr: Batch) -> npt.NDArray[Any]:
        distances = model(torch.from_numpy(mse_sr), torch.from_numpy(gan_sr))
        return distances.reshape(-1, 1, 1).numpy()  # type: ignore[no-any-return]

    return score


def _lpips(description: Description) -> ScorePatches:
    import torch

    from desra_core.networks.perceptual import load_lpips

    model = load_lpips(description.file, spatial=True)

    def score(mse_sr: Batch, gan_sr: Batch) -> npt.NDArray[Any]:
        with torch.inference_mode():
            distances = model(torch.from_numpy(mse_sr), torch.from_numpy(gan_sr), normalize=True)
        return distances[:, 0].numpy()  # type: ignore[no-any-return]

    return score


def _network(description: Description) -> ScorePatches:
    """Load a network, and try it on a patch (raises `UsageError`)."""
    import cv2
    import torch

    path, side = description.file, description.side
    if path.suffix == ".onnx":
        from desra_core.networks.openvino import read_onnx

        run = read_onnx(path)
    else:
        run = _read_torchscript(path)
    mean, std = (np.array(values, np.float32).reshape(3, 1, 1) for values in (description.mean, description.std))

    def score_patch(*patches: Batch) -> npt.NDArray[Any]:
        with torch.inference_mode():
            scores = np.asarray(run(*((values[None] - mean) / std for values in patches)))
        if scores.ndim == 4 and scores.shape[1] > description.channel:
            scores = scores[:, description.channel]
        if scores.ndim != 3 or len(scores) != 1 or scores.dtype.kind not in "fiub":
            reason = f"returns {scores.dtype} of the shape {scores.shape} for a picture of (1, 3, {side}, {side})"
            raise UsageError(path, reason, "give a network that returns (1, C, h, w) or (1, h, w), C above channel")
        return np.asarray(cv2.resize(scores[0].astype(np.float32), (side, side), interpolation=cv2.INTER_LINEAR))

    def score(mse_sr: Batch, gan_sr: Batch) -> npt.NDArray[Any]:
        pairs = zip(mse_sr, gan_sr, strict=True) if description.input == "pair" else ((one,) for one in gan_sr)
        return np.stack([score_patch(*patches) for patches in pairs])

    trial = np.full((1, 3, side, side), 0.5, np.float32)
    try:
        score(trial, trial)
    except UsageError:
        raise
    except Exception as error:  # noqa: BLE001 a network may raise anything
        reason = f"cannot be run on a picture of (1, 3, {side}, {side}) ({described(error)})"
        raise UsageError(path, reason, "check the file, and side and input of its description") from None
    return score


def _read_torchscript(path: Path) -> Callable[..., Any]:
    import torch

    try:
        network = torch.jit.load(str(path), map_location="cpu").eval()  # type: ignore[no-untyped-call]
    except Exception as error:  # noqa: BLE001 the file may hold anything
        reason = f"is no network in TorchScript ({described(error)})"
        raise UsageError(path, reason, "save it by torch.jit.save, or as .onnx") from None
    return lambda *arrays: network(*map(torch.from_numpy, arrays)).numpy()
