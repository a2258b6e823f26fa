"""Where everything of a corpus lies, how it is committed, and who may write.

::

    WS/
      manifest.parquet          every image: name, files, sizes, content hashes, id, shard
      settings.json             the settings of the latest run
      outcomes/00000003.parquet what was done with each image of shard 3, and under which settings
      journal/00000003/ID.json  the same of images whose shard is in flight
      maps/ID[:2]/ID.zarr/      similarity, labels and mined SR results of the images that --keep keeps
      masks/NAME.png            1-bit artifact masks
      human/NAME.png            1-bit masks drawn or corrected by people (desra import)
      human/manifest.parquet    which image and GAN model each was drawn for
      imports/000001.parquet    what the first import of masks took the place of, until it is taken back
      exported/KEY.parquet      masks by the detector that people were given (desra export)
      dataset/KIND/NAME.png     lr, mse_sr, gan_sr, mask and pseudo_gt of images with artifacts (desra mine)
      dataset/manifest.parquet  one row per image of the dataset
      regions.parquet           one row per artifact region
      split.parquet             the pool of images that were asked for: training or held-out, for ever
      models/0001/              promoted models, each with its origin and history; `current` is a link to one
      finetunes/KEY/            the finetunes of desra cycle, and those without an --output
      gathered.json             the images with artifacts that the latest finetune could choose from
      gate/verdict.json         the latest verdict on finetuned models; beside it what it rests on
      calibration/KEY/          histograms of similarity by class, one per shard (desra calibrate)
      failures.parquet          one row per image that could not be processed
      report.html               the page to forward
      pages/NAME.html           pages about single images (desra report --pages)
      scan_failures.parquet     those of them that did not get past the latest scan
      prefect/                  the embedded Prefect server's database
      tmp/                      unfinished files; emptied at the start of a run
      lock                      the run that holds the workspace
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import socket
import uuid
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from desra_core.errors import LockedError, UsageError
from desra_core.files.atomic import reading_errors, replace_file, storage_errors
from desra_core.files.hashing import fingerprint
from desra_core.files.locks import holder, locked

# What the dataset holds of an image.
DATASET = ("lr", "mse_sr", "gan_sr", "mask", "pseudo_gt")

# Tells this process from another one of the same number, in another container or after a restart.
_PROCESS = uuid.uuid4().hex


@dataclass(frozen=True)
class Workspace:
    """The paths below one workspace directory, and the only way to write there: `publish`."""

    root: Path

    @property
    def manifest(self) -> Path:
        """Every image of the corpus (Parquet)."""
        return self.root / "manifest.parquet"

    @property
    def settings(self) -> Path:
        """The settings of the latest run (JSON)."""
        return self.root / "settings.json"

    @property
    def records(self) -> Path:
        """Finished shards (a folder of Parquet files)."""
        return self.root / "outcomes"

    @property
    def journal(self) -> Path:
        """Images of unfinished shards (a folder of JSON files per shard)."""
        return self.root / "journal"

    @property
    def maps(self) -> Path:
        """Kept arrays (a folder of zarr groups)."""
        return self.root / "maps"

    @property
    def masks(self) -> Path:
        """Artifact masks (a folder of PNG files)."""
        return self.root / "masks"

    @property
    def regions(self) -> Path:
        """Every artifact region (Parquet)."""
        return self.root / "regions.parquet"

    @property
    def failures(self) -> Path:
        """Every image that could not be processed (Parquet)."""
        return self.root / "failures.parquet"

    @property
    def report(self) -> Path:
        """The report (HTML)."""
        return self.root / "report.html"

    @property
    def dataset_manifest(self) -> Path:
        """The images of the dataset (Parquet)."""
        return self.root / "dataset" / "manifest.parquet"

    @property
    def split(self) -> Path:
        """The pools of images (Parquet)."""
        return self.root / "split.parquet"

    @property
    def current(self) -> Path:
        """The entry of the current model (a link to a folder); see `desra_core.gate.model_registry`."""
        return self.root / "models" / "current"

    def finetune(self, key: str) -> Path:
        """The folder of one of the finetunes that nobody gave another one."""
        return self.root / "finetunes" / key

    @property
    def gathered(self) -> Path:
        """The images with artifacts that the latest finetune could choose from (JSON: ids)."""
        return self.root / "gathered.json"

    @property
    def gate(self) -> Path:
        """What the gate found (a folder)."""
        return self.root / "gate"

    def judged_crop(self, key: str, image_id: str, kind: str, rank: int) -> Path:
        """A picture of one of the worst regions of a judged image (WebP)."""
        return self.gate / "judgements" / key / f"{image_id}-{rank}-{kind}.webp"

    @property
    def verdict(self) -> Path:
        """The latest verdict of the gate (JSON)."""
        return self.gate / "verdict.json"

    def compared(self, after: Path) -> Path:
        """Which judgements and candidates the latest comparison of a finetune rests on (JSON)."""
        return self.gate / "compared" / f"{fingerprint(str(after))}.json"

    def judgement(self, key: str, image_id: str) -> Path:
        """What was found of a candidate on an image (JSON)."""
        return self.gate / "judgements" / key / f"{image_id}.json"

    def calibration(self, key: str) -> Path:
        """Histograms of similarity by class that were counted alike (a folder)."""
        return self.root / "calibration" / key

    @property
    def scan_failures(self) -> Path:
        """Every file that the latest scan could not make an image of (Parquet)."""
        return self.root / "scan_failures.parquet"

    @property
    def lock(self) -> Path:
        """Whoever holds the workspace (JSON); it is there from the beginning."""
        return self.root / "lock"

    @property
    def prefect_home(self) -> Path:
        """Home of the embedded Prefect server."""
        return self.root / "prefect"

    def shard_records(self, shard: int) -> Path:
        """The table of a finished shard."""
        return self.records / f"{shard:08d}.parquet"

    def shard_journal(self, shard: int) -> Path:
        """The folder of a shard in flight."""
        return self.journal / f"{shard:08d}"

    def group(self, image_id: str) -> Path:
        """The zarr group of an image."""
        return self.maps / image_id[:2] / f"{image_id}.zarr"

    def mask(self, name: str) -> Path:
        """The mask of an image."""
        return self.masks / f"{name}.png"

    @property
    def human(self) -> Path:
        """Masks by people (a folder of PNG files)."""
        return self.root / "human"

    def human_mask(self, name: str) -> Path:
        """The mask of an image by a person, an empty one too; there is none where nobody has looked."""
        return self.human / f"{name}.png"

    @property
    def human_manifest(self) -> Path:
        """What the masks by people were drawn on (Parquet); see `desra_core.workspace.human_masks`."""
        return self.human / "manifest.parquet"

    @property
    def imports(self) -> Path:
        """What imports of masks by people took the place of (a folder of Parquet files)."""
        return self.root / "imports"

    @property
    def exported(self) -> Path:
        """Which masks by the detector were exported (a folder of Parquet files); see `workspace.human_masks`."""
        return self.root / "exported"

    def dataset(self, kind: str, name: str) -> Path:
        """A picture of an image in the dataset; ``kind`` is one of `DATASET`."""
        return self.root / "dataset" / kind / f"{name}.png"

    def withdraw(self, name: str) -> None:
        """Delete the mask and the dataset pictures of an image, as far as they are there."""
        self.mask(name).unlink(missing_ok=True)
        self.withdraw_dataset(name)

    def rename(self, old: str, new: str) -> None:
        """Give the mask and the dataset pictures of an image another name, as far as they are there."""
        pictures = ((self.dataset(kind, old), self.dataset(kind, new)) for kind in DATASET)
        for before, after in ((self.mask(old), self.mask(new)), *pictures):
            with contextlib.suppress(FileNotFoundError):
                before.replace(after)

    def withdraw_dataset(self, name: str) -> None:
        """Delete the dataset pictures of an image, as far as they are there."""
        for kind in DATASET:
            self.dataset(kind, name).unlink(missing_ok=True)

    def drop_group(self, image_id: str, *, spared: Collection[str] = ()) -> None:
        """Delete the arrays of an image but for those of some names, if there are any."""
        group = self.group(image_id)
        if not any((group / name).exists() for name in spared):
            shutil.rmtree(group, ignore_errors=True)
            return
        for array in group.iterdir():
            if array.is_dir() and array.name not in spared:
                shutil.rmtree(array, ignore_errors=True)

    def scratch(self) -> Path:
        """A path for an unfinished file or folder, on the workspace's own disk."""
        folder = self.root / "tmp"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / uuid.uuid4().hex

    def exists(self) -> bool:
        """Whether the folder is a workspace; one that is merely empty is not."""
        return any(os.path.exists(path) for path in (self.lock, self.settings, self.manifest))  # also if a disk fails

    def create(self) -> None:
        """Make the workspace, or check that an existing folder may serve as one.

        Raises
        ------
        UsageError
            The path is a file, a folder of something else, or cannot be written.
        """
        try:
            if self.root.is_dir() and not self.exists() and any(self.root.iterdir()):
                raise UsageError(self.root, "is a folder with other things in it", "name a new folder as workspace")
            self.root.mkdir(parents=True, exist_ok=True)
            self.lock.touch()
        except OSError as error:
            reason = f"cannot serve as workspace ({error.strerror})"
            raise UsageError(self.root, reason, "name a folder that can be written") from None

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Make the workspace where there is none, and hold it; a command that is refused leaves no new one behind.

        Raises
        ------
        UsageError
            As `create` and `locked`.
        """
        new_folders = [folder for folder in (self.root, *self.root.parents) if not os.path.exists(folder)]
        is_new = not os.path.exists(self.lock)
        self.create()
        with self.locked():
            try:
                yield
            except BaseException:
                if is_new and set(os.listdir(self.root)) <= {self.lock.name, "tmp"}:
                    shutil.rmtree(self.root / "tmp", ignore_errors=True)
                    with contextlib.suppress(OSError):  # somebody else uses a folder by now
                        self.lock.unlink()
                        for folder in new_folders:
                            folder.rmdir()
                raise

    def publish(self, path: Path, data: bytes, *, durable: bool = False) -> None:
        """Write a file so that nobody ever sees half of it; a file that holds the data already is not touched.

        Parameters
        ----------
        path
            Below the workspace.
        data
            The whole content.
        durable
            Wait until the disk has it: for what a power cut must not take.

        Raises
        ------
        TransientError
            The disk is full or failed.
        """
        with storage_errors(path):
            if path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data:
                return
            scratch = self.scratch()
        replace_file(path, data, durable=durable, scratch=scratch)

    def publish_table(self, path: Path, table: pa.Table) -> None:
        """Write an Arrow table as Parquet, durably (raises `TransientError`)."""
        sink = io.BytesIO()
        pq.write_table(table, sink)
        self.publish(path, sink.getvalue(), durable=True)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the workspace for one run, once per process however often it is asked.

        The system frees the lock of a process that dies, however it dies.

        Raises
        ------
        LockedError
            Another process holds it; the message names host, process and start.
        """
        me = {"host": socket.gethostname(), "pid": os.getpid(), "token": _PROCESS}
        started = datetime.fromtimestamp(psutil.Process().create_time()).astimezone().isoformat(timespec="seconds")
        with contextlib.ExitStack() as stack:
            try:
                other = stack.enter_context(locked(self.lock, me | {"started": started}))
            except FileNotFoundError:
                raise LockedError(self.root, "was in use by a command that was refused", "run again") from None
            if other is None:
                shutil.rmtree(self.root / "tmp", ignore_errors=True)
            elif not me.items() <= other.items():  # else it is a flow that a command calls, which holds the lock
                raise LockedError(self.root, f"is in use by {_owner(other)}", "wait until it has ended")
            yield

    def owner(self) -> str | None:
        """Return host, process and start time of the run that holds the workspace; None when it is free."""
        with contextlib.suppress(OSError):
            if (note := holder(self.lock)) is not None:
                return _owner(note)
        return None


def _owner(note: dict[str, Any]) -> str:
    unknown = {"pid": "?", "host": "?", "started": "?"}
    return "process {pid} on {host}, started {started}".format_map(unknown | note)


def read_table(
    path: Path,
    schema: pa.Schema,
    columns: list[str] | None = None,
    *,
    remedy: str = "delete it: the next run makes it anew",
) -> pa.Table:
    """Read a Parquet table of a workspace; an empty one where it does not exist. ``remedy`` is for a damaged one.

    Raises
    ------
    UsageError
        The file is damaged or of another version.
    TransientError
        The disk or the system refuses to read it, for now: nothing is known about the table.
    """
    if not path.exists():
        return schema.empty_table().select(columns or schema.names)
    try:
        with reading_errors(path):
            table = pq.read_table(path, columns=columns, schema=schema)
            table.validate(full=True)  # Parquet itself takes any bytes for text
            metadata = pq.read_schema(path).metadata
        for value in (metadata or {}).values():
            value.decode()
        return table.replace_schema_metadata(metadata)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = f"cannot be read ({' '.join(str(error).split())})"
        raise UsageError(path, reason, remedy) from None
