"""Plain folders of pictures and masks, for any other tool.

::

    masks/NAME.png       the detector's masks, 1-bit
    human/NAME.png       masks by people, of images that have one
    gan_sr/, mse_sr/     the results, and lr/ the photos, as their files are
    pseudo_gt/NAME.png   the GAN result with the masked places taken from the MSE result
    regions.csv          the detector's regions
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable

from desra_core.annotations.selection import Annotated
from desra_core.detection.class_weights import class_names
from desra_core.detection.pseudo_gt import assemble_pseudo_gt
from desra_core.errors import ImageError
from desra_core.files.hashing import read_bytes
from desra_core.images.codec import decode, encode_png
from desra_core.workspace.records import REGION_FIELDS

_COPIED = ("lr", "mse_sr", "gan_sr", "pseudo_gt")


def folder_files(image: Annotated) -> dict[str, bytes]:
    """The files of an image by relative path (raises `ImageError`)."""
    files = {f"masks/{image.name}.png": read_bytes(image.files["mask"])}
    if image.human is not None:
        files[f"human/{image.name}.png"] = read_bytes(image.human.path)
    for kind in _COPIED:
        if kind in image.files:
            path = image.files[kind]
            files[f"{kind}/{image.name}{path.suffix}"] = read_bytes(path)
    if "pseudo_gt" not in image.files:
        files[f"pseudo_gt/{image.name}.png"] = _pseudo_gt(image)
    return files


def regions_csv(images: Iterable[Annotated]) -> bytes:
    """The detector's regions of some images, a row for each; fields as in `desra_core.planning.tables.REGIONS`."""
    fields = [field.name for field in REGION_FIELDS]
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["image", *fields, "class_name"])
    for image in images:
        for region in image.regions:
            label = region["dominant_class"]
            name = "" if label is None else class_names()[label]
            table.writerow([image.name, *(region[field] for field in fields), name])
    return text.getvalue().encode()


def _pseudo_gt(image: Annotated) -> bytes:
    """The pseudo-GT of results in files."""
    mse_sr, gan_sr = (decode(read_bytes(image.files[kind]), image.files[kind]) for kind in ("mse_sr", "gan_sr"))
    mask = image.mask()
    for photo, kind in ((mse_sr, "mse_sr"), (gan_sr, "gan_sr")):
        if photo.pixels.shape[:2] != mask.shape:
            sizes = f"is {photo.pixels.shape[1]}x{photo.pixels.shape[0]} and was {mask.shape[1]}x{mask.shape[0]}"
            raise ImageError(image.files[kind], sizes, "run again")
    return encode_png(assemble_pseudo_gt(mse_sr.pixels, gan_sr.pixels, mask), gan_sr.alpha)
