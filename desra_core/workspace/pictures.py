"""The pictures of an image: where they lie, and the pseudo-GT that finetuning reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from desra_core.images.codec import Mask, Pixels, encode_mask, encode_png
from desra_core.workspace import Workspace, read_table
from desra_core.workspace.manifest import MANIFEST, image_refs


def picture_files(workspace: Workspace, verb: str, names: Sequence[str]) -> dict[str, dict[str, Path]]:
    """Return the files of some images by name and kind, the mask included; a file may have gone since.

    Args:
        workspace: The workspace.
        verb: ``mine`` where it has a dataset with lr, mse_sr, gan_sr and pseudo_gt; else the files are the sources:
            mse_sr, gan_sr, and lr and labels as far as there are any.
        names: Of images in the manifest.
    """
    files: dict[str, dict[str, Path]] = {}
    if verb == "mine":
        kinds = ("lr", "mse_sr", "gan_sr", "pseudo_gt")
        files = {name: {kind: workspace.dataset(kind, name) for kind in kinds} for name in names}
    else:
        manifest = read_table(workspace.manifest, MANIFEST)
        rows = manifest.filter(pc.is_in(manifest["name"], pa.array(names, pa.string())))
        for row in range(rows.num_rows):
            (image,) = image_refs(rows.slice(row, 1))
            found = {"mse_sr": image.mse_sr, "gan_sr": image.gan_sr, "lr": image.lr, "labels": image.labels}
            files[image.names[0]] = {kind: file.path for kind, file in found.items() if file is not None}
    for name, kinds_of_image in files.items():
        kinds_of_image["mask"] = workspace.mask(name)
    return files


def publish_pseudo_gt(
    workspace: Workspace, names: Iterable[str], mask: Mask, pseudo_gt: Pixels, alpha: Pixels | None
) -> None:
    """Write pseudo-GT and mask of an image to the dataset of a mined workspace, at all its names.

    The mask comes last: where it is there, so is the pseudo-GT that was made with it.

    Args:
        workspace, names: A mined workspace, and the names of the image.
        mask, pseudo_gt: As of `assemble_pseudo_gt`.
        alpha: ``(H, W)`` of the results, or None.

    Raises:
        TransientError: The disk is full or failed.
    """
    for kind, data in (("pseudo_gt", encode_png(pseudo_gt, alpha)), ("mask", encode_mask(mask))):
        for name in names:
            workspace.publish(workspace.dataset(kind, name), data)
