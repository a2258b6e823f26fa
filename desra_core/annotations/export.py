"""Export the images and masks of a workspace to labelling tools, or as plain folders.

The mask of an image is the human mask where there is one, else the detector's.
An export is written whole or not at all, and never over files that a person has edited since. A document beside the
files names the exported images and results, and has the hash of each file.

The format ``coco`` is one file with one category, compressed run-length encodings, and severities as scores. Fields
that COCO does not have are in ``attributes``, which FiftyOne and CVAT show: the ADE20K class, severity and mean
similarity, and whether a person or the detector drew the mask.

The format ``folder`` holds, for any other tool::

    masks/NAME.png       the detector's masks, 1-bit
    human/NAME.png       human masks, of images that have one
    gan_sr/, mse_sr/     copies of the results' files; lr/ has copies of the photos
    pseudo_gt/NAME.png   the GAN result with the masked places taken from the MSE result
    regions.csv          the detector's regions
"""

import contextlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from desra_core.annotations.labelme import labelme_document, labelme_shape
from desra_core.detection.class_weights import class_name
from desra_core.detection.mask import Components, assemble_pseudo_gt, severity_text
from desra_core.errors import ImageError, UsageError
from desra_core.evaluation.coco_masks import CATEGORY
from desra_core.evaluation.table import as_csv, counted
from desra_core.files import check_names, digest, read_bytes, read_checked, read_json, replace_file, storage_errors
from desra_core.images.codec import Mask, Photo, bgr8, check_size, decode, decode_mask, encode_png
from desra_core.planning.plan import done_images, load_settings
from desra_core.workspace import Workspace
from desra_core.workspace.human_masks import HumanMask, mask_key, read_human_masks, remember_exported
from desra_core.workspace.manifest import picture_files, read_manifest
from desra_core.workspace.products import REGION_FIELDS, Target, checksums_of

Form = Literal["coco", "labelme", "folder"]

# Each thread holds a few copies of a decoded picture.
_THREADS = 4
# This name is free, because names of images do not begin with a dot.
_DOCUMENT = ".desra-export.json"


class Annotation(NamedTuple):
    """One 8-connected component of a mask."""

    x: int  # left, in pixels of the image
    y: int  # top
    crop: Mask  # (h, w) bool
    region: dict[str, Any] | None = None  # the record of the detector's region; None where a person drew it


class MaskedImage(NamedTuple):
    """An image to be exported."""

    name: str  # the image's first name
    id: str
    shape: tuple[int, int]
    regions: list[dict[str, Any]]  # the records of the detector's regions
    human: HumanMask | None
    files: dict[str, Path]  # the image's pictures by kind
    checksums: dict[str, str]  # of those that runs have written, as records have them

    def content(self, kind: str) -> bytes:
        """Read the file of a picture (raises `ImageError`: it cannot be read, or is not as a run wrote it)."""
        return read_checked(self.files[kind], self.checksums.get("masks" if kind == "mask" else f"dataset/{kind}"))

    def mask(self) -> Mask:
        """Read the human mask, or else the detector's.

        Raises:
            ImageError: The mask cannot be read, or has another size than the image.
        """
        if self.human:
            return self.human.read()
        return decode_sized_mask(self.content("mask"), self.files["mask"], self.shape)

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


class Exported(NamedTuple):
    """The contents of an export."""

    images: int
    regions: int  # regions of the exported masks
    by_people: int  # images whose exported mask is a human mask
    unpictured: int  # images of a mined corpus that were left out because their pictures were not kept
    failures: list[ImageError]  # errors of the other images that were left out
    pictures: Path  # the folder in which a labelling tool finds the pictures


