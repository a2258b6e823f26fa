"""The stages of detection and mining: Dask calls one small function per stage and image.

A stage takes an image, its record so far, the workspace and the job of the run, commits its files and returns the new
record. Any process may run a stage again at any time; the stage leaves the same files. `run_stage` runs a stage and
journals the record. `read_content` and the functions below it read the inputs of stages: unchanged files, and arrays.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from desra_core.detection.class_weights import Weights
from desra_core.detection.detectors import AppliedDetector, Scores
from desra_core.detection.mask import score_mask
from desra_core.errors import ImageError, LostError, TransientError, UsageError, too_large
from desra_core.files import digest, read_bytes
from desra_core.images.codec import Labels, Mask, Photo, Pixels, check_size, decode, decode_labels
from desra_core.networks.checkpoints import BICUBIC, load_pair
from desra_core.networks.super_resolution import super_resolve
from desra_core.planning.plan import result_keys
from desra_core.settings import CorpusSettings, Mining, detector_of, min_area_pixels
from desra_core.workspace import Workspace
from desra_core.workspace.arrays import read_array
from desra_core.workspace.manifest import CHANGED, File, ImageRef
from desra_core.workspace.products import Record, Target, spared_arrays, without_arrays, write_journal


@dataclass(frozen=True)
class StageJob:
    """The inputs of a stage that are the same for all images of a run."""

    # The settings of the run, the same settings as keys, and the class weights.
    settings: CorpusSettings
    target: Target
    weights: Weights
    key: str  # the cache key of the product that the stage makes
    device: str  # ``cpu`` or ``cuda``: where networks run
    # Side of a tile in pixels, and number of threads, to compute the similarity of one image.
    tile: int
    threads: int
    max_pixels: int  # images of more pixels are refused
    # Called with each photo that is found clean, and its GAN result, of which nothing is stored.
    on_clean: CleanFunction | None = None

    @property
    def detector(self) -> AppliedDetector:
        """The detector and its threshold."""
        return detector_of(self.settings)

    def min_area(self, shape: tuple[int, int]) -> int:
        """Compute the least area of a region in pixels, for an image of ``(H, W)``."""
        return min_area_pixels(self.target.min_area, *shape)

    def score_mask(
        self, scores: Scores, shape: tuple[int, int], labels: Labels | None, weights: npt.NDArray[np.float64] | None
    ) -> Mask:
        """Mark the artifacts of an image with the settings of the run; see `desra_core.detection.mask.score_mask`."""
        # A Python float would be rounded to the map's float32 before it is compared.
        threshold = -np.float64(self.target.threshold)
        min_area = self.min_area(shape)
        return score_mask(scores, shape, threshold=threshold, min_area=min_area, labels=labels, weights=weights)

    @property
    def class_weights(self) -> npt.NDArray[np.float64] | None:
        """The weights of the classes, ``(150,)``, or None where none apply."""
        weighted = self.target.segmentation_key != "none" and self.detector.weighs_classes
        return self.weights.values if weighted else None


Stage = Callable[[ImageRef, Record, Workspace, StageJob], Record]
CleanFunction = Callable[[ImageRef, Photo, Pixels, Workspace, StageJob], None]


def run_stage(stage: Stage, image: ImageRef, record: Record, workspace: Workspace, job: StageJob) -> Record:
    """Run a stage on an image, and journal the new record.

    A permanent failure deletes the masks and dataset pictures of the image; the record gets the reason. A transient
    failure is raised, so that the caller can try again. The arrays of an image that is done and clean are deleted,
    except those that every image keeps.

    Raises:
        TransientError: Storage failed, or a file changed since the scan.
    """
    name = stage.__name__.removesuffix("_stage")
    started = time.perf_counter()
    cleared = replace(
        record, failed_stage=None, failed_key=None, subject=None, reason=None, remedy=None, transient=False
    )
    try:
        made = stage(image, cleared, workspace, job)
    except TransientError:
        raise
    except MemoryError:
        raise too_large(image.path) from None
    except ImageError as error:
        for image_name in image.names:
            workspace.withdraw(image_name)
        made = failure(image, record, name, job.target, error)
    made = replace(made, seconds=made.seconds | {name: round(time.perf_counter() - started, 4)})
    write_journal(workspace, image.shard, made)
    if made.mask_key and not made.similarity_kept:
        workspace.drop_group(image.id, spared=spared_arrays(job.target))
    return made


def failure(image: ImageRef, record: Record, stage: str, target: Target, error: ImageError) -> Record:
    """Return the record of an image whose stage raised an error."""
    return replace(
        without_arrays(record) if isinstance(error, LostError) else record,
        mask_key=None,
        artifact_pixels=None,
        regions=[],
        checksums={},
        labels_hash=image.labels.hash if image.labels else None,
        failed_stage=stage,
        failed_key=target.run_key,
        **error.failure._asdict(),
        transient=isinstance(error, TransientError),
    )


def read_content(file: File) -> bytes:
    """Read a file, and check that its bytes are those that were scanned (raises `TransientError`)."""
    data = read_bytes(file.path)
    if digest(data) != file.hash:
        raise TransientError(file.path, CHANGED, "run again")
    return data


def read_photo(file: File, max_pixels: int) -> Photo:
    """Decode a photo to sRGB (raises `desra_core.errors.ImageError`)."""
    return decode(read_content(file), file.path, max_pixels=max_pixels)


def infer(
    image: ImageRef, record: Record, job: StageJob, keys: dict[str, str | None]
) -> tuple[dict[str, Pixels], Photo | None, Record]:
    """Infer results of a photo by role, ``mse_sr`` and ``gan_sr``, each of which must have the given key.

    Returns:
        The results, the photo, None where it had not to be read, and the record with the seconds and the smallest tile.

    Raises:
        ImageError: The photo cannot be read or upscaled.
        TransientError: A model has changed since the run was planned.
    """
    mining = job.settings
    assert isinstance(mining, Mining)
    assert image.lr is not None
    if not keys:
        photo = None
        if record.further_pages is None:  # the record was lost, but not the results
            photo = read_photo(image.lr, job.max_pixels)
            record = told_by(photo, record)
        return {}, photo, replace(record, seconds=record.seconds | {"inference": 0.0})
    models = load_pair(mining.mse_model, mining.gan_model, job.device, mining.engine)
    photo = read_photo(image.lr, job.max_pixels // models[0].scale ** 2)
    found_keys = result_keys(mining.mse_model, mining.gan_model, mining.engine)
    results: dict[str, Pixels] = {}
    tiles = [] if len(keys) == len(models) else [record.tile]  # the stored result was made with that tile
    seconds = 0.0
    for role, key in keys.items():
        model = models[role == "gan_sr"]
        if found_keys[role == "gan_sr"] != key:
            checkpoint = model.path if mining.mse_model != BICUBIC else mining.gan_model
            raise TransientError(checkpoint, "changed after the run had started", "run again")
        started = time.perf_counter()
        try:
            results[role], tile = super_resolve(model, photo.pixels)
        except UsageError as error:  # weights that overflow on this photo, maybe on no other
            reason = f"cannot be upscaled: {error.subject} {error.reason}"
            raise ImageError(image.path, reason, error.remedy) from None
        seconds += time.perf_counter() - started
        tiles.append(tile)
    record = replace(
        told_by(photo, record),
        tile=min((tile for tile in tiles if tile), default=None),
        seconds=record.seconds | {"inference": round(seconds, 4)},
    )
    return results, photo, record


def read_result(file: File, max_pixels: int) -> Photo:
    """Decode a result, whose colours are compared as they are stored (raises `desra_core.errors.ImageError`)."""
    return decode(read_content(file), file.path, max_pixels=max_pixels, as_stored=True)


def told_by(photo: Photo, record: Record) -> Record:
    """Return the record of an image with what its file tells beside the pixels."""
    profile, pages = photo.profile, photo.further_pages
    return replace(record, icc_profile=profile is not None, colour_profile=profile, further_pages=pages)


def read_sr(role: str, image: ImageRef, workspace: Workspace, job: StageJob) -> Pixels:
    """Read a result, ``mse_sr`` or ``gan_sr``: a file, or the array that was inferred (raises `ImageError`)."""
    file: File | None = getattr(image, role)
    if file is not None:
        return read_result(file, job.max_pixels).pixels
    stored: Pixels = read_array(workspace, image.id, role, key=getattr(job.target, f"{role}_key"))
    return stored


def read_labels(
    image: ImageRef, record: Record, workspace: Workspace, segmentation_key: str | None, max_pixels: int
) -> Labels | None:
    """Read labels of the image's size with values below 150; None where the run has no labels or needs none.

    Raises:
        ImageError: A label file has another size or other classes, or cannot be read.
        TransientError: The stored labels are gone.
    """
    if segmentation_key == "labels" and image.labels is not None:
        return read_label_file(image.labels, record.shape, max_pixels)
    if record.labels_kept and record.segmentation_key == segmentation_key:
        stored: Labels = read_array(workspace, image.id, "labels", key=record.segmentation_key)
        return stored
    return None


def read_label_file(file: File, shape: tuple[int, ...], max_pixels: int) -> Labels:
    """Read a label file of ``(H, W)`` with values below 150.

    Raises:
        ImageError: The file has another size or other classes, or cannot be read.
    """
    labels = decode_labels(read_content(file), file.path, max_pixels=max_pixels)
    check_size(labels, file.path, "labels must have the size of the GAN result", shape)
    return labels
