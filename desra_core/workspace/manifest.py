"""The manifest of a workspace: its images, identified by content, and the shard of each.

Images are rows of an Arrow table; no Python object of an image outlives its batch.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from desra_core.errors import DesraError, ImageError
from desra_core.files import digest, hash_file
from desra_core.images.scanning import FILES, image_files, is_selection, paths_of
from desra_core.remote import Listed, Remote, file_at, members, place_of, threads_for
from desra_core.workspace import Workspace, read_table
from desra_core.workspace.human_masks import rename_human_masks
from desra_core.workspace.matching import FAILURES, ROLES, Sources, match, scan_failure
from desra_core.workspace.products import (
    Flags,
    flags_of,
    gather_shard,
    read_records,
    read_shard,
    shards_of_records,
)

_BATCH = 65_536
_HASH_BATCH = 128
_PASSED_OVER = b"passed_over"  # metadata of the table of scan failures
_ROLE_FIELDS = (*((field.name, field.type) for field in FILES if field.name != "name"), ("hash", pa.string()))
MANIFEST = pa.schema(
    [("name", pa.string()), ("id", pa.string()), ("shard", pa.int32()), ("present", pa.bool_()), ("asked", pa.bool_())]
    + [(f"{role}_{field}", kind) for role in ROLES for field, kind in _ROLE_FIELDS]
)
# The members of tar files, as the latest scan listed them.
_MEMBER = pa.struct([("path", pa.string()), ("size", pa.int64()), ("offset", pa.int64())])
_TARS = pa.schema([("tar", pa.string()), ("size", pa.int64()), ("version", pa.int64()), ("members", pa.list_(_MEMBER))])
# The reason of a failure where the content of a file is not the one that the manifest records.
CHANGED = "changed after the run had started"


class File(NamedTuple):
    """A file and the hash of the content it had when the corpus was scanned."""

    path: Path
    hash: str


@dataclass(frozen=True)
class ImageRef:
    """One image to be processed, at every name under which it occurs: a pair of SR results, or an LR photo."""

    id: str
    shard: int
    names: tuple[str, ...]
    mse_sr: File | None
    gan_sr: File | None
    lr: File | None
    labels: File | None

    @property
    def path(self) -> Path:
        """The file by which messages name the image."""
        file = self.gan_sr or self.lr
        assert file is not None
        return file.path

    @property
    def files(self) -> list[Path]:
        """All files of the image."""
        return [file.path for file in (self.mse_sr, self.gan_sr, self.lr, self.labels) if file]


class Corpus(NamedTuple):
    """The manifest after a scan, and how the scan changed it."""

    # The images, and the files that could not become images (schema `FAILURES`).
    manifest: pa.Table
    failures: pa.Table
    passed_over: dict[str, int]  # counts of the other files, see `desra_core.images.scanning.kinds_in_words`
    # Numbers of images.
    added: int
    replaced: int
    vanished: int


def scan(
    sources: Sources,
    workspace: Workspace,
    *,
    shard_size: int,
    limit: int | None = None,
    on_hashed: Callable[[int, int], None] | None = None,
) -> Corpus:
    """Bring the manifest of a workspace up to date with its source folders.

    A file of unchanged size and modification time is not read again, except where a run found other content in it, or
    where the id of an image would change although no file has changed. A new image enters a new shard and stays there.
    A changed file is a new image of the same name, and the outputs of the old image are deleted. A vanished file keeps
    its row and outputs. Nothing is ever written into the source folders.

    Args:
        sources: The folders to scan.
        workspace: Its folder is left out of the scan, where it lies inside a source folder.
        shard_size: Images per new shard.
        limit: Take only the first so many images, by name.
        on_hashed: Called now and then with the number of files hashed so far, and of all files to be hashed.

    Raises:
        UsageError: A folder does not exist or holds no images, or folders do not belong together.
    """
    tars = _Tars(workspace)
    found, failures, passed_over = match(sources, workspace.root, tars.members_of)
    tars.publish()
    found = found.sort_by("name")
    within_limit = found.slice(0, limit)
    previous = _under_new_names(workspace, read_manifest(workspace), found, sources)
    # Hashes in the manifest are trusted, except of images in which a run found other content.
    records = read_records(workspace, ["id", "reason"])
    changed = records["id"].filter(pc.equal(records["reason"], CHANGED))
    current, unreadable = _with_ids(within_limit, _without(previous, "id", changed), sources, on_hashed)
    # Where an id would change though no file has, the manifest may be damaged: read those files, too, before an output
    # is deleted.
    if len(doubted := _changed_without_a_file(current, previous)):
        trusted = _without(current, "name", doubted).replace_schema_metadata(_roots(sources))
        current, unreadable = _with_ids(within_limit, trusted, sources, on_hashed)
        previous = _with_right_ids(previous, current, sources, doubted)
    failures = pa.concat_tables([failures, unreadable])
    if within_limit.num_rows < found.num_rows:
        failures = failures.filter(pc.less(failures["name"], found["name"][within_limit.num_rows]))
    readable = _without(found, "name", failures["name"])
    unasked = _unasked(previous, found, sources, workspace)
    manifest, added, replaced = _with_shards(workspace, current, previous, readable["name"], unasked, shard_size)
    for name in replaced:
        workspace.withdraw(name)
    if replaced:
        for image_id in _without(previous, "id", manifest["id"])["id"].to_pylist():
            workspace.drop_group(image_id)
    vanished = manifest.num_rows - int(pc.sum(manifest["present"]).as_py() or 0)
    manifest = manifest.replace_schema_metadata(_roots(sources))
    workspace.publish_table(workspace.manifest, manifest)
    metadata = {_PASSED_OVER: json.dumps(passed_over)} if passed_over else None
    workspace.publish_table(workspace.scan_failures, failures.replace_schema_metadata(metadata))
    return Corpus(manifest, failures, dict(passed_over), added, len(replaced), vanished)


class _Tars:
    """The members of tar files: those of a tar file that is as an earlier scan found it are not listed again."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._known = read_table(workspace.tars, _TARS)
        keys = self._known.select(["tar", "size", "version"]).to_pylist()
        self._rows = {tuple(key.values()): row for row, key in enumerate(keys)}
        self._taken: list[int] = []
        self._new: list[dict[str, Any]] = []

    def members_of(self, tar: Path, listed: Listed) -> list[Listed]:
        """List a tar file (raises as `desra_core.remote.members`)."""
        row = self._rows.get((str(tar), listed.size, listed.version))
        if row is not None:
            self._taken.append(row)
            return [Listed(**member, version=0) for member in self._known["members"][row].as_py()]
        found = list(members(tar))
        own = [{"path": member.path, "size": member.size, "offset": member.offset} for member in found]
        self._new.append({"tar": str(tar), "size": listed.size, "version": listed.version, "members": own})
        return found

    def publish(self) -> None:
        """Write the table where it has changed."""
        if self._new or len(set(self._taken)) < self._known.num_rows:
            known = self._known.take(pa.array(sorted(set(self._taken)), pa.int64()))
            table = pa.concat_tables([known, pa.Table.from_pylist(self._new, _TARS)]).sort_by("tar")
            self._workspace.publish_table(self._workspace.tars, table.combine_chunks())


