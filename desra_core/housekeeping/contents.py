"""List and measure the files of a workspace. No link is followed."""

import contextlib
import os
import re
import stat
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from desra_core.errors import UsageError
from desra_core.workspace import DATASET, Workspace
from desra_core.workspace.products import ARRAYS, is_text

# The folders of a workspace.
FOLDERS = (
    "masks", "human", "imports", "exported", "review", "dataset", "maps", "outcomes", "journal", "models", "finetunes",
    "gate", "calibration", "deliveries", "pages", "twin", "prefect", "tmp",
)  # fmt: skip
# Kinds of items beside those that are named after their folder.
UNKNOWN, EMPTY = "unknown", "empty"

_FILES = {
    "manifest.parquet", "settings.json", "regions.parquet", "split.parquet", "failures.parquet", "report.html",
    "scan_failures.parquet", "tars.parquet", "gathered.json", "lock", "format", "metrics.prom",
}  # fmt: skip
_BATCH = 65_536
KEY = re.compile(r"[0-9a-f]{32}")  # 128 bits as hex


class Item(NamedTuple):
    """A file or folder of a workspace, and why it may be deleted."""

    kind: str  # the name of its folder; `EMPTY` for empty folders, and `UNKNOWN` for items that are never deleted
    path: str  # relative to the workspace
    files: int
    bytes: int
    reason: str | None = None  # why it may be deleted; None where it stays
    owner: str = ""  # the name of the image that it belongs to; for maps and empty folders of maps, the image's id
    part: str = ""  # the array, where the kind is maps


# A column for each field of `Item`.
ITEMS = pa.schema([(name, pa.int64() if name in ("files", "bytes") else pa.string()) for name in Item._fields])


class Size(NamedTuple):
    """How many files, and how many bytes they hold."""

    files: int
    bytes: int


def sizes(workspace: Workspace) -> dict[str, Size]:
    """Measure a workspace by kind, the largest first; kinds without a file are left out.

    Kinds are named after the folders of a workspace; the files beside these folders are ``tables``, and the folders
    that no run makes are ``other``.
    """
    found: dict[str, Size] = {}
    for entry in entries(workspace.root.resolve()):
        folder = entry.name if entry.name in FOLDERS else "other"
        kind = folder if entry.is_dir(follow_symlinks=False) else "tables"
        size, before = size_of(entry), found.get(kind, Size(0, 0))
        found[kind] = Size(before.files + size.files, before.bytes + size.bytes)
    kinds = sorted((kind for kind in found if found[kind].files), key=lambda kind: (-found[kind].bytes, kind))
    return {kind: found[kind] for kind in kinds}


def table_of(items: Iterable[Item]) -> pa.Table:
    """Turn items into a table (schema `ITEMS`), in batches, so that few items are Python objects at a time."""
    rows, batches = iter(items), []
    while batch := list(islice(rows, _BATCH)):
        columns = [pa.array(column, kind) for column, kind in zip(zip(*batch, strict=True), ITEMS.types, strict=True)]
        batches.append(pa.RecordBatch.from_arrays(columns, schema=ITEMS))
    return pa.Table.from_batches(batches, ITEMS).combine_chunks()


def item(
    workspace: Workspace, path: Path | str, kind: str, reason: str | None = None, *, owner: str = "", part: str = ""
) -> Item:
    """Return the item of a file or folder of a workspace, with its size."""
    place = os.fspath(path).removeprefix(f"{workspace.root}/")
    # The bytes of a path need not be text.
    return Item(kind, place.encode("utf-8", "backslashreplace").decode(), *size_of(path), reason, owner, part)


