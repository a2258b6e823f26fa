"""How many images with artifacts have gathered for training since the last finetune began. The workspace counts."""

from __future__ import annotations

import json
from collections.abc import Iterable

from desra_core.pools import Images
from desra_core.target import load_settings
from desra_core.training.run_folder import read_json
from desra_core.workspace import Workspace


def note_gathered(workspace: Workspace, image_ids: Iterable[str]) -> None:
    """Record the images that a finetune could choose from, when it begins.

    Raises
    ------
    TransientError
        The disk is full or failed.
    """
    workspace.publish(workspace.gathered, json.dumps(sorted(image_ids)).encode())


def count_gathered(workspace: Workspace, group_by: str) -> int:
    """Count the images with artifacts in the training pool that were not there when the last finetune began.

    Parameters
    ----------
    workspace
        Of desra mine; must be locked.
    group_by
        As for `desra_core.split.assign_pools`.

    Raises
    ------
    UsageError
        Nothing was mined yet.
    """
    known = set(read_json(workspace.gathered) or [])
    settings, target = load_settings(workspace)
    marked = Images(workspace, settings, target, group_by).marked("training")
    return sum(image.image.id not in known for image in marked)