def note_checksums(workspace: Workspace, checksums: Mapping[str, Mapping[str, str | None]]) -> None:
    """Note the checksums of new files of images in their records. The workspace must be locked.

    Args:
        workspace: The workspace.
        checksums: By name of an image: entries of `Record.checksums`, None for those that go.
    """
    manifest = read_manifest(workspace)
    rows = manifest.filter(pc.is_in(manifest["name"], pa.array(checksums, pa.string())))
    for shard in rows["shard"].unique().to_pylist():
        records = read_shard(workspace, shard)
        for row in rows.filter(pc.equal(rows["shard"], shard)).select(["name", "id"]).to_pylist():
            if record := records.get(row["id"]):
                noted = record.checksums | dict(checksums[row["name"]])
                records[record.id] = replace(record, checksums={kind: one for kind, one in noted.items() if one})
        gather_shard(workspace, shard, records.values())


def read_passed_over(workspace: Workspace) -> dict[str, int]:
    """Read the counts of the files that the latest scan passed over, see `images.scanning.kinds_in_words`."""
    stored = read_table(workspace.scan_failures, FAILURES).schema.metadata or {}
    passed_over: dict[str, int] = json.loads(stored.get(_PASSED_OVER, b"{}"))
    return passed_over


def read_manifest(workspace: Workspace) -> pa.Table:
    """Read the manifest of a workspace, sorted by name; it is empty where there is none yet."""
    return read_table(workspace.manifest, MANIFEST)


