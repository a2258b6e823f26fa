"""Read masks that people corrected from LabelMe and COCO files, and check all of them against the workspace."""

import posixpath
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from desra_core.annotations.export import export_document, export_root
from desra_core.annotations.labelme import LabelMeFile, draw_shapes, read_labelme
from desra_core.annotations.selection import read_mask
from desra_core.detection.mask import Components
from desra_core.errors import DesraError, ImageError, UsageError
from desra_core.evaluation.coco_masks import CocoMask, decode_coco_mask, read_coco
from desra_core.files.content import digest, read_bytes
from desra_core.images.codec import encode_mask
from desra_core.images.scanning import ImageNames, normalized
from desra_core.planning.keys import load_settings
from desra_core.planning.plan import done_images
from desra_core.workspace import Workspace
from desra_core.workspace.human_masks import exported_masks, mask_key, read_human_masks
from desra_core.workspace.manifest import read_manifest

Origin = Literal["labelme", "coco"]

_THREADS = 4

Read = TypeVar("Read")


class Correction(NamedTuple):
    """A human mask, ready to be published.

    ``as_exported``: the mask equals a detector's mask that was exported for this image, and no person confirmed it. If
    the image has a human mask that counts and lies in the imported export, only that export's mask is compared.
    """

    source: str  # the file, and for COCO the image in it, for errors
    name: str  # of the image
    id: str
    png: bytes  # the mask, 1-bit
    pixels: int  # that are marked
    regions: int  # 8-connected
    changed: bool  # the mask differs from the detector's
    kinds: tuple[str, ...]  # of each shape
    left_out: tuple[str, ...]  # a phrase for each shape that does not count
    as_exported: bool


class _Source(NamedTuple):
    """The annotations of one image: where they come from, the names that the image may have, its size and shapes."""

    source: str
    names: Sequence[str]
    size: tuple[int | None, int | None]
    drawn: LabelMeFile | CocoMask


def read_corrections(
    workspace: Workspace, origin: Origin, path: Path, label: str | None = None, *, unchanged: bool = True
) -> tuple[list[Correction], list[DesraError]]:
    """Read the masks that people corrected in an export, or drew otherwise, and write nothing.

    Args:
        workspace: The workspace of the images.
        origin: ``labelme``: a folder of JSON files, or one of them. A file belongs to the picture that its
            ``imagePath`` names, else to the image at the file's own place. ``coco``: a JSON file.
        path: The folder or file.
        label: Only shapes with this label count, if given. By default all LabelMe shapes count; of a COCO file the
            shapes of the category `desra_core.evaluation.coco_masks.CATEGORY`, if it has one.
        unchanged: Whether masks that are as they were exported count too. Masks that do not count contradict none.

    Returns:
        The corrections, also those with a mask as it was exported, and the errors of the other annotations. After any
        error the caller should publish nothing.

    Raises:
        UsageError: The path holds no such files, or the workspace no run.
    """
    settings, target = load_settings(workspace)
    manifest = read_manifest(workspace)
    assert manifest is not None
    exported = export_document(export_root(path.absolute()) or path) or {}
    ids: dict[str, str] = exported.get("images", {})
    # The files of an export are named as the images were at the time of the export.
    names = ImageNames(sorted({*ids, *manifest["name"].filter(manifest["present"]).to_pylist()}))
    if origin == "labelme":
        pictures = [settings.sources.main, workspace.dataset("gan_sr", "").parent]
        sources, errors = _labelme(path, label, names, pictures)
    else:
        errors = []
        sources = [
            _Source(f"{path}, {name}", names.find(name), (mask.height, mask.width), mask)
            for name, mask in read_coco(path, category=label).items()
        ]
    renamed = _renamed(manifest, ids)
    exported["images"] = {renamed.get(name, name): key for name, key in ids.items()}
    sources = [
        source._replace(names=list(dict.fromkeys(renamed.get(name, name) for name in source.names)))
        for source in sources
    ]
    done = done_images(workspace, target).select(["name", "id", "height", "width"])
    wanted = pa.array({name for source in sources for name in source.names}, pa.string())
    rows = {row["name"]: row for row in done.filter(pc.is_in(done["name"], wanted)).to_pylist()}
    given = frozenset((ids[name], mask) for name, mask in exported.get("masks", {}).items())
    # The imported export counts too, because a workspace that was made anew has no list of earlier exports.
    known = exported_masks(workspace, (row["id"] for row in rows.values())) | given
    human = read_human_masks(workspace, target.gan_sr_key)
    # A person may replace a human mask by the detector's mask. Only this export shows whether that was done.
    shown = human.keys() & set(ids.values())
    written = {key for keys in exported.get("files", {}).values() for key in keys}

    def correct(source: _Source) -> Correction:
        row = _row_of(source, rows, exported, target.gan_sr_key, settings.verb)
        drawn, shape = source.drawn, (row["height"], row["width"])
        before = given if row["id"] in shown else known
        if isinstance(drawn, CocoMask):
            mask, kinds, left_out = decode_coco_mask(drawn), drawn.kinds, drawn.left_out
        else:
            mask, kinds, left_out = draw_shapes(drawn, shape, label), drawn.kinds(label), drawn.left_out(label)
            if row["id"] in shown and digest(read_bytes(drawn.path)) not in written:
                before = frozenset()
        png = encode_mask(mask)
        confirmed = row["id"] in human and human[row["id"]].path.read_bytes() == png
        return Correction(
            source=source.source,
            name=row["name"],
            id=row["id"],
            png=png,
            pixels=int(mask.sum()),
            regions=len(Components(mask)),
            changed=not np.array_equal(mask, read_mask(workspace.mask(row["name"]), shape)),
            kinds=kinds,
            left_out=left_out,
            as_exported=(row["id"], mask_key(mask)) in before and not confirmed,
        )

    corrections, failed = _on_threads(correct, sources)
    counting = [correction for correction in corrections if unchanged or not correction.as_exported]
    return corrections, [*errors, *failed, *_contradictions(counting)]


