"""Benchmark: what each contender finds of a pair, held against the ground truth."""

from __future__ import annotations

import contextlib
import itertools
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from desra_core.benchmarking.entries import Contender, Entry
from desra_core.benchmarking.judged import Record, Run, curve_of, encode_record, read_record, sameness
from desra_core.detection.detectors import DetectorInputs, Scores, score_pair
from desra_core.detection.mask import score_mask, valid
from desra_core.errors import ImageError, TransientError
from desra_core.evaluation.coco_masks import CocoMask, decode_coco_mask
from desra_core.evaluation.mask_files import FRAME, decode_mask, on_valid_region
from desra_core.evaluation.metrics import compare_masks
from desra_core.files.hashing import fingerprint
from desra_core.images.codec import Labels, Mask, Pixels, encode_mask
from desra_core.networks.segmentation import load_segmenter
from desra_core.settings import min_area_pixels
from desra_core.stages.sources import read_content, read_label_file, read_photo
from desra_core.workspace import Workspace
from desra_core.workspace.manifest import File, ImageRef


class Judging(NamedTuple):
    """What an image is judged by: the keys of its runs by contender, and those that are missing."""

    part: str
    name: str
    ground_truth: File | CocoMask
    published: File | None
    keys: dict[str, str]
    missing: tuple[str, ...]

    @property
    def failure_key(self) -> str:
        """Identifies all that a failure depends on."""
        return fingerprint(self.keys)


@dataclass(frozen=True)
class BenchmarkSettings:
    """What the benchmark stage needs; ``weights`` is ``(150,)`` float64, or None where no contender is weighted."""

    contenders: tuple[Contender, ...]
    weights: npt.NDArray[np.float64] | None
    min_area: str
    segmenter: str
    device: str
    max_pixels: int


@dataclass(frozen=True)
class Pair:
    """A decoded pair, with what else contenders may need; ``seconds`` are those of the labels."""

    path: Path
    mse_sr: Pixels
    gan_sr: Pixels
    lr: Pixels | None
    labels: Labels | None
    seconds: float | None

    @property
    def shape(self) -> tuple[int, int]:
        """``(H, W)``."""
        return self.gan_sr.shape[0], self.gan_sr.shape[1]


def record_path(workspace: Workspace, part: str, name: str) -> Path:
    """Where the record of an image lies."""
    return workspace.root / "records" / part / f"{name}.json"


def mask_path(workspace: Workspace, entry: Entry, part: str, name: str) -> Path:
    """Where the mask of an image lies."""
    return workspace.root / "masks" / entry.folder / part / f"{name}.png"


def benchmark_stage(image: ImageRef, judging: Judging, workspace: Workspace, settings: BenchmarkSettings) -> None:
    """Run the contenders that are missing; publish their masks, and then the record of the image.

    Raises
    ------
    ImageError
        The image cannot be judged; unless it is a `TransientError`, the record tells so too.
    """
    path = record_path(workspace, judging.part, judging.name)
    record = read_record(path)
    # Runs that are out of date stay: their keys tell, and those of methods that nobody asks for now may serve again.
    kept = record.runs if record else {}
    try:
        pair = read_pair(image, judging.missing, settings)
        with one_thread():
            runs = _runs(pair, judging, workspace, settings)
    except TransientError:
        raise
    except ImageError as error:
        failed = record or Record(judging.part, judging.name, 0, 0, None, {})
        told = (judging.failure_key, error.subject, error.reason, error.remedy)
        workspace.publish(path, encode_record(replace(failed, failure=told)))
        raise
    seconds = pair.seconds if pair.seconds is not None else record.labels_seconds if record and kept else None
    made = Record(judging.part, judging.name, *pair.shape, seconds, kept | runs)
    workspace.publish(path, encode_record(made))


def read_pair(image: ImageRef, missing: tuple[str, ...], settings: BenchmarkSettings) -> Pair:
    """Decode a pair and what else the contenders of some names need (raises `ImageError`)."""
    assert image.mse_sr is not None
    assert image.gan_sr is not None
    inputs = {name for contender in settings.contenders if contender.name in missing for name in contender.inputs}
    mse_sr, gan_sr = (read_photo(file, settings.max_pixels).pixels for file in (image.mse_sr, image.gan_sr))
    if mse_sr.shape[:2] != gan_sr.shape[:2]:
        sizes = " and ".join(f"{pixels.shape[1]}x{pixels.shape[0]}" for pixels in (gan_sr, mse_sr))
        raise ImageError(image.path, f"and its MSE twin are {sizes}", "give results of one size")
    lr = read_photo(image.lr, settings.max_pixels).pixels if "lr" in inputs and image.lr else None
    labels, seconds = _labels(image, gan_sr, settings) if "labels" in inputs else (None, None)
    return Pair(image.path, mse_sr, gan_sr, lr, labels, seconds)