def asked_for(manifest: pa.Table) -> pa.Table:
    """Return the rows of images that the latest scan was asked for and found, also those beyond ``--limit``."""
    flags = pc.and_(manifest["present"], pc.fill_null(manifest["asked"], True))
    # As a rule it is all of them, and a copy of a million rows takes 200 MB.
    return manifest if pc.all(flags).as_py() else manifest.filter(flags)


def image_refs(rows: pa.Table, manifest: pa.Table | None = None) -> list[ImageRef]:
    """Return the images of some rows of a manifest, in their order; rows of equal content are one image.

    With a ``manifest``, an image has all its names there, also vanished ones, because all its names share its record.
    """
    roots = {role: place_of(root.decode()) for role, root in _stored_roots(rows).items()}

    def file(row: dict[str, Any], role: str) -> File | None:
        path, content = row[f"{role}_path"], row[f"{role}_hash"]
        if not (path and content):
            return None
        return File(file_at(roots[role], path, row[f"{role}_size"], row[f"{role}_offset"]), content)

    first: dict[str, dict[str, Any]] = {}
    for row in rows.to_pylist():
        first.setdefault(row["id"], row)
    named = rows if manifest is None else manifest.filter(pc.is_in(manifest["id"], rows["id"].combine_chunks()))
    names: dict[str, list[str]] = {}
    for name, image_id in zip(named["name"].to_pylist(), named["id"].to_pylist(), strict=True):
        names.setdefault(image_id, []).append(name)
    return [
        ImageRef(image_id, row["shard"], tuple(names[image_id]), **{role: file(row, role) for role in ROLES})
        for image_id, row in first.items()
    ]


def role_files(rows: pa.Table, role: str) -> Iterator[Path]:
    """Return the files of a role in some rows of a manifest."""
    return paths_of(place_of(_stored_roots(rows)[role].decode()), rows, f"{role}_")


def picture_files(workspace: Workspace, verb: str, names: Sequence[str]) -> dict[str, dict[str, Path]]:
    """Return the files of some images by name and kind, the mask included; a file may have vanished.

    Args:
        workspace: The workspace.
        verb: With ``mine``, the files are in the dataset: lr, mse_sr, gan_sr and pseudo_gt. Otherwise they are the
            sources: mse_sr and gan_sr, and lr and labels where there are any.
        names: Of images in the manifest.
    """
    if verb == "mine":
        kinds = ("lr", "mse_sr", "gan_sr", "pseudo_gt")
        files = {name: {kind: workspace.dataset(kind, name) for kind in kinds} for name in names}
    else:
        manifest = read_manifest(workspace)
        rows = manifest.filter(pc.is_in(manifest["name"], pa.array(names, pa.string())))
        images = [image for row in range(rows.num_rows) for image in image_refs(rows.slice(row, 1))]
        files = {
            image.names[0]: {role: file.path for role in ROLES if (file := getattr(image, role)) is not None}
            for image in images
        }
    return {name: of_image | {"mask": workspace.mask(name)} for name, of_image in files.items()}


