"""Read masks that people corrected, publish them as the workspace's human masks, and undo an import.

All masks of LabelMe files, of a COCO file or of a review are checked against the workspace before any is published.
Publishing a human mask also updates the pseudo-GT. Each import leaves a table of the masks that it replaced, so that
the latest import can be undone; a review does where it has replaced a mask that no review had made.
"""

import posixpath
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from desra_core.annotations.export import decode_sized_mask, export_document, export_root
from desra_core.annotations.labelme import LabelMeFile, draw_shapes, read_labelme
from desra_core.detection.mask import Components, assemble_pseudo_gt
from desra_core.errors import DesraError, ImageError, UsageError
from desra_core.evaluation.coco_masks import CocoMask, decode_coco_mask, read_coco
from desra_core.files import checksum, digest, paths_in, read_bytes, storage_errors
from desra_core.images.codec import Mask, decode, decode_mask, encode_mask
from desra_core.images.scanning import ImageNames, normalized
from desra_core.planning.plan import done_images, load_settings, publish_tables
from desra_core.workspace import DATASET, Workspace, read_table
from desra_core.workspace.human_masks import HUMAN_MASKS, exported_masks, mask_key, read_human_masks
from desra_core.workspace.manifest import note_checksums, read_manifest
from desra_core.workspace.products import Target

Origin = Literal["labelme", "coco"]

# Each thread may hold both results of an image.
_THREADS = 4
# The human mask at each name before the import, nulls where there was none; ``image`` is the id of the name's image.
_REPLACED = HUMAN_MASKS.append(pa.field("png", pa.binary())).append(pa.field("image", pa.string()))
# In a sorted list, this name comes after all numbered tables.
_UNFINISHED = "unfinished.parquet"

Read = TypeVar("Read")


class Correction(NamedTuple):
    """A human mask, ready to be published."""

    source: str  # the file, and for COCO the image in it, for errors
    name: str  # the image's name
    id: str  # the image's id
    png: bytes  # the mask, 1-bit
    pixels: int  # number of marked pixels
    regions: int  # number of 8-connected regions
    changed: bool  # the mask differs from the detector's
    kinds: tuple[str, ...]  # the kind of each shape that counts
    left_out: tuple[str, ...]  # a phrase for each shape that does not count
    # Nobody changed the mask since it was exported, nor confirmed it. `read_corrections` says with which exports it is
    # compared.
    as_exported: bool


class ReviewedMask(NamedTuple):
    """A mask that `desra review` has made of answers, and the result on which raters have given these."""

    name: str  # of the image
    id: str  # of the image
    gan_sr_key: str | None  # of the model
    mask: Mask  # ``(H, W)`` bool
    kinds: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def height(self) -> int:
        """Height of the image, in pixels."""
        return int(self.mask.shape[0])

    @property
    def width(self) -> int:
        """Width of the image, in pixels."""
        return int(self.mask.shape[1])


class _Source(NamedTuple):
    """The annotations of one image, the file that they come from, and the names that the image may have."""

    source: str
    names: Sequence[str]
    drawn: LabelMeFile | CocoMask | ReviewedMask


class ImportSummary(NamedTuple):
    """Counts of the images that an import gave a mask."""

    images: int  # all of them
    changed: int  # images whose mask is not the detector's
    clean: int  # images whose mask is empty
    renewed: int  # images whose pseudo-GT was made again
    waiting: int  # images whose mask is not empty, but whose pictures are left to the next run


class UndoSummary(NamedTuple):
    """Counts of the image names of an import that was undone."""

    names: int  # where masks were taken back
    restored: int  # where an older human mask counts again
    renewed: int  # where the dataset's pictures were made again or removed


