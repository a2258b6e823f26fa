"""How many images with artifacts have gathered for training since the last finetune. The workspace counts."""

from __future__ import annotations

import json

from desra_core.planning.keys import load_settings
from desra_core.settings import Mining
from desra_core.training.pools import Images
from desra_core.training.run_folder import read_json
from desra_core.workspace import Workspace


def note_gathered(workspace: Workspace, group_by: str) -> None:
    """Record the images with artifacts that there are when a finetune ends.

    Of desra detect, whose results come from elsewhere, nothing is counted.

    Parameters
    ----------
    workspace, group_by
        As for `count_gathered`.

    Raises
    ------
    UsageError
        Nothing was mined yet.
    TransientError
        The disk is full or failed.
    """
    if isinstance(load_settings(workspace)[0], Mining):
        workspace.publish(workspace.gathered, json.dumps(_marked_ids(workspace, group_by)).encode())


def count_gathered(workspace: Workspace, group_by: str) -> int:
    """Count the images with artifacts in the training pool that were not there when the last finetune ended.

    Parameters
    ----------
    workspace
        Of desra mine; must be locked.
    group_by
        As for `desra_core.training.split.assign_pools`.

    Raises
    ------
    UsageError
        Nothing was mined yet.
    """
    known = set(read_json(workspace.gathered) or [])
    return len(set(_marked_ids(workspace, group_by)) - known)


def _marked_ids(workspace: Workspace, group_by: str) -> list[str]:
    """The images with artifacts in the training pool."""
    settings, target = load_settings(workspace)
    return sorted(marked.image.id for marked in Images(workspace, settings, target, group_by).marked("training"))
