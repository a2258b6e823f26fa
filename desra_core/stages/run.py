"""Run a stage on an image: what became of it is journaled, a permanent failure too."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

from desra_core.errors import ImageError, LostError, TooLargeError, TransientError
from desra_core.workspace import Workspace
from desra_core.workspace.manifest import ImageRef
from desra_core.workspace.records import Outcome, without_arrays, write_journal

Stage = Callable[[ImageRef, Outcome, Workspace, Any], Outcome]


def run_stage(
    stage: Stage,
    image: ImageRef,
    outcome: Outcome,
    workspace: Workspace,
    settings: Any,
    mask_key: str,
    *,
    spared: Collection[str] = (),
) -> Outcome:
    """Run a stage on an image and journal what became of it.

    A permanent failure is an outcome too: the image's masks go, the record says why, and ``mask_key`` tells under
    which settings. Transient failures are raised, to be tried again. Of an image that is done and clean the arrays go,
    but for those that are ``spared``.

    Raises
    ------
    TransientError
        Storage failed, or a file changed since the scan.
    """
    name = stage.__name__.removesuffix("_stage")
    started = time.perf_counter()
    try:
        made = stage(image, _cleared(outcome), workspace, settings)
    except TransientError:
        raise
    except MemoryError:
        remedy = "raise --memory, or use fewer --workers"
        raise TooLargeError(image.path, "needs more memory than there is", remedy) from None
    except ImageError as error:
        for image_name in image.names:
            workspace.withdraw(image_name)
        made = failure(image, outcome, name, mask_key, error)
    made = replace(made, seconds=made.seconds | {name: round(time.perf_counter() - started, 4)})
    write_journal(workspace, image.shard, made)
    if made.mask_key and not made.similarity_kept:
        workspace.drop_group(image.id, spared=spared)
    return made


def failure(image: ImageRef, outcome: Outcome, stage: str, mask_key: str, error: ImageError) -> Outcome:
    """The outcome of an image whose stage raised."""
    return replace(
        without_arrays(outcome) if isinstance(error, LostError) else outcome,
        mask_key=None,
        artifact_pixels=None,
        regions=[],
        labels_hash=image.labels.hash if image.labels else None,
        failed_stage=stage,
        failed_key=mask_key,
        subject=error.subject,
        reason=error.reason,
        remedy=error.remedy,
        transient=isinstance(error, TransientError),
    )


def _cleared(outcome: Outcome) -> Outcome:
    """The outcome without an earlier failure."""
    return replace(outcome, failed_stage=None, failed_key=None, subject=None, reason=None, remedy=None, transient=False)
