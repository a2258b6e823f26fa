"""Run a stage on an image, and journal the new record, of a permanent failure too."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

from desra_core.detection.class_weights import Weights
from desra_core.errors import ImageError, LostError, TooLargeError, TransientError
from desra_core.settings import CorpusSettings
from desra_core.workspace import Workspace
from desra_core.workspace.manifest import ImageRef
from desra_core.workspace.products import Target
from desra_core.workspace.records import Record, without_arrays, write_journal

Stage = Callable[[ImageRef, Record, Workspace, Any], Record]


@dataclass(frozen=True)
class StageJob:
    """A run, as the ``settings_of`` of each stage needs it.

    ``key`` is that of the product that the stage makes; ``device`` is ``cpu`` or ``cuda``; ``tile`` (px) and
    ``threads`` are for the similarity of one image; images of more than ``max_pixels`` are refused.
    """

    settings: CorpusSettings
    target: Target
    key: str
    weights: Weights
    device: str
    tile: int
    threads: int
    max_pixels: int


def run_stage(
    stage: Stage,
    image: ImageRef,
    record: Record,
    workspace: Workspace,
    settings: Any,
    mask_key: str,
    *,
    spared: Collection[str] = (),
) -> Record:
    """Run a stage on an image and journal what became of it.

    A permanent failure is a record too: the image's masks go, the record says why, and ``mask_key`` tells under
    which settings. Transient failures are raised, to be tried again. Of an image that is done and clean the arrays go,
    but for those that are ``spared``.

    Raises:
        TransientError: Storage failed, or a file changed since the scan.
    """
    name = stage.__name__.removesuffix("_stage")
    started = time.perf_counter()
    try:
        made = stage(image, _cleared(record), workspace, settings)
    except TransientError:
        raise
    except MemoryError:
        remedy = "raise --memory, or use fewer --workers"
        raise TooLargeError(image.path, "needs more memory than there is", remedy) from None
    except ImageError as error:
        for image_name in image.names:
            workspace.withdraw(image_name)
        made = failure(image, record, name, mask_key, error)
    made = replace(made, seconds=made.seconds | {name: round(time.perf_counter() - started, 4)})
    write_journal(workspace, image.shard, made)
    if made.mask_key and not made.similarity_kept:
        workspace.drop_group(image.id, spared=spared)
    return made


def failure(image: ImageRef, record: Record, stage: str, mask_key: str, error: ImageError) -> Record:
    """Return the record of an image whose stage raised."""
    return replace(
        without_arrays(record) if isinstance(error, LostError) else record,
        mask_key=None,
        artifact_pixels=None,
        regions=[],
        labels_hash=image.labels.hash if image.labels else None,
        failed_stage=stage,
        failed_key=mask_key,
        **error.failure._asdict(),
        transient=isinstance(error, TransientError),
    )


def _cleared(record: Record) -> Record:
    """The record without an earlier failure."""
    return replace(record, failed_stage=None, failed_key=None, subject=None, reason=None, remedy=None, transient=False)
