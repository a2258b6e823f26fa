"""Divide the images of a workspace into a training and a held-out pool, and list the images of a pool.

Images that show the same form a group, and a whole group belongs to one pool. An image is assigned to a pool when it is
first asked for, and the first image of a group decides for all. ``split.parquet`` keeps the assignment: an image that
was trained on never judges.
"""

import dataclasses
import functools
import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple, get_args

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from desra_core.errors import ImageError, UsageError
from desra_core.files import as_json, digest, read_bytes, read_json
from desra_core.images.codec import Pixels, bgr8, read_image
from desra_core.images.scanning import paths_of
from desra_core.planning.plan import done_images, load_settings
from desra_core.settings import CorpusSettings, Mining
from desra_core.workspace import Workspace, read_table
from desra_core.workspace.human_masks import HumanMask, read_human_masks
from desra_core.workspace.manifest import File, ImageRef, image_refs, read_manifest
from desra_core.workspace.matching import Sources, match, spelled_like
from desra_core.workspace.products import Target

TRAINING_SHARE = 0.7

Pool = Literal["training", "held_out"]

SPLIT = pa.schema(
    [("id", pa.string()), ("group", pa.string()), ("pool", pa.string()), ("signature", pa.binary()),
     ("group_by", pa.string())]
)  # fmt: skip
# Images whose pools are looked up at first, then twice as many each time, until enough of a pool are found.
_AT_ONCE = 64
# Photos whose signatures differ in at most this many of 256 bits are duplicates. Other photos differ in about half.
MAX_DISTANCE = 24
_SIDE = 16


class ArtifactImage(NamedTuple):
    """An image with artifacts: by its human mask, or by the detector's mask where it has no human mask.

    ``severity`` is the sum over the detector's regions, 0 without such regions.
    """

    image: ImageRef
    severity: float
    human: HumanMask | None = None


