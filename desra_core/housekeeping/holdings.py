"""What lies in the folders of a workspace that belong to its images, as columns. No link is followed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from desra_core.housekeeping.sizes import FOLDERS, entries, size_of, size_of_file
from desra_core.workspace import DATASET, Workspace
from desra_core.workspace.inventory import is_text
from desra_core.workspace.products import ARRAYS

# Kinds of holdings beside those that are named after their folder.
UNKNOWN, EMPTY = "unknown", "empty"
# ``owner`` is the name of the image, or its id where ``kind`` is maps; ``part`` is the array.
HOLDINGS = pa.schema(
    [(field, pa.string()) for field in ("kind", "owner", "part", "path")]
    + [("files", pa.int64()), ("bytes", pa.int64())]
)
# ``path`` is relative to the workspace.
LEFTOVERS = pa.schema(
    [
        ("kind", pa.string()),
        ("path", pa.string()),
        ("files", pa.int64()),
        ("bytes", pa.int64()),
        ("reason", pa.string()),
    ]
)

_BATCH = 65_536
_ID = re.compile(r"[0-9a-f]{32}")
_FILES = {
    "manifest.parquet", "settings.json", "regions.parquet", "split.parquet", "failures.parquet", "report.html",
    "scan_failures.parquet", "gathered.json", "lock",
}  # fmt: skip


class Holding(NamedTuple):
    """A row of `HOLDINGS`; ``path`` is relative to the workspace."""

    kind: str
    owner: str
    part: str
    path: str
    files: int
    bytes: int


class Leftover(NamedTuple):
    """Something that no run needs any more, and why; what is `UNKNOWN` is left where it is."""

    kind: str
    path: str
    files: int
    bytes: int
    reason: str


def holdings(workspace: Workspace) -> pa.Table:
    """List what belongs to images, empty folders, and what is of no kind that a workspace has (schema `HOLDINGS`)."""
    return table_of(_listed(workspace), HOLDINGS)


def table_of(rows: Iterable[tuple[object, ...]], schema: pa.Schema) -> pa.Table:
    """Rows as a table; only so many of them are Python objects at a time."""
    rows, batches = iter(rows), []
    while batch := list(islice(rows, _BATCH)):
        columns = [pa.array(column, kind) for column, kind in zip(zip(*batch, strict=True), schema.types, strict=True)]
        batches.append(pa.RecordBatch.from_arrays(columns, schema=schema))
    return pa.Table.from_batches(batches, schema).combine_chunks()


def is_key(name: str) -> bool:
    """Whether a name may be that of something with a key: 128 bits as hex."""
    return _ID.fullmatch(name) is not None


def unknown(entry: os.DirEntry[str], path: str, owner: str = "") -> Holding:
    """What no run makes, or makes elsewhere, or what is no file or folder."""
    size = size_of(entry.path) if entry.is_dir(follow_symlinks=False) else size_of_file(entry)
    return Holding(UNKNOWN, owner, "", _text(path), *size)


def _listed(workspace: Workspace) -> Iterator[Holding]:
    for entry in entries(workspace.root):
        folder = entry.is_dir(follow_symlinks=False)
        if not (entry.name in FOLDERS if folder else entry.name in _FILES and _is_file(entry)):
            yield unknown(entry, entry.name)
    yield from _named("masks", own_entries(workspace.masks), "masks/", ".png")
    yield from _named("pages", own_entries(workspace.root / "pages"), "pages/", ".html")
    for entry in own_entries(workspace.dataset_manifest.parent):
        if entry.name in DATASET and entry.is_dir(follow_symlinks=False):
            yield from _named("dataset", entries(entry.path), f"dataset/{entry.name}/", ".png")
        elif entry.name != workspace.dataset_manifest.name or not _is_file(entry):
            yield unknown(entry, f"dataset/{entry.name}")
    yield from _maps(workspace)


def _named(
    kind: str, inside: Iterable[os.DirEntry[str]], place: str, suffix: str, above: str = ""
) -> Iterator[Holding]:
    """The files of images in a folder and below, whose paths are the images' names with a suffix."""
    for entry in inside:
        name = above + entry.name
        if entry.is_dir(follow_symlinks=False) and is_text(entry.name):
            within = list(entries(entry.path))
            if not within:
                yield Holding(EMPTY, "", "", place + name, 0, 0)
            yield from _named(kind, within, place, suffix, f"{name}/")
        elif _is_file(entry) and name.endswith(suffix):
            yield Holding(kind, name.removesuffix(suffix), "", place + name, *size_of_file(entry))
        else:
            yield unknown(entry, place + name)


def _maps(workspace: Workspace) -> Iterator[Holding]:
    for outer in own_entries(workspace.maps):
        place = f"maps/{outer.name}"
        if not outer.is_dir(follow_symlinks=False):
            yield unknown(outer, place)
            continue
        groups = list(entries(outer.path))
        if not groups and is_text(outer.name):
            yield Holding(EMPTY, "", "", place, 0, 0)
        for group in groups:
            image_id = group.name.removesuffix(".zarr")
            known = group.name == f"{image_id}.zarr" and is_key(image_id) and image_id[:2] == outer.name
            if known and group.is_dir(follow_symlinks=False):
                yield from _group(group, image_id, f"{place}/{group.name}")
            else:
                yield unknown(group, f"{place}/{group.name}")


def _group(group: os.DirEntry[str], image_id: str, place: str) -> Iterator[Holding]:
    """The arrays of an image, and the file that makes a zarr group of their folder, which has no part."""
    members = list(entries(group.path))
    if not members:
        yield Holding(EMPTY, image_id, "", place, 0, 0)
    for entry in members:
        path = f"{place}/{entry.name}"
        if entry.name in ARRAYS and entry.is_dir(follow_symlinks=False):
            yield Holding("maps", image_id, entry.name, path, *size_of(entry.path))
        elif entry.name == "zarr.json" and _is_file(entry):
            yield Holding("maps", image_id, "", path, *size_of_file(entry))
        else:
            yield unknown(entry, path, image_id)


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Whether it is a plain file whose name is text."""
    return entry.is_file(follow_symlinks=False) and is_text(entry.name)


def _text(path: str) -> str:
    """A path that can be stored and told, whatever bytes it is made of."""
    return path.encode("utf-8", "backslashreplace").decode()


def own_entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """What lies in a folder, unless it is a link: what that leads to is not the workspace's."""
    return iter(()) if folder.is_symlink() else entries(folder)