def _under_new_names(workspace: Workspace, previous: pa.Table, found: pa.Table, sources: Sources) -> pa.Table:
    """Return the manifest with the names that files have now; outputs and human masks are renamed, too.

    The name of the file ``a.jpg`` is ``a``, but ``a.jpg`` as long as a file such as ``a.png`` lies beside it.
    """
    path = f"{sources.identity[-1]}_path"
    index = pc.index_in(previous[path].combine_chunks(), found[path].combine_chunks())
    names = previous["name"].combine_chunks()
    new_names = pc.coalesce(found["name"].combine_chunks().take(index), names)
    changed = pc.not_equal(new_names, names)
    renamed = dict(zip(names.filter(changed).to_pylist(), new_names.filter(changed).to_pylist(), strict=True))
    if not renamed:
        return previous
    # An image whose name now belongs to another file has vanished; it would share its outputs with that file, so these
    # are deleted.
    taken = pc.and_(pc.invert(changed), pc.is_in(names, new_names.filter(changed)))
    for name in names.filter(taken).to_pylist():
        workspace.withdraw(name)
    previous, new_names = previous.filter(pc.invert(taken)).combine_chunks(), new_names.filter(pc.invert(taken))
    workspace.publish_table(workspace.manifest, previous)
    # A new name may still be the old name of another image: each round renames only to free names. Each round is
    # published before the next: otherwise a run after a killed run would rename the outputs of another image.
    while renamed:
        free = {old: new for old, new in renamed.items() if new not in renamed}
        rename_human_masks(workspace, free)
        for old, new in free.items():
            workspace.rename(old, new)
        moved = pc.is_in(new_names, pa.array(free.values(), pa.string()))
        previous = previous.set_column(0, "name", pc.if_else(moved, new_names, previous["name"].combine_chunks()))
        workspace.publish_table(workspace.manifest, previous.sort_by("name").combine_chunks())
        renamed = {old: new for old, new in renamed.items() if old not in free}
    return previous.sort_by("name").combine_chunks()


def _roots(sources: Sources) -> dict[str, str]:
    return {role: str(folder) for role, folder in sources.folders.items()}


def _stored_roots(manifest: pa.Table) -> dict[str, bytes]:
    stored = manifest.schema.metadata or {}
    return {role: stored[role.encode()] for role in ROLES if role.encode() in stored}


def _without(table: pa.Table, column: str, values: pa.ChunkedArray) -> pa.Table:
    """Drop the rows of a table whose value in a column is among some values."""
    return table.filter(pc.invert(pc.is_in(table[column], values.combine_chunks())))


def _with_ids(
    found: pa.Table, previous: pa.Table, sources: Sources, on_hashed: Callable[[int, int], None] | None
) -> tuple[pa.Table, pa.Table]:
    """Add the columns ``ROLE_hash``, ``content`` (the id but for the labels) and ``id`` to images.

    Returns the images, and rows of the schema `FAILURES` about those that cannot be read.
    """
    table, problems = _with_hashes(found, previous, sources, on_hashed)
    digests = []
    for rows in table.select([f"{role}_hash" for role in sources.identity]).to_batches(max_chunksize=_BATCH):
        each = zip(*(column.to_pylist() for column in rows.columns), strict=True)
        digests.append(pa.array((digest(" ".join(hashes).encode()) for hashes in each), pa.string()))
    contents, labels = pa.chunked_array(digests, pa.string()).combine_chunks(), table["labels_hash"].combine_chunks()
    # Images of equal content share an id, unless their labels, and so their masks, differ from those of the first.
    other = pc.fill_null(pc.not_equal(labels, labels.take(pc.index_in(contents, contents))), False)
    pairs = zip(contents.filter(other).to_pylist(), labels.filter(other).to_pylist(), strict=True)
    own = pa.array((_id_with_labels(*pair) for pair in pairs), pa.string())
    table = table.append_column("content", contents)
    return table.append_column("id", pc.replace_with_mask(contents, other, own)), problems


