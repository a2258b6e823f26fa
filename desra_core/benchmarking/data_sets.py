"""The images of a data set of pairs: which files belong together, and what lacks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from desra_core.benchmarking.data_layouts import Part, find_parts
from desra_core.errors import ImageError, UsageError
from desra_core.evaluation.coco_masks import CocoMask, read_coco
from desra_core.images.names import ImageNames
from desra_core.images.scanning import image_files, no_images, root_of
from desra_core.workspace.matching import spelled_like, without_ambiguity


class Example(NamedTuple):
    """The files of an image by role; its ground truth is one of them, or a mask of a COCO file."""

    part: str
    name: str
    files: Mapping[str, Path]
    coco_mask: CocoMask | None

    @property
    def title(self) -> str:
        """Its part and name."""
        return f"{self.part}/{self.name}" if self.part else self.name


@dataclass(frozen=True)
class DataSet:
    """What was found in a data set.

    Attributes
    ----------
    examples
        The images that can be judged, by part and name.
    failures
        A line for each image that lacks something.
    unjudged
        GAN results without a ground truth: nobody has looked at them.
    """

    examples: list[Example] = field(default_factory=list)
    failures: list[ImageError] = field(default_factory=list)
    unjudged: list[Path] = field(default_factory=list)


def read_pairs(folders: Mapping[str, Path], skip: Path) -> DataSet:
    """Find the images of some folders by role, of which nobody has marked the artifacts; as `read_data_set`."""
    data_set = DataSet()
    _read_part(Part("", folders), skip, data_set)
    return _not_empty(data_set, folders["gan_sr"])


def read_data_set(root: Path, folders: Mapping[str, Path], skip: Path) -> DataSet:
    """Find the images of a data set.

    Files belong together when their relative paths agree without suffix. Where those of a folder agree with no GAN
    result's, an ending that all of them share, such as ``_out`` or ``-mask``, is dropped.

    Parameters
    ----------
    root, folders
        As for `desra_core.benchmarking.data_layouts.find_parts`.
    skip
        The folder of the results, should it lie inside of one of them.

    Raises
    ------
    UsageError
        There is no such data set, a folder holds no images, or the COCO file is damaged.
    """
    data_set = DataSet()
    for part in find_parts(root, folders):
        _read_part(part, skip, data_set)
    return _not_empty(data_set, root)


def _not_empty(data_set: DataSet, place: Path) -> DataSet:
    if data_set.examples:
        return data_set
    if data_set.failures:
        first, others = data_set.failures[0], len(data_set.failures) - 1
        more = f" ({others} more files fail)" if others else ""
        raise UsageError(first.subject, first.reason + more, first.remedy)
    raise UsageError(place, "is an empty data set: no GAN result has a ground truth", "see that their names agree")


def _read_part(part: Part, skip: Path, data_set: DataSet) -> None:
    """Add the images of a part."""
    files = _aligned(_listed(part.folders, skip, data_set))
    truth = files.pop("gt_mask", {})
    coco_masks = _named(read_coco(part.coco), files["gan_sr"], part.coco) if part.coco else {}
    marked = part.coco is not None or "gt_mask" in part.folders
    required = [role for role in ("mse_sr", "labels") if role in files]
    for name in sorted(files["gan_sr"].keys() | truth.keys() | coco_masks.keys()):
        own = {role: paths[name] for role, paths in files.items() if name in paths}
        if name in truth:
            own["gt_mask"] = truth[name]
        if "gan_sr" not in own:
            subject = own.get("gt_mask") or f"{part.coco}: {name}"
            reason = f"has no image of its name in {part.folders['gan_sr']}"
            data_set.failures.append(ImageError(subject, reason, "add it, or remove the mask"))
        elif marked and "gt_mask" not in own and name not in coco_masks:
            data_set.unjudged.append(own["gan_sr"])
        elif lacking := [role for role in required if role not in own]:
            reason = f"has no image of its name in {part.folders[lacking[0]]}"
            data_set.failures.append(ImageError(own["gan_sr"], reason, "add it, or remove this one"))
        else:
            data_set.examples.append(Example(part.name, name, own, coco_masks.get(name)))


def _listed(folders: Mapping[str, Path], skip: Path, data_set: DataSet) -> dict[str, dict[str, Path]]:
    """The images below each folder, by their relative path without suffix."""
    tables = {}
    for role, folder in folders.items():
        tables[role], problems, others = image_files(folder, skip)
        if tables[role].num_rows == 0 and not problems:
            raise no_images(folder, "add them, or remove the folder", others)
        data_set.failures.extend(problems)
    tables, unclear = without_ambiguity(tables)
    data_set.failures.extend(_errors(unclear))
    gan_sr = tables["gan_sr"]["name"]
    named = {role: table.set_column(0, "name", spelled_like(table["name"], gan_sr)) for role, table in tables.items()}
    return {
        role: {row["name"]: root_of(folders[role]) / row["path"] for row in table.to_pylist()}
        for role, table in named.items()
    }


def _errors(failures: pa.Table) -> list[ImageError]:
    return [ImageError(row["subject"], row["reason"], row["remedy"]) for row in failures.to_pylist()]


def _aligned(files: Mapping[str, dict[str, Path]]) -> dict[str, dict[str, Path]]:
    """The same files, by names without a folder's common ending where that makes more twins."""
    others = [own for role, own in files.items() if role != "gan_sr"]

    def best(own: dict[str, Path], gan_sr: dict[str, Path]) -> dict[str, Path]:
        return max((own, _without_ending(own)), key=lambda named: len(named.keys() & gan_sr.keys()))

    def twins(gan_sr: dict[str, Path]) -> int:
        return sum(len(best(own, gan_sr).keys() & gan_sr.keys()) for own in others)

    gan_sr = max((files["gan_sr"], _without_ending(files["gan_sr"])), key=twins)
    return {role: gan_sr if role == "gan_sr" else best(own, gan_sr) for role, own in files.items()}


def _without_ending(files: dict[str, Path]) -> dict[str, Path]:
    """Drop what all names end with, from its first separator on."""
    backwards = sorted(name[::-1] for name in files)
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(backwards[0], backwards[-1], strict=False)) if files else ()
    ending = "".join(character for character, _ in alike)[::-1]
    starts = [index for index, character in enumerate(ending) if character in "_-. "]
    length = len(ending) - starts[0] if starts else 0
    if length in (0, min(map(len, files), default=0)):
        return files
    return {name[:-length]: path for name, path in files.items()}


def _named(masks: Mapping[str, CocoMask], gan_sr: Mapping[str, Path], coco: Path) -> dict[str, CocoMask]:
    """The masks by the names of the GAN results; folders that only one of both knows are dropped."""
    names, named = ImageNames(gan_sr), dict[str, CocoMask]()
    for file_name, mask in masks.items():
        found = names.find(file_name) or [os.path.splitext(file_name.replace("\\", "/"))[0]]
        if len(found) > 1:
            remedy = "write its path below the folder of GAN results as file_name"
            raise UsageError(f"{coco}, {file_name}", f"may be of {' or of '.join(found[:2])}", remedy)
        if found[0] in named:
            raise UsageError(file_name, f"is {found[0]} again", "keep one image of this name in the COCO file")
        named[found[0]] = mask
    return named
