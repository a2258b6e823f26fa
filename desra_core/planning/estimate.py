"""Estimate the time and the disk that a mine takes, from a few photos: decoded whole, and a crop of each inferred."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from desra_core.detection.agreement import measure_agreement
from desra_core.detection.detectors import DEFAULT, DetectorInputs, applied
from desra_core.errors import ImageError, UsageError, too_large
from desra_core.files import read_bytes
from desra_core.images.codec import Pixels, decode, encode_mask, encode_png
from desra_core.images.encoding import encode_picture
from desra_core.images.scanning import paths_of
from desra_core.networks.super_resolution import inferred_pixels, super_resolve
from desra_core.workspace.arrays import stored_bytes

if TYPE_CHECKING:
    from desra_core.networks.checkpoints import Model

_PHOTOS = 12  # photos of the sample
_CROP = 160  # the longest side of a crop, in pixels of the photo
_SECONDS = 60  # after so long, no further crop is inferred
_WARM_UP = 64  # the side of the crop that is inferred first, unmeasured
_WINDOW, _TILE = 11, 256
_JPEG_QUALITY = 95


class Measured(NamedTuple):
    """What was measured on a sample; seconds are those of one worker, and bytes those of the crops.

    Attributes:
        photos, megapixels: The decoded photos.
        decoding: Seconds to read and decode them.
        crops, crop_megapixels: The crops that were inferred, a part of each photo; 0 where no models are given.
        inferred_megapixels: The pixels that either network got for them, padding included.
        inference: Seconds of each network for them.
        comparison: Seconds to score the pairs.
        keeping: Seconds to encode what is kept of photos with artifacts.
        mask, kept, png, jpeg: Bytes of the empty masks, of what is kept of photos with artifacts, and of the results
            as pictures of desra deliver.
    """

    photos: int
    megapixels: float
    decoding: float
    crops: int = 0
    crop_megapixels: float = 0
    inferred_megapixels: tuple[float, float] = (0, 0)
    inference: tuple[float, float] = (0, 0)
    comparison: float = 0
    keeping: float = 0
    mask: int = 0
    kept: int = 0
    png: int = 0
    jpeg: int = 0


class Estimate(NamedTuple):
    """What a mine of some photos takes; a part that was not measured is None.

    Attributes:
        decoding, inference, comparison, keeping: Seconds of one worker for all photos; keeping where all of them have
            artifacts.
        seconds: From no photo with artifacts to all of them, on all workers.
        mine: Bytes that a mine keeps, from no photo with artifacts to all of them.
        png, jpeg: Bytes of desra deliver.
    """

    decoding: float
    inference: float | None = None
    comparison: float | None = None
    keeping: float | None = None
    seconds: tuple[float, float] | None = None
    mine: tuple[float, float] | None = None
    png: float | None = None
    jpeg: float | None = None


def measure(
    place: Path,
    photos: pa.Table,
    models: tuple[Model, Model] | None,
    threads: int,
    on_measured: Callable[[int, int], object] = lambda *_: None,
) -> tuple[Measured, list[ImageError]]:
    """Measure decoding and, with models, inference, comparison and files on a sample that is spread over the sizes.

    Args:
        place: What was listed.
        photos: The photos (schema `desra_core.images.census.PHOTOS`).
        models: The MSE model and the GAN model.
        threads: Threads of a worker.
        on_measured: Called with the number of photos that are measured, and of the sample.

    Returns:
        What was measured, and an error for each photo of the sample that a run could not mine either.
    """
    order = np.argsort(photos["height"].to_numpy().astype(np.int64) * photos["width"].to_numpy(), kind="stable")
    chosen = order[np.unique(np.linspace(0, len(order) - 1, min(_PHOTOS, len(order))).round().astype(int))]
    # Every other one first, so that those before the time is over are spread over the sizes, too.
    chosen = np.concatenate([chosen[::2], chosen[1::2]])
    measured, failures = Measured(0, 0, 0), list[ImageError]()
    started = time.perf_counter()
    with _threads(threads) if models else contextlib.nullcontext():
        for done, path in enumerate(paths_of(place, photos.take(chosen)), 1):
            try:
                began = time.perf_counter()
                pixels = decode(read_bytes(path), path).pixels
                decoding = time.perf_counter() - began
                made = Measured(1, pixels.shape[0] * pixels.shape[1] / 1e6, decoding)
                if models and (not measured.crops or time.perf_counter() - started < _SECONDS):
                    if not measured.crops:
                        _crop_measured(path, pixels, models, threads, _WARM_UP, made)
                    made = _crop_measured(path, pixels, models, threads, _CROP, made)
                measured = _sum(measured, made)
            except MemoryError:
                failures.append(too_large(path))
            except ImageError as error:
                failures.append(error)
            on_measured(done, len(chosen))
    return measured, failures


def estimate(
    measured: Measured, photos: pa.Table, models: tuple[Model, Model] | None, workers: int, gpus: int = 0
) -> Estimate:
    """Estimate what a mine of photos takes: everything by pixels, and inference by the pixels that networks get.

    Args:
        measured: Of some of the photos.
        photos: The photos, without copies.
        models: As for `measure`.
        workers: The number of workers, which are taken to be as fast together as alone.
        gpus: The number of GPUs, each of which runs one network at a time.
    """
    sizes = Counter(zip(photos["height"].to_pylist(), photos["width"].to_pylist(), strict=True))
    megapixels = sum(height * width * count for (height, width), count in sizes.items()) / 1e6
    if not measured.photos:
        return Estimate(0)
    decoding = measured.decoding / measured.megapixels * megapixels
    if not models or not measured.crops:
        return Estimate(decoding)
    times = megapixels / measured.crop_megapixels
    inference = 0.0
    for model, seconds, got in zip(models, measured.inference, measured.inferred_megapixels, strict=True):
        gets = sum(inferred_pixels(model, *size) * count for size, count in sizes.items()) / 1e6
        inference += seconds / got * gets
    comparison, keeping = measured.comparison * times, measured.keeping * times
    least = inference / (gpus or workers) + (decoding + comparison) / workers
    return Estimate(
        decoding, inference, comparison, keeping,
        seconds=(least, least + keeping / workers),
        mine=(measured.mask * times, (measured.mask + measured.kept) * times),
        png=measured.png * times, jpeg=measured.jpeg * times,
    )  # fmt: skip


def _crop_measured(
    path: Path, pixels: Pixels, models: tuple[Model, Model], threads: int, side: int, made: Measured
) -> Measured:
    """Mine the middle of a photo, ``(H, W, C)``, in memory (raises `ImageError`, `MemoryError`)."""
    top, left = (max(0, (length - side) // 2) for length in pixels.shape[:2])
    crop: Pixels = np.ascontiguousarray(pixels[top : top + side, left : left + side])  # type: ignore[assignment]
    results, clock = [], _Clock()
    inference = []
    for model in models:
        try:
            results.append(super_resolve(model, crop).pixels)
        except UsageError as error:  # weights that overflow on this photo, maybe on no other
            raise ImageError(path, f"cannot be upscaled: {error.subject} {error.reason}", error.remedy) from None
        inference.append(clock())
    mse_sr, gan_sr = results
    measure_agreement(mse_sr, gan_sr, crop)
    scores = applied(DEFAULT).score(path, DetectorInputs(mse_sr, gan_sr, crop), _WINDOW, _TILE, threads)
    comparison = clock()
    mask = np.zeros(gan_sr.shape[:2], np.bool_)
    kept = sum(map(stored_bytes, (mse_sr, gan_sr, scores)))
    # The pseudo ground truth is about as large as the GAN result, and the mask as the empty one.
    encoded = [len(encode_png(each)) for each in (crop, mse_sr, gan_sr, gan_sr)]
    empty = len(encode_mask(mask))
    keeping = clock()
    png, jpeg = (
        len(encode_picture(gan_sr, None, kind, quality=_JPEG_QUALITY, origin=None, colour="source"))
        for kind in ("png", "jpeg")
    )
    got = tuple(inferred_pixels(model, *crop.shape[:2]) / 1e6 for model in models)
    return made._replace(
        crops=1, crop_megapixels=crop.shape[0] * crop.shape[1] / 1e6,
        inferred_megapixels=(got[0], got[1]), inference=(inference[0], inference[1]),
        comparison=comparison, keeping=keeping, mask=empty, kept=kept + sum(encoded) + empty, png=png, jpeg=jpeg,
    )  # fmt: skip


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let PyTorch use as many threads as in a worker."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Clock:
    """Tells the seconds since it was last asked."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def __call__(self) -> float:
        last, self._last = self._last, time.perf_counter()
        return self._last - last


def _sum(one: Measured, other: Measured) -> Measured:
    return Measured(*(_added(first, second) for first, second in zip(one, other, strict=True)))


def _added(first: Any, second: Any) -> Any:
    return tuple(map(sum, zip(first, second, strict=True))) if isinstance(first, tuple) else first + second
