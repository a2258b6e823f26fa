"""Plan what desra deliver writes: which pictures an output folder lacks, and under which key each was made.

The workspace has a table per output folder and shard. Of a shard in progress, workers write a JSON file per image
before they write its pictures, so a picture without an entry is somebody else's, and is never written over.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from desra_core.delivery.tars import Tars, tar_path
from desra_core.errors import UsageError
from desra_core.evaluation.table import counted
from desra_core.files import fingerprint, parse_json, paths_in, read_bytes, write_output
from desra_core.gate.model_registry import current_model
from desra_core.images.encoding import suffix_of
from desra_core.images.scanning import in_tars, is_selection
from desra_core.networks.checkpoints import BICUBIC
from desra_core.planning.plan import COLUMNS, Standing, lacks_twin, load_settings, target_of
from desra_core.remote import Remote, is_tar, listing
from desra_core.settings import CorpusSettings, Detection, Mining
from desra_core.settings.models import Delivering
from desra_core.workspace import Workspace, as_parquet, read_table
from desra_core.workspace.human_masks import HumanMask, read_human_masks
from desra_core.workspace.manifest import ImageRef, asked_for, image_refs, read_manifest
from desra_core.workspace.products import Record, Target, read_records, read_shard

# Raise it when the meaning or a bit of a picture changes: all are written again.
DELIVERY_VERSION = 1
TABLE = "delivered.parquet"

_REMEDY = "bring it back from a copy, or delete it and empty the output folder"
_MAPS = "trust_maps"

# A row per picture. ``path`` is relative to the output folder. ``results`` says where the results came from: ``files``,
# ``stored`` in the workspace, or ``inferred`` for the picture. ``repaired`` counts the pixels that hold anything of the
# MSE result, ``doubtful`` those that are green in the trust map; it is null where there is no map.
PICTURES = pa.schema(
    [pa.field(name, pa.string()) for name in ("image", "id", "path", "key", "results")]
    + [pa.field(name, pa.int32()) for name in ("height", "width")]
    + [pa.field(name, pa.int64()) for name in ("repaired", "doubtful", "bytes")]
    + [pa.field("checksum", pa.string())]
)
# A row per file, trust maps too. ``key`` is null and ``begun`` the checksum to come where a write has begun and may not
# have ended; ``checksum`` is that of the file before.
DELIVERED = PICTURES.append(pa.field("begun", pa.string()))


class Order(NamedTuple):
    """What a worker must know to deliver an image.

    Attributes:
        record: The record of the image.
        human: Its mask by a person.
        key: The key of its picture.
        ours: By path, the checksums of the files that desra deliver has written there, which may be replaced.
    """

    record: Record
    human: HumanMask | None
    key: str
    ours: dict[str, tuple[str, ...]]


class Missing(NamedTuple):
    """What an output folder lacks.

    Attributes:
        images: The number of images by shard.
        pixels: Of the largest picture.
        inferred: The number of images whose GAN result is not kept.
        seconds: Estimated time of a worker to infer these again.
    """

    images: dict[int, int]
    pixels: int
    inferred: int
    seconds: float


class Pictures(NamedTuple):
    """How many pictures an output folder has of a corpus, and how many of them are repaired."""

    written: int
    repaired: int

    def __str__(self) -> str:
        """Say it in words."""
        return f"{counted(self.written, 'picture')}, {self.repaired} of them repaired"


class Deliveries:
    """The pictures of a corpus in an output folder, shard by shard: of all images that have a current mask.

    Raises:
        UsageError: A tar file is in the way, or photos have names that trust maps have.
    """

    def __init__(self, workspace: Workspace, delivering: Delivering, target: Target, limit: int | None) -> None:
        self.workspace = workspace
        self.settings = delivering
        self.target = target
        self.place = output_key(delivering)
        rows = asked_for(read_manifest(workspace)).slice(0, limit)
        standing = Standing(rows, read_records(workspace, COLUMNS), target)
        self._rows = rows.filter(pa.array(standing.current & ~standing.failed))
        if delivering.trust_map and pc.any(pc.starts_with(self._rows["name"], f"{_MAPS}/")).as_py():
            raise UsageError("--trust-map", f"writes to {_MAPS}, where photos have their pictures", "leave it out")
        self._human = read_human_masks(workspace, target.gan_sr_key)
        # A photo that has changed may be in another shard than the one that it was delivered in.
        tables = [
            read_table(path, DELIVERED, ["path", "checksum", "begun"], remedy=_REMEDY)
            for path in paths_in(workspace.deliveries / self.place, "*.parquet")
        ]
        self._written = pa.concat_tables([DELIVERED.empty_table().select(["path", "checksum", "begun"]), *tables])
        self.shards: list[int] = sorted(self._rows["shard"].unique().to_pylist())
        self._folder, self._tars = pictures_folder(delivering), None
        # Of an output at a URL, the sizes of its files by path.
        self._sizes = sizes_at(self._folder) if isinstance(self._folder, Remote) else None
        if is_tar(output := delivering.output):
            start = f"{output.stem}-"  # the folder may be a whole bucket
            sizes = sizes_at(output.parent, start) if isinstance(output, Remote) else None
            self._tars = Tars(workspace, self.place, output, sizes, self._sample_of)
            for number in rows["shard"].unique().to_pylist():  # what is in the way is so before photos are mined, too
                self._tars.packed(number)

    def work(self, number: int) -> list[tuple[ImageRef, Order]]:
        """List the images of a shard that lack a picture or a map."""
        written = {row["path"]: row for row in self.table(number).to_pylist()}
        packed = self._tars and self._tars.packed(number)
        held = packed.checksums if packed else {}
        records = read_shard(self.workspace, number)
        work = []
        for image in image_refs(self._rows.filter(pc.equal(self._rows["shard"], number))):
            record, human = records[image.id], self._human.get(image.id)
            key = delivery_key(self.settings, self.target, image.id, record, human)
            if not all(self._is_there(written.get(path), key, held) for path in paths_of(self.settings, image.names)):
                work.append((image, Order(record, human, key, {})))
        paths = [path for image, _ in work for path in paths_of(self.settings, image.names)]
        ours: dict[str, tuple[str, ...]] = dict.fromkeys(paths, ())
        elsewhere = self._written.filter(pc.is_in(self._written["path"], pa.array(paths, pa.string()))).to_pylist()
        for row in (*elsewhere, *(written[path] for path in paths if path in written)):
            ours[row["path"]] += tuple(one for one in (row["checksum"], row["begun"]) if one)
        return [
            (image, order._replace(ours={path: ours[path] for path in paths_of(self.settings, image.names)}))
            for image, order in work
        ]

    def missing(self) -> Missing:
        """Find what is lacking."""
        images: dict[int, int] = {}
        pixels, seconds = 0, list[float]()
        for number in self.shards:
            for image, order in self.work(number):
                images[number] = images.get(number, 0) + 1
                pixels = max(pixels, math.prod(order.record.shape))
                if self.target.super_resolves and not (self.workspace.group(image.id) / "gan_sr").exists():
                    seconds.append(order.record.seconds.get("inference", 0.0) / 2)  # mining has inferred two results
        return Missing(images, pixels, len(seconds), sum(seconds))

    def some_files(self) -> list[Path]:
        """List the files of the first and the last of the images."""
        return [path for image in image_refs(self._rows.take([0, -1 % self._rows.num_rows])) for path in image.files]

    def table(self, number: int) -> pa.Table:
        """Read what was delivered of a shard (schema `DELIVERED`), its journal included."""
        table = read_table(self.workspace.delivered(self.place, number), DELIVERED, remedy=_REMEDY)
        rows: list[dict[str, Any]] = []
        for path in paths_in(self.workspace.delivery_journal(self.place, number), "*.json"):
            with contextlib.suppress(ValueError, TypeError, LookupError, pa.ArrowException):
                rows += pa.Table.from_pylist(parse_json(read_bytes(path))["files"], DELIVERED).to_pylist()
        if not rows:
            return table
        journaled = pa.Table.from_pylist(rows, DELIVERED)
        older = table.filter(pc.invert(pc.is_in(table["path"], journaled["path"].combine_chunks())))
        return pa.concat_tables([older, journaled]).sort_by("path")

    def gather(self, number: int) -> None:
        """Turn the journal of a shard into its table, and pack its pictures where they go into tar files."""
        journal = self.workspace.delivery_journal(self.place, number)
        if journal.exists():
            self.workspace.publish_table(self.workspace.delivered(self.place, number), self.table(number))
            shutil.rmtree(journal, ignore_errors=True)
        if self._tars:
            self._tars.pack(number, self._own(number).to_pylist())

    def publish(self) -> Pictures:
        """Write the table of all pictures into the output folder, or beside the tar files, and count them."""
        # A tar file also loses what is in the tar file of another shard since then, even all of it.
        earlier = paths_in(self.workspace.deliveries / self.place, "*.parquet") if self._tars else []
        for number in sorted({*self.shards, *(int(path.stem) for path in earlier)}):
            self.gather(number)
        table = pa.concat_tables([DELIVERED.empty_table(), *map(self.table, self.shards)])
        names, ids = (self._rows[column].combine_chunks() for column in ("name", "id"))
        paths = pa.array([picture_path(self.settings, name) for name in names.to_pylist()], pa.string())
        index = pc.index_in(table["path"].combine_chunks(), paths)
        # Rows of maps, of pictures in other formats and of photos that have changed since are left out.
        table = table.filter(pc.and_(pc.equal(table["id"], ids.take(index)), pc.is_valid(table["key"])))
        table = table.select(PICTURES.names).sort_by("image").combine_chunks()
        if self._tars:
            self._tars.tidy()
            table = self._with_members(table)
        path = table_path(self.settings)
        write_output(path.parent, path.name, as_parquet(table))
        return Pictures(table.num_rows, pc.sum(pc.greater(table["repaired"], 0)).as_py() or 0)

    def _own(self, number: int) -> pa.Table:
        """Read what was delivered of a shard under the current names and formats, for its tar file.

        Images that are in another shard since their photo has changed are left out.
        """
        table = self.table(number)
        current = paths_of(self.settings, table["image"].unique().to_pylist())
        table = table.filter(pc.is_in(table["path"], pa.array(current, pa.string())))
        own = self._rows.filter(pc.equal(self._rows["shard"], number))["name"].combine_chunks()
        others = table["image"].filter(pc.invert(pc.is_in(table["image"], own))).combine_chunks()
        if len(others):  # those that no run asks for any more stay
            moved = self._rows["name"].filter(pc.is_in(self._rows["name"], others)).combine_chunks()
            table = table.filter(pc.invert(pc.is_in(table["image"], moved)))
        return table

    def _sample_of(self, row: dict[str, Any]) -> tuple[str, str]:
        """Name the sample of WebDataset that a file belongs to, and say what the file is in it."""
        if row["path"] == map_path(row["image"]):
            return f"{row['image']}{self.settings.suffix}", ".trust_map.png"
        return os.path.splitext(row["path"])

    def _with_members(self, table: pa.Table) -> pa.Table:
        """Name pictures by the paths of tar files and the members in them; leave out those that are not packed."""
        assert self._tars
        members: dict[str, str] = {}
        for number in self.shards:
            if packed := self._tars.packed(number):
                tar = self._tars.path(number).name
                members |= {path: f"{tar}/{member}" for path, member in packed.members.items()}
        paths = pa.array([members.get(path) for path in table["path"].to_pylist()], pa.string())
        return table.set_column(table.schema.get_field_index("path"), "path", paths).filter(pc.is_valid(paths))

    def _is_there(self, row: dict[str, Any] | None, key: str, held: Mapping[str, str]) -> bool:
        """Check whether a file is in the folder of pictures, or held by a tar file, by its row, where there is one."""
        if row is None or row["key"] != key:
            return False
        return bool(self._size(row["path"]) == row["bytes"] or held.get(row["path"]) == row["checksum"])

    def _size(self, path: str) -> int | None:
        """Return the bytes of a file of the folder of pictures; None where it is not there."""
        if self._sizes is not None:
            return self._sizes.get(path)
        with contextlib.suppress(OSError):
            return (self._folder / path).stat().st_size
        return None


def plan_deliveries(delivering: Delivering, corpus: CorpusSettings) -> Deliveries:
    """Find the images of a corpus that can be delivered (raises `UsageError`: as `target_of`)."""
    return Deliveries(Workspace(corpus.workspace), delivering, target_of(corpus)[0], corpus.limit)


def delivery_key(delivering: Delivering, target: Target, image_id: str, record: Record, human: HumanMask | None) -> str:
    """Make the key of a picture from all that goes into it.

    Args:
        delivering: How to write pictures.
        target: The settings of detection and the models.
        image_id: The content of the photo, or of the pair of results.
        record, human: The record of the image, and its mask by a person.
    """
    mask = mask_of(record, human)
    repair = (target.mse_sr_key, mask, delivering.feather, delivering.strength)
    return fingerprint(
        "delivery",
        DELIVERY_VERSION,
        image_id,
        target.gan_sr_key,
        repair if mask and delivering.repair != "off" else None,
        (target.mse_sr_key, mask, target.mask_key, record.labels_hash) if delivering.trust_map else None,
        *(getattr(delivering, name) for name in ("format", "quality", "colour")),
    )


def mask_of(record: Record, human: HumanMask | None) -> str | None:
    """Identify the mask that counts for an image, a person's before the detector's; None where it is empty."""
    if human is not None:
        return human.checksum or str(human.path) if human.pixels else None
    return (record.checksums.get("masks") or record.mask_key) if record.artifact_pixels else None


def picture_path(delivering: Delivering, name: str) -> str:
    """Return the path of the picture of an image in the output folder."""
    return f"{name}{delivering.suffix}{suffix_of(delivering.format)}"


def map_path(name: str) -> str:
    """Return the path of the trust map of an image in the output folder."""
    return f"{_MAPS}/{name}.png"


def paths_of(delivering: Delivering, names: Sequence[str]) -> list[str]:
    """List the paths of the files of an image with some names in the output folder: pictures, and maps where wanted."""
    pictures = [picture_path(delivering, name) for name in names]
    return pictures + (list(map(map_path, names)) if delivering.trust_map else [])


def pictures_folder(delivering: Delivering) -> Path:
    """Return the folder that workers write pictures to: the output, or where that is tar files one in the workspace."""
    if is_tar(delivering.output):
        return Workspace(delivering.workspace).unpacked(output_key(delivering))
    return delivering.output


def table_path(delivering: Delivering) -> Path:
    """Return the path of the table of all pictures: in the output folder, or beside the tar files."""
    if is_tar(delivering.output):
        return delivering.output.with_suffix(".parquet")
    return delivering.output / TABLE


def output_key(delivering: Delivering) -> str:
    """Name the folder of what is known about an output folder."""
    return fingerprint("output", str(delivering.output.absolute()))


def sizes_at(output: Remote, start: str = "") -> dict[str, int]:
    """List files as `listing` does with their bytes; none where the URL does not exist yet (raises as `listing`)."""
    return {file.path: file.size for file in listing(output, start=start)} if output.exists() else {}


def corpus_of(delivering: Delivering) -> CorpusSettings:
    """Make the settings of the run before a delivery: those of the latest run, with the workspace's current model.

    Raises:
        UsageError: No photos or no model are known, or the workspace belongs to desra detect, which has results.
    """
    workspace = Workspace(delivering.workspace)
    given: dict[str, Any] = {
        name: getattr(delivering, name) for name in ("photos", "gan_model", "mse_model", "precision")
    }
    given = {name: value for name, value in given.items() if value is not None}
    if not workspace.settings.exists():
        for name, flag in (("photos", "PHOTOS"), ("gan_model", "--gan-model")):
            if name not in given:
                reason = f"is not given, and {workspace.root} is no workspace with a run in it"
                raise UsageError(flag, reason, "give it, or the --workspace of desra mine, detect or cycle")
        corpus: CorpusSettings = Mining(workspace=workspace.root, **given)
    else:
        corpus, _ = load_settings(workspace)
        if isinstance(corpus, Detection) and given:
            reason = "belongs to runs of desra detect, whose results are files"
            raise UsageError(workspace.root, reason, "leave out photos and models, or name another workspace")
        current = current_model(workspace)
        if current and isinstance(corpus, Mining):
            given = {"gan_model": current} | given
        corpus = type(corpus)(**(corpus.model_dump() | given | {"workspace": workspace.root}))
    if isinstance(corpus, Mining) and "mse_model" not in given and lacks_twin(corpus):
        corpus = corpus.model_copy(update={"mse_model": BICUBIC})
    for place in corpus.sources.places.values():
        tars, _ = in_tars(place)
        if is_tar(delivering.output):  # tar files are photos only where they are named
            inside = tars is not None and fnmatch(str(tar_path(delivering.output, 0)), str(tars))
        else:  # where all files of a folder are asked for, not only some
            inside = not is_selection(place) and delivering.output.resolve().is_relative_to(place.resolve())
        if inside:
            reason = f"lies inside {place}, whose pictures the next run would take for photos"
            raise UsageError(delivering.output, reason, "name a folder outside of it")
    return corpus
