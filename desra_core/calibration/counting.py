"""A count of similarity by class over a workspace: which images, what is counted already, and the sum.

A shard's images are counted into a Parquet file each; when the shard is through they become one, which names what it
covers. A token stands for an image and all that its histogram depends on beside the keys that name the folder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from desra_core.calibration.exclusion import Exclusion, Masks
from desra_core.calibration.histogram import HISTOGRAM, ClassHistogram, merged
from desra_core.calibration.stage import HistogramSettings, Uncounted
from desra_core.errors import ImageError, LostError, TransientError, UsageError
from desra_core.files.hashing import fingerprint
from desra_core.planning.keys import target_of
from desra_core.settings import CorpusSettings
from desra_core.workspace import Workspace, read_table
from desra_core.workspace.inventory import flags_of
from desra_core.workspace.manifest import File, ImageRef, asked_for, image_refs, read_manifest
from desra_core.workspace.products import Target
from desra_core.workspace.records import gather_shard, read_records, read_shard, without_arrays

# Raise it when the meaning or a count of a histogram changes.
HISTOGRAM_VERSION = 1

_COLUMNS = ["id", "similarity_key", "similarity_kept", "segmentation_key", "labels_kept", "failed_stage"]
_MARKED = ["id", "mask_key", "artifact_pixels", "failed_stage"]
_ABOUT = b"desra.counted"


class Covered(NamedTuple):
    """What the file of a shard holds: the tokens counted, why others could not be, and when it was written."""

    tokens: frozenset[str]
    failures: dict[str, list[str]]
    time: str


@dataclass(frozen=True)
class ShardCount:
    """The images of a shard that are to be counted, by token, and how far that is.

    ``covered`` is None where there is no file of the shard, or one that counted what is not wanted any more.
    """

    number: int
    wanted: dict[str, tuple[ImageRef, tuple[File, ...]]]
    covered: Covered | None
    file: Path
    journal: Path

    @property
    def known(self) -> set[str]:
        """Tokens that the shard's file speaks of."""
        return set(self.covered.tokens | self.covered.failures.keys()) if self.covered else set()

    def journaled(self) -> list[str]:
        """Tokens of images that were counted, but not gathered yet."""
        return [token for token in self.wanted if token not in self.known and _holds_data(self.entry(token))]

    def missing(self) -> list[str]:
        """Tokens of images that are not counted."""
        return [token for token in self.wanted if token not in self.known and not _holds_data(self.entry(token))]

    def entry(self, token: str) -> Path:
        """The histogram of one image."""
        return self.journal / f"{token}.parquet"

    def failures(self) -> list[ImageError]:
        """Why some images could not be counted, and will not be unless something changes."""
        return [ImageError(*told) for told in self.covered.failures.values()] if self.covered else []


class Counting:
    """The images of a workspace whose maps and labels are there under its settings, shard by shard.

    Attributes
    ----------
    images
        Number of images that can be counted, equal ones once.
    shards
        The numbers of their shards.
    """

    def __init__(self, workspace: Workspace, target: Target, rows: pa.Table, masks: Masks) -> None:
        self.workspace = workspace
        self.target = target
        self._rows = rows
        self._masks = masks
        self._folder = workspace.calibration(histogram_key(target))
        self.images = len(rows["id"].unique())
        self.shards: list[int] = sorted(rows["shard"].unique().to_pylist())

    @property
    def by_people(self) -> int:
        """How many of the images have a mask by a person, whose pixels do not count."""
        return len(self._masks.human.keys() & set(self._rows["id"].to_pylist()))

    def suspect(self) -> tuple[int, int]:
        """How many images have artifacts by the detector's word but no mask to exclude them, and how many pixels."""
        records = read_records(self.workspace, _MARKED)
        marked = pc.and_(pc.equal(records["mask_key"], self.target.mask_key), records["failed_stage"].is_null())
        marked = pc.and_(marked, pc.greater(records["artifact_pixels"], 0))
        masked = {image.id for image in image_refs(self._rows) if self._masks.of_image(image)}
        wanted = pa.array(set(self._rows["id"].to_pylist()) - masked, pa.string())
        found = records.filter(pc.and_kleene(marked, pc.is_in(records["id"], wanted)))
        return found.num_rows, int(pc.sum(found["artifact_pixels"]).as_py() or 0)

    def shard(self, number: int) -> ShardCount:
        """How far a shard is."""
        wanted = {}
        for image in image_refs(self._rows.filter(pc.equal(self._rows["shard"], number))):
            masks = self._masks.of_image(image)
            labels = image.labels.hash if image.labels and self.target.reads_labels else None
            wanted[fingerprint(image.id, labels, [mask.hash for mask in masks])] = (image, masks)
        file = self._folder / f"{number:08d}.parquet"
        covered = _covered(file)
        if covered is not None and not covered.tokens <= wanted.keys():
            covered = None
        elif covered is not None:
            covered = covered._replace(failures={t: e for t, e in covered.failures.items() if t in wanted})
        return ShardCount(number, wanted, covered, file, self._folder / f"{number:08d}")

    def missing(self) -> dict[int, int]:
        """The number of images that are not counted, by shard."""
        counts = {number: len(self.shard(number).missing()) for number in self.shards}
        return {number: count for number, count in counts.items() if count}

    def work(self, shard: ShardCount) -> dict[str, tuple[ImageRef, Uncounted]]:
        """The images of a shard that are not counted, by token, each with what `histogram_stage` needs of it."""
        records = read_shard(self.workspace, shard.number)
        work = {}
        for token in shard.missing():
            image, masks = shard.wanted[token]
            # Without its regions and times, which may be large.
            record = replace(records[image.id], regions=[], seconds={})
            work[token] = (image, Uncounted(record, masks, shard.entry(token)))
        return work

    def most_pixels(self) -> int:
        """The pixels of the largest image that can be counted."""
        records = read_records(self.workspace, ["id", "height", "width"])
        sizes = records.filter(pc.is_in(records["id"], self._rows["id"].combine_chunks()))
        return int(pc.max(pc.multiply(sizes["height"].cast("int64"), sizes["width"])).as_py() or 0)

    def stage_settings(self, max_pixels: int) -> HistogramSettings:
        """What `histogram_stage` needs for all images."""
        return HistogramSettings(self.target.similarity_key, self.target.segmentation_key, max_pixels)

    def gather(self, shard: ShardCount, failures: Sequence[tuple[str, ImageError]] = ()) -> None:
        """Turn the histograms of a shard's images into one file, with the failures by token that are not transient.

        The records of images whose map or labels are lost say so then: the next run makes those anew.

        Raises
        ------
        TransientError
            A file is damaged; it is dropped.
        """
        lost = [shard.wanted[token][0].id for token, error in failures if isinstance(error, LostError)]
        if lost:
            records = read_shard(self.workspace, shard.number)
            gather_shard(self.workspace, shard.number, [without_arrays(records[key]) for key in lost])
        tokens = shard.journaled()
        told = {token: list(e.failure) for token, e in failures if not isinstance(e, TransientError)}
        if not tokens and not told:
            return
        tables = [_read_entry(shard.entry(token)) for token in tokens]
        if shard.covered:
            tables.append(read_table(shard.file, HISTOGRAM))
            told = shard.covered.failures | told
            tokens += shard.covered.tokens
        table = _merged(tables, shard.file).to_table()
        about = {"tokens": sorted(tokens), "failures": told, "time": datetime.now(UTC).isoformat(timespec="seconds")}
        metadata = table.schema.metadata | {_ABOUT: json.dumps(about).encode()}
        self.workspace.publish_table(shard.file, table.replace_schema_metadata(metadata))
        shutil.rmtree(shard.journal, ignore_errors=True)

    def gather_journals(self) -> None:
        """Gather what a killed run has left, as far as shards lack nothing (raises `TransientError`)."""
        for number in self.shards:
            shard = self.shard(number)
            if shard.journaled() and not shard.missing():
                self.gather(shard)

    def counted(self) -> Iterator[ShardCount]:
        """The shards that have a file."""
        return (shard for number in self.shards if (shard := self.shard(number)).covered)

    def histogram(self) -> ClassHistogram:
        """The sum over all shards.

        Raises
        ------
        UsageError
            A file is damaged.
        """
        return _merged((read_table(shard.file, HISTOGRAM) for shard in self.counted()), self._folder)