class Pools:
    """The images of a workspace that are done under the settings of its latest run, by pool.

    A human mask decides whether an image has artifacts; without one, the detector decides. An image is clean where both
    find no artifact. An image with an empty human mask, but marked by the detector, is neither.

    Args:
        workspace: Must be locked: images are assigned to pools when they are first asked for.
        settings, target: Of the latest run.
        group_by: As for `assign_pools`.
        lr: Folder of the LR photos, where the latest run had no such folder.

    Raises:
        UsageError: There is no LR folder, or it holds no photo of any image.
    """

    def __init__(
        self, workspace: Workspace, settings: CorpusSettings, target: Target, group_by: str, lr: Path | None = None
    ) -> None:
        self._workspace = workspace
        self._group_by = group_by
        manifest = read_manifest(workspace)
        self._manifest = manifest.filter(manifest["present"])
        self._lr: dict[str, Path] | None = None
        if settings.sources.lr is None:
            if lr is None:
                remedy = "give --lr with the folder of the photos that the results were made from"
                raise UsageError(workspace.root, "records no LR photos", remedy)
            sources = Sources(lr=lr)
            photos, _, _ = match(sources, workspace.root)
            # The keys are the names of the workspace's images, spelled as in the workspace.
            names = spelled_like(photos["name"], manifest["name"]).to_pylist()
            self._lr = dict(zip(names, paths_of(lr, photos, "lr_"), strict=True))
            if self._lr.keys().isdisjoint(self._manifest["name"].to_pylist()):
                remedy = "name the folder that mirrors theirs"
                raise UsageError(lr, "holds no photo of any image of the workspace", remedy)
        done = done_images(workspace, target)
        self._marked = done.filter(pc.greater(done["artifact_pixels"], 0)).combine_chunks()
        self._human = read_human_masks(workspace, target.gan_sr_key)
        undetected = set(done["id"].filter(pc.equal(done["artifact_pixels"], 0)).to_pylist())
        human_only = undetected & {image_id for image_id, human in self._human.items() if human.pixels}
        # Sorted by content hash, so that the first ones, however many, are a fair sample.
        self._clean_ids = sorted(undetected - human_only)
        # The dataset may lack the pictures of a mined image until the next run makes them.
        self._human_only = {
            image_id
            for image_id in human_only
            if not target.super_resolves or workspace.dataset("mask", self._human[image_id].name).exists()
        }

    def with_artifacts(self, pool: Pool) -> Iterator[ArtifactImage]:
        """Yield the images of a pool that have artifacts. Only as many photos are read as are asked for.

        Images with a human mask come first, because their artifacts are certain. The order within both groups is by
        severity, then by the pixels of the human mask, descending.
        """

        def order(image_id: str) -> tuple[bool, float, int, str]:
            human = self._human.get(image_id)
            return human is None, -self._severities[image_id], -human.pixels if human else 0, image_id

        for image in self.of_pool(sorted(self._severities, key=order), pool):
            yield ArtifactImage(image, self._severities[image.id], self._human.get(image.id))

    def held_out_judges(self, count: int) -> list[ImageRef]:
        """List up to ``count`` held-out images with artifacts, in the order of the content hash.

        Images with only a human mask are left out, because they cannot show whether the detector finds less.
        """
        return list(islice(self.of_pool(sorted(self._severities.keys() - self._human_only), "held_out"), count))

    def clean(self, pool: Pool, count: int) -> list[ImageRef]:
        """List up to ``count`` images of a pool that have no artifact, in the order of the content hash."""
        return list(islice(self.of_pool(self._clean_ids, pool), count))

    def ids_with_artifacts(self) -> set[str]:
        """Return the ids of the images of both pools that have artifacts."""
        return set(self._severities)

    @functools.cached_property
    def _severities(self) -> dict[str, float]:
        """The severity of each image with artifacts."""
        regions = self._marked["regions"].combine_chunks()
        severities = pc.struct_field(pc.list_flatten(regions), "severity")
        sums = np.bincount(pc.list_parent_indices(regions), weights=severities, minlength=len(regions))
        found = dict(zip(self._marked["id"].to_pylist(), sums.tolist(), strict=True))
        found = {key: value for key, value in found.items() if key not in self._human or self._human[key].pixels}
        return found | dict.fromkeys(self._human_only, 0.0)

    def lacking(self) -> str | None:
        """Describe which images the gate lacks: held-out ones with or without artifacts; None where it has both."""
        missing = []
        if not self.held_out_judges(1):
            count = sum(1 for pool in get_args(Pool) for _ in self.with_artifacts(pool))
            missing.append(_none_held_out(count, "with artifacts"))
        if not self.clean("held_out", 1):
            missing.append(_none_held_out(len(self._clean_ids), "without artifacts"))
        if not missing:
            return None
        about = math.ceil(1 / (1 - TRAINING_SHARE))
        share = round(100 * (1 - TRAINING_SHARE))
        each = "of them" if len(missing) == 1 else "of each"
        remedy = f"at least 1 {each} must be held out, so add {about} or more: about {share} % of them will be"
        return f"the gate will be undecided: {' and '.join(missing)}; {remedy}"

    def of_pool(self, ids: list[str], pool: Pool) -> Iterator[ImageRef]:
        """Yield the images with these ids, in order, that are in the pool and have an LR photo."""
        count = _AT_ONCE
        while ids:
            part, ids, count = ids[:count], ids[count:], 2 * count
            images = {}
            for image in image_refs(self._manifest.filter(pc.is_in(self._manifest["id"], pa.array(part, pa.string())))):
                if self._lr is None:
                    images[image.id] = image
                elif (path := self._lr.get(image.names[0])) is not None:
                    images[image.id] = dataclasses.replace(image, lr=File(path, digest(read_bytes(path))))
            pools = assign_pools(self._workspace, list(images.values()), self._group_by)
            yield from (images[key] for key in part if key in images and pools.get(key) == pool)


def _none_held_out(count: int, kind: str) -> str:
    return f"none of the {count} photos {kind} is held out" if count else f"there is no photo {kind}"


def note_trained(workspace: Workspace, group_by: str) -> None:
    """Record the images with artifacts when a finetune ends, for `count_new`.

    Nothing is recorded for a workspace of desra detect, whose results come from elsewhere. Raises as `count_new`, or
    `TransientError`.
    """
    settings, target = load_settings(workspace)
    if isinstance(settings, Mining):
        known = Pools(workspace, settings, target, group_by).ids_with_artifacts()
        workspace.publish(workspace.gathered, as_json({"ids": sorted(known)}))


def count_new(workspace: Workspace, group_by: str) -> int:
    """Count the artifact images that have come to the training pool since the last finetune ended.

    The workspace must be one of desra mine, and locked; ``group_by`` is as for `assign_pools`. Raises `UsageError`
    where nothing was mined yet.
    """
    noted = read_json(workspace.gathered)
    known = set(noted["ids"] if isinstance(noted, dict) else noted or [])  # an older desra wrote a list
    pools = Pools(workspace, *load_settings(workspace), group_by)
    return sum(1 for _ in pools.of_pool(sorted(pools.ids_with_artifacts() - known), "training"))


def pool_of(group: str) -> Pool:
    """Choose the pool of a group by the hash of its key: `TRAINING_SHARE` of all groups are for training.

    Examples:
        >>> pool_of("kodak/kodim01"), pool_of("kodak/kodim06")
        ('held_out', 'training')
    """
    number = int.from_bytes(hashlib.blake2b(group.encode(), digest_size=8).digest())
    return "training" if number < TRAINING_SHARE * 2**64 else "held_out"