def read_corrections(
    workspace: Workspace, origin: Origin, path: Path, label: str | None = None, *, unchanged: bool = True
) -> tuple[list[Correction], list[DesraError]]:
    """Read the masks that people corrected in an export, or drew elsewhere; write nothing.

    Args:
        workspace: The workspace of the images.
        origin: ``labelme``: a folder of JSON files, or one of them. A file belongs to the picture that its
            ``imagePath`` names, else to the image at the file's own place. ``coco``: a JSON file.
        path: The folder or file.
        label: Only shapes with this label count, if given. By default all LabelMe shapes count; of a COCO file the
            shapes of the category `desra_core.evaluation.coco_masks.CATEGORY`, if it has one.
        unchanged: Whether masks that are as exported count too. A mask that does not count contradicts no other.

    Returns:
        The corrections, including those with a mask as exported, and the errors of the annotations that gave no
        correction. After any error the caller should publish nothing.

    Raises:
        UsageError: The path holds no such files, or the workspace has no run in it.
    """
    settings, _ = load_settings(workspace)
    manifest = read_manifest(workspace)
    present = manifest.filter(manifest["present"])
    exported = export_document(export_root(path.absolute()) or path) or {}
    ids: dict[str, str] = exported.get("images", {})
    # The files of an export are named as the images were at the time of the export.
    names = ImageNames(sorted({*ids, *present["name"].to_pylist()}))
    if origin == "labelme":
        pictures = [settings.sources.main, workspace.dataset("gan_sr", "").parent]
        sources, errors = _labelme(path, label, names, pictures)
    else:
        masks = read_coco(path, category=label)
        sources, errors = [_Source(f"{path}, {name}", names.find(name), mask) for name, mask in masks.items()], []
    renamed = _renamed(_names_and_ids(present), ids.items())
    exported["images"] = {renamed.get(name, name): image_id for name, image_id in ids.items()}
    sources = [
        source._replace(names=list(dict.fromkeys(renamed.get(name, name) for name in source.names)))
        for source in sources
    ]
    corrections, failed = _corrections(workspace, sources, exported, ids)
    counting = [correction for correction in corrections if unchanged or not correction.as_exported]
    return corrections, [*errors, *failed, *_contradictions(counting)]


def reviewed_corrections(
    workspace: Workspace, masks: Iterable[ReviewedMask]
) -> tuple[list[Correction], list[DesraError]]:
    """Check the masks of a review as `read_corrections` does (raises as that); returns the same."""
    sources = [_Source(f"the review of {one.name}", [one.name], one) for one in masks]
    return _corrections(workspace, sources, {}, {})


def _corrections(
    workspace: Workspace, sources: Sequence[_Source], exported: dict[str, Any], ids: dict[str, str]
) -> tuple[list[Correction], list[DesraError]]:
    """Make corrections of annotations, given the document of their export, and ids by the names that are in there."""
    settings, target = load_settings(workspace)
    done = done_images(workspace, target).select(["name", "id", "height", "width"])
    wanted = pa.array({name for source in sources for name in source.names}, pa.string())
    rows = {row["name"]: row for row in done.filter(pc.is_in(done["name"], wanted)).to_pylist()}
    # A mask is as exported where it is that of this export or of an earlier one. This export counts even where the
    # workspace, made anew, has no list of earlier exports.
    of_this_export = frozenset((ids[name], mask) for name, mask in exported.get("masks", {}).items())
    of_any_export = exported_masks(workspace, (row["id"] for row in rows.values())) | of_this_export
    human = read_human_masks(workspace, target.gan_sr_key)
    # Of images with a human mask, only this export counts: a person may turn a human mask back into the detector's mask
    # of an earlier export.
    with_human_mask = human.keys() & set(ids.values())
    exported_files = {key for keys in exported.get("files", {}).values() for key in keys}

    def correct(source: _Source) -> Correction:
        row = _row_of(source, rows, exported, target.gan_sr_key, settings.verb)
        drawn, shape = source.drawn, (row["height"], row["width"])
        path = workspace.mask(row["name"])
        only_this = row["id"] in with_human_mask
        unchanged_masks = of_this_export if only_this else of_any_export
        if isinstance(drawn, ReviewedMask):
            mask = drawn.mask
        elif isinstance(drawn, CocoMask):
            mask = decode_coco_mask(drawn)
        else:
            mask = draw_shapes(drawn, shape)
            if only_this and digest(read_bytes(drawn.path)) not in exported_files:
                unchanged_masks = frozenset()  # a person has saved this file, so its mask counts, changed or not
        png = encode_mask(mask)
        confirmed = row["id"] in human and read_bytes(human[row["id"]].path) == png
        return Correction(
            source=source.source,
            name=row["name"],
            id=row["id"],
            png=png,
            pixels=int(mask.sum()),
            regions=len(Components(mask)),
            changed=not np.array_equal(mask, decode_sized_mask(read_bytes(path), path, shape)),
            kinds=drawn.kinds,
            left_out=drawn.left_out,
            as_exported=(row["id"], mask_key(mask)) in unchanged_masks and not confirmed,
        )

    return _on_threads(correct, sources)


