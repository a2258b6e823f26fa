"""What the GAN model should have made: its own result, with the artifacts taken from its MSE-trained twin."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from desra_core.imageio import Mask, Pixels, encode_mask, encode_png
from desra_core.workspace import Workspace


def assemble_pseudo_gt(mse_sr: Pixels, gan_sr: Pixels, mask: Mask) -> Pixels:
    """Compute ``mask * mse_sr + (1 - mask) * gan_sr``.

    Parameters
    ----------
    mse_sr, gan_sr
        ``(H, W, C)`` of one dtype.
    mask
        ``(H, W)``, true where there is an artifact.

    Examples
    --------
    >>> mse_sr, gan_sr = np.full((1, 2, 1), 7, np.uint8), np.full((1, 2, 1), 9, np.uint8)
    >>> assemble_pseudo_gt(mse_sr, gan_sr, np.array([[True, False]])).ravel().tolist()
    [7, 9]
    """
    return np.where(mask[:, :, np.newaxis], mse_sr, gan_sr)


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