def read_ground_truth(source: File | CocoMask, shape: tuple[int, int], image: Path) -> Mask:
    """The ground truth of an image of ``(H, W)``, ``(H - 10, W - 10)`` bool (raises `ImageError`)."""
    if isinstance(source, File):
        return on_valid_region(_decoded(source), shape, source.path)
    if (source.height, source.width) != shape:
        sizes = f"is {shape[1]}x{shape[0]}, but {source.width}x{source.height} in the COCO file"
        raise ImageError(image, sizes, "mend width and height there, or give the image that was labelled")
    return on_valid_region(decode_coco_mask(source), shape, image)


def timed_scores(contender: Contender, pair: Pair, weights: npt.NDArray[np.float64] | None) -> tuple[Scores, float]:
    """The score map of a pair, and the seconds that this thread computed for it (raises `ImageError`)."""
    detector = contender.detector(weights)
    inputs = DetectorInputs(pair.mse_sr, pair.gan_sr, pair.lr, pair.labels)

    def scored() -> Scores:
        return score_pair(detector, contender.name, pair.path, inputs)

    if next(_calls(contender.key)) == 0:
        scored()  # the first call of a process also loads libraries and compiles
    started = time.thread_time()
    scores = scored()
    return scores, time.thread_time() - started


def _runs(pair: Pair, judging: Judging, workspace: Workspace, settings: BenchmarkSettings) -> dict[str, Run]:
    truth = read_ground_truth(judging.ground_truth, pair.shape, pair.path)
    published = None
    if judging.published:
        published = on_valid_region(_decoded(judging.published), pair.shape, judging.published.path)
    runs = {}
    for contender in settings.contenders:
        if contender.name in judging.missing:
            runs[contender.name] = _run(contender, pair, truth, published, judging, workspace, settings)
    return runs


def _run(
    contender: Contender,
    pair: Pair,
    truth: Mask,
    published: Mask | None,
    judging: Judging,
    workspace: Workspace,
    settings: BenchmarkSettings,
) -> Run:
    """Score a pair by a contender, publish its masks and count what they have in common with the others."""
    scores, seconds = timed_scores(contender, pair, settings.weights)
    min_area = min_area_pixels(settings.min_area, *pair.shape)
    run = Run(
        key=judging.keys[contender.name],
        seconds={},
        agreements={},
        curve=curve_of(scores, contender, truth, pair.shape, min_area),
        published={},
    )
    for entry in contender.entries:
        started = time.thread_time()
        mask = score_mask(scores, pair.shape, threshold=entry.threshold, min_area=min_area)
        run.seconds[entry.name] = round(seconds + time.thread_time() - started, 4)
        judged = valid(mask, FRAME)
        run.agreements[entry.name] = compare_masks(judged, truth)
        if published is not None and contender.method == "desra":
            run.published[entry.name] = sameness(judged, published)
        workspace.publish(mask_path(workspace, entry, judging.part, judging.name), encode_mask(mask))
    return run


def _decoded(file: File) -> Mask:
    return decode_mask(read_content(file), file.path)


def _labels(image: ImageRef, gan_sr: Pixels, settings: BenchmarkSettings) -> tuple[Labels, float | None]:
    """The classes of a GAN result, and how long it took to compute them."""
    if image.labels is not None:
        return read_label_file(image.labels, gan_sr.shape[:2], settings.max_pixels), None
    segmenter = load_segmenter(settings.segmenter, settings.device)
    started = time.perf_counter()
    try:
        return segmenter(gan_sr), round(time.perf_counter() - started, 4)
    except ImageError as error:
        raise type(error)(image.path, error.reason, error.remedy) from None


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Have OpenCV, and PyTorch where a method has loaded it, compute in this thread, whose time is taken."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    torch = sys.modules.get("torch")
    torch_threads = torch.get_num_threads() if torch else 0
    if torch:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(threads)
        if torch:
            torch.set_num_threads(torch_threads)


@cache
def _calls(_key: str) -> Iterator[int]:
    """Counts the calls of a contender in this process."""
    return itertools.count()
