"""Find the images of a data set: the folders of its parts, the files that belong together, and lacking files."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from desra_core.detection.mask import Components
from desra_core.errors import ImageError, UsageError
from desra_core.evaluation.coco_masks import CocoMask, read_coco
from desra_core.evaluation.evaluation import Rating, Ratings, all_failed, csv_rows, share_of_viewers
from desra_core.evaluation.mask_files import FRAME, on_valid_region, read_mask
from desra_core.files import read_bytes
from desra_core.images.codec import image_size
from desra_core.images.scanning import ImageNames
from desra_core.settings.models import Benchmarking, Measuring
from desra_core.workspace.matching import files_by_name

# The roles of the folders of a data set, and their names in the published data set.
ROLES = {"mse_sr": "MSE-SR", "gan_sr": "GAN-SR", "gt_mask": "GT-Mask", "lr": "LR", "desra_mask": "DeSRA-Mask",
         "labels": "labels"}  # fmt: skip
ANNOTATIONS = "annotations.json"

_SPELLINGS = {role.replace("_", ""): role for role in ROLES} | {"label": "labels", "gt": "gt_mask"}
_REMEDY = (
    "name a folder with MSE-SR, GAN-SR and GT-Mask in it, a folder of such folders, a COCO file or a CSV file of masks"
)
# In a folder whose files are called NAME@LR@, NAME@RF@ and NAME@SR@: the roles of these. Arrays are heat maps there.
_TAGS = {"LR": "lr", "RF": "mse_sr", "SR": "gan_sr"}
_TAGGED = re.compile(r"(?P<name>.+)@(?P<tag>[\w-]+)@")
_ARRAYS = (".npy.gz", ".npy")
_EVERY = "every role"  # the role of such a folder
_TABLE = "give a CSV file with an image, the file of a mask and a share of viewers in each row; flags name its columns"

# A part of a data set: its name, its folders by role, and the COCO or CSV file in place of its folder of masks, if any.
Part = tuple[str, Mapping[str, Path], Path | None]
Masks = TypeVar("Masks")


class MaskRow(NamedTuple):
    """A row of a CSV file of masks; ``noticed`` is the share of viewers, None where nobody was asked."""

    line: int
    path: Path
    noticed: float | None


class Example(NamedTuple):
    """The files of an image by role. The ground truth is one of the files, or the mask of a COCO or CSV file."""

    part: str
    name: str
    files: Mapping[str, Path]
    coco_mask: CocoMask | None

    @property
    def title(self) -> str:
        """Part and name of the image."""
        return f"{self.part}/{self.name}" if self.part else self.name


@dataclass(frozen=True)
class DataSet:
    """The images that can be judged, errors for images that lack a file, and GAN results without a ground truth."""

    examples: list[Example] = field(default_factory=list)
    failures: list[ImageError] = field(default_factory=list)
    unjudged: list[Path] = field(default_factory=list)
    lacking: set[str] = field(default_factory=set)  # titles of images among the failures
    ratings: Ratings = field(default_factory=dict)  # of the regions of masks in a CSV file


def given_folders(settings: Measuring) -> dict[str, Path]:
    """Collect the folders that flags name, by role (raises `UsageError` where flags contradict each other)."""
    if settings.labels and settings.segmenter != "none":
        raise UsageError("--labels", "and --segmenter are both given", "leave one out")
    roles = ("mse_sr", "gan_sr", "lr", "labels", "exclude")
    folders = {role: folder for role in roles if (folder := getattr(settings, role, None)) is not None}
    references = settings.references if isinstance(settings, Benchmarking) else {}
    return folders | {reference_role(name): folder for name, folder in references.items()}


def reference_role(name: str) -> str:
    """Return the role of the folder of a reference."""
    return f"reference {name}"


def heat_map_role(tag: str) -> str:
    """Return the role of the heat maps of a tag, which is also the name of their method."""
    return f"heat map {tag}"


def heat_map_tags(roles: Iterable[str]) -> list[str]:
    """List the tags of the heat maps among roles."""
    start = heat_map_role("")
    return sorted({role.removeprefix(start) for role in roles if role.startswith(start)})


def read_data_set(
    root: Path | None, given: Mapping[str, Path], skip: Path, columns: tuple[str, str, str] | None = None
) -> DataSet:
    """Find the images of a data set.

    Files belong together when their relative paths agree without suffix. An ending that all names of a folder share,
    such as ``_out`` or ``-mask``, is dropped where more files match a GAN result without this ending.

    Args:
        root: A folder with ``MSE-SR``, ``GAN-SR`` and ``GT-Mask`` in it, in any spelling (``mse_sr``, ``GT Mask``), and
            perhaps ``LR``, ``DeSRA-Mask`` and ``labels``; a folder of such folders, one per SR model; or a COCO or CSV
            file beside the folders, the CSV file with a row per mask. A COCO file called ``annotations.json`` may take
            the place of any ``GT-Mask``. In place of the folders of results there may be files ``NAME@LR@``,
            ``NAME@RF@`` (the reference, in place of the MSE result) and ``NAME@SR@``, and heat maps
            ``NAME@TAG@.npy.gz``. With None, only the given folders are read, and they need no ground truth.
        given: Folders by role that replace those in ``root``. If there are several parts, each given folder has a
            folder of each part's name.
        skip: The folder of the benchmark's results, which is not searched. It may lie inside another folder.
        columns: The columns of a CSV file: image, mask, and share of viewers.

    Raises:
        UsageError: There is no such data set, a folder holds no images, or the COCO file is damaged.
    """
    data_set = DataSet()
    parts: list[Part] = _find_parts(root, given) if root else [("", given, None)]
    for part in parts:
        _read_part(*part, skip, data_set, columns)
    if data_set.failures and not data_set.examples:
        raise all_failed(data_set.failures)
    if not data_set.examples:
        reason = "is an empty data set: no GAN result has a ground truth"
        raise UsageError(root or given["gan_sr"], reason, "see that their names agree")
    return data_set


def _find_parts(root: Path, given: Mapping[str, Path]) -> list[Part]:
    """Find the parts of a data set."""
    if root.is_file():
        if root.suffix.lower() not in (".json", ".csv"):
            raise UsageError(root, "is no data set", _REMEDY)
        return [_part("", {**_folders(root.parent), **_tagged_folder(root.parent), **given}, root, root)]
    if not root.is_dir():
        raise UsageError(root, "does not exist", _REMEDY)
    below = _folders(root)
    if below.keys() & {"mse_sr", "gan_sr"} or given.keys() >= {"mse_sr", "gan_sr"}:
        return [_part("", {**below, **given}, root)]
    parts = []
    for folder in _folders_in(root):
        own = _folders(folder)
        if own.keys() & {"mse_sr", "gan_sr"}:
            for role, place in given.items():
                if not (place / folder.name).is_dir():
                    flag, reason = (
                        f"--{role if ' ' in role else role.replace('_', '-')}",
                        f"{place} has no folder {folder.name}",
                    )
                    raise UsageError(flag, reason, "give one with a folder for each part")
                own[role] = place / folder.name
            parts.append(_part(folder.name, own, folder))
    if not parts and (tagged := _tagged_folder(root)):
        parts.append(_part("", {**below, **tagged, **given}, root))
    if not parts:
        raise UsageError(root, "is no data set", _REMEDY)
    return parts


def _tagged_folder(root: Path) -> dict[str, Path]:
    """Return a folder by the role `_EVERY` where it holds a file called ``NAME@SR@``, and nothing otherwise."""
    return {_EVERY: root} if next(root.rglob("*@SR@.*"), None) else {}


def _tagged_files(folder: Path, skip: Path) -> tuple[dict[str, dict[str, Path]], list[ImageError]]:
    """Find the files of a folder whose names tell their role, by role and name; other files do not count."""
    images, problems = files_by_name({_EVERY: folder}, _EVERY, skip=skip)
    arrays = {
        str(path.relative_to(folder)).removesuffix(suffix): path
        for suffix in _ARRAYS
        for path in folder.rglob(f"*@{suffix}")
    }
    found: dict[str, dict[str, Path]] = {"gan_sr": {}}
    for name, path in images[_EVERY].items():
        if (tagged := _TAGGED.fullmatch(name)) and tagged["tag"] in _TAGS:
            found.setdefault(_TAGS[tagged["tag"]], {})[tagged["name"]] = path
    for name, path in arrays.items():
        if tagged := _TAGGED.fullmatch(name):
            found.setdefault(heat_map_role(tagged["tag"]), {})[tagged["name"]] = path
    return found, problems


def _part(name: str, folders: dict[str, Path], place: Path, coco: Path | None = None) -> Part:
    """Check that a part has all folders that it needs; an annotations.json in its folder is the ground truth."""
    if coco:
        folders.pop("gt_mask", None)
    elif (place / ANNOTATIONS).is_file():
        coco = place / ANNOTATIONS
        if "gt_mask" in folders:
            remedy = f"name {ANNOTATIONS} itself, or remove it"
            raise UsageError(place, f"has both masks in {folders['gt_mask'].name} and {ANNOTATIONS}", remedy)
    for role in ("mse_sr", "gan_sr"):
        if role not in folders and _EVERY not in folders:
            remedy = f"add it, or give --{role.replace('_', '-')}"
            raise UsageError(place, f"has no folder {ROLES[role]}", remedy)
    if coco is None and "gt_mask" not in folders:
        raise UsageError(place, f"has no folder {ROLES['gt_mask']} nor {ANNOTATIONS}", "add it")
    return name, folders, coco


def _folders(place: Path) -> dict[str, Path]:
    """Find the folders of a place that have a role, in any spelling."""
    found: dict[str, Path] = {}
    for folder in _folders_in(place):
        spelling = "".join(character for character in folder.name.casefold() if character.isalnum())
        role = _SPELLINGS.get(spelling) or _SPELLINGS.get(spelling.removesuffix("s"))
        if role in found:
            reason = f"has two folders for {ROLES[role]}: {found[role].name} and {folder.name}"
            raise UsageError(place, reason, "keep one of them")
        if role is not None:
            found[role] = folder
    return found


def _folders_in(place: Path) -> list[Path]:
    try:
        return sorted(folder for folder in place.iterdir() if folder.is_dir())
    except OSError as error:
        raise UsageError(place, f"cannot be read ({error.strerror})", "give read permission to it") from None


def _read_part(
    part: str,
    folders: Mapping[str, Path],
    coco: Path | None,
    skip: Path,
    data_set: DataSet,
    columns: tuple[str, str, str] | None,
) -> None:
    """Add the images of a part to a data set."""
    found: dict[str, dict[str, Path]] = {}
    if _EVERY in folders:
        found, problems = _tagged_files(folders[_EVERY], skip)
        data_set.failures.extend(problems)
    others = {role: folder for role, folder in folders.items() if role != _EVERY}
    if others:
        main = "gan_sr" if "gan_sr" in others else next(iter(others))
        more, problems = files_by_name(others, main, skip=skip, empty="add them, or remove the folder")
        data_set.failures.extend(problems)
        found |= more
    files = _named_alike(found)
    coco_masks: dict[str, CocoMask] = {}
    if coco and columns and coco.suffix.lower() == ".csv":
        for name, rows in _named(read_mask_rows(coco, columns), files["gan_sr"], coco).items():
            try:
                gan_sr = files["gan_sr"].get(name)
                shape = image_size(read_bytes(gan_sr), gan_sr) if gan_sr else None
                coco_masks[name], data_set.ratings[name] = _joined(rows, shape)
            except ImageError as error:
                data_set.failures.append(error)
                files["gan_sr"].pop(name, None)
    elif coco:
        coco_masks = _named(read_coco(coco), files["gan_sr"], coco)
    truths = files.get("gt_mask", {}).keys() | coco_masks.keys()
    needs_truth = coco is not None or "gt_mask" in folders
    for name in sorted(files["gan_sr"].keys() | truths):
        own = {role: paths[name] for role, paths in files.items() if name in paths}
        needed = ("gan_sr", "mse_sr", "labels", *(role for role in files if role.startswith(reference_role(""))))
        lacking = [role for role in needed if (role in files or role == "mse_sr") and role not in own]
        if "gan_sr" in own and needs_truth and name not in truths:
            data_set.unjudged.append(own["gan_sr"])
        elif lacking:
            subject = own.get("gan_sr") or own.get("gt_mask") or f"{coco}: {name}"
            remedy = "add it, or remove the mask" if lacking[0] == "gan_sr" else "add it, or remove this one"
            place = folders.get(lacking[0]) or folders[_EVERY]
            reason = f"has no image of its name in {place}"
            data_set.failures.append(ImageError(subject, reason, remedy))
            data_set.lacking.add(f"{part}/{name}" if part else name)
        else:
            data_set.examples.append(Example(part, name, own, coco_masks.get(name)))


def _named_alike(files: Mapping[str, dict[str, Path]]) -> dict[str, dict[str, Path]]:
    """Drop a folder's common ending of names where more files match a GAN result then: a_mask becomes a."""

    def matching(gan_sr: dict[str, Path]) -> dict[str, dict[str, Path]]:
        """Keep or drop the ending of each folder, as more of its names are names of these GAN results."""
        return {
            role: max((own, _without_ending(own)), key=lambda named: len(named.keys() & gan_sr.keys()))
            for role, own in files.items()
        }

    # The names of the GAN results may have an ending, too.
    ways = [matching(files["gan_sr"]), matching(_without_ending(files["gan_sr"]))]
    return max(ways, key=lambda named: sum(len(own.keys() & named["gan_sr"].keys()) for own in named.values()))