class ExportFolder:
    """An export that is being written, by one thread or several."""

    def __init__(self, root: Path, stage: Path) -> None:
        self.root = root
        self._stage = stage
        self._digests: dict[str, str] = {}

    def write(self, path: str, data: bytes) -> None:
        """Write a file at a relative path (raises `desra_core.errors.TransientError`)."""
        with storage_errors(self.root / path):
            (self._stage / path).parent.mkdir(parents=True, exist_ok=True)
            (self._stage / path).write_bytes(data)
        self._digests[path] = digest(data)

    def commit(self, document: dict[str, Any], *, overwrite: bool) -> None:
        """Put all files in place, and remove the other files of the earlier export.

        Args:
            document: Further entries for the document of the export.
            overwrite: Replace files that were edited since they were exported.

        Raises:
            UsageError: A file was edited, and may not be replaced.
            TransientError: The disk is full or failed.
        """
        files = {path: [self._digests[path]] for path in sorted(self._digests)}
        known: dict[str, list[str]] = (export_document(self.root) or {}).get("files", {})
        # A file with its old or its new hash is unedited: an update that was killed leaves files of both kinds.
        both = {path: sorted({*known.get(path, []), *files.get(path, [])}) for path in known.keys() | files.keys()}
        known_files = [] if overwrite else [(self.root / path, both[path]) for path in sorted(both)]
        edited = [file for file, digests in known_files if file.exists() and digest(read_bytes(file)) not in digests]
        if edited:
            more = f", like {counted(len(edited) - 1, 'other file')}" if len(edited) > 1 else ""
            remedy = "import it first, then export to another folder, or with --overwrite"
            raise UsageError(edited[0], f"was edited since it was exported{more}", remedy)
        with storage_errors(self.root):
            if not self.root.exists() or not any(self.root.iterdir()):
                _write_document(self._stage, document | {"files": files})
                if self.root.exists():
                    self.root.rmdir()
                self._stage.rename(self.root)
                return
            _write_document(self.root, document | {"files": both})
            for path in files:
                (self.root / path).parent.mkdir(parents=True, exist_ok=True)
                (self._stage / path).replace(self.root / path)
            for path in known.keys() - files.keys():
                (self.root / path).unlink(missing_ok=True)
            _write_document(self.root, document | {"files": files})
            for folder in sorted((path for path in self.root.rglob("*") if path.is_dir()), reverse=True):
                with contextlib.suppress(OSError):  # not empty
                    folder.rmdir()


