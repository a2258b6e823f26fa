"""Export the images and masks of a workspace to labelling tools, or as plain folders.

The format ``folder`` holds, for any other tool::

    masks/NAME.png       the detector's masks, 1-bit
    human/NAME.png       human masks, of images that have one
    gan_sr/, mse_sr/     the results, and lr/ the photos, as their files are
    pseudo_gt/NAME.png   the GAN result with the masked places taken from the MSE result
    regions.csv          the detector's regions
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from desra_core.annotations.coco import coco_annotations, coco_document
from desra_core.annotations.export_folder import ExportFolder, open_export
from desra_core.annotations.labelme import labelme_document
from desra_core.annotations.selection import Annotated, select_images
from desra_core.detection.class_weights import class_names
from desra_core.detection.mask import assemble_pseudo_gt
from desra_core.errors import ImageError, UsageError
from desra_core.files.atomic import check_names
from desra_core.files.hashing import read_bytes
from desra_core.images.bit_depth import bgr8
from desra_core.images.codec import Photo, decode, encode_png
from desra_core.planning.keys import load_settings
from desra_core.workspace import Workspace
from desra_core.workspace.human_masks import mask_key, remember_exported
from desra_core.workspace.pictures import picture_files
from desra_core.workspace.records import REGION_FIELDS

Form = Literal["coco", "labelme", "folder"]

# Each holds a few copies of a decoded picture.
_THREADS = 4


class Exported(NamedTuple):
    """The contents of an export.

    Attributes:
        images, regions, by_people: Images, the regions of their masks, and how many of the masks are human masks.
        unpictured: Images of a mined corpus that were asked for but whose pictures were not kept.
        failures: Why others were left out.
        pictures: The folder in which a labelling tool finds the pictures.
    """

    images: int
    regions: int
    by_people: int
    unpictured: int
    failures: list[ImageError]
    pictures: Path


class _Written(NamedTuple):
    """An image whose files are written, its COCO annotations, and the key of its mask where that is the detector's."""

    image: Annotated
    annotations: list[dict[str, Any]]
    detected: str | None


def export_workspace(
    workspace: Workspace,
    output: Path,
    form: Form,
    *,
    everything: bool = False,
    worst: int | None = None,
    pictures: bool = True,
    overwrite: bool = False,
) -> Exported:
    """Export images with their masks: the human mask where there is one, else the detector's.

    Args:
        workspace: Of any run.
        output: A new folder, or that of an earlier export, which is brought up to date.
        form: ``coco``: annotations.json, and the GAN results as 8-bit RGB below images; ``labelme``: NAME.json beside
            the GAN result NAME.png; ``folder``: see above.
        everything, worst: As for `desra_core.annotations.selection.select_images`.
        pictures: Copy the GAN results; else ``coco`` names them as they lie in their own folder.
        overwrite: Replace files that were edited since they were exported.

    Raises:
        UsageError: The workspace has no run in it or no such image, or the folder may not be written; nothing has
            changed.
        ImageError: None of the images can be read, or the disk is full; nothing has changed.
    """
    settings, target = load_settings(workspace)
    mined = settings.verb == "mine"
    chosen = select_images(workspace, target, everything=everything, worst=worst)
    files = picture_files(workspace, settings.verb, [image.name for image in chosen])
    images = [image._replace(files=files[image.name]) for image in chosen]
    images = [image for image in images if not mined or image.files["gan_sr"].exists()]
    if not images:
        remedy = "give --all to export clean ones, which desra mine keeps with --keep all"
        raise UsageError(workspace.root, "has no image to export that is done", remedy)
    source = workspace.dataset("gan_sr", "").parent if mined else settings.sources.main
    with open_export(output, workspace) as folder:
        written, failures = _write_all(images, form, folder, pictures=pictures)
        if form == "coco":
            rows = []
            for image, annotations, _ in written:
                path = Path(f"{image.name}.png") if pictures else image.files["gan_sr"].relative_to(source)
                rows.append((path.as_posix(), image.shape, annotations))
            folder.write("annotations.json", coco_document(rows))
        elif form == "folder":
            folder.write("regions.csv", _regions_csv(image for image, *_ in written))
        detected = [(image, key) for image, _, key in written if key]
        document = {
            "workspace": str(workspace.root.resolve()),
            "format": form,
            "gan_sr_key": target.gan_sr_key,
            "images": {image.name: image.id for image, *_ in written},
            "masks": {image.name: key for image, key in detected},
        }
        remember_exported(workspace, ((image.id, key) for image, key in detected))
        folder.commit(document, overwrite=overwrite)
    return Exported(
        images=len(written),
        regions=sum(image.human.regions if image.human else len(image.regions) for image, *_ in written),
        by_people=sum(image.human is not None for image, *_ in written),
        unpictured=len(chosen) - len(images),
        failures=failures,
        pictures=source if not pictures else output / "images" if form == "coco" else output,
    )


