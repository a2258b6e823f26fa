"""Read masks in all usual forms, and pair them with their ground truth.

A mask may be 1-bit, gray, palette or colour, with or without the 5 px frame. Its ground truth is the file of the same
name in another folder, or the workspace's human mask.
"""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from desra_core.detection.mask import valid
from desra_core.errors import ImageError, UsageError
from desra_core.files import read_bytes
from desra_core.images.codec import Mask, Pixels, check_size, decode
from desra_core.images.scanning import image_files, no_images, paths_of
from desra_core.planning.plan import settings_document
from desra_core.workspace import Workspace
from desra_core.workspace.human_masks import read_human_masks
from desra_core.workspace.manifest import image_refs, read_manifest
from desra_core.workspace.matching import files_by_name, spelled_like

# Width of the border in which nothing is detected, in pixels.
FRAME = 5

# A lossy format makes only pixels near edges gray, so at most this share of a mask.
_MOST_GRAY = 0.25
# Black can get values up to this by JPEG's coarsest quantisation.
_NOISE = 31
# The remedy where the size of a mask does not fit.
SIZES = f"masks have the size of their image, or {2 * FRAME} px less each way"
_REMEDY = "save it as PNG with 0 where nothing is and 255 where something is"
_MASK, _GROUND_TRUTH = "mask", "ground-truth"


class MaskPair(NamedTuple):
    """A mask, its ground truth, and further files of their image."""

    name: str  # the relative path without suffix
    mask: Path
    ground_truth: Path
    labels: Path | None = None  # class labels: an image file, or a zarr array of a workspace
    gan_sr: Path | None = None
    whole: bool = False  # both masks are known to have the image's size; else their files must show that size


class Pairing(NamedTuple):
    """The pairs of two sets of masks, by name."""

    masks: Path
    ground_truth: tuple[Path, ...]  # folders
    pairs: list[MaskPair]  # sorted by name
    failures: list[ImageError]  # ambiguous names and unreadable folders
    without_ground_truth: dict[str, Path]  # masks by name
    without_mask: dict[str, Path]  # ground truths by name
    not_looked_at: int = 0  # masks of a workspace without a ground truth
    outdated: int = 0  # human masks that do not count, see `desra_core.workspace.human_masks`
    by_people: int | None = None  # pairs whose ground truth is a human mask of the workspace; None for two folders


def read_mask(path: Path) -> Mask:
    """Read a mask (raises as `decode_any_mask`, and `TransientError` where the file cannot be read)."""
    return decode_any_mask(read_bytes(path), path)


def decode_any_mask(data: bytes, path: Path) -> Mask:
    """Decode the mask in the whole content of a file to ``(H, W)`` bool; ``path`` is named in errors.

    Black and transparent pixels are not marked. All others are, and must have one colour or value (1, 255, 65535).
    Lossy files (`is_lossy`) are thresholded at half of the range. Raises `ImageError`: the file is no image, is
    damaged, or is not binary.
    """
    photo = decode(data, path, as_stored=True)
    if is_lossy(data):  # 8-bit pixels, marked where they are nearer to 255 than to 0
        pixels = photo.pixels
        gray = np.count_nonzero((pixels > 63) & (pixels < 192)) / pixels.size
        if gray > _MOST_GRAY:
            raise ImageError(path, f"is not binary: {100 * gray:.0f} % of its pixels are gray", _REMEDY)
        marked = np.asarray(_any_channel(pixels > 127))
        if ((pixels > 127) != marked[:, :, np.newaxis]).any():
            raise ImageError(path, "is not binary: it is coloured", _REMEDY)
        if not marked.any() and pixels.max() > _NOISE:
            raise ImageError(path, f"is not binary: its largest value is {pixels.max()}", _REMEDY)
        return marked if photo.alpha is None else marked & (photo.alpha > 127)
    marked = _painted(photo.pixels, path)
    if photo.alpha is None:
        return marked
    opaque = _painted(photo.alpha[:, :, np.newaxis], path)
    # Where a mask was drawn on a transparent ground, transparent pixels are black, or all pixels have one colour.
    if not marked.all() and (marked & ~opaque).any():
        raise ImageError(path, "is one mask by its colours and another by its transparency", "save it without alpha")
    return marked & opaque


def is_lossy(data: bytes) -> bool:
    """Check whether the content of a file is JPEG or lossy WebP."""
    if data[:3] == b"\xff\xd8\xff":
        return True
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return False
    start = 12
    while start + 8 <= len(data):
        kind, size = data[start : start + 4], int.from_bytes(data[start + 4 : start + 8], "little")
        if kind in (b"VP8 ", b"VP8L"):
            return kind == b"VP8 "
        start += 8 + size + size % 2
    return False


