"""The manifest of a workspace: its images, identified by content, and the shard of each.

Images are rows of an Arrow table; no Python object of an image outlives its batch.
"""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from desra_core.errors import ImageError
from desra_core.files.hashing import digest, hash_file
from desra_core.images.scanning import image_files, is_selection
from desra_core.workspace import Workspace, read_table
from desra_core.workspace.human_masks import rename_human_masks
from desra_core.workspace.matching import FAILURES, ROLES, Sources, match, scan_failure
from desra_core.workspace.records import flags_of, read_records

_BATCH = 65_536
_HASH_BATCH = 128
_PASSED_OVER = b"passed_over"  # metadata of the table of scan failures
_ROLE_FIELDS = (("path", pa.string()), ("size", pa.int64()), ("mtime", pa.int64()), ("hash", pa.string()))
MANIFEST = pa.schema(
    [("name", pa.string()), ("id", pa.string()), ("shard", pa.int32()), ("present", pa.bool_()), ("asked", pa.bool_())]
    + [(f"{role}_{field}", kind) for role in ROLES for field, kind in _ROLE_FIELDS]
)
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


class Corpus(NamedTuple):
    """The manifest after a scan, and how the scan changed it.

    Attributes:
        manifest, failures: The images, and the files that could not become images (schema `FAILURES`).
        passed_over: Counts of the other files, see `desra_core.images.scanning.kinds_in_words`.
        added, replaced, vanished: Numbers of images.
    """

    manifest: pa.Table
    failures: pa.Table
    passed_over: dict[str, int]
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

    Files of unchanged size and modification time keep their hash, unless a run found other content in a file, or the
    id of an image would change though no file has changed. A new image enters a new shard and stays there. A changed
    file is a new image of the same name, and the outputs of the old image are deleted. A vanished file keeps its row
    and outputs. Nothing is ever written into the source folders.

    Args:
        sources: The folders to scan.
        workspace: Its folder is left out of the scan, where it lies inside a source folder.
        shard_size: Images per new shard.
        limit: Take only the first so many images, by name.
        on_hashed: Called now and then with the number of files hashed and to be hashed.

    Raises:
        UsageError: A folder does not exist or holds no images, or folders do not belong together.
    """
    found, failures, passed_over = match(sources, workspace.root)
    found = found.sort_by("name")
    asked = found.slice(0, limit)
    previous = _under_new_names(workspace, read_manifest(workspace), found, sources)
    current, unreadable = _identified(asked, _trusted(previous, workspace), sources, on_hashed)
    if previous is not None and (doubted := _changed_by_the_manifest_alone(current, previous)):
        trusted = current.filter(pc.invert(pc.is_in(current["name"], pa.array(doubted))))
        trusted = trusted.replace_schema_metadata(_roots(sources))
        current, unreadable = _identified(asked, trusted, sources, on_hashed)
        previous = _mended(previous, current, sources, doubted)
    failures = pa.concat_tables([failures, unreadable])
    if asked.num_rows < found.num_rows:
        failures = failures.filter(pc.less(failures["name"], found["name"][asked.num_rows]))
    readable = found.filter(pc.invert(pc.is_in(found["name"], failures["name"].combine_chunks())))
    unasked = _unasked(previous, found, sources, workspace)
    manifest, added, replaced = _with_shards(current, previous, readable["name"], unasked, shard_size)
    for name in replaced:
        workspace.withdraw(name)
    if replaced and previous is not None:
        for image_id in previous["id"].filter(pc.invert(pc.is_in(previous["id"], manifest["id"]))).to_pylist():
            workspace.drop_group(image_id)
    vanished = manifest.num_rows - int(pc.sum(manifest["present"]).as_py() or 0)
    manifest = manifest.replace_schema_metadata(_roots(sources))
    workspace.publish_table(workspace.manifest, manifest)
    metadata = {_PASSED_OVER: json.dumps(passed_over)} if passed_over else None
    workspace.publish_table(workspace.scan_failures, failures.replace_schema_metadata(metadata))
    return Corpus(manifest, failures, dict(passed_over), added, len(replaced), vanished)


def read_passed_over(workspace: Workspace) -> dict[str, int]:
    """Read the counts of the files that the latest scan passed over, see `images.scanning.kinds_in_words`."""
    stored = read_table(workspace.scan_failures, FAILURES).schema.metadata or {}
    passed_over: dict[str, int] = json.loads(stored.get(_PASSED_OVER, b"{}"))
    return passed_over


def read_manifest(workspace: Workspace) -> pa.Table | None:
    """Read the manifest of a workspace, sorted by name; None when it has none yet."""
    if not workspace.manifest.exists():
        return None
    return read_table(workspace.manifest, MANIFEST)


def asked_for(manifest: pa.Table) -> pa.Table:
    """Return the rows of images that the latest scan was asked for and found, also those beyond ``--limit``."""
    return manifest.filter(pc.and_(manifest["present"], pc.fill_null(manifest["asked"], True)))


def image_refs(rows: pa.Table, manifest: pa.Table | None = None) -> list[ImageRef]:
    """Return the images of some rows of a manifest, in their order; rows of equal content are one image.

    With a ``manifest``, an image has all its names there, also vanished names: they share its record.
    """
    roots = {role: Path(root.decode()) for role, root in _stored_roots(rows).items()}

    def file(row: dict[str, str | None], role: str) -> File | None:
        path, content = row[f"{role}_path"], row[f"{role}_hash"]
        return File(roots[role] / path, content) if path and content else None

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
    root = Path(_stored_roots(rows)[role].decode())
    return (root / path for path in rows[f"{role}_path"].to_pylist() if path is not None)


def _under_new_names(
    workspace: Workspace, previous: pa.Table | None, found: pa.Table, sources: Sources
) -> pa.Table | None:
    """Return the manifest with the names that files have now; outputs and human masks are renamed, too.

    The name of the file ``a.jpg`` is ``a``, but ``a.jpg`` as long as a file such as ``a.png`` lies beside it.
    """
    if previous is None:
        return None
    path = f"{sources.identity[-1]}_path"
    index = pc.index_in(previous[path].combine_chunks(), found[path].combine_chunks())
    names = previous["name"].combine_chunks()
    now = pc.coalesce(found["name"].combine_chunks().take(index), names)
    changed = pc.not_equal(now, names)
    renamed = dict(zip(names.filter(changed).to_pylist(), now.filter(changed).to_pylist(), strict=True))
    if not renamed:
        return previous
    # A vanished image loses its outputs where its name is now that of another file.
    taken = pc.and_(pc.invert(changed), pc.is_in(names, now.filter(changed)))
    for name in names.filter(taken).to_pylist():
        workspace.withdraw(name)
    previous, now = previous.filter(pc.invert(taken)).combine_chunks(), now.filter(pc.invert(taken))
    workspace.publish_table(workspace.manifest, previous)
    # A new name may still be the old name of another image: each round renames only to free names. Each round is
    # published before the next: otherwise a run after a killed run would rename the outputs of another image.
    while renamed:
        free = {old: new for old, new in renamed.items() if new not in renamed}
        rename_human_masks(workspace, free)
        for old, new in free.items():
            workspace.rename(old, new)
        moved = pc.is_in(now, pa.array(free.values(), pa.string()))
        previous = previous.set_column(0, "name", pc.if_else(moved, now, previous["name"].combine_chunks()))
        workspace.publish_table(workspace.manifest, previous.sort_by("name").combine_chunks())
        renamed = {old: new for old, new in renamed.items() if old not in free}
    return previous.sort_by("name").combine_chunks()


def _roots(sources: Sources) -> dict[str, str]:
    return {role: str(folder) for role, folder in sources.folders.items()}


def _stored_roots(manifest: pa.Table) -> dict[str, bytes]:
    stored = manifest.schema.metadata or {}
    return {role: stored[role.encode()] for role in ROLES if role.encode() in stored}


def _identified(
    found: pa.Table, previous: pa.Table | None, sources: Sources, on_hashed: Callable[[int, int], None] | None
) -> tuple[pa.Table, pa.Table]:
    """Add ``ROLE_hash``, ``content`` (the id without labels) and ``id``; hash only files that may have changed."""
    hashes = {role: _known_hashes(found, previous, sources, role) for role in ROLES}
    unknown = {
        role: pc.and_(pc.is_valid(found[f"{role}_path"]), hashes[role].is_null()).to_numpy(zero_copy_only=False)
        for role in sources.places
    }
    total, done = sum(int(flags.sum()) for flags in unknown.values()), 0
    failed: list[dict[str, str]] = []
    with ThreadPoolExecutor() as pool:
        for role, folder in sources.folders.items():
            rows = np.flatnonzero(unknown[role])
            new = [pa.array([], pa.string())]
            for start in range(0, rows.size, _HASH_BATCH):
                batch = found.select(["name", f"{role}_path"]).take(rows[start : start + _HASH_BATCH])
                results = list(pool.map(_hashed, (folder / path for path in batch[f"{role}_path"].to_pylist())))
                failed += [
                    scan_failure(*result.failure) | {"name": name}
                    for name, result in zip(batch["name"].to_pylist(), results, strict=True)
                    if isinstance(result, ImageError)
                ]
                new.append(pa.array((None if isinstance(r, ImageError) else r for r in results), pa.string()))
                done += len(results)
                if on_hashed:
                    on_hashed(done, total)
            hashes[role] = pc.replace_with_mask(hashes[role], pa.array(unknown[role]), pa.concat_arrays(new))
    table = found
    for role in ROLES:
        table = table.append_column(f"{role}_hash", hashes[role])
    problems = pa.Table.from_pylist(failed, FAILURES)
    table = table.filter(pc.invert(pc.is_in(table["name"], problems["name"].combine_chunks())))
    ids = [pa.array([], pa.string())]
    for rows in table.select([f"{role}_hash" for role in sources.identity]).to_batches(max_chunksize=_BATCH):
        contents = zip(*(column.to_pylist() for column in rows.columns), strict=True)
        ids.append(pa.array((digest(" ".join(hashes).encode()) for hashes in contents), pa.string()))
    contents, labels = pa.concat_arrays(ids), table["labels_hash"].combine_chunks()
    table = table.append_column("content", contents)
    return table.append_column("id", _ids_with_labels(contents, labels)), problems


def _aligned(table: pa.Table, manifest: pa.Table) -> pa.Table:
    """Look up the row of a manifest for each name of a table; nulls where the manifest lacks the name."""
    index = pc.index_in(table["name"].combine_chunks(), manifest["name"].combine_chunks())
    return manifest.take(index).combine_chunks()


def _known_hashes(found: pa.Table, previous: pa.Table | None, sources: Sources, role: str) -> pa.Array:
    """Return the hashes of files whose folder, path, size and time are as before; null for the others."""
    if previous is None or _stored_roots(previous).get(role) != str(sources.folders.get(role)).encode():
        return pa.nulls(found.num_rows, pa.string())
    before = _aligned(found, previous)
    fields = [f"{role}_{field}" for field in ("path", "size", "mtime")]
    same = [flags_of(pc.equal(found[field].combine_chunks(), before[field].combine_chunks())) for field in fields]
    known = pa.array(np.logical_and.reduce(same))
    return pc.if_else(known, before[f"{role}_hash"].combine_chunks(), pa.scalar(None, pa.string()))


def _hashed(path: Path) -> str | ImageError:
    try:
        return hash_file(path)
    except ImageError as error:
        return error


def _trusted(previous: pa.Table | None, workspace: Workspace) -> pa.Table | None:
    """Drop from the manifest the images of which a run found a changed file."""
    if previous is None:
        return None
    records = read_records(workspace, ["id", "reason"])
    found = records["id"].filter(pc.equal(records["reason"], CHANGED))
    return previous.filter(pc.invert(pc.is_in(previous["id"], found.combine_chunks())))


def _changed_by_the_manifest_alone(current: pa.Table, previous: pa.Table) -> list[str]:
    """List all names of images whose id would change although every stored hash is as before.

    The cause is a damaged manifest, or labels that once differed from those of an equal image that has vanished.
    """
    before = _aligned(current, previous)
    changed = flags_of(pc.not_equal(current["id"].combine_chunks(), before["id"].combine_chunks()))
    for role in ROLES:
        now, then = (table[f"{role}_hash"].combine_chunks() for table in (current, before))
        changed &= flags_of(pc.equal(now, then)) | flags_of(pc.and_(now.is_null(), then.is_null()))
    alike = pc.is_in(current["content"], current["content"].filter(pa.array(changed)).combine_chunks())
    names: list[str] = current["name"].filter(alike).to_pylist()
    return names


def _mended(previous: pa.Table, current: pa.Table, sources: Sources, doubted: list[str]) -> pa.Table:
    """Correct the ids in a manifest, for images whose files have the content that the manifest records."""
    before, now = (
        {row["name"]: row for row in table.filter(pc.is_in(table["name"], pa.array(doubted))).to_pylist()}
        for table in (previous, current)
    )
    mended = {
        name: row["id"]
        for name, row in now.items()
        if name in before
        and all(row[f"{role}_hash"] == before[name][f"{role}_hash"] for role in sources.identity)
        and before[name]["id"] not in (row["content"], _id_by_labels(row["content"], row["labels_hash"]))
    }
    names, known = previous["name"].to_pylist(), previous["id"].to_pylist()
    ids = [mended.get(name, image_id) for name, image_id in zip(names, known, strict=True)]
    return previous.set_column(previous.schema.get_field_index("id"), "id", pa.array(ids, pa.string()))


def _id_by_labels(image_id: str, labels: str | None) -> str:
    """Compute the id of an image with the results of another image, but with other labels."""
    return digest(f"{image_id} {labels}".encode())


def _ids_with_labels(contents: pa.Array, labels: pa.Array) -> pa.Array:
    """Compute ids: images of equal content share one, unless their labels (so their masks) differ from the first's."""
    firsts = pa.table({"content": contents, "labels": labels}).group_by("content", use_threads=False)
    firsts = firsts.aggregate([("labels", "first")])
    first = firsts["labels_first"].combine_chunks().take(pc.index_in(contents, firsts["content"].combine_chunks()))
    other = pc.fill_null(pc.not_equal(labels, first), False)
    pairs = zip(contents.filter(other).to_pylist(), labels.filter(other).to_pylist(), strict=True)
    own = pa.array((_id_by_labels(content, label) for content, label in pairs), pa.string())
    return pc.replace_with_mask(contents, other, own)


