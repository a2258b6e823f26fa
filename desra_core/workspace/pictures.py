"""Where the pictures of an image lie: in the dataset of a mined corpus, else among the sources."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from desra_core.workspace import Workspace, read_table
from desra_core.workspace.manifest import MANIFEST, image_refs


def picture_files(workspace: Workspace, verb: str, names: Sequence[str]) -> dict[str, dict[str, Path]]:
    """The files of some images by name and kind, the mask included; whether they are there has to be seen.

    Parameters
    ----------
    workspace
        The workspace.
    verb
        ``mine`` where it has a dataset with lr, mse_sr, gan_sr and pseudo_gt; else the sources are mse_sr, gan_sr, and
        lr and labels as far as there are any.
    names
        Of images in the manifest.
    """
    files = _dataset(workspace, names) if verb == "mine" else _sources(workspace, names)
    for name, kinds in files.items():
        kinds["mask"] = workspace.mask(name)
    return files


def _dataset(workspace: Workspace, names: Sequence[str]) -> dict[str, dict[str, Path]]:
    kinds = ("lr", "mse_sr", "gan_sr", "pseudo_gt")
    return {name: {kind: workspace.dataset(kind, name) for kind in kinds} for name in names}


def _sources(workspace: Workspace, names: Sequence[str]) -> dict[str, dict[str, Path]]:
    manifest = read_table(workspace.manifest, MANIFEST)
    rows = manifest.filter(pc.is_in(manifest["name"], pa.array(names, pa.string())))
    files = {}
    for row in range(rows.num_rows):
        (image,) = image_refs(rows.slice(row, 1))
        found = {"mse_sr": image.mse_sr, "gan_sr": image.gan_sr, "lr": image.lr, "labels": image.labels}
        files[image.names[0]] = {kind: file.path for kind, file in found.items() if file is not None}
    return files