def _without_ending(files: dict[str, Path]) -> dict[str, Path]:
    """Drop the ending that all names share, from the first separator in it on."""
    ending = os.path.commonprefix([name[::-1] for name in files])[::-1]  # noqa: RUF071 (by characters)
    separator = re.search("[_. -]", ending)
    length = len(ending) - separator.start() if separator else 0
    if length in (0, min(map(len, files), default=0)):
        return files
    return {name[:-length]: path for name, path in files.items()}


def read_mask_rows(path: Path, columns: tuple[str, str, str]) -> dict[str, list[MaskRow]]:
    """Read a CSV file of masks by image; paths are relative to the file's folder.

    Args:
        path: The file.
        columns: The names of its columns of images, masks and shares of viewers.

    Raises:
        UsageError: The file cannot be read, lacks a column, or holds a value that is no share, or no name.
    """
    image, mask, prominence = columns
    found: dict[str, list[MaskRow]] = {}
    for line, row in csv_rows(path, columns, _TABLE):
        where = f"{path}, line {line}"
        if not row[image].strip() or not row[mask].strip():
            raise UsageError(where, f"has no {image if not row[image].strip() else mask}", _TABLE)
        noticed = share_of_viewers(row[prominence], where)
        found.setdefault(row[image].strip(), []).append(MaskRow(line, path.parent / row[mask].strip(), noticed))
    return found