class _Written(NamedTuple):
    """An image whose files are written, its COCO annotations, and the key of its detected mask (None: human mask)."""

    image: MaskedImage
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
        workspace: A workspace with any kind of run in it.
        output: A new folder, or the folder of an earlier export, which is brought up to date.
        form: ``coco``: annotations.json, and the GAN results as 8-bit RGB below images; ``labelme``: NAME.json beside
            the GAN result NAME.png; ``folder``: the files that the docstring of this module lists.
        everything, worst: As for `select_images`.
        pictures: Copy the GAN results. Without copies, ``coco`` names the files in the folder of the GAN results.
        overwrite: Replace files that were edited since they were exported.

    Raises:
        UsageError: The workspace has no run in it or no such image, or the folder may not be written; nothing has
            changed.
        ImageError: None of the images can be read, or the disk is full; nothing has changed.
    """
    settings, target = load_settings(workspace)
    mined, by_viewers = settings.verb == "mine", settings.severity_model is not None
    chosen = select_images(workspace, target, everything=everything, worst=worst)
    images = with_pictures(workspace, chosen, mined=mined)
    if not images:
        remedy = "give --all to export clean ones, which desra mine keeps with --keep all"
        raise UsageError(workspace.root, "has no image to export that is done", remedy)
    source = workspace.dataset("gan_sr", "").parent if mined else settings.sources.main
    with _open_export(output, workspace) as folder:
        with ThreadPoolExecutor(_THREADS) as pool:
            write = partial(_write, form=form, folder=folder, pictures=pictures, by_viewers=by_viewers)
            results = list(pool.map(write, images))
        written = [result for result in results if isinstance(result, _Written)]
        failures = [result for result in results if isinstance(result, ImageError)]
        if not written:
            raise failures[0]
        if form == "coco":
            names = [f"{one.image.name}.png" if pictures else
                     one.image.files["gan_sr"].relative_to(source).as_posix() for one in written]  # fmt: skip
            folder.write("annotations.json", _coco_document(names, written))
        elif form == "folder":
            # The detector's regions, with the fields of desra_core.planning.plan.REGIONS.
            regions = [region | {"image": one.image.name, "class_name": class_name(region["dominant_class"])}
                       for one in written for region in one.image.regions]  # fmt: skip
            columns = ["image", *(field.name for field in REGION_FIELDS), "class_name"]
            folder.write("regions.csv", as_csv(regions, columns).encode())
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
    copied = output / "images" if form == "coco" else output
    return Exported(
        images=len(written),
        regions=sum(image.human.regions if image.human else len(image.regions) for image, *_ in written),
        by_people=sum(image.human is not None for image, *_ in written),
        unpictured=len(chosen) - len(images),
        failures=failures,
        pictures=copied if pictures else source,
    )


@contextlib.contextmanager
def _open_export(root: Path, workspace: Workspace) -> Iterator[ExportFolder]:
    """Begin an export to a folder, in which nothing changes before `ExportFolder.commit` (raises `UsageError`)."""
    if root.resolve().is_relative_to(workspace.root.resolve()):
        raise UsageError(root, "lies inside the workspace", "name a folder outside of it as --output")
    if root.exists() and not root.is_dir():
        raise UsageError(root, "is a file", "name a folder as --output")
    if root.is_dir() and any(root.iterdir()):
        document = export_document(root)
        if document is None:
            raise UsageError(root, "is a folder with other things in it", "name a new folder as --output")
        if document.get("workspace") != str(workspace.root.resolve()):
            raise UsageError(root, f"holds an export of {document.get('workspace')}", "name a new folder as --output")
    stage = root.with_name(f".{root.name}.unfinished")
    with storage_errors(root):
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir(parents=True)
    try:
        yield ExportFolder(root, stage)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def export_document(folder: Path) -> dict[str, Any] | None:
    """Read the document of an export; None where the folder holds none."""
    document = read_json(folder / _DOCUMENT)
    return document if isinstance(document, dict) else None


def export_root(path: Path) -> Path | None:
    """Find the folder of the export that a file or folder belongs to, if any."""
    return next((folder for folder in (path, *path.parents) if (folder / _DOCUMENT).is_file()), None)


def decode_sized_mask(data: bytes, path: Path, shape: tuple[int, int]) -> Mask:
    """Decode the mask in a file of an image of ``(H, W)``.

    Raises:
        ImageError: It is no mask, or has another size.
    """
    mask = decode_mask(data, path)
    check_size(mask, path, "delete it, and run again", shape)
    return mask


def count_human_masks(workspace: Workspace, gan_sr_key: str | None) -> int:
    """Count the images that are present and have a human mask that counts."""
    manifest, human = read_manifest(workspace), read_human_masks(workspace, gan_sr_key)
    return len(human.keys() & set(manifest["id"].filter(manifest["present"]).to_pylist()))


def select_images(workspace: Workspace, target: Target, *, everything: bool, worst: int | None) -> list[MaskedImage]:
    """Choose images, sorted by name; an image with copies has its first name.

    Args:
        workspace, target: The workspace, and the cache keys of its latest run.
        everything: Take all images that are done, not only those with artifacts or a human mask.
        worst: Take only this many, the most severe.
    """
    rows = done_images(workspace, target)
    human = read_human_masks(workspace, target.gan_sr_key)
    if not everything:
        has_human = pc.is_in(rows["id"], pa.array(human, pa.string()))
        rows = rows.filter(pc.or_(pc.greater(rows["artifact_pixels"], 0), has_human))
    found: dict[str, MaskedImage] = {}
    for row in rows.to_pylist():
        shape = (row["height"], row["width"])
        image = MaskedImage(row["name"], row["id"], shape, row["regions"] or [], human.get(row["id"]), {}, {})
        found.setdefault(image.id, image)

    def order(image: MaskedImage) -> tuple[float, str]:
        return -sum(region["severity"] for region in image.regions), image.name

    return sorted(sorted(found.values(), key=order)[:worst], key=lambda image: image.name)


def with_pictures(workspace: Workspace, chosen: Sequence[MaskedImage], *, mined: bool) -> list[MaskedImage]:
    """Find the pictures of images; of a mined corpus, those whose results were not kept are left out."""
    files = picture_files(workspace, "mine" if mined else "detect", [image.name for image in chosen])
    known = checksums_of(workspace, (image.id for image in chosen))
    images = [image._replace(files=files[image.name], checksums=known.get(image.id, {})) for image in chosen]
    return [image for image in images if not mined or image.files["gan_sr"].exists()]


def _write(
    image: MaskedImage, *, form: Form, folder: ExportFolder, pictures: bool, by_viewers: bool
) -> _Written | ImageError:
    """Write the files of an image; return the error of an image that cannot be read."""
    annotations: list[dict[str, Any]] = []
    try:
        if form == "coco":
            files = {f"images/{image.name}.png": _picture(image)} if pictures else {}
            annotations = [_coco_annotation(annotation, image.shape) for annotation in image.annotations()]
        elif form == "labelme":
            shapes = []
            for x, y, crop, region in image.annotations():
                description = "drawn by a person"
                if region:
                    worth = severity_text(region["severity"], by_viewers=by_viewers)
                    numbers = f"{worth}, mean similarity {region['mean_similarity']:.3f}"
                    description = ", ".join(filter(None, (class_name(region["dominant_class"]), numbers)))
                shapes.append(labelme_shape(x, y, crop, description))
            document = labelme_document(image.name, image.shape, shapes)
            files = {f"{image.name}.json": document, f"{image.name}.png": _picture(image)}
        else:
            files = _plain_files(image)
        detected = None if image.human else mask_key(image.mask())
        check_names(folder.root / path for path in files)
    except ImageError as error:
        return error
    for path, data in files.items():
        folder.write(path, data)
    return _Written(image, annotations, detected)


def _picture(image: MaskedImage) -> bytes:
    """Encode the GAN result as labelling tools read it: 8-bit RGB PNG."""
    return encode_png(bgr8(decode_result(image, "gan_sr", as_stored=False).pixels)[:, :, ::-1])


def _plain_files(image: MaskedImage) -> dict[str, bytes]:
    """Read or make the files of an image in the format ``folder``, by relative path."""
    files = {f"masks/{image.name}.png": image.content("mask")}
    if image.human is not None:
        files[f"human/{image.name}.png"] = image.human.content()
    for kind in ("lr", "mse_sr", "gan_sr", "pseudo_gt"):
        if path := image.files.get(kind):
            files[f"{kind}/{image.name}{path.suffix}"] = image.content(kind)
    if "pseudo_gt" not in image.files:
        mse_sr, gan_sr = decode_result(image, "mse_sr"), decode_result(image, "gan_sr")
        pseudo_gt = assemble_pseudo_gt(mse_sr.pixels, gan_sr.pixels, image.mask())
        files[f"pseudo_gt/{image.name}.png"] = encode_png(pseudo_gt, gan_sr.alpha)
    return files


def decode_result(image: MaskedImage, kind: str, *, as_stored: bool = True) -> Photo:
    """Decode a result of an image, and check its size (raises `ImageError`)."""
    path = image.files[kind]
    photo = decode(image.content(kind), path, as_stored=as_stored)
    height, width = photo.pixels.shape[:2]
    if (height, width) != image.shape:
        raise ImageError(path, f"is {width}x{height} and was {image.shape[1]}x{image.shape[0]}", "run again")
    return photo


def _coco_document(names: Iterable[str], written: Iterable[_Written]) -> bytes:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for name, one in zip(names, written, strict=True):
        height, width = one.image.shape
        images.append({"id": len(images) + 1, "file_name": name, "width": width, "height": height})
        for annotation in one.annotations:
            ids = {"id": len(annotations) + 1, "image_id": len(images), "category_id": 1}
            annotations.append(ids | annotation)
    document = {
        "info": {"description": "Artifacts of a GAN super-resolution model, found by desra"},
        "licenses": [],
        "categories": [{"id": 1, "name": CATEGORY, "supercategory": ""}],
        "images": images,
        "annotations": annotations,
    }
    return json.dumps(document, indent=1).encode()


def _coco_annotation(annotation: Annotation, shape: tuple[int, int]) -> dict[str, Any]:
    """Describe a component of a mask as a COCO annotation, without ids."""
    from pycocotools import mask as coco

    x, y, crop, region = annotation
    mask = np.zeros(shape, np.uint8, order="F")  # column by column in memory, as run lengths are
    mask[y : y + crop.shape[0], x : x + crop.shape[1]] = crop
    attributes: dict[str, Any] = {"mask_by": "detector" if region else "person"}
    score = {}
    if region:
        if name := class_name(region["dominant_class"]):
            attributes["class"] = name
        attributes |= {"mean_similarity": region["mean_similarity"], "severity": region["severity"]}
        score = {"score": region["severity"]}
    return {
        "segmentation": {"size": list(shape), "counts": coco.encode(mask)["counts"].decode()},
        "bbox": [x, y, *crop.shape[::-1]],
        "area": int(crop.sum()),
        # 0, because tools that judge results leave out crowds.
        "iscrowd": 0,
        **score,
        "attributes": attributes,
    }


def _write_document(folder: Path, document: dict[str, Any]) -> None:
    replace_file(folder / _DOCUMENT, json.dumps(document, indent=1).encode())
