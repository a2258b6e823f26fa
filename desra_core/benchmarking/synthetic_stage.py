"""Synthetic benchmark: what each contender finds of the artifacts that are injected into a clean pair."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from desra_core.benchmarking.stage import BenchmarkSettings, one_thread, read_pair
from desra_core.benchmarking.synthetic import Trial, trial
from desra_core.errors import ImageError, TransientError
from desra_core.evaluation.mask_files import FRAME, decode_mask, on_valid_region
from desra_core.images.codec import Mask
from desra_core.stages.sources import read_content
from desra_core.workspace import Workspace
from desra_core.workspace.manifest import File, ImageRef


class Injecting(NamedTuple):
    """A pair to be spoilt: its name, the mask of what is wrong with it already, its contenders and its key."""

    name: str
    exclude: File | None
    contenders: tuple[str, ...]
    key: str


@dataclass(frozen=True)
class SyntheticSettings(BenchmarkSettings):
    """What the synthetic stage needs beside what the benchmark stage does."""

    seed: int


def trial_path(workspace: Workspace, name: str) -> Path:
    """Where what was found of an image lies."""
    return workspace.root / "trials" / f"{name}.json"


def synthetic_stage(image: ImageRef, injecting: Injecting, workspace: Workspace, settings: SyntheticSettings) -> None:
    """Spoil a pair, run the contenders, and publish what they found.

    Raises
    ------
    ImageError
        The image cannot be judged; unless it is a `TransientError`, its file tells so too.
    """
    path = trial_path(workspace, injecting.name)
    try:
        made = _trial(image, injecting, settings)
    except TransientError:
        raise
    except ImageError as error:
        document = {"key": injecting.key, "failure": [error.subject, error.reason, error.remedy]}
        workspace.publish(path, json.dumps(document).encode())
        raise
    workspace.publish(path, json.dumps({"key": injecting.key, "trial": made.to_json()}).encode())


def read_trial(workspace: Workspace, injecting: Injecting) -> Trial | ImageError | None:
    """What was found of an image, or why it failed; None where it has not been tried so."""
    try:
        document = json.loads(trial_path(workspace, injecting.name).read_bytes())
        if document["key"] != injecting.key:
            return None
        return ImageError(*document["failure"]) if "failure" in document else Trial.from_json(document["trial"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _trial(image: ImageRef, injecting: Injecting, settings: SyntheticSettings) -> Trial:
    pair = read_pair(image, injecting.contenders, settings)
    competing = [contender for contender in settings.contenders if contender.name in injecting.contenders]
    with one_thread():
        return trial(
            injecting.name,
            pair.mse_sr,
            pair.gan_sr,
            {contender.name: contender.detector(settings.weights) for contender in competing},
            lr=pair.lr,
            labels=pair.labels,
            exclude=_whole_mask(injecting.exclude, pair.shape) if injecting.exclude else None,
            seed=settings.seed,
            min_area=int(settings.min_area),
        )


def _whole_mask(file: File, shape: tuple[int, int]) -> Mask:
    """``(H, W)``, with an empty frame where the file has none."""
    mask = decode_mask(read_content(file), file.path)
    valid = on_valid_region(mask, shape, file.path)
    return mask if mask.shape == shape else np.pad(valid, FRAME)
