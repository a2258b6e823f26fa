"""Pair masks with their ground truth: the files of two folders, or a workspace with its human masks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
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
from desra_core.workspace.matching import files_by_name, spelled_like

_MASK, _GROUND_TRUTH = "mask", "ground-truth"


class MaskPair(NamedTuple):
    """A mask, its ground truth, and further files of their image.

    Attributes:
        name: The relative path without suffix.
        labels: Class labels: an image file, or a zarr array of a workspace.
        gan_sr: The GAN result.
        whole: Whether both masks are known to have the image's size; else the files must show the size.
    """

    name: str
    mask: Path
    ground_truth: Path
    labels: Path | None = None
    gan_sr: Path | None = None
    whole: bool = False


class Pairing(NamedTuple):
    """The pairs of two sets of masks, by name.

    Attributes:
        masks, ground_truth: The folders; several may hold ground truth.
        pairs: Sorted by name.
        failures: Ambiguous names and unreadable folders.
        without_ground_truth, without_mask: Masks and ground truths without a twin, by name.
        not_looked_at: The number of masks of a workspace without a ground truth.
        outdated: The number of human masks that do not count, see `desra_core.workspace.human_masks`.
        by_people: The number of pairs whose ground truth is a human mask of the workspace; None for two folders.
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


def pair_folders(masks: Path, gt: Path, *, labels: Path | None = None, gan_sr: Path | None = None) -> Pairing:
    """Match the masks of two folders by their relative paths, suffix aside.

    Args:
        masks, gt: The masks to judge, and the ground truth.
        labels, gan_sr: Folders whose files go with the masks by name; some may be missing.

    Raises:
        UsageError: A folder does not exist, or one of the first two is empty.
    """
    files, failures = files_by_name({_MASK: masks, _GROUND_TRUTH: gt}, _MASK, empty="name a folder of {role} files")
    found, truths = files[_MASK], files[_GROUND_TRUTH]
    whole = masks.name == "masks" and Workspace(masks.parent).manifest.exists()
    further = {"labels": _by_name(labels, found), "gan_sr": _by_name(gan_sr, found)}
    pairs, without_ground_truth, without_mask = _matched(found, truths, further, whole=whole)
    return Pairing(masks, (gt,), pairs, failures, without_ground_truth, without_mask)


def pair_workspace(
    workspace: Workspace, *, gt: Path | None = None, labels: Path | None = None, gan_sr: Path | None = None
) -> Pairing:
    """Match the masks of a workspace with its human masks, and the others with the files of a folder.

    Labels and GAN results are the workspace's, where no folder is given and as far as their files exist.

    Raises:
        UsageError: The folder is no workspace, or there is no ground truth.
    """
    manifest = read_manifest(workspace)
    if manifest is None or not workspace.masks.is_dir():
        raise UsageError(workspace.root, "has no masks", "name the workspace of desra detect or mine")
    folders = {_MASK: workspace.masks} | ({_GROUND_TRUTH: gt} if gt is not None else {})
    files, failures = files_by_name(folders, _MASK)
    found = files[_MASK]
    human, outdated = _human_masks(workspace, manifest)
    truths = files.get(_GROUND_TRUTH, {}) | human
    if not truths and not failures:
        reason = "holds no human masks" + (f" that count ({outdated} do not)" if outdated else "")
        reason += "" if gt is None else f", and {gt} no images"
        raise UsageError(workspace.root, reason, "bring some with desra import, or name a folder with --gt")
    further = {"labels": _by_name(labels, found), "gan_sr": _by_name(gan_sr, found)}
    ids = pa.array(sorted(found.keys() & truths.keys()), pa.string())
    for image in image_refs(manifest.filter(pc.is_in(manifest["name"], ids))):
        for name in image.names:
            own = {
                "labels": image.labels.path if image.labels else workspace.group(image.id) / "labels",
                "gan_sr": image.gan_sr.path if image.gan_sr else workspace.dataset("gan_sr", name),
            }
            for role, folder in (("labels", labels), ("gan_sr", gan_sr)):
                if folder is None and own[role].exists():
                    further[role][name] = own[role]
    pairs, not_looked_at, without_mask = _matched(found, truths, further, whole=True)
    ground_truth = ((workspace.human,) if human else ()) + ((gt,) if gt is not None else ())
    counts = (len(not_looked_at), outdated, len(found.keys() & human.keys()))
    return Pairing(workspace.masks, ground_truth, pairs, failures, {}, without_mask, *counts)


def _by_name(folder: Path | None, masks: Iterable[str]) -> dict[str, Path]:
    """Collect the image files of a folder by the names of masks, without names that two files share."""
    if folder is None:
        return {}
    files, _, others = image_files(folder)
    if not files.num_rows:
        raise no_images(folder, "name the folder whose files go with the masks, or leave it out", others)
    times = Counter(files["name"].to_pylist())
    files = files.set_column(0, "name", spelled_like(files["name"], pa.chunked_array([pa.array(masks, pa.string())])))
    named = zip(files["name"].to_pylist(), files["path"].to_pylist(), strict=True)
    return {name: root_of(folder) / path for name, path in named if times[name] == 1}


def _matched(
    masks: dict[str, Path], truths: dict[str, Path], further: dict[str, dict[str, Path]], *, whole: bool
) -> tuple[list[MaskPair], dict[str, Path], dict[str, Path]]:
    """Pair masks and ground truths by name; returns the pairs, the other masks and the other ground truths."""
    pairs = [
        MaskPair(name, masks[name], truths[name], further["labels"].get(name), further["gan_sr"].get(name), whole)
        for name in sorted(masks.keys() & truths.keys())
    ]
    without_truth = {name: masks[name] for name in sorted(masks.keys() - truths.keys())}
    return pairs, without_truth, {name: truths[name] for name in sorted(truths.keys() - masks.keys())}


def _human_masks(workspace: Workspace, manifest: pa.Table) -> tuple[dict[str, Path], int]:
    """Find the human masks that count, by every name of their image, and count those that do not."""
    key = (settings_document(workspace).get("target") or {}).get("gan_sr_key")
    by_id = read_human_masks(workspace, key)
    rows = zip(manifest["name"].to_pylist(), manifest["id"].to_pylist(), strict=True)
    human = {name: by_id[image_id].path for name, image_id in rows if image_id in by_id}
    there = image_files(workspace.human).files.num_rows if workspace.human.is_dir() else 0
    return human, max(0, there - len(set(human.values())))
