"""The images of a workspace as finetuning and the gate see them: marked or clean, to train on or to judge by."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from desra_core.errors import UsageError
from desra_core.files.hashing import digest, read_bytes
from desra_core.planning.plan import done_images
from desra_core.settings import CorpusSettings
from desra_core.training.split import TRAINING_SHARE, Member, Pool, assign_pools
from desra_core.workspace import Workspace
from desra_core.workspace.human_masks import HumanMask, read_human_masks
from desra_core.workspace.manifest import File, ImageRef, image_refs, read_manifest
from desra_core.workspace.matching import Sources, match, spelled_like
from desra_core.workspace.products import Target

# Clean images whose pools are looked up at a time, until there are enough of a pool.
_CLEAN_AT_ONCE = 64


class Marked(NamedTuple):
    """An image with artifacts, by a person's word where there is one, else by the detector's.

    ``severity`` is the sum over the detector's regions, 0 where it has none and is not ``detected``; ``human`` is the
    mask by a person.
    """

    image: ImageRef
    severity: float
    human: HumanMask | None = None
    detected: bool = True


class Images:
    """The images of a workspace that are done under the settings of its latest run, by pool.

    Whether an image is marked is for people to say, and for the detector where nobody has looked. Clean is one that
    both call so: where the detector marks what a person does not, the image is neither.

    Parameters
    ----------
    workspace
        Must be locked: images are assigned to pools when they are first asked for.
    settings, target
        Of the latest run.
    group_by
        As for `desra_core.training.split.assign_pools`.
    lr
        Folder of the LR photos, where the latest run had none.

    Raises
    ------
    UsageError
        There is no LR folder, or another one.
    """

    def __init__(
        self, workspace: Workspace, settings: CorpusSettings, target: Target, group_by: str, lr: Path | None = None
    ) -> None:
        self._workspace = workspace
        self._group_by = group_by
        self._lr: dict[str, Path] | None = None
        if settings.sources.lr is None:
            if lr is None:
                remedy = "give --lr with the folder of the photos that the results were made from"
                raise UsageError(workspace.root, "records no LR photos", remedy)
            self._lr = _photos(lr, workspace)
        manifest = read_manifest(workspace)
        assert manifest is not None
        self._manifest = manifest.filter(manifest["present"])
        if self._lr is not None and self._lr.keys().isdisjoint(self._manifest["name"].to_pylist()):
            raise UsageError(lr, "holds no photo of any image of the workspace", "name the folder that mirrors theirs")
        done = done_images(workspace, target)
        self._marked = done.filter(pc.greater(done["artifact_pixels"], 0)).combine_chunks()
        # By the hash of their content, which is a fair sample however few are taken.
        clean_ids = set(done["id"].filter(pc.equal(done["artifact_pixels"], 0)).to_pylist())
        self._human = read_human_masks(workspace, target.gan_sr_key)
        by_people = {image_id for image_id, human in self._human.items() if human.pixels}
        self._clean_ids = sorted(clean_ids - by_people)
        self._overlooked_ids = sorted(
            image_id
            for image_id in clean_ids & by_people
            # Of a mined image the next run makes the pictures, if they were not kept.
            if not target.super_resolves or workspace.dataset("mask", self._human[image_id].name).exists()
        )

    def marked(self, pool: Pool) -> list[Marked]:
        """The images of a pool that have artifacts.

        First those with a mask by a person, which is sure; then by severity, where it is equal by the pixels that a
        person marked.
        """
        lists = self._marked["regions"].combine_chunks()
        severities = pc.struct_field(pc.list_flatten(lists), "severity")
        sums = np.bincount(pc.list_parent_indices(lists), weights=severities, minlength=len(lists))
        severity = dict(zip(self._marked["id"].to_pylist(), sums.tolist(), strict=True))
        severity = {key: value for key, value in severity.items() if key not in self._human or self._human[key].pixels}
        severity |= dict.fromkeys(self._overlooked_ids, 0.0)
        images = self._of_pool(list(severity), pool)
        overlooked = set(self._overlooked_ids)
        found = [
            Marked(image, severity[image.id], self._human.get(image.id), image.id not in overlooked) for image in images
        ]
        return sorted(found, key=_order)

    def clean(self, pool: Pool, count: int) -> list[ImageRef]:
        """Some images of a pool that have no artifact."""
        found: list[ImageRef] = []
        for start in range(0, len(self._clean_ids), _CLEAN_AT_ONCE):
            if len(found) >= count:
                break
            found += self._of_pool(self._clean_ids[start : start + _CLEAN_AT_ONCE], pool)
        return found[:count]

    def undecided(self) -> str | None:
        """What the gate lacks to judge a finetune by, for people; None where it has images of both kinds."""
        held_out = self.marked("held_out")
        counts = {
            "with artifacts": (len(held_out) + len(self.marked("training")), any(image.detected for image in held_out)),
            "without artifacts": (len(self._clean_ids), bool(self.clean("held_out", 1))),
        }
        missing = [
            f"none of the {count} photos {kind} is held out" if count else f"there is no photo {kind}"
            for kind, (count, judges) in counts.items()
            if not judges
        ]
        if not missing:
            return None
        about = math.ceil(1 / (1 - TRAINING_SHARE))
        share = round(100 * (1 - TRAINING_SHARE))
        each = "of them" if len(missing) == 1 else "of each"
        remedy = f"at least 1 {each} is missing, so add {about} or more, of which {share} % are held out"
        return f"the gate will be undecided: {' and '.join(missing)}; {remedy}"

    def _of_pool(self, ids: list[str], pool: Pool) -> list[ImageRef]:
        rows = self._manifest.filter(pc.is_in(self._manifest["id"], pa.array(ids, pa.string())))
        images = {image.id: image for image in self._with_lr(image_refs(rows))}
        members = [Member(image.id, image.names[0], _lr(image)) for image in images.values()]
        pools = assign_pools(self._workspace, members, self._group_by)
        return [images[key] for key in ids if key in images and pools.get(key) == pool]

    def _with_lr(self, images: list[ImageRef]) -> Iterator[ImageRef]:
        """Add the LR photo where it comes from another folder; without one an image is left out."""
        for image in images:
            if self._lr is None:
                yield image
            elif image.names[0] in self._lr:
                path = self._lr[image.names[0]]
                fields = image.__dict__ | {"lr": File(path, digest(read_bytes(path)))}
                yield ImageRef(**fields)


def _photos(folder: Path, workspace: Workspace) -> dict[str, Path]:
    """The photos of a folder by name, as the images of the workspace are spelled."""
    sources = Sources(lr=folder)
    found = match(sources, workspace.root).images
    manifest = read_manifest(workspace)
    assert manifest is not None
    names, paths = spelled_like(found["name"], manifest["name"]).to_pylist(), found["lr_path"].to_pylist()
    return {name: sources.main / path for name, path in zip(names, paths, strict=True)}


def _order(marked: Marked) -> tuple[bool, float, int, tuple[str, ...]]:
    pixels = marked.human.pixels if marked.human else 0
    return marked.human is None, -marked.severity, -pixels, marked.image.names


def _lr(image: ImageRef) -> Path:
    assert image.lr is not None
    return image.lr.path
