"""Masks that people corrected: read from LabelMe and COCO files, all of them held against the workspace first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from desra_core.annotations.coco import names_of
from desra_core.annotations.export_folder import export_document, export_root
from desra_core.annotations.labelme import LabelMeFile, draw_shapes, read_labelme
from desra_core.annotations.selection import read_mask
from desra_core.corpus import read_manifest
from desra_core.errors import DesraError, ImageError, UsageError
from desra_core.evaluation.coco_masks import CocoMask, decode_coco_mask, read_coco
from desra_core.imageio import Mask, encode_mask
from desra_core.plan import done_images
from desra_core.target import Target, load_settings
from desra_core.workspace import Workspace

Origin = Literal["labelme", "coco"]

_THREADS = 4
_ALL_OR_NOTHING = "mend it and import again"

Read = TypeVar("Read")
Drawn = LabelMeFile | CocoMask


class Correction(NamedTuple):
    """A mask by a person, ready to be published.

    Attributes
    ----------
    source
        What to name in errors.
    name, id
        Of the image.
    png, pixels, regions
        The mask as a 1-bit PNG, its marked pixels and its 8-connected regions.
    changed
        Whether the detector's mask is another one.
    """

    source: str
    name: str
    id: str
    png: bytes
    pixels: int
    regions: int
    changed: bool


class _Source(NamedTuple):
    """The annotations of one image: where they come from, the names it may have, its size and what was drawn."""

    source: str
    names: Sequence[str]
    size: tuple[int | None, int | None]
    drawn: Drawn


def read_corrections(
    workspace: Workspace, origin: Origin, path: Path, label: str | None = None
) -> tuple[list[Correction], list[DesraError]]:
    """Read what people made of an export, or drew otherwise; nothing is written.

    Parameters
    ----------
    workspace
        Which has the images.
    origin
        ``labelme``: a folder of JSON files, each at the name of its image, or one of them; ``coco``: a JSON file.
    path
        The folder or file.
    label
        Only shapes with this label count, if given. By default all LabelMe shapes do; of a COCO file those of the
        category `desra_core.evaluation.coco_masks.CATEGORY`, if it has one.

    Returns
    -------
    The masks, and what is wrong with the others: where anything is, nothing should be published.

    Raises
    ------
    UsageError
        The path holds no such files, or the workspace no run.
    """
    settings, target = load_settings(workspace)
    sources, errors = _labelme(path, label) if origin == "labelme" else (_coco(path, label), [])
    exported = export_document(export_root(path.absolute()) or path) or {}
    renamed = _renamed(workspace, exported.get("images", {}))
    exported["images"] = {renamed.get(name, name): key for name, key in exported.get("images", {}).items()}
    now = ([renamed[name] for name in source.names if name in renamed][:1] for source in sources)
    sources = [source._replace(names=names or source.names) for source, names in zip(sources, now, strict=True)]
    rows = _rows_of(workspace, target, sources)
    images: list[tuple[_Source, dict[str, Any]]] = []
    for source in sources:
        found = next((rows[name] for name in source.names if name in rows), None)
        problem = _problem(source, found, exported, target.gan_sr_key, settings.verb)
        if problem or not found:
            errors.append(problem or ImageError(source.source, "is of no image", _ALL_OR_NOTHING))
        else:
            images.append((source, found))

    def correct(image: tuple[_Source, dict[str, Any]]) -> Correction:
        return _correction(*image, workspace, label)

    corrections, failed = _on_threads(correct, images)
    return corrections, [*errors, *failed, *_contradictions(corrections)]


def _labelme(path: Path, label: str | None) -> tuple[list[_Source], list[DesraError]]:
    if not path.exists():
        raise UsageError(path, "does not exist", "name a folder of LabelMe files, or one of them")
    root = export_root(path.absolute()) or (path if path.is_dir() else path.parent).absolute()
    found = [path] if path.is_file() else sorted(path.rglob("*.json"))
    files = [file for file in found if file.is_file() and not file.name.startswith(".")]
    if not files:
        raise UsageError(path, "holds no LabelMe files", "name the folder of an export that was corrected")
    read, errors = _on_threads(read_labelme, files)
    labels = {name for file in read for name in file.labels}
    if label is not None and labels and label not in labels:
        raise UsageError("--label", f"no shape is labelled {label}", f"labels are {', '.join(sorted(labels))}")
    sources = []
    for file in read:
        name = file.path.absolute().relative_to(root).as_posix().removesuffix(".json")
        sources.append(_Source(str(file.path), [name], (file.height, file.width), file))
    return sources, errors


def _coco(path: Path, label: str | None) -> list[_Source]:
    return [
        _Source(f"{path}, {file_name}", names_of(file_name), (mask.height, mask.width), mask)
        for file_name, mask in read_coco(path, category=label).items()
    ]


def _renamed(workspace: Workspace, exported: Mapping[str, str]) -> dict[str, str]:
    """The names that images have now which went by others when they were exported, by those.

    A name changes when a file of the same name but for the suffix joins the image's, or goes.
    """
    manifest = read_manifest(workspace)
    assert manifest is not None
    manifest = manifest.filter(
        pc.and_(manifest["present"], pc.is_in(manifest["id"], pa.array(exported.values(), pa.string())))
    )
    names: dict[str, set[str]] = {}
    for name, image_id in zip(manifest["name"].to_pylist(), manifest["id"].to_pylist(), strict=True):
        names.setdefault(image_id, set()).add(name)
    return {
        name: min(names[image_id])
        for name, image_id in exported.items()
        if image_id in names and name not in names[image_id]
    }


def _rows_of(workspace: Workspace, target: Target, sources: Iterable[_Source]) -> dict[str, dict[str, Any]]:
    """The images that are done, by name, of those that the sources may mean."""
    rows = done_images(workspace, target).select(["name", "id", "height", "width"])
    wanted = pa.array({name for source in sources for name in source.names}, pa.string())
    return {row["name"]: row for row in rows.filter(pc.is_in(rows["name"], wanted)).to_pylist()}


def _problem(
    source: _Source, found: dict[str, Any] | None, exported: dict[str, Any], gan_sr_key: str | None, verb: str
) -> ImageError | None:
    """What speaks against an image's annotations before they are drawn."""
    if found is None:
        reason = "is of no image of the workspace that is done"
        return ImageError(source.source, reason, f"remove it, name the right --workspace, or run desra {verb} first")
    height, width = (given or own for given, own in zip(source.size, (found["height"], found["width"]), strict=True))
    if (height, width) != (found["height"], found["width"]):
        reason = f"is of {width}x{height} px but the image has {found['width']}x{found['height']}"
        return ImageError(source.source, reason, "annotate pictures of the size of the GAN results")
    then = exported.get("images", {}).get(found["name"])
    if then is not None and (then, exported.get("gan_sr_key")) != (found["id"], gan_sr_key):
        reason = "was exported from another result than the workspace holds"
        return ImageError(source.source, reason, "export again, and correct that")
    return None


def _correction(source: _Source, row: dict[str, Any], workspace: Workspace, label: str | None) -> Correction:
    shape = (row["height"], row["width"])
    drawn = source.drawn
    mask: Mask = decode_coco_mask(drawn) if isinstance(drawn, CocoMask) else draw_shapes(drawn, shape, label)
    count, _ = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    changed = not np.array_equal(mask, read_mask(workspace.mask(row["name"]), shape))
    return Correction(source.source, row["name"], row["id"], encode_mask(mask), int(mask.sum()), count - 1, changed)


def _contradictions(corrections: Iterable[Correction]) -> list[DesraError]:
    """Images that were corrected twice, under one name or as copies of each other, in different ways."""
    corrections = list(corrections)
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
    """The results of a function of each item, and the errors of those that it raised for."""

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
