"""A benchmark that needs no labels: which clean pairs are spoilt, and what is left to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from desra_core.benchmarking.benchmark import Stage
from desra_core.benchmarking.competition import compete, given_folders, hash_files, image_of, input_hashes
from desra_core.benchmarking.data_sets import read_pairs
from desra_core.benchmarking.entries import Contender
from desra_core.benchmarking.places import SIZES, STRENGTHS
from desra_core.benchmarking.synthetic import GRID, MIN_AREAS, Trial
from desra_core.benchmarking.synthetic_stage import Injecting, SyntheticSettings, read_trial, synthetic_stage
from desra_core.errors import ImageError, UsageError
from desra_core.files.hashing import fingerprint
from desra_core.settings.benchmark import Benchmarking
from desra_core.workspace import Workspace
from desra_core.workspace.manifest import ImageRef

# Raise it when a bit of a trial changes.
TRIAL_VERSION = 2


@dataclass(frozen=True)
class SyntheticBenchmark:
    """What is to be spoilt and judged; the attributes are those of `desra_core.benchmarking.benchmark.Benchmark`."""

    settings: Benchmarking
    contenders: tuple[Contender, ...]
    work: list[tuple[ImageRef, Injecting]]
    failures: list[ImageError]
    lossy: list[Path]
    weights: npt.NDArray[np.float64] | None
    stage: ClassVar[Stage] = staticmethod(synthetic_stage)

    @property
    def workspace(self) -> Workspace:
        """Where everything lies."""
        return Workspace(self.settings.output)

    @property
    def runs_networks(self) -> bool:
        """Whether class labels are computed."""
        return self.settings.segmenter != "none" and any("labels" in c.inputs for c in self.contenders)

    @property
    def key(self) -> str:
        """Identifies what is judged, by what."""
        return fingerprint([injecting.key for _, injecting in self.work])

    def missing(self) -> list[tuple[ImageRef, Injecting]]:
        """The images that have not been tried; those that would fail again are left out."""
        return [(image, injecting) for image, injecting in self.work if read_trial(self.workspace, injecting) is None]

    def trials(self) -> list[Trial]:
        """What was found of the images that are done."""
        return [found for found in self._found() if isinstance(found, Trial)]

    def failed(self) -> list[ImageError]:
        """Why images cannot be judged: those that lack files, and those whose files are at fault."""
        return self.failures + [found for found in self._found() if isinstance(found, ImageError)]

    def stage_settings(self, *, device: str, max_pixels: int) -> SyntheticSettings:
        """What the synthetic stage needs, on some machine."""
        settings = self.settings
        return SyntheticSettings(
            contenders=self.contenders,
            weights=self.weights,
            min_area=settings.min_area,
            segmenter=settings.segmenter,
            device=device,
            max_pixels=max_pixels,
            seed=settings.seed,
        )

    def _found(self) -> list[Trial | ImageError | None]:
        return [read_trial(self.workspace, injecting) for _, injecting in self.work]


def plan_synthetic(settings: Benchmarking) -> SyntheticBenchmark:
    """Find the pairs, and what each is to be judged by. Writes nothing.

    Raises
    ------
    UsageError
        A folder or a method cannot be used, or a setting is lacking or contradicts another.
    """
    folders = given_folders(settings)
    for role in ("mse_sr", "gan_sr"):
        if role not in folders:
            flag = f"--{role.replace('_', '-')}"
            raise UsageError(flag, "is not given", "desra benchmark synthetic needs --mse-sr and --gan-sr")
    if settings.min_area.endswith("%"):
        raise UsageError("--min-area", f"{settings.min_area} differs from image to image", "give pixels")
    pairs = read_pairs(folders, settings.output)
    competing, weights, segmentation = compete(settings, pairs)
    hashed, failures = hash_files(pairs.examples, competing, segmentation)
    work = []
    for example, files, _ in hashed:
        inputs = {c.name: input_hashes(c, files, segmentation) for c in competing}
        names = tuple(name for name, hashes in inputs.items() if hashes is not None)
        exclude = files.get("exclude")
        methods = [(c.key, c.entries, c.thresholds, inputs[c.name]) for c in competing if c.name in names]
        content = [files["mse_sr"].hash, files["gan_sr"].hash, exclude.hash if exclude else None]
        # Where artifacts are injected depends on the name.
        asked = (settings.min_area, settings.seed, STRENGTHS, SIZES, GRID, MIN_AREAS)
        key = fingerprint("trial", TRIAL_VERSION, example.name, content, methods, asked)
        work.append((image_of(example, files), Injecting(example.name, exclude, names, key)))
    return SyntheticBenchmark(
        settings=settings,
        contenders=tuple(competing),
        work=work,
        failures=pairs.failures + failures,
        lossy=[path for _, _, lossy in hashed for path in lossy],
        weights=weights.values if weights else None,
    )
