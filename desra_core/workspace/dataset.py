"""The dataset folder of a mined workspace: what finetuning reads."""

from __future__ import annotations

from collections.abc import Iterable

from desra_core.images.codec import Mask, Pixels, encode_mask, encode_png
from desra_core.workspace.paths import Workspace


def publish_pseudo_gt(
    workspace: Workspace, names: Iterable[str], mask: Mask, pseudo_gt: Pixels, alpha: Pixels | None
) -> None:
    """Write pseudo-GT and mask of an image to the dataset, at all its names.

    The mask comes last: where it is there, so is what it was made with.

    Parameters
    ----------
    workspace
        A mined one.
    names
        Of the image.
    mask, pseudo_gt
        As of `assemble_pseudo_gt`.
    alpha
        ``(H, W)`` of the results, or None.

    Raises
    ------
    TransientError
        The disk is full or failed.
    """
    for kind, data in (("pseudo_gt", encode_png(pseudo_gt, alpha)), ("mask", encode_mask(mask))):
        for name in names:
            workspace.publish(workspace.dataset(kind, name), data)
