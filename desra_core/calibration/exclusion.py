"""Masks of pixels that do not count: those by people in a workspace, and those of a folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from desra_core.errors import UsageError
from desra_core.files.hashing import digest, read_bytes
from desra_core.images.scanning import image_files, normalized
from desra_core.workspace import Workspace
from desra_core.workspace.human_masks import read_human_masks
from desra_core.workspace.manifest import File, ImageRef


class Exclusion:
    """The masks of a folder, by image name, beside which those by people count that a workspace holds.

    Parameters
    ----------
    folder
        None where there are only those by people.

    Raises
    ------
    UsageError
        The folder does not exist or cannot be read, or holds two masks of one name.
    TransientError
        A mask cannot be read.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        paths = {} if folder is None else _files(folder)
        self._given = {name: _file(path) for name, path in paths.items()}

    def of_workspace(self, workspace: Workspace, gan_sr_key: str | None) -> Masks:
        """The masks of a workspace's images; the key is that of the results that people have looked at.

        Raises
        ------
        TransientError
            A mask cannot be read.
        """
        human = {image_id: _file(mask.path) for image_id, mask in read_human_masks(workspace, gan_sr_key).items()}
        return Masks(human, self._given)

    def unused(self, names: Iterable[str]) -> list[Path]:
        """The masks of the folder that are of none of these images.

        Raises
        ------
        UsageError
            That are all of them.
        """
        known = {normalized(name) for name in names}
        unused = [file.path for name, file in sorted(self._given.items()) if name not in known]
        if self._folder is not None and len(unused) == len(self._given):
            remedy = "name a folder whose files mirror those of the images"
            raise UsageError(self._folder, "holds no mask of any image", remedy)
        return unused


class Masks(NamedTuple):
    """The masks by people, by image id, and those of a folder, by name."""

    human: Mapping[str, File]
    given: Mapping[str, File]

    def of_image(self, image: ImageRef) -> tuple[File, ...]:
        """Those of an image, at whatever names it goes by."""
        by_people = [self.human[image.id]] if image.id in self.human else []
        return (*by_people, *(self.given[name] for name in map(normalized, image.names) if name in self.given))


def _file(path: Path) -> File:
    return File(path, digest(read_bytes(path)))


def _files(folder: Path) -> dict[str, Path]:
    table, problems, _ = image_files(folder)
    for problem in problems[:1]:
        raise UsageError(*problem.failure)
    found: dict[str, Path] = {}
    for name, path in zip(map(normalized, table["name"].to_pylist()), table["path"].to_pylist(), strict=True):
        if name in found:
            raise UsageError(folder / path, f"is a mask of the same image as {found[name]}", "keep one of them")
        found[name] = folder / path
    return found
