"""A benchmark on a data set with a ground truth: which images, which contenders, and what is left to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from desra_core.benchmarking.competition import compete, given_folders, hash_files, image_of, input_hashes
from desra_core.benchmarking.data_sets import Example, read_data_set
from desra_core.benchmarking.entries import Contender
from desra_core.benchmarking.judged import Record, read_record
from desra_core.benchmarking.stage import BenchmarkSettings, Judging, benchmark_stage, mask_path, record_path
from desra_core.errors import ImageError, UsageError
from desra_core.files.hashing import fingerprint
from desra_core.settings.benchmark import Benchmarking
from desra_core.workspace import Workspace
from desra_core.workspace.manifest import File, ImageRef

# Raise it when a bit of a record changes.
JUDGED_VERSION = 2

Stage = Callable[..., None]


@dataclass(frozen=True)
class Benchmark:
    """What is to be judged.

    Attributes
    ----------
    contenders
        As the table lists them.
    work
        Every image that can be judged, with what it is judged by.
    failures
        Of images that cannot.
    unjudged
        GAN results without a ground truth.
    lossy
        Masks that are JPEG or lossy WebP.
    weights
        ``(150,)`` float64; None where no contender is weighted.
    """

    settings: Benchmarking
    contenders: tuple[Contender, ...]
    work: list[tuple[ImageRef, Judging]]
    failures: list[ImageError]
    unjudged: list[Path]
    lossy: list[Path]
    weights: npt.NDArray[np.float64] | None
    stage: ClassVar[Stage] = staticmethod(benchmark_stage)

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
        return fingerprint([[judging.part, judging.name, judging.keys] for _, judging in self.work])

    def missing(self) -> list[tuple[ImageRef, Judging]]:
        """The images that lack runs, with the contenders concerned; those that would fail again are left out."""
        found = []
        for image, judging in self.work:
            record = self._record(judging)
            if record and record.failure:
                continue
            runs = record.runs if record else {}
            lacking = tuple(
                contender.name
                for contender in self.contenders
                if contender.name in judging.keys
                and not (contender.name in runs and self._is_done(contender, judging, runs[contender.name].key))
            )
            if lacking:
                found.append((image, judging._replace(missing=lacking)))
        return found

    def records(self) -> list[Record]:
        """What the contenders found of the images that are done."""
        unfinished = {judging[:2] for _, judging in self.missing()}
        done = [judging for _, judging in self.work if judging[:2] not in unfinished]
        found = [(judging, record) for judging in done if (record := self._record(judging)) and not record.failure]
        return [replace(record, runs={name: record.runs[name] for name in judging.keys}) for judging, record in found]

    def failed(self) -> list[ImageError]:
        """Why images cannot be judged: those that lack files, and those whose files are at fault."""
        records = (self._record(judging) for _, judging in self.work)
        failed = [record.failure for record in records if record and record.failure]
        return self.failures + [ImageError(*told) for _, *told in failed]

    def stage_settings(self, *, device: str, max_pixels: int) -> BenchmarkSettings:
        """What the benchmark stage needs, on some machine."""
        settings = self.settings
        return BenchmarkSettings(
            contenders=self.contenders,
            weights=self.weights,
            min_area=settings.min_area,
            segmenter=settings.segmenter,
            device=device,
            max_pixels=max_pixels,
        )

    def _record(self, judging: Judging) -> Record | None:
        record = read_record(record_path(self.workspace, judging.part, judging.name))
        outdated = record is not None and record.failure is not None and record.failure[0] != judging.failure_key
        return replace(record, failure=None) if record and outdated else record

    def _is_done(self, contender: Contender, judging: Judging, key: str) -> bool:
        paths = (mask_path(self.workspace, entry, judging.part, judging.name) for entry in contender.entries)
        return key == judging.keys[contender.name] and all(path.is_file() for path in paths)


def plan_benchmark(settings: Benchmarking) -> Benchmark:
    """Read the data set and find out what each image is to be judged by. Writes nothing.

    Raises
    ------
    UsageError
        The data set or a method cannot be used, or a setting contradicts another.
    """
    if settings.exclude:
        raise UsageError("--exclude", "is for the synthetic benchmark", "leave it out")
    data_set = read_data_set(Path(settings.dataset), given_folders(settings), settings.output)
    competing, weights, segmentation = compete(settings, data_set)
    hashed, failures = hash_files(data_set.examples, competing, segmentation)
    work = [_judging(example, files, competing, segmentation, settings.min_area) for example, files, _ in hashed]
    return Benchmark(
        settings=settings,
        contenders=tuple(competing),
        work=work,
        failures=data_set.failures + failures,
        unjudged=data_set.unjudged,
        lossy=[path for _, _, lossy in hashed for path in lossy],
        weights=weights.values if weights else None,
    )


def _judging(
    example: Example, files: dict[str, File], competing: Sequence[Contender], segmentation: str | None, min_area: str
) -> tuple[ImageRef, Judging]:
    """An image and the keys of its runs."""
    truth = files.get("gt_mask") or example.coco_mask
    assert truth is not None
    judged = [
        files["mse_sr"].hash,
        files["gan_sr"].hash,
        truth.hash if isinstance(truth, File) else truth[:3],
        min_area,
    ]
    published = files.get("desra_mask")
    keys = {}
    for contender in competing:
        inputs = input_hashes(contender, files, segmentation)
        if inputs is not None:
            agreed = published.hash if published and contender.method == "desra" else None
            competition = (contender.key, contender.entries, contender.thresholds)
            keys[contender.name] = fingerprint("judged", JUDGED_VERSION, *competition, judged, inputs, agreed)
    return image_of(example, files), Judging(example.part, example.name, truth, published, keys, ())