def _joined(rows: Sequence[MaskRow], shape: tuple[int, int] | None) -> tuple[CocoMask, dict[int, Rating]]:
    """Join the masks of an image of ``(H, W)`` to one, and rate its regions.

    A region has the share of the mask that marks most of it, in the frame nothing. Without a shape, the image is not
    there, and the mask is empty. Raises `ImageError`: a mask cannot be read or has another size.
    """
    from pycocotools import mask as coco

    if shape is None:
        return CocoMask(1, 1, ""), {}
    masks = [np.pad(on_valid_region(read_mask(row.path), shape, row.path), FRAME) for row in rows]
    whole = np.any(masks, axis=0)
    regions = Components(whole)
    shares = np.array([regions.overlap(mask) for mask in masks])
    best = [rows[index] for index in np.argmax(shares, axis=0)] if len(regions) else []
    ratings = {number: Rating(row.noticed, None, row.line) for number, row in enumerate(best, 1)}
    counts = coco.encode(np.asfortranarray(whole.astype(np.uint8)))["counts"].decode()
    return CocoMask(*shape, counts), ratings


def _named(masks: Mapping[str, Masks], gan_sr: Mapping[str, Path], coco: Path) -> dict[str, Masks]:
    """Give each mask the name of its GAN result; leading folders that only one of the two names has are ignored."""
    names, named = ImageNames(gan_sr), dict[str, Masks]()
    for file_name, mask in masks.items():
        found = names.find(file_name) or [os.path.splitext(file_name.replace("\\", "/"))[0]]
        if len(found) > 1:
            remedy = "write its path below the folder of GAN results there"
            raise UsageError(f"{coco}, {file_name}", f"may be of {' or of '.join(found[:2])}", remedy)
        if found[0] in named:
            remedy = "give one image one name there"
            raise UsageError(f"{coco}, {file_name}", f"is {found[0]} again", remedy)
        named[found[0]] = mask
    return named
