"""Which mask is held against which ground truth: two folders, or a workspace with masks by people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from desra_core.errors import ImageError, UsageError
from desra_core.images.scanning import image_files, no_images, root_of
from desra_core.planning.keys import settings_document
from desra_core.workspace import Workspace
from desra_core.workspace.human_masks import read_human_masks
from desra_core.workspace.manifest import image_refs, read_manifest
from desra_core.workspace.matching import spelled_like, without_ambiguity

_MASK, _GROUND_TRUTH = "mask", "ground-truth"


class MaskPair(NamedTuple):
    """A mask, its ground truth, and what is known of their image.

    Attributes
    ----------
    name
        The relative path without suffix.
    labels
        Class labels: an image file, or a zarr array of a workspace.
    gan_sr
        The GAN result.
    whole
        Whether both masks are known to have the image's size; else that is concluded from what there is.
    """

    name: str
    mask: Path
    ground_truth: Path
    labels: Path | None = None
    gan_sr: Path | None = None
    whole: bool = False


class Pairing(NamedTuple):
    """What two sets of masks have in common, by name.

    Attributes
    ----------
    masks, ground_truth
        The folders; several may hold ground truth.
    pairs
        Sorted by name.
    failures
        Names and folders that are unclear.
    without_ground_truth, without_mask
        Masks and ground truths without a twin, by name.
    not_looked_at
        Masks of a workspace for which nobody has given a ground truth.
    outdated
        Masks by people that do not count, see `desra_core.workspace.human_masks`.
    by_people
        Of a workspace, the pairs whose ground truth is a mask by a person in it.
    """

    masks: Path
    ground_truth: tuple[Path, ...]
    pairs: list[MaskPair]
    failures: list[ImageError]
    without_ground_truth: dict[str, Path]
    without_mask: dict[str, Path]
    not_looked_at: int = 0
    outdated: int = 0
    by_people: int | None = None


class _Companions(NamedTuple):
    labels: Mapping[str, Path]
    gan_sr: Mapping[str, Path]


def pair_folders(masks: Path, gt: Path, *, labels: Path | None = None, gan_sr: Path | None = None) -> Pairing:
    """Match the masks of two folders by their relative paths, suffix aside.

    Parameters
    ----------
    masks, gt
        The masks to judge, and the ground truth.
    labels, gan_sr
        Folders of what goes with them by name, as far as it is there.

    Raises
    ------
    UsageError
        A folder does not exist, or one of the first two is empty.
    """
    files, failures = _scanned({_MASK: masks, _GROUND_TRUTH: gt})
    for role, folder in ((_MASK, masks), (_GROUND_TRUTH, gt)):
        if not files[role] and not failures:
            raise no_images(folder, f"name a folder of {role} files", image_files(folder).passed_over)
    found, truths = files[_MASK], files[_GROUND_TRUTH]
    whole = masks.name == "masks" and Workspace(masks.parent).manifest.exists()
    companions = _Companions(_by_name(labels, found), _by_name(gan_sr, found))
    return Pairing(
        masks=masks,
        ground_truth=(gt,),
        pairs=_pairs(found, truths, companions, whole=whole),
        failures=failures,
        without_ground_truth=_lacking(found, truths),
        without_mask=_lacking(truths, found),
    )


def pair_workspace(
    workspace: Workspace, *, gt: Path | None = None, labels: Path | None = None, gan_sr: Path | None = None
) -> Pairing:
    """Match the masks of a workspace with those by people in it, or else with a folder's.

    Labels and GAN results are the workspace's, where no folder is given and as far as it still has them.

    Raises
    ------
    UsageError
        The folder is no workspace, or nobody has given a ground truth.
    """
    if not workspace.manifest.exists() or not workspace.masks.is_dir():
        raise UsageError(workspace.root, "has no masks", "name the workspace of desra detect or mine")
    folders = {_MASK: workspace.masks} | ({_GROUND_TRUTH: gt} if gt is not None else {})
    files, failures = _scanned(folders)
    found, given = files[_MASK], files.get(_GROUND_TRUTH, {})
    human, outdated = _by_people(workspace)
    truths = given | human
    if not truths and not failures:
        reason = "holds no masks by people" + (f" that count ({outdated} do not)" if outdated else "")
        reason += "" if gt is None else f", and {gt} no images"
        raise UsageError(workspace.root, reason, "bring some with desra import, or name a folder with --gt")
    known = _of_workspace(workspace, found.keys() & truths.keys())
    companions = _Companions(
        _by_name(labels, found) if labels else known.labels, _by_name(gan_sr, found) if gan_sr else known.gan_sr
    )
    return Pairing(
        masks=workspace.masks,
        ground_truth=((workspace.human,) if human else ()) + ((gt,) if gt is not None else ()),
        pairs=_pairs(found, truths, companions, whole=True),
        failures=failures,
        without_ground_truth={},
        without_mask=_lacking(truths, found),
        not_looked_at=len(_lacking(found, truths)),
        outdated=outdated,
        by_people=len(found.keys() & human.keys()),
    )


def _scanned(folders: Mapping[str, Path]) -> tuple[dict[str, dict[str, Path]], list[ImageError]]:
    """The files of folders by role and name, and what is unclear about them."""
    tables: dict[str, pa.Table] = {}
    failures: list[ImageError] = []
    for role, folder in folders.items():
        tables[role], problems, _ = image_files(folder)
        failures += problems
    tables, ambiguous = without_ambiguity(tables)
    failures += [ImageError(row["subject"], row["reason"], row["remedy"]) for row in ambiguous.to_pylist()]
    masks = tables[_MASK]["name"]
    named = {role: table.set_column(0, "name", spelled_like(table["name"], masks)) for role, table in tables.items()}
    return {role: _paths(table, root_of(folders[role])) for role, table in named.items()}, failures


def _paths(files: pa.Table, folder: Path) -> dict[str, Path]:
    names, paths = files["name"].to_pylist(), files["path"].to_pylist()
    return {name: folder / path for name, path in zip(names, paths, strict=True)}


def _by_name(folder: Path | None, masks: Iterable[str]) -> dict[str, Path]:
    """The image files of a folder, by the names of masks, but for names that two of them share."""
    if folder is None:
        return {}
    files, _, others = image_files(folder)
    if not files.num_rows:
        raise no_images(folder, "name the folder whose files go with the masks, or leave it out", others)
    times = Counter(files["name"].to_pylist())
    files = files.set_column(0, "name", spelled_like(files["name"], pa.chunked_array([pa.array(masks, pa.string())])))
    return {name: path for name, path in _paths(files, root_of(folder)).items() if times[name] == 1}


def _pairs(
    masks: Mapping[str, Path], truths: Mapping[str, Path], companions: _Companions, *, whole: bool
) -> list[MaskPair]:
    return [
        MaskPair(name, masks[name], truths[name], companions.labels.get(name), companions.gan_sr.get(name), whole)
        for name in sorted(masks.keys() & truths.keys())
    ]


def _lacking(files: Mapping[str, Path], twins: Mapping[str, Path]) -> dict[str, Path]:
    return {name: files[name] for name in sorted(files.keys() - twins.keys())}


def _by_people(workspace: Workspace) -> tuple[dict[str, Path], int]:
    """The masks by people that count, by every name of their image, and how many do not."""
    manifest = read_manifest(workspace)
    assert manifest is not None
    key = (settings_document(workspace).get("target") or {}).get("gan_sr_key")
    by_id = read_human_masks(workspace, key)
    rows = zip(manifest["name"].to_pylist(), manifest["id"].to_pylist(), strict=True)
    human = {name: by_id[image_id].path for name, image_id in rows if image_id in by_id}
    there = image_files(workspace.human).files.num_rows if workspace.human.is_dir() else 0
    return human, max(0, there - len(set(human.values())))


def _of_workspace(workspace: Workspace, names: Iterable[str]) -> _Companions:
    """Labels and GAN results of some images, as far as a workspace has them or knows their files."""
    manifest = read_manifest(workspace)
    assert manifest is not None
    rows = manifest.filter(pc.is_in(manifest["name"], pa.array(sorted(names), pa.string())))
    labels: dict[str, Path] = {}
    gan_sr: dict[str, Path] = {}
    for image in image_refs(rows):
        stored = workspace.group(image.id) / "labels"
        for name in image.names:
            candidates = (
                (labels, image.labels.path if image.labels else stored),
                (gan_sr, image.gan_sr.path if image.gan_sr else workspace.dataset("gan_sr", name)),
            )
            for found, path in candidates:
                if path.exists():
                    found[name] = path
    return _Companions(labels, gan_sr)
