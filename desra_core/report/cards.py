"""Regions before and after finetuning: the crops that the gate has published."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from desra_core.errors import ImageError, printable
from desra_core.files.hashing import read_bytes
from desra_core.gate.criteria import OldRegion
from desra_core.gate.verdict import PicturedRegion
from desra_core.images.codec import decode
from desra_core.report.gallery import Cell, as_uri

# In the order in which the viewer goes through them.
KINDS = {"before": "before", "after": "after", "lr": "LR", "mse_sr": "MSE-SR"}

# They are made smaller than this: 128 kB even of noise.
_LARGEST_FILE, _MAX_PIXELS = 150_000, 2**20


class Card(NamedTuple):
    """A region before and after."""

    image: str
    region: OldRegion
    cells: list[Cell]


def make_card(gate: Path, picture: PicturedRegion) -> Card:
    """Read the crops of a region, which lie below the gate's folder."""
    return Card(picture.image, picture.region, [_cell(gate, kind, picture.crops.get(kind)) for kind in KINDS])


def _cell(gate: Path, kind: str, crop: str | None) -> Cell:
    """A crop as it was published, or why it is not here."""
    if crop is None:
        return Cell(kind, None, reason="None was made.")
    # The paths are read from a file: they must not make the page tell of other files.
    if Path(crop).is_absolute() or ".." in Path(crop).parts or "\0" in crop:
        return Cell(kind, None, reason="It lies elsewhere.")
    try:
        data = read_bytes(gate / crop)
        height, width = decode(data, gate / crop, max_pixels=_MAX_PIXELS).pixels.shape[:2]
    except ImageError as error:
        return Cell(kind, None, reason=printable(error.reason))
    if len(data) > _LARGEST_FILE or data[8:12] != b"WEBP":
        return Cell(kind, None, reason="It has been changed.")
    return Cell(kind, as_uri(data), width, height)