def histogram_key(target: Target) -> str:
    """Names the histograms that are counted in one way, of one way to compare and to label."""
    return fingerprint("histogram", HISTOGRAM_VERSION, target.similarity_key, target.segmentation_key)


def plan_counting(corpus: CorpusSettings, exclusion: Exclusion) -> Counting:
    """Find the images whose maps and labels are in a workspace. It must be locked.

    Raises
    ------
    UsageError
        As `desra_core.planning.keys.target_of`; there is no manifest.
    TransientError
        A mask cannot be read.
    """
    workspace = Workspace(corpus.workspace)
    target, _ = target_of(corpus)
    manifest = read_manifest(workspace)
    if manifest is None:
        raise UsageError(workspace.root, "has no manifest", f"run desra {corpus.verb}")
    rows = asked_for(manifest)
    rows = rows.slice(0, rows.num_rows if corpus.limit is None else corpus.limit)
    masks = exclusion.of_workspace(workspace, target.gan_sr_key)
    return Counting(workspace, target, rows.filter(_countable(rows, workspace, target)), masks)


def _countable(rows: pa.Table, workspace: Workspace, target: Target) -> pa.Array:
    """Which rows of a manifest have their map and their labels."""
    records = read_records(workspace, _COLUMNS)
    index = pc.index_in(rows["id"].combine_chunks(), records["id"].combine_chunks())
    record = {name: records[name].combine_chunks().take(index) for name in _COLUMNS}
    mapped = pc.and_(pc.equal(record["similarity_key"], target.similarity_key), record["similarity_kept"])
    labelled = rows["labels_hash"].combine_chunks().is_valid()
    if not target.reads_labels:
        labelled = pc.and_(pc.equal(record["segmentation_key"], target.segmentation_key), record["labels_kept"])
    whole = pc.and_(index.is_valid(), record["failed_stage"].is_null())
    return pa.array(flags_of(mapped) & flags_of(labelled) & flags_of(whole))


def _covered(file: Path) -> Covered | None:
    """What the file of a shard holds; None where there is none."""
    try:
        metadata = pq.read_schema(file).metadata or {}
        about: dict[str, Any] = json.loads(metadata[_ABOUT])
        return Covered(frozenset(about["tokens"]), about["failures"], about["time"])
    except (OSError, pa.ArrowException, ValueError, LookupError, TypeError):
        return None


def _read_entry(path: Path) -> pa.Table:
    try:
        return read_table(path, HISTOGRAM)
    except UsageError:
        path.unlink(missing_ok=True)
        raise TransientError(path, "is damaged", "run again: it is made anew") from None


def _merged(tables: Iterable[pa.Table], path: Path) -> ClassHistogram:
    try:
        return merged(tables)
    except ValueError as error:
        raise UsageError(path, str(error), "delete it: the next run makes it anew") from None


def _holds_data(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except OSError:
        return False