def _labelme(
    path: Path, label: str | None, names: ImageNames, pictures: Sequence[Path]
) -> tuple[list[_Source], list[DesraError]]:
    """Read the LabelMe files of a folder; ``pictures`` are folders whose files lie at the names of their images."""
    if not path.exists():
        raise UsageError(path, "does not exist", "name a folder of LabelMe files, or one of them")
    export = export_root(path.absolute())
    root = export or (path if path.is_dir() else path.parent).absolute()
    found = [path] if path.is_file() else sorted(path.rglob("*.json"))
    files = [file for file in found if file.is_file() and not file.name.startswith(".")]
    if not files:
        raise UsageError(path, "holds no LabelMe files", "name the folder of an export that was corrected")
    read, errors = _on_threads(read_labelme, files)
    labels = {name for file in read for name in file.labels}
    if label is not None and labels and label not in labels:
        raise UsageError("--label", f"no shape is labelled {label}", f"labels are {', '.join(sorted(labels))}")
    places = [file.path.absolute().relative_to(root).as_posix().removesuffix(".json") for file in read]
    # If no file lies at the place of an image in a folder, the files may have been collected from several folders.
    flat = export is None and not any("/" in place and names.exact(place) for place in places)
    sources = []
    for file, place in zip(read, places, strict=True):
        try:
            meant = _meant(file, place, names, pictures, flat=flat)
            sources.append(_Source(str(file.path), meant, (file.height, file.width), file))
        except ImageError as error:
            errors.append(error)
    return sources, errors


def _meant(file: LabelMeFile, place: str, names: ImageNames, pictures: Sequence[Path], *, flat: bool) -> list[str]:
    """List the images that a LabelMe file may belong to: by its imagePath, else by its place; the two must agree."""
    last = place.rpartition("/")[2]
    here = (not flat and names.exact(place)) or names.ending_like(last)
    meant = _of_image_path(file, place, names, pictures, flat=flat)
    if meant is None:
        return here
    stem = posixpath.splitext(file.image_path.replace("\\", "/"))[0].rpartition("/")[2]
    if here and meant and set(here).isdisjoint(meant) and normalized(stem) != normalized(last):
        reason = f"its place says image {here[0]}, its imagePath says {meant[0]}"
        raise ImageError(file.path, reason, "mend imagePath, or rename the file")
    return meant


