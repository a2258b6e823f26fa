"""Export the images and masks of a workspace to people and their tools."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

from desra_core.annotations.coco import coco_annotations, coco_document
from desra_core.annotations.export_folder import ExportFolder, open_export
from desra_core.annotations.folders import folder_files, regions_csv
from desra_core.annotations.labelme import labelme_document
from desra_core.annotations.selection import Annotated, select_images
from desra_core.errors import ImageError, UsageError
from desra_core.files.atomic import check_names
from desra_core.files.hashing import read_bytes
from desra_core.images.codec import bgr8, decode, encode_png
from desra_core.planning.keys import load_settings
from desra_core.workspace import Workspace
from desra_core.workspace.human_masks import mask_key, remember_exported
from desra_core.workspace.pictures import picture_files

Form = Literal["coco", "labelme", "folder"]

# Each holds a few copies of a decoded picture.
_THREADS = 4


class Exported(NamedTuple):
    """What an export holds.

    Attributes
    ----------
    images, regions, by_people
        Images, the regions of their masks, and how many of the masks are a person's.
    unpictured
        Images of a mined corpus that were asked for but whose pictures were not kept.
    failures
        Why others were left out.
    pictures
        The folder in which a labelling tool finds the pictures.
    """

    images: int
    regions: int
    by_people: int
    unpictured: int
    failures: list[ImageError]
    pictures: Path


class _Made(NamedTuple):
    """The files of an image by relative path, and its COCO annotations."""

    files: dict[str, bytes]
    annotations: list[dict[str, Any]]


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
    """Export images with their masks: the person's where there is one, else the detector's.

    Parameters
    ----------
    workspace
        Of any run.
    output
        A new folder, or that of an earlier export, which is brought up to date.
    form
        ``coco``: annotations.json, and the GAN results as 8-bit RGB below images; ``labelme``: NAME.json beside the
        GAN result NAME.png; ``folder``: see `desra_core.annotations.folders`.
    everything, worst
        As for `desra_core.annotations.selection.select_images`.
    pictures
        Copy the GAN results; else ``coco`` names them as they lie in their own folder.
    overwrite
        Replace files that were edited since they were exported.

    Raises
    ------
    UsageError
        The workspace has no run in it or no such image, or the folder may not be written; nothing has changed.
    ImageError
        None of the images can be read, or the disk is full; nothing has changed.
    """
    settings, target = load_settings(workspace)
    chosen = select_images(workspace, target, everything=everything, worst=worst)
    files = picture_files(workspace, settings.verb, [image.name for image in chosen])
    images = [image._replace(files=files[image.name]) for image in chosen]
    if settings.verb == "mine":
        images = [image for image in images if image.files["gan_sr"].exists()]
    if not images:
        remedy = "give --all to export clean ones, which desra mine keeps with --keep all"
        raise UsageError(workspace.root, "has no image to export that is done", remedy)
    source = workspace.dataset("gan_sr", "").parent if settings.verb == "mine" else settings.sources.main

    def coco(image: Annotated) -> _Made:
        made = {f"images/{image.name}.png": _picture(image)} if pictures else {}
        return _Made(made, coco_annotations(image))

    def labelme(image: Annotated) -> _Made:
        return _Made({f"{image.name}.json": labelme_document(image), f"{image.name}.png": _picture(image)}, [])

    makers: dict[Form, Callable[[Annotated], _Made]] = {
        "coco": coco,
        "labelme": labelme,
        "folder": lambda image: _Made(folder_files(image), []),
    }
    with open_export(output, workspace) as folder:
        written, failures = _write_all(images, makers[form], folder)
        if form == "coco":
            named = [
                (f"{image.name}.png" if pictures else image.files["gan_sr"].relative_to(source).as_posix(),
                 image.shape, annotations) for image, annotations, _ in written
            ]  # fmt: skip
            folder.write("annotations.json", coco_document(named))
        elif form == "folder":
            folder.write("regions.csv", regions_csv([image for image, *_ in written]))
        document = {
            "workspace": str(workspace.root.resolve()),
            "format": form,
            "gan_sr_key": target.gan_sr_key,
            "images": {image.name: image.id for image, *_ in written},
            "masks": {image.name: key for image, _, key in written if key},
        }
        remember_exported(workspace, ((image.id, key) for image, _, key in written if key))
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
    images: Sequence[Annotated], make: Callable[[Annotated], _Made], folder: ExportFolder
) -> tuple[list[_Written], list[ImageError]]:
    """Write the files of all images, on several threads; one that cannot be read is left out.

    Returns those that were written, and why others were not.
    """

    def attempt(image: Annotated) -> _Written | ImageError:
        try:
            made, detected = make(image), None if image.human else mask_key(image.mask())
            check_names(folder.root / path for path in made.files)
        except ImageError as error:
            return error
        for path, data in made.files.items():
            folder.write(path, data)
        return _Written(image, made.annotations, detected)

    with ThreadPoolExecutor(_THREADS) as pool:
        results = list(pool.map(attempt, images))
    written = [result for result in results if isinstance(result, _Written)]
    failures = [result for result in results if isinstance(result, ImageError)]
    if not written:
        raise failures[0]
    return written, failures


def _picture(image: Annotated) -> bytes:
    """The GAN result as labelling tools read it: 8-bit RGB PNG (raises `ImageError`)."""
    path = image.files["gan_sr"]
    pixels = decode(read_bytes(path), path).pixels
    if pixels.shape[:2] != image.shape:
        sizes = f"is {pixels.shape[1]}x{pixels.shape[0]} and was {image.shape[1]}x{image.shape[0]}"
        raise ImageError(path, sizes, "run again")
    return encode_png(bgr8(pixels)[:, :, ::-1])
