"""Choose the images of a workspace for an export, each with its mask: the human mask where there is one."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from desra_core.detection.class_weights import class_names
from desra_core.detection.mask import Components
from desra_core.errors import ImageError
from desra_core.files.content import read_bytes
from desra_core.images.codec import Mask, check_size, decode_mask
from desra_core.planning.plan import done_images
from desra_core.workspace import Workspace
from desra_core.workspace.human_masks import HumanMask, read_human_masks
from desra_core.workspace.manifest import read_manifest
from desra_core.workspace.products import Target


class Annotation(NamedTuple):
    """One 8-connected component of a mask."""

    x: int  # left, in pixels of the image
    y: int  # top
    crop: Mask  # (h, w) bool
    region: dict[str, Any] | None = None  # the record of the detector's region; None where a person drew it

    @property
    def area(self) -> int:
        """The pixels that are marked."""
        return int(self.crop.sum())

    def on(self, shape: tuple[int, int]) -> Mask:
        """Draw the component alone on an image of ``(H, W)``, column by column in memory, as for run lengths."""
        mask = np.zeros(shape, np.bool_, order="F")
        mask[self.y : self.y + self.crop.shape[0], self.x : self.x + self.crop.shape[1]] = self.crop
        return mask


class MaskedImage(NamedTuple):
    """An image to be exported, by its first name, with the detector's regions; ``files`` are its pictures by kind."""

    name: str
    id: str
    shape: tuple[int, int]
    regions: list[dict[str, Any]]
    human: HumanMask | None
    files: dict[str, Path]

    @property
    def severity(self) -> float:
        """The sum over the detector's regions."""
        return float(sum(region["severity"] for region in self.regions))

    def mask(self) -> Mask:
        """Read the human mask, or else the detector's.

        Raises:
            ImageError: The mask cannot be read, or has another size than the image.
        """
        return self.human.read() if self.human else read_mask(self.files["mask"], self.shape)

    def annotations(self) -> list[Annotation]:
        """List the components of the mask, in reading order.

        Raises:
            ImageError: The components are not the recorded regions.
        """
        found = Components(self.mask())
        drawn = [Annotation(x, y, found.crop(index)) for index, (x, y, *_) in enumerate(found.boxes.tolist())]
        if self.human:
            return drawn
        boxes = [(*box, area) for box, area in zip(found.boxes.tolist(), found.areas.tolist(), strict=True)]
        fields = ("x", "y", "width", "height", "area")
        if boxes != [tuple(region[field] for field in fields) for region in self.regions]:
            raise ImageError(self.files["mask"], "is not the mask that was recorded", "delete it, and run again")
        return [one._replace(region=region) for one, region in zip(drawn, self.regions, strict=True)]


def class_name(region: dict[str, Any]) -> str | None:
    """Return the name of a region's dominant ADE20K class, where there were labels."""
    label = region["dominant_class"]
    return None if label is None else class_names()[label]


def read_mask(path: Path, shape: tuple[int, int]) -> Mask:
    """Read a mask of an image of ``(H, W)``.

    Raises:
        ImageError: The mask cannot be read, or has another size.
    """
    mask = decode_mask(read_bytes(path), path)
    check_size(mask, path, "delete it, and run again", shape)
    return mask


def count_resting(workspace: Workspace, gan_sr_key: str | None) -> int:
    """Count the images that are present and have a human mask that counts."""
    manifest = read_manifest(workspace)
    if manifest is None or not (human := read_human_masks(workspace, gan_sr_key)):
        return 0
    return len(human.keys() & set(manifest["id"].filter(manifest["present"]).to_pylist()))


def select_images(workspace: Workspace, target: Target, *, everything: bool, worst: int | None) -> list[MaskedImage]:
    """Choose images, sorted by name; of copies of one image, the first name.

    Args:
        workspace, target: The workspace, and the cache keys of its latest run.
        everything: Take all images that are done, not only those with artifacts or a human mask.
        worst: Take only this many, the most severe.
    """
    rows = done_images(workspace, target)
    human = read_human_masks(workspace, target.gan_sr_key)
    if not everything:
        looked_at = pc.is_in(rows["id"], pa.array(human, pa.string()))
        rows = rows.filter(pc.or_(pc.greater(rows["artifact_pixels"], 0), looked_at))
    found: dict[str, MaskedImage] = {}
    for row in rows.to_pylist():
        shape = (row["height"], row["width"])
        image = MaskedImage(row["name"], row["id"], shape, row["regions"] or [], human.get(row["id"]), {})
        found.setdefault(image.id, image)
    chosen = sorted(found.values(), key=lambda image: (-image.severity, image.name))[:worst]
    return sorted(chosen, key=lambda image: image.name)