def entries(folder: Path | str) -> Iterator[os.DirEntry[str]]:
    """List a folder, sorted by name (raises `UsageError`); nothing where there is no such folder.

    Nothing is listed for a link, because its target does not belong to the workspace.
    """
    if os.path.islink(folder):
        return
    try:
        with os.scandir(folder) as found:
            listed = sorted(found, key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise UsageError(folder, f"cannot be read ({error.strerror})", "check its permissions") from None
    yield from listed


def size_of(place: os.PathLike[str] | str) -> Size:
    """Measure a file, or all files below a folder; files that vanish or cannot be read are left out."""
    try:
        status = os.lstat(place)
    except OSError:
        return Size(0, 0)
    if not stat.S_ISDIR(status.st_mode):
        return Size(1, status.st_size)
    found = []
    for folder, folders, names in os.walk(place):
        for name in (*names, *folders):  # links to folders are among the folders
            with contextlib.suppress(OSError):  # a run in progress has deleted it, or it is another user's
                status = os.lstat(os.path.join(folder, name))
                if not stat.S_ISDIR(status.st_mode):
                    found.append(status.st_size)
    return Size(len(found), sum(found))


def images_contents(workspace: Workspace) -> Iterator[Item]:
    """List the files of images, empty folders, and files that no run makes (kind `UNKNOWN`)."""
    for entry in entries(workspace.root.resolve()):
        folder = entry.is_dir(follow_symlinks=False)
        if not (entry.name in FOLDERS if folder else entry.name in _FILES and _is_file(entry)):
            yield item(workspace, workspace.root / entry.name, UNKNOWN)
    yield from _named(workspace, "masks", workspace.masks, ".png")
    yield from _named(workspace, "pages", workspace.pages, ".html")
    for entry in entries(workspace.dataset_manifest.parent):
        if entry.name in DATASET and entry.is_dir(follow_symlinks=False):
            yield from _named(workspace, "dataset", Path(entry.path), ".png")
        elif entry.name != workspace.dataset_manifest.name or not _is_file(entry):
            yield item(workspace, entry.path, UNKNOWN)
    for outer in entries(workspace.maps):
        yield from _maps(workspace, outer)


def _named(workspace: Workspace, kind: str, folder: Path, suffix: str, above: str = "") -> Iterator[Item]:
    """List the files of images in a folder and below, whose paths are the images' names with a suffix."""
    inside = list(entries(folder))
    if above and not inside:
        yield item(workspace, folder, EMPTY)
    for entry in inside:
        name = above + entry.name
        if entry.is_dir(follow_symlinks=False) and is_text(entry.name):
            yield from _named(workspace, kind, Path(entry.path), suffix, f"{name}/")
        elif _is_file(entry) and name.endswith(suffix):
            yield item(workspace, entry.path, kind, owner=name.removesuffix(suffix))
        else:
            yield item(workspace, entry.path, UNKNOWN)


def _maps(workspace: Workspace, outer: os.DirEntry[str]) -> Iterator[Item]:
    """List the arrays of the images in a folder of maps/, and the files of zarr groups, which have no ``part``."""
    if not outer.is_dir(follow_symlinks=False):
        yield item(workspace, outer.path, UNKNOWN)
        return
    groups = list(entries(outer.path))
    if not groups:
        yield item(workspace, outer.path, EMPTY if is_text(outer.name) else UNKNOWN)
    for group in groups:
        image_id = group.name.removesuffix(".zarr")
        is_named_so = group.name == f"{image_id}.zarr" and KEY.fullmatch(image_id) and image_id[:2] == outer.name
        if not is_named_so or not group.is_dir(follow_symlinks=False):
            yield item(workspace, group.path, UNKNOWN)
            continue
        members = list(entries(group.path))
        if not members:
            yield item(workspace, group.path, EMPTY, owner=image_id)
        for entry in members:
            is_array = entry.name in ARRAYS and entry.is_dir(follow_symlinks=False)
            is_known = is_array or (entry.name == "zarr.json" and _is_file(entry))
            part = entry.name if is_array else ""
            yield item(workspace, entry.path, "maps" if is_known else UNKNOWN, owner=image_id, part=part)


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Check whether an entry is a plain file whose name is text."""
    return entry.is_file(follow_symlinks=False) and is_text(entry.name)