def publish_corrections(
    workspace: Workspace,
    corrections: Sequence[Correction],
    *,
    withdrawn: Iterable[str] = (),
    reviewed: Collection[str] | None = None,
) -> ImportSummary:
    """Publish human masks at all names of their images. The workspace must be locked.

    Args:
        workspace: The workspace.
        corrections: The masks.
        withdrawn: Ids of images whose human mask goes.
        reviewed: Of a review, the checksums of all masks that reviews have made. Their answers are their undo, so only
            other masks that are replaced can be brought back by `undo_import`. None of an import.

    Raises:
        TransientError: The disk is full or failed. The same import, repeated, completes the work.
    """
    _, target = load_settings(workspace)
    manifest = read_manifest(workspace)
    gone = set(withdrawn)
    names: dict[str, list[str]] = {key: [] for key in (*(one.id for one in corrections), *gone)}  # vanished names too
    for name, image_id in _names_and_ids(manifest):
        if image_id in names:
            names[image_id].append(name)
    replaced = names
    if reviewed is not None:
        others = {name for name, row in _human_rows(workspace).items() if row["checksum"] not in reviewed}
        replaced = {key: [name for name in each if name in others] for key, each in names.items()}
    remembered = reviewed is None or any(replaced.values())
    if remembered:
        _remember(workspace, replaced)
    masks: dict[str, bytes | None] = {name: None for image_id in gone for name in names[image_id]}
    rows: dict[str, dict[str, Any]] = {}
    for one in corrections:
        row = {"id": one.id, "gan_sr_key": target.gan_sr_key, "pixels": one.pixels, "regions": one.regions}
        row["checksum"] = checksum(one.png)
        masks |= dict.fromkeys(names[one.id], one.png)
        rows |= {name: row | {"name": name} for name in names[one.id]}
    renewed = _replace_masks(workspace, target, masks, rows)
    if remembered:
        *earlier, unfinished = paths_in(workspace.imports, "*.parquet")
        number = int(earlier[-1].stem) + 1 if earlier else 1
        with storage_errors(unfinished):
            unfinished.rename(unfinished.with_name(f"{number:06d}.parquet"))
    marked = [one for one in corrections if one.pixels]
    return ImportSummary(
        images=len(corrections),
        changed=sum(one.changed for one in corrections),
        clean=len(corrections) - len(marked),
        renewed=len({rows[name]["id"] for name, whole in renewed.items() if whole and name in rows}),
        waiting=sum(target.super_resolves and not _has_pictures(workspace, one.name) for one in marked),
    )


def undo_import(workspace: Workspace) -> UndoSummary:
    """Undo the latest import that is left: restore human masks and dataset. The workspace must be locked.

    Raises:
        UsageError: There is no import to undo.
        TransientError: The disk is full or failed. A second call completes the work.
    """
    _, target = load_settings(workspace)
    latest = max(paths_in(workspace.imports, "*.parquet"), default=None)
    if latest is None:
        raise UsageError(workspace.root, "holds no import that could be taken back", "bring masks with desra import")
    replaced = read_table(latest, _REPLACED).to_pylist()
    now = [(name, row["id"]) for name, row in _human_rows(workspace).items()]
    renamed = _renamed(now, [(row["name"], row["image"]) for row in replaced])
    names = [renamed.get(row["name"], row["name"]) for row in replaced]
    rows = {name: row | {"name": name} for name, row in zip(names, replaced, strict=True)}
    masks: dict[str, bytes | None] = {name: row.pop("png") for name, row in rows.items()}
    renewed = _replace_masks(workspace, target, masks, {name: row for name, row in rows.items() if masks[name]})
    latest.unlink()
    counting = sum(bool(png) and rows[name]["gan_sr_key"] == target.gan_sr_key for name, png in masks.items())
    return UndoSummary(len(masks), counting, len(renewed))


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
    read, errors = _on_threads(partial(read_labelme, label=label), files)
    labels = {str(shape.get("label")) for file in read for shape in file.shapes}
    if label is not None and labels and label not in labels:
        raise UsageError("--label", f"no shape is labelled {label}", f"labels are {', '.join(sorted(labels))}")
    places = [file.path.absolute().relative_to(root).as_posix().removesuffix(".json") for file in read]
    # A file at set1/a.json is of image set1/a. But a person may have collected files of several folders in one folder;
    # then the place a.json does not show the folder of the image. The folders of an export always count. Other folders
    # count only if at least one file in a folder lies at the place of an image.
    folders_count = export is not None or any("/" in place and names.exact(place) for place in places)
    sources = []
    for file, place in zip(read, places, strict=True):
        try:
            sources.append(_Source(str(file.path), _meant(file, place, names, pictures, folders_count), file))
        except ImageError as error:
            errors.append(error)
    return sources, errors


