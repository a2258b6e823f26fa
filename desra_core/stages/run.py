"""Run a stage on an image, and journal the new record: a permanent failure is a record, too."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from desra_core.detection.class_weights import Weights
from desra_core.detection.detectors import AppliedDetector
from desra_core.errors import ImageError, LostError, TooLargeError, TransientError
from desra_core.settings import CorpusSettings, detector_of
from desra_core.workspace import Workspace
from desra_core.workspace.manifest import ImageRef
from desra_core.workspace.products import Target, spared_arrays
from desra_core.workspace.records import Record, without_arrays, write_journal


@dataclass(frozen=True)
class StageJob:
    """The inputs of a stage that are the same for all images of a run.

    Attributes:
        settings, target, weights: The settings of the run, the same settings as keys, and the class weights.
        key: The cache key of the product that the stage makes.
        device: ``cpu`` or ``cuda``: where networks run.
        tile, threads: Side of a tile in pixels, and number of threads, to compute the similarity of one image.
        max_pixels: Images of more pixels are refused.
    """

    settings: CorpusSettings
    target: Target
    weights: Weights
    key: str
    device: str
    tile: int
    threads: int
    max_pixels: int

    @property
    def detector(self) -> AppliedDetector:
        """The detector and its threshold."""
        return detector_of(self.settings)

    @property
    def class_weights(self) -> npt.NDArray[np.float64] | None:
        """The weights of the classes, ``(150,)``, or None where none apply."""
        weighted = self.target.segmentation_key != "none" and self.detector.weighs_classes
        return self.weights.values if weighted else None


Stage = Callable[[ImageRef, Record, Workspace, StageJob], Record]


def run_stage(stage: Stage, image: ImageRef, record: Record, workspace: Workspace, job: StageJob) -> Record:
    """Run a stage on an image, and journal the new record.

    After a permanent failure, the masks of the image are deleted, and its record holds the reason. A transient failure
    is raised, so that the caller can try again. The arrays of an image that is done and clean are deleted, except those
    that every image keeps.

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
        remedy = "raise --memory, or use fewer --workers"
        raise TooLargeError(image.path, "needs more memory than there is", remedy) from None
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
        labels_hash=image.labels.hash if image.labels else None,
        failed_stage=stage,
        failed_key=target.run_key,
        **error.failure._asdict(),
        transient=isinstance(error, TransientError),
    )