def assign_pools(workspace: Workspace, images: Sequence[ImageRef], group_by: str) -> dict[str, Pool]:
    """Look up the pools of images, and assign those that have none yet.

    Args:
        workspace: Must be locked.
        images: With their LR photos.
        group_by: ``duplicates``: an image joins the group of its nearest known near-duplicate, else it founds a group;
            ``folder``: its folder is its group; or a regular expression, whose first group (or whole match, without
            groups) names the group. An image that does not match is a group of its own.

    Returns:
        Pools by image id. Photos that cannot be decoded have none.

    Raises:
        UsageError: ``group_by`` is no regular expression, or the workspace was split by another one before.
    """
    remedy = "bring it back from a copy; if it is deleted, images that were trained on may become judges"
    known = read_table(workspace.split, SPLIT, remedy=remedy).to_pylist()
    if known and known[0]["group_by"] != group_by:
        remedy = "keep to it: with another one, the gate could judge by images that were trained on"
        raise UsageError("--group-by", f"{group_by}, but this workspace was split by {known[0]['group_by']}", remedy)
    pools: dict[str, Pool] = {row["id"]: row["pool"] for row in known}
    unique = {image.id: image for image in images if image.id not in pools}
    fresh = [unique[key] for key in sorted(unique)]
    rows: list[dict[str, Any]] = []
    if group_by == "duplicates":
        groups = [row["group"] for row in known]
        signatures = bytearray().join(row["signature"] for row in known)
        with ThreadPoolExecutor() as executor:
            for image, found in zip(fresh, executor.map(_signature, fresh), strict=True):
                if found is not None:
                    group = nearest_group(signatures, groups, found) or image.id
                    signatures += found
                    groups.append(group)
                    rows.append({"id": image.id, "group": group, "signature": found})
    else:
        rows = _by_name(fresh, group_by)
    for row in rows:
        row |= {"pool": pool_of(row["group"]), "group_by": group_by}
        pools[row["id"]] = row["pool"]
    if rows:
        workspace.publish_table(workspace.split, pa.Table.from_pylist(known + rows, SPLIT))
    return {image.id: pools[image.id] for image in images if image.id in pools}


def _by_name(fresh: list[ImageRef], group_by: str) -> list[dict[str, Any]]:
    if group_by == "folder":
        return [{"id": image.id, "group": str(PurePosixPath(image.names[0]).parent)} for image in fresh]
    try:
        pattern = re.compile(group_by)
    except (re.error, OverflowError, RecursionError) as error:
        remedy = "give duplicates, folder or a pattern"
        raise UsageError("--group-by", f"{group_by} is no regular expression ({error})", remedy) from None
    rows = []
    for image in fresh:
        name = image.names[0]
        found = pattern.search(name)
        group = found[1 if pattern.groups else 0] if found else None
        rows.append({"id": image.id, "group": group or name})
    return rows


def nearest_group(signatures: bytearray, groups: list[str], wanted: bytes) -> str | None:
    """Return the group of the nearest duplicate of a photo, in a tie the first.

    Args:
        signatures, groups: The signatures of other photos, one after the other, and their groups. Comparing with
            100,000 signatures takes far less time than decoding one photo.
        wanted: The signature of the photo.

    Returns:
        None if no photo is within `MAX_DISTANCE`.
    """
    if not groups:
        return None
    words = np.frombuffer(signatures, np.uint64).reshape(len(groups), -1)
    distances = np.bitwise_count(words ^ np.frombuffer(wanted, np.uint64)).sum(axis=1)
    nearest = int(distances.argmin())
    return groups[nearest] if distances[nearest] <= MAX_DISTANCE else None


def signature(pixels: Pixels) -> bytes:
    """Hash a photo to 256 bits, which say for a 16x17 grid of cells where brightness rises from left to right.

    Args:
        pixels: ``(H, W, 1 or 3)`` uint8 or uint16.

    Returns:
        32 bytes. Another scale, contrast or compression, or gray instead of colour, changes few bits.
    """
    gray = cv2.cvtColor(bgr8(pixels), cv2.COLOR_BGR2GRAY).astype(np.float32)
    cells = cv2.resize(gray, (_SIDE + 1, _SIDE), interpolation=cv2.INTER_AREA)
    return np.packbits(cells[:, 1:] > cells[:, :-1]).tobytes()


def _signature(image: ImageRef) -> bytes | None:
    """Compute the signature of an LR photo; None where it cannot be decoded."""
    assert image.lr is not None
    try:
        return signature(read_image(image.lr.path))
    except ImageError:
        return None
