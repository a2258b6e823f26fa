"""Masks by people: which images have one, and on which results they were drawn.

A mask counts for the image whose content it was drawn on, at whatever names the image goes by, and for the results of
the GAN model that it was drawn on: another model is wrong in other places. Masks that do not count stay where they are,
and count again when photo and model are those again.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from desra_core.imageio import Mask, decode, read_bytes
from desra_core.workspace import Workspace, read_table

# ``id`` is the image's; ``gan_sr_key`` the model's, null where results are files, whose content the id tells.
HUMAN_MASKS = pa.schema(
    [("name", pa.string()), ("id", pa.string()), ("gan_sr_key", pa.string()), ("pixels", pa.int64()),
     ("regions", pa.int32())]
)  # fmt: skip


class HumanMask(NamedTuple):
    """A mask by a person: a name of its image, its file, and how many pixels and 8-connected regions it marks."""

    name: str
    path: Path
    pixels: int
    regions: int

    def read(self) -> Mask:
        """The mask, ``(H, W)`` bool (raises `desra_core.errors.ImageError`)."""
        return np.asarray(decode(read_bytes(self.path), self.path).pixels[:, :, 0] > 0)


def human_mask_rows(workspace: Workspace) -> pa.Table:
    """The masks by people in a workspace, those included that do not count (schema `HUMAN_MASKS`)."""
    remedy = "bring it back from a copy, or delete it and import the masks again"
    table = read_table(workspace.human_manifest, HUMAN_MASKS, remedy=remedy)
    return table.filter(
        pa.array([workspace.human_mask(name).exists() for name in table["name"].to_pylist()], pa.bool_())
    )


def that_count(rows: pa.Table, gan_sr_key: str | None) -> pa.Table:
    """Those rows of the schema `HUMAN_MASKS` that were drawn on results of this model, or on files where it is None."""
    keys = rows["gan_sr_key"]
    return rows.filter(pc.is_null(keys) if gan_sr_key is None else pc.fill_null(pc.equal(keys, gan_sr_key), False))


def read_human_masks(workspace: Workspace, gan_sr_key: str | None) -> dict[str, HumanMask]:
    """The masks by people that count, by image id.

    Parameters
    ----------
    workspace
        The workspace.
    gan_sr_key
        Of its `desra_core.target.Target`.
    """
    rows = that_count(human_mask_rows(workspace), gan_sr_key).to_pylist()
    return {
        row["id"]: HumanMask(row["name"], workspace.human_mask(row["name"]), row["pixels"], row["regions"])
        for row in rows
    }


def find_human_mask(
    workspace: Workspace, image_id: str, names: Iterable[str], gan_sr_key: str | None
) -> HumanMask | None:
    """The mask by a person that counts for an image; for most images a look for a file tells that there is none."""
    if not any(workspace.human_mask(name).exists() for name in names):
        return None
    return read_human_masks(workspace, gan_sr_key).get(image_id)
