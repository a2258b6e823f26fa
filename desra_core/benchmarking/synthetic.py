"""The benchmark without ground truth: artifacts are injected into clean pairs. Its jobs, and their files on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from pydantic import TypeAdapter

from desra_core.benchmarking.benchmark import Benchmark, DecodedPair, Job, StageSettings, given_folders, plan_benchmark
from desra_core.benchmarking.data_sets import Example, read_pairs
from desra_core.benchmarking.methods import Method
from desra_core.benchmarking.places import SIZES, STRENGTHS
from desra_core.benchmarking.trial import GRID, MIN_AREAS, Design, Trial, run_trial
from desra_core.errors import Failure, ImageError, UsageError
from desra_core.evaluation.mask_files import FRAME, decode_mask, on_valid_region
from desra_core.files.hashing import fingerprint
from desra_core.settings.models import Benchmarking
from desra_core.stages.sources import read_content
from desra_core.workspace import Workspace
from desra_core.workspace.manifest import File

# Raise it when a bit of a trial changes.
TRIAL_VERSION = 2


@dataclass(frozen=True)
class TrialRecord:
    """The file of an image: its trial, or why it failed."""

    key: str
    trial: Trial | None = None
    failure: Failure | None = None


_RECORD = TypeAdapter(TrialRecord)


@dataclass(frozen=True)
class SyntheticJob(Job):
    """A pair to inject artifacts into; ``exclude`` is the mask of those that it has already."""

    exclude: File | None
    key: str

    def path(self, workspace: Workspace) -> Path:  # noqa: D102
        return workspace.root / "trials" / f"{self.name}.json"

    def result(self, workspace: Workspace) -> Trial | ImageError | None:
        """Read the trial or the failure; None where there is none of this key."""
        try:
            record = _RECORD.validate_json(self.path(workspace).read_bytes())
        except (OSError, ValueError):
            return None
        if record.key != self.key:
            return None
        return ImageError(*record.failure) if record.failure else record.trial

    def left(self, workspace: Workspace, methods: Sequence[Method]) -> Self | None:  # noqa: ARG002, D102
        return self if self.result(workspace) is None else None

    def failure(self, workspace: Workspace) -> ImageError | None:  # noqa: D102
        result = self.result(workspace)
        return result if isinstance(result, ImageError) else None

    def judge(self, pair: DecodedPair, workspace: Workspace, settings: StageSettings) -> bytes:  # noqa: ARG002, D102
        detectors = {m.name: m.detector(settings.weights) for m in settings.methods if m.name in self.missing}
        exclude = None
        if self.exclude:
            mask = decode_mask(read_content(self.exclude), self.exclude.path)
            valid = on_valid_region(mask, pair.shape, self.exclude.path)
            exclude = mask if mask.shape == pair.shape else np.pad(valid, FRAME)
        asked = settings.benchmarking
        design = Design(seed=asked.seed, min_area=int(asked.min_area))
        trial = run_trial(self.name, pair.inputs, detectors, design, exclude)
        return _RECORD.dump_json(TrialRecord(self.key, trial), exclude_none=True)

    def failed(self, error: ImageError, workspace: Workspace) -> bytes:  # noqa: ARG002, D102
        return _RECORD.dump_json(TrialRecord(self.key, failure=error.failure), exclude_none=True)


def plan_synthetic(settings: Benchmarking) -> Benchmark[SyntheticJob]:
    """Find the pairs and list what each is to be judged by. Writes nothing.

    Raises `UsageError`: a folder or a method cannot be used, or a setting is lacking or contradicts another.
    """
    folders = given_folders(settings)
    for role in ("mse_sr", "gan_sr"):
        if role not in folders:
            flag = f"--{role.replace('_', '-')}"
            raise UsageError(flag, "is not given", "desra benchmark synthetic needs --mse-sr and --gan-sr")
    if settings.min_area.endswith("%"):
        raise UsageError("--min-area", f"{settings.min_area} differs from image to image", "give pixels")
    return plan_benchmark(settings, read_pairs(folders, settings.output), _job)


def read_trials(benchmark: Benchmark[SyntheticJob]) -> list[Trial]:
    """Read the trials of the images that are done."""
    results = [job.result(benchmark.workspace) for _, job in benchmark.work]
    return [result for result in results if isinstance(result, Trial)]


def _job(
    settings: Benchmarking, example: Example, files: dict[str, File], inputs: dict[Method, list[str]]
) -> SyntheticJob:
    exclude = files.get("exclude")
    methods = [(method.key, method.points, method.thresholds, hashes) for method, hashes in inputs.items()]
    content = [files["mse_sr"].hash, files["gan_sr"].hash, exclude.hash if exclude else None]
    # Where artifacts are injected depends on the name.
    asked = (settings.min_area, settings.seed, STRENGTHS, SIZES, GRID, MIN_AREAS)
    key = fingerprint("trial", TRIAL_VERSION, example.name, content, methods, asked)
    return SyntheticJob(example.part, example.name, tuple(method.name for method in inputs), exclude, key)
