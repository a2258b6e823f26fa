"""Where the parts of a data set lie: the published DeSRA layout, plain folders, and COCO files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from desra_core.errors import UsageError

# What a folder of a data set is for, and how the published one calls it.
ROLES = {"mse_sr": "MSE-SR", "gan_sr": "GAN-SR", "gt_mask": "GT-Mask", "lr": "LR", "desra_mask": "DeSRA-Mask",
         "labels": "labels"}  # fmt: skip
ANNOTATIONS = "annotations.json"

_SPELLINGS = {role.replace("_", ""): role for role in ROLES} | {"label": "labels", "gt": "gt_mask"}
_REMEDY = "name a folder with MSE-SR, GAN-SR and GT-Mask in it, a folder of such folders, or a COCO file"


@dataclass(frozen=True)
class Part:
    """The folders of one SR model, by role, and the COCO file that stands for a folder of masks."""

    name: str
    folders: Mapping[str, Path]
    coco: Path | None = None


def find_parts(root: Path, given: Mapping[str, Path]) -> list[Part]:
    """Find the parts of a data set, by name.

    Parameters
    ----------
    root
        A folder with ``MSE-SR``, ``GAN-SR`` and ``GT-Mask`` in it, in any spelling (``mse_sr``, ``GT Mask``), and
        perhaps ``LR``, ``DeSRA-Mask`` and ``labels``; a folder of such folders, one per SR model; or a COCO file beside
        the folders. A COCO file called ``annotations.json`` may stand for ``GT-Mask`` in any of them.
    given
        Some of the folders by role, in place of those in ``root``. Of several parts, each has a folder of its name
        there.

    Raises
    ------
    UsageError
        There is no such data set.
    """
    if root.is_file():
        if root.suffix.lower() != ".json":
            raise UsageError(root, "is no data set", _REMEDY)
        return [_complete(Part("", {**_folders(root.parent), **given}, root), root)]
    if not root.is_dir():
        raise UsageError(root, "does not exist", _REMEDY)
    below = _folders(root)
    if below.keys() & {"mse_sr", "gan_sr"} or given.keys() >= {"mse_sr", "gan_sr"}:
        return [_complete(_with_annotations(Part("", {**below, **given}), root), root)]
    named = [(folder, _folders(folder)) for folder in _folders_in(root)]
    parts = [
        _complete(_with_annotations(Part(folder.name, own | _of_part(given, folder.name)), folder), folder)
        for folder, own in named
        if own.keys() & {"mse_sr", "gan_sr"}
    ]
    if not parts:
        raise UsageError(root, "is no data set", _REMEDY)
    return parts


def _of_part(given: Mapping[str, Path], part: str) -> dict[str, Path]:
    for role, folder in given.items():
        if not (folder / part).is_dir():
            flag = f"--{role.replace('_', '-')}"
            raise UsageError(flag, f"{folder} has no folder {part}", "give one with a folder for each part")
    return {role: folder / part for role, folder in given.items()}


def _with_annotations(part: Part, folder: Path) -> Part:
    path = folder / ANNOTATIONS
    if not path.is_file():
        return part
    if "gt_mask" in part.folders:
        remedy = f"name {ANNOTATIONS} itself, or remove it"
        raise UsageError(folder, f"has both masks in {part.folders['gt_mask'].name} and {ANNOTATIONS}", remedy)
    return Part(part.name, part.folders, path)


def _complete(part: Part, place: Path) -> Part:
    """The part, which has all that it cannot do without."""
    if part.coco:
        part = Part(part.name, {role: folder for role, folder in part.folders.items() if role != "gt_mask"}, part.coco)
    for role in ("mse_sr", "gan_sr", "gt_mask"):
        if role not in part.folders and not (role == "gt_mask" and part.coco):
            flag = "" if role == "gt_mask" else f", or give --{role.replace('_', '-')}"
            other = f" nor {ANNOTATIONS}" if role == "gt_mask" else ""
            raise UsageError(place, f"has no folder {ROLES[role]}{other}", f"add it{flag}")
    return part


def _folders(place: Path) -> dict[str, Path]:
    """The folders of a place that have a role, in whatever spelling."""
    found: dict[str, Path] = {}
    for folder in _folders_in(place):
        spelling = "".join(character for character in folder.name.casefold() if character.isalnum())
        role = _SPELLINGS.get(spelling) or _SPELLINGS.get(spelling.removesuffix("s"))
        if role is None:
            continue
        if role in found:
            reason = f"has two folders for {ROLES[role]}: {found[role].name} and {folder.name}"
            raise UsageError(place, reason, "keep one of them")
        found[role] = folder
    return found


def _folders_in(place: Path) -> list[Path]:
    try:
        return sorted(folder for folder in place.iterdir() if folder.is_dir())
    except OSError as error:
        raise UsageError(place, f"cannot be read ({error.strerror})", "give read permission to it") from None
