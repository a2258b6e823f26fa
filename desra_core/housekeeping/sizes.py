"""How much of a disk a workspace takes, by kind. Links are counted, never followed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from desra_core.errors import UsageError
from desra_core.workspace import Workspace

# The folders of a workspace.
FOLDERS = (
    "masks", "human", "imports", "exported", "dataset", "maps", "outcomes", "journal", "models", "finetunes", "gate",
    "calibration", "pages", "prefect", "tmp",
)  # fmt: skip


class Size(NamedTuple):
    """How many files, and how many bytes they hold."""

    files: int
    bytes: int

    def plus(self, other: Size) -> Size:
        """Both together."""
        return Size(self.files + other.files, self.bytes + other.bytes)


def entries(folder: Path | str) -> Iterator[os.DirEntry[str]]:
    """What lies in a folder, sorted by name; nothing where it is none, or gone.

    Raises
    ------
    UsageError
        It cannot be read.
    """
    try:
        with os.scandir(folder) as found:
            listed = sorted(found, key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise UsageError(folder, f"cannot be read ({error.strerror})", "check its permissions") from None
    yield from listed


def size_of(folder: Path | str) -> Size:
    """The size of all files below a folder."""
    files = size = 0
    folders = [folder]
    while folders:
        try:
            with os.scandir(folders.pop()) as found:
                for entry in found:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                        continue
                    with contextlib.suppress(FileNotFoundError):  # of a run that is going on
                        size += entry.stat(follow_symlinks=False).st_size
                        files += 1
        except OSError:
            continue
    return Size(files, size)


def size_of_file(entry: os.DirEntry[str]) -> Size:
    """As `size_of` for a file."""
    try:
        return Size(1, entry.stat(follow_symlinks=False).st_size)
    except FileNotFoundError:  # somebody has deleted it meanwhile
        return Size(0, 0)


def sizes(workspace: Workspace) -> dict[str, Size]:
    """The size of a workspace by kind, the largest first; kinds without a file are left out.

    Kinds are named after the folders of a workspace; the files beside these folders are ``tables``, and the folders
    that no run makes are ``other``.
    """
    found: dict[str, Size] = {}
    for entry in entries(workspace.root):
        if entry.is_dir(follow_symlinks=False):
            kind, size = entry.name if entry.name in FOLDERS else "other", size_of(entry.path)
        else:
            kind, size = "tables", size_of_file(entry)
        found[kind] = found.get(kind, Size(0, 0)).plus(size)
    held = ((kind, size) for kind, size in found.items() if size.files)
    return dict(sorted(held, key=lambda item: (-item[1].bytes, item[0])))