def _with_hashes(
    found: pa.Table, previous: pa.Table, sources: Sources, on_hashed: Callable[[int, int], None] | None
) -> tuple[pa.Table, pa.Table]:
    """Add the columns ``ROLE_hash``: of files that are as ``previous`` records them from there, of others by reading.

    Returns the images that can be read, and rows of the schema `FAILURES` about the others.
    """
    hashes = dict.fromkeys(ROLES, pa.nulls(found.num_rows, pa.string()))
    before = _rows_of_names(found, previous)
    for role, folder in sources.folders.items():
        if _stored_roots(previous).get(role) == str(folder).encode():
            known = pa.array(_equal(found, before, [f"{role}_{field}" for field in ("path", "size", "mtime")]))
            hashes[role] = pc.if_else(known, before[f"{role}_hash"].combine_chunks(), pa.scalar(None, pa.string()))
    del before  # a manifest's memory, for hours
    unknown = {role: pc.and_(pc.is_valid(found[f"{role}_path"]), hashes[role].is_null()) for role in sources.places}
    total, done = sum(pc.sum(flags).as_py() or 0 for flags in unknown.values()), 0
    failed: list[dict[str, str]] = []
    with contextlib.ExitStack() as pools:
        for role, folder in sources.folders.items():
            new = []
            columns = ["name", *(f"{role}_{field}" for field in ("path", "size", "offset"))]
            files = found.select(columns).filter(unknown[role]).combine_chunks()
            pool = pools.enter_context(threads_for(folder))
            for batch in files.to_batches(max_chunksize=_HASH_BATCH):
                names = batch["name"].to_pylist()
                results = list(pool.map(_hashed, paths_of(folder, pa.Table.from_batches([batch]), f"{role}_")))
                for name, result in zip(names, results, strict=True):
                    if isinstance(result, ImageError):
                        failed.append(scan_failure(*result.failure) | {"name": name})
                new.append(pa.array((None if isinstance(r, ImageError) else r for r in results), pa.string()))
                done += len(results)
                if on_hashed:
                    on_hashed(done, total)
            read = pa.chunked_array(new, pa.string()).combine_chunks()
            hashes[role] = pc.replace_with_mask(hashes[role], unknown[role].combine_chunks(), read)
    table = found
    for role in ROLES:
        table = table.append_column(f"{role}_hash", hashes[role])
    problems = pa.Table.from_pylist(failed, FAILURES)
    return _without(table, "name", problems["name"]), problems


def _id_with_labels(content: str, labels: str | None) -> str:
    """Compute the id of an image whose labels differ from those of the first image of equal content."""
    return digest(f"{content} {labels}".encode())


def _rows_of_names(table: pa.Table, manifest: pa.Table) -> pa.Table:
    """Look up the row of a manifest for each name of a table; nulls where the manifest lacks the name."""
    index = pc.index_in(table["name"].combine_chunks(), manifest["name"].combine_chunks())
    return manifest.take(index).combine_chunks()


def _equal(one: pa.Table, other: pa.Table, columns: list[str]) -> Flags:
    """Compare two tables row by row: which rows are equal in these columns, where null equals null."""
    flags = np.ones(one.num_rows, bool)
    for column in columns:
        here, there = one[column].combine_chunks(), other[column].combine_chunks()
        flags &= flags_of(pc.equal(here, there)) | flags_of(pc.and_(here.is_null(), there.is_null()))
    return flags


def _hashed(path: Path) -> str | ImageError:
    try:
        return hash_file(path)
    except ImageError as error:
        return error


def _changed_without_a_file(current: pa.Table, previous: pa.Table) -> pa.ChunkedArray:
    """List all names of images whose id would change although no hash of their files has changed.

    The cause is a damaged manifest, or that an image of equal content but other labels has vanished.
    """
    before = _rows_of_names(current, previous)
    other = flags_of(pc.not_equal(current["id"].combine_chunks(), before["id"].combine_chunks()))
    other &= _equal(current, before, [f"{role}_hash" for role in ROLES])
    contents = current["content"].filter(pa.array(other)).combine_chunks()
    return current["name"].filter(pc.is_in(current["content"], contents))