def _write_all(
    images: Sequence[Annotated], form: Form, folder: ExportFolder, *, pictures: bool
) -> tuple[list[_Written], list[ImageError]]:
    """Write the files of all images on several threads; those that cannot be read end as errors."""
    with ThreadPoolExecutor(_THREADS) as pool:
        results = list(pool.map(partial(_write, form=form, folder=folder, pictures=pictures), images))
    written = [result for result in results if isinstance(result, _Written)]
    failures = [result for result in results if isinstance(result, ImageError)]
    if not written:
        raise failures[0]
    return written, failures


def _write(image: Annotated, *, form: Form, folder: ExportFolder, pictures: bool) -> _Written | ImageError:
    annotations: list[dict[str, Any]] = []
    try:
        if form == "coco":
            files = {f"images/{image.name}.png": _picture(image)} if pictures else {}
            annotations = coco_annotations(image)
        elif form == "labelme":
            files = {f"{image.name}.json": labelme_document(image), f"{image.name}.png": _picture(image)}
        else:
            files = _plain_files(image)
        detected = None if image.human else mask_key(image.mask())
        check_names(folder.root / path for path in files)
    except ImageError as error:
        return error
    for path, data in files.items():
        folder.write(path, data)
    return _Written(image, annotations, detected)


def _picture(image: Annotated) -> bytes:
    """Encode the GAN result as labelling tools read it: 8-bit RGB PNG (raises `ImageError`)."""
    return encode_png(bgr8(_decoded(image, "gan_sr").pixels)[:, :, ::-1])


def _plain_files(image: Annotated) -> dict[str, bytes]:
    """The files of an image in the format ``folder``, by relative path (raises `ImageError`)."""
    files = {f"masks/{image.name}.png": read_bytes(image.files["mask"])}
    if image.human is not None:
        files[f"human/{image.name}.png"] = read_bytes(image.human.path)
    for kind in ("lr", "mse_sr", "gan_sr", "pseudo_gt"):
        if kind in image.files:
            path = image.files[kind]
            files[f"{kind}/{image.name}{path.suffix}"] = read_bytes(path)
    if "pseudo_gt" not in image.files:
        mse_sr, gan_sr = _decoded(image, "mse_sr"), _decoded(image, "gan_sr")
        pseudo_gt = assemble_pseudo_gt(mse_sr.pixels, gan_sr.pixels, image.mask())
        files[f"pseudo_gt/{image.name}.png"] = encode_png(pseudo_gt, gan_sr.alpha)
    return files


def _decoded(image: Annotated, kind: str) -> Photo:
    """Decode a result of an image (raises `ImageError`, also where its size is not the recorded one)."""
    path = image.files[kind]
    photo = decode(read_bytes(path), path)
    if photo.pixels.shape[:2] != image.shape:
        height, width = photo.pixels.shape[:2]
        raise ImageError(path, f"is {width}x{height} and was {image.shape[1]}x{image.shape[0]}", "run again")
    return photo


def _regions_csv(images: Iterable[Annotated]) -> bytes:
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
