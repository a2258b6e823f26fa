"""Check the files of a workspace against the checksums that they were written with, and mark damaged ones.

The record of an image has the checksums of its pictures. Arrays, tables, JSON documents and checkpoints have their own
inside, frozen training images a list beside them, promoted models their content key in the history. Reports, logs,
TensorBoard's files and pictures in reports have none.

To mark a file is to delete it: then the next run lacks it, and makes it again. What no run can make again stays.
"""

import io
import os
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from desra_core.errors import ImageError, LostError, TransientError, UsageError
from desra_core.files import checksum, parse_json, read_bytes, read_checked
from desra_core.gate.model_registry import damaged_entries
from desra_core.housekeeping import contents
from desra_core.images.codec import decode
from desra_core.training.patches import check_frozen
from desra_core.training.plan import RunFolder
from desra_core.workspace import DATASET, Workspace, check_parquet
from desra_core.workspace.answers import raters, read_answers
from desra_core.workspace.arrays import check_array
from desra_core.workspace.human_masks import all_human_masks
from desra_core.workspace.manifest import MANIFEST, ImageRef, image_refs, read_manifest
from desra_core.workspace.products import ARRAYS, Record, finished_shards, read_shard

# Folders whose files belong to single images, or are unfinished, of Prefect, or for people.
_APART = {"masks", "maps", "pages", "tmp", "prefect", "journal", "tensorboard"}
_APART |= {f"dataset/{kind}" for kind in DATASET}
_COPY = "bring it back from a copy"
# What no run can make again, by the first part of its path, and what to do.
_REMEDIES = {
    "split.parquet": f"{_COPY}; if it is deleted, images that were trained on may become judges",
    "human": f"{_COPY}, or import the masks again",
    "imports": f"{_COPY}, or delete it: then that import cannot be undone",
    "exported": f"{_COPY}, or delete it: the folder of its export still has its masks",
    "review": f"{_COPY}, or delete it: then reviewed images take no part in further reviews",
    "models": f"{_COPY}, or roll back",
    "deliveries": f"{_COPY}, or delete it and empty the output folder",
}


class Damage(NamedTuple):
    """A file or array that is not as it was written; ``remedy`` is None where desra can make it again."""

    path: Path
    reason: str
    remedy: str | None = None

    @property
    def error(self) -> UsageError:
        """The damage as an error of one line."""
        return UsageError(self.path, self.reason, self.remedy or "desra can make it again")


class Checked(NamedTuple):
    """What was found among some files.

    ``untold`` has the checksums of pictures of an image that an older desra wrote, as items of `Record.checksums`.
    """

    files: int
    bytes: int
    damaged: tuple[Damage, ...] = ()
    missing: tuple[Path, ...] = ()
    untold: tuple[tuple[str, str], ...] = ()

    def __add__(self, other: object) -> "Checked":
        """Add up two findings, but for the checksums."""
        assert isinstance(other, Checked)
        sums = self.files + other.files, self.bytes + other.bytes
        return Checked(*sums, self.damaged + other.damaged, self.missing + other.missing)


class Verification:
    """The images of a workspace whose pictures and arrays can be checked.

    Args:
        workspace: Must be locked.
        damaged: The damaged tables: of images whose manifest or records are among them, nothing is known.

    Attributes:
        shards, images: The shards with an image to check, and the number of all these images.
        unchecked: The number of images of which nothing is known.
    """

    def __init__(self, workspace: Workspace, damaged: Collection[Path]) -> None:
        self.workspace = workspace
        finished = finished_shards(workspace)
        shards = [one for one in finished if workspace.shard_records(one) not in damaged]
        if workspace.manifest in damaged:
            self._rows = MANIFEST.empty_table()
            self.unchecked = sum(pq.read_metadata(workspace.shard_records(one)).num_rows for one in shards)
        else:
            rows = read_manifest(workspace)
            known = pc.is_in(rows["shard"], pa.array(shards, pa.int32()))
            self._rows = rows.filter(known).combine_chunks()
            lost = pc.is_in(rows["shard"], pa.array({*finished} - {*shards}, pa.int32()))
            self.unchecked = pc.count_distinct(rows["id"].filter(lost)).as_py()
        self.images: int = pc.count_distinct(self._rows["id"]).as_py()
        self.shards: list[int] = sorted(self._rows["shard"].unique().to_pylist())

    def work(self, number: int) -> list[tuple[ImageRef, Record]]:
        """List the images of a shard under all their names, each with its record."""
        records = read_shard(self.workspace, number)
        rows = self._rows.filter(pc.equal(self._rows["shard"], number))
        return [(image, records[image.id]) for image in image_refs(rows, rows) if image.id in records]


def verify_image(image: ImageRef, record: Record, workspace: Workspace) -> Checked:
    """Check the mask, the dataset pictures and the arrays of an image.

    Pictures of an image whose mask is still to be made are left out: the next run writes them anyway.

    Raises:
        TransientError: An array cannot be read now.
    """
    found = Checked(0, 0)
    untold: dict[str, str] = {}
    for kind in ("masks", *(f"dataset/{kind}" for kind in DATASET)) if record.mask_key else ():
        for path in (workspace.root / kind / f"{name}.png" for name in image.names):
            if not path.exists():
                found += Checked(0, 0, missing=(path,) if kind in record.checksums else ())
                continue
            try:
                data = read_checked(path, record.checksums.get(kind))
                if kind not in record.checksums:  # of an older desra: the PNG's own checksums tell
                    decode(data, path)
                    untold[kind] = checksum(data)
                found += Checked(1, len(data))
            except ImageError as error:
                passing = isinstance(error, TransientError) and not isinstance(error, LostError)
                found += Checked(1, 0, (Damage(path, error.reason, error.remedy if passing else None),))
    group = workspace.group(image.id)
    for name in ARRAYS:
        if not (group / name).exists():
            continue
        try:
            check_array(group / name)
            found += Checked(*contents.size_of(group / name))
        except LostError:
            found += Checked(1, 0, (Damage(group / name, "is damaged"),))
    if (about := group / "zarr.json").exists():
        found += _checked(about)
    return found._replace(untold=tuple(untold.items()))