def _meant(
    file: LabelMeFile, place: str, names: ImageNames, pictures: Sequence[Path], folders_count: bool
) -> list[str]:
    """List the images that a LabelMe file may belong to, by imagePath or else by place; raise where these disagree."""
    at_place = names.exact(place) if folders_count else []
    last = place.rpartition("/")[2]
    here = at_place or names.ending_like(last)
    meant = _of_image_path(file, place, at_place, names, pictures, folders_count)
    if meant is None:
        return here
    stem = posixpath.splitext(file.image_path.replace("\\", "/"))[0].rpartition("/")[2]
    if here and meant and set(here).isdisjoint(meant) and normalized(stem) != normalized(last):
        reason = f"its place says image {here[0]}, its imagePath says {meant[0]}"
        raise ImageError(file.path, reason, "mend imagePath, or rename the file")
    return meant


def _of_image_path(
    file: LabelMeFile, place: str, at_place: list[str], names: ImageNames, pictures: Sequence[Path], folders_count: bool
) -> list[str] | None:
    """List the images that the imagePath of a LabelMe file may mean: None where only the place counts, [] for no image.

    The imagePath is tried as the path of a picture, as a path from the file's own place among images, as the end of a
    path on another machine, and as a mere file name, in this order.
    """
    if not file.image_path:
        return None
    named = file.path.absolute().parent / file.image_path
    try:
        picture = named.parent.resolve() / named.name
        there = picture.is_file()
    except (OSError, ValueError, RuntimeError):  # the text is no valid path on this system
        there = False
    if there:
        for folder in filter(None, (export_root(picture.parent), *pictures)):
            if picture.is_relative_to(folder.resolve()):
                return names.exact(picture.relative_to(folder.resolve()).as_posix())
    beside = posixpath.normpath(posixpath.join(posixpath.dirname(place), file.image_path))
    if folders_count and (found := names.exact(beside)):
        return found
    if "/" in file.image_path.replace("\\", "/"):
        found = names.find(file.image_path)
        return None if folders_count and not found else found
    # Where the file lies at an image's place, and no image beside it has this name, file and picture were renamed.
    return None if at_place else (names.ending_like(file.image_path) or None)


def _names_and_ids(manifest: pa.Table) -> Iterable[tuple[str, str]]:
    return zip(manifest["name"].to_pylist(), manifest["id"].to_pylist(), strict=True)