def _unasked(previous: pa.Table | None, found: pa.Table, sources: Sources, workspace: Workspace) -> pa.Array:
    """List the names of images whose files are in the main folder, but were not asked for."""
    role = sources.identity[-1]
    selects = any(is_selection(sources.places[each]) for each in sources.identity)
    if not selects or previous is None or _stored_roots(previous).get(role) != str(sources.main).encode():
        return pa.array([], pa.string())
    there = image_files(sources.main, workspace.root, sources.exclusion()).files["path"].combine_chunks()
    paths = previous[f"{role}_path"]
    asked = pc.is_in(paths, found[f"{role}_path"].combine_chunks())
    return previous["name"].filter(pc.and_not(pc.is_in(paths, there), asked)).combine_chunks()


def _with_shards(
    current: pa.Table, previous: pa.Table | None, seen: pa.ChunkedArray, unasked: pa.Array, shard_size: int
) -> tuple[pa.Table, int, list[str]]:
    """Give images their shards; returns the manifest, the number of new images, and the names of replaced images."""
    ids, names = current["id"].combine_chunks(), current["name"].combine_chunks()
    known = MANIFEST.empty_table() if previous is None else previous
    shards = known["shard"].combine_chunks().take(pc.index_in(ids, known["id"].combine_chunks()))
    fresh = ids.filter(shards.is_null()).unique()
    first = (pc.max(known["shard"]).as_py() + 1) if known.num_rows else 0
    fresh_shards = pa.array(first + np.arange(len(fresh)) // shard_size, pa.int32())
    shards = pc.coalesce(shards, fresh_shards.take(pc.index_in(ids, fresh)))
    here = pa.array(np.ones(len(ids), bool))
    table = current.append_column("shard", shards).append_column("present", here).append_column("asked", here)
    before = known["id"].combine_chunks().take(pc.index_in(names, known["name"].combine_chunks()))
    replaced = names.filter(pc.fill_null(pc.not_equal(before, ids), False)).to_pylist()
    other = known.filter(pc.invert(pc.is_in(known["name"], names)))
    left = pc.is_in(other["name"], unasked)
    still_there = pc.or_(left, pc.is_in(other["name"], seen.combine_chunks()))
    for field, flags in (("present", pc.and_(other["present"], still_there)), ("asked", pc.invert(left))):
        other = other.set_column(other.schema.get_field_index(field), field, flags)
    tables = [table.select(MANIFEST.names).cast(MANIFEST), other.cast(MANIFEST)]
    return pa.concat_tables(tables).sort_by("name").combine_chunks(), len(fresh), replaced