def verify_documents(workspace: Workspace, on_file: Callable[[int, int], None] = lambda _, __: None) -> Checked:
    """Check all files that are not of single images: tables, documents, models, trainings, human masks, answers.

    Args:
        workspace: The workspace, which must be locked.
        on_file: Called with the number of files that are checked, and of all that there are.
    """
    found, paths = Checked(0, 0), list(_documents(workspace.root))
    for path in paths:
        found += _checked(path, _remedy(workspace, path))
        on_file(found.files, len(paths))
    if not any(damage.path == workspace.human_manifest for damage in found.damaged):
        for mask in all_human_masks(workspace):
            try:
                found += Checked(1, len(mask.content()))
            except ImageError as error:
                found += Checked(1, 0, (Damage(mask.path, error.reason, _REMEDIES["human"]),))
    for rater in raters(workspace):
        path = workspace.answers(rater)
        try:
            read_answers(workspace, rater)
            found += Checked(1, path.stat().st_size)
        except UsageError as error:
            found += Checked(1, 0, (Damage(path, error.reason, error.remedy),))
    known = {damage.path.parent for damage in found.damaged}
    trainings = [RunFolder(path.parent) for path in paths if path.name == "run.json"]
    lost = [error for training in trainings for error in training.lost_models()]
    entries = lost + [error for error in damaged_entries(workspace) if Path(error.subject).parent not in known]
    return found + Checked(0, 0, tuple(Damage(Path(error.subject), error.reason, error.remedy) for error in entries))


def unknown_files(workspace: Workspace) -> list[str]:
    """List the files that no run has made, as far as they lie beside the files of images; paths in the workspace."""
    return [item.path for item in contents.images_contents(workspace) if item.kind == contents.UNKNOWN]


def mark(workspace: Workspace, damaged: Damage) -> None:
    """Delete what is damaged, and all that the next run can only make together with it. The workspace must be locked.

    Raises:
        TransientError: It cannot be deleted.
    """
    path = damaged.path
    if training := _training(path):
        if path.is_relative_to(training / "data"):
            workspace.drop(training / "data")
            return
        if path.suffix == ".pth":  # weights follow from all steps before
            workspace.drop(training / "state.pth")
            workspace.drop(training / "models")
        workspace.drop(path)
    elif path.parent == workspace.twin.parent:  # published again, both files, from its training
        for suffix in (".pth", ".json"):
            workspace.drop(path.with_suffix(suffix))
    elif path != workspace.settings:  # which the next run replaces
        workspace.drop(path)


def _documents(root: Path) -> Iterator[Path]:
    """List the tables, JSON documents and checkpoints, but for those of single images and of Prefect."""
    for folder, folders, names in os.walk(root):
        here = PurePosixPath(folder).relative_to(PurePosixPath(root))
        folders[:] = sorted(name for name in folders if not {str(here / name), name} & _APART)
        for name in sorted(names):
            path = Path(folder) / name
            if path.suffix in (".parquet", ".json", ".pth") and not path.is_symlink():
                yield path


def _checked(path: Path, remedy: str | None = None) -> Checked:
    """Check a table, a document or a checkpoint by what is inside of it."""
    size, reason = 0, None
    try:
        data = read_bytes(path)
        size = len(data)
        if path.suffix == ".parquet":
            file = pa.BufferReader(data)
            reason = None if check_parquet(file) else "has lost its checksum"
            pq.read_table(file, page_checksum_verification=True).validate(full=True)
        elif path.suffix == ".pth":
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                reason = "is damaged" if archive.testzip() else None
        else:
            parse_json(data)
            if path.name == "checksums.json" and path.parent.name == "data":
                check_frozen(path.parent)
    except UsageError as error:
        path, reason = Path(error.subject), error.reason
    except TransientError as error:
        reason, remedy = error.reason, error.remedy
    except (pa.ArrowException, ValueError, zipfile.BadZipFile, zlib.error, RuntimeError) as error:
        reason = f"is damaged ({' '.join(str(error).split())})"
    return Checked(1, size, (Damage(path, reason, remedy),) if reason else ())


def _training(path: Path) -> Path | None:
    """Find the folder of the finetune, or of the twin's training, that a file belongs to."""
    return next((folder for folder in path.parents if (folder / "run.json").exists()), None)


def _remedy(workspace: Workspace, path: Path) -> str | None:
    """Say what to do about a damaged file that no run can make again; None where the next run can."""
    training = _training(path)
    kept = path.name == "run.json" or (path.parent.name != "data" and training and RunFolder(training).has_ended())
    if training and kept:
        return f"{_COPY}, or delete {training} to train again"
    trained = workspace.twin.with_suffix(".training") / "run" / "models"
    if path.parent == workspace.twin.parent and not any(trained.glob("*")):
        return f"{_COPY}, or delete {path.parent} to train another one"
    return _REMEDIES.get(path.relative_to(workspace.root).parts[0])