def _of_image_path(
    file: LabelMeFile, place: str, names: ImageNames, pictures: Sequence[Path], *, flat: bool
) -> list[str] | None:
    """List the images that the imagePath of a LabelMe file may mean; None where it does not help."""
    if not file.image_path:
        return None
    named = file.path.absolute().parent / file.image_path
    try:
        picture = named.parent.resolve() / named.name
        there = picture.is_file()
    except (OSError, ValueError, RuntimeError):  # no path that this system could have
        there = False
    if there:
        for folder in filter(None, (export_root(picture.parent), *pictures)):
            if picture.is_relative_to(folder.resolve()):
                return names.exact(picture.relative_to(folder.resolve()).as_posix())
    beside = posixpath.normpath(posixpath.join(posixpath.dirname(place), file.image_path))
    if not flat and (found := names.exact(beside)):
        return found
    if "/" in file.image_path.replace("\\", "/"):
        return names.find(file.image_path) or ([] if flat else None)
    # The file lies at an image's place, and imagePath names no image beside it: file and picture were renamed together.
    return None if not flat and names.exact(place) else names.ending_like(file.image_path) or None


def _renamed(manifest: pa.Table, exported: Mapping[str, str]) -> dict[str, str]:
    """Map the names of images at their export to their present names, where these differ.

    A name changes when a file with the same name and another suffix appears or vanishes.
    """
    manifest = manifest.filter(manifest["present"])
    names: dict[str, set[str]] = {}
    for name, image_id in zip(manifest["name"].to_pylist(), manifest["id"].to_pylist(), strict=True):
        names.setdefault(image_id, set()).add(name)
    there = {name: names[image_id] for name, image_id in exported.items() if image_id in names}
    return {name: min(present) for name, present in there.items() if name not in present}


def _row_of(
    source: _Source, rows: dict[str, dict[str, Any]], exported: dict[str, Any], gan_sr_key: str | None, verb: str
) -> dict[str, Any]:
    """Find the image that annotations belong to, among the images that are done.

    Raises:
        ImageError: The image is ambiguous or not done, has another size, or its GAN result is not the exported one.
    """
    if len(source.names) > 1:
        field = "imagePath" if isinstance(source.drawn, LabelMeFile) else "file_name"
        reason = f"may be of {' or of '.join(source.names[:2])}"
        raise ImageError(source.source, reason, f"write the path of its picture, folders included, as {field}")
    row = rows.get(source.names[0]) if source.names else None
    if row is None:
        reason = "matches no finished image of this workspace"
        raise ImageError(source.source, reason, f"remove it, name the right --workspace, or run desra {verb} first")
    height, width = source.size[0] or row["height"], source.size[1] or row["width"]
    if (height, width) != (row["height"], row["width"]):
        reason = f"is of {width}x{height} px but the image has {row['width']}x{row['height']}"
        raise ImageError(source.source, reason, "annotate pictures of the size of the GAN results")
    then = exported.get("images", {}).get(row["name"])
    if then is not None and (then, exported.get("gan_sr_key")) != (row["id"], gan_sr_key):
        reason = "was exported from another result than the workspace holds"
        raise ImageError(source.source, reason, "export again, and correct that")
    return row


def _contradictions(corrections: Sequence[Correction]) -> list[DesraError]:
    """List errors for images that were corrected twice: under one name, or as copies with different masks."""
    names = Counter(correction.name for correction in corrections)
    first: dict[str, Correction] = {}
    errors: list[DesraError] = []
    for correction in corrections:
        before = first.setdefault(correction.id, correction)
        if before is not correction and (before.png != correction.png or names[correction.name] > 1):
            reason = f"is of the same image as {before.source}"
            errors.append(ImageError(correction.source, reason, "keep one of them"))
    return errors


def _on_threads(read: Callable[[Any], Read], items: Sequence[Any]) -> tuple[list[Read], list[DesraError]]:
    """Apply a function to items; return its results, and the errors that it raised."""

    def attempt(item: Any) -> Read | DesraError:
        try:
            return read(item)
        except DesraError as error:
            return error

    with ThreadPoolExecutor(_THREADS) as pool:
        results = list(pool.map(attempt, items))
    return (
        [result for result in results if not isinstance(result, DesraError)],
        [result for result in results if isinstance(result, DesraError)],
    )