def _with_right_ids(previous: pa.Table, current: pa.Table, sources: Sources, doubted: pa.ChunkedArray) -> pa.Table:
    """Give doubted images of a manifest their ids of this scan, where the manifest has the hashes of their files."""
    now = _rows_of_names(previous, current)
    wrong = _equal(previous, now, [f"{role}_hash" for role in sources.identity])
    wrong &= flags_of(pc.is_in(previous["name"], doubted.combine_chunks()))
    wrong &= flags_of(pc.fill_null(pc.not_equal(previous["id"], now["id"]), False))
    # An id that content and labels may give was right while another image had the same content. Such an id stays, so
    # that the image counts as replaced.
    for index in np.flatnonzero(wrong):
        content, labels = now["content"][index].as_py(), now["labels_hash"][index].as_py()
        wrong[index] = previous["id"][index].as_py() not in (content, _id_with_labels(content, labels))
    ids = pc.if_else(pa.array(wrong), now["id"].combine_chunks(), previous["id"].combine_chunks())
    return previous.set_column(previous.schema.get_field_index("id"), "id", ids)


def _unasked(previous: pa.Table, found: pa.Table, sources: Sources, workspace: Workspace) -> pa.Array:
    """List the names of images whose files are in the main folder, but were not asked for."""
    role = sources.identity[-1]
    selects = any(is_selection(sources.places[each]) for each in sources.identity)
    if not selects or _stored_roots(previous).get(role) != str(sources.main).encode():
        return pa.array([], pa.string())
    try:
        there = image_files(sources.main, workspace.root, **sources.globs()).files["path"].combine_chunks()
    except DesraError:
        if not isinstance(sources.main, Remote):
            raise
        return pa.array([], pa.string())  # a web server need not list its folders
    paths = previous[f"{role}_path"]
    asked = pc.is_in(paths, found[f"{role}_path"].combine_chunks())
    return previous["name"].filter(pc.and_not(pc.is_in(paths, there), asked)).combine_chunks()


def _with_shards(
    workspace: Workspace,
    current: pa.Table,
    previous: pa.Table,
    readable: pa.ChunkedArray,
    unasked: pa.Array,
    shard_size: int,
) -> tuple[pa.Table, int, list[str]]:
    """Give images their shards, and add the images of the previous manifest that the scan did not take.

    ``readable`` are the names of all images that were found, those beyond the limit included. Returns the manifest, the
    number of new images, and the names of replaced images.
    """
    ids, names = current["id"].combine_chunks(), current["name"].combine_chunks()
    # A lost manifest is rebuilt from the records: each image stays in the shard of its record.
    known = previous.select(["id", "shard"]) if previous.num_rows else shards_of_records(workspace)
    shards = known["shard"].combine_chunks().take(pc.index_in(ids, known["id"].combine_chunks()))
    fresh = ids.filter(shards.is_null()).unique()
    first = (pc.max(known["shard"]).as_py() + 1) if known.num_rows else 0
    fresh_shards = pa.array(first + np.arange(len(fresh)) // shard_size, pa.int32())
    shards = pc.coalesce(shards, fresh_shards.take(pc.index_in(ids, fresh)))
    here = pa.array(np.ones(len(ids), bool))
    table = current.append_column("shard", shards).append_column("present", here).append_column("asked", here)
    other_id = pc.not_equal(_rows_of_names(current, previous)["id"].combine_chunks(), ids)
    replaced = names.filter(pc.fill_null(other_id, False)).to_pylist()
    rest = _without(previous, "name", current["name"])
    is_unasked = pc.is_in(rest["name"], unasked)
    is_there = pc.or_(is_unasked, pc.is_in(rest["name"], readable.combine_chunks()))
    for field, flags in (("present", pc.and_(rest["present"], is_there)), ("asked", pc.invert(is_unasked))):
        rest = rest.set_column(rest.schema.get_field_index(field), field, flags)
    tables = [table.select(MANIFEST.names).cast(MANIFEST), rest.cast(MANIFEST)]
    return pa.concat_tables(tables).sort_by("name").combine_chunks(), len(fresh), replaced