def _renamed(now: Iterable[tuple[str, str]], then: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Map the names that images had to the names that they have now, where these differ.

    A name changes when a file with the same name and another suffix appears or vanishes: with a second file a.jpg, the
    image a becomes a.png. ``now`` and ``then`` are names, each with the id of its image.
    """
    present, former = defaultdict[str, set[str]](set), defaultdict[str, set[str]](set)
    for names, pairs in ((present, now), (former, then)):
        for name, image_id in pairs:
            names[image_id].add(name)
    renamed: dict[str, str] = {}
    for image_id in former.keys() & present.keys():
        lost, new = former[image_id] - present[image_id], present[image_id] - former[image_id]
        renamed |= zip(sorted(lost), sorted(new), strict=False)
    return renamed


def _row_of(
    source: _Source, rows: dict[str, dict[str, Any]], exported: dict[str, Any], gan_sr_key: str | None, verb: str
) -> dict[str, Any]:
    """Find the row of the image that annotations belong to, among the images that are done (raises `ImageError`)."""
    if len(source.names) > 1:
        field = "imagePath" if isinstance(source.drawn, LabelMeFile) else "file_name"
        reason = f"may be of {' or of '.join(source.names[:2])}"
        raise ImageError(source.source, reason, f"write the path of its picture, folders included, as {field}")
    row = rows.get(source.names[0]) if source.names else None
    if row is None:
        reason = "matches no finished image of this workspace"
        raise ImageError(source.source, reason, f"remove it, name the right --workspace, or run desra {verb} first")
    height, width = source.drawn.height or row["height"], source.drawn.width or row["width"]
    if (height, width) != (row["height"], row["width"]):
        reason = f"is of {width}x{height} px but the image has {row['width']}x{row['height']}"
        raise ImageError(source.source, reason, "annotate pictures of the size of the GAN results")
    if isinstance(source.drawn, ReviewedMask) and source.drawn[1:3] != (row["id"], gan_sr_key):
        reason = "is about another result than the workspace holds"
        raise ImageError(source.source, reason, "start desra review again")
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


def _replace_masks(
    workspace: Workspace, target: Target, masks: Mapping[str, bytes | None], rows: Mapping[str, dict[str, Any]]
) -> dict[str, bool]:
    """Put human masks in place, or remove them, and make the pictures of the dataset anew where their mask changed.

    ``masks`` has the PNG of each human mask by name, None to remove the mask; ``rows`` are the masks' rows in the table
    of human masks. Returns for each name whose pictures had another mask whether these pictures could be made anew.
    """
    counting = {name for name, row in rows.items() if row["gan_sr_key"] == target.gan_sr_key}
    outdated: dict[str, bytes] = {}  # the mask that the pictures at a name should have
    pictured = [name for name in masks if _has_pictures(workspace, name)] if target.super_resolves else []
    for name in pictured:
        mask = masks[name] if name in counting else None
        if name not in counting and workspace.mask(name).exists():
            mask = read_bytes(workspace.mask(name))
        if mask and read_bytes(workspace.dataset("mask", name)) != mask:
            outdated[name] = mask
    for name in outdated:
        # Removed first: if this process is killed, the next run makes pictures anew that have no mask.
        workspace.dataset("mask", name).unlink(missing_ok=True)

    def put(name: str) -> None:
        if png := masks[name]:
            workspace.publish(workspace.human_mask(name), png)
        else:
            workspace.human_mask(name).unlink(missing_ok=True)

    def renew(name: str) -> Mapping[str, str | None] | None:
        """Return the checksums of the new pictures, None for each that is no more; None where it failed."""
        mask = decode_mask(outdated[name], workspace.mask(name))
        if name not in counting and target.keep != "all" and not mask.any():
            workspace.withdraw_dataset(name)
            return {f"dataset/{kind}": None for kind in DATASET}
        files = [workspace.dataset(kind, name) for kind in ("mse_sr", "gan_sr")]
        try:
            mse_sr, gan_sr = (decode(read_bytes(file), file) for file in files)
        except ImageError:  # the next run makes these pictures again
            return None
        pseudo_gt = assemble_pseudo_gt(mse_sr.pixels, gan_sr.pixels, mask)
        return workspace.publish_pseudo_gt([name], mask, pseudo_gt, gan_sr.alpha)

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(put, masks))
        others = {name: row for name, row in _human_rows(workspace).items() if name not in masks}
        table = pa.Table.from_pylist([row for _, row in sorted((others | dict(rows)).items())], HUMAN_MASKS)
        workspace.publish_table(workspace.human_manifest, table)
        renewed = dict(zip(outdated, pool.map(renew, outdated), strict=True))
    note_checksums(workspace, {name: checksums for name, checksums in renewed.items() if checksums})
    if target.super_resolves:
        publish_tables(workspace, target)
    return {name: checksums is not None for name, checksums in renewed.items()}


def _remember(workspace: Workspace, names: dict[str, list[str]]) -> None:
    """Write down the masks that an import replaces.

    Rows of a killed import stay, because some of its masks may be in place already.
    """
    known, path = _human_rows(workspace), workspace.imports / _UNFINISHED
    rows = {row["name"]: row for row in read_table(path, _REPLACED).to_pylist()}
    for image_id, of_image in names.items():
        for name in of_image:
            mask, row = workspace.human_mask(name), {"name": name, "image": image_id}
            if name in known and mask.exists():
                row |= known[name] | {"png": read_bytes(mask)}
            rows.setdefault(name, row)
    workspace.publish_table(path, pa.Table.from_pylist([rows[name] for name in sorted(rows)], _REPLACED))


def _human_rows(workspace: Workspace) -> dict[str, dict[str, Any]]:
    """Read the rows of all human masks by name, also of masks that do not count."""
    return {row["name"]: row for row in read_table(workspace.human_manifest, HUMAN_MASKS).to_pylist()}


def _has_pictures(workspace: Workspace, name: str) -> bool:
    return all(workspace.dataset(kind, name).exists() for kind in DATASET)