def on_valid_region(mask: Mask, shape: tuple[int, int], path: Path) -> Mask:
    """Crop the mask of an image of ``(H, W)`` to ``(H - 10, W - 10)``; a mask of that size stays as it is.

    Raises `ImageError` where the mask has another size, or nothing is left of the image.
    """
    height, width = shape
    check_size(mask, path, SIZES, shape, (height - 2 * FRAME, width - 2 * FRAME))
    if min(shape) <= 2 * FRAME:
        reason = f"is of an image of {width}x{height} px, which is all frame"
        raise ImageError(path, reason, f"images have more than {2 * FRAME} px a side")
    return valid(mask, FRAME) if mask.shape == shape else mask


def pair_folders(masks: Path, gt: Path, *, labels: Path | None = None, gan_sr: Path | None = None) -> Pairing:
    """Match the masks of two folders by their relative paths, suffix aside.

    Args:
        masks, gt: The masks to judge, and the ground truth.
        labels, gan_sr: Folders whose files go with the masks by name; some may be missing.

    Raises:
        UsageError: A folder does not exist, or one of the first two is empty.
    """
    files, failures = files_by_name({_MASK: masks, _GROUND_TRUTH: gt}, _MASK, empty="name a folder of {role} files")
    whole = masks.name == "masks" and Workspace(masks.parent).manifest.exists()
    further = {"labels": _by_name(labels, files[_MASK]), "gan_sr": _by_name(gan_sr, files[_MASK])}
    pairs, without_ground_truth, without_mask = _matched(files[_MASK], files[_GROUND_TRUTH], further, whole=whole)
    return Pairing(masks, (gt,), pairs, failures, without_ground_truth, without_mask)


def pair_workspace(
    workspace: Workspace, *, gt: Path | None = None, labels: Path | None = None, gan_sr: Path | None = None
) -> Pairing:
    """Match the masks of a workspace with its human masks; where there is no human mask, with the files of ``gt``.

    Without a folder, labels and GAN results are those of the workspace, as far as their files exist.

    Raises:
        UsageError: The folder is no workspace, or there is no ground truth.
    """
    manifest = read_manifest(workspace)
    if not workspace.manifest.exists() or not workspace.masks.is_dir():
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
    names = pa.array(sorted(found.keys() & truths.keys()), pa.string())
    for image in image_refs(manifest.filter(pc.is_in(manifest["name"], names))):
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


def _painted(pixels: Pixels, path: Path) -> Mask:
    """Mark the ``(H, W, C)`` pixels that are not black, which must all be equal."""
    marked = np.asarray(_any_channel(pixels != 0))
    if not marked.any():
        return marked
    colour = pixels.reshape(-1, pixels.shape[2])[marked.argmax()]
    if (_any_channel(pixels != colour) & marked).any():
        if pixels.shape[2] > 1:
            raise ImageError(path, "is not binary: it has several colours beside black", _REMEDY)
        values = np.unique(pixels).tolist()
        shown = ", ".join(map(str, values[:4])) + (" and more" if len(values) > 4 else "")
        raise ImageError(path, f"is not binary: it has the values {shown}", _REMEDY)
    return marked


def _any_channel(flags: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Compute ``flags.any(axis=2)``, several times faster."""
    found = flags[:, :, 0].copy()
    for channel in range(1, flags.shape[2]):
        found |= flags[:, :, channel]
    return found


def _by_name(folder: Path | None, masks: Iterable[str]) -> dict[str, Path]:
    """Collect the image files of a folder, by name as masks spell it; leave out names that two files share."""
    if folder is None:
        return {}
    files, _, others = image_files(folder)
    if not files.num_rows:
        raise no_images(folder, "name the folder whose files go with the masks, or leave it out", others)
    times = Counter(files["name"].to_pylist())
    files = files.set_column(0, "name", spelled_like(files["name"], pa.chunked_array([pa.array(masks, pa.string())])))
    named = zip(files["name"].to_pylist(), paths_of(folder, files), strict=True)
    return {name: path for name, path in named if times[name] == 1}


def _matched(
    masks: dict[str, Path], truths: dict[str, Path], further: dict[str, dict[str, Path]], *, whole: bool
) -> tuple[list[MaskPair], dict[str, Path], dict[str, Path]]:
    """Pair masks and ground truths by name; return the pairs, the other masks and the other ground truths."""
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
